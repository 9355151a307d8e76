use super::*;
use crate::demo::cast::NAME_PREFIX;
use crate::traffic::report::{Recorder, RowKey};

fn report(pid: u32, name: &str, transport: Transport, counts: Counts) -> Report {
    let mut recorder = Recorder::default();
    let row = recorder.row(RowKey {
        transport,
        direction: Direction::Outgoing,
        local: None,
        remote: "127.0.0.1".parse().unwrap(),
        service_port: 7100,
    });
    *recorder.counts(row) = counts;
    Report {
        pid,
        ..recorder.report(name, "role", "")
    }
}

fn sum(pid: &str, name: &str, transport: &str, fields: &[(&str, i128)]) -> SumRow {
    SumRow {
        pid: pid.to_owned(),
        process_name: name.to_owned(),
        transport: transport.to_owned(),
        direction: "outgoing".to_owned(),
        points: 1,
        fields: fields.iter().map(|(key, value)| ((*key).to_owned(), *value)).collect(),
    }
}

fn tcp(bytes: u64) -> Counts {
    Counts {
        connections: 2,
        closed: 2,
        bytes_sent: bytes,
        bytes_received: 7,
        ..Counts::default()
    }
}

const TCP: [(&str, i128); 4] = [
    ("tcp_established", 2),
    ("tcp_closed", 2),
    ("bytes_written", 50),
    ("bytes_read", 7),
];

fn flow(pid: u32, name: &str, sent: u64) -> Flow {
    Flow {
        transport: Transport::Udp,
        family: "IPv4".to_owned(),
        direction: Direction::Outgoing,
        src_ip: "127.0.0.1".parse().unwrap(),
        src_port: "*".to_owned(),
        dst_ip: "127.0.0.1".parse().unwrap(),
        dst_port: "7100".to_owned(),
        pid,
        process_name: name.to_owned(),
        counts: Counts {
            datagrams_sent: sent,
            ..Counts::default()
        },
        retransmits: 0,
        rtt_us: 0,
    }
}

fn closed(points: u64) -> LedgerCounts {
    let stage = StageCounts {
        entered: points,
        emitted: points,
        ..StageCounts::default()
    };
    LedgerCounts::from([("sink.dataway.deliver".to_owned(), stage)])
}

fn udp() -> (Report, SumRow, Flow) {
    let counts = Counts {
        datagrams_sent: 3,
        bytes_sent: 30,
        ..Counts::default()
    };
    (
        report(11, "demo-u", Transport::Udp, counts),
        sum("11", "demo-u", "udp", &[("bytes_written", 30)]),
        flow(11, "demo-u", 3),
    )
}

#[test]
fn equal_counts_agree_and_others_are_left_out() {
    let (udp_report, udp_sum, udp_flow) = udp();
    let reports = [
        report(10, "demo-a", Transport::Tcp, tcp(40)),
        report(12, "demo-a", Transport::Tcp, tcp(50)),
        udp_report,
    ];
    let first = sum("10", "demo-a", "tcp", &[TCP[0], TCP[1], ("bytes_written", 40), TCP[3]]);
    let sums = [
        first,
        sum("12", "demo-a", "tcp", &TCP),
        sum("99", "sshd", "tcp", &TCP),
        udp_sum,
    ];
    let lines = compare(NAME_PREFIX, &reports, &sums, &[udp_flow, flow(99, "other", 5)]);
    assert_eq!(lines.len(), 2, "{lines:#?}");
    assert_eq!((lines[0].processes, lines[0].own.bytes_sent), (2, 90));
    assert_eq!((lines[1].seen.datagrams_sent, lines[1].seen.bytes_sent), (3, 30));
    let stub = Summary {
        points: 9,
        ..Summary::default()
    };
    assert_eq!(problems(&lines, &stub, &closed(9)), Vec::<String>::new());
}

