//! Programs of the blacklist language.
#![no_main]

use ec_fuzz::blacklist::{Blacklist, Packet};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let compiled = match Blacklist::compile(text) {
        Ok(compiled) => compiled,
        Err(error) => {
            // The place is one that the text has.
            let line = text.split('\n').nth(error.line - 1);
            assert!(line.is_some_and(|line| error.column <= line.chars().count() + 1), "{error}");
            return;
        }
    };
    assert!(compiled.rules().len() <= ec_fuzz::blacklist::MAX_RULES);
    // The opposite takes other ways through the compiler, and must say the opposite.
    let single = !text.contains(['\n', ';', '#']) && !text.trim().is_empty();
    let opposite = single.then(|| Blacklist::compile(&format!("!({text})")).ok()).flatten();
    for (src, dst, tcp) in [("10.0.0.1", "1.1.1.1", true), ("fd00::1", "::1", false), ("127.0.0.1", "0.0.0.0", false)] {
        for (src_port, dst_port, pod) in [(0, 65_535, ""), (80, 443, "web-0"), (53, 53, "a")] {
            let packet = Packet {
                src: src.parse().unwrap(),
                dst: dst.parse().unwrap(),
                src_port,
                dst_port,
                tcp,
                udp: !tcp && src_port == 53,
            };
            let told = |it: &Blacklist| it.packet_matches(&packet) || it.flow_matches(&packet, pod, "web");
            if let Some(opposite) = &opposite {
                assert_ne!(told(&compiled), told(opposite), "{text:?} {packet:?}");
            }
        }
    }
});
