//! The live table: the rows of the agent's latest flush, as the stub decoded them. Pure.

use std::{cmp::Reverse, collections::BTreeMap};

use crate::dataway::{Point, Value};

/// Head line of the table.
const HEAD: [&str; 9] = [
    "DIR",
    "L4",
    "PROCESS (PID)",
    "LOCAL",
    "REMOTE",
    "SENT",
    "RECEIVED",
    "RTT",
    "OPENED/CLOSED",
];
/// Columns that hold numbers and are aligned to the right.
const NUMBERS_FROM: usize = 5;

/// The points of the newest flush: all that carry the newest time.
#[must_use]
pub fn latest(points: &[Point]) -> Vec<&Point> {
    let rows = || points.iter().filter(|point| point.name == "netflow");
    let newest = rows().map(|point| point.time).max();
    rows().filter(|point| Some(point.time) == newest).collect()
}

/// The table of `points`, the largest first, in at most `rows` lines.
#[must_use]
pub fn render(points: &[&Point], rows: usize) -> Vec<String> {
    let mut sorted = points.to_vec();
    sorted.sort_by_key(|point| {
        (
            Reverse(int(&point.fields, "bytes_read") + int(&point.fields, "bytes_written")),
            tag(point, "process_name"),
            tag(point, "pid"),
        )
    });
    // Head line, and the line that says how many are not shown.
    let shown = if sorted.len() < rows {
        sorted.len()
    } else {
        rows.saturating_sub(2)
    };
    let mut cells: Vec<[String; 9]> = vec![HEAD.map(str::to_owned)];
    cells.extend(sorted.iter().take(shown).map(|point| row(point)));
    let mut widths = [0_usize; 9];
    for line in &cells {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut lines: Vec<String> = cells.iter().map(|line| aligned(line, &widths)).collect();
    if sorted.len() > shown {
        lines.push(format!("... and {} more rows", sorted.len() - shown));
    }
    lines
}

fn aligned(cells: &[String; 9], widths: &[usize; 9]) -> String {
    let parts: Vec<String> = cells
        .iter()
        .zip(widths)
        .enumerate()
        .map(|(index, (cell, width))| {
            if index < NUMBERS_FROM {
                format!("{cell:<width$}")
            } else {
                format!("{cell:>width$}")
            }
        })
        .collect();
    parts.join("  ")
}

fn row(point: &Point) -> [String; 9] {
    let tcp = tag(point, "transport") == "tcp";
    let end = |side: &str| {
        let ip = tag(point, &format!("{side}_ip"));
        let port = tag(point, &format!("{side}_port"));
        if ip.contains(':') {
            format!("[{ip}]:{port}")
        } else {
            format!("{ip}:{port}")
        }
    };
    let number = |key: &str| int(&point.fields, key);
    [
        match tag(point, "direction") {
            "incoming" => "in".to_owned(),
            "outgoing" => "out".to_owned(),
            other => printable(other),
        },
        printable(tag(point, "transport")),
        match (tag(point, "process_name"), tag(point, "pid")) {
            ("", "0" | "") => "unknown".to_owned(),
            (name, pid) => format!("{} ({})", printable(name), printable(pid)),
        },
        printable(&end("src")),
        printable(&end("dst")),
        bytes(number("bytes_written")),
        bytes(number("bytes_read")),
        if tcp {
            milliseconds(number("rtt"))
        } else {
            "-".to_owned()
        },
        if tcp {
            format!("{}/{}", number("tcp_established"), number("tcp_closed"))
        } else {
            "-".to_owned()
        },
    ]
}

fn tag<'a>(point: &'a Point, key: &str) -> &'a str {
    point.tags.get(key).map_or("", String::as_str)
}

fn int(fields: &BTreeMap<String, Value>, key: &str) -> u64 {
    match fields.get(key) {
        Some(Value::Int(value)) => u64::try_from(*value).unwrap_or(0),
        Some(Value::Uint(value)) => *value,
        _ => 0,
    }
}

/// Process names are chosen by whoever runs the process: none may steer the terminal.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// `count` bytes for people: exact below 10 KiB.
#[must_use]
#[allow(clippy::cast_precision_loss)] // Three digits are shown.
pub fn bytes(count: u64) -> String {
    const KIB: u64 = 1 << 10;
    match count {
        0..=10_239 => format!("{count} B"),
        10_240..=1_048_575 => format!("{:.1} KiB", count as f64 / KIB as f64),
        1_048_576..=1_073_741_823 => format!("{:.1} MiB", count as f64 / (KIB * KIB) as f64),
        _ => format!("{:.1} GiB", count as f64 / (KIB * KIB * KIB) as f64),
    }
}

#[allow(clippy::cast_precision_loss)] // Two digits are shown.
fn milliseconds(microseconds: u64) -> String {
    format!("{:.2} ms", microseconds as f64 / 1000.0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    fn point(time: i64, name: &str, sent: i64) -> Point {
        let tags = [
            ("direction", "outgoing"),
            ("transport", "tcp"),
            ("process_name", name),
            ("pid", "7"),
            ("src_ip", "10.0.0.1"),
            ("src_port", "*"),
            ("dst_ip", "fd00::2"),
            ("dst_port", "443"),
        ];
        Point {
            name: "netflow".to_owned(),
            time,
            tags: tags.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
            fields: [
                ("bytes_written", sent),
                ("bytes_read", 5),
                ("rtt", 1234),
                ("tcp_established", 2),
            ]
            .map(|(key, value)| (key.to_owned(), Value::Int(value)))
            .into(),
        }
    }

    #[test]
    fn only_the_newest_flush_is_shown_largest_first() {
        let points = [
            point(1, "old", 9_000_000),
            point(2, "small", 1),
            point(2, "large", 20_480),
        ];
        let lines = render(&latest(&points), 10);
        assert_eq!(lines.len(), 3, "{lines:#?}");
        assert!(lines[0].starts_with("DIR"));
        assert!(lines[1].contains("large (7)") && lines[1].contains("20.0 KiB") && lines[1].contains("1.23 ms"));
        assert!(lines[2].contains("small (7)") && lines[2].contains("10.0.0.1:*  [fd00::2]:443"));
        assert!(lines[2].ends_with("2/0"), "{}", lines[2]);
    }

    #[test]
    fn what_does_not_fit_is_counted() {
        let points: Vec<Point> = (0..30).map(|n| point(1, &format!("p{n}"), n)).collect();
        let lines = render(&latest(&points), 10);
        assert_eq!(lines.len(), 10);
        assert_eq!(lines[9], "... and 22 more rows");
    }

    #[test]
    fn a_process_name_cannot_steer_the_terminal() {
        let lines = render(&[&point(1, "x\x1b[2J", 1)], 10);
        assert!(lines[1].contains("x?[2J"), "{}", lines[1]);
    }
}
