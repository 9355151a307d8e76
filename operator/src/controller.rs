//! The loop: one object of the cluster becomes pods, and its status tells how that went.
//!
//! Data flow: watched `EbpfCollector` and what it owns ▶ [`reconcile`] ▶ checks, Secrets, manifests ([`crate::cluster`]) ▶
//! status and Events. Entry: [`run`]. Of several objects the oldest is served; the others get a condition. A failed reconciliation is
//! tried again after a pause of its own object that doubles up to five minutes.

mod context;

use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use api::collector::{EbpfCollector, EbpfCollectorStatus, condition_reason as reason};
use futures::StreamExt as _;
use jiff::Timestamp;
use k8s_openapi::api::{
    apps::v1::{DaemonSet, StatefulSet},
    core::v1::{Secret, Service, ServiceAccount},
    networking::v1::NetworkPolicy,
};
use kube::{
    Api, Resource, ResourceExt as _,
    api::{Patch, PatchParams},
    runtime::{
        Controller,
        controller::{Action, Error as LoopError},
        reflector::{ObjectRef, Store},
        watcher,
    },
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

pub use self::context::Context;
use crate::{
    certificates::IssueError,
    cluster::{self, ClusterError, failed},
    desired::{self, Inputs},
    events::{self, Deeds},
    inputs::{self, InputsError, Observed},
    metrics::Outcome,
    names, secrets,
    status::{self, Finding, Held, Running},
};

/// How often an object is looked at although nothing changed, and the aggregator is asked: each answer is a write.
const POLL: Duration = Duration::from_secs(60);
/// How soon an object is looked at again that waits for something that is not watched: a Secret, a first delivery.
const SOON: Duration = Duration::from_secs(15);
/// Reason of conditions when the API server refuses what the operator applies.
pub(crate) const APPLY_REFUSED: &str = "ApplyRefused";
const KIND: &str = "EbpfCollector";

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
    let started = Instant::now();
    let result = round(object, all, context, now).await;
    let outcome = match &result {
        Ok(Some(finding)) if finding.held.is_some() => Outcome::Held,
        Ok(_) => Outcome::Applied,
        Err(_) => Outcome::Failed,
    };
    context.metrics.reconciled(outcome, started.elapsed().as_secs_f64());
    let name = object.name_any();
    Ok(match result? {
        // What it owns goes with it.
        None => {
            context.failures.lock().remove(&name);
            Action::await_change()
        }
        Some(finding) => {
            context.failures.lock().remove(&name);
            Action::requeue(if finding.held.is_some() || !settled(&finding) {
                SOON
            } else {
                POLL
            })
        }
    })
}

/// Whether there is nothing to wait for but the next change.
fn settled(finding: &Finding) -> bool {
    let told = finding.running.as_ref().map(|running| running.overview.as_ref());
    told.is_none_or(|told| told.is_ok_and(|summary| summary.last_delivery.is_some()))
}

/// One reconciliation with its status and Events; none if the object is gone or going.
async fn round(
    object: &EbpfCollector,
    all: &[Arc<EbpfCollector>],
    context: &Context,
    now: Timestamp,
) -> Result<Option<Finding>, ReconcileError> {
    let name = object.name_any();
    let api: Api<EbpfCollector> = Api::all(context.client.clone());
    // What the watch brought may be older than the status that the reconciliation before wrote.
    let read = api.get_opt(&name).await;
    let Some(object) = read.map_err(failed("read", KIND, &name))? else {
        return Ok(None);
    };
    if object.metadata.deletion_timestamp.is_some() {
        return Ok(None);
    }
    let mut deeds = Deeds::default();
    let (finding, refused) = match serve(&object, all, context, now, &mut deeds).await {
        Ok(finding) => (finding, None),
        Err(ReconcileError::Cluster(error)) if error.is_refused() => {
            let held = Held {
                reason: APPLY_REFUSED,
                message: error.to_string(),
            };
            let running = observe(&object, context, now).await.ok().flatten();
            let held = Some(held);
            (Finding { held, running }, Some(ReconcileError::Cluster(error)))
        }
        Err(error) => return Err(error),
    };
    let status = status::status(&object, &finding, now);
    let notices = events::notices(object.status.as_ref(), &status, &deeds);
    if differs(object.status.as_ref(), &status) {
        let body = json!({
            "apiVersion": "ebpfcollector.io/v1alpha1",
            "kind": KIND,
            "metadata": { "name": name },
            "status": status,
        });
        let parameters = PatchParams::apply(names::FIELD_MANAGER).force();
        api.patch_status(&name, &parameters, &Patch::Apply(&body))
            .await
            .map_err(failed("write the status of", KIND, &name))?;
        context.metrics.wrote(KIND, "status");
    }
    context.events.publish(&object, notices).await;
    refused.map_or(Ok(Some(finding)), Err)
}

/// Whether the API server would hold something else after a write: times are held there in whole seconds.
fn differs(held: Option<&EbpfCollectorStatus>, status: &EbpfCollectorStatus) -> bool {
    match (held.map(serde_json::to_value), serde_json::to_value(status)) {
        (Some(Ok(held)), Ok(status)) => held != status,
        // What cannot be told as JSON cannot be written either; the write says why.
        _ => true,
    }
}

