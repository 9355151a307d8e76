//! The aggregator: one pod with the disk queue, the Service that agents reach it by, and what guards them.

use std::net::IpAddr;

use serde_json::{Value, json};

use super::{
    Inputs, QueueVolume, TLS_DIRECTORY, customize, log_format, metadata, pod_metadata, probe, put, security_context,
    tls_arguments,
};
use crate::names::{self, ADMIN_PORT, Component, INGEST_PORT};

const QUEUE_DIRECTORY: &str = "/var/lib/ebpf-collector/queue";
const TOKEN_DIRECTORY: &str = "/etc/ebpf-collector/dataway";
/// The image's user.
const USER: i64 = 65532;

/// Everything of the aggregator but its Secret and ServiceAccount.
pub(super) fn manifests(inputs: &Inputs) -> Vec<Value> {
    let name = names::aggregator(&inputs.name);
    let selector = names::selector(&inputs.name, Component::Aggregator);
    let metadata = || metadata(inputs, &name, Component::Aggregator);
    let service = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(),
        "spec": {
            "selector": selector,
            "ports": [{ "name": "grpc", "port": INGEST_PORT, "targetPort": "grpc", "protocol": "TCP" }],
        },
    });
    // One pod, so a drain would otherwise take it at once; this makes people see that it is the only one, without
    // stopping the drain: agents hold their records meanwhile.
    let budget = json!({
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": metadata(),
        "spec": { "maxUnavailable": 1, "selector": { "matchLabels": selector } },
    });
    // Agents come from the nodes' own addresses, which no selector names: TLS decides who may speak. Metrics are for
    // pods of the cluster alone.
    let policy = json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(),
        "spec": {
            "podSelector": { "matchLabels": selector },
            "policyTypes": ["Ingress"],
            "ingress": [
                { "ports": [{ "port": INGEST_PORT, "protocol": "TCP" }] },
                {
                    "from": [{ "namespaceSelector": {} }],
                    "ports": [{ "port": ADMIN_PORT, "protocol": "TCP" }],
                },
            ],
        },
    });
    let mut objects = vec![service, budget, policy];
    if let QueueVolume::Claim {
        size,
        storage_class,
        access_modes,
    } = &inputs.aggregator.volume
    {
        let mut spec = json!({
            "accessModes": access_modes,
            "resources": { "requests": { "storage": size } },
        });
        if let Some(class) = storage_class {
            put(&mut spec, "storageClassName", json!(class));
        }
        let mut metadata = metadata();
        put(&mut metadata, "name", json!(format!("{name}-queue")));
        objects.push(json!({
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": metadata,
            "spec": spec,
        }));
    }
    objects.extend(
        inputs
            .aggregator_address
            .map(|address| stateful_set(inputs, &name, address)),
    );
    objects
}

/// The pod. It listens on the family of its Service's `address`.
fn stateful_set(inputs: &Inputs, name: &str, address: IpAddr) -> Value {
    let selector = names::selector(&inputs.name, Component::Aggregator);
    let options = &inputs.aggregator;
    let queue = match &options.volume {
        // A claim of its own and not a template: it goes with the object, and its size can change.
        QueueVolume::Claim { .. } => {
            json!({ "name": "queue", "persistentVolumeClaim": { "claimName": format!("{name}-queue") } })
        }
        QueueVolume::Directory {
            size_limit: Some(limit),
        } => json!({ "name": "queue", "emptyDir": { "sizeLimit": limit } }),
        QueueVolume::Directory { size_limit: None } => json!({ "name": "queue", "emptyDir": {} }),
    };
    let mut volumes = vec![
        queue,
        json!({ "name": "tls", "secret": { "secretName": format!("{name}-tls") } }),
    ];
    let mut mounts = vec![
        json!({ "name": "queue", "mountPath": "/var/lib/ebpf-collector" }),
        json!({ "name": "tls", "mountPath": TLS_DIRECTORY, "readOnly": true }),
    ];
    let any = if address.is_ipv6() { "[::]" } else { "0.0.0.0" };
    let mut arguments: Vec<String> = [
        "--collector",
        &inputs.name,
        "--listen",
        &format!("{any}:{INGEST_PORT}"),
        "--admin-listen",
        &format!("{any}:{ADMIN_PORT}"),
        "--queue-dir",
        QUEUE_DIRECTORY,
    ]
    .map(str::to_owned)
    .into();
    arguments.extend(tls_arguments());
    if let Some(token) = &options.token {
        // Where the object's option for the file says that it is.
        let items = json!([{ "key": token.key, "path": "token" }]);
        volumes.push(json!({ "name": "dataway", "secret": { "secretName": token.name, "items": items } }));
        mounts.push(json!({ "name": "dataway", "mountPath": TOKEN_DIRECTORY, "readOnly": true }));
    }
    arguments.extend(log_format(&options.arguments));
    arguments.extend(options.arguments.iter().cloned());
    let mut container = json!({
        "name": "aggregator",
        "command": ["aggregator"],
        "args": arguments,
        "ports": [
            { "name": "grpc", "containerPort": INGEST_PORT, "protocol": "TCP" },
            { "name": "admin", "containerPort": ADMIN_PORT, "protocol": "TCP" },
        ],
        "securityContext": security_context(&[]),
        "livenessProbe": probe("/healthz", None, 6),
        "readinessProbe": probe("/readyz", None, 3),
        "volumeMounts": mounts,
    });
    let mut pod = json!({
        "serviceAccountName": name,
        "securityContext": { "runAsNonRoot": true, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER },
        "terminationGracePeriodSeconds": 30,
        "volumes": volumes,
    });
    customize(&mut pod, &mut container, &options.pod);
    put(&mut pod, "containers", json!([container]));
    json!({
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": metadata(inputs, name, Component::Aggregator),
        "spec": {
            // The queue belongs to one process at a time, and repeats are recognised by its contents.
            "replicas": 1,
            "serviceName": name,
            "selector": { "matchLabels": selector },
            "template": { "metadata": pod_metadata(&options.pod, selector.clone()), "spec": pod },
        },
    })
}
