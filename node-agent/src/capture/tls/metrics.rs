//! What `httpflow-tls` says about libraries, processes and sockets; the rest is as of `httpflow`.

use ebpf_common::tls::stat;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
};
use telemetry::Telemetry;

use super::{blind::Reason, find::Counts};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HowLabel {
    how: &'static str,
}

/// Metrics of its own.
#[derive(Clone, Debug, Default)]
pub struct TlsMetrics {
    processes: Gauge,
    files: Gauge,
    blind: Family<ReasonLabel, Gauge>,
    calls: Counter,
    calls_lost: Family<ReasonLabel, Counter>,
    sockets: Family<HowLabel, Counter>,
    missed: Counter,
}

impl TlsMetrics {
    /// Registers the metrics.
    #[must_use]
    pub fn new(telemetry: &Telemetry) -> Self {
        let this = Self::default();
        telemetry.register("httpflow_tls", |registry| {
            registry.register(
                "processes",
                "Processes with a library or program that has probes",
                this.processes.clone(),
            );
            registry.register("files", "Programs and libraries with probes", this.files.clone());
            registry.register(
                "blind_processes",
                "Processes whose plain text is not seen, by reason",
                this.blind.clone(),
            );
            registry.register("calls", "Calls of which plain text was taken", this.calls.clone());
            registry.register(
                "calls_lost",
                "Calls of which plain text could not be taken",
                this.calls_lost.clone(),
            );
            registry.register(
                "sockets_found",
                "Connections whose socket was found, by what told it",
                this.sockets.clone(),
            );
            registry.register(
                "processes_missed",
                "Starts and ends of processes that found no room in the ring; all processes are looked at then",
                this.missed.clone(),
            );
        });
        this
    }

    pub(super) fn processes(&self, counts: Counts, blind: impl Iterator<Item = (u32, Reason)>) {
        let number = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        self.processes.set(number(counts.processes));
        self.files.set(number(counts.files));
        let mut by_reason = [0i64; Reason::ALL.len()];
        for (_, reason) in blind {
            let at = Reason::ALL.iter().position(|other| *other == reason);
            if let Some(count) = at.and_then(|at| by_reason.get_mut(at)) {
                *count += 1;
            }
        }
        for (reason, count) in Reason::ALL.iter().zip(by_reason) {
            let label = ReasonLabel { reason: reason.label() };
            self.blind.get_or_create(&label).set(count);
        }
    }

    /// Takes over what the kernel side counted since the last call; gives how many starts and ends it had to leave out.
    pub(super) fn kernel(&self, before: &[u64; stat::COUNT as usize], now: &[u64; stat::COUNT as usize]) -> u64 {
        let grown = |index: u32| {
            let (now, before) = (now.get(index as usize), before.get(index as usize));
            now.zip(before).map_or(0, |(now, before)| now.wrapping_sub(*before))
        };
        self.calls.inc_by(grown(stat::CALLS));
        for (reason, index) in [
            ("calls_full", stat::CALLS_FULL),
            ("connections_full", stat::CONNECTIONS_FULL),
            ("began_unseen", stat::NO_CALL),
            ("no_descriptor", stat::NO_DESCRIPTOR),
            ("unreadable", stat::UNREADABLE),
        ] {
            if grown(index) > 0 {
                self.calls_lost
                    .get_or_create(&ReasonLabel { reason })
                    .inc_by(grown(index));
            }
        }
        for (how, index) in [
            ("nesting", stat::BY_NESTING),
            ("record", stat::BY_RECORD),
            ("descriptor", stat::BY_DESCRIPTOR),
        ] {
            if grown(index) > 0 {
                self.sockets.get_or_create(&HowLabel { how }).inc_by(grown(index));
            }
        }
        let missed = grown(stat::PROCESSES_MISSED);
        self.missed.inc_by(missed);
        missed
    }
}
