//! Compares reports (the truth) with the agent's rows. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use serde::Serialize;

use super::flow::Flow;
use crate::{
    service::LedgerCounts,
    traffic::{
        netns::is_test_address,
        report::{Counts, Direction, Report, Transport},
    },
};

/// Ports that servers of the tests listen on.
pub const SERVICE_PORTS: std::ops::RangeInclusive<u16> = 7000..=7999;
/// Scenario of the checks that concern no single scenario.
pub const WHOLE_TEST: &str = "test";
/// Group prefix: a connection may be counted for any process of the group, its bytes may not.
pub const SHARED_CONNECTIONS: &str = "conn:";
/// Group prefix: bytes and connections may be counted for any process of the group; what a connection did after it
/// had settled with its new process, only for that one.
pub const SHARED_ALL: &str = "all:";

/// One thing that was checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Scenario tag: the process name up to its first `-`.
    pub scenario: String,
    /// What was checked.
    pub what: String,
    /// Why it failed; `None` when it did not.
    pub problem: Option<String>,
}

/// What all processes of a scenario counted, and what the agent reported for them.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ScenarioSum {
    /// Number of processes.
    pub processes: u64,
    /// The processes' own counts.
    pub own: Counts,
    /// The agent's counts for them.
    pub agent: Counts,
}

/// Tag of the scenario that a process of that name belongs to.
#[must_use]
pub fn scenario_of(name: &str) -> &str {
    name.split('-').next().unwrap_or(name)
}

/// True for rows of the test's traffic, whoever they are said to belong to.
fn is_test_traffic(flow: &Flow) -> bool {
    let service = |port: &str| port.parse().is_ok_and(|port: u16| SERVICE_PORTS.contains(&port));
    is_test_address(flow.src_ip)
        || is_test_address(flow.dst_ip)
        || (flow.src_ip.is_loopback()
            && flow.dst_ip.is_loopback()
            && (service(&flow.src_port) || service(&flow.dst_port)))
}

/// What the agent should report for a process: its counts without the part before the agent's start.
fn expected(report: &Report) -> Counts {
    let mut total = Counts::default();
    for row in &report.rows {
        total.add(&row.counts.without(&row.before));
    }
    total.failures = 0;
    total
}

/// Compares per process, per process and remote address, and each row by itself.
#[must_use]
pub fn compare(reports: &[Report], flows: &[Flow]) -> (Vec<Check>, BTreeMap<String, ScenarioSum>) {
    let mut checks = Vec::new();
    let mut sums: BTreeMap<String, ScenarioSum> = BTreeMap::new();
    let known: BTreeMap<u32, &Report> = reports.iter().map(|report| (report.pid, report)).collect();
    if known.len() != reports.len() {
        // One report per process is the rule; a process id used twice would make the comparison ambiguous.
        checks.push(failed(
            WHOLE_TEST,
            "process ids are unique",
            "a process id appears in two reports".to_owned(),
        ));
    }
    let mut by_pid: BTreeMap<u32, Vec<&Flow>> = BTreeMap::new();
    let mut unknown = Vec::new();
    for flow in flows {
        if known.contains_key(&flow.pid) {
            by_pid.entry(flow.pid).or_default().push(flow);
        } else if is_test_traffic(flow) {
            unknown.push(flow);
        }
    }
    for flow in &unknown {
        checks.push(failed(WHOLE_TEST, "rows belong to known processes", describe(flow)));
    }
    if unknown.is_empty() {
        checks.push(passed(WHOLE_TEST, "rows belong to known processes"));
    }

    let mut groups: BTreeMap<&str, (Counts, Counts)> = BTreeMap::new();
    for (pid, report) in &known {
        let scenario = scenario_of(&report.name);
        let rows = by_pid.get(pid).map(Vec::as_slice).unwrap_or_default();
        let own = expected(report);
        let mut agent = Counts::default();
        rows.iter().for_each(|flow| agent.add(&flow.counts));
        let sum = sums.entry(scenario.to_owned()).or_default();
        sum.processes += 1;
        sum.own.add(&own);
        sum.agent.add(&agent);
        let (own_total, agent_total) = groups.entry(&report.group).or_default();
        own_total.add(&own);
        agent_total.add(&agent);

        let title = format!("{} pid {pid}", report.name);
        let settled = report.rows.iter().fold(Counts::default(), |mut sum, row| {
            sum.add(&row.settled);
            sum
        });
        let problem = if report.group.starts_with(SHARED_ALL) {
            at_least(&settled, &agent)
        } else if report.group.starts_with(SHARED_CONNECTIONS) {
            difference(&without_connections(&own), &without_connections(&agent))
        } else {
            difference(&own, &agent).or_else(|| per_address(report, rows))
        };
        checks.push(Check {
            scenario: scenario.to_owned(),
            what: format!("{title}: counts"),
            problem,
        });
        let problems: BTreeSet<String> = rows.iter().filter_map(|flow| row_problem(report, flow)).collect();
        let problem = (!problems.is_empty()).then(|| problems.into_iter().collect::<Vec<_>>().join("; "));
        checks.push(Check {
            scenario: scenario.to_owned(),
            what: format!("{title}: rows"),
            problem,
        });
    }
    for (group, (own, agent)) in groups.into_iter().filter(|(group, _)| !group.is_empty()) {
        let name = group.split_once(':').map_or(group, |(_, name)| name);
        checks.push(Check {
            scenario: scenario_of(name).to_owned(),
            what: format!("group {group}: counts"),
            problem: difference(&own, &agent),
        });
    }
    (checks, sums)
}

