//! The loop: one object of the cluster becomes pods, and its status tells how that went.
//!
//! Data flow: watched `EbpfCollector` and what it owns ▶ [`reconcile`] ▶ checks, Secrets, manifests ([`crate::cluster`]) ▶
//! status. Entry: [`run`]. Of several objects the oldest is served; the others get a condition. A failed reconciliation is
//! tried again after a pause of its own object that doubles up to [`PAUSE_MAX`].

use std::{collections::BTreeMap, net::IpAddr, sync::Arc, time::Duration};

use api::collector::{EbpfCollector, condition_reason as reason};
use futures::StreamExt as _;
use jiff::Timestamp;
use k8s_openapi::api::{
    apps::v1::{DaemonSet, StatefulSet},
    core::v1::{Secret, Service, ServiceAccount},
    networking::v1::NetworkPolicy,
};
use kube::{
    Api, Client, Resource, ResourceExt as _,
    api::{Patch, PatchParams},
    runtime::{
        Controller,
        controller::{Action, Error as LoopError},
        reflector::{ObjectRef, Store},
        watcher,
    },
};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::{
    certificates::{IssueError, Material, Policy},
    cluster::{self, ClusterError, failed},
    desired::{self, Inputs},
    inputs::{self, InputsError, Observed, Settings},
    names,
    overview::{self, Summary, Total},
    secrets,
    status::{self, Finding},
};

/// How often an object is looked at although nothing changed, and the aggregator is asked: each answer is a write.
const POLL: Duration = Duration::from_secs(60);
/// How soon an object is looked at again that waits for something that is not watched.
const HELD: Duration = Duration::from_secs(15);
/// First pause after a failure.
const PAUSE_MIN: Duration = Duration::from_secs(1);
/// Longest pause after failures.
const PAUSE_MAX: Duration = Duration::from_secs(300);
/// First pause after the API server refused a request: the same request will not be accepted soon.
const PAUSE_REFUSED: Duration = Duration::from_secs(30);
/// Reason of conditions when the API server refuses what the operator applies.
const APPLY_REFUSED: &str = "ApplyRefused";

/// A reconciliation did not get to its end.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    /// A request failed.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// A certificate cannot be made.
    #[error(transparent)]
    Issue(#[from] IssueError),
}

