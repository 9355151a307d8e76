//! Messages made by `hickory-proto`, which is the oracle: what it says of a message is true.

mod domains;
mod properties;
mod segments;
mod session;

use std::str::FromStr as _;

use hickory_proto::{
    op::{Edns, Message as Theirs, MessageType, OpCode, Query, ResponseCode},
    rr::{
        Name as TheirName, RData, Record as TheirRecord, RecordType,
        rdata::{A, AAAA, CNAME, TXT},
    },
};

use super::{Address, Data, DnsError, Message, TcpMessage, TcpSplitter};
use crate::protocols::{Piece, Way};

pub(super) fn name(text: &str) -> TheirName {
    TheirName::from_str(text).unwrap()
}

pub(super) fn query(id: u16, host: &str, kind: RecordType) -> Theirs {
    let mut message = Theirs::new(id, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(name(host), kind));
    message
}

pub(super) fn answer(to: &Theirs, code: ResponseCode, answers: Vec<TheirRecord>) -> Theirs {
    let mut message = to.clone();
    message.metadata.message_type = MessageType::Response;
    message.metadata.response_code = code;
    message.add_answers(answers);
    message
}

fn record(host: &str, ttl: u32, data: RData) -> TheirRecord {
    TheirRecord::from_rdata(name(host), ttl, data)
}

fn text(name: super::Name<'_>) -> String {
    let mut text = String::new();
    name.write_to(&mut text);
    text
}

#[test]
fn a_query() {
    let bytes = query(7, "WWW.Example.org.", RecordType::AAAA).to_vec().unwrap();
    let message = Message::parse(&bytes, bytes.len() as u64).unwrap();
    assert!(!message.is_response && message.complete);
    assert_eq!((message.id, message.opcode, message.rcode), (7, 0, 0));
    let question = message.question.unwrap();
    assert_eq!(
        (text(question.name).as_str(), question.qtype, question.class),
        ("www.example.org", 28, 1)
    );
}

