//! Pieces of a TCP stream of DNS messages, in both directions.
#![no_main]

use ec_fuzz::{
    Input,
    protocols::{
        Way,
        dns::{DnsOptions, DnsSession, Message, TcpSplitter},
    },
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let joined = input.byte() & 1 == 1;
    let mut splitters = [TcpSplitter::new(joined), TcpSplitter::new(joined)];
    let mut session = DnsSession::new(DnsOptions {
        max_pending: 4,
        ..DnsOptions::default()
    });
    while let Some(piece) = input.piece() {
        let splitter = match piece.way {
            Way::ToServer => &mut splitters[0],
            Way::ToClient => &mut splitters[1],
        };
        splitter.push(&piece, &mut |found| {
            assert!(found.bytes.len() as u64 <= found.true_len && found.true_len <= 65_535);
            if let Ok(message) = Message::parse(found.bytes, found.true_len) {
                let _ = (message.answers().count(), message.addresses().count());
                session.message((), found.last_ns, &message, &mut |_| ());
            }
        });
        assert!(session.pending() <= 4);
    }
});
