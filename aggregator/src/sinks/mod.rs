//! Where records end: DataWay, Kafka and Loki through the disk queue, metrics, the terminal, a file.
//!
//! ```text
//! committer ─▶ disk queue ─▶ deliver::run (one task per sink, a few bodies under way) ─▶ dataway, kafka, loki ─▶ taken ─▶ removal
//! committer ─▶ flow_metrics::FlowMetrics (after the acknowledgement) ─▶ /metrics
//! committer ─▶ text::TextSink (file: written and synced before the acknowledgement; terminal: after it)
//! ```
//! [`Sink`] is what the committer, the delivery task, the metrics and the status share about one sink.

pub mod dataway;
pub(crate) mod dead_letter;
pub(crate) mod deliver;
pub mod flow_metrics;
pub(crate) mod gate;
pub(crate) mod kafka;
pub(crate) mod loki;
pub(crate) mod metrics;
pub(crate) mod text;

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, SystemTime},
};

use parking_lot::Mutex;
use telemetry::{ComponentHandle, Ledger, Stage};
use tokio::sync::Notify;

use crate::{
    config::{SinkConfig, SinkKind, WhenFull},
    queue::{Backlog, BodyMeta},
};

/// A sink's state for health, metrics and the collector object's status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SinkStatus {
    /// Name of the sink.
    pub name: String,
    /// `dataway`, `kafka`, `loki`, `prometheus`, `stdout` or `file`.
    pub kind: &'static str,
    /// Address or path, without secrets.
    pub target: String,
    /// Bodies in the disk queue.
    pub backlog_bodies: u64,
    /// Points in the disk queue.
    pub backlog_points: u64,
    /// Bytes of the disk queue.
    pub backlog_bytes: u64,
    /// Age of the oldest body in the queue.
    pub oldest: Option<Duration>,
    /// Points delivered since start.
    pub delivered_points: u64,
    /// Last delivery.
    pub last_success: Option<SystemTime>,
    /// Last failure, kept after later successes.
    pub last_error: Option<SinkError>,
    /// True while the last attempt failed.
    pub failing: bool,
}

/// A failed attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SinkError {
    /// A word of a small fixed set, e.g. `timeout`, `http_5xx`, `unauthorized`.
    pub kind: &'static str,
    /// What happened, without secrets.
    pub text: String,
    /// When.
    pub at: SystemTime,
}

/// One configured sink.
#[derive(Debug)]
pub(crate) struct Sink {
    pub(crate) name: String,
    pub(crate) kind: &'static str,
    pub(crate) when_full: WhenFull,
    /// Slot in the queue; `None` for sinks that do not use it.
    pub(crate) slot: Option<u32>,
    /// Address or path, without secrets.
    target: Mutex<String>,
    max_bytes: AtomicU64,
    /// Points from the commit to the end of their delivery.
    pub(crate) queue: Stage,
    /// Points from the first attempt to the answer.
    pub(crate) deliver: Stage,
    /// Wakes the delivery task.
    pub(crate) arrived: Notify,
    backlog: Mutex<Backlog>,
    /// Full until the backlog is a sixteenth below the bound, so that batches are not encoded in vain.
    full: AtomicBool,
    /// Points read by the delivery task and not yet removed.
    claimed: AtomicU64,
    delivered: AtomicU64,
    outcome: Mutex<Outcome>,
    health: ComponentHandle,
}

#[derive(Debug, Default)]
struct Outcome {
    last_success: Option<SystemTime>,
    last_error: Option<SinkError>,
    failing: bool,
}

// === impl Sink ===

impl Sink {
    pub(crate) fn new(
        config: &SinkConfig,
        slot: Option<u32>,
        max_bytes: u64,
        ledger: &Ledger,
        health: &telemetry::Health,
    ) -> Self {
        let kind = match &config.kind {
            SinkKind::Dataway(_) => "dataway",
            SinkKind::Stdout(_) => "stdout",
            SinkKind::File(_) => "file",
            SinkKind::Kafka(_) => "kafka",
            SinkKind::Loki(_) => "loki",
            SinkKind::Prometheus(_) => "prometheus",
        };
        // Stage names are static; sinks are few and live as long as the process.
        let stage = |what: &str| ledger.stage(Box::leak(format!("sink.{}.{what}", config.name).into_boxed_str()));
        let component = health.component(&format!("sink.{}", config.name));
        component.set_ok();
        Self {
            name: config.name.clone(),
            kind,
            target: Mutex::new(target_of(config)),
            when_full: config.when_full,
            slot,
            max_bytes: AtomicU64::new(max_bytes),
            queue: stage("queue"),
            deliver: stage("deliver"),
            arrived: Notify::new(),
            backlog: Mutex::default(),
            full: AtomicBool::new(false),
            claimed: AtomicU64::new(0),
            delivered: AtomicU64::new(0),
            outcome: Mutex::default(),
            health: component,
        }
    }

    /// Address or path, without secrets.
    pub(crate) fn target(&self) -> String {
        self.target.lock().clone()
    }

    /// Bound of its queue, bytes.
    pub(crate) fn max_bytes(&self) -> u64 {
        self.max_bytes.load(Ordering::Relaxed)
    }

