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

/// What people may say of any pod.
#[derive(Clone, Debug, Default)]
pub struct PodInputs {
    /// Image with every program.
    pub image: String,
    /// `imagePullPolicy`, if it is not the cluster's default.
    pub image_pull_policy: Option<String>,
    /// Names of the Secrets to pull it with.
    pub image_pull_secrets: Vec<String>,
    /// `resources` of the container.
    pub resources: Option<Value>,
    /// Labels of the nodes to run on; empty for all.
    pub node_selector: BTreeMap<String, String>,
    /// Tolerations; agents tolerate all taints and the aggregator none unless given.
    pub tolerations: Option<Value>,
    /// Further rules of the scheduler's.
    pub affinity: Option<Value>,
    /// Priority class; agents are node-critical unless given.
    pub priority_class: Option<String>,
    /// Labels besides our own, which win.
    pub labels: BTreeMap<String, String>,
    /// Annotations besides our own, which win.
    pub annotations: BTreeMap<String, String>,
    /// Environment variables of the container.
    pub env: Vec<Value>,
}

/// What the agents' pods depend on.
#[derive(Clone, Debug, Default)]
pub struct AgentInputs {
    /// What any pod may have.
    pub pod: PodInputs,
    /// SELinux type on nodes that enforce it (`spc_t`).
    pub selinux_type: Option<String>,
    /// Nodes whose agent may be replaced at a time, or their share; one unless given.
    pub max_unavailable: Option<Value>,
    /// Where the host's root is mounted; `/host` unless given.
    pub host_root: Option<String>,
    /// Where the host's `/proc` is, if not below its root.
    pub host_proc: Option<String>,
    /// Further flags, such as kernel map sizes: what only a restart can change.
    pub arguments: Vec<String>,
}

/// What the aggregator's pod depends on.
#[derive(Clone, Debug, Default)]
pub struct AggregatorInputs {
    /// What any pod may have.
    pub pod: PodInputs,
    /// Flags for outputs and queue. They hold no secret.
    pub arguments: Vec<String>,
    /// The Secret with the DataWay token.
    pub token: Option<TokenSecret>,
    /// Disk of the queue.
    pub volume: QueueVolume,
}

/// A key of a Secret in the operator's namespace.
#[derive(Clone, Debug)]
pub struct TokenSecret {
    /// Name of the Secret.
    pub name: String,
    /// Key in it.
    pub key: String,
}

/// Disk of the queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum QueueVolume {
    /// A directory of the node that lives as long as the pod.
    Directory {
        /// Most it may hold, as a quantity.
        size_limit: Option<String>,
    },
    /// A claim of its own.
    Claim {
        /// Size, as a quantity.
        size: String,
        /// Storage class; the cluster's default unless given.
        storage_class: Option<String>,
        /// How it is mounted.
        access_modes: Vec<String>,
    },
}

// === impl Inputs ===

impl Inputs {
    /// What is known of an object whose options are of no use: enough for [`certificates`].
    #[must_use]
    pub fn bare(name: &str, uid: &str, namespace: &str, material: Material) -> Self {
        Self {
            name: name.to_owned(),
            uid: uid.to_owned(),
            namespace: namespace.to_owned(),
            aggregator_address: None,
            material,
            agent: AgentInputs::default(),
            aggregator: AggregatorInputs::default(),
        }
    }
}

// === impl QueueVolume ===

impl Default for QueueVolume {
    fn default() -> Self {
        Self::Directory { size_limit: None }
    }
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

/// The Secrets alone, in the order to apply them.
#[must_use]
pub fn certificates(inputs: &Inputs) -> Vec<Value> {
    secrets(inputs).into_iter().map(drift::with_hash).collect()
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
fn security_context(capabilities: &[&str]) -> Value {
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

/// Metadata of a pod: what people add, and over it what is ours.
fn pod_metadata(pod: &PodInputs, labels: BTreeMap<String, String>) -> Value {
    let mut all = pod.labels.clone();
    all.extend(labels);
    let mut metadata = json!({ "labels": all });
    if !pod.annotations.is_empty() {
        put(&mut metadata, "annotations", json!(pod.annotations));
    }
    metadata
}

/// Puts what people say of any pod into a pod's spec and its container.
fn customize(spec: &mut Value, container: &mut Value, pod: &PodInputs) {
    put(container, "image", json!(pod.image));
    if let Some(policy) = &pod.image_pull_policy {
        put(container, "imagePullPolicy", json!(policy));
    }
    if let Some(resources) = &pod.resources {
        put(container, "resources", resources.clone());
    }
    let variables = container.get("env").and_then(Value::as_array).into_iter().flatten();
    let variables: Vec<Value> = variables.chain(&pod.env).cloned().collect();
    if !variables.is_empty() {
        put(container, "env", json!(variables));
    }
    if !pod.image_pull_secrets.is_empty() {
        let secrets = pod.image_pull_secrets.iter().map(|name| json!({ "name": name }));
        put(spec, "imagePullSecrets", secrets.collect());
    }
    if !pod.node_selector.is_empty() {
        put(spec, "nodeSelector", json!(pod.node_selector));
    }
    if let Some(tolerations) = &pod.tolerations {
        put(spec, "tolerations", tolerations.clone());
    }
    if let Some(affinity) = &pod.affinity {
        put(spec, "affinity", affinity.clone());
    }
    if let Some(class) = &pod.priority_class {
        put(spec, "priorityClassName", json!(class));
    }
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