#[test]
fn addresses_through_aliases_in_any_order() {
    let asked = query(1, "www.example.org.", RecordType::A);
    let records = [
        record("www.example.org.", 300, RData::CNAME(CNAME(name("Edge.cdn.example.")))),
        record("edge.CDN.example.", 20, RData::CNAME(CNAME(name("node7.cdn.example.")))),
        record("node7.cdn.example.", 60, RData::A(A::new(192, 0, 2, 7))),
        record("node7.cdn.example.", 10, RData::A(A::new(192, 0, 2, 8))),
        record("other.example.", 60, RData::A(A::new(192, 0, 2, 99))),
        record("node7.cdn.example.", 60, RData::TXT(TXT::new(vec!["x".into()]))),
    ];
    let address = |ip: &str, ttl_s| Address {
        ip: ip.parse().unwrap(),
        ttl_s,
    };
    let expected = vec![address("192.0.2.7", 20), address("192.0.2.8", 10)];
    for order in [[0, 1, 2, 3, 4, 5], [2, 3, 1, 0, 5, 4], [5, 4, 2, 1, 3, 0]] {
        let records = order.iter().map(|at: &usize| records[*at].clone()).collect();
        let bytes = answer(&asked, ResponseCode::NoError, records).to_vec().unwrap();
        let message = Message::parse(&bytes, bytes.len() as u64).unwrap();
        assert!(message.is_response && message.complete);
        assert_eq!(message.addresses().collect::<Vec<_>>(), expected);
        assert_eq!(message.answers().count(), 6);
    }
    let aaaa = record(
        "www.example.org.",
        5,
        RData::AAAA(AAAA::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
    );
    let bytes = answer(&asked, ResponseCode::NoError, vec![aaaa]).to_vec().unwrap();
    let message = Message::parse(&bytes, bytes.len() as u64).unwrap();
    assert_eq!(message.addresses().collect::<Vec<_>>(), [address("2001:db8::1", 5)]);
}

#[test]
fn aliases_in_a_circle_have_no_address() {
    let asked = query(1, "a.example.", RecordType::A);
    let records = vec![
        record("a.example.", 1, RData::CNAME(CNAME(name("b.example.")))),
        record("b.example.", 1, RData::CNAME(CNAME(name("a.example.")))),
        record("c.example.", 1, RData::A(A::new(192, 0, 2, 1))),
    ];
    let bytes = answer(&asked, ResponseCode::NoError, records).to_vec().unwrap();
    assert_eq!(
        Message::parse(&bytes, bytes.len() as u64).unwrap().addresses().count(),
        0
    );
}

#[test]
fn response_codes_with_those_of_edns() {
    for (code, number) in [
        (ResponseCode::NoError, 0),
        (ResponseCode::NXDomain, 3),
        (ResponseCode::Refused, 5),
        (ResponseCode::BADVERS, 16),
        (ResponseCode::BADCOOKIE, 23),
    ] {
        let mut message = answer(&query(1, "a.example.", RecordType::A), code, Vec::new());
        let mut edns = Edns::new();
        edns.set_rcode_high(code.high());
        message.set_edns(edns);
        let bytes = message.to_vec().unwrap();
        let ours = Message::parse(&bytes, bytes.len() as u64).unwrap();
        assert_eq!((ours.rcode, ours.complete), (number, true), "{code:?}");
        // Without its end, what is left of the code is said to be incomplete.
        let ours = Message::parse(&bytes[..bytes.len() - 3], bytes.len() as u64).unwrap();
        assert_eq!((ours.rcode, ours.complete), (number & 0xf, false), "{code:?}");
    }
}

/// A header with one question, then these bytes.
fn raw(rest: &[u8]) -> Vec<u8> {
    [&[0, 1, 0x01, 0, 0, 1, 0, 0, 0, 0, 0, 0][..], rest].concat()
}

#[test]
fn names_that_are_no_names() {
    let parse = |rest: &[u8]| Message::parse(&raw(rest), 12 + rest.len() as u64).map(|_| ());
    let forwards = Err(DnsError::Malformed("a name that refers forwards"));
    assert_eq!(parse(b"\xc0\x0c\x00\x01\x00\x01"), forwards, "itself");
    assert_eq!(
        parse(b"\x01a\xc0\x0e\x00\x01\x00\x01"),
        forwards,
        "itself after a label"
    );
    assert_eq!(parse(b"\xc0\x20\x00\x01\x00\x01"), forwards);
    // Back to a label that leads here again.
    assert!(parse(b"\x01a\xc0\x0c\x00\x01\x00\x01").is_err());
    assert_eq!(
        parse(b"\x40\x00\x00\x01\x00\x01"),
        Err(DnsError::Malformed("a label of an unknown kind"))
    );
    assert_eq!(parse(b"\x05abc"), Err(DnsError::Cut));
    let label = [&[63_u8][..], &[b'a'; 63]].concat();
    let long = [&label[..], &label, &label, &[61], &[b'a'; 61], &[0, 0, 1, 0, 1]].concat();
    assert_eq!(parse(&long), Ok(()));
    let too_long = [&label[..], &label, &label, &[62], &[b'a'; 62], &[0, 0, 1, 0, 1]].concat();
    assert_eq!(
        parse(&too_long),
        Err(DnsError::Malformed("a name of more than 255 bytes"))
    );
}

#[test]
fn names_are_written_without_ambiguity() {
    let bytes = raw(b"\x03A.b\x04\\\x00\xff-\x00\x00\x01\x00\x01");
    let message = Message::parse(&bytes, bytes.len() as u64).unwrap();
    assert_eq!(text(message.question.unwrap().name), "a\\046b.\\092\\000\\255-");
    let bytes = raw(b"\x00\x00\x02\x00\x01");
    let message = Message::parse(&bytes, bytes.len() as u64).unwrap();
    assert_eq!(text(message.question.unwrap().name), ".");
}

#[test]
fn a_message_cut_anywhere_says_what_is_left() {
    let asked = query(9, "www.example.org.", RecordType::A);
    let records = (0..20)
        .map(|n| record("www.example.org.", 5, RData::A(A::new(192, 0, 2, n))))
        .collect();
    let bytes = answer(&asked, ResponseCode::NoError, records).to_vec().unwrap();
    let question = asked.to_vec().unwrap().len();
    let each = (bytes.len() - question) / 20;
    for len in 0..bytes.len() {
        let message = Message::parse(&bytes[..len], bytes.len() as u64);
        if len < question {
            assert_eq!(message.unwrap_err(), DnsError::Cut, "{len}");
        } else {
            let message = message.unwrap();
            assert!(!message.complete);
            assert_eq!(message.addresses().count(), (len - question) / each, "{len}");
        }
    }
}

#[test]
fn other_records_are_named_by_their_type() {
    let asked = query(1, "a.example.", RecordType::TXT);
    let txt = record("a.example.", 1 << 31, RData::TXT(TXT::new(vec!["x".into()])));
    let bytes = answer(&asked, ResponseCode::NoError, vec![txt]).to_vec().unwrap();
    let message = Message::parse(&bytes, bytes.len() as u64).unwrap();
    let record = message.answers().next().unwrap();
    assert!(matches!(record.data, Data::Other(16)));
    assert_eq!(record.ttl_s, 0, "the upper half counts as zero");
}

/// A message found in a stream: captured bytes, length, times of first and last byte.
type Found = (Vec<u8>, u64, u64, u64);

/// Messages found in a stream given in pieces: captured and further bytes, at times 1, 2, ...
fn split(joined: bool, pieces: &[(&[u8], u64)]) -> (Vec<Found>, u64) {
    let mut splitter = TcpSplitter::new(joined);
    let mut found = Vec::new();
    for (number, (captured, unseen)) in pieces.iter().enumerate() {
        let piece = Piece {
            way: Way::ToServer,
            ts_ns: number as u64 + 1,
            captured,
            true_len: captured.len() as u64 + unseen,
        };
        splitter.push(&piece, &mut |message: TcpMessage<'_>| {
            found.push((
                message.bytes.to_vec(),
                message.true_len,
                message.first_ns,
                message.last_ns,
            ));
        });
    }
    (found, splitter.take_resyncs())
}

