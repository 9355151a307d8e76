//! Speed of flow logs as JSON on one core: flows/s, bytes per flow, allocations per flow.
//!
//! `cargo bench -p ec-records --bench flowlog`. Prints the best of several rounds; asserts nothing.
#![allow(clippy::expect_used, missing_docs)]

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
    FlowLog,
    flowlog::{
        FieldSet, FlowDirection, FlowDns, FlowDnsAnswer, FlowDrops, FlowFormat, FlowInterface, FlowJson, FlowL4,
        FlowLayer, FlowPeer, TCP,
    },
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

const FLOWS: u32 = 20_000;
const ROUNDS: u32 = 15;

fn flows(v6: bool, features: bool) -> Vec<FlowLog> {
    let peer = |side: &str| {
        Some(Arc::new(FlowPeer {
            kind: "Pod".into(),
            name: format!("{side}-7d4b9c6f5d-x2x9q").into(),
            namespace: "payments".into(),
            owner_name: side.into(),
            owner_kind: "Deployment".into(),
            host_ip: Some(Ipv4Addr::new(192, 168, 10, 21).into()),
            host_name: "node-21.example.internal".into(),
            zone: "zone-a".into(),
            network: "primary".into(),
        }))
    };
    let (src_k8s, dst_k8s) = (peer("frontend"), peer("ledger"));
    let seen = |name: &str, direction| FlowInterface {
        name: name.into(),
        direction,
    };
    let interfaces: Arc<[FlowInterface]> = [seen("veth0a1b2c3", 0), seen("eth0", 1)].into();
    (0..FLOWS)
        .map(|n| {
            let ip = |host: u32| -> IpAddr {
                if v6 {
                    Ipv6Addr::from_bits(0xfd00_0001 << 96 | u128::from(host)).into()
                } else {
                    Ipv4Addr::from_bits(0x0af4_0000 | host).into()
                }
            };
            let ports = FlowL4::Ports {
                src: 32_768 + (n % 28_000) as u16,
                dst: 8443,
            };
            let mut flow = FlowLog::new(ip(n & 0xffff), ip((n * 7) & 0xffff), TCP, ports);
            flow.start_unix_ms = 1_790_000_000_000 + i64::from(n);
            flow.end_unix_ms = flow.start_unix_ms + 4_900;
            flow.etype = 2048;
            flow.macs = Some([[0x0a, 0x58, 0x0a, 0xf4, 1, 7]; 2]);
            flow.dscp = Some(0);
            flow.flags = Some(0x118);
            flow.bytes = 1_234 + u64::from(n);
            flow.packets = 6;
            flow.sampling = 50;
            flow.interfaces = interfaces.clone();
            flow.direction = Some(FlowDirection::Egress);
            flow.agent_ip = Some(Ipv4Addr::new(192, 168, 10, 21).into());
            flow.src_k8s = src_k8s.clone();
            flow.dst_k8s = dst_k8s.clone();
            flow.layer = Some(FlowLayer::App);
            flow.cluster = "prod-1".into();
            flow.rtt_ns = 350_000;
            if features {
                flow.dns = Some(FlowDns {
                    answer: Some(FlowDnsAnswer {
                        id: n as u16,
                        flags: 0x8180,
                        latency_ms: 3,
                    }),
                    errno: 0,
                    name: "api.payments.svc.cluster.local".into(),
                });
                flow.drops = Some(FlowDrops {
                    bytes: 60,
                    packets: 1,
                    flags: 0x10,
                    state: "TCP_ESTABLISHED".into(),
                    cause: "SKB_DROP_REASON_TCP_OLD_DATA".into(),
                });
            }
            flow
        })
        .collect()
}

fn main() {
    for (name, v6, features) in [
        ("IPv4", false, false),
        ("IPv6", true, false),
        ("IPv4, DNS and drops", false, true),
    ] {
        let flows = flows(v6, features);
        let json = FlowJson::new(FlowFormat::Current, FieldSet::NONE);
        let mut out = Vec::with_capacity(flows.len() * 2048);
        let (mut best, mut allocations) = (Duration::MAX, 0);
        for _ in 0..ROUNDS {
            out.clear();
            let (before, start) = (ALLOCATIONS.load(Ordering::Relaxed), Instant::now());
            for flow in &flows {
                json.encode_into(black_box(flow), 1_790_000_002, &mut out);
                out.push(b'\n');
            }
            best = best.min(start.elapsed());
            allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
        }
        let per_s = f64::from(FLOWS) / best.as_secs_f64();
        println!(
            "{name:<22} {:>9.0} flows/s {:>6.0} ns/flow {:>5} bytes/flow {allocations} allocations in {FLOWS} flows",
            per_s,
            1e9 / per_s,
            out.len() / flows.len(),
        );
    }
}
