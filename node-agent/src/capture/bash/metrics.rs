//! What the plugin says about itself, and where each line went.

use ebpf_common::bash::stat;
use prometheus_client::metrics::{counter::Counter, gauge::Gauge};
use telemetry::{Stage, Telemetry};

/// Metrics of the plugin.
#[derive(Clone, Debug, Default)]
pub struct BashMetrics {
    shells: Gauge,
    files: Gauge,
    blind: Gauge,
    missed: Counter,
}

impl BashMetrics {
    /// Registers the metrics.
    #[must_use]
    pub fn new(telemetry: &Telemetry) -> Self {
        let this = Self::default();
        telemetry.register("ebpf_bash", |registry| {
            registry.register("shells", "Shells that are followed", this.shells.clone());
            registry.register(
                "files",
                "Programs and libraries with a probe at their readline",
                this.files.clone(),
            );
            registry.register("blind_shells", "Shells whose lines are not seen", this.blind.clone());
            registry.register(
                "processes_missed",
                "Starts and ends of processes that found no room in the ring; all processes are looked at then",
                this.missed.clone(),
            );
        });
        this
    }

    pub(super) fn counts(&self, shells: usize, files: usize, blind: usize) {
        let number = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        self.shells.set(number(shells));
        self.files.set(number(files));
        self.blind.set(number(blind));
    }

    pub(super) fn missed(&self, count: u64) {
        self.missed.inc_by(count);
    }
}

/// Where lines went: each is counted by the kernel side as it is read, then once as emitted, skipped or lost.
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

    /// Takes over the kernel's counts; gives the starts and ends of processes that it left out since the last call.
    pub(super) fn kernel(&mut self, stats: &[u64; stat::COUNT as usize]) -> u64 {
        let grown = |index: u32| {
            let index = index as usize;
            let (now, before) = (stats.get(index), self.before.get(index));
            now.zip(before).map_or(0, |(now, before)| now.wrapping_sub(*before))
        };
        self.stage.entered(grown(stat::LINES));
        for (index, reason) in [
            (stat::EMPTY, "empty"),
            (stat::OFF, "off"),
            (stat::OTHER_PROGRAM, "other_program"),
            (stat::OTHER_NODE, "other_node"),
        ] {
            self.skipped(reason, grown(index));
        }
        self.lost("ring_buffer_full", grown(stat::RING_FULL));
        self.lost("unreadable", grown(stat::UNREADABLE));
        let missed = grown(stat::PROCESSES_MISSED);
        self.before = *stats;
        missed
    }

    pub(super) fn skipped(&self, reason: &'static str, count: u64) {
        if count > 0 {
            self.stage.skipped(reason, count);
        }
    }

    pub(super) fn lost(&self, reason: &'static str, count: u64) {
        if count > 0 {
            self.stage.lost(reason, count);
        }
    }

    pub(super) fn emitted(&self, count: u64) {
        self.stage.emitted(count);
    }
}
