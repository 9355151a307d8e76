//! What `httpflow` says about itself, and where events, connections and exchanges went.

use ebpf_common::http::stat;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
};
use telemetry::{Stage, Telemetry};

use super::{connections, rows};
use crate::capture::ends::UnnamedEnds;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

type Reasons = Family<ReasonLabel, Counter>;

/// Metrics of the capture.
#[derive(Clone, Debug)]
pub struct HttpMetrics {
    connections: Gauge,
    left_out: Reasons,
    exchanges: Counter,
    exchanges_left_out: Reasons,
    doubtful: Reasons,
    other: Counter,
    losses: Family<KindLabel, Counter>,
    ring_bytes: Counter,
    /// Rows waiting for the flush or for room in the uplink.
    pub(super) rows: Gauge,
    /// Flushes that found no room in the uplink.
    pub(super) held_back: Counter,
    pub(super) unnamed: UnnamedEnds,
}

impl HttpMetrics {
    /// Registers the metrics.
    #[must_use]
    pub fn new(telemetry: &Telemetry, name: &'static str) -> Self {
        let this = Self {
            connections: Gauge::default(),
            left_out: Family::default(),
            exchanges: Counter::default(),
            exchanges_left_out: Family::default(),
            doubtful: Family::default(),
            other: Counter::default(),
            losses: Family::default(),
            ring_bytes: Counter::default(),
            rows: Gauge::default(),
            held_back: Counter::default(),
            unnamed: UnnamedEnds::new(telemetry, name),
        };
        telemetry.register(name, |registry| {
            registry.register(
                "connections",
                "Connection ends that are followed",
                this.connections.clone(),
            );
            registry.register(
                "connections_left_out",
                "Connection ends that began as HTTP and are not followed",
                this.left_out.clone(),
            );
            registry.register(
                "exchanges",
                "Requests with their responses, each counted at every end on this machine",
                this.exchanges.clone(),
            );
            registry.register(
                "exchanges_left_out",
                "Exchanges that are in no row",
                this.exchanges_left_out.clone(),
            );
            registry.register(
                "exchanges_doubtful",
                "Exchanges told of which something was not seen",
                this.doubtful.clone(),
            );
            registry.register(
                "exchanges_without_path",
                "Exchanges told with the path `other`, because there were too many different ones",
                this.other.clone(),
            );
            registry.register(
                "losses",
                "What could not be followed in connections: bytes not seen, message boundaries searched, and the like",
                this.losses.clone(),
            );
            registry.register(
                "ring_bytes",
                "Bytes that came from the kernel side, with the heads of events",
                this.ring_bytes.clone(),
            );
            registry.register("rows", "Rows waiting to be sent", this.rows.clone());
            registry.register(
                "flush_held_back",
                "Flushes that found no room in the uplink",
                this.held_back.clone(),
            );
        });
        this
    }

    /// Takes over what was counted of connections.
    pub(super) fn connections(&self, open: usize, counts: &connections::Counts) {
        self.connections.set(i64::try_from(open).unwrap_or(i64::MAX));
        add(
            &self.left_out,
            &[
                ("connections_full", counts.refused),
                ("not_http", counts.not_http),
                ("no_socket", counts.no_socket),
            ],
        );
        let losses = counts.losses;
        for (kind, count) in [
            ("stray_events", counts.strays),
            ("missing_bytes", counts.missing_bytes),
            ("resyncs", losses.resyncs),
            ("unattributed_bytes", losses.unattributed_bytes),
            ("refused_requests", losses.refused),
            ("malformed", losses.malformed),
            ("header_states", losses.header_states),
        ] {
            if count > 0 {
                self.losses.get_or_create(&KindLabel { kind }).inc_by(count);
            }
        }
    }

    /// Takes over what was counted of exchanges.
    pub(super) fn exchanges(&self, counts: &rows::Counts) {
        self.exchanges.inc_by(counts.exchanges);
        self.other.inc_by(counts.other);
        add(
            &self.exchanges_left_out,
            &[
                ("switched_off", counts.switched_off),
                ("other_node", counts.other_node),
                ("rows_full", counts.refused),
                ("nothing_known", counts.nothing),
            ],
        );
        add(
            &self.doubtful,
            &[
                ("joined", counts.joined),
                ("bytes_missing", counts.bytes_missing),
                ("aborted", counts.aborted),
                ("unfinished", counts.unfinished),
            ],
        );
    }
}

fn add(family: &Reasons, counts: &[(&'static str, u64)]) {
    for (reason, count) in counts {
        if *count > 0 {
            family.get_or_create(&ReasonLabel { reason }).inc_by(*count);
        }
    }
}

/// Ledger stage from kernel to user space, in events. The kernel side counts what enters, this side what arrives.
#[derive(Debug)]
pub(super) struct Events {
    stage: Stage,
    last: [u64; stat::COUNT as usize],
}

impl Events {
    pub(super) fn new(stage: Stage) -> Self {
        Self {
            stage,
            last: [0; stat::COUNT as usize],
        }
    }

    /// Adds what the kernel side counted since the last call. What it handed on is counted where it arrives.
    pub(super) fn update(&mut self, now: &[u64; stat::COUNT as usize], metrics: &HttpMetrics) {
        let grown = |index: u32| {
            let (now, last) = (now.get(index as usize), self.last.get(index as usize));
            now.zip(last).map_or(0, |(now, last)| now.wrapping_sub(*last))
        };
        let lost = grown(stat::RING_FULL);
        self.stage.entered(grown(stat::EVENTS) + lost);
        if lost > 0 {
            self.stage.lost("ring_buffer_full", lost);
        }
        metrics.ring_bytes.inc_by(grown(stat::BYTES));
        add(
            &metrics.left_out,
            &[
                ("loopback", grown(stat::SKIP_LOOPBACK)),
                ("ipv6_disabled", grown(stat::SKIP_IPV6)),
                ("switched_off", grown(stat::SKIP_POLICY)),
                ("other_node", grown(stat::SKIP_OTHER_NODE)),
                ("no_memory", grown(stat::NO_STORAGE)),
            ],
        );
        self.last = *now;
    }

    /// Events that arrived.
    pub(super) fn arrived(&self, n: u64) {
        self.stage.emitted(n);
    }

    /// Events of another build.
    pub(super) fn unknown(&self, n: u64) {
        if n > 0 {
            self.stage.lost("unknown_event", n);
        }
    }
}
