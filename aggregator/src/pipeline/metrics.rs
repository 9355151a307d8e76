//! Metrics of the pipeline.

use std::{sync::Arc, time::Duration};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};
use telemetry::LogLimit;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RefusedLabel {
    reason: &'static str,
}

/// Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct PipelineMetrics {
    refused: Family<RefusedLabel, Counter>,
    commit_seconds: Histogram,
    group_batches: Histogram,
    pub(crate) storage_failures: Counter,
    pub(crate) damaged_files: Counter,
    pub(crate) agents: Gauge,
    conversations: Gauge,
    untracked: Counter,
    pub(crate) refusal_log: Arc<LogLimit>,
}

// === impl PipelineMetrics ===

impl PipelineMetrics {
    /// Registers under `<prefix>_pipeline_`.
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            refused: Family::default(),
            commit_seconds: Histogram::new([0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0]),
            group_batches: Histogram::new([1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 500.0]),
            storage_failures: Counter::default(),
            damaged_files: Counter::default(),
            agents: Gauge::default(),
            conversations: Gauge::default(),
            untracked: Counter::default(),
            refusal_log: Arc::new(LogLimit::new(Duration::from_secs(10))),
        };
        registry.register(
            "refused_batches",
            "Batches left with their senders, by reason",
            metrics.refused.clone(),
        );
        registry.register_with_unit(
            "commit_duration",
            "Time to encode, compress and commit one group of batches",
            Unit::Seconds,
            metrics.commit_seconds.clone(),
        );
        registry.register("group_batches", "Batches per commit", metrics.group_batches.clone());
        registry.register(
            "storage_failures",
            "Failed uses of the queue file",
            metrics.storage_failures.clone(),
        );
        registry.register(
            "damaged_queue_files",
            "Queue files found damaged",
            metrics.damaged_files.clone(),
        );
        registry.register(
            "agents",
            "Agent starts remembered for de-duplication",
            metrics.agents.clone(),
        );
        registry.register(
            "conversations",
            "Conversations of flow logs that are followed",
            metrics.conversations.clone(),
        );
        registry.register(
            "conversations_untracked_flows",
            "Flow logs whose conversation found no room",
            metrics.untracked.clone(),
        );
        metrics
    }

    pub(crate) fn commit(&self, took: Duration, batches: usize, stored: bool) {
        if stored && batches > 0 {
            self.commit_seconds.observe(took.as_secs_f64());
            self.group_batches.observe(batches as f64);
        }
    }

    pub(crate) fn conversations(&self, followed: usize, untracked: u64) {
        self.conversations.set(i64::try_from(followed).unwrap_or(i64::MAX));
        self.untracked.inc_by(untracked);
    }

    pub(crate) fn refused(&self, full: bool) {
        let reason = if full { "full" } else { "storage" };
        self.refused.get_or_create(&RefusedLabel { reason }).inc();
    }
}
