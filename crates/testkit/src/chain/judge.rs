//! The verdict: what the processes counted against what DataWay decoded, and every other promise of the chain. Pure.

use std::time::Duration;

use super::{
    peers::{Answer, Peer},
    processes::Backlog,
};
use crate::{
    dataway::{Fault, Summary},
    demo::compare::Line,
    exactness::compare::{Check, check_ledger},
    service::LedgerCounts,
};

/// What the run was to do.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Number of times that the aggregator was to be killed.
    pub kills: u32,
    /// Faults that DataWay's requests were to meet.
    pub faults: Vec<Fault>,
    /// Batches were to be sent again: the aggregator was killed after they had been sent.
    pub resends: bool,
    /// DataWay was to be gone for a time.
    pub outage: bool,
    /// TLS between agent and aggregator.
    pub tls: bool,
    /// Largest resident size of any process under test, KiB.
    pub memory_kib: u64,
}

/// What happened while DataWay was gone.
#[derive(Clone, Copy, Debug)]
pub struct Outage {
    /// How long it was.
    pub length: Duration,
    /// Points that the stub had at its begin and at its end.
    pub points: [u64; 2],
    /// What waited at its begin and at its end.
    pub backlog: [Backlog; 2],
}

/// What is left when all processes have ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Per process name, transport and direction.
    pub lines: Vec<Line>,
    /// What the stub took.
    pub stub: Summary,
    /// The agent's ledger at its end.
    pub agent: LedgerCounts,
    /// The ledger of the aggregator's last life, at its end.
    pub aggregator: LedgerCounts,
    /// Largest resident size of the agent, KiB.
    pub agent_peak_kib: u64,
    /// The same of each life of the aggregator.
    pub aggregator_peaks_kib: Vec<u64>,
    /// Number of times that the aggregator was killed.
    pub kills: u32,
    /// Streams that the agent opened.
    pub connects: f64,
    /// Batches that the agent sent again.
    pub resent: f64,
    /// DataWay's absence.
    pub outage: Option<Outage>,
    /// Who knocked at the aggregator's door, and what it did.
    pub peers: Vec<(Peer, Answer)>,
    /// Connections that the aggregator says it refused, and its words in the log.
    pub refused: (f64, Option<String>),
    /// Logs that hold DataWay's token.
    pub leaks: Vec<String>,
    /// Names of dead-letter files.
    pub dead_letters: Vec<String>,
}

/// Everything that was checked.
#[must_use]
pub fn judge(wanted: &Wanted, outcome: &Outcome) -> Vec<Check> {
    let mut checks: Vec<Check> = outcome
        .lines
        .iter()
        .map(|line| Check {
            scenario: "counts".to_owned(),
            what: format!(
                "{} {} {}, {} processes",
                line.name, line.transport, line.direction, line.processes
            ),
            problem: (!line.problems.is_empty()).then(|| line.problems.join("; ")),
        })
        .collect();
    for transport in ["tcp", "udp"] {
        for direction in ["incoming", "outgoing"] {
            let moved = outcome
                .lines
                .iter()
                .any(|line| line.transport == transport && line.direction == direction && line.own.bytes_sent > 0);
            checks.push(check(
                "counts",
                format!("there was {direction} {transport} traffic"),
                moved,
                String::new,
            ));
        }
    }
    delivery(outcome, &mut checks);
    for (who, ledger) in [("agent", &outcome.agent), ("aggregator", &outcome.aggregator)] {
        checks.extend(check_ledger(ledger).into_iter().map(|check| Check {
            what: format!("{who}: {}", check.what),
            ..check
        }));
    }
    memory(wanted, outcome, &mut checks);
    checks.push(check(
        "faults",
        format!("{} kills", wanted.kills),
        outcome.kills == wanted.kills,
        || format!("the aggregator was killed {} times", outcome.kills),
    ));
    for fault in &wanted.faults {
        met(fault, &outcome.stub, &mut checks);
    }
    if wanted.resends {
        checks.push(check("faults", "batches were sent again", outcome.resent > 0.0, || {
            "none were".to_owned()
        }));
    }
    if wanted.outage {
        outage(outcome.outage, &mut checks);
    }
    if wanted.tls {
        door(outcome, &mut checks);
    }
    checks
}

fn check(scenario: &str, what: impl Into<String>, good: bool, problem: impl FnOnce() -> String) -> Check {
    Check {
        scenario: scenario.to_owned(),
        what: what.into(),
        problem: (!good).then(|| {
            let problem = problem();
            if problem.is_empty() {
                "not so".to_owned()
            } else {
                problem
            }
        }),
    }
}

/// Records that the aggregator acknowledged to the agent.
#[must_use]
pub fn acknowledged(agent: &LedgerCounts) -> u64 {
    agent.get("uplink.send").map_or(0, |stage| stage.emitted)
}

