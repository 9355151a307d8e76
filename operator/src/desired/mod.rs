//! What must exist for one object: a pure function from [`Inputs`] to manifests.
//!
//! Data flow: object and operator's own settings ▶ [`Inputs`] ▶ [`desired`] ▶ JSON manifests, each with its hash
//! ([`crate::drift`]). Nothing that running agents take over by themselves (plugins, namespaces, interval, tags, sampling)
//! is an input: a change of those must not touch a pod.

mod agent;
mod aggregator;
mod rbac;

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::{
    certificates::{KeyedCertificate, Material},
    drift,
    names::{self, Component},
};

/// All that the manifests depend on.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// Name of the object.
    pub name: String,
    /// Its identity, for owner references.
    pub uid: String,
    /// Where everything is put: the operator's own namespace.
    pub namespace: String,
    /// Image with every program.
    pub image: String,
    /// `imagePullPolicy`, if it is not the cluster's default.
    pub image_pull_policy: Option<String>,
    /// SELinux type of the agents on nodes that enforce it (`spc_t`).
    pub selinux_type: Option<String>,
    /// Cluster address of the aggregator's Service; without it there are no agents yet. An address and not a name:
    /// agents have the node's network, and work when the cluster's DNS does not.
    pub aggregator_address: Option<std::net::IpAddr>,
    /// Certificates and keys.
    pub material: Material,
    /// The agents.
    pub agent: AgentInputs,
    /// The aggregator.
    pub aggregator: AggregatorInputs,
}

/// What the agents' pods depend on.
#[derive(Clone, Debug, Default)]
pub struct AgentInputs {
    /// `resources` of the container.
    pub resources: Option<Value>,
    /// Further flags, such as kernel map sizes: what only a restart can change.
    pub arguments: Vec<String>,
    /// Linux capabilities besides those in docs/CAPABILITIES.md.
    pub extra_capabilities: Vec<String>,
    /// Labels of the nodes to run on; empty for all.
    pub node_selector: BTreeMap<String, String>,
    /// Tolerations; all taints are tolerated unless given.
    pub tolerations: Option<Value>,
}

/// What the aggregator's pod depends on.
#[derive(Clone, Debug, Default)]
pub struct AggregatorInputs {
    /// `resources` of the container.
    pub resources: Option<Value>,
    /// Flags for outputs and queue. They hold no secret.
    pub arguments: Vec<String>,
    /// The Secret with the DataWay token.
    pub token: Option<TokenSecret>,
    /// Disk of the queue; the pod's own directory unless given.
    pub volume: Option<QueueVolume>,
}

/// A key of a Secret in the operator's namespace.
#[derive(Clone, Debug)]
pub struct TokenSecret {
    /// Name of the Secret.
    pub name: String,
    /// Key in it.
    pub key: String,
    /// Hash of its data: a new token restarts the aggregator, which reads it once.
    pub hash: String,
}

/// A claim for the queue's disk.
#[derive(Clone, Debug)]
pub struct QueueVolume {
    /// Size, as a quantity.
    pub size: String,
    /// Storage class; the cluster's default unless given.
    pub storage_class: Option<String>,
}

/// Everything that must exist for `inputs`, in the order to apply it: leaves before the authority
/// ([`crate::certificates`]), what pods use before the pods.
#[must_use]
pub fn desired(inputs: &Inputs) -> Vec<Value> {
    let mut objects = secrets(inputs);
    objects.extend(rbac::manifests(inputs));
    objects.extend(aggregator::manifests(inputs));
    objects.extend(agent::manifest(inputs));
    objects.into_iter().map(drift::with_hash).collect()
}

