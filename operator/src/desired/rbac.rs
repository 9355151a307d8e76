//! Who the pods are in the cluster, and what they may do there: docs/SECURITY.md gives each rule its reason.

use serde_json::{Value, json};

use super::{Inputs, metadata, owners, put};
use crate::names::{self, Component};

/// ServiceAccounts of both programs, and what they may read: the aggregator the object alone.
pub(super) fn manifests(inputs: &Inputs) -> Vec<Value> {
    let (agent, aggregator) = (names::agent(&inputs.name), names::aggregator(&inputs.name));
    let mut manifests = Vec::new();
    let mut account = |name: &str, component, rules: Value| {
        // Roles have no namespace, and one release per namespace must not meet another's.
        let role = format!("{}-{name}", inputs.namespace);
        let cluster_metadata = json!({
            "name": role,
            "labels": names::labels(&inputs.name, component),
            "ownerReferences": owners(inputs),
        });
        manifests.extend([
            json!({
                "apiVersion": "v1",
                "kind": "ServiceAccount",
                "metadata": metadata(inputs, name, component),
                "automountServiceAccountToken": true,
            }),
            json!({
                "apiVersion": "rbac.authorization.k8s.io/v1",
                "kind": "ClusterRole",
                "metadata": cluster_metadata,
                "rules": rules,
            }),
            json!({
                "apiVersion": "rbac.authorization.k8s.io/v1",
                "kind": "ClusterRoleBinding",
                "metadata": cluster_metadata,
                "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role },
                "subjects": [{ "kind": "ServiceAccount", "name": name, "namespace": inputs.namespace }],
            }),
        ]);
    };
    let read = |group: &str, resources: &[&str]| json!({ "apiGroups": [group], "resources": resources, "verbs": ["get", "list", "watch"] });
    let mut object = read("ebpfcollector.io", &["ebpfcollectors"]);
    put(&mut object, "resourceNames", json!([inputs.name]));
    account(
        &agent,
        Component::Agent,
        json!([
            read("", &["namespaces", "nodes", "pods", "services"]),
            read("apps", &["daemonsets", "deployments", "replicasets", "statefulsets"]),
            read("batch", &["cronjobs", "jobs"]),
            read("discovery.k8s.io", &["endpointslices"]),
            object,
        ]),
    );
    account(&aggregator, Component::Aggregator, json!([object]));
    manifests
}