#[test]
fn one_process_short_is_found_even_if_another_has_it() {
    let reports = [
        report(10, "demo-a", Transport::Tcp, tcp(40)),
        report(12, "demo-a", Transport::Tcp, tcp(60)),
    ];
    let lines = compare(
        NAME_PREFIX,
        &reports,
        &[sum("10", "demo-a", "tcp", &TCP), sum("12", "demo-a", "tcp", &TCP)],
        &[],
    );
    assert_eq!(lines[0].own.bytes_sent, lines[0].seen.bytes_sent, "the sums hide it");
    assert_eq!(lines[0].problems.len(), 2, "{:?}", lines[0].problems);
    assert!(lines[0].problems[0].contains("pid 10") && lines[0].problems[0].contains("(+10)"));
}

#[test]
fn wrong_names_pids_directions_and_datagrams_are_found() {
    let reports = [report(10, "demo-a", Transport::Tcp, tcp(50))];
    let found = |sums: &[SumRow], flows: &[Flow]| {
        compare(NAME_PREFIX, &reports, sums, flows)
            .iter()
            .map(|line| line.problems.len())
            .sum::<usize>()
    };
    assert_eq!(found(&[sum("10", "demo-a", "tcp", &TCP)], &[]), 0);
    assert_eq!(found(&[sum("10", "bash", "tcp", &TCP)], &[]), 2);
    assert_eq!(found(&[sum("0", "demo-a", "tcp", &TCP)], &[]), 2);
    let turned = SumRow {
        direction: "incoming".to_owned(),
        ..sum("10", "demo-a", "tcp", &TCP)
    };
    assert_eq!(found(&[turned], &[]), 2);
    assert_eq!(found(&[sum("10", "demo-a", "tcp", &TCP)], &[flow(10, "demo-a", 1)]), 1);
}

#[test]
fn silence_violations_losses_and_missing_points_are_problems() {
    let silent = problems(&[], &Summary::default(), &closed(0));
    assert_eq!(silent.len(), 2, "{silent:?}");
    let (report_, sum_, flow_) = udp();
    let reports = [report(10, "demo-a", Transport::Tcp, tcp(50)), report_];
    let lines = compare(
        NAME_PREFIX,
        &reports,
        &[sum("10", "demo-a", "tcp", &TCP), sum_],
        &[flow_],
    );
    let violated = Summary {
        violations_total: 1,
        violations: vec!["no X-Points".to_owned()],
        ..Summary::default()
    };
    assert!(problems(&lines, &violated, &closed(0))[0].contains("no X-Points"));
    let lossy = final_ledger("x Ledger stage=\"a.b\" entered=5 emitted=3 skipped={} lost={\"full\": 2} pending=0");
    assert!(problems(&lines, &Summary::default(), &lossy)[0].contains("full"));
    assert!(problems(&lines, &Summary::default(), &closed(4))[0].contains("took 4 points"));
    assert!(problems(&lines, &Summary::default(), &LedgerCounts::new())[0].contains("empty"));
}

#[test]
fn the_final_ledger_is_read_from_the_log() {
    let log = "t INFO m: Stopping\n\
               t INFO m: Ledger stage=\"k.tcp\" entered=9 emitted=4 skipped={\"loopback\": 2, \"v6\": 1} lost={} pending=2\n\
               t INFO m: Ledger stage=\"u.send\" entered=1 emitted=1 skipped={} lost={} pending=0\n";
    let ledger = final_ledger(log);
    assert_eq!(ledger.len(), 2);
    assert_eq!(ledger["k.tcp"].pending(), 2);
    assert_eq!(ledger["k.tcp"].skipped["v6"], 1);
}

#[test]
fn features_are_read_with_any_text_in_them() {
    let metrics = "# HELP x_feature y\n\
                   x_feature{feature=\"net/tcp\",state=\"on\",hook=\"raw, tracepoint\",reason=\"\"} 2\n\
                   x_feature{feature=\"net/udp\",state=\"off\",hook=\"\",reason=\"no \\\"x\\\", }\"} 0\nother{a=\"b\"} 1\n";
    let found = features(metrics);
    assert_eq!(found.len(), 2);
    assert_eq!(
        (found[0].hook.as_str(), found[0].state.as_str()),
        ("raw, tracepoint", "on")
    );
    assert_eq!(found[1].reason, "no \"x\", }");
}
