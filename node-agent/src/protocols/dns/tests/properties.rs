//! What hickory says of a message, this says; whatever comes, nothing breaks.

use hickory_proto::{
    op::{Edns, Message as Theirs, MessageType, ResponseCode},
    rr::{
        Name as TheirName, RData, Record as TheirRecord, RecordType,
        rdata::{A, AAAA, CNAME},
    },
};
use proptest::prelude::*;

use super::{answer, query, text};
use crate::protocols::{
    Piece, Way,
    dns::{Data, DnsOptions, DnsSession, Message, TcpSplitter},
};

fn host() -> impl Strategy<Value = String> {
    prop::collection::vec("[a-zA-Z0-9_]{1,12}(-[a-zA-Z0-9]{1,6})?", 1..5).prop_map(|labels| labels.join(".") + ".")
}

fn records() -> impl Strategy<Value = Vec<TheirRecord>> {
    let data = prop_oneof![
        any::<[u8; 4]>().prop_map(|ip| RData::A(A(ip.into()))),
        any::<[u8; 16]>().prop_map(|ip| RData::AAAA(AAAA(ip.into()))),
        host().prop_map(|host| RData::CNAME(CNAME(super::name(&host)))),
    ];
    prop::collection::vec(
        (host(), 0..i32::MAX as u32, data)
            .prop_map(|(host, ttl, data)| TheirRecord::from_rdata(super::name(&host), ttl, data)),
        0..12,
    )
}

fn message() -> impl Strategy<Value = Theirs> {
    (any::<u16>(), host(), any::<bool>(), 0..24_u16, records(), any::<bool>()).prop_map(
        |(id, host, is_response, code, records, edns)| {
            let asked = query(id, &host, if code % 2 == 0 { RecordType::A } else { RecordType::AAAA });
            if !is_response {
                return asked;
            }
            let code = ResponseCode::from(if edns { (code >> 4) as u8 } else { 0 }, (code & 0xf) as u8);
            let mut message = answer(&asked, code, records);
            if edns {
                let mut options = Edns::new();
                options.set_rcode_high(code.high());
                message.set_edns(options);
            }
            message
        },
    )
}

/// Their name as ours is written.
fn theirs(name: &TheirName) -> String {
    name.to_lowercase().to_ascii().trim_end_matches('.').to_owned()
}

proptest! {
    #[test]
    fn agrees_with_hickory(message in message()) {
        let bytes = message.to_vec().unwrap();
        // What was written is read back by them: the oracle is the reader.
        let expected = Theirs::from_vec(&bytes).unwrap();
        let ours = Message::parse(&bytes, bytes.len() as u64).unwrap();
        prop_assert!(ours.complete);
        prop_assert_eq!(ours.id, expected.metadata.id);
        prop_assert_eq!(ours.is_response, expected.metadata.message_type == MessageType::Response);
        prop_assert_eq!(ours.rcode, u16::from(expected.metadata.response_code));
        let question = ours.question.unwrap();
        prop_assert_eq!(text(question.name), theirs(expected.queries[0].name()));
        prop_assert_eq!(question.qtype, u16::from(expected.queries[0].query_type()));
        let answers: Vec<_> = ours.answers().collect();
        prop_assert_eq!(answers.len(), expected.answers.len());
        for (ours, expected) in answers.iter().zip(&expected.answers) {
            prop_assert_eq!(text(ours.name), theirs(&expected.name));
            prop_assert_eq!(ours.ttl_s, expected.ttl);
            match (&ours.data, &expected.data) {
                (Data::Address(ip), data) => prop_assert_eq!(Some(*ip), data.ip_addr()),
                (Data::Alias(alias), RData::CNAME(expected)) => prop_assert_eq!(text(*alias), theirs(expected)),
                (data, expected) => prop_assert!(false, "{data:?} for {expected:?}"),
            }
        }
    }

    /// Whatever comes, alone or in streams: nothing breaks, and reading it all ends.
    #[test]
    fn any_bytes(
        mut bytes in prop_oneof![
            message().prop_map(|message| message.to_vec().unwrap()),
            prop::collection::vec(any::<u8>(), 0..300),
        ],
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        true_len in prop_oneof![0..600_u64, any::<u64>()],
        cuts in prop::collection::vec((0..80_usize, prop_oneof![9 => Just(0_u64), 1 => 0..70_000_u64]), 0..20),
    ) {
        for (at, byte) in changes {
            if !bytes.is_empty() {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
        }
        let mut session = DnsSession::new(DnsOptions { max_pending: 2, ..DnsOptions::default() });
        let mut look = |bytes: &[u8], true_len: u64, ts_ns: u64| {
            if let Ok(message) = Message::parse(bytes, true_len) {
                let _ = (message.answers().count(), message.addresses().count());
                session.message(0_u8, ts_ns, &message, &mut |_| ());
                assert!(session.pending() <= 2);
            }
        };
        look(&bytes, true_len, 1);
        look(&bytes, bytes.len() as u64, 2);
        let mut splitter = TcpSplitter::new(bytes.len() % 2 == 0);
        let mut rest = bytes.as_slice();
        for (len, unseen) in cuts {
            let (captured, after) = rest.split_at(len.min(rest.len()));
            rest = after;
            let piece = Piece { way: Way::ToServer, ts_ns: 3, captured, true_len: captured.len() as u64 + unseen };
            splitter.push(&piece, &mut |message| look(message.bytes, message.true_len, message.last_ns));
        }
        session.expire(u64::MAX, &mut |_| ());
        prop_assert_eq!(session.pending(), 0);
    }
}
