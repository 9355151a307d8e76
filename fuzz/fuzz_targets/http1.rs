//! Pieces of an HTTP/1 connection, which may become another by upgrade.
#![no_main]

use ec_fuzz::{Input, drive_http, pieces, protocols::Start};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let start = if input.byte() & 1 == 0 {
        Start::Fresh
    } else {
        Start::Joined
    };
    drive_http(start, pieces(input));
});
