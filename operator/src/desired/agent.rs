//! The agents: one pod per node, with the host's processes and network in sight and six capabilities.

use serde_json::{Value, json};

use super::{Inputs, TLS_DIRECTORY, log_format, metadata, probe, put, security_context, tls_arguments};
use crate::names::{self, ADMIN_PORT, Component, INGEST_PORT};

/// What docs/CAPABILITIES.md lists. `SYS_RESOURCE` is for kernels before 5.11.
const CAPABILITIES: [&str; 6] = [
    "BPF",
    "PERFMON",
    "NET_ADMIN",
    "SYS_PTRACE",
    "DAC_READ_SEARCH",
    "SYS_RESOURCE",
];

/// The DaemonSet; none until the aggregator has an address.
pub(super) fn manifest(inputs: &Inputs) -> Option<Value> {
    let address = inputs.aggregator_address?;
    let name = names::agent(&inputs.name);
    let selector = names::selector(&inputs.name, Component::Agent);
    let endpoint = std::net::SocketAddr::new(address, u16::try_from(INGEST_PORT).ok()?);
    let server_name = names::server_names(&inputs.name, &inputs.namespace)
        .into_iter()
        .next()?;
    let mut arguments: Vec<String> = [
        "run",
        "--collector",
        &inputs.name,
        "--aggregator",
        &format!("https://{endpoint}"),
        "--tls-server-name",
        &server_name,
        "--hostname",
        "$(NODE_NAME)",
        "--host-root",
        "/host",
        "--admin-listen",
        &format!("127.0.0.1:{ADMIN_PORT}"),
    ]
    .map(str::to_owned)
    .into();
    arguments.extend(tls_arguments());
    arguments.extend(log_format(&inputs.agent.arguments));
    arguments.extend(inputs.agent.arguments.iter().cloned());
    let capabilities: Vec<String> = CAPABILITIES
        .into_iter()
        .map(str::to_owned)
        .chain(inputs.agent.extra_capabilities.iter().cloned())
        .collect();
    let mut security = security_context(&capabilities);
    // Container engines give capabilities to uid 0 only.
    put(&mut security, "runAsUser", json!(0));
    if let Some(kind) = &inputs.selinux_type {
        put(&mut security, "seLinuxOptions", json!({ "type": kind }));
    }
    let mut container = json!({
        "name": "node-agent",
        "image": inputs.image,
        "command": ["node-agent"],
        "args": arguments,
        "env": [{ "name": "NODE_NAME", "valueFrom": { "fieldRef": { "fieldPath": "spec.nodeName" } } }],
        "securityContext": security,
        "livenessProbe": probe("/healthz", Some("127.0.0.1"), 6),
        "readinessProbe": probe("/readyz", Some("127.0.0.1"), 3),
        "volumeMounts": [
            { "name": "host", "mountPath": "/host", "readOnly": true, "mountPropagation": "HostToContainer" },
            { "name": "cgroup", "mountPath": "/sys/fs/cgroup", "readOnly": true },
            { "name": "tls", "mountPath": TLS_DIRECTORY, "readOnly": true },
        ],
    });
    if let Some(policy) = &inputs.image_pull_policy {
        put(&mut container, "imagePullPolicy", json!(policy));
    }
    if let Some(resources) = &inputs.agent.resources {
        put(&mut container, "resources", resources.clone());
    }
    let mut pod = json!({
        "serviceAccountName": name,
        "hostPID": true,
        "hostNetwork": true,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "priorityClassName": "system-node-critical",
        // Longer than the agent gives its last records to be acknowledged.
        "terminationGracePeriodSeconds": 30,
        "tolerations": inputs.agent.tolerations.clone().unwrap_or_else(|| json!([{ "operator": "Exists" }])),
        "containers": [container],
        "volumes": [
            { "name": "host", "hostPath": { "path": "/", "type": "Directory" } },
            { "name": "cgroup", "hostPath": { "path": "/sys/fs/cgroup", "type": "Directory" } },
            { "name": "tls", "secret": { "secretName": format!("{name}-tls") } },
        ],
    });
    if !inputs.agent.node_selector.is_empty() {
        put(&mut pod, "nodeSelector", json!(inputs.agent.node_selector));
    }
    Some(json!({
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": metadata(inputs, &name, Component::Agent),
        "spec": {
            "selector": { "matchLabels": selector },
            "updateStrategy": { "type": "RollingUpdate", "rollingUpdate": { "maxUnavailable": 1 } },
            "template": { "metadata": { "labels": selector }, "spec": pod },
        },
    }))
}
