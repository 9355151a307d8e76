//! Manifests of what runs in the cluster for the tests. Pure.

use serde_json::{Value, json};
use testkit::traffic::report::Report;

use super::stub;
use crate::images;

/// A container that runs one role of `traffic`. `name` is also the process name, by which records are told apart: at most 15
/// bytes.
#[must_use]
pub fn traffic(name: &str, arguments: &str) -> Value {
    let arguments: Vec<&str> = arguments.split_whitespace().collect();
    let mut all = vec![
        arguments.first().copied().unwrap_or_default(),
        "--name",
        name,
        "--max-seconds",
        "86400",
    ];
    all.extend(arguments.get(1..).unwrap_or_default());
    json!({
        "name": name,
        "image": images::WORKLOAD,
        "imagePullPolicy": "IfNotPresent",
        "command": ["traffic"],
        "args": all,
    })
}

/// A container that runs another program of the workload's image.
#[must_use]
pub fn program(name: &str, command: &[&str]) -> Value {
    json!({
        "name": name,
        "image": images::WORKLOAD,
        "imagePullPolicy": "IfNotPresent",
        "command": command,
    })
}

/// What a role of `traffic` counted: the last report among what it wrote.
#[must_use]
pub fn report(text: &str) -> Option<Report> {
    text.lines().rev().find_map(|line| serde_json::from_str(line).ok())
}

/// A pod with these containers, on this node if one is given.
#[must_use]
pub fn pod_spec(containers: &[Value], node: Option<&str>) -> Value {
    let mut spec = json!({
        "containers": containers,
        "enableServiceLinks": false,
        "automountServiceAccountToken": false,
        "terminationGracePeriodSeconds": 5,
    });
    if let Some(node) = node {
        put(&mut spec, "nodeSelector", json!({ "kubernetes.io/hostname": node }));
    }
    spec
}

/// A pod of its own that runs to its end.
#[must_use]
pub fn pod(namespace: &str, name: &str, mut spec: Value) -> Value {
    put(&mut spec, "restartPolicy", json!("Never"));
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": name, "namespace": namespace, "labels": { "app": name } },
        "spec": spec,
    })
}

/// A Job with one pod.
#[must_use]
pub fn job(namespace: &str, name: &str, mut spec: Value) -> Value {
    put(&mut spec, "restartPolicy", json!("Never"));
    json!({
        "apiVersion": "batch/v1", "kind": "Job",
        "metadata": { "name": name, "namespace": namespace },
        "spec": { "backoffLimit": 0, "template": { "metadata": { "labels": { "app": name } }, "spec": spec } },
    })
}

/// A Deployment, StatefulSet or DaemonSet.
#[must_use]
pub fn workload(kind: &str, namespace: &str, name: &str, replicas: u32, spec: &Value) -> Value {
    let labels = json!({ "app": name });
    let mut object = json!({
        "apiVersion": "apps/v1", "kind": kind,
        "metadata": { "name": name, "namespace": namespace },
        "spec": { "selector": { "matchLabels": labels }, "template": { "metadata": { "labels": labels }, "spec": spec } },
    });
    if let Some(fields) = object.get_mut("spec") {
        if kind != "DaemonSet" {
            put(fields, "replicas", json!(replicas));
        }
        if kind == "StatefulSet" {
            put(fields, "serviceName", json!(name));
        }
    }
    object
}

/// Spreads the pods of a workload over nodes, one each.
#[must_use]
pub fn spread(mut spec: Value, name: &str) -> Value {
    let rule = json!({ "topologyKey": "kubernetes.io/hostname", "labelSelector": { "matchLabels": { "app": name } } });
    let affinity = json!({ "podAntiAffinity": { "requiredDuringSchedulingIgnoredDuringExecution": [rule] } });
    put(&mut spec, "affinity", affinity);
    spec
}

/// A Service in front of the pods with the same `app`; `extra` are further fields of its spec.
#[must_use]
pub fn service(namespace: &str, name: &str, port: u16, protocol: &str, extra: &Value) -> Value {
    let mut spec = json!({
        "selector": { "app": name },
        "ipFamilyPolicy": "PreferDualStack",
        "ports": [{ "port": port, "protocol": protocol }],
    });
    for (key, value) in extra.as_object().into_iter().flatten() {
        put(&mut spec, key, value.clone());
    }
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": name, "namespace": namespace },
        "spec": spec,
    })
}

/// A namespace that lets every pod in.
#[must_use]
pub fn namespace(name: &str) -> Value {
    json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name } })
}

/// The DataWay stub: a pod and its Service.
#[must_use]
pub fn dataway(namespace: &str) -> Vec<Value> {
    let container = json!({
        "name": "dataway-stub",
        "image": images::WORKLOAD,
        "imagePullPolicy": "IfNotPresent",
        "command": ["dataway-stub"],
        "args": ["--listen", format!("[::]:{}", stub::PORT), "--token", stub::TOKEN, "--keep-points", "1000000"],
        "readinessProbe": { "httpGet": { "path": "/_stub/fault", "port": stub::PORT }, "periodSeconds": 1 },
    });
    vec![
        pod(namespace, "dataway", pod_spec(&[container], None)),
        service(namespace, "dataway", stub::PORT, "TCP", &json!({})),
    ]
}

fn put(object: &mut Value, key: &str, value: Value) {
    if let Value::Object(fields) = object {
        fields.insert(key.to_owned(), value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_role_keeps_its_own_arguments_after_the_common_ones() {
        let container = traffic("web", "tcp-server --listen :: --port 7001");
        let expected = [
            "tcp-server",
            "--name",
            "web",
            "--max-seconds",
            "86400",
            "--listen",
            "::",
            "--port",
            "7001",
        ];
        assert_eq!(container["args"], json!(expected));
    }

    #[test]
    fn workloads_select_the_pods_they_make() {
        for kind in ["Deployment", "StatefulSet", "DaemonSet"] {
            let object = workload(kind, "a", "web", 2, &pod_spec(&[], None));
            assert_eq!(
                object["spec"]["selector"]["matchLabels"],
                object["spec"]["template"]["metadata"]["labels"]
            );
            assert_eq!(object["spec"]["replicas"].is_null(), kind == "DaemonSet", "{kind}");
        }
    }
}
