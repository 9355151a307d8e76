//! What the operator counts of itself; docs/METRICS.md lists the names.

use jiff::Timestamp;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Unit,
};
use telemetry::Telemetry;

use crate::certificates::{Material, inspect};

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct WriteLabels {
    kind: String,
    verb: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct CertificateLabel {
    certificate: &'static str,
}

/// The operator's metrics. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Metrics {
    reconciles: Family<ResultLabel, Counter>,
    durations: Histogram,
    writes: Family<WriteLabels, Counter>,
    certificates: Family<CertificateLabel, Gauge>,
    events: Family<ResultLabel, Counter>,
    leader: Gauge,
}

/// How a reconciliation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The manifests are in the cluster.
    Applied,
    /// They are not, and the object says why.
    Held,
    /// It is tried again.
    Failed,
}

/// What became of an Event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventOutcome {
    /// It was written.
    Written,
    /// The API server did not take it.
    Failed,
    /// There were too many.
    Dropped,
}

// === impl Metrics ===

impl Metrics {
    /// Registers them under `ebpfcollector_operator_`.
    #[must_use]
    pub fn new(telemetry: &Telemetry) -> Self {
        let metrics = Self {
            reconciles: Family::default(),
            durations: Histogram::new([0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0]),
            writes: Family::default(),
            certificates: Family::default(),
            events: Family::default(),
            leader: Gauge::default(),
        };
        telemetry.register("operator", |registry| {
            registry.register("reconciles", "Reconciliations by result", metrics.reconciles.clone());
            registry.register_with_unit(
                "reconcile_duration",
                "Time that a reconciliation took",
                Unit::Seconds,
                metrics.durations.clone(),
            );
            registry.register("writes", "Objects written, by kind and verb", metrics.writes.clone());
            registry.register_with_unit(
                "certificate_not_after",
                "When a certificate in use expires, seconds since the epoch",
                Unit::Seconds,
                metrics.certificates.clone(),
            );
            registry.register("events", "Events by what became of them", metrics.events.clone());
            registry.register("leader", "1 while this operator works", metrics.leader.clone());
        });
        metrics
    }

    /// Counts a reconciliation.
    pub fn reconciled(&self, outcome: Outcome, seconds: f64) {
        let result = match outcome {
            Outcome::Applied => "applied",
            Outcome::Held => "held",
            Outcome::Failed => "failed",
        };
        self.reconciles.get_or_create(&ResultLabel { result }).inc();
        self.durations.observe(seconds);
    }

    /// Counts a write that the API server took.
    pub fn wrote(&self, kind: &str, verb: &'static str) {
        let kind = kind.to_owned();
        self.writes.get_or_create(&WriteLabels { kind, verb }).inc();
    }

    /// Counts an Event.
    pub fn event(&self, outcome: EventOutcome) {
        let result = match outcome {
            EventOutcome::Written => "written",
            EventOutcome::Failed => "failed",
            EventOutcome::Dropped => "dropped",
        };
        self.events.get_or_create(&ResultLabel { result }).inc();
    }

    /// Shows until when the certificates in use are valid.
    pub fn certificates(&self, material: &Material) {
        let all = [
            ("authority", &material.authority.current),
            ("aggregator", &material.aggregator),
            ("agent", &material.agent),
            ("operator", &material.operator),
        ];
        for (certificate, keyed) in all {
            let end = inspect(&keyed.certificate).map_or(0, |it| Timestamp::as_second(it.not_after));
            self.certificates
                .get_or_create(&CertificateLabel { certificate })
                .set(end);
        }
    }

    /// Shows whether this operator works.
    pub fn leads(&self, leads: bool) {
        self.leader.set(i64::from(leads));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::certificates::{Existing, Policy};

    #[test]
    fn every_name_is_documented_and_certificates_show_their_end() {
        let telemetry = Telemetry::new("operator", "0");
        let metrics = Metrics::new(&telemetry);
        metrics.reconciled(Outcome::Applied, 0.1);
        metrics.wrote("Secret", "apply");
        metrics.event(EventOutcome::Dropped);
        metrics.leads(true);
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        let policy = Policy::default();
        let names = ["aggregator".to_owned()];
        metrics.certificates(&Material::plan(Existing::default(), &names, &policy, now).unwrap());
        let text = telemetry.render_metrics().unwrap();
        let end = 1_800_000_000 + policy.leaf.as_secs();
        let line = format!("ebpfcollector_operator_certificate_not_after_seconds{{certificate=\"agent\"}} {end}\n");
        assert!(text.contains(&line), "{text}");
        let document = include_str!("../../docs/METRICS.md");
        let ours = text
            .lines()
            .filter_map(|line| line.strip_prefix("# TYPE ebpfcollector_operator_"));
        let mut count = 0;
        for (name, kind) in ours.filter_map(|line| line.split_once(' ')) {
            let total = if kind == "counter" { "_total" } else { "" };
            let documented = format!("| `ebpfcollector_operator_{name}{total}");
            assert!(document.contains(&documented), "{documented} is not in docs/METRICS.md");
            count += 1;
        }
        assert_eq!(count, 6);
    }
}
