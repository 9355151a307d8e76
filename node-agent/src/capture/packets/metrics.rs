//! What the plugin says about itself, and where each packet went.

use ebpf_common::packets::{OtherValue, stat};
use prometheus_client::metrics::{counter::Counter, gauge::Gauge};
use telemetry::{Stage, Telemetry};

/// Metrics of the plugin.
#[derive(Clone, Debug, Default)]
pub struct PacketMetrics {
    namespaces: Gauge,
    interfaces: Gauge,
    flows: Gauge,
    held_back: Counter,
    not_ip_packets: Counter,
    not_ip_bytes: Counter,
}

impl PacketMetrics {
    /// Registers the metrics.
    #[must_use]
    pub fn new(telemetry: &Telemetry) -> Self {
        let this = Self::default();
        telemetry.register("bpf_netlog", |registry| {
            registry.register(
                "namespaces",
                "Network namespaces with interfaces that are followed",
                this.namespaces.clone(),
            );
            registry.register("interfaces", "Interfaces that are followed", this.interfaces.clone());
            registry.register("flows", "Flows of the last drain", this.flows.clone());
            registry.register(
                "flush_held_back",
                "Flushes that found no room in the channel to the uplink",
                this.held_back.clone(),
            );
            registry.register("not_ip_packets", "Packets that are not IP", this.not_ip_packets.clone());
            registry.register("not_ip_bytes", "Their bytes", this.not_ip_bytes.clone());
        });
        this
    }

    pub(super) fn counts(&self, namespaces: usize, interfaces: usize, flows: usize) {
        let number = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        self.namespaces.set(number(namespaces));
        self.interfaces.set(number(interfaces));
        self.flows.set(number(flows));
    }

    pub(super) fn held_back(&self) {
        self.held_back.inc();
    }

    pub(super) fn not_ip(&self, grown: OtherValue) {
        self.not_ip_packets.inc_by(grown.packets);
        self.not_ip_bytes.inc_by(grown.bytes);
    }
}

/// Where packets went: each is counted by the kernel side as it is seen, then once as emitted (with its flow), skipped or lost.
pub(super) struct Ledger {
    stage: Stage,
    before: [u64; stat::COUNT as usize],
}

impl Ledger {
    pub(super) fn new(stage: Stage) -> Self {
        Self {
            stage,
            before: [0; stat::COUNT as usize],
        }
    }

    /// Takes over the kernel's counts.
    pub(super) fn kernel(&mut self, stats: &[u64; stat::COUNT as usize]) {
        let grown = |index: u32| {
            let index = index as usize;
            let (now, before) = (stats.get(index), self.before.get(index));
            now.zip(before).map_or(0, |(now, before)| now.wrapping_sub(*before))
        };
        self.stage.entered(grown(stat::ENTERED));
        for (index, reason) in [(stat::NOT_SAMPLED, "not_sampled"), (stat::NOT_IP, "not_ip")] {
            let count = grown(index);
            if count > 0 {
                self.stage.skipped(reason, count);
            }
        }
        let full = grown(stat::TABLE_FULL);
        if full > 0 {
            self.stage.lost("table_full", full);
        }
        self.before = *stats;
    }

    pub(super) fn emitted(&self, packets: u64) {
        self.stage.emitted(packets);
    }
}
