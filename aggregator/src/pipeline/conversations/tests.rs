use std::time::Duration;

use records::{Globals, RecordBatch};

use super::*;
use crate::pipeline::BatchId;

const SECOND: u64 = 1000;

fn options(records: FlowRecords) -> ConversationOptions {
    ConversationOptions {
        records,
        heartbeat: Duration::from_secs(30),
        end_timeout: Duration::from_secs(10),
        terminating_timeout: Duration::from_secs(5),
        max: 100,
    }
}

fn flow(src: &str, dst: &str, bytes: u64, flags: u16) -> FlowLog {
    let end = |text: &str| text.parse::<std::net::SocketAddr>().unwrap();
    let (src, dst) = (end(src), end(dst));
    let ports = FlowL4::Ports {
        src: src.port(),
        dst: dst.port(),
    };
    let mut flow = FlowLog::new(src.ip(), dst.ip(), 6, ports);
    (flow.bytes, flow.packets) = (bytes, 1);
    flow.flags = Some(flags);
    flow
}

fn from(node: &str, flows: Vec<FlowLog>) -> Vec<Delivery> {
    vec![Delivery {
        id: BatchId {
            node: node.into(),
            boot_id: 1,
            seq: 1,
        },
        globals: Arc::new(Globals::default()),
        batch: RecordBatch {
            flowlog: flows,
            ..RecordBatch::default()
        },
    }]
}

/// Kind, sums and whether it is the first, of each.
fn kinds(records: &[FlowLog]) -> Vec<(&'static str, u64, u64, bool)> {
    records
        .iter()
        .map(|record| {
            let of = record.conversation.unwrap();
            let totals = of.totals.unwrap_or_default();
            (of.kind.as_str(), totals.bytes_ab, totals.bytes_ba, of.first)
        })
        .collect()
}

const A: &str = "10.0.0.1:1000";
const B: &str = "10.0.0.2:80";

#[test]
fn both_directions_are_one_conversation() {
    let mut all = Conversations::new(options(FlowRecords::All));
    let told = all.tell(0, &from("n", vec![flow(B, A, 7, 0x100), flow(A, B, 5, 0x10)]));
    assert_eq!(
        kinds(&told),
        [
            ("newConnection", 0, 7, true),
            ("flowLog", 0, 0, false),
            ("flowLog", 0, 0, false)
        ]
    );
    let ids: Vec<u64> = told.iter().map(|record| record.conversation.unwrap().id).collect();
    assert!(ids.iter().all(|id| *id == ids[0]));
    // A is who called, though the answer came first. Records of conversations have no flags or addresses of hardware.
    assert_eq!((told[0].src, told[0].flags, told[0].bytes), (told[1].dst, None, 7));
    assert_eq!(told[0].l4, FlowL4::Ports { src: 1000, dst: 80 });
    assert_eq!((told[2].bytes, told[2].flags), (5, Some(0x10)));
    let other = all.tell(0, &from("n", vec![flow(A, "10.0.0.2:81", 1, 0)]));
    assert_ne!(other[0].conversation.unwrap().id, ids[0]);
    let later = all.tell(10 * SECOND, &[]);
    assert_eq!(later.len(), 2);
    assert!(kinds(&later).contains(&("endConnection", 5, 7, false)));
    assert_eq!(all.len(), 0);
}

#[test]
fn it_is_told_while_it_goes_on_and_once_when_it_ends() {
    let mut all = Conversations::new(options(FlowRecords::Conversations));
    assert_eq!(
        kinds(&all.tell(0, &from("n", vec![flow(A, B, 1, 0)]))),
        [("newConnection", 1, 0, true)]
    );
    let mut told = Vec::new();
    for second in 1..70 {
        let flows = if second % 5 == 0 {
            vec![flow(A, B, 1, 0)]
        } else {
            vec![]
        };
        told.extend(all.tell(second * SECOND, &from("n", flows)));
    }
    assert_eq!(kinds(&told), [("heartbeat", 7, 0, false), ("heartbeat", 13, 0, false)]);
    let mut told = Vec::new();
    for second in 70..100 {
        told.extend(all.tell(second * SECOND, &[]));
    }
    assert_eq!(kinds(&told), [("endConnection", 14, 0, false)]);
}

#[test]
fn what_both_ends_closed_or_one_reset_is_over_sooner() {
    let end = |flows: Vec<FlowLog>| {
        let mut all = Conversations::new(options(FlowRecords::EndedConversations));
        assert!(all.tell(0, &from("n", flows)).is_empty());
        (1..100).find(|second| {
            let told = all.tell(second * SECOND, &[]);
            assert!(
                kinds(&told)
                    .iter()
                    .all(|(kind, .., first)| *kind == "endConnection" && *first)
            );
            !told.is_empty()
        })
    };
    assert_eq!(end(vec![flow(A, B, 1, 0x01), flow(B, A, 1, 0x200)]), Some(5));
    assert_eq!(end(vec![flow(A, B, 1, 0x400)]), Some(5));
    assert_eq!(end(vec![flow(A, B, 1, 0x04)]), Some(5));
    // Half closed: the other side may go on for long.
    assert_eq!(end(vec![flow(A, B, 1, 0x01), flow(B, A, 1, 0x10)]), Some(10));
    assert_eq!(end(vec![flow(A, B, 1, 0x02)]), Some(10));
}

