//! Lines of `/proc/PID/net/nf_conntrack`, the same table as text, for namespaces that cannot be entered. No I/O.
//!
//! ```text
//! ipv4     2 tcp      6 119 TIME_WAIT src=10.0.0.1 dst=10.96.0.10 sport=47454 dport=80 src=10.0.0.2 dst=10.0.0.1 ...
//! ```
//! The first `src` to `dport` are of the original direction, the second ones of the replies.

use std::net::IpAddr;

use super::message::{End, Entry, Protocol, Tuple};

/// The connection of one line, `None` if its transport is not looked at.
///
/// # Errors
/// If the line is not one of this table.
pub(super) fn entry(line: &str) -> Result<Option<Entry>, BadLine> {
    let mut words = line.split_ascii_whitespace();
    let protocol = match words.nth(2).ok_or(BadLine)? {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        _ => return Ok(None),
    };
    let mut pairs = words.filter_map(|word| word.split_once('='));
    let mut direction = || {
        let (mut ends, mut ports) = ([None::<IpAddr>; 2], [None::<u16>; 2]);
        // Counters of packets and bytes may stand between the two directions.
        for (key, value) in pairs.by_ref() {
            match key {
                "src" => ends[0] = value.parse().ok(),
                "dst" => ends[1] = value.parse().ok(),
                "sport" => ports[0] = value.parse().ok(),
                "dport" => {
                    ports[1] = value.parse().ok();
                    break;
                }
                _ => {}
            }
        }
        let end = |ip: Option<IpAddr>, port: Option<u16>| {
            Some(End {
                ip: ip?.to_canonical(),
                port: port?,
            })
        };
        Some(Tuple {
            protocol,
            from: end(ends[0], ports[0])?,
            to: end(ends[1], ports[1])?,
        })
    };
    let original = direction().ok_or(BadLine)?;
    let reply = direction().ok_or(BadLine)?;
    Ok(Some(Entry { original, reply, id: 0 }))
}

/// A line that is not of this table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a line of nf_conntrack")]
pub(super) struct BadLine;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn tuple(protocol: Protocol, from: (&str, u16), to: (&str, u16)) -> Tuple {
        let end = |(ip, port): (&str, u16)| End {
            ip: ip.parse().unwrap(),
            port,
        };
        Tuple {
            protocol,
            from: end(from),
            to: end(to),
        }
    }

    #[test]
    fn reads_what_the_kernel_writes() {
        let line = "ipv4     2 tcp      6 119 TIME_WAIT src=10.99.0.1 dst=10.96.0.10 sport=47454 dport=80 packets=6 bytes=1 \
                    src=10.99.0.2 dst=10.99.0.1 sport=8080 dport=47454 packets=4 bytes=2 [ASSURED] mark=0 zone=0 use=2";
        let read = entry(line).unwrap().unwrap();
        assert_eq!(
            read.original,
            tuple(Protocol::Tcp, ("10.99.0.1", 47454), ("10.96.0.10", 80))
        );
        assert_eq!(
            read.translated(),
            tuple(Protocol::Tcp, ("10.99.0.1", 47454), ("10.99.0.2", 8080))
        );
        let line = "ipv6     10 udp      17 29 src=fd00:0000:0000:0000:0000:0000:0000:0001 dst=fd00::a sport=5 dport=53 \
                    [UNREPLIED] src=fd00::b dst=fd00::1 sport=5353 dport=5 mark=0 use=1";
        let read = entry(line).unwrap().unwrap();
        assert_eq!(read.original, tuple(Protocol::Udp, ("fd00::1", 5), ("fd00::a", 53)));
        assert_eq!(
            read.translated().to,
            tuple(Protocol::Udp, ("fd00::1", 5), ("fd00::b", 5353)).to
        );
    }

    #[test]
    fn passes_over_other_transports_and_refuses_other_text() {
        let icmp =
            "ipv4     2 icmp     1 29 src=10.0.0.1 dst=10.0.0.2 type=8 code=0 id=1 src=10.0.0.2 dst=10.0.0.1 type=0";
        assert_eq!(entry(icmp), Ok(None));
        for bad in [
            "",
            "x",
            "ipv4 2 tcp 6 1 src=10.0.0.1 dst=10.0.0.2 sport=1 dport=2",
            "ipv4 2 udp 17 src=x dst=y sport=1 dport=2",
        ] {
            assert_eq!(entry(bad), Err(BadLine), "{bad}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_taken_or_refused(line in ".{0,200}", rest in "(src=|dst=|sport=|dport=|[0-9a-f.: ]){0,40}") {
            let _ = entry(&line);
            let _ = entry(&format!("ipv4 2 tcp 6 1 {rest}"));
        }
    }
}
