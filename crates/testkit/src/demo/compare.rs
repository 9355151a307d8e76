//! The verdict: what the demo's processes counted themselves against what the stub decoded, the stub's own checks, and
//! the agent's ledger. Pure.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    dataway::{SumRow, Summary},
    exactness::{
        compare::{check_ledger, difference},
        flow::Flow,
    },
    service::{LedgerCounts, StageCounts},
    traffic::report::{Counts, Direction, Report, Transport},
};

/// One process, transport and direction.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    name: String,
    transport: String,
    direction: String,
    pid: String,
}

/// All processes of one name, transport and direction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Line {
    /// Process name.
    pub name: String,
    /// `tcp` or `udp`.
    pub transport: String,
    /// `incoming` or `outgoing`.
    pub direction: String,
    /// Number of processes.
    pub processes: u64,
    /// What they counted.
    pub own: Counts,
    /// What arrived.
    pub seen: Counts,
    /// Per process that differs: what.
    pub problems: Vec<String>,
}

/// A feature of the agent, from its metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Feature {
    /// Name.
    pub name: String,
    /// `on`, `degraded` or `off`.
    pub state: String,
    /// Hook in use.
    pub hook: String,
    /// Why it is not on.
    pub reason: String,
}

/// Compares process by process; all names of ours begin with `prefix`. `sums` is what the stub decoded; the documented measurement has no count of datagrams,
/// so those come from `flows`, the same rows in the agent's output file.
#[must_use]
pub fn compare(prefix: &str, reports: &[Report], sums: &[SumRow], flows: &[Flow]) -> Vec<Line> {
    let pids: BTreeSet<String> = reports.iter().map(|report| report.pid.to_string()).collect();
    // Rows with one of our names and an unknown process are ours too: a wrong process id must not pass unseen.
    let ours = |pid: &str, name: &str| pids.contains(pid) || name.starts_with(prefix);
    let mut pairs: BTreeMap<Key, (Counts, Counts)> = BTreeMap::new();
    for report in reports {
        for row in &report.rows {
            let key = Key {
                name: report.name.clone(),
                transport: transport(row.transport).to_owned(),
                direction: direction(row.direction).to_owned(),
                pid: report.pid.to_string(),
            };
            let mut counts = row.counts;
            counts.failures = 0;
            pairs.entry(key).or_default().0.add(&counts);
        }
    }
    for row in sums.iter().filter(|row| ours(&row.pid, &row.process_name)) {
        let key = Key {
            name: row.process_name.clone(),
            transport: row.transport.clone(),
            direction: row.direction.clone(),
            pid: row.pid.clone(),
        };
        let field = |name: &str| row.fields.get(name).map_or(0, |sum| u64::try_from(*sum).unwrap_or(0));
        pairs.entry(key).or_default().1.add(&Counts {
            connections: field("tcp_established"),
            closed: field("tcp_closed"),
            bytes_sent: field("bytes_written"),
            bytes_received: field("bytes_read"),
            ..Counts::default()
        });
    }
    for flow in flows {
        let pid = flow.pid.to_string();
        if flow.transport != Transport::Udp || !ours(&pid, &flow.process_name) {
            continue;
        }
        let key = Key {
            name: flow.process_name.clone(),
            transport: transport(flow.transport).to_owned(),
            direction: direction(flow.direction).to_owned(),
            pid,
        };
        pairs.entry(key).or_default().1.add(&Counts {
            datagrams_sent: flow.counts.datagrams_sent,
            datagrams_received: flow.counts.datagrams_received,
            ..Counts::default()
        });
    }
    let mut lines: BTreeMap<[String; 3], Line> = BTreeMap::new();
    for (key, (own, seen)) in pairs {
        let line = lines
            .entry([key.name.clone(), key.transport.clone(), key.direction.clone()])
            .or_insert_with(|| Line {
                name: key.name,
                transport: key.transport,
                direction: key.direction,
                ..Line::default()
            });
        line.processes += 1;
        line.own.add(&own);
        line.seen.add(&seen);
        if let Some(problem) = difference(&own, &seen) {
            line.problems.push(format!(
                "{} (pid {}) {} {}: {problem}",
                line.name, key.pid, line.transport, line.direction
            ));
        }
    }
    lines.into_values().collect()
}

