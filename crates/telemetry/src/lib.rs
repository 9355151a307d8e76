//! Logging, metrics, health and the ledger: what a component says about itself.
//!
//! Entry: [`Telemetry::new`] gives one handle per process; components take a [`Stage`] per hand-off, register their
//! metrics with [`Telemetry::register`], and report health through [`Health::component`]. [`admin::serve`] answers
//! `/metrics`, `/healthz`, `/readyz` and `/ledger`. [`logging::init`] starts the log.

pub mod admin;
pub mod alloc_count;
pub mod health;
pub mod ledger;
pub mod limit;
pub mod logging;
pub mod process;
pub mod redact;

use std::{fmt, sync::Arc};

use parking_lot::Mutex;
use prometheus_client::{metrics::info::Info, registry::Registry};

pub use health::{ComponentHandle, Health};
pub use ledger::{Ledger, Reason, Stage};
pub use limit::LogLimit;
pub use redact::redact_url;

/// First part of the name of each of our metrics.
pub const METRIC_PREFIX: &str = "ebpfcollector";

/// What one process tells about itself. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Telemetry {
    /// Metrics; use [`Telemetry::register`] to add to them.
    pub registry: Arc<Mutex<Registry>>,
    /// The hand-offs' counters.
    pub ledger: Ledger,
    /// The components' states.
    pub health: Health,
}

impl Telemetry {
    /// The handle of this process: `component` is the program (`node-agent`), `version` its version. The ledger, the
    /// health states, build information and the process's own figures are registered already.
    #[must_use]
    pub fn new(component: &'static str, version: &'static str) -> Self {
        let (ledger, health) = (Ledger::default(), Health::default());
        let mut registry = Registry::default();
        registry.register_collector(Box::new(process::ProcessCollector));
        let ours = registry.sub_registry_with_prefix(METRIC_PREFIX);
        ours.register_collector(Box::new(ledger::LedgerCollector(ledger.clone())));
        ours.register_collector(Box::new(health::HealthCollector(health.clone())));
        let build = Info::new(vec![("component", component), ("version", version)]);
        ours.register("build", "Program and version", build);
        Self {
            registry: Arc::new(Mutex::new(registry)),
            ledger,
            health,
        }
    }

    /// Registers metrics under `ebpfcollector_<subsystem>_`. Each call adds to the registry: call it once per metric.
    /// Every name goes into `docs/METRICS.md`.
    pub fn register<T>(&self, subsystem: &str, register: impl FnOnce(&mut Registry) -> T) -> T {
        let mut registry = self.registry.lock();
        register(
            registry
                .sub_registry_with_prefix(METRIC_PREFIX)
                .sub_registry_with_prefix(subsystem),
        )
    }

    /// All metrics as OpenMetrics text.
    ///
    /// # Errors
    /// When a metric refuses to be written as text.
    pub fn render_metrics(&self) -> Result<String, fmt::Error> {
        let mut text = String::with_capacity(16 * 1024);
        prometheus_client::encoding::text::encode(&mut text, &self.registry.lock())?;
        Ok(text)
    }
}