#[test]
fn streams() {
    let message = |id: u16, host: &str| query(id, host, RecordType::A).to_vec().unwrap();
    let framed = |message: &[u8]| [&(message.len() as u16).to_be_bytes()[..], message].concat();
    let (a, b, c) = (message(1, "a.example."), message(2, "b.example.org."), message(3, "c."));
    let stream = [framed(&a), framed(&b), framed(&c)].concat();
    let expected: Vec<_> = [&a, &b, &c]
        .map(|message| (message.clone(), message.len() as u64))
        .to_vec();
    let without_times = |found: &[Found]| -> Vec<(Vec<u8>, u64)> {
        found.iter().map(|(bytes, len, ..)| (bytes.clone(), *len)).collect()
    };
    // All at once, cut once anywhere, and byte by byte.
    for at in 0..=stream.len() {
        let (found, resyncs) = split(false, &[(&stream[..at], 0), (&stream[at..], 0)]);
        assert_eq!((without_times(&found), resyncs), (expected.clone(), 0), "{at}");
    }
    let bytes: Vec<(&[u8], u64)> = stream.chunks(1).map(|byte| (byte, 0)).collect();
    let (found, _) = split(false, &bytes);
    assert_eq!(without_times(&found), expected);
    let end = 2 + a.len() as u64;
    assert_eq!(
        (found[0].2, found[0].3, found[1].2),
        (1, end, end + 1),
        "times of first and last byte"
    );

    // Not seen to its end, but the end is known.
    let cut = &stream[..20];
    let (found, resyncs) = split(false, &[(cut, (2 + a.len() - 20) as u64), (&framed(&b), 0)]);
    assert_eq!(
        (without_times(&found), resyncs),
        (vec![(a[..18].to_vec(), a.len() as u64), (b.clone(), b.len() as u64)], 0)
    );
    // The end of one and the beginning of the next were not seen: the third is found.
    let (found, resyncs) = split(
        false,
        &[(cut, (2 + a.len() - 20) as u64 + 1), (&b, 0), (&framed(&c), 0)],
    );
    assert_eq!(
        (without_times(&found), resyncs),
        (vec![(a[..18].to_vec(), a.len() as u64), (c.clone(), c.len() as u64)], 1)
    );
    // Joined in the middle of one.
    let (found, _) = split(true, &[(&a[3..], 0), (&framed(&c), 0)]);
    assert_eq!(without_times(&found), [(c.clone(), c.len() as u64)]);
    // A length that no message has.
    let (found, resyncs) = split(false, &[(b"\x00\x03abc", 0), (&framed(&c), 0)]);
    assert_eq!((found.len(), resyncs), (1, 1));
}