/// Brings the cluster to what `object` says, if it may be; tells what was found.
async fn serve(
    object: &EbpfCollector,
    all: &[Arc<EbpfCollector>],
    context: &Context,
    now: Timestamp,
    deeds: &mut Deeds,
) -> Result<Finding, ReconcileError> {
    let Context { client, settings, .. } = context;
    let (name, namespace) = (object.name_any(), settings.namespace.as_str());
    if let Some(first) = all.iter().map(Arc::as_ref).chain([object]).min_by_key(|it| age(it))
        && first.name_any() != name
    {
        let first = first.name_any();
        let held = Held {
            reason: reason::CONFLICT,
            message: format!("EbpfCollector {first} is older and is served; delete one of the two"),
        };
        return Ok(Finding {
            held: Some(held),
            running: None,
        });
    }
    if let Some(held) = check(object, context).await? {
        renew(object, context, now, deeds).await?;
        let held = Some(held);
        let running = observe(object, context, now).await?;
        return Ok(Finding { held, running });
    }
    let existing = secrets::existing(client, namespace, &name).await?;
    let material = context.plan(existing, &name, now, deeds)?;
    // The first round makes the Service, if it is new; the second gives its address to the pods.
    let mut address: Option<IpAddr> = None;
    loop {
        let observed = Observed {
            aggregator_address: address,
            material: material.clone(),
        };
        let inputs = match inputs::inputs(object, settings, observed) {
            Ok(inputs) => inputs,
            Err(error @ (InputsError::Invalid(_) | InputsError::NotStored(_))) => {
                let held = Some(invalid(&error));
                return Ok(Finding { held, running: None });
            }
        };
        let manifests = desired::desired(&inputs);
        let live = context.apply(&name, &manifests, deeds).await?;
        let live = |kind: &str| {
            live.iter()
                .find(|live| live.get("kind").is_some_and(|it| it == kind))
                .cloned()
        };
        let now_at = live("Service").as_ref().and_then(cluster_ip);
        if now_at.is_some() && now_at != address {
            address = now_at;
            continue;
        }
        // Before the address is known the pods are not among the manifests, and still wanted.
        if address.is_some() {
            let removed = cluster::prune(client, namespace, &name, &inputs.uid, &manifests, &context.metrics).await?;
            for removed in &removed {
                tracing::info!(object = name, removed, "removed, as it is no longer wanted");
            }
            deeds.removed.extend(removed);
        }
        let running = context
            .running(object, live("DaemonSet"), live("StatefulSet"), address, &material, now)
            .await;
        return Ok(Finding {
            held: None,
            running: Some(running),
        });
    }
}

/// Why the object cannot be served, if it cannot.
async fn check(object: &EbpfCollector, context: &Context) -> Result<Option<Held>, ReconcileError> {
    if let Err(errors) = object.spec.validate() {
        return Ok(Some(invalid(&errors)));
    }
    let Some(reference) = inputs::token_reference(object) else {
        return Ok(None);
    };
    let namespace = context.settings.namespace.as_str();
    let (secret, key) = (reference.name.clone().unwrap_or_default(), inputs::token_key(reference));
    if secrets::has_token(&context.client, namespace, &secret, key).await? {
        return Ok(None);
    }
    Ok(Some(Held {
        reason: reason::SECRET_MISSING,
        message: format!(
            "Secret {secret} in namespace {namespace} has no token at key {key}; spec.dataway.tokenSecretRef names it"
        ),
    }))
}

fn invalid(error: &impl std::fmt::Display) -> Held {
    Held {
        reason: reason::INVALID_SPEC,
        message: error.to_string(),
    }
}

/// Renews the certificates of a held object, if it has any: what runs goes on, and must not lose its connections.
async fn renew(
    object: &EbpfCollector,
    context: &Context,
    now: Timestamp,
    deeds: &mut Deeds,
) -> Result<(), ReconcileError> {
    let (name, namespace) = (object.name_any(), &context.settings.namespace);
    let existing = secrets::existing(&context.client, namespace, &name).await?;
    let (Some(uid), true) = (object.uid(), existing.authority.is_some()) else {
        return Ok(());
    };
    let material = context.plan(existing, &name, now, deeds)?;
    let manifests = desired::certificates(&Inputs::bare(&name, &uid, namespace, material));
    context.apply(&name, &manifests, deeds).await?;
    Ok(())
}

/// What runs of a held object; none if nothing was ever made of it.
async fn observe(object: &EbpfCollector, context: &Context, now: Timestamp) -> Result<Option<Running>, ReconcileError> {
    let Context { client, settings, .. } = context;
    let (name, namespace) = (object.name_any(), settings.namespace.as_str());
    let aggregator = names::aggregator(&name);
    let agents = cluster::read(client, namespace, "DaemonSet", &names::agent(&name)).await?;
    let service = cluster::read(client, namespace, "Service", &aggregator).await?;
    let aggregator = cluster::read(client, namespace, "StatefulSet", &aggregator).await?;
    if agents.is_none() && aggregator.is_none() {
        return Ok(None);
    }
    let existing = secrets::existing(client, namespace, &name).await?;
    let Some(material) = existing.whole() else {
        return Ok(None);
    };
    let address = service.as_ref().and_then(cluster_ip);
    let running = context
        .running(object, agents, aggregator, address, &material, now)
        .await;
    Ok(Some(running))
}

/// What the order of objects goes by: the oldest first, by name where that is not enough.
fn age(object: &EbpfCollector) -> (Option<Timestamp>, String) {
    (object.creation_timestamp().map(|time| time.0), object.name_any())
}

fn cluster_ip(service: &Value) -> Option<IpAddr> {
    service.pointer("/spec/clusterIP")?.as_str()?.parse().ok()
}

#[cfg(test)]
mod tests;