/// Everything that does not agree; empty when all does.
#[must_use]
pub fn problems(lines: &[Line], stub: &Summary, ledger: &LedgerCounts) -> Vec<String> {
    let mut problems: Vec<String> = lines.iter().flat_map(|line| line.problems.iter().cloned()).collect();
    for wanted in ["tcp", "udp"] {
        let moved = |line: &Line| line.transport == wanted && line.own.bytes_sent > 0;
        if !lines.iter().any(moved) {
            problems.push(format!(
                "the demo's processes made no {wanted} traffic, so nothing was compared"
            ));
        }
    }
    if stub.violations_total > 0 {
        problems.push(format!(
            "the stub refused {} requests, first: {}",
            stub.violations_total,
            stub.violations.first().map_or("", String::as_str)
        ));
    }
    problems.extend(check_ledger(ledger).into_iter().filter_map(|check| {
        check
            .problem
            .map(|problem| format!("ledger, {}: {problem}", check.what))
    }));
    let delivered = delivered(ledger);
    if delivered != stub.points {
        problems.push(format!(
            "the agent's ledger says that DataWay took {delivered} points, the stub decoded {}",
            stub.points
        ));
    }
    problems
}

/// Points that DataWay took, by the agent's ledger.
#[must_use]
pub fn delivered(ledger: &LedgerCounts) -> u64 {
    ledger
        .iter()
        .filter(|(name, _)| name.starts_with("sink.dataway") && name.ends_with(".deliver"))
        .map(|(_, stage)| stage.emitted)
        .sum()
}

/// The ledger out of the last lines of the agent's log: it is written after everything was drained.
#[must_use]
pub fn final_ledger(log: &str) -> LedgerCounts {
    log.lines().filter_map(ledger_line).collect()
}

fn ledger_line(line: &str) -> Option<(String, StageCounts)> {
    let (_, rest) = line.split_once(" Ledger stage=\"")?;
    let (stage, rest) = rest.split_once('"')?;
    let number = |key: &str| -> Option<u64> {
        let (_, value) = rest.split_once(&format!(" {key}="))?;
        value.split(' ').next()?.parse().ok()
    };
    let reasons = |key: &str| -> Option<BTreeMap<String, u64>> {
        let (_, value) = rest.split_once(&format!(" {key}="))?;
        let end = value.find('}')?;
        serde_json::from_str(value.get(..=end)?).ok()
    };
    Some((
        stage.to_owned(),
        StageCounts {
            entered: number("entered")?,
            emitted: number("emitted")?,
            skipped: reasons("skipped")?,
            lost: reasons("lost")?,
        },
    ))
}

/// The capability vector out of the agent's metrics, by name.
#[must_use]
pub fn features(metrics: &str) -> Vec<Feature> {
    let mut features: Vec<Feature> = metrics
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| {
            let (_, labels) = line.split_once("feature{")?;
            let mut feature = Feature::default();
            for (key, value) in parse_labels(labels) {
                match key.as_str() {
                    "feature" => feature.name = value,
                    "state" => feature.state = value,
                    "hook" => feature.hook = value,
                    "reason" => feature.reason = value,
                    _ => {}
                }
            }
            (!feature.name.is_empty()).then_some(feature)
        })
        .collect();
    features.sort_by(|a, b| a.name.cmp(&b.name));
    features
}

/// Labels up to the closing brace; values may hold any character, escaped as OpenMetrics says.
fn parse_labels(mut text: &str) -> Vec<(String, String)> {
    let mut labels = Vec::new();
    while let Some((key, rest)) = text.split_once("=\"") {
        let mut value = String::new();
        let mut chars = rest.char_indices();
        let mut end = rest.len();
        while let Some((at, c)) = chars.next() {
            match c {
                '"' => {
                    end = at + 1;
                    break;
                }
                '\\' => value.push(match chars.next() {
                    Some((_, 'n')) => ' ',
                    Some((_, escaped)) => escaped,
                    None => '\\',
                }),
                c => value.push(c),
            }
        }
        labels.push((key.trim_start_matches(',').to_owned(), value));
        text = rest.get(end..).unwrap_or_default();
        if text.starts_with('}') {
            break;
        }
    }
    labels
}

fn transport(transport: Transport) -> &'static str {
    match transport {
        Transport::Tcp => "tcp",
        Transport::Udp => "udp",
    }
}

fn direction(direction: Direction) -> &'static str {
    match direction {
        Direction::Incoming => "incoming",
        Direction::Outgoing => "outgoing",
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
#[path = "compare_tests.rs"]
mod tests;
