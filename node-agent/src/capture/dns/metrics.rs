//! What `dnsflow` says about itself, and where packets and rows went.

use ebpf_common::dns::stat;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
};
use telemetry::{Stage, Telemetry};

use super::sessions::{Messages, Sessions};
use crate::capture::{domains::DomainNames, ends::UnnamedEnds};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

/// Metrics of the capture.
#[derive(Clone, Debug)]
pub struct DnsMetrics {
    messages: Family<KindLabel, Counter>,
    waiting: Gauge,
    streams: Gauge,
    evicted: Counter,
    unsure: Counter,
    pub(super) unfinished: Counter,
    pub(super) nameless: Counter,
    missing_bytes: Counter,
    resyncs: Counter,
    streams_evicted: Counter,
    domains: Gauge,
    domains_forgotten: Counter,
    /// Rows waiting for the flush or for room in the uplink.
    pub(super) rows: Gauge,
    /// Flushes that found no room in the uplink.
    pub(super) held_back: Counter,
    pub(super) unnamed: UnnamedEnds,
}

impl DnsMetrics {
    /// Registers the metrics.
    #[must_use]
    pub fn new(telemetry: &Telemetry) -> Self {
        let this = Self {
            messages: Family::default(),
            waiting: Gauge::default(),
            streams: Gauge::default(),
            evicted: Counter::default(),
            unsure: Counter::default(),
            unfinished: Counter::default(),
            nameless: Counter::default(),
            missing_bytes: Counter::default(),
            resyncs: Counter::default(),
            streams_evicted: Counter::default(),
            domains: Gauge::default(),
            domains_forgotten: Counter::default(),
            rows: Gauge::default(),
            held_back: Counter::default(),
            unnamed: UnnamedEnds::new(telemetry, "dnsflow"),
        };
        telemetry.register("dnsflow", |registry| {
            registry.register(
                "messages",
                "Messages of DNS: queries, retries of them, answers, and what belongs to no look-up",
                this.messages.clone(),
            );
            registry.register(
                "lookups_waiting",
                "Queries that wait for their answer",
                this.waiting.clone(),
            );
            registry.register(
                "lookups_evicted",
                "Queries that made room for others, and are told as nothing",
                this.evicted.clone(),
            );
            registry.register(
                "lookups_unsure",
                "Queries without an answer that are told as nothing, because packets were lost meanwhile",
                this.unsure.clone(),
            );
            registry.register(
                "lookups_unfinished",
                "Queries that were waiting when the capture ended, and are told as nothing",
                this.unfinished.clone(),
            );
            registry.register(
                "questions_left_out",
                "Look-ups told without their name, because there were too many different ones",
                this.nameless.clone(),
            );
            registry.register(
                "tcp_connections",
                "TCP connections of DNS that are followed",
                this.streams.clone(),
            );
            registry.register(
                "tcp_connections_evicted",
                "TCP connections that made room for others",
                this.streams_evicted.clone(),
            );
            registry.register(
                "tcp_missing_bytes",
                "Bytes of TCP connections that were not seen between others that were",
                this.missing_bytes.clone(),
            );
            registry.register(
                "tcp_resyncs",
                "Times the boundary of a message was lost in a TCP connection",
                this.resyncs.clone(),
            );
            registry.register("domains", "Addresses that clients know by a name", this.domains.clone());
            registry.register(
                "domains_forgotten",
                "Of them, those that made room for others while they could still be used",
                this.domains_forgotten.clone(),
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

    /// Takes over what the sessions counted.
    pub(super) fn sessions(&self, sessions: &mut Sessions, domains: &DomainNames) {
        let Messages {
            queries,
            retries,
            answers,
            unmatched,
            cut,
            malformed,
            unsure,
        } = sessions.take_messages();
        for (kind, count) in [
            ("query", queries),
            ("retry", retries),
            ("answer", answers),
            ("unmatched", unmatched),
            ("cut", cut),
            ("malformed", malformed),
        ] {
            if count > 0 {
                self.messages.get_or_create(&KindLabel { kind }).inc_by(count);
            }
        }
        self.unsure.inc_by(unsure);
        let (lookups, streams) = sessions.take_losses();
        self.evicted.inc_by(lookups.evicted);
        self.missing_bytes.inc_by(streams.missing);
        self.resyncs.inc_by(streams.resyncs);
        self.streams_evicted.inc_by(streams.evicted);
        let (waiting, connections) = sessions.waiting();
        let number = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        self.waiting.set(number(waiting));
        self.streams.set(number(connections));
        self.domains.set(number(domains.len()));
        self.domains_forgotten.inc_by(domains.take_forgotten());
    }
}

/// Skips and losses of the kernel side by counter: index, reason, lost.
const REASONS: &[(u32, &str, bool)] = &[
    (stat::SKIP_LOOPBACK, "loopback", false),
    (stat::SKIP_IPV6, "ipv6_disabled", false),
    (stat::SKIP_POLICY, "switched_off", false),
    (stat::SKIP_OTHER_NODE, "other_node", false),
    (stat::LOST_FULL, "ring_buffer_full", true),
    (stat::LOST_UNREADABLE, "unreadable", true),
];

/// Ledger stage from kernel to user space, in pieces of packets. The kernel side counts what enters, this side what arrives.
#[derive(Debug)]
pub(super) struct Packets {
    stage: Stage,
    last: [u64; stat::COUNT as usize],
}

impl Packets {
    pub(super) fn new(stage: Stage) -> Self {
        Self {
            stage,
            last: [0; stat::COUNT as usize],
        }
    }

    /// Adds what the kernel side counted since the last call; true if it lost something. What it handed on is counted where
    /// it arrives.
    pub(super) fn update(&mut self, now: &[u64; stat::COUNT as usize]) -> bool {
        let grown = |index: u32| {
            let (now, last) = (now.get(index as usize), self.last.get(index as usize));
            now.zip(last).map_or(0, |(now, last)| now.wrapping_sub(*last))
        };
        self.stage.entered(grown(stat::ENTERED));
        let mut lossy = false;
        for (index, reason, lost) in REASONS {
            match (grown(*index), lost) {
                (0, _) => {}
                (n, true) => {
                    lossy = true;
                    self.stage.lost(reason, n);
                }
                (n, false) => self.stage.skipped(reason, n),
            }
        }
        self.last = *now;
        lossy
    }

    /// Pieces that arrived.
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
