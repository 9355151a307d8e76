//! Who talks while things fail: churn and long-lived connections, UDP with and without answers, short-lived processes,
//! over IPv4, IPv6 and IPv4 from an IPv6 socket. Many addresses and processes, so that every interval has many records.

use crate::demo::cast::{Cast, Part};

/// Every process of the test is named so.
pub const NAME_PREFIX: &str = "chain-";

/// What both ends of the short connections agree on.
const PAGES: &str = "--pattern=exchange --up=1-4000 --down=0-20000";
/// What both ends of the long-lived connections agree on.
const ROWS: &str = "--up=1-6000 --down=0-9000";

/// The cast on these five free ports; `v6` adds the IPv6 half. No process outlives `max_seconds`.
#[must_use]
pub fn cast([web4, web6, dns4, dns6, db]: [u16; 5], v6: bool, seed: u64, max_seconds: u64) -> Cast {
    let part = |name, text: String| Part::new(name, &format!("{text} --seed={seed}"), max_seconds);
    let many: Vec<String> = (1..=16).map(|last| format!("127.77.0.{last}")).collect();
    let many = many.join(",");
    let any = if v6 { "::" } else { "127.0.0.1" };
    let mut cast = Cast {
        servers: vec![
            part(
                "chain-web4",
                format!("tcp-server --listen=0.0.0.0 --port={web4} --mode=prefork --workers=3 {PAGES}"),
            ),
            part(
                "chain-dns4",
                format!("udp-server --listen=127.0.0.1 --port={dns4} --reply=0-1500"),
            ),
            part(
                "chain-db",
                format!("tcp-server --listen={any} --port={db} --mode=event {ROWS}"),
            ),
        ],
        residents: vec![part(
            "chain-pool4",
            format!("tcp-hold --dst=127.0.0.1 --port={db} --connections=20 --rounds=1000000 --pause-ms=300 {ROWS}"),
        )],
        visitors: vec![
            part(
                "chain-churn4",
                format!("tcp-client --dst={many} --port={web4} --connections=400 {PAGES}"),
            ),
            part(
                "chain-short",
                format!("tcp-client --dst={many} --port={web4} --connections=64 --per-process=4 {PAGES}"),
            ),
            part(
                "chain-query4",
                format!(
                    "udp-client --dst=127.0.0.1 --port={dns4} --mode=connected --datagrams=200 --size=0-1400 --reply-every=1"
                ),
            ),
            part(
                "chain-stream",
                format!(
                    "udp-client --dst=127.0.0.1 --port={dns4} --mode=unconnected --datagrams=3000 --size=0-9000 --rate=3000"
                ),
            ),
        ],
    };
    if v6 {
        cast.servers.extend([
            part(
                "chain-web6",
                format!("tcp-server --listen=::1 --port={web6} --mode=inline {PAGES}"),
            ),
            part(
                "chain-dns6",
                format!("udp-server --listen=::1 --port={dns6} --reply=0-1500"),
            ),
        ]);
        cast.residents.push(part(
            "chain-pool6",
            format!("tcp-hold --dst=::1 --port={db} --connections=10 --rounds=1000000 --pause-ms=400 {ROWS}"),
        ));
        cast.visitors.extend([
            part(
                "chain-churn6",
                format!("tcp-client --dst=::1 --port={web6} --connections=200 {PAGES}"),
            ),
            part(
                "chain-query6",
                format!("udp-client --dst=::1 --port={dns6} --mode=unconnected --datagrams=200 --size=0-1400 --reply-every=2"),
            ),
            // An IPv6 socket that talks IPv4.
            part(
                "chain-mapped",
                format!("tcp-client --dst=::ffff:127.0.0.1 --port={web4} --connections=100 {PAGES}"),
            ),
        ]);
    }
    cast
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::traffic::cli::Cli;

    #[test]
    fn every_part_has_valid_arguments_and_a_name_of_its_own_that_the_kernel_keeps() {
        let mut names = std::collections::BTreeSet::new();
        let Cast {
            servers,
            residents,
            visitors,
        } = cast([1, 2, 3, 4, 5], true, 7, 60);
        for Part { name, arguments } in servers.iter().chain(&residents).chain(&visitors) {
            assert!(name.starts_with(NAME_PREFIX) && name.len() <= 15, "{name}");
            assert!(names.insert(*name), "{name} appears twice");
            Cli::try_parse_from(std::iter::once(&"traffic".to_owned()).chain(arguments)).unwrap();
        }
    }

    #[test]
    fn without_ipv6_nobody_uses_it() {
        let cast = cast([1, 2, 3, 4, 5], false, 7, 60);
        let all = cast.servers.iter().chain(&cast.residents).chain(&cast.visitors);
        assert!(all.flat_map(|part| &part.arguments).all(|text| !text.contains("::")));
    }
}
