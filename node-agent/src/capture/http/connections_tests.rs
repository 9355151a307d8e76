//! Connections from their events, without a kernel.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use ebpf_common::net::Tuple;
use records::Httpflow;

use super::{
    super::{events::Owner, rows},
    *,
};
use crate::{
    capture::ends::{Ends, Names, UnnamedEnds, Which},
    identity::process::Proc,
};

const SECOND: u64 = 1_000_000_000;
const OUT: u8 = way::EGRESS;
const INTO: u8 = way::INGRESS;

/// Connections with their rows.
struct Bench {
    connections: Connections,
    rows: Rows,
}

impl Bench {
    fn new(max: usize) -> Self {
        Self {
            connections: Connections::new(max, HttpOptions::default(), From::Packets),
            rows: Rows::new(1000, 10_001, Ends::default()),
        }
    }

    fn take(&mut self, cookie: u64, time_ns: u64, what: What<'_>) {
        let event = Event { cookie, time_ns, what };
        self.connections.take(&event, &mut self.rows);
    }

    fn open(&mut self, cookie: u64, role: u8, fresh: bool) {
        let tuple = Tuple {
            local_port: 40_000,
            remote_port: 80,
            ..Tuple::default()
        };
        let opened = Opened {
            tuple,
            next: [100, 200],
            role,
            fresh,
            owner: Owner {
                pid: 7,
                ..Owner::default()
            },
        };
        self.take(cookie, 1, What::Open(opened));
    }

    fn bytes(&mut self, cookie: u64, time_ns: u64, way: u8, seq: u32, bytes: &[u8]) {
        let data = Data {
            way,
            flags: 0,
            seq,
            len: u32::try_from(bytes.len()).unwrap(),
            captured: bytes,
            tail: &[],
        };
        self.take(cookie, time_ns, What::Data(data));
    }

    fn end(&mut self, cookie: u64, way: u8, seq: u32, flags: u8) {
        let data = Data {
            way,
            flags,
            seq,
            len: 0,
            captured: &[],
            tail: &[],
        };
        self.take(cookie, 9, What::Data(data));
    }

    fn told(&mut self) -> Vec<Httpflow> {
        let (proc, unnamed) = (Proc::new("/nonexistent"), UnnamedEnds::default());
        let mut names = Names::new(&proc, None, &unnamed);
        let mut rows = self.rows.take(Which::All, 100, 7, &mut names);
        rows.sort_by(|a, b| a.path.cmp(&b.path));
        rows
    }

    fn counts(&mut self) -> rows::Counts {
        self.rows.take_counts()
    }
}

const REQUEST: &[u8] = b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n";
const RESPONSE: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello";

#[test]
fn what_comes_before_its_socket_waits_for_it() {
    let mut bench = Bench::new(10);
    bench.connections = Connections::new(10, HttpOptions::default(), From::Calls);
    // A server reads the request, and its answer tells the socket.
    bench.bytes(1, 1000, INTO, 200, REQUEST);
    assert!(bench.told().is_empty());
    bench.open(1, role::SERVER, true);
    bench.bytes(1, 3000, OUT, 100, RESPONSE);
    let rows = bench.told();
    assert_eq!((rows.len(), rows[0].status_code, rows[0].latency_ns), (1, 200, 2000));
    // What is missing was lost, both ways: nothing waits for it.
    bench.bytes(1, 4000, INTO, 200 + 2 * REQUEST.len() as u32, REQUEST);
    bench.bytes(1, 5000, OUT, 100 + RESPONSE.len() as u32, RESPONSE);
    assert_eq!(bench.told().iter().map(|row| row.count).sum::<u64>(), 1);
    // The process ends, and its connection with it; another's does not.
    bench.connections.end_of(&[8], &mut bench.rows);
    assert_eq!(bench.connections.len(), 1);
    bench.connections.end_of(&[7], &mut bench.rows);
    assert_eq!(bench.connections.len(), 0);
    // Nobody tells these sockets: one connection ends, another waits too long.
    bench.bytes(2, 6000, INTO, 0, REQUEST);
    bench.end(2, OUT, 0, flag::RESET);
    bench.bytes(3, 6000, INTO, 0, REQUEST);
    bench.connections.end_interval(100 * SECOND, 0, &mut bench.rows);
    assert_eq!(bench.connections.take_counts().no_socket, 2);
    assert!(bench.told().is_empty());
}

#[test]
fn both_roles_count_their_own_way() {
    for (role, sends, answers) in [(role::CLIENT, OUT, INTO), (role::SERVER, INTO, OUT)] {
        let mut bench = Bench::new(10);
        bench.open(1, role, true);
        let seq = |way: u8| if way == OUT { 100 } else { 200 };
        bench.bytes(1, 1000, sends, seq(sends), REQUEST);
        bench.bytes(1, 3000, answers, seq(answers), RESPONSE);
        let rows = bench.told();
        let row = &rows[0];
        let (asked, answered) = (REQUEST.len() as u64, RESPONSE.len() as u64);
        let expected = if role == role::CLIENT {
            (answered, asked)
        } else {
            (asked, answered)
        };
        assert_eq!((row.bytes_read, row.bytes_written), expected);
        assert_eq!((row.count, row.latency_ns, row.flow.pid), (1, 2000, 7));
        assert_eq!((&*row.method, &*row.path, row.status_code), ("GET", "/a", 200));
    }
}