/// What reconciliations share.
pub struct Context {
    /// Connection to the API server.
    pub client: Client,
    /// The operator's own settings.
    pub settings: Settings,
    /// Lives of certificates.
    pub policy: Policy,
    /// Failures in a row, by object; entries go with the object or with success.
    failures: Mutex<BTreeMap<String, u32>>,
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

/// Watches and reconciles until `cancel`.
pub async fn run(context: Context, cancel: CancellationToken) {
    let (client, namespace) = (context.client.clone(), context.settings.namespace.clone());
    let ours = watcher::Config::default().labels(&format!("app.kubernetes.io/managed-by={}", names::FIELD_MANAGER));
    let controller = Controller::new(
        Api::<EbpfCollector>::all(client.clone()),
        watcher::Config::default().any_semantic(),
    );
    let objects = controller.store();
    let context = Arc::new(context);
    controller
        .watches(
            Api::<DaemonSet>::namespaced(client.clone(), &namespace),
            ours.clone(),
            served,
        )
        .watches(
            Api::<StatefulSet>::namespaced(client.clone(), &namespace),
            ours.clone(),
            served,
        )
        .watches(
            Api::<Service>::namespaced(client.clone(), &namespace),
            ours.clone(),
            served,
        )
        .watches(
            Api::<ServiceAccount>::namespaced(client.clone(), &namespace),
            ours.clone(),
            served,
        )
        .watches(
            Api::<NetworkPolicy>::namespaced(client.clone(), &namespace),
            ours.clone(),
            served,
        )
        .watches(Api::<Secret>::namespaced(client, &namespace), ours, served)
        .graceful_shutdown_on(cancel.cancelled_owned())
        .run(
            move |object, context| {
                let objects: Store<EbpfCollector> = objects.clone();
                async move { reconcile(&object, &objects.state(), &context, Timestamp::now()).await }
            },
            |object, error, context| Action::requeue(context.pause(&object.name_any(), error)),
            context,
        )
        .for_each(|result| async move {
            match result {
                Ok(_) => {}
                Err(LoopError::ObjectNotFound(_)) => tracing::debug!("an object went before its turn"),
                Err(LoopError::ReconcilerFailed(error, object)) => {
                    tracing::error!(object = object.name, %error, "reconciliation failed");
                }
                Err(error) => tracing::warn!(%error, "a watch or the work queue failed, it is tried again"),
            }
        })
        .await;
}

/// The object that something was made for. `Controller::owns` would add the namespace of what is owned to the name, and the
/// cluster-scoped object would stand in the queue twice: two reconciliations at once.
fn served<K: Resource>(owned: K) -> Option<ObjectRef<EbpfCollector>> {
    let owners = owned.meta().owner_references.as_deref().unwrap_or_default();
    owners
        .iter()
        .find_map(|owner| ObjectRef::from_owner_ref(None, owner, ()))
}

/// Brings the cluster to what `object` says, as far as that is possible now. `all` are the objects of the cluster.
///
/// # Errors
/// [`ReconcileError`] when it is to be tried again.
pub async fn reconcile(
    object: &EbpfCollector,
    all: &[Arc<EbpfCollector>],
    context: &Context,
    now: Timestamp,
) -> Result<Action, ReconcileError> {
    let name = object.name_any();
    if object.metadata.deletion_timestamp.is_some() {
        // What it owns goes with it.
        context.failures.lock().remove(&name);
        return Ok(Action::await_change());
    }
    let found = find(object, all, context, now).await;
    let finding = match &found {
        Ok(finding) => finding.clone(),
        Err(ReconcileError::Cluster(error)) if error.is_refused() => Finding::Held {
            reason: APPLY_REFUSED,
            message: error.to_string(),
        },
        Err(_) => return found.map(|_| Action::await_change()),
    };
    let status = status::status(object, &finding, now);
    if object.status.as_ref() != Some(&status) {
        let body = json!({
            "apiVersion": "ebpfcollector.io/v1alpha1",
            "kind": "EbpfCollector",
            "metadata": { "name": name },
            "status": status,
        });
        let api: Api<EbpfCollector> = Api::all(context.client.clone());
        let parameters = PatchParams::apply(names::FIELD_MANAGER).force();
        api.patch_status(&name, &parameters, &Patch::Apply(&body))
            .await
            .map_err(failed("write the status of", "EbpfCollector", &name))?;
    }
    found?;
    context.failures.lock().remove(&name);
    Ok(Action::requeue(match finding {
        Finding::Held { .. } => HELD,
        Finding::Applied { .. } => POLL,
    }))
}

async fn find(
    object: &EbpfCollector,
    all: &[Arc<EbpfCollector>],
    context: &Context,
    now: Timestamp,
) -> Result<Finding, ReconcileError> {
    let Context { client, settings, .. } = context;
    let (name, namespace) = (object.name_any(), settings.namespace.as_str());
    let held = |reason, message| Ok(Finding::Held { reason, message });
    if let Some(first) = all.iter().map(Arc::as_ref).chain([object]).min_by_key(|it| age(it))
        && first.name_any() != name
    {
        let first = first.name_any();
        let message = format!("EbpfCollector {first} is older and is served; delete one of the two");
        return held(reason::CONFLICT, message);
    }
    if let Err(errors) = object.spec.validate() {
        return held(reason::INVALID_SPEC, errors.to_string());
    }
    let mut token_hash = None;
    if let Some(reference) = inputs::token_reference(object) {
        let (secret, key) = (reference.name.clone().unwrap_or_default(), inputs::token_key(reference));
        token_hash = secrets::token_hash(client, namespace, &secret, key).await?;
        if token_hash.is_none() {
            let message = format!(
                "Secret {secret} in namespace {namespace} has no token at key {key}; spec.dataway.tokenSecretRef names it"
            );
            return held(reason::SECRET_MISSING, message);
        }
    }
    let existing = secrets::existing(client, namespace, &name).await?;
    let material = Material::plan(existing, &names::server_names(&name, namespace), &context.policy, now)?;
    for change in &material.changes {
        tracing::info!(object = name, ?change, "certificates change");
    }
    // The first round makes the Service, if it is new; the second gives its address to the agents.
    let mut address: Option<IpAddr> = None;
    loop {
        let observed = Observed {
            aggregator_address: address,
            token_hash: token_hash.clone(),
            material: material.clone(),
        };
        let inputs = match inputs::inputs(object, settings, observed) {
            Ok(inputs) => inputs,
            Err(error @ (InputsError::Invalid(_) | InputsError::NotStored(_))) => {
                return held(reason::INVALID_SPEC, error.to_string());
            }
        };
        let manifests = desired::desired(&inputs);
        let applied = cluster::apply(client, namespace, &manifests).await?;
        for write in &applied.written {
            tracing::info!(object = name, write, "applied");
        }
        let live = |kind: &str| {
            applied
                .live
                .iter()
                .find(|live| live.get("kind").is_some_and(|it| it == kind))
                .cloned()
        };
        let now_at = live("Service").as_ref().and_then(cluster_ip);
        if now_at.is_some() && now_at != address {
            address = now_at;
            continue;
        }
        // Before the address is known the agents are not among the manifests, and still wanted.
        if address.is_some() {
            for removed in cluster::prune(client, namespace, &name, &inputs.uid, &manifests).await? {
                tracing::info!(object = name, removed, "removed, as it is no longer wanted");
            }
        }
        let mut missing = inputs::without_effect(object);
        missing.extend(object.spec.features_not_built().unwrap_or_default());
        let aggregator = live("StatefulSet");
        let ready = aggregator
            .as_ref()
            .and_then(|it| it.pointer("/status/readyReplicas")?.as_i64());
        let overview = match address.filter(|_| ready.is_some_and(|ready| ready > 0)) {
            Some(address) => context.ask(&inputs, address, now).await,
            None => Err("the aggregator's pod is not ready".to_owned()),
        };
        return Ok(Finding::Applied {
            agents: live("DaemonSet"),
            aggregator,
            missing,
            overview,
        });
    }
}

/// What the order of objects goes by: the oldest first, by name where that is not enough.
fn age(object: &EbpfCollector) -> (Option<Timestamp>, String) {
    (object.creation_timestamp().map(|time| time.0), object.name_any())
}

fn cluster_ip(service: &Value) -> Option<IpAddr> {
    service.pointer("/spec/clusterIP")?.as_str()?.parse().ok()
}

// === impl Context ===

impl Context {
    /// With the usual lives of certificates.
    #[must_use]
    pub fn new(client: Client, settings: Settings) -> Self {
        Self {
            client,
            settings,
            policy: Policy::default(),
            failures: Mutex::default(),
            told: Mutex::default(),
        }
    }

