//! The agents: one pod per node, with the host's processes and network in sight and seven capabilities.

use serde_json::{Value, json};

use super::{
    Inputs, TLS_DIRECTORY, customize, log_format, metadata, pod_metadata, probe, put, security_context, tls_arguments,
};
use crate::names::{self, ADMIN_PORT, Component, INGEST_PORT};

/// What docs/CAPABILITIES.md lists. `SYS_RESOURCE` is for kernels before 5.11.
const CAPABILITIES: [&str; 7] = [
    "BPF",
    "PERFMON",
    "NET_ADMIN",
    "SYS_PTRACE",
    "DAC_READ_SEARCH",
    "NET_BROADCAST",
    "SYS_RESOURCE",
];

/// Where the host's root is mounted unless the object says otherwise.
const HOST_ROOT: &str = "/host";

/// The DaemonSet; none until the aggregator has an address.
pub(super) fn manifest(inputs: &Inputs) -> Option<Value> {
    let address = inputs.aggregator_address?;
    let options = &inputs.agent;
    let host_root = options.host_root.as_deref().unwrap_or(HOST_ROOT);
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
        host_root,
        "--admin-listen",
        &format!("127.0.0.1:{ADMIN_PORT}"),
    ]
    .map(str::to_owned)
    .into();
    arguments.extend(tls_arguments());
    if let Some(host_proc) = &options.host_proc {
        arguments.extend(["--host-proc".to_owned(), host_proc.clone()]);
    }
    arguments.extend(log_format(&options.arguments));
    arguments.extend(options.arguments.iter().cloned());
    let mut security = security_context(&CAPABILITIES);
    // Container engines give capabilities to uid 0 only.
    put(&mut security, "runAsUser", json!(0));
    if let Some(kind) = &options.selinux_type {
        put(&mut security, "seLinuxOptions", json!({ "type": kind }));
    }
    let mut container = json!({
        "name": "node-agent",
        "command": ["node-agent"],
        "args": arguments,
        "env": [{ "name": "NODE_NAME", "valueFrom": { "fieldRef": { "fieldPath": "spec.nodeName" } } }],
        "securityContext": security,
        "livenessProbe": probe("/healthz", Some("127.0.0.1"), 6),
        "readinessProbe": probe("/readyz", Some("127.0.0.1"), 3),
        "volumeMounts": [
            { "name": "host", "mountPath": host_root, "readOnly": true, "mountPropagation": "HostToContainer" },
            { "name": "cgroup", "mountPath": "/sys/fs/cgroup", "readOnly": true },
            { "name": "tls", "mountPath": TLS_DIRECTORY, "readOnly": true },
        ],
    });
    let mut pod = json!({
        "serviceAccountName": name,
        "hostPID": true,
        "hostNetwork": true,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "priorityClassName": "system-node-critical",
        // Longer than the agent gives its last records to be acknowledged.
        "terminationGracePeriodSeconds": 30,
        "tolerations": [{ "operator": "Exists" }],
        "volumes": [
            { "name": "host", "hostPath": { "path": "/", "type": "Directory" } },
            { "name": "cgroup", "hostPath": { "path": "/sys/fs/cgroup", "type": "Directory" } },
            { "name": "tls", "secret": { "secretName": format!("{name}-tls") } },
        ],
    });
    customize(&mut pod, &mut container, &options.pod);
    put(&mut pod, "containers", json!([container]));
    let at_a_time = options.max_unavailable.clone().unwrap_or(json!(1));
    Some(json!({
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": metadata(inputs, &name, Component::Agent),
        "spec": {
            "selector": { "matchLabels": selector },
            "updateStrategy": { "type": "RollingUpdate", "rollingUpdate": { "maxUnavailable": at_a_time } },
            "template": { "metadata": pod_metadata(&options.pod, selector.clone()), "spec": pod },
        },
    }))
}
