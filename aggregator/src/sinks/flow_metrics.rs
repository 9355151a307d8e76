//! Metrics made from flow logs, served among the process's own.
//!
//! ```text
//! committer (after the commit) ─▶ FlowMetrics::observe ─▶ series by labels ─▶ scrape of /metrics
//! ```
//! A [`FlowMetric`] says what one metric is made of, as NetObserv's do. A metric that stays as it was keeps its series when
//! others change. Series are bounded: beyond `series_max`, flows go to the series whose labels are all `other`.

mod definition;
pub mod predefined;
mod series;

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use parking_lot::Mutex;
use prometheus_client::{collector::Collector, encoding::DescriptorEncoder};
use records::FlowLog;

pub use definition::{FlowMetric, Match, MetricError, MetricFilter, MetricKind};
pub(crate) use definition::{check, warnings};
use series::Metric;

/// What bounds the series, and how metrics are called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) prefix: String,
    pub(crate) series_max: usize,
    pub(crate) expiry: Duration,
}

/// The metrics of one configuration.
#[derive(Debug)]
pub(crate) struct FlowMetrics {
    limits: Limits,
    metrics: Vec<Arc<Metric>>,
}

/// Those in use, for the scrape. During a change there are two; the older ones go when the committer lets go of them.
#[derive(Clone, Debug, Default)]
pub(crate) struct FlowMetricsInUse(Arc<Mutex<Vec<Weak<FlowMetrics>>>>);

// === impl FlowMetrics ===

impl FlowMetrics {
    fn new(definitions: &[FlowMetric], limits: Limits, before: Option<&Self>) -> Self {
        let metrics = definitions
            .iter()
            .map(|definition| {
                let kept = before
                    .filter(|before| before.limits == limits)
                    .and_then(|before| before.metrics.iter().find(|metric| *metric.definition() == *definition));
                kept.map_or_else(|| Arc::new(Metric::new(definition.clone(), &limits)), Arc::clone)
            })
            .collect();
        Self { limits, metrics }
    }

    /// Counts flows.
    pub(crate) fn observe(&self, flows: &[FlowLog], received: i64) {
        if flows.is_empty() {
            return;
        }
        for metric in &self.metrics {
            metric.observe(flows, received);
        }
    }
}

// === impl FlowMetricsInUse ===

impl FlowMetricsInUse {
    pub(crate) fn put_to_use(&self, definitions: &[FlowMetric], limits: Limits) -> Arc<FlowMetrics> {
        for text in definitions.iter().flat_map(warnings) {
            tracing::warn!("{text}");
        }
        let mut all = self.0.lock();
        let before = all.last().and_then(Weak::upgrade);
        let new = Arc::new(FlowMetrics::new(definitions, limits, before.as_deref()));
        all.retain(|known| known.strong_count() > 0);
        all.push(Arc::downgrade(&new));
        new
    }

    fn current(&self) -> Option<Arc<FlowMetrics>> {
        self.0.lock().iter().rev().find_map(Weak::upgrade)
    }
}

impl Collector for FlowMetricsInUse {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let Some(current) = self.current() else { return Ok(()) };
        for metric in &current.metrics {
            metric.encode(&current.limits.prefix, &mut encoder)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
