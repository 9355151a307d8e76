//! Header blocks, each as one HEADERS frame of its own stream, so that nothing but header compression is between the input
//! and what is told.
#![no_main]

use ec_fuzz::{
    Input, drive_http,
    protocols::{Start, Way, classify::PREFACE},
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let mut stream = 1_u32;
    let hello = (Way::ToServer, PREFACE.to_vec(), PREFACE.len() as u64);
    let blocks = std::iter::from_fn(|| {
        let piece = input.piece()?;
        let len = u32::try_from(piece.captured.len()).ok()?;
        let mut frame = len.to_be_bytes()[1..].to_vec();
        // HEADERS with END_HEADERS and END_STREAM.
        frame.extend([1, 5]);
        frame.extend(stream.to_be_bytes());
        frame.extend(piece.captured);
        // A request, then its response.
        let way = if stream % 4 == 1 { Way::ToServer } else { Way::ToClient };
        if piece.way == Way::ToClient {
            stream = stream.wrapping_add(2) & 0x7fff_ffff;
        }
        let len = frame.len() as u64;
        Some((way, frame, len))
    });
    drive_http(Start::Fresh, std::iter::once(hello).chain(blocks));
});
