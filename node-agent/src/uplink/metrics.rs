//! What the uplink counts.

use std::sync::atomic::AtomicU64;

use prometheus_client::{
    metrics::{
        counter::Counter,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

/// Metrics of the uplink. Clones share their values; [`register`](Self::register) shows them.
#[derive(Clone, Debug)]
pub struct UplinkMetrics {
    pub(super) connected: Gauge,
    pub(super) unacked_batches: Gauge,
    pub(super) unacked_bytes: Gauge,
    pub(super) connects: Counter,
    pub(super) connect_failures: Counter,
    pub(super) resent_batches: Counter,
    pub(super) busy: Counter,
    pub(super) window_full: Counter,
    pub(super) blocked_seconds: Counter<f64, AtomicU64>,
    pub(super) ack_seconds: Histogram,
}

impl Default for UplinkMetrics {
    fn default() -> Self {
        Self {
            connected: Gauge::default(),
            unacked_batches: Gauge::default(),
            unacked_bytes: Gauge::default(),
            connects: Counter::default(),
            connect_failures: Counter::default(),
            resent_batches: Counter::default(),
            busy: Counter::default(),
            window_full: Counter::default(),
            blocked_seconds: Counter::default(),
            // 0.5 ms to 16 s.
            ack_seconds: Histogram::new(exponential_buckets(0.0005, 2.0, 16)),
        }
    }
}

impl UplinkMetrics {
    /// Adds all to `registry`.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("connected", "1 while the aggregator is reached", self.connected.clone());
        registry.register(
            "unacked_batches",
            "Batches kept until acknowledged",
            self.unacked_batches.clone(),
        );
        registry.register(
            "unacked_bytes",
            "Memory of the batches kept",
            self.unacked_bytes.clone(),
        );
        registry.register("connects", "Streams opened", self.connects.clone());
        registry.register(
            "connect_failures",
            "Attempts and streams that failed",
            self.connect_failures.clone(),
        );
        registry.register(
            "resent_batches",
            "Batches sent more than once",
            self.resent_batches.clone(),
        );
        registry.register("busy", "Batches the aggregator had no room for", self.busy.clone());
        registry.register(
            "window_full",
            "Times a batch found the window full",
            self.window_full.clone(),
        );
        registry.register(
            "blocked_seconds",
            "Time senders waited for the window",
            self.blocked_seconds.clone(),
        );
        registry.register(
            "ack_seconds",
            "Time from sending a batch to its acknowledgement",
            self.ack_seconds.clone(),
        );
    }

    /// Streams opened since start.
    #[must_use]
    pub fn connects(&self) -> u64 {
        self.connects.get()
    }

    /// Attempts to connect and streams that failed since start.
    #[must_use]
    pub fn connect_failures(&self) -> u64 {
        self.connect_failures.get()
    }

    /// Batches sent more than once since start.
    #[must_use]
    pub fn resent_batches(&self) -> u64 {
        self.resent_batches.get()
    }

    /// Batches the aggregator had no room for since start.
    #[must_use]
    pub fn busy(&self) -> u64 {
        self.busy.get()
    }

    /// Seconds that senders waited for the window since start.
    #[must_use]
    pub fn blocked_seconds(&self) -> f64 {
        self.blocked_seconds.get()
    }
}
