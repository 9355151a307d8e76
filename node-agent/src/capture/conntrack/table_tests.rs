#![allow(clippy::unwrap_used)]
use std::net::IpAddr;

use super::{
    super::message::{End, Protocol},
    *,
};

const SECOND: u64 = 1_000_000_000;
const HERE: Space = Space(1);

fn end(ip: &str, port: u16) -> End {
    End {
        ip: ip.parse::<IpAddr>().unwrap(),
        port,
    }
}

fn tuple(protocol: Protocol, port: u16, to: End) -> Tuple {
    Tuple {
        protocol,
        from: end("10.0.0.1", port),
        to,
    }
}

/// From 10.0.0.1:`port` to the service, sent on to `to`.
fn entry(protocol: Protocol, port: u16, to: End, id: u32) -> Entry {
    Entry {
        original: tuple(protocol, port, service()),
        reply: Tuple {
            protocol,
            from: to,
            to: end("10.0.0.1", port),
        },
        id,
    }
}

fn service() -> End {
    end("10.96.0.10", 80)
}

fn backend(n: u8) -> End {
    end(&format!("10.0.1.{n}"), 8080)
}

fn known(table: &Table, port: u16, at: u64) -> Option<End> {
    table
        .translated(HERE, &tuple(Protocol::Tcp, port, service()), at)
        .map(|it| it.to)
}

#[test]
fn what_is_not_translated_takes_no_room() {
    let mut table = Table::new(10);
    table.there(HERE, &entry(Protocol::Tcp, 1, service(), 7), true, SECOND);
    assert_eq!(table.len(), 0);
    table.there(HERE, &entry(Protocol::Tcp, 1, backend(1), 7), true, SECOND);
    assert_eq!(known(&table, 1, SECOND), Some(backend(1)));
    let there = tuple(Protocol::Tcp, 1, service());
    assert_eq!(table.translated(Space(2), &there, SECOND), None, "another namespace");
    assert_eq!(known(&table, 2, SECOND), None);
}

#[test]
fn sources_count_where_they_are_asked_for() {
    let mut table = Table::new(10);
    let mut only_source = entry(Protocol::Tcp, 1, service(), 7);
    only_source.reply.to = end("10.0.0.9", 999);
    table.there(HERE, &only_source, false, 1);
    assert_eq!(table.len(), 0);
    table.there(HERE, &only_source, true, 1);
    let translated = table.translated(HERE, &only_source.original, 1).unwrap();
    assert_eq!((translated.from, translated.to), (end("10.0.0.9", 999), service()));
}

#[test]
fn stays_known_for_a_while_after_its_end() {
    let mut table = Table::new(10);
    let one = entry(Protocol::Tcp, 1, backend(1), 7);
    table.there(HERE, &one, false, SECOND);
    table.gone(HERE, &one, 2 * SECOND);
    table.expire(2 * SECOND + LINGER_NS - 1);
    assert_eq!(known(&table, 1, 2 * SECOND), Some(backend(1)));
    table.expire(2 * SECOND + LINGER_NS);
    assert_eq!(known(&table, 1, 2 * SECOND), None);
    assert_eq!(table.len(), 0);
}

#[test]
fn ports_that_are_used_again_go_by_time() {
    let mut table = Table::new(10);
    let (first, second) = (
        entry(Protocol::Tcp, 1, backend(1), 7),
        entry(Protocol::Tcp, 1, backend(2), 8),
    );
    table.there(HERE, &first, false, SECOND);
    table.gone(HERE, &first, 2 * SECOND);
    table.there(HERE, &second, false, 3 * SECOND);
    assert_eq!(known(&table, 1, 2 * SECOND), Some(backend(1)));
    assert_eq!(known(&table, 1, 3 * SECOND), Some(backend(2)));
    // The first one's time is over; the second is still there.
    table.expire(2 * SECOND + LINGER_NS);
    assert_eq!(known(&table, 1, 2 * SECOND), Some(backend(2)));
    // Its end, told late, does not end the second.
    table.gone(HERE, &first, 13 * SECOND);
    table.expire(60 * SECOND);
    assert_eq!(known(&table, 1, 60 * SECOND), Some(backend(2)));
    // The same ports without a translation.
    table.there(HERE, &entry(Protocol::Tcp, 1, service(), 9), false, 61 * SECOND);
    assert_eq!(known(&table, 1, 60 * SECOND), Some(backend(2)));
    assert_eq!(known(&table, 1, 61 * SECOND), None);
    table.expire(61 * SECOND + LINGER_NS);
    assert_eq!(table.len(), 0);
}

#[test]
fn a_dump_ends_what_it_does_not_find() {
    let mut table = Table::new(10);
    let all: Vec<Entry> = (1..=3u16)
        .map(|n| entry(Protocol::Tcp, n, backend(1), u32::from(n)))
        .collect();
    for one in &all {
        table.there(HERE, one, false, SECOND);
        table.there(Space(2), one, false, SECOND);
    }
    let dump = table.dump_begins();
    table.there(HERE, &all[0], false, 2 * SECOND);
    // Made while the dump ran, and behind it: told by an event.
    let young = entry(Protocol::Tcp, 9, backend(2), 9);
    table.there(HERE, &young, false, 2 * SECOND);
    table.dumped(HERE, dump, 2 * SECOND);
    table.expire(2 * SECOND + LINGER_NS);
    let now = 3 * SECOND;
    assert_eq!(
        [1, 2, 3, 9].map(|port| known(&table, port, now).is_some()),
        [true, false, false, true]
    );
    assert_eq!(table.len(), 5, "nothing of another namespace went");
    table.all_gone(Space(2), 20 * SECOND);
    table.expire(20 * SECOND + LINGER_NS);
    assert_eq!(table.len(), 2);
}

