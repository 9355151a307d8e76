//! Metrics of the sinks. Backlogs and ages are read when scraped, attempts are counted as they happen.

use std::{
    sync::{Arc, Weak},
    time::{Duration, UNIX_EPOCH},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _},
    metrics::{counter::Counter, family::Family, gauge::ConstGauge, histogram::Histogram},
    registry::{Registry, Unit},
};

use super::{SinkStatus, deliver::Verdict};
use crate::queue::BodyMeta;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct SinkLabel {
    sink: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct AttemptLabels {
    sink: String,
    result: &'static str,
}

/// Counters of delivery attempts. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct SinkMetrics {
    attempts: Family<AttemptLabels, Counter>,
    seconds: Family<SinkLabel, Histogram>,
    raw_bytes: Family<SinkLabel, Counter>,
    wire_bytes: Family<SinkLabel, Counter>,
    dead_letters_dropped: Family<SinkLabel, Counter>,
}

/// Gives the sinks' states at scrape time.
pub(crate) trait Statuses: Send + Sync + 'static {
    /// The states now.
    fn statuses(&self) -> Vec<SinkStatus>;
}

/// Writes the sinks' states as gauges. Holds no sink alive.
pub(crate) struct StatusCollector(pub(crate) Weak<dyn Statuses>);

// === impl SinkMetrics ===

impl SinkMetrics {
    /// Registers under `<prefix>_sink_`.
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let buckets = || {
            Histogram::new([
                0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
            ])
        };
        let metrics = Self {
            attempts: Family::default(),
            seconds: Family::new_with_constructor(buckets),
            raw_bytes: Family::default(),
            wire_bytes: Family::default(),
            dead_letters_dropped: Family::default(),
        };
        registry.register("attempts", "Delivery attempts by result", metrics.attempts.clone());
        registry.register_with_unit(
            "attempt_duration",
            "Time to an answer",
            Unit::Seconds,
            metrics.seconds.clone(),
        );
        registry.register_with_unit(
            "delivered_raw",
            "Bytes delivered, before compression",
            Unit::Bytes,
            metrics.raw_bytes.clone(),
        );
        registry.register_with_unit(
            "delivered_wire",
            "Bytes delivered, as sent",
            Unit::Bytes,
            metrics.wire_bytes.clone(),
        );
        registry.register(
            "dead_letters_dropped",
            "Dead letters dropped because their files reached the bound",
            metrics.dead_letters_dropped.clone(),
        );
        metrics
    }

    pub(crate) fn attempt(&self, sink: &str, verdict: &Verdict, meta: &BodyMeta, took: Duration) {
        let label = SinkLabel { sink: sink.to_owned() };
        let result = match verdict {
            Verdict::Delivered => "delivered",
            Verdict::Retry { kind, .. } => kind,
            Verdict::Refused { .. } => "refused",
        };
        self.attempts
            .get_or_create(&AttemptLabels {
                sink: sink.to_owned(),
                result,
            })
            .inc();
        self.seconds.get_or_create(&label).observe(took.as_secs_f64());
        if matches!(verdict, Verdict::Delivered) {
            self.raw_bytes.get_or_create(&label).inc_by(meta.raw_len.into());
            self.wire_bytes.get_or_create(&label).inc_by(meta.wire_len.into());
        }
    }

    pub(crate) fn dead_letters_dropped(&self, sink: &str, n: u64) {
        self.dead_letters_dropped
            .get_or_create(&SinkLabel { sink: sink.to_owned() })
            .inc_by(n);
    }
}

// === impl StatusCollector ===

impl std::fmt::Debug for StatusCollector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("StatusCollector")
    }
}

impl Collector for StatusCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let statuses = self
            .0
            .upgrade()
            .map(|source: Arc<dyn Statuses>| source.statuses())
            .unwrap_or_default();
        type Value = fn(&SinkStatus) -> f64;
        let gauges: [(&str, &str, Option<Unit>, Value); 6] = [
            ("backlog", "Bytes of the disk queue", Some(Unit::Bytes), |s| {
                s.backlog_bytes as f64
            }),
            ("backlog_points", "Points in the disk queue", None, |s| {
                s.backlog_points as f64
            }),
            ("backlog_bodies", "Bodies in the disk queue", None, |s| {
                s.backlog_bodies as f64
            }),
            (
                "backlog_oldest",
                "Age of the oldest body in the disk queue",
                Some(Unit::Seconds),
                |s| s.oldest.map_or(0.0, |age| age.as_secs_f64()),
            ),
            (
                "last_success_timestamp",
                "Unix time of the last delivery; 0 if none",
                Some(Unit::Seconds),
                |s| {
                    s.last_success
                        .and_then(|at| at.duration_since(UNIX_EPOCH).ok())
                        .map_or(0.0, |at| at.as_secs_f64())
                },
            ),
            ("failing", "1 while the last attempt failed", None, |s| {
                f64::from(u8::from(s.failing))
            }),
        ];
        for (name, help, unit, value) in gauges {
            let gauge = ConstGauge::new(0.0);
            let mut family = encoder.encode_descriptor(name, help, unit.as_ref(), gauge.metric_type())?;
            for status in &statuses {
                let label = [("sink", status.name.as_str())];
                ConstGauge::new(value(status)).encode(family.encode_family(&label)?)?;
            }
        }
        Ok(())
    }
}
