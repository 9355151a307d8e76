//! What the plugin says about itself.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
};
use telemetry::Telemetry;

/// Metrics of the plugin.
#[derive(Clone, Debug, Default)]
pub struct ConntrackMetrics {
    pub(super) entries: Gauge,
    pub(super) namespaces: Gauge,
    pub(super) events: Counter,
    pub(super) malformed: Counter,
    pub(super) overruns: Counter,
    pub(super) dumps: Family<HowLabel, Counter>,
    pub(super) refused: Counter,
    pub(super) late: Counter,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct HowLabel {
    pub(super) result: &'static str,
}

impl ConntrackMetrics {
    /// Registers the metrics.
    #[must_use]
    pub fn new(telemetry: &Telemetry) -> Self {
        let this = Self::default();
        telemetry.register("conntrack", |r| {
            r.register("entries", "Translated connections that are known", this.entries.clone());
            r.register(
                "namespaces",
                "Network namespaces that are heard of",
                this.namespaces.clone(),
            );
            r.register(
                "events",
                "Connections that the kernel told of, made or ended",
                this.events.clone(),
            );
            r.register(
                "malformed",
                "Messages of the kernel that could not be read",
                this.malformed.clone(),
            );
            r.register(
                "overruns",
                "Times the kernel had more to tell than its buffer holds; all is asked for anew then",
                this.overruns.clone(),
            );
            r.register("dumps", "Dumps of a network namespace", this.dumps.clone());
            r.register(
                "refused",
                "Translated connections that found no room; they are reported without their translation",
                this.refused.clone(),
            );
            r.register(
                "late",
                "Times a capture did not wait any longer for the reader",
                this.late.clone(),
            );
        });
        this
    }
}