fn passed(scenario: &str, what: &str) -> Check {
    Check {
        scenario: scenario.to_owned(),
        what: what.to_owned(),
        problem: None,
    }
}

fn failed(scenario: &str, what: &str, problem: String) -> Check {
    Check {
        scenario: scenario.to_owned(),
        what: what.to_owned(),
        problem: Some(problem),
    }
}

fn without_connections(counts: &Counts) -> Counts {
    Counts {
        connections: 0,
        closed: 0,
        ..*counts
    }
}

fn named(counts: &Counts) -> [(&'static str, u64); 6] {
    [
        ("tcp_established", counts.connections),
        ("tcp_closed", counts.closed),
        ("bytes_written", counts.bytes_sent),
        ("bytes_read", counts.bytes_received),
        ("datagrams_written", counts.datagrams_sent),
        ("datagrams_read", counts.datagrams_received),
    ]
}

/// Each count that differs, as `name own agent (difference)`.
#[must_use]
pub fn difference(own: &Counts, agent: &Counts) -> Option<String> {
    let parts: Vec<String> = named(own)
        .into_iter()
        .zip(named(agent))
        .filter(|((_, own), (_, agent))| own != agent)
        .map(|((name, own), (_, agent))| {
            format!(
                "{name}: own {own}, agent {agent} ({:+})",
                i128::from(agent) - i128::from(own)
            )
        })
        .collect();
    (!parts.is_empty()).then(|| parts.join(", "))
}

fn at_least(settled: &Counts, agent: &Counts) -> Option<String> {
    let parts: Vec<String> = named(settled)
        .into_iter()
        .zip(named(agent))
        .filter(|((_, settled), (_, agent))| agent < settled)
        .map(|((name, settled), (_, agent))| format!("{name}: settled {settled}, agent only {agent}"))
        .collect();
    (!parts.is_empty()).then(|| parts.join(", "))
}

fn per_address(report: &Report, flows: &[&Flow]) -> Option<String> {
    let mut pairs: BTreeMap<(Transport, String, IpAddr), (Counts, Counts)> = BTreeMap::new();
    for row in &report.rows {
        let mut counts = row.counts.without(&row.before);
        counts.failures = 0;
        pairs
            .entry((row.transport, row.family.clone(), row.remote))
            .or_default()
            .0
            .add(&counts);
    }
    for flow in flows {
        pairs
            .entry((flow.transport, flow.family.clone(), flow.dst_ip))
            .or_default()
            .1
            .add(&flow.counts);
    }
    let problems: Vec<String> = pairs
        .iter()
        .filter_map(|((_, family, remote), (own, agent))| {
            difference(own, agent).map(|problem| format!("to {remote} ({family}): {problem}"))
        })
        .take(4)
        .collect();
    (!problems.is_empty()).then(|| problems.join("; "))
}

/// What is wrong with one row by itself.
fn row_problem(report: &Report, flow: &Flow) -> Option<String> {
    let moved = flow.counts.bytes_sent + flow.counts.bytes_received > 0;
    // Inside a group, the connection may still carry the name of the process that opened it.
    if flow.process_name != report.name && (report.group.is_empty() || moved) {
        return Some(format!("process_name `{}`", flow.process_name));
    }
    if report.group.starts_with(SHARED_ALL) && !moved {
        return None;
    }
    let near: Vec<_> = report
        .rows
        .iter()
        .filter(|row| row.transport == flow.transport && row.family == flow.family && row.remote == flow.dst_ip)
        .collect();
    if near.is_empty() {
        // A parent that only accepts has no rows of its own for what it holds on behalf of its group.
        return report
            .group
            .is_empty()
            .then(|| format!("talks to nobody there: {}", describe(flow)));
    }
    let fits = near.iter().any(|row| {
        // A UDP row that only ever received was started by the other end, whatever the role.
        let started =
            row.direction == flow.direction || (row.transport == Transport::Udp && row.counts.datagrams_sent == 0);
        let (service, other) = match row.direction {
            Direction::Outgoing => (&flow.dst_port, &flow.src_port),
            Direction::Incoming => (&flow.src_port, &flow.dst_port),
        };
        let ports = row.direction != flow.direction
            || (service.parse().is_ok_and(|port: u16| port == row.service_port) && other == "*");
        started && ports && row.local.is_none_or(|local| local == flow.src_ip)
    });
    (!fits).then(|| describe(flow))
}

fn describe(flow: &Flow) -> String {
    format!(
        "{:?} {} {:?} {}:{} -> {}:{} pid {} `{}`",
        flow.transport,
        flow.family,
        flow.direction,
        flow.src_ip,
        flow.src_port,
        flow.dst_ip,
        flow.dst_port,
        flow.pid,
        flow.process_name
    )
}

/// Checks that every stage of the ledger closes and that nothing was lost.
#[must_use]
pub fn check_ledger(ledger: &LedgerCounts) -> Vec<Check> {
    if ledger.is_empty() {
        return vec![failed("ledger", "has stages", "the ledger is empty".to_owned())];
    }
    ledger
        .iter()
        .map(|(name, stage)| {
            let problem = if stage.pending() != 0 {
                Some(format!("{} entered and not accounted for", stage.pending()))
            } else if stage.lost() > 0 {
                Some(format!("lost {:?}", stage.lost))
            } else {
                None
            };
            Check {
                scenario: "ledger".to_owned(),
                what: format!("{name} closes, nothing lost"),
                problem,
            }
        })
        .collect()
}

/// Checks the tools against each other: what clients sent is what servers received, and the other way round.
#[must_use]
pub fn cross_check(reports: &[Report], symmetric: &BTreeSet<String>) -> Vec<Check> {
    let mut sides: BTreeMap<&str, (Counts, Counts)> = BTreeMap::new();
    for report in reports {
        let (clients, servers) = sides.entry(scenario_of(&report.name)).or_default();
        for row in &report.rows {
            match row.direction {
                Direction::Outgoing => clients.add(&row.counts),
                Direction::Incoming => servers.add(&row.counts),
            }
        }
    }
    sides
        .into_iter()
        .filter(|(scenario, _)| symmetric.contains(*scenario))
        .map(|(scenario, (clients, servers))| {
            let turned = Counts {
                bytes_sent: servers.bytes_received,
                bytes_received: servers.bytes_sent,
                datagrams_sent: servers.datagrams_received,
                datagrams_received: servers.datagrams_sent,
                ..servers
            };
            Check {
                scenario: scenario.to_owned(),
                what: "clients and servers agree".to_owned(),
                problem: difference(&clients, &turned).map(|text| text.replace("agent", "servers")),
            }
        })
        .collect()
}

#[cfg(test)]
#[path = "compare_tests.rs"]
mod tests;