fn delivery(outcome: &Outcome, checks: &mut Vec<Check>) {
    let Outcome { stub, .. } = outcome;
    let acknowledged = acknowledged(&outcome.agent);
    checks.push(check(
        "delivery",
        "every acknowledged record arrived exactly once",
        acknowledged > 0 && acknowledged == stub.points,
        || {
            format!(
                "the agent's records acknowledged: {acknowledged}, points that DataWay decoded: {} ({:+})",
                stub.points,
                i128::from(stub.points) - i128::from(acknowledged)
            )
        },
    ));
    checks.push(check(
        "delivery",
        "DataWay refused nothing",
        stub.violations_total == 0,
        || {
            format!(
                "{} requests broke a rule, first: {}",
                stub.violations_total,
                stub.violations.first().map_or("", String::as_str)
            )
        },
    ));
    checks.push(check(
        "delivery",
        "there are no dead letters",
        outcome.dead_letters.is_empty(),
        || outcome.dead_letters.join(", "),
    ));
    checks.push(check(
        "delivery",
        "no log holds the token",
        outcome.leaks.is_empty(),
        || outcome.leaks.join(", "),
    ));
}

fn memory(wanted: &Wanted, outcome: &Outcome, checks: &mut Vec<Check>) {
    let lives = outcome.aggregator_peaks_kib.iter().zip(1..);
    let all = std::iter::once(("agent".to_owned(), outcome.agent_peak_kib))
        .chain(lives.map(|(peak, life)| (format!("aggregator, life {life}"), *peak)));
    for (who, peak) in all {
        let limit = wanted.memory_kib;
        checks.push(check(
            "memory",
            format!("{who} at most {limit} KiB"),
            (1..=limit).contains(&peak),
            || format!("{peak} KiB"),
        ));
    }
    checks.push(check(
        "memory",
        "every life was measured",
        outcome.aggregator_peaks_kib.len() == outcome.kills as usize + 1,
        || format!("{} of {}", outcome.aggregator_peaks_kib.len(), outcome.kills + 1),
    ));
}

fn met(fault: &Fault, stub: &Summary, checks: &mut Vec<Check>) {
    let mut met = |what: &str, count: u64| {
        checks.push(check("faults", what, count > 0, || "none did".to_owned()));
    };
    let faulted = |mode: &str| stub.faulted.get(mode).copied().unwrap_or_default();
    match fault {
        Fault::None => met("requests were taken", stub.bodies),
        Fault::Status { status, .. } => met(
            &format!("requests were answered {status}"),
            stub.requests.get(status).copied().unwrap_or_default(),
        ),
        Fault::Hang { .. } => met("requests met a DataWay that hangs", faulted("hang")),
        Fault::Close => met("requests met a DataWay that closes", faulted("close")),
        Fault::DropAnswer => {
            met("requests were taken without an answer", faulted("drop_answer"));
            // The sender does not know, and must repeat them under the same identity.
            met("repeated bodies were recognised", stub.duplicates);
        }
    }
}

fn outage(outage: Option<Outage>, checks: &mut Vec<Check>) {
    let Some(outage) = outage else {
        checks.push(check("outage", "DataWay was gone", false, String::new));
        return;
    };
    let [before, after] = outage.points;
    checks.push(check("outage", "nothing arrived meanwhile", before == after, || {
        format!("{before} points before, {after} after")
    }));
    let [before, after] = outage.backlog;
    checks.push(check(
        "outage",
        "records waited in the queue",
        after.points > before.points,
        || format!("{} points before, {} after", before.points, after.points),
    ));
}

fn door(outcome: &Outcome, checks: &mut Vec<Check>) {
    for peer in [Peer::Agent, Peer::Nobody, Peer::Stranger, Peer::Plaintext] {
        let answer = outcome
            .peers
            .iter()
            .find(|(who, _)| *who == peer)
            .map(|(_, answer)| answer);
        let (what, good) = match peer {
            Peer::Agent => ("the agent's certificate is let in", answer == Some(&Answer::Served)),
            Peer::Nobody => ("a peer without certificate is refused", refused(answer)),
            Peer::Stranger => ("a certificate of another authority is refused", refused(answer)),
            Peer::Plaintext => ("a peer without TLS is refused", refused(answer)),
        };
        checks.push(check("tls", what, good, || format!("{answer:?}")));
    }
    let (count, words) = &outcome.refused;
    checks.push(check("tls", "refusals are counted", *count >= 3.0, || {
        format!("{count} of 3")
    }));
    checks.push(check("tls", "refusals are in the log", words.is_some(), String::new));
}

fn refused(answer: Option<&Answer>) -> bool {
    matches!(answer, Some(Answer::Refused(_)))
}

#[cfg(test)]
#[path = "judge_tests.rs"]
mod tests;
