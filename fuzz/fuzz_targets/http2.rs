//! Pieces of an HTTP/2 connection, from its start or joined.
#![no_main]

use ec_fuzz::{
    Input, drive_http, pieces,
    protocols::{Start, Way, classify::PREFACE},
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let joined = input.byte() & 1 == 1;
    let start = if joined { Start::Joined } else { Start::Fresh };
    // A frame that says that a joined connection speaks HTTP/2.
    let ping = b"\x00\x00\x08\x06\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00".as_slice();
    let hello = if joined { ping } else { PREFACE.as_slice() };
    let hello = (Way::ToServer, hello.to_vec(), hello.len() as u64);
    drive_http(start, std::iter::once(hello).chain(pieces(input)));
});
