//! The manifests in the cluster: server-side apply of what differs, removal of what is no longer wanted.
//!
//! Data flow: manifests ▶ read each live one ▶ [`drift::is_current`] ▶ apply only where it is not, under the field
//! manager [`names::FIELD_MANAGER`] ▶ [`Applied`]. [`prune`] removes what carries our labels, belongs to the object and is
//! not among the manifests.

use k8s_openapi::api::{
    apps::v1::{DaemonSet, StatefulSet},
    core::v1::{PersistentVolumeClaim, Secret, Service, ServiceAccount},
    networking::v1::NetworkPolicy,
    policy::v1::PodDisruptionBudget,
    rbac::v1::{ClusterRole, ClusterRoleBinding},
};
use kube::{
    Api, Client, Resource, ResourceExt as _,
    api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, Preconditions},
    core::ApiResource,
};
use serde_json::Value;

use crate::{drift, metrics::Metrics, names};

/// A request to the API server failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {verb} {kind} {name}: {source}")]
pub struct ClusterError {
    /// What was tried.
    pub verb: &'static str,
    /// Kind of the object.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// What the API server or the connection to it said.
    #[source]
    pub source: Box<kube::Error>,
}

/// What became of the manifests.
#[derive(Clone, Debug, Default)]
pub struct Applied {
    /// The objects as the API server holds them now, in the order of the manifests.
    pub live: Vec<Value>,
    /// What was written.
    pub written: Vec<Written>,
}

/// An object that was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Its kind.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// Why it was.
    pub why: Why,
}

/// Why an object was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// It did not exist.
    Missing,
    /// Something else is wanted than was applied last.
    Changed,
    /// Somebody else changed it, at this path.
    Drifted(String),
}

/// Kinds of the manifests, each with whether it is in a namespace.
#[must_use]
pub fn kinds() -> [(ApiResource, bool); 10] {
    fn of<K: Resource<DynamicType = ()>>() -> ApiResource {
        ApiResource::erase::<K>(&())
    }
    [
        (of::<DaemonSet>(), true),
        (of::<StatefulSet>(), true),
        (of::<Service>(), true),
        (of::<NetworkPolicy>(), true),
        (of::<PodDisruptionBudget>(), true),
        (of::<PersistentVolumeClaim>(), true),
        (of::<ServiceAccount>(), true),
        (of::<Secret>(), true),
        (of::<ClusterRoleBinding>(), false),
        (of::<ClusterRole>(), false),
    ]
}

/// Brings the cluster to the manifests, in their order. Objects that are as wanted are not written.
///
/// # Errors
/// [`ClusterError`] of the first request that failed; what came before it stays applied.
pub async fn apply(
    client: &Client,
    namespace: &str,
    manifests: &[Value],
    metrics: &Metrics,
) -> Result<Applied, ClusterError> {
    let mut applied = Applied::default();
    let parameters = PatchParams::apply(names::FIELD_MANAGER).force();
    for manifest in manifests {
        let (kind, name) = (text(manifest, "/kind"), text(manifest, "/metadata/name"));
        let Some((resource, namespaced)) = kinds().into_iter().find(|(resource, _)| resource.kind == kind) else {
            continue;
        };
        let api = api(client, namespace, &resource, namespaced);
        let live = api.get_opt(name).await.map_err(failed("read", kind, name))?;
        let live = live.map(|live| json(&live));
        let why = match live {
            Some(live) => match drift::is_current(manifest, &live) {
                Ok(()) => {
                    applied.live.push(live);
                    continue;
                }
                Err(_) if drift::applied_hash(manifest) != drift::applied_hash(&live) => Why::Changed,
                Err(path) => Why::Drifted(path),
            },
            None => Why::Missing,
        };
        let written = api.patch(name, &parameters, &Patch::Apply(manifest)).await;
        applied.live.push(json(&written.map_err(failed("apply", kind, name))?));
        metrics.wrote(kind, "apply");
        applied.written.push(Written {
            kind: kind.to_owned(),
            name: name.to_owned(),
            why,
        });
    }
    Ok(applied)
}

