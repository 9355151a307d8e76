//! What identity says about itself: metrics and health.

use std::sync::atomic::AtomicU64;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{family::Family, gauge::Gauge},
};
use telemetry::{ComponentHandle, Telemetry};

use super::Names;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

/// Brings metrics and health up to date.
#[derive(Debug)]
pub struct Report {
    names: Names,
    health: ComponentHandle,
    pods: Gauge,
    history: Gauge,
    history_dropped: Gauge,
    cgroups: Gauge,
    cgroups_refused: Gauge,
    unwatched: Gauge,
    lists: Family<KindLabel, Gauge>,
    errors: Family<KindLabel, Gauge>,
    age: Family<KindLabel, Gauge<f64, AtomicU64>>,
}

impl Report {
    /// Registers the metrics. Call it once per process.
    #[must_use]
    pub fn new(names: Names, telemetry: &Telemetry) -> Self {
        let this = Self {
            names,
            health: telemetry.health.component("identity"),
            pods: Gauge::default(),
            history: Gauge::default(),
            history_dropped: Gauge::default(),
            cgroups: Gauge::default(),
            cgroups_refused: Gauge::default(),
            unwatched: Gauge::default(),
            lists: Family::default(),
            errors: Family::default(),
            age: Family::default(),
        };
        telemetry.register("identity", |registry| {
            let mut gauge = |name: &str, help: &str, gauge: &Gauge| registry.register(name, help, gauge.clone());
            gauge("pods", "Pods of the cluster that live", &this.pods);
            gauge(
                "pods_ended",
                "Pods that ended and still name their flows",
                &this.history,
            );
            gauge(
                "pods_forgotten",
                "Ended pods forgotten before their time for lack of room",
                &this.history_dropped,
            );
            gauge("cgroups", "Cgroups of pods that are known", &this.cgroups);
            gauge(
                "cgroups_refused",
                "Cgroups left out for lack of room",
                &this.cgroups_refused,
            );
            gauge(
                "cgroups_unwatched",
                "Directories of cgroups that could not be watched: what is new there is found some seconds late",
                &this.unwatched,
            );
            registry.register("lists", "Complete lists of the Kubernetes API", this.lists.clone());
            registry.register(
                "watch_errors",
                "Failed requests and cut streams since the last event",
                this.errors.clone(),
            );
            registry.register(
                "last_event_seconds",
                "Time since the last event; a quiet kind ages too",
                this.age.clone(),
            );
        });
        this.update();
        this
    }

    /// Brings metrics and health up to date.
    pub fn update(&self) {
        let integer = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        let counts = self.names.counts();
        self.pods.set(integer(counts.pods as u64));
        self.history.set(integer(counts.history as u64));
        self.history_dropped.set(integer(counts.history_dropped));
        let (cgroups, refused) = self.names.cgroups();
        self.cgroups.set(integer(cgroups as u64));
        self.cgroups_refused.set(integer(refused));
        self.unwatched.set(integer(self.names.unwatched()));
        let (mut unlisted, mut failing) = (Vec::new(), Vec::new());
        for kind in self.names.kinds() {
            let health = self.names.health(kind);
            let label = KindLabel { kind: kind.as_str() };
            self.lists.get_or_create(&label).set(integer(health.lists));
            self.errors
                .get_or_create(&label)
                .set(integer(health.errors_since_event));
            if let Some(age) = health.last_event {
                self.age.get_or_create(&label).set(age.as_secs_f64());
            }
            if health.lists == 0 {
                unlisted.push(kind.as_str());
            } else if health.errors_since_event > 0 {
                failing.push(kind.as_str());
            }
        }
        if !unlisted.is_empty() {
            self.health.set_degraded(format!(
                "not listed yet: {}; see the log for what the Kubernetes API answers",
                unlisted.join(", ")
            ));
        } else if !failing.is_empty() {
            self.health.set_degraded(format!(
                "watch fails: {}; names stay those last known",
                failing.join(", ")
            ));
        } else {
            self.health.set_ok();
        }
    }
}
