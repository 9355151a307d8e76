//! What reconciliations share: the connection, what was told last, and the steps that need both.

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use api::collector::EbpfCollector;
use jiff::Timestamp;
use kube::{Client, ResourceExt as _};
use parking_lot::Mutex;
use serde_json::Value;

use super::{POLL, ReconcileError, SOON};
use crate::{
    certificates::{Existing, IssueError, Material, Policy},
    cluster::{self, ClusterError},
    events::{Deeds, Events},
    inputs::{self, Settings},
    metrics::Metrics,
    names,
    overview::{self, Summary, Total},
    status::Running,
};

/// First pause after a failure.
const PAUSE_MIN: Duration = Duration::from_secs(1);
/// Longest pause after failures.
const PAUSE_MAX: Duration = Duration::from_secs(300);
/// First pause after the API server refused a request: the same request will not be accepted soon.
const PAUSE_REFUSED: Duration = Duration::from_secs(30);

/// What reconciliations share.
pub struct Context {
    /// Connection to the API server.
    pub client: Client,
    /// The operator's own settings.
    pub settings: Settings,
    /// Lives of certificates.
    pub policy: Policy,
    /// What it counts.
    pub metrics: Metrics,
    pub(super) events: Events,
    /// Failures in a row, by object; entries go with the object or with success.
    pub(super) failures: Mutex<BTreeMap<String, u32>>,
    /// What the aggregator of the object served told last.
    told: Mutex<Option<Told>>,
}

/// An answer of the aggregator, or why there was none.
#[derive(Clone)]
struct Told {
    uid: String,
    at: Timestamp,
    overview: Result<Summary, String>,
    total: Option<Total>,
}

// === impl Context ===

impl Context {
    /// With the usual lives of certificates. `instance` is the operator's pod.
    #[must_use]
    pub fn new(client: Client, settings: Settings, instance: Option<String>, metrics: Metrics) -> Self {
        Self {
            events: Events::new(client.clone(), instance, metrics.clone()),
            client,
            settings,
            policy: Policy::default(),
            metrics,
            failures: Mutex::default(),
            told: Mutex::default(),
        }
    }

    /// The certificates that the object `name` must have.
    pub(super) fn plan(
        &self,
        existing: Existing,
        name: &str,
        now: Timestamp,
        deeds: &mut Deeds,
    ) -> Result<Material, IssueError> {
        let server_names = names::server_names(name, &self.settings.namespace);
        let material = Material::plan(existing, &server_names, &self.policy, now)?;
        for change in &material.changes {
            tracing::info!(object = name, ?change, "certificates change");
        }
        self.metrics.certificates(&material);
        deeds.certificates.extend(material.changes.iter().cloned());
        Ok(material)
    }

    /// Applies manifests of the object `name`; returns the live objects.
    pub(super) async fn apply(
        &self,
        name: &str,
        manifests: &[Value],
        deeds: &mut Deeds,
    ) -> Result<Vec<Value>, ClusterError> {
        let applied = cluster::apply(&self.client, &self.settings.namespace, manifests, &self.metrics).await?;
        for write in &applied.written {
            tracing::info!(object = name, write = write.shown(), why = ?write.why, "applied");
        }
        deeds.written.extend(applied.written);
        Ok(applied.live)
    }

    /// What runs, with what the aggregator tells of it.
    pub(super) async fn running(
        &self,
        object: &EbpfCollector,
        agents: Option<Value>,
        aggregator: Option<Value>,
        address: Option<IpAddr>,
        material: &Material,
        now: Timestamp,
    ) -> Running {
        let mut missing = inputs::without_effect(object);
        missing.extend(object.spec.features_not_built().unwrap_or_default());
        let ready = aggregator
            .as_ref()
            .and_then(|it| it.pointer("/status/readyReplicas")?.as_i64());
        let overview = match address.filter(|_| ready.is_some_and(|ready| ready > 0)) {
            Some(address) => self.ask(object, address, material, now).await,
            None => Err("the aggregator's pod is not ready".to_owned()),
        };
        Running {
            agents,
            aggregator,
            missing,
            overview,
        }
    }

    /// What the aggregator tells; what it told lately is still good.
    async fn ask(
        &self,
        object: &EbpfCollector,
        address: IpAddr,
        material: &Material,
        now: Timestamp,
    ) -> Result<Summary, String> {
        let uid = object.uid().unwrap_or_default();
        let generation = object.metadata.generation.unwrap_or_default();
        let before = self.told.lock().clone().filter(|told| told.uid == uid);
        // Some leeway, so that the next look at the object is not just too early.
        let fresh = |told: &&Told| {
            let settled = told
                .overview
                .as_ref()
                .is_ok_and(|told| told.last_delivery.is_some() && told.behind(generation) == 0);
            let period = if settled { POLL } else { SOON };
            now.duration_since(told.at).as_secs_f64() < period.as_secs_f64() * 0.9
        };
        if let Some(told) = before.as_ref().filter(fresh) {
            return told.overview.clone();
        }
        let server_names = names::server_names(&object.name_any(), &self.settings.namespace);
        let server_name = server_names.first().map(String::as_str).unwrap_or_default();
        let answer = overview::fetch(overview::endpoint(address), server_name, material).await;
        let total = before.and_then(|told| told.total);
        let (overview, total) = match answer {
            Ok(report) => {
                let (summary, total) = overview::summarize(&report, total, now);
                (Ok(summary), Some(total))
            }
            Err(error) => (Err(error.to_string()), total),
        };
        *self.told.lock() = Some(Told {
            uid,
            at: now,
            overview: overview.clone(),
            total,
        });
        overview
    }

    /// How long the object waits after `error`; longer with each failure in a row.
    pub(super) fn pause(&self, name: &str, error: &ReconcileError) -> Duration {
        let mut failures = self.failures.lock();
        let count = failures.entry(name.to_owned()).or_default();
        let refused = matches!(error, ReconcileError::Cluster(error) if error.is_refused());
        let first = if refused { PAUSE_REFUSED } else { PAUSE_MIN };
        let pause = first.saturating_mul(1 << (*count).min(16));
        *count = count.saturating_add(1);
        pause.min(PAUSE_MAX)
    }
}