    /// Takes over other settings of the same sink. What is wrong with the old ones is no longer so.
    pub(crate) fn set(&self, config: &SinkConfig, max_bytes: u64) {
        self.max_bytes.store(max_bytes, Ordering::Relaxed);
        let target = target_of(config);
        if std::mem::replace(&mut *self.target.lock(), target.clone()) != target {
            self.well();
        }
    }

    /// Nothing fails any more: the sink is set anew, or not in use.
    pub(crate) fn well(&self) {
        self.outcome.lock().failing = false;
        self.health.set_ok();
    }

    /// What the queue holds.
    pub(crate) fn backlog(&self) -> Backlog {
        *self.backlog.lock()
    }

    /// Takes over what the queue file holds, after opening it.
    pub(crate) fn restore(&self, stored: Backlog) {
        let mut backlog = self.backlog.lock();
        // More than known: rows of an earlier run, or of a commit that failed after it had reached the disk.
        self.queue.entered(stored.points.saturating_sub(backlog.points));
        let next_id = backlog.next_id.max(stored.next_id);
        *backlog = Backlog { next_id, ..stored };
    }

    /// The queue file was lost. Bodies in the delivery task's hands are not.
    pub(crate) fn forget_stored(&self) -> u64 {
        let mut backlog = self.backlog.lock();
        let points = backlog.points.saturating_sub(self.claimed.load(Ordering::Relaxed));
        self.queue.lost("damaged", points);
        *backlog = Backlog {
            next_id: backlog.next_id,
            ..Backlog::default()
        };
        points
    }

    /// Counts bodies that were stored.
    pub(crate) fn stored(&self, bodies: &[(u64, BodyMeta)]) {
        let Some((last, _)) = bodies.last() else { return };
        let mut backlog = self.backlog.lock();
        for (_, meta) in bodies {
            backlog.bodies += 1;
            backlog.points += u64::from(meta.points);
            backlog.bytes += meta.cost();
            self.queue.entered(meta.points.into());
        }
        backlog.next_id = last + 1;
        drop(backlog);
        self.arrived.notify_one();
    }

    /// Counts a body that left the queue file.
    pub(crate) fn removed(&self, meta: &BodyMeta) {
        let mut backlog = self.backlog.lock();
        backlog.bodies = backlog.bodies.saturating_sub(1);
        backlog.points = backlog.points.saturating_sub(meta.points.into());
        backlog.bytes = backlog.bytes.saturating_sub(meta.cost());
    }

    /// True if no more can be stored now. `more` is what is about to be added, 0 to ask before encoding.
    pub(crate) fn is_full(&self, more: u64) -> bool {
        let bytes = self.backlog.lock().bytes;
        let max_bytes = self.max_bytes();
        let bound = if self.full.load(Ordering::Relaxed) {
            max_bytes - max_bytes / 16
        } else {
            max_bytes
        };
        let full = if more == 0 {
            bytes >= bound
        } else {
            bytes + more > max_bytes
        };
        self.full.store(full, Ordering::Relaxed);
        full
    }

    pub(crate) fn claim(&self, points: u32) {
        self.claimed.fetch_add(points.into(), Ordering::Relaxed);
    }

    pub(crate) fn release(&self, points: u32) {
        self.claimed.fetch_sub(points.into(), Ordering::Relaxed);
    }

    /// Counts a delivery; true if it ended a failure.
    pub(crate) fn succeeded(&self, points: u64) -> bool {
        self.delivered.fetch_add(points, Ordering::Relaxed);
        let mut outcome = self.outcome.lock();
        outcome.last_success = Some(SystemTime::now());
        let recovered = std::mem::take(&mut outcome.failing);
        drop(outcome);
        if recovered {
            self.health.set_ok();
        }
        recovered
    }

    /// Records a failure; `text` holds no secret.
    pub(crate) fn failed(&self, kind: &'static str, text: &str) {
        let error = SinkError {
            kind,
            text: text.to_owned(),
            at: SystemTime::now(),
        };
        let mut outcome = self.outcome.lock();
        outcome.last_error = Some(error);
        outcome.failing = true;
        drop(outcome);
        self.health.set_degraded(format!("{kind}: {text}"));
    }

    /// The state now; `oldest` is the age of the queue's head.
    pub(crate) fn status(&self, oldest: Option<Duration>) -> SinkStatus {
        let backlog = self.backlog();
        let outcome = self.outcome.lock();
        SinkStatus {
            name: self.name.clone(),
            kind: self.kind,
            target: self.target(),
            backlog_bodies: backlog.bodies,
            backlog_points: backlog.points,
            backlog_bytes: backlog.bytes,
            oldest,
            delivered_points: self.delivered.load(Ordering::Relaxed),
            last_success: outcome.last_success,
            last_error: outcome.last_error.clone(),
            failing: outcome.failing,
        }
    }
}

fn target_of(config: &SinkConfig) -> String {
    match &config.kind {
        SinkKind::Dataway(dataway) => dataway.endpoint.to_string(),
        SinkKind::Stdout(_) => "-".to_owned(),
        SinkKind::File(file) => file.path.display().to_string(),
        SinkKind::Kafka(kafka) => format!("{}/{}", kafka.brokers.join(","), kafka.topic),
        SinkKind::Loki(loki) => loki.url.to_string(),
        SinkKind::Prometheus(metrics) => format!("{} metrics", metrics.metrics.len()),
    }
}