#[test]
fn a_response_that_was_overtaken_waits_for_its_beginning() {
    let mut bench = Bench::new(10);
    bench.open(1, role::CLIENT, true);
    bench.bytes(1, 1, OUT, 100, REQUEST);
    bench.bytes(1, 3, INTO, 220, &RESPONSE[20..]);
    assert!(bench.told().is_empty());
    bench.bytes(1, 4, INTO, 200, &RESPONSE[..20]);
    assert_eq!(bench.told()[0].bytes_read, RESPONSE.len() as u64);
    // What does not come is missing, but not for ever waited for.
    bench.bytes(1, 5, OUT, 100 + REQUEST.len() as u32, REQUEST);
    let seq = 200 + RESPONSE.len() as u32;
    bench.bytes(1, 6, INTO, seq + 40, &RESPONSE[40..]);
    bench.connections.look_at_waiting(7, &mut bench.rows);
    assert_eq!(bench.connections.take_counts().missing_bytes, 0);
    bench.connections.look_at_waiting(7 + 2 * SECOND, &mut bench.rows);
    assert_eq!(bench.connections.take_counts().missing_bytes, 40);
    assert!(bench.connections.waiting.is_empty());
}

#[test]
fn the_end_of_the_answers_ends_a_connection() {
    let mut bench = Bench::new(10);
    bench.open(1, role::CLIENT, true);
    bench.bytes(1, 1, OUT, 100, REQUEST);
    bench.end(1, OUT, 100 + REQUEST.len() as u32, flag::FIN);
    let head = b"HTTP/1.0 200 OK\r\n\r\nuntil the end";
    bench.bytes(1, 2, INTO, 200, head);
    assert!(bench.told().is_empty() && bench.connections.len() == 1);
    bench.end(1, INTO, 200 + head.len() as u32, flag::FIN);
    let rows = bench.told();
    assert_eq!((rows[0].bytes_read, rows[0].status_code), (head.len() as u64, 200));
    assert_eq!((bench.connections.len(), bench.counts().aborted), (0, 0));

    bench.open(2, role::CLIENT, true);
    bench.bytes(2, 1, OUT, 100, REQUEST);
    bench.end(2, INTO, 200, flag::RESET);
    let rows = bench.told();
    assert_eq!((rows[0].status_code, rows[0].count, bench.counts().aborted), (0, 1, 1));
}

#[test]
fn what_is_no_http_is_left_alone() {
    let mut bench = Bench::new(10);
    bench.open(1, role::CLIENT, true);
    bench.bytes(1, 1, OUT, 100, b"GET nothing of the kind\r\n");
    assert_eq!((bench.connections.len(), bench.connections.take_quit()), (0, vec![1]));
    // A web socket was HTTP once.
    bench.open(2, role::CLIENT, true);
    bench.bytes(
        2,
        1,
        OUT,
        100,
        b"GET /ws HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    );
    bench.bytes(
        2,
        2,
        INTO,
        200,
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n",
    );
    assert_eq!((bench.connections.len(), bench.connections.take_quit()), (0, vec![2]));
    assert_eq!(bench.told()[0].status_code, 101);
    // One that never shows what it is.
    bench.open(3, role::UNKNOWN, false);
    for n in 0..=TRIAL {
        bench.bytes(3, 1, OUT, 100 + n * 20, b"\0\0\x0b\0\0\0\0\0\x01stream 1 is");
    }
    assert_eq!((bench.connections.len(), bench.connections.take_quit()), (0, vec![3]));
}

#[test]
fn connections_are_bounded_and_idle_ones_forgotten() {
    let mut bench = Bench::new(2);
    for cookie in 1..=3 {
        bench.open(cookie, role::CLIENT, true);
        bench.bytes(cookie, 5, OUT, 100, REQUEST);
    }
    let counts = bench.connections.take_counts();
    assert_eq!(
        (counts.refused, counts.strays, bench.connections.take_quit()),
        (1, 1, vec![3, 3])
    );
    bench.connections.end_interval(2 * IDLE_NS, IDLE_NS, &mut bench.rows);
    assert_eq!(bench.connections.len(), 0);
    assert_eq!(bench.told()[0].count, 2);
}

#[test]
fn another_process_that_answers_is_named() {
    let mut bench = Bench::new(2);
    bench.open(1, role::SERVER, true);
    bench.bytes(1, 1, INTO, 200, REQUEST);
    let owner = Owner {
        pid: 9,
        comm: *b"worker\0\0\0\0\0\0\0\0\0\0",
        cgroup: 0,
    };
    bench.take(1, 2, What::Owner(owner));
    bench.bytes(1, 3, OUT, 100, RESPONSE);
    let rows = bench.told();
    assert_eq!((rows[0].flow.pid, &*rows[0].flow.process_name), (9, "worker"));
}

/// HEADERS of stream 1 that end it.
fn headers(block: &[u8]) -> Vec<u8> {
    let len = u8::try_from(block.len()).unwrap();
    [&[0, 0, len, 1, 5, 0, 0, 0, 1][..], block].concat()
}

#[test]
fn frames_tell_which_end_asks_whatever_the_ports_are() {
    // GET /x, and 200.
    let (request, response) = (headers(&[0x82, 0x04, 0x02, b'/', b'x']), headers(&[0x88]));
    for (there, back, direction) in [
        (OUT, INTO, records::Direction::Outgoing),
        (INTO, OUT, records::Direction::Incoming),
    ] {
        let mut bench = Bench::new(10);
        bench.open(1, role::UNKNOWN, false);
        bench.bytes(1, 2, there, if there == OUT { 100 } else { 200 }, &request);
        bench.bytes(1, 3, back, if back == OUT { 100 } else { 200 }, &response);
        let told = bench.told();
        assert_eq!(told.len(), 1, "{told:?}");
        assert_eq!((&*told[0].path, told[0].status_code, told[0].count), ("/x", 200, 1));
        assert_eq!(told[0].flow.direction, direction);
    }
}
