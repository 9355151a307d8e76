//! What the capture says about itself: the kernel side's counters in the ledger, and its metrics.

use std::{sync::atomic::AtomicU64, time::Duration};

use ebpf_common::net::stat;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
};
use telemetry::{Stage, Telemetry};

use super::tcp::SampleReport;
use crate::{
    capture::{ends::UnnamedEnds, policy::PolicyMetrics},
    ebpf::{
        capability::{Capabilities, State},
        net::NetObject,
        sys::ProgramStats,
    },
};

/// Ledger stages from kernel to user space: `capture.tcp` in connection ends, `capture.udp` in datagrams. The kernel side
/// counts what enters, this side what arrives.
#[derive(Debug)]
pub(super) struct KernelCounters {
    tcp: Stage,
    udp: Stage,
    last: [u64; stat::COUNT as usize],
    /// Connections that found the connection map full.
    untracked: Counter,
}

/// Skips and losses by counter: index, stage, reason, lost.
const REASONS: &[(u32, bool, &str, bool)] = &[
    (stat::TCP_SKIP_LOOPBACK, false, "loopback", false),
    (stat::TCP_SKIP_NOT_ESTABLISHED, false, "not_established", false),
    (stat::TCP_SKIP_PREDATES, false, "predates_agent", false),
    (stat::TCP_SKIP_IPV6, false, "ipv6_disabled", false),
    (stat::TCP_SKIP_POLICY, false, "switched_off", false),
    (stat::TCP_SKIP_OTHER_NODE, false, "other_node", false),
    (stat::TCP_LOST_FULL, false, "ring_buffer_full", true),
    (stat::UDP_SKIP_LOOPBACK, true, "loopback", false),
    (stat::UDP_SKIP_IPV6, true, "ipv6_disabled", false),
    (stat::UDP_SKIP_RCVBUF, true, "receive_queue_full", false),
    (stat::UDP_SKIP_POLICY, true, "switched_off", false),
    (stat::UDP_SKIP_OTHER_NODE, true, "other_node", false),
    (stat::UDP_LOST_FULL, true, "ring_buffer_full", true),
];

impl KernelCounters {
    pub(super) fn new(telemetry: &Telemetry, untracked: Counter) -> Self {
        Self {
            tcp: telemetry.ledger.stage("capture.tcp"),
            udp: telemetry.ledger.stage("capture.udp"),
            last: [0; stat::COUNT as usize],
            untracked,
        }
    }

    /// Adds what the kernel side counted since the last call. What it handed on is counted where it arrives.
    pub(super) fn update(&mut self, object: &NetObject) -> anyhow::Result<()> {
        let now = object.stats()?;
        let grown = |index: u32| {
            let index = index as usize;
            let (now, last) = (
                now.get(index).copied().unwrap_or(0),
                self.last.get(index).copied().unwrap_or(0),
            );
            now.wrapping_sub(last)
        };
        self.tcp.entered(grown(stat::TCP_ENTERED));
        self.udp.entered(grown(stat::UDP_ENTERED));
        for (index, udp, reason, lost) in REASONS {
            let stage = if *udp { &self.udp } else { &self.tcp };
            let n = grown(*index);
            if *lost {
                stage.lost(reason, n)
            } else {
                stage.skipped(reason, n)
            }
        }
        self.untracked.inc_by(grown(stat::TCP_CONN_MAP_FULL));
        self.last = now;
        Ok(())
    }

    /// Connection ends that arrived.
    pub(super) fn tcp_arrived(&self, n: u64) {
        self.tcp.emitted(n);
    }

    /// Datagrams that arrived.
    pub(super) fn udp_arrived(&self, n: u64) {
        self.udp.emitted(n);
    }

