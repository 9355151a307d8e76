//! Datagrams: each is a query or an answer of one of four pairs of ends.
#![no_main]

use ec_fuzz::{
    Input,
    protocols::dns::{DnsOptions, DnsSession, Message},
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let mut session = DnsSession::new(DnsOptions {
        max_pending: 4,
        ..DnsOptions::default()
    });
    let mut text = String::new();
    let mut now_ns = 0_u64;
    while let Some(piece) = input.piece() {
        now_ns += 1_000_000_000;
        if let Ok(message) = Message::parse(piece.captured, piece.true_len) {
            for record in message.answers() {
                record.name.write_to(&mut text);
                assert!(text.len() <= 4 * 255);
            }
            assert!(message.addresses().count() <= message.answers().count());
            session.message(message.id & 3, now_ns, &message, &mut |lookup| {
                assert!(lookup.latency_ns.is_some() && lookup.rcode >= 0);
            });
        }
        assert!(session.pending() <= 4);
        session.expire(now_ns, &mut |lookup| assert!(lookup.rcode == -1));
    }
    session.expire(u64::MAX, &mut |_| ());
    assert_eq!(session.pending(), 0);
});