#[test]
fn room_is_bounded_and_what_ended_gives_it() {
    let mut table = Table::new(2);
    let one = |port| entry(Protocol::Tcp, port, backend(1), u32::from(port));
    for port in 1..=3 {
        table.there(HERE, &one(port), false, SECOND);
    }
    assert_eq!((table.len(), table.take_refused(), table.take_refused()), (2, 1, 0));
    table.gone(HERE, &one(1), 2 * SECOND);
    table.there(HERE, &one(4), false, 3 * SECOND);
    assert_eq!(table.take_refused(), 0);
    assert_eq!(
        [1, 2, 3, 4].map(|port| known(&table, port, 3 * SECOND).is_some()),
        [false, true, false, true]
    );
    // The same ports a thousand times within a second.
    for _ in 0..1000 {
        table.gone(HERE, &one(4), 4 * SECOND);
        table.there(HERE, &one(4), false, 4 * SECOND);
    }
    assert!(table.ending.len() <= 4, "{}", table.ending.len());
    assert_eq!(known(&table, 4, 4 * SECOND), Some(backend(1)));
}

#[test]
fn what_was_dialled_is_known_by_translated_packets() {
    let mut table = Table::new(10);
    let (first, second) = (
        entry(Protocol::Udp, 1, backend(1), 7),
        entry(Protocol::Udp, 1, backend(2), 8),
    );
    table.there(HERE, &first, false, 1);
    assert_eq!(table.dialled(HERE, &first.translated()), Some(first.original));
    assert_eq!(table.dialled(HERE, &second.translated()), None);
    table.gone(HERE, &first, 2);
    table.there(HERE, &second, false, 3);
    assert_eq!(table.dialled(HERE, &first.translated()), None);
    assert_eq!(table.dialled(HERE, &second.translated()), Some(second.original));
    table.gone(HERE, &second, 4);
    table.expire(4 + LINGER_NS);
    assert_eq!(table.dialled(HERE, &second.translated()), None);
    assert_eq!((table.dialled.len(), table.len()), (0, 0));
    // A protocol is not taken for another.
    let tcp = entry(Protocol::Tcp, 1, backend(1), 7);
    table.there(HERE, &tcp, false, 1);
    assert_eq!(table.dialled(HERE, &tcp.translated()), Some(tcp.original));
    assert_eq!(table.dialled(HERE, &first.translated()), None);
}

#[derive(Clone, Copy, Debug)]
enum Step {
    There(u16, u8, u32),
    Gone(u16, u8, u32),
    Dump(u8),
    AllGone,
    Later(u64),
}

fn step() -> impl proptest::strategy::Strategy<Value = Step> {
    use proptest::prelude::*;
    prop_oneof![
        4 => (0..6u16, 0..3u8, 0..3u32).prop_map(|(port, to, id)| Step::There(port, to, id)),
        3 => (0..6u16, 0..3u8, 0..3u32).prop_map(|(port, to, id)| Step::Gone(port, to, id)),
        1 => (0..6u8).prop_map(Step::Dump),
        1 => Just(Step::AllGone),
        2 => (1..12 * SECOND).prop_map(Step::Later),
    ]
}

proptest::proptest! {
    /// Whatever comes: within its bounds, and what is there is known as it is.
    #[test]
    fn any_history_is_bounded_and_right(steps in proptest::collection::vec(step(), 0..200), max in 1..5usize) {
        let mut table = Table::new(max);
        let mut now = SECOND;
        // (port, backend, id) of what is there; backend 0 is the service itself.
        let mut real: std::collections::BTreeMap<u16, (u8, u32)> = std::collections::BTreeMap::default();
        let to = |n: u8| if n == 0 { service() } else { backend(n) };
        let mut refused = false;
        for step in steps {
            now += SECOND;
            match step {
                Step::There(port, n, id) => {
                    table.there(HERE, &entry(Protocol::Udp, port, to(n), id + 1), false, now);
                    refused |= table.take_refused() > 0;
                    real.insert(port, (n, id + 1));
                }
                Step::Gone(port, n, id) => {
                    table.gone(HERE, &entry(Protocol::Udp, port, to(n), id + 1), now);
                    if real.get(&port).is_some_and(|(_, real)| *real == id + 1) {
                        real.remove(&port);
                    }
                }
                Step::Dump(skip) => {
                    let dump = table.dump_begins();
                    real.retain(|port, _| *port != u16::from(skip));
                    for (port, (n, id)) in &real {
                        table.there(HERE, &entry(Protocol::Udp, *port, to(*n), *id), false, now);
                        refused |= table.take_refused() > 0;
                    }
                    table.dumped(HERE, dump, now);
                }
                Step::AllGone => {
                    table.all_gone(HERE, now);
                    real.clear();
                }
                Step::Later(by) => now += by,
            }
            table.expire(now);
            assert!(table.len() <= max && table.ending.len() <= 2 * max && table.dialled.len() <= max);
            for (port, (n, _)) in real.iter().filter(|_| !refused) {
                let original = tuple(Protocol::Udp, *port, service());
                let found = table.translated(HERE, &original, now).map(|it| it.to);
                assert_eq!(found, (*n != 0).then(|| to(*n)), "port {port}");
            }
        }
        table.all_gone(HERE, now);
        table.expire(now + LINGER_NS);
        assert_eq!((table.dialled.len(), table.len()), (0, 0));
    }
}
