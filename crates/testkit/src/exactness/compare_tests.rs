#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use super::*;
use crate::traffic::report::Row;

fn report(pid: u32, group: &str) -> Report {
    Report {
        pid,
        name: "r4-c1".to_owned(),
        role: "tcp-client".to_owned(),
        group: group.to_owned(),
        netns: 1,
        rows: vec![Row {
            transport: Transport::Tcp,
            family: "IPv4".to_owned(),
            direction: Direction::Outgoing,
            local: Some("10.77.0.1".parse().unwrap()),
            remote: "10.77.128.1".parse().unwrap(),
            service_port: 7001,
            counts: Counts {
                connections: 3,
                closed: 3,
                bytes_sent: 100,
                bytes_received: 50,
                ..Counts::default()
            },
            before: Counts::default(),
            settled: Counts::default(),
        }],
        exchanges: Vec::new(),
        errors: BTreeMap::new(),
        unsupported: Vec::new(),
        elapsed_ns: 1,
    }
}

fn flow(pid: u32) -> Flow {
    Flow {
        transport: Transport::Tcp,
        family: "IPv4".to_owned(),
        direction: Direction::Outgoing,
        src_ip: "10.77.0.1".parse().unwrap(),
        src_port: "*".to_owned(),
        dst_ip: "10.77.128.1".parse().unwrap(),
        dst_port: "7001".to_owned(),
        pid,
        process_name: "r4-c1".to_owned(),
        counts: Counts {
            connections: 3,
            closed: 3,
            bytes_sent: 100,
            bytes_received: 50,
            ..Counts::default()
        },
        retransmits: 0,
        rtt_us: 10,
    }
}

fn problems(reports: &[Report], flows: &[Flow]) -> Vec<String> {
    compare(reports, flows)
        .0
        .into_iter()
        .filter_map(|check| check.problem)
        .collect()
}

#[test]
fn equal_counts_pass_also_when_split_over_intervals() {
    assert_eq!(problems(&[report(9, "")], &[flow(9)]), Vec::<String>::new());
    let (mut first, mut second) = (flow(9), flow(9));
    first.counts.bytes_sent = 40;
    second.counts = Counts {
        bytes_sent: 60,
        ..Counts::default()
    };
    assert_eq!(problems(&[report(9, "")], &[first, second]), Vec::<String>::new());
}

#[test]
fn one_byte_or_one_row_too_few_is_found() {
    let mut short = flow(9);
    short.counts.bytes_received -= 1;
    assert!(problems(&[report(9, "")], &[short])[0].contains("bytes_read: own 50, agent 49 (-1)"));
    assert!(problems(&[report(9, "")], &[])[0].contains("tcp_established: own 3, agent 0"));
}

#[test]
fn counts_before_the_mark_are_not_expected() {
    let mut older = report(9, "");
    older.rows[0].before = Counts {
        connections: 3,
        bytes_sent: 60,
        ..Counts::default()
    };
    let mut new = flow(9);
    new.counts = Counts {
        closed: 3,
        bytes_sent: 40,
        bytes_received: 50,
        ..Counts::default()
    };
    assert_eq!(problems(&[older], &[new]), Vec::<String>::new());
}

#[test]
fn wrong_process_direction_port_name_or_address_is_found() {
    let breaks: [fn(&mut Flow); 6] = [
        |flow| flow.pid = 0,
        |flow| flow.direction = Direction::Incoming,
        |flow| flow.src_port = "40000".to_owned(),
        |flow| flow.process_name = "other".to_owned(),
        |flow| flow.src_ip = "10.77.0.2".parse().unwrap(),
        |flow| flow.dst_ip = "10.77.128.2".parse().unwrap(),
    ];
    for break_it in breaks {
        let mut broken = flow(9);
        break_it(&mut broken);
        assert!(!problems(&[report(9, "")], &[broken.clone()]).is_empty(), "{broken:?}");
    }
}

#[test]
fn a_group_may_share_connections_but_not_bytes() {
    let group = format!("{SHARED_CONNECTIONS}r4-s");
    let mut parent = report(9, &group);
    parent.rows[0].counts = Counts {
        connections: 3,
        closed: 3,
        ..Counts::default()
    };
    let mut child = report(10, &group);
    child.rows[0].counts = Counts {
        bytes_sent: 100,
        bytes_received: 50,
        ..Counts::default()
    };
    assert_eq!(
        problems(&[parent.clone(), child.clone()], &[flow(10)]),
        Vec::<String>::new()
    );
    assert!(!problems(&[parent, child], &[flow(9)]).is_empty());
}

#[test]
fn a_passed_socket_must_settle_with_its_new_process() {
    let group = format!("{SHARED_ALL}pass-s");
    let mut acceptor = report(9, &group);
    acceptor.rows[0].counts = Counts {
        connections: 3,
        ..Counts::default()
    };
    let mut receiver = report(10, &group);
    receiver.rows[0].counts = Counts {
        closed: 3,
        bytes_sent: 100,
        bytes_received: 50,
        ..Counts::default()
    };
    receiver.rows[0].settled = Counts {
        bytes_sent: 60,
        ..Counts::default()
    };
    let reports = [acceptor, receiver];
    let (mut early, mut late) = (flow(9), flow(10));
    early.counts = Counts {
        connections: 3,
        bytes_sent: 40,
        bytes_received: 50,
        ..Counts::default()
    };
    late.counts = Counts {
        closed: 3,
        bytes_sent: 60,
        ..Counts::default()
    };
    assert_eq!(problems(&reports, &[early.clone(), late.clone()]), Vec::<String>::new());
    early.counts.bytes_sent += 1;
    late.counts.bytes_sent -= 1;
    assert!(problems(&reports, &[early, late])[0].contains("settled 60, agent only 59"));
}

#[test]
fn a_row_of_nobody_is_only_a_problem_on_test_addresses() {
    let mut foreign = flow(77);
    foreign.src_ip = "192.0.2.1".parse().unwrap();
    foreign.dst_ip = "192.0.2.2".parse().unwrap();
    assert_eq!(
        problems(&[report(9, "")], &[flow(9), foreign.clone()]),
        Vec::<String>::new()
    );
    foreign.src_ip = "10.77.0.5".parse().unwrap();
    assert!(problems(&[report(9, "")], &[flow(9), foreign])[0].contains("pid 77"));
}

#[test]
fn a_ledger_with_pending_or_lost_items_fails() {
    let read = |text: &str| check_ledger(&serde_json::from_str(text).unwrap());
    let good = read(r#"{"a":{"entered":3,"emitted":2,"skipped":{"x":1},"lost":{}}}"#);
    assert!(good.iter().all(|check| check.problem.is_none()));
    for bad in [
        "{}",
        r#"{"a":{"entered":3,"emitted":2}}"#,
        r#"{"a":{"entered":3,"emitted":2,"lost":{"x":1}}}"#,
    ] {
        assert!(read(bad)[0].problem.is_some(), "{bad}");
    }
}
