//! Who talks in the demo: servers, a client with long-lived connections, and short-lived clients that come and go.
//! TCP and UDP, IPv4, IPv6 and IPv4 from an IPv6 socket, all on loopback.

use std::{
    collections::VecDeque,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::Context as _;

use crate::traffic::launch::{Role, Stage};

/// Every process of the demo is named so; process names have at most 15 bytes.
pub const NAME_PREFIX: &str = "demo-";

/// Where servers listen: below the ports that records fold to `*`, so that the table shows them.
const PORTS: std::ops::Range<u16> = 7100..7900;
/// Pause between two short-lived clients.
const PAUSE: Duration = Duration::from_millis(250);
/// Short-lived clients at one time.
const CLIENTS_AT_ONCE: usize = 3;
/// Longest wait for a process to end when asked to; none needs more than a second.
const FAREWELL: Duration = Duration::from_secs(15);
/// What both ends of the short connections agree on.
const PAGES: &str = "--pattern=exchange --up=100-2000 --down=500-30000";
/// What both ends of the long-lived connections agree on.
const ROWS: &str = "--up=50-4000 --down=100-8000";

/// One process to start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Its name.
    pub name: &'static str,
    /// Its role and options.
    pub arguments: Vec<String>,
}

/// Everybody.
#[derive(Clone, Debug, Default)]
pub struct Cast {
    /// Started first, ended last.
    pub servers: Vec<Part>,
    /// Run from beginning to end.
    pub residents: Vec<Part>,
    /// Started in turn, end by themselves.
    pub visitors: Vec<Part>,
}

// === impl Part ===

impl Part {
    /// A process with the role and options in `text` that does not outlive `max_seconds`.
    #[must_use]
    pub fn new(name: &'static str, text: &str, max_seconds: u64) -> Self {
        let mut arguments: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
        arguments.push(format!("--max-seconds={max_seconds}"));
        Self { name, arguments }
    }
}

// === impl Cast ===

impl Cast {
    /// The cast on these five free ports; `v6` adds the IPv6 half. No process outlives `max_seconds`.
    #[must_use]
    pub fn new([web4, web6, dns4, dns6, db]: [u16; 5], v6: bool, max_seconds: u64) -> Self {
        let part = |name, text: String| Part::new(name, &text, max_seconds);
        let udp = "--size=30-300 --datagrams=8 --reply-every=1";
        let mut cast = Self {
            servers: vec![
                part(
                    "demo-web4",
                    format!("tcp-server --listen=127.0.0.1 --port={web4} --mode=prefork --workers=2 {PAGES}"),
                ),
                part(
                    "demo-dns4",
                    format!("udp-server --listen=127.0.0.1 --port={dns4} --reply=40-500"),
                ),
                part(
                    "demo-db",
                    format!("tcp-server --listen=127.0.0.1 --port={db} --mode=event {ROWS}"),
                ),
            ],
            residents: vec![part(
                "demo-pool",
                format!("tcp-hold --dst=127.0.0.1 --port={db} --connections=3 --rounds=1000000 --pause-ms=500 {ROWS}"),
            )],
            visitors: vec![
                part(
                    "demo-browse4",
                    format!("tcp-client --dst=127.0.0.1 --port={web4} --connections=5 {PAGES}"),
                ),
                part(
                    "demo-query4",
                    format!("udp-client --dst=127.0.0.1 --port={dns4} --mode=connected {udp}"),
                ),
            ],
        };
        if v6 {
            cast.servers.extend([
                part(
                    "demo-web6",
                    format!("tcp-server --listen=::1 --port={web6} --mode=inline {PAGES}"),
                ),
                part(
                    "demo-dns6",
                    format!("udp-server --listen=::1 --port={dns6} --reply=40-500"),
                ),
            ]);
            cast.visitors.extend([
                part(
                    "demo-browse6",
                    format!("tcp-client --dst=::1 --port={web6} --connections=4 {PAGES}"),
                ),
                part(
                    "demo-query6",
                    format!("udp-client --dst=::1 --port={dns6} --mode=unconnected {udp}"),
                ),
                // An IPv6 socket that talks IPv4: has to be shown as IPv4.
                part(
                    "demo-mapped",
                    format!("tcp-client --dst=::ffff:127.0.0.1 --port={web4} --connections=3 {PAGES}"),
                ),
            ]);
        }
        cast
    }

