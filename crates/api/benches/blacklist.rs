//! What a blacklist costs per packet, on one core.
//!
//! `cargo bench -p ec-api`. Prints; asserts nothing.
#![allow(clippy::expect_used, missing_docs)]

use std::{hint::black_box, net::IpAddr, time::Instant};

use ec_api::blacklist::{Blacklist, Packet};

const PROGRAM: &str = "udp && dst_port == 53
ip_saddr == '1.1.1.1' && (src_port == 80 || dst_port == 80)
ipnet_contains('127.0.0.0/8', ip_saddr)
ip6_saddr == 'fd00::9'
dst_port >= 30000 && dst_port <= 32767 && tcp
ip_daddr != '10.0.0.1' && ipnet_contains('10.0.0.0/24', ip_daddr) && src_port == 1
ipnet_contains('fd01::/16', ip6_daddr)
src_port == 9100
dst_port == 9100";
const ROUNDS: u32 = 2_000_000;

fn packet(src: impl Into<IpAddr>, dst: impl Into<IpAddr>) -> Packet {
    Packet {
        src: src.into(),
        dst: dst.into(),
        src_port: 50_000,
        dst_port: 443,
        tcp: true,
        udp: false,
    }
}

fn main() {
    let compiled = Blacklist::compile(PROGRAM).expect("a right program");
    let packets = [
        packet([10, 9, 0, 1], [10, 9, 0, 2]),
        packet([0xfd00, 0, 0, 0, 0, 0, 0, 1], [0xfd00, 0, 0, 0, 0, 0, 0, 2]),
    ];
    let started = Instant::now();
    let mut dropped = 0_u64;
    for _ in 0..ROUNDS {
        for packet in &packets {
            dropped += u64::from(compiled.packet_matches(black_box(packet)));
        }
    }
    let ns = started.elapsed().as_secs_f64() * 1e9 / (f64::from(ROUNDS) * 2.0);
    println!(
        "{} rules: {ns:.1} ns per packet, {dropped} left out",
        compiled.rules().len()
    );
}