    /// An event of a kind or version that this build does not know.
    pub(super) fn unknown_event(&self) {
        self.tcp.lost("unknown_event", 1);
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ProgramLabel {
    program: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FeatureLabel {
    feature: &'static str,
    state: String,
    hook: String,
    reason: String,
}

/// What captures count with, one after the other: metrics are registered once per process.
#[derive(Clone, Debug)]
pub struct Instruments {
    pub(super) telemetry: Telemetry,
    pub(super) metrics: NetMetrics,
    pub(super) unnamed: UnnamedEnds,
    pub(super) policy: PolicyMetrics,
    pub(super) untracked: Counter,
}

impl Instruments {
    /// Registers the metrics.
    #[must_use]
    pub fn new(telemetry: &Telemetry) -> Self {
        let untracked = Counter::default();
        telemetry.register("ebpf_net", |registry| {
            registry.register(
                "connections_untracked",
                "TCP connections that found the connection map full; they are counted at their close",
                untracked.clone(),
            );
        });
        Self {
            telemetry: telemetry.clone(),
            metrics: NetMetrics::new(telemetry),
            unnamed: UnnamedEnds::new(telemetry, "identity"),
            policy: PolicyMetrics::new(telemetry),
            untracked,
        }
    }

    /// Shows what this node can see.
    pub fn features(&self, capabilities: &Capabilities) {
        self.metrics.features(capabilities);
    }
}

/// Metrics of the capture.
#[derive(Clone, Debug)]
pub(super) struct NetMetrics {
    /// Rows waiting for the flush or for room in the uplink.
    pub(super) rows: Gauge,
    /// Times a flush found no room.
    pub(super) held_back: Counter,
    drain_flows: Gauge,
    drain_seconds: Gauge<f64, AtomicU64>,
    sample_connections: Gauge,
    sample_seconds: Gauge<f64, AtomicU64>,
    sample_cpu_seconds: Gauge<f64, AtomicU64>,
    sample_kernel_seconds: Gauge<f64, AtomicU64>,
    scan_seconds: Gauge<f64, AtomicU64>,
    missed_closes: Counter,
    vanished: Counter,
    run_time: Family<ProgramLabel, Gauge<f64, AtomicU64>>,
    runs: Family<ProgramLabel, Gauge>,
    verified: Family<ProgramLabel, Gauge>,
    misses: Family<ProgramLabel, Gauge>,
    features: Family<FeatureLabel, Gauge>,
}

impl NetMetrics {
    fn new(telemetry: &Telemetry) -> Self {
        let this = Self {
            rows: Gauge::default(),
            held_back: Counter::default(),
            drain_flows: Gauge::default(),
            drain_seconds: Gauge::default(),
            sample_connections: Gauge::default(),
            sample_seconds: Gauge::default(),
            sample_cpu_seconds: Gauge::default(),
            sample_kernel_seconds: Gauge::default(),
            scan_seconds: Gauge::default(),
            missed_closes: Counter::default(),
            vanished: Counter::default(),
            run_time: Family::default(),
            runs: Family::default(),
            verified: Family::default(),
            misses: Family::default(),
            features: Family::default(),
        };
        telemetry.register("node", |r| {
            r.register(
                "feature",
                "What this node can see: 2 on, 1 degraded, 0 off",
                this.features.clone(),
            );
        });
        telemetry.register("ebpf_net", |r| {
            r.register("rows", "Rows waiting to be sent", this.rows.clone());
            r.register(
                "flush_held_back",
                "Flushes that found no room in the uplink",
                this.held_back.clone(),
            );
            r.register(
                "drain_flows",
                "Flows in the last drain of the kernel's maps",
                this.drain_flows.clone(),
            );
            r.register(
                "drain_seconds",
                "Duration of the last drain",
                this.drain_seconds.clone(),
            );
            r.register(
                "sample_connections",
                "Open TCP connections at the last sample",
                this.sample_connections.clone(),
            );
            r.register(
                "sample_seconds",
                "Duration of the last sample",
                this.sample_seconds.clone(),
            );
            r.register(
                "sample_cpu_seconds",
                "CPU time of the last sample, user space and system calls",
                this.sample_cpu_seconds.clone(),
            );
            r.register(
                "sample_kernel_cpu_seconds",
                "Part of sample_cpu_seconds inside system calls",
                this.sample_kernel_seconds.clone(),
            );
            r.register(
                "owner_scan_seconds",
                "Duration of the last descriptor scan",
                this.scan_seconds.clone(),
            );
            r.register(
                "missed_closes",
                "Connections whose close the hook missed",
                this.missed_closes.clone(),
            );
            r.register(
                "vanished_connections",
                "Connections whose close event was lost",
                this.vanished.clone(),
            );
        });
        telemetry.register("program", |r| {
            r.register(
                "run_time_seconds",
                "Time kernel programs ran; counted while kernel.bpf_stats_enabled is 1",
                this.run_time.clone(),
            );
            r.register("runs", "Runs of kernel programs; counted likewise", this.runs.clone());
            r.register(
                "verified_instructions",
                "Instructions the verifier walked",
                this.verified.clone(),
            );
            r.register(
                "recursion_misses",
                "Events missed because the program was running",
                this.misses.clone(),
            );
        });
        this
    }

    /// What this node can see.
    fn features(&self, capabilities: &Capabilities) {
        self.features.clear();
        for feature in &capabilities.features {
            let label = FeatureLabel {
                feature: feature.name,
                state: feature.state.to_string(),
                hook: feature.hook.clone(),
                reason: feature.reason.clone(),
            };
            self.features.get_or_create(&label).set(match feature.state {
                State::On => 2,
                State::Degraded => 1,
                State::Off => 0,
            });
        }
    }

    pub(super) fn drained(&self, flows: i64, took: Duration) {
        self.drain_flows.set(flows);
        self.drain_seconds.set(took.as_secs_f64());
    }

    pub(super) fn sampled(&self, report: &SampleReport, took: Duration, cpu: Duration) {
        let SampleReport {
            open,
            missed_close,
            vanished,
            kernel_cpu,
        } = *report;
        self.sample_connections.set(i64::try_from(open).unwrap_or(i64::MAX));
        self.sample_seconds.set(took.as_secs_f64());
        self.sample_cpu_seconds.set(cpu.as_secs_f64());
        self.sample_kernel_seconds.set(kernel_cpu.as_secs_f64());
        self.missed_closes.inc_by(missed_close);
        self.vanished.inc_by(vanished);
    }

    pub(super) fn scanned(&self, took: Duration) {
        self.scan_seconds.set(took.as_secs_f64());
    }

    pub(super) fn programs(&self, programs: &[(String, ProgramStats)]) {
        for (name, stats) in programs {
            let label = ProgramLabel { program: name.clone() };
            let integer = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
            self.run_time
                .get_or_create(&label)
                .set(Duration::from_nanos(stats.run_time_ns).as_secs_f64());
            self.runs.get_or_create(&label).set(integer(stats.run_count));
            self.verified.get_or_create(&label).set(i64::from(stats.verified_insns));
            self.misses.get_or_create(&label).set(integer(stats.recursion_misses));
        }
    }
}
