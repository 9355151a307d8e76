#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::collections::BTreeMap;

use super::*;
use crate::{chain::schedule::faults, service::StageCounts, traffic::report::Counts};

fn wanted() -> Wanted {
    Wanted {
        kills: 1,
        faults: faults(Duration::from_secs(60)),
        resends: true,
        outage: true,
        tls: true,
        memory_kib: 1000,
    }
}

fn line(transport: &str, direction: &str) -> Line {
    let own = Counts {
        bytes_sent: 10,
        ..Counts::default()
    };
    Line {
        name: "chain-x".to_owned(),
        transport: transport.to_owned(),
        direction: direction.to_owned(),
        processes: 1,
        own,
        seen: own,
        problems: Vec::new(),
    }
}

fn ledger(name: &str) -> LedgerCounts {
    let stage = StageCounts {
        entered: 7,
        emitted: 7,
        ..StageCounts::default()
    };
    BTreeMap::from([(name.to_owned(), stage)])
}

fn good() -> Outcome {
    let mut stub = Summary {
        points: 7,
        bodies: 1,
        duplicates: 1,
        ..Summary::default()
    };
    stub.requests.extend([(200, 3), (503, 1), (429, 1)]);
    stub.faulted
        .extend(["hang", "close", "drop_answer"].map(|mode| (mode.to_owned(), 1)));
    Outcome {
        lines: vec![
            line("tcp", "incoming"),
            line("tcp", "outgoing"),
            line("udp", "incoming"),
            line("udp", "outgoing"),
        ],
        stub,
        agent: ledger("uplink.send"),
        aggregator: ledger("aggregator.accept"),
        agent_peak_kib: 900,
        aggregator_peaks_kib: vec![800, 1000],
        kills: 1,
        connects: 2.0,
        resent: 3.0,
        outage: Some(Outage {
            length: Duration::from_secs(1),
            points: [5, 5],
            backlog: [
                Backlog::default(),
                Backlog {
                    points: 2.0,
                    bytes: 200.0,
                },
            ],
        }),
        peers: [Peer::Nobody, Peer::Stranger, Peer::Plaintext]
            .into_iter()
            .map(|peer| (peer, Answer::Refused("alert".to_owned())))
            .chain([(Peer::Agent, Answer::Served)])
            .collect(),
        refused: (3.0, Some("connection refused".to_owned())),
        leaks: Vec::new(),
        dead_letters: Vec::new(),
    }
}

fn failures(outcome: &Outcome) -> Vec<String> {
    judge(&wanted(), outcome)
        .into_iter()
        .filter_map(|check| check.problem.map(|problem| format!("{}: {problem}", check.what)))
        .collect()
}

#[test]
fn a_good_run_passes() {
    assert_eq!(failures(&good()), Vec::<String>::new());
}

/// What the failed check is called, and what breaks it.
type Spoil = (&'static str, fn(&mut Outcome));

#[test]
fn each_broken_promise_is_one_failure() {
    let spoil: [Spoil; 21] = [
        ("chain-x tcp incoming", |o| o.lines[0].problems.push("1 off".to_owned())),
        ("incoming tcp traffic", |o| o.lines[0].own = Counts::default()),
        ("outgoing udp traffic", |o| {
            let _ = o.lines.pop();
        }),
        ("exactly once", |o| o.stub.points = 8),
        ("exactly once", |o| o.stub.points = 6),
        ("refused nothing", |o| o.stub.violations_total = 1),
        ("dead letters", |o| o.dead_letters.push("dataway.jsonl".to_owned())),
        ("token", |o| o.leaks.push("agent.log".to_owned())),
        ("aggregator: aggregator.accept closes", |o| {
            o.aggregator.get_mut("aggregator.accept").unwrap().entered += 1;
        }),
        ("agent at most", |o| o.agent_peak_kib = 1001),
        ("life 2 at most", |o| o.aggregator_peaks_kib[1] = 1001),
        ("every life", |o| {
            let _ = o.aggregator_peaks_kib.pop();
        }),
        ("answered 429", |o| {
            let _ = o.stub.requests.remove(&429);
        }),
        ("DataWay that hangs", |o| {
            let _ = o.stub.faulted.remove("hang");
        }),
        ("repeated bodies", |o| o.stub.duplicates = 0),
        ("nothing arrived", |o| o.outage.as_mut().unwrap().points[1] = 6),
        ("waited in the queue", |o| {
            o.outage.as_mut().unwrap().backlog[1].points = 0.0
        }),
        ("sent again", |o| o.resent = 0.0),
        ("without certificate", |o| o.peers[0].1 = Answer::Served),
        ("agent's certificate", |o| {
            let _ = o.peers.pop();
        }),
        ("in the log", |o| o.refused.1 = None),
    ];
    for (expected, spoil) in spoil {
        let mut outcome = good();
        spoil(&mut outcome);
        let failures = failures(&outcome);
        assert!(
            failures.len() == 1 && failures[0].contains(expected),
            "`{expected}` expected, failed: {failures:?}"
        );
    }
}

#[test]
fn an_agent_that_lost_records_fails() {
    let mut outcome = good();
    let stage = outcome.agent.get_mut("uplink.send").unwrap();
    stage.entered += 1;
    stage.lost.insert("uplink_shutdown".to_owned(), 1);
    let failures = failures(&outcome);
    assert!(
        failures.len() == 1 && failures[0].contains("uplink_shutdown"),
        "{failures:?}"
    );
}