#[test]
fn ports_that_are_used_again_are_another_conversation() {
    let mut all = Conversations::new(options(FlowRecords::Conversations));
    let at = |start: i64, mut flow: FlowLog| {
        (flow.start_unix_ms, flow.end_unix_ms) = (start, start + 10);
        flow
    };
    let whole = |start: i64| vec![at(start, flow(A, B, 1, 0x03)), at(start + 5, flow(B, A, 2, 0x201))];
    let mut told = all.tell(0, &from("n", whole(1000)));
    // The rest of the old one is not a new one.
    told.extend(all.tell(SECOND, &from("n", vec![at(1012, flow(A, B, 4, 0x10))])));
    told.extend(all.tell(2 * SECOND, &from("n", whole(3000))));
    told.extend(all.tell(60 * SECOND, &[]));
    assert_eq!(
        kinds(&told),
        [
            ("newConnection", 1, 0, true),
            ("endConnection", 5, 2, false),
            ("newConnection", 1, 0, true),
            ("endConnection", 1, 2, false)
        ]
    );
    assert_eq!((told[1].start_unix_ms, told[1].end_unix_ms), (1000, 1022));
}

#[test]
fn a_clock_that_is_ahead_makes_no_second_conversation() {
    let mut all = Conversations::new(options(FlowRecords::Conversations));
    let whole = |start: i64| {
        let mut flows = vec![flow(A, B, 1, 0x03), flow(B, A, 2, 0x200)];
        for flow in &mut flows {
            (flow.start_unix_ms, flow.end_unix_ms) = (start, start + 3);
        }
        flows
    };
    let mut told = all.tell(0, &from("one", whole(1000)));
    told.extend(all.tell(100, &from("two", whole(1020))));
    told.extend(all.tell(60 * SECOND, &[]));
    assert_eq!(
        kinds(&told),
        [("newConnection", 1, 0, true), ("endConnection", 1, 2, false)]
    );
}

#[test]
fn of_two_nodes_one_is_summed() {
    let mut all = Conversations::new(options(FlowRecords::EndedConversations));
    for second in 0..20 {
        let flows = || vec![flow(A, B, 1, 0)];
        if second < 10 {
            all.tell(second * SECOND, &from("one", flows()));
        }
        all.tell(second * SECOND, &from("two", flows()));
    }
    let told = all.tell(40 * SECOND, &[]);
    // Ten of the first, and what the second saw after the first had been silent for ten seconds: the last one.
    assert_eq!(kinds(&told), [("endConnection", 11, 0, true)]);
}

#[test]
fn there_are_so_many_at_most() {
    let few = ConversationOptions {
        max: 2,
        ..options(FlowRecords::All)
    };
    let mut all = Conversations::new(few);
    let flows = |ports: std::ops::Range<u16>| ports.map(|port| flow(A, &format!("10.0.0.2:{port}"), 1, 0)).collect();
    let told = all.tell(0, &from("n", flows(1..5)));
    assert_eq!((told.len(), all.len(), all.take_untracked()), (6, 2, 2));
    let plain: Vec<bool> = told.iter().map(|record| record.conversation.is_none()).collect();
    assert_eq!(plain, [false, false, false, false, true, true]);
    // What found no room in an agent's table is no conversation.
    let nobody = FlowLog::new([0; 4].into(), [0; 4].into(), 0, FlowL4::Other);
    let told = all.tell(0, &from("n", vec![nobody]));
    assert_eq!((told.len(), told[0].conversation, all.take_untracked()), (1, None, 0));
}

#[test]
fn a_group_that_is_not_stored_comes_again() {
    let state = |all: &Conversations| {
        let mut known: Vec<String> = all.known.iter().map(|it| format!("{it:?}")).collect();
        known.sort();
        known
    };
    let mut all = Conversations::new(options(FlowRecords::All));
    let mut seed = 7u64;
    let mut random = |below: u64| {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % below
    };
    for second in 0..400 {
        let flows: Vec<FlowLog> = (0..random(6))
            .map(|_| {
                let far = format!("10.0.0.2:{}", 1 + random(9));
                let flags = [0, 0x10, 0x01, 0x200, 0x02, 0x04][random(6) as usize];
                let mut flow = if random(2) == 0 {
                    flow(A, &far, 1, flags)
                } else {
                    flow(&far, A, 1, flags)
                };
                flow.start_unix_ms = second * 1000 + i64::try_from(random(1000)).unwrap();
                flow.end_unix_ms = flow.start_unix_ms;
                flow
            })
            .collect();
        let group = from("n", flows);
        let now = second.cast_unsigned() * SECOND;
        let before = state(&all);
        let first = kinds_and_ids(&all.tell(now, &group));
        all.take_back();
        assert_eq!(state(&all), before, "{second}");
        let mut again = kinds_and_ids(&all.tell(now, &group));
        let mut first = first;
        // What is due comes in any order.
        first.sort_unstable();
        again.sort_unstable();
        assert_eq!(first, again, "{second}");
    }
}

fn kinds_and_ids(records: &[FlowLog]) -> Vec<(&'static str, u64, u64, u64)> {
    records
        .iter()
        .map(|record| {
            let of = record.conversation.unwrap();
            (of.kind.as_str(), of.id, record.bytes, record.packets)
        })
        .collect()
}
