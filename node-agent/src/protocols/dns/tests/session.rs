//! Queries and answers at given times.

use hickory_proto::{op::ResponseCode, rr::RecordType};

use super::{answer, query};
use crate::protocols::dns::{DnsLosses, DnsOptions, DnsSession, Lookup, Message, RCODE_TIMEOUT, Seen};

const SECOND: u64 = 1_000_000_000;

struct Run {
    session: DnsSession<u32>,
    told: Vec<String>,
}

fn line(lookup: &Lookup<'_, u32>) -> String {
    format!(
        "{}/{} {} {} {} {:?} {}",
        lookup.ends, lookup.id, lookup.name, lookup.qtype, lookup.rcode, lookup.latency_ns, lookup.retries
    )
}

impl Run {
    fn new(max_pending: u32) -> Self {
        Self {
            session: DnsSession::new(DnsOptions {
                max_pending,
                ..DnsOptions::default()
            }),
            told: Vec::new(),
        }
    }

    fn bytes(&mut self, ends: u32, ts_ns: u64, bytes: &[u8]) -> Seen {
        let message = Message::parse(bytes, bytes.len() as u64).unwrap();
        let told = &mut self.told;
        self.session
            .message(ends, ts_ns, &message, &mut |lookup| told.push(line(lookup)))
    }

    fn ask(&mut self, ends: u32, ts_ns: u64, id: u16, host: &str) -> Seen {
        self.bytes(ends, ts_ns, &query(id, host, RecordType::A).to_vec().unwrap())
    }

    fn answer(&mut self, ends: u32, ts_ns: u64, id: u16, host: &str, code: ResponseCode) -> Seen {
        let message = answer(&query(id, host, RecordType::A), code, Vec::new());
        self.bytes(ends, ts_ns, &message.to_vec().unwrap())
    }

    fn expire(&mut self, now_ns: u64) -> Vec<String> {
        let told = &mut self.told;
        self.session.expire(now_ns, &mut |lookup| told.push(line(lookup)));
        std::mem::take(told)
    }
}

#[test]
fn answers_find_their_queries() {
    let mut run = Run::new(100);
    assert_eq!(run.ask(1, 10, 7, "A.example."), Seen::Query);
    // The same id: of another client, and of this one for another name and another type.
    assert_eq!(run.ask(2, 11, 7, "a.example."), Seen::Query);
    assert_eq!(run.ask(1, 12, 7, "b.example."), Seen::Query);
    let aaaa = query(7, "a.example.", RecordType::AAAA);
    assert_eq!(run.bytes(1, 13, &aaaa.to_vec().unwrap()), Seen::Query);
    assert_eq!(run.session.pending(), 4);
    assert_eq!(run.answer(1, 20, 7, "b.example.", ResponseCode::NXDomain), Seen::Answer);
    assert_eq!(run.answer(1, 21, 7, "a.EXAMPLE.", ResponseCode::NoError), Seen::Answer);
    assert_eq!(run.answer(2, 22, 7, "a.example.", ResponseCode::ServFail), Seen::Answer);
    assert_eq!(
        run.bytes(
            1,
            23,
            &answer(&aaaa, ResponseCode::NoError, Vec::new()).to_vec().unwrap()
        ),
        Seen::Answer
    );
    assert_eq!(
        run.answer(1, 24, 7, "a.example.", ResponseCode::NoError),
        Seen::Unmatched,
        "a second time"
    );
    assert_eq!(
        run.answer(1, 25, 8, "a.example.", ResponseCode::NoError),
        Seen::Unmatched,
        "another id"
    );
    assert_eq!(
        run.told,
        [
            "1/7 b.example 1 3 Some(8) 0",
            "1/7 a.example 1 0 Some(11) 0",
            "2/7 a.example 1 2 Some(11) 0",
            "1/7 a.example 28 0 Some(10) 0",
        ]
    );
    assert_eq!(run.session.pending(), 0);
    assert_eq!(
        run.session.take_losses(),
        DnsLosses {
            unmatched: 2,
            evicted: 0
        }
    );
}

#[test]
fn an_answer_without_question_belongs_to_the_only_query() {
    let bare = [0, 7, 0x81, 0x01, 0, 0, 0, 0, 0, 0, 0, 0];
    let mut run = Run::new(100);
    run.ask(1, 10, 7, "a.example.");
    assert_eq!(run.bytes(1, 15, &bare), Seen::Answer);
    assert_eq!(run.told, ["1/7 a.example 1 1 Some(5) 0"]);
    run.ask(1, 20, 7, "a.example.");
    run.ask(1, 21, 7, "b.example.");
    assert_eq!(run.bytes(1, 22, &bare), Seen::Unmatched);
}

#[test]
fn no_answer_is_a_time_out() {
    let mut run = Run::new(100);
    run.ask(1, SECOND, 1, "a.example.");
    run.ask(1, 2 * SECOND, 2, "b.example.");
    run.ask(1, 3 * SECOND, 3, "c.example.");
    // Sent again: it waits for as long again, and its latency is from the first.
    assert_eq!(run.ask(1, 4 * SECOND, 1, "a.example."), Seen::Retry);
    assert!(run.expire(8 * SECOND - 1).is_empty());
    assert_eq!(
        run.expire(8 * SECOND),
        [format!("1/2 b.example 1 {RCODE_TIMEOUT} None 0")]
    );
    run.answer(1, 9 * SECOND - 1, 1, "a.example.", ResponseCode::NoError);
    assert_eq!(
        run.expire(9 * SECOND),
        ["1/1 a.example 1 0 Some(7999999999) 1", "1/3 c.example 1 -1 None 0"]
    );
    assert_eq!(
        run.answer(1, 9 * SECOND, 2, "b.example.", ResponseCode::NoError),
        Seen::Unmatched,
        "too late"
    );
}

#[test]
fn there_is_room_for_so_many() {
    let mut run = Run::new(3);
    for id in 0..10 {
        run.ask(1, u64::from(id), id, "a.example.");
    }
    assert_eq!(run.session.pending(), 3);
    assert_eq!(run.session.take_losses().evicted, 7);
    assert_eq!(
        run.answer(1, 20, 6, "a.example.", ResponseCode::NoError),
        Seen::Unmatched
    );
    assert_eq!(run.answer(1, 20, 7, "a.example.", ResponseCode::NoError), Seen::Answer);
    // One id, many names.
    let mut run = Run::new(1000);
    for number in 0..100 {
        run.ask(1, number, 5, &format!("n{number}.example."));
    }
    assert_eq!(run.session.pending(), 8);
    assert_eq!(run.session.take_losses().evicted, 92);
    assert_eq!(
        run.answer(1, 200, 5, "n99.example.", ResponseCode::NoError),
        Seen::Answer
    );
}
