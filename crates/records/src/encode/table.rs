//! A readable row per record for terminals. Addresses and numbers are never cut: a long one pushes the row's rest to
//! the right. Global tags are not shown.

use std::io::Write as _;

use super::{plan::End, row::Row};
use crate::{
    Direction, Endpoint, Measurement, Port, Transport,
    column::{Counter, TextOf},
};

/// The head line above the rows of a measurement, with line break.
#[must_use]
pub const fn table_header(measurement: Measurement) -> &'static str {
    match measurement {
        Measurement::Netflow => {
            "TIME      PROTO DIR     PID PROCESS          LOCAL                  REMOTE                         READ      WRITTEN  RETX   RTT_US  EST CLOSE DGRAM_RX DGRAM_TX\n"
        }
        Measurement::Httpflow => {
            "TIME      HTTP  DIR     PID PROCESS          LOCAL                  REMOTE                   COUNT   LATENCY_US         READ      WRITTEN STATUS METHOD  PATH\n"
        }
        Measurement::Dnsflow => {
            "TIME      PROTO DIR LOCAL                  REMOTE                   COUNT RCODE   LATENCY_US       MAX_US QUERY\n"
        }
        Measurement::Bash => "TIME          PID USER             COMMAND\n",
        Measurement::FlowLog => "",
    }
}

/// Longest process or user name shown; the kernel's own names have at most 15 bytes.
const NAME_WIDTH: usize = 16;

pub(super) fn encode(measurement: Measurement, row: &impl Row, out: &mut Vec<u8>) {
    let seconds = row.time().div_euclid(1_000_000_000).rem_euclid(86_400);
    // Writing to a Vec cannot fail.
    let _ = write!(
        out,
        "{:02}:{:02}:{:02}  ",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60
    );
    let _ = match measurement {
        Measurement::Netflow => netflow(row, out),
        Measurement::Httpflow => httpflow(row, out),
        Measurement::Dnsflow => dnsflow(row, out),
        Measurement::Bash => writeln!(
            out,
            "{:>7} {:<16} {}{}",
            row.pid(),
            shown(row.text(TextOf::User), NAME_WIDTH),
            shown(row.text(TextOf::Cmd), usize::MAX),
            cut(row),
        ),
        // Never asked for: flow logs are no points.
        Measurement::FlowLog => Ok(()),
    };
}

fn netflow(row: &impl Row, out: &mut Vec<u8>) -> std::io::Result<()> {
    let tcp = row.transport() == Transport::Tcp;
    let of = |applies: bool, counter| {
        if applies {
            row.counter(counter).to_string()
        } else {
            "-".to_owned()
        }
    };
    writeln!(
        out,
        "{:<5} {:<3} {:>7} {:<16} {:<22} {:<22} {:>12} {:>12} {:>5} {:>8} {:>4} {:>5} {:>8} {:>8}",
        if tcp { "tcp" } else { "udp" },
        direction(row),
        row.pid(),
        shown(row.process_name(), NAME_WIDTH),
        end(row.endpoint(End::Local)),
        end(row.endpoint(End::Remote)),
        row.counter(Counter::BytesRead),
        row.counter(Counter::BytesWritten),
        of(tcp, Counter::Retransmits),
        of(tcp, Counter::Rtt),
        of(tcp, Counter::TcpEstablished),
        of(tcp, Counter::TcpClosed),
        of(!tcp, Counter::DatagramsRead),
        of(!tcp, Counter::DatagramsWritten),
    )
}

fn httpflow(row: &impl Row, out: &mut Vec<u8>) -> std::io::Result<()> {
    writeln!(
        out,
        "{:<5} {:<3} {:>7} {:<16} {:<22} {:<22} {:>7} {:>12} {:>12} {:>12} {:>6} {:<7} {}{}",
        shown(row.text(TextOf::HttpVersion), NAME_WIDTH),
        direction(row),
        row.pid(),
        shown(row.process_name(), NAME_WIDTH),
        end(row.endpoint(End::Local)),
        end(row.endpoint(End::Remote)),
        row.counter(Counter::Count),
        row.counter(Counter::Latency) / 1000,
        row.counter(Counter::BytesRead),
        row.counter(Counter::BytesWritten),
        row.counter(Counter::StatusCode),
        shown(row.text(TextOf::Method), NAME_WIDTH),
        shown(row.text(TextOf::Path), usize::MAX),
        cut(row),
    )
}

fn dnsflow(row: &impl Row, out: &mut Vec<u8>) -> std::io::Result<()> {
    let question = if row.has_optional() {
        let (kind, name) = (row.text(TextOf::QueryType), row.text(TextOf::QueryName));
        shown(&format!("{kind} {name}"), usize::MAX)
    } else {
        "-".to_owned()
    };
    writeln!(
        out,
        "{:<5} {:<3} {:<22} {:<22} {:>7} {:>5} {:>12} {:>12} {question}",
        if row.transport() == Transport::Tcp {
            "tcp"
        } else {
            "udp"
        },
        direction(row),
        end(row.endpoint(End::Local)),
        end(row.endpoint(End::Remote)),
        row.counter(Counter::Count),
        row.counter(Counter::Rcode),
        row.counter(Counter::Latency) / 1000,
        row.counter(Counter::LatencyMax) / 1000,
    )
}

fn direction(row: &impl Row) -> &'static str {
    match row.direction() {
        Direction::Incoming => "in",
        Direction::Outgoing => "out",
    }
}

/// What a terminal may show: one line, and nothing that steers it.
fn shown(text: &str, width: usize) -> String {
    let shown = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    shown.take(width).collect()
}

fn cut(row: &impl Row) -> &'static str {
    if row.truncated() { "..." } else { "" }
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