/// Removes what was made for the object `instance` with identity `uid` and is not among `manifests`. Says what.
///
/// # Errors
/// [`ClusterError`] of the first request that failed.
pub async fn prune(
    client: &Client,
    namespace: &str,
    instance: &str,
    uid: &str,
    manifests: &[Value],
    metrics: &Metrics,
) -> Result<Vec<String>, ClusterError> {
    let mut removed = Vec::new();
    let ours = ListParams::default().labels(&names::everything(instance));
    // What has no namespace is always wanted, and goes with the object.
    for (resource, namespaced) in kinds().into_iter().filter(|(_, namespaced)| *namespaced) {
        let kind = resource.kind.clone();
        let api = api(client, namespace, &resource, namespaced);
        let found = api.list(&ours).await.map_err(failed("list", &kind, ""))?;
        for object in found {
            let name = object.name_any();
            let wanted = |m: &Value| text(m, "/kind") == kind && text(m, "/metadata/name") == name;
            // Labels can be copied; the owner cannot be mistaken.
            let owned = object.owner_references().iter().any(|owner| owner.uid == uid);
            let going = object.metadata.deletion_timestamp.is_some();
            if !owned || going || manifests.iter().any(wanted) {
                continue;
            }
            let parameters = DeleteParams {
                preconditions: Some(Preconditions {
                    uid: object.uid(),
                    resource_version: None,
                }),
                ..DeleteParams::background()
            };
            match api.delete(&name, &parameters).await {
                Ok(_) => {
                    metrics.wrote(&kind, "delete");
                    removed.push(format!("{kind} {name}"));
                }
                Err(kube::Error::Api(status)) if status.is_not_found() => {}
                Err(error) => return Err(failed("delete", &kind, &name)(error)),
            }
        }
    }
    Ok(removed)
}

/// The object `name` of a kind among [`kinds`] that is in a namespace, if there is one.
///
/// # Errors
/// [`ClusterError`] when the request failed.
pub async fn read(client: &Client, namespace: &str, kind: &str, name: &str) -> Result<Option<Value>, ClusterError> {
    let Some((resource, namespaced)) = kinds().into_iter().find(|(resource, _)| resource.kind == kind) else {
        return Ok(None);
    };
    let live = api(client, namespace, &resource, namespaced).get_opt(name).await;
    Ok(live.map_err(failed("read", kind, name))?.map(|live| json(&live)))
}

/// Makes a [`ClusterError`] of a failed request.
pub(crate) fn failed(verb: &'static str, kind: &str, name: &str) -> impl FnOnce(kube::Error) -> ClusterError {
    move |source| ClusterError {
        verb,
        kind: kind.to_owned(),
        name: name.to_owned(),
        source: Box::new(source),
    }
}

fn api(client: &Client, namespace: &str, resource: &ApiResource, namespaced: bool) -> Api<DynamicObject> {
    if namespaced {
        Api::namespaced_with(client.clone(), namespace, resource)
    } else {
        Api::all_with(client.clone(), resource)
    }
}

fn json(object: &DynamicObject) -> Value {
    serde_json::to_value(object).unwrap_or_default()
}

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

// === impl Written ===

impl Written {
    /// Kind and name, and where it differed.
    #[must_use]
    pub fn shown(&self) -> String {
        match &self.why {
            Why::Missing | Why::Changed => format!("{} {}", self.kind, self.name),
            Why::Drifted(path) => format!("{} {} ({path})", self.kind, self.name),
        }
    }
}

// === impl ClusterError ===

impl ClusterError {
    /// Whether the API server understood the request and will not accept it: a retry at once helps nobody.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        matches!(&*self.source, kube::Error::Api(status) if matches!(status.code, 400 | 401 | 403 | 422))
    }
}

#[cfg(test)]
pub(crate) mod tests;
