//! A readable row per record for terminals. Addresses and numbers are never cut: a long one pushes the row's rest to
//! the right. Global tags are not shown.

use std::io::Write as _;

use crate::{Direction, Endpoint, Netflow, Port, Transport};

/// The head line above the rows, with line break.
#[must_use]
pub const fn table_header() -> &'static str {
    "TIME      PROTO DIR     PID PROCESS          LOCAL                  REMOTE                         READ      WRITTEN  RETX   RTT_US  EST CLOSE DGRAM_RX DGRAM_TX\n"
}

/// Longest process name shown; the kernel's own names have at most 15 bytes.
const PROCESS_WIDTH: usize = 16;

pub(super) fn encode(row: &Netflow, out: &mut Vec<u8>) {
    let seconds = row.time_unix_ns.div_euclid(1_000_000_000).rem_euclid(86_400);
    let (transport, tcp) = match row.transport {
        Transport::Tcp => ("tcp", true),
        Transport::Udp => ("udp", false),
    };
    let direction = match row.direction {
        Direction::Incoming => "in",
        Direction::Outgoing => "out",
    };
    let process: String = row
        .process_name
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(PROCESS_WIDTH)
        .collect();
    let of = |applies: bool, value: u64| if applies { value.to_string() } else { "-".to_owned() };
    // Writing to a Vec cannot fail.
    let _ = writeln!(
        out,
        "{:02}:{:02}:{:02}  {:<5} {:<3} {:>7} {:<16} {:<22} {:<22} {:>12} {:>12} {:>5} {:>8} {:>4} {:>5} {:>8} {:>8}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        transport,
        direction,
        row.pid,
        process,
        end(&row.local),
        end(&row.remote),
        row.bytes_read,
        row.bytes_written,
        of(tcp, row.retransmits),
        of(tcp, row.rtt_us),
        of(tcp, row.tcp_established),
        of(tcp, row.tcp_closed),
        of(!tcp, row.datagrams_read),
        of(!tcp, row.datagrams_written),
    );
}

fn end(end: &Endpoint) -> String {
    let Endpoint { ip, port } = end;
    let ip = if ip.is_ipv6() {
        format!("[{ip}]")
    } else {
        ip.to_string()
    };
    match port {
        Port::Number(port) => format!("{ip}:{port}"),
        Port::Any => format!("{ip}:*"),
    }
}