    /// Plays until `stop`, then lets everybody end and report. Blocks; run it in a thread of its own, which must stay
    /// as long as the processes do.
    ///
    /// # Errors
    /// A process could not be started, or ended with a failure.
    pub fn play(&self, stage: &Stage, stop: &AtomicBool) -> anyhow::Result<()> {
        let mut servers = Vec::new();
        for server in &self.servers {
            let mut role = stage.start(server.name, &server.arguments)?;
            role.expect("ready")?;
            servers.push(role);
        }
        let mut residents = Vec::new();
        for resident in &self.residents {
            let mut role = stage.start(resident.name, &resident.arguments)?;
            role.expect("open")?;
            residents.push(role);
        }
        let mut visitors: VecDeque<Role> = VecDeque::new();
        for (turn, visitor) in self.visitors.iter().cycle().enumerate() {
            // Everybody comes at least once, so that a show ended early has something to compare too.
            if turn >= self.visitors.len() && stop.load(Ordering::Relaxed) {
                break;
            }
            visitors.push_back(stage.start(visitor.name, &visitor.arguments)?);
            std::thread::sleep(PAUSE);
            if visitors.len() >= CLIENTS_AT_ONCE
                && let Some(oldest) = visitors.pop_front()
            {
                oldest.join(FAREWELL)?;
            }
        }
        // Those who ask end before those who answer.
        for visitor in visitors {
            visitor.join(FAREWELL)?;
        }
        for role in residents.into_iter().chain(servers) {
            role.stop(FAREWELL)?;
        }
        Ok(())
    }
}

/// True if this machine has IPv6 on its loopback interface.
#[must_use]
pub fn has_ipv6() -> bool {
    UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).is_ok()
}

/// Ports that nobody uses on loopback now, all below those that the kernel gives to clients.
///
/// # Errors
/// There are not as many.
pub fn free_ports<const N: usize>(v6: bool) -> anyhow::Result<[u16; N]> {
    let mut addresses = vec![IpAddr::V4(Ipv4Addr::LOCALHOST)];
    if v6 {
        addresses.push(IpAddr::V6(Ipv6Addr::LOCALHOST));
    }
    let free = |port: &u16| {
        addresses.iter().all(|ip| {
            let address = SocketAddr::new(*ip, *port);
            TcpListener::bind(address).is_ok() && UdpSocket::bind(address).is_ok()
        })
    };
    let mut found = [0; N];
    let mut ports = PORTS.filter(free);
    for slot in &mut found {
        *slot = ports.next().with_context(|| {
            format!(
                "fewer than {N} ports from {} to {} are free on loopback: end what listens there (ss -lntup)",
                PORTS.start, PORTS.end
            )
        })?;
    }
    Ok(found)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::traffic::cli::Cli;

    #[test]
    fn every_part_has_valid_arguments_and_a_name_the_kernel_keeps() {
        let Cast {
            servers,
            residents,
            visitors,
        } = Cast::new([1, 2, 3, 4, 5], true, 60);
        let all: Vec<Part> = servers.into_iter().chain(residents).chain(visitors).collect();
        for Part { name, arguments } in &all {
            assert!(name.starts_with(NAME_PREFIX) && name.len() <= 15, "{name}");
            Cli::try_parse_from(std::iter::once(&"traffic".to_owned()).chain(arguments)).unwrap();
        }
        let names: std::collections::BTreeSet<_> = all.iter().map(|part| part.name).collect();
        assert_eq!(names.len(), all.len(), "names tell the parts apart");
    }

    #[test]
    fn without_ipv6_nobody_uses_it() {
        let cast = Cast::new([1, 2, 3, 4, 5], false, 60);
        let all = cast.servers.iter().chain(&cast.residents).chain(&cast.visitors);
        assert!(all.flat_map(|part| &part.arguments).all(|text| !text.contains("::")));
    }

    #[test]
    fn free_ports_are_different() {
        let ports: [u16; 5] = free_ports(has_ipv6()).unwrap();
        assert_eq!(ports.iter().collect::<std::collections::BTreeSet<_>>().len(), 5);
    }
}
