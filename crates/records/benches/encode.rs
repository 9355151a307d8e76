//! Encoding speed on one core: points/s, ns and bytes per point, allocations per record.
//!
//! `cargo bench -p ec-records --bench encode`. Prints the best of several rounds, so that other load on the machine
//! disturbs least; asserts nothing.
#![allow(clippy::expect_used, clippy::indexing_slicing, missing_docs)]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    hint::black_box,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use ec_records::{
    Direction, Endpoint, Family, Globals, K8sEndpoint, Netflow, Port, Transport,
    encode::{BodyBuilder, DEFAULT_BODY_LIMIT, EncodeOptions, Format, PointEncoder},
};

/// Counts every allocation and re-allocation.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call is handed to the system allocator unchanged; counting touches no memory it manages.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises are those of `System`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: `ptr` came from `System` with this layout.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: `ptr` came from `System` with this layout.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Rows per round: enough for several bodies of 1 MiB.
const ROWS: u32 = 20_000;
const ROUNDS: u32 = 25;

fn rows(k8s: bool, v6: bool) -> Vec<Netflow> {
    let names = |side: &str| {
        k8s.then(|| {
            Arc::new(K8sEndpoint {
                namespace: "payments".into(),
                pod: format!("{side}-7d4b9c6f5d-x2x9q").as_str().into(),
                service: side.into(),
                workload: side.into(),
                workload_type: "deployment".into(),
                labels: Arc::default(),
            })
        })
    };
    (0..ROWS)
        .map(|n| {
            let ip = |net: u32| -> IpAddr {
                if v6 {
                    Ipv6Addr::from(0xfd00_0000_0000_0001_0000_0000_0000_0000 | u128::from(net + n)).into()
                } else {
                    Ipv4Addr::from(net + n).into()
                }
            };
            let udp = n % 4 == 3;
            Netflow {
                time_unix_ns: 1_790_000_000_000_000_000,
                local: Endpoint {
                    ip: ip(0x0a00_0000),
                    port: Port::Any,
                },
                remote: Endpoint {
                    ip: ip(0xc0a8_0000),
                    port: Port::Number(443),
                },
                transport: if udp { Transport::Udp } else { Transport::Tcp },
                family: if v6 { Family::V6 } else { Family::V4 },
                direction: if n % 2 == 0 {
                    Direction::Incoming
                } else {
                    Direction::Outgoing
                },
                netns: 4_026_531_840,
                pid: 1000 + n,
                process_name: "payment-service".into(),
                dst_nat: None,
                dst_domain: "api.example.com".into(),
                local_k8s: names("checkout"),
                remote_k8s: names("ledger"),
                bytes_read: u64::from(n) * 1000,
                bytes_written: u64::from(n) * 10,
                retransmits: u64::from(n % 3),
                rtt_us: 250,
                rtt_var_us: 60,
                tcp_closed: 1,
                tcp_established: 1,
                datagrams_read: 5,
                datagrams_written: 5,
            }
        })
        .collect()
}

/// Encodes all rows into bodies; returns points and bytes.
fn round(encoder: &PointEncoder, rows: &[Netflow]) -> (u64, u64) {
    let mut builder = BodyBuilder::new(encoder.format(), DEFAULT_BODY_LIMIT);
    let (mut points, mut bytes) = (0, 0);
    let mut take = |body: ec_records::encode::Body| {
        points += u64::from(body.points);
        bytes += body.bytes.len() as u64;
        black_box(body);
    };
    for row in rows {
        if let Some(body) = builder.push(encoder, black_box(row)).expect("fits") {
            take(body);
        }
    }
    builder.finish().into_iter().for_each(take);
    (points, bytes)
}

fn main() {
    let globals = Globals {
        tags: [
            ("host", "node-17.example"),
            ("cluster", "prod-eu-1"),
            ("env", "prod"),
            ("zone", "eu-central-1a"),
        ]
        .map(|(key, value)| (key.into(), value.into()))
        .to_vec(),
    };
    println!(
        "{:<36} {:>12} {:>10} {:>12} {:>14}",
        "rows", "points/s", "ns/point", "bytes/point", "allocs/record"
    );
    for (format, name) in [
        (Format::Protobuf, "protobuf"),
        (Format::LineProtocol, "line protocol"),
        (Format::Json, "json"),
    ] {
        for (k8s, v6, compat_keys, kind) in [
            (false, false, false, "IPv4"),
            (false, true, false, "IPv6"),
            (true, false, false, "IPv4, both ends K8s"),
            (true, false, true, "IPv4, K8s, compat"),
        ] {
            let rows = rows(k8s, v6);
            let encoder = PointEncoder::new(format, &globals, EncodeOptions { compat_keys });
            round(&encoder, &rows);
            let mut best = Duration::MAX;
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            let (mut points, mut bytes) = (0, 0);
            for _ in 0..ROUNDS {
                let start = Instant::now();
                (points, bytes) = round(&encoder, &rows);
                best = best.min(start.elapsed());
            }
            let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
            let seconds = best.as_secs_f64();
            let count = points as f64;
            println!(
                "{:<36} {:>12.0} {:>10.0} {:>12.0} {:>14.4}",
                format!("{name}, {kind}"),
                count / seconds,
                seconds * 1e9 / count,
                bytes as f64 / count,
                allocations as f64 / (count * f64::from(ROUNDS)),
            );
        }
    }
}