fn secrets(inputs: &Inputs) -> Vec<Value> {
    let Inputs { name, material, .. } = inputs;
    let authority = &material.authority;
    let bundle = authority.bundle();
    let leaf = |suffix: &str, component, leaf: &KeyedCertificate| {
        let data = json!({
            "tls.crt": base64(&leaf.certificate),
            "tls.key": base64(&leaf.key),
            "ca.crt": base64(&bundle),
        });
        secret(inputs, &format!("{name}-{suffix}"), component, data)
    };
    let mut held = json!({
        "tls.crt": base64(&authority.current.certificate),
        "tls.key": base64(&authority.current.key),
        "stepped": base64(&authority.stepped.to_string()),
    });
    if let Value::Object(held) = &mut held {
        if let Some(next) = &authority.next {
            held.insert("next.crt".to_owned(), base64(&next.certificate));
            held.insert("next.key".to_owned(), base64(&next.key));
        }
        if let Some(previous) = &authority.previous {
            held.insert("previous.crt".to_owned(), base64(previous));
        }
    }
    vec![
        leaf("aggregator-tls", Component::Aggregator, &material.aggregator),
        leaf("agent-tls", Component::Agent, &material.agent),
        leaf("operator-tls", Component::Common, &material.operator),
        secret(inputs, &format!("{name}-authority"), Component::Common, held),
    ]
}

fn secret(inputs: &Inputs, name: &str, component: Component, data: Value) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": metadata(inputs, name, component),
        "type": "kubernetes.io/tls",
        "data": data,
    })
}

/// Metadata of an object in the operator's namespace.
fn metadata(inputs: &Inputs, name: &str, component: Component) -> Value {
    json!({
        "name": name,
        "namespace": inputs.namespace,
        "labels": names::labels(&inputs.name, component),
        "ownerReferences": owners(inputs),
    })
}

/// The object owns everything: the garbage collector removes it all with the object.
fn owners(inputs: &Inputs) -> Value {
    json!([{
        "apiVersion": "ebpfcollector.io/v1alpha1",
        "kind": "EbpfCollector",
        "name": inputs.name,
        "uid": inputs.uid,
        "controller": true,
        "blockOwnerDeletion": true,
    }])
}

/// A container of ours: `capabilities` are all it has; nothing of its own file system can be written.
fn security_context(capabilities: &[String]) -> Value {
    let mut granted = json!({ "drop": ["ALL"] });
    if !capabilities.is_empty() {
        put(&mut granted, "add", json!(capabilities));
    }
    json!({
        "allowPrivilegeEscalation": false,
        "privileged": false,
        "readOnlyRootFilesystem": true,
        "capabilities": granted,
        "seccompProfile": { "type": "RuntimeDefault" },
    })
}

/// Probes of a program whose admin server listens on [`names::ADMIN_PORT`] of `host`, or of the pod.
fn probe(path: &str, host: Option<&str>, failures: u32) -> Value {
    let mut get = json!({ "path": path, "port": names::ADMIN_PORT, "scheme": "HTTP" });
    if let Some(host) = host {
        put(&mut get, "host", json!(host));
    }
    json!({ "httpGet": get, "periodSeconds": 5, "timeoutSeconds": 3, "failureThreshold": failures })
}

/// Sets a field of a manifest.
fn put(object: &mut Value, key: &str, value: Value) {
    if let Value::Object(fields) = object {
        fields.insert(key.to_owned(), value);
    }
}

fn base64(text: &str) -> Value {
    // The encoding that the API uses for bytes.
    serde_json::to_value(k8s_openapi::ByteString(text.as_bytes().to_vec())).unwrap_or_default()
}

/// Logs are for machines unless the object says otherwise: the programs refuse a flag that is given twice.
fn log_format(given: &[String]) -> Option<String> {
    let set = given.iter().any(|argument| argument.starts_with("--log-format="));
    (!set).then(|| "--log-format=json".to_owned())
}

/// Where the TLS files of a pod are.
const TLS_DIRECTORY: &str = "/etc/ebpf-collector/tls";

fn tls_arguments() -> [String; 6] {
    [
        "--tls-ca".to_owned(),
        format!("{TLS_DIRECTORY}/ca.crt"),
        "--tls-cert".to_owned(),
        format!("{TLS_DIRECTORY}/tls.crt"),
        "--tls-key".to_owned(),
        format!("{TLS_DIRECTORY}/tls.key"),
    ]
}

#[cfg(test)]
mod tests;
