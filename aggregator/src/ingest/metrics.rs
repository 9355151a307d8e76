//! What ingest counts.

use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

type ByLabel = Family<[(&'static str, &'static str); 1], Counter>;

/// Metrics of ingest. Clones share their values; [`register`](Self::register) shows them.
#[derive(Clone, Debug, Default)]
pub struct IngestMetrics {
    pub(super) connections: Gauge,
    pub(super) streams: Gauge,
    batches: ByLabel,
    malformed: ByLabel,
    refused: ByLabel,
    reloads: ByLabel,
    forgotten: ByLabel,
}

impl IngestMetrics {
    /// Adds all to `registry`.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("connections", "Connections open", self.connections.clone());
        registry.register("streams", "Agent streams open", self.streams.clone());
        registry.register("batches", "Batches by what became of them", self.batches.clone());
        registry.register("malformed", "Messages refused, by reason", self.malformed.clone());
        registry.register(
            "refused_connections",
            "Connections refused, by reason",
            self.refused.clone(),
        );
        registry.register(
            "tls_reloads",
            "Times the certificate files were read again, by result",
            self.reloads.clone(),
        );
        registry.register(
            "nodes_forgotten",
            "Nodes dropped from the overview, by reason",
            self.forgotten.clone(),
        );
    }

    /// Messages refused for `reason` since start.
    #[must_use]
    pub fn malformed_of(&self, reason: &'static str) -> u64 {
        self.malformed.get_or_create(&[("reason", reason)]).get()
    }

    /// Connections refused for `reason` since start.
    #[must_use]
    pub fn refused_of(&self, reason: &'static str) -> u64 {
        self.refused.get_or_create(&[("reason", reason)]).get()
    }

    pub(super) fn batch(&self, result: &'static str) {
        self.batches.get_or_create(&[("result", result)]).inc();
    }

    pub(super) fn malformed(&self, reason: &'static str) {
        self.malformed.get_or_create(&[("reason", reason)]).inc();
    }

    pub(super) fn refused(&self, reason: &'static str) {
        self.refused.get_or_create(&[("reason", reason)]).inc();
    }

    pub(super) fn node_forgotten(&self, reason: &'static str) {
        self.forgotten.get_or_create(&[("reason", reason)]).inc();
    }

    /// Nodes forgotten since start, for any reason.
    pub(super) fn nodes_forgotten(&self) -> u64 {
        let of = |reason| self.forgotten.get_or_create(&[("reason", reason)]).get();
        ["disconnected", "no_room"].into_iter().map(of).sum()
    }

    pub(super) fn reload(&self, result: &'static str) {
        self.reloads.get_or_create(&[("result", result)]).inc();
    }
}