    /// What the aggregator tells; what it told less than [`POLL`] ago is still good.
    async fn ask(&self, inputs: &Inputs, address: IpAddr, now: Timestamp) -> Result<Summary, String> {
        let before = self.told.lock().clone().filter(|told| told.uid == inputs.uid);
        // Some leeway, so that the next look at the object is not just too early.
        let fresh = |told: &Told| now.duration_since(told.at).as_secs_f64() < POLL.as_secs_f64() * 0.9;
        if let Some(told) = before.as_ref().filter(|told| fresh(told)) {
            return told.overview.clone();
        }
        let server_names = names::server_names(&inputs.name, &inputs.namespace);
        let server_name = server_names.first().map(String::as_str).unwrap_or_default();
        let answer = overview::fetch(overview::endpoint(address), server_name, &inputs.material).await;
        let total = before.and_then(|told| told.total);
        let (overview, total) = match answer {
            Ok(report) => {
                let (summary, total) = overview::summarize(&report, total, now);
                (Ok(summary), Some(total))
            }
            Err(error) => (Err(error.to_string()), total),
        };
        *self.told.lock() = Some(Told {
            uid: inputs.uid.clone(),
            at: now,
            overview: overview.clone(),
            total,
        });
        overview
    }

    /// How long the object waits after `error`; longer with each failure in a row.
    fn pause(&self, name: &str, error: &ReconcileError) -> Duration {
        let mut failures = self.failures.lock();
        let count = failures.entry(name.to_owned()).or_default();
        let refused = matches!(error, ReconcileError::Cluster(error) if error.is_refused());
        let first = if refused { PAUSE_REFUSED } else { PAUSE_MIN };
        let pause = first.saturating_mul(1 << (*count).min(16));
        *count = count.saturating_add(1);
        pause.min(PAUSE_MAX)
    }
}

#[cfg(test)]
mod tests;
