//! Who the pods are in the cluster, and what they may do there: docs/SECURITY.md gives each rule its reason.

use serde_json::{Value, json};

use super::{Inputs, metadata, owners};
use crate::names::{self, Component};

/// ServiceAccounts of both programs, and what the agents may read. The aggregator may nothing.
pub(super) fn manifests(inputs: &Inputs) -> Vec<Value> {
    let (agent, aggregator) = (names::agent(&inputs.name), names::aggregator(&inputs.name));
    let account = |name: &str, component, mounted: bool| {
        json!({
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": metadata(inputs, name, component),
            "automountServiceAccountToken": mounted,
        })
    };
    // These have no namespace, and one release per namespace must not meet another's.
    let role = format!("{}-{agent}", inputs.namespace);
    let cluster_metadata = json!({
        "name": role,
        "labels": names::labels(&inputs.name, Component::Agent),
        "ownerReferences": owners(inputs),
    });
    let read = |group: &str, resources: &[&str]| json!({ "apiGroups": [group], "resources": resources, "verbs": ["get", "list", "watch"] });
    vec![
        account(&agent, Component::Agent, true),
        account(&aggregator, Component::Aggregator, false),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": cluster_metadata,
            "rules": [
                read("", &["namespaces", "nodes", "pods", "services"]),
                read("apps", &["replicasets"]),
                read("batch", &["jobs"]),
                read("discovery.k8s.io", &["endpointslices"]),
                read("ebpfcollector.io", &["ebpfcollectors"]),
            ],
        }),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": cluster_metadata,
            "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role },
            "subjects": [{ "kind": "ServiceAccount", "name": agent, "namespace": inputs.namespace }],
        }),
    ]
}
