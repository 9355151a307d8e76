//! What runs in the control plane's namespace: etcd, API server, controller manager, scheduler, the way to it from the
//! machine, the nodes' network, and a server outside the cluster. Pure: makes a [`Plan`].

use std::{fmt::Write as _, path::Path};

use super::{
    init::{Plan, Program, Step},
    layout::{
        API_PORT, Addresses, CONTROL_PLANE, CONTROL_PLANE_V4, CONTROL_PLANE_V6, LOAD_BALANCER_RANGE, Layout, NODES,
        OUTSIDE_V4, OUTSIDE_V6, POD_RANGE_V4, POD_RANGE_V6, SERVICE_RANGES,
    },
};

/// Writes of everything, and reads by the product's agents: enough to count both, and to see who made them.
pub(super) const AUDIT_POLICY: &str = r#"{
  "apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"],
  "rules": [
    { "level": "Metadata", "users": ["system:serviceaccount:ebpf-collector:cluster-agent"] },
    { "level": "None", "verbs": ["get", "list", "watch"] },
    { "level": "None", "resources": [{ "group": "", "resources": ["events"] }] },
    { "level": "Metadata" }
  ]
}"#;

/// The steps and programs. `executable` is this program, for the way from the machine.
#[must_use]
pub(super) fn plan(layout: &Layout, programs: &Path, executable: &Path) -> Plan {
    let place = layout.place(CONTROL_PLANE);
    let file = |name: &str| place.join(name).display().to_string();
    let program = |name: &str, arguments: Vec<String>| {
        let mut command = vec![programs.join(name).display().to_string()];
        command.extend(arguments);
        Program {
            name: name.to_owned(),
            command,
            inherits_stdin: false,
        }
    };
    let kubeconfig = |name: &str| file(&format!("{name}.kubeconfig"));
    let etcd = program(
        "etcd",
        vec![
            format!("--data-dir={}", file("etcd")),
            "--listen-client-urls=http://127.0.0.1:2379".to_owned(),
            "--advertise-client-urls=http://127.0.0.1:2379".to_owned(),
            "--listen-peer-urls=http://127.0.0.1:2380".to_owned(),
            // The data lives no longer than the cluster.
            "--unsafe-no-fsync".to_owned(),
            "--log-level=warn".to_owned(),
        ],
    );
    let api_server = program(
        "kube-apiserver",
        vec![
            "--etcd-servers=http://127.0.0.1:2379".to_owned(),
            format!("--advertise-address={CONTROL_PLANE_V4}"),
            format!("--secure-port={API_PORT}"),
            format!("--service-cluster-ip-range={SERVICE_RANGES}"),
            "--authorization-mode=Node,RBAC".to_owned(),
            "--enable-admission-plugins=NodeRestriction".to_owned(),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--service-account-signing-key-file={}", file("service-accounts.key")),
            format!("--service-account-key-file={}", file("service-accounts.crt")),
            format!("--client-ca-file={}", file("ca.crt")),
            format!("--tls-cert-file={}", file("apiserver.crt")),
            format!("--tls-private-key-file={}", file("apiserver.key")),
            format!("--kubelet-certificate-authority={}", file("ca.crt")),
            format!("--kubelet-client-certificate={}", file("kubelet-client.crt")),
            format!("--kubelet-client-key={}", file("kubelet-client.key")),
            "--kubelet-preferred-address-types=InternalIP".to_owned(),
            format!("--audit-policy-file={}", file("audit-policy.json")),
            format!("--audit-log-path={}", layout.logs.join("audit.log").display()),
        ],
    );
    let controller_manager = program(
        "kube-controller-manager",
        vec![
            format!("--kubeconfig={}", kubeconfig("controller-manager")),
            format!("--service-account-private-key-file={}", file("service-accounts.key")),
            format!("--root-ca-file={}", file("ca.crt")),
            format!("--service-cluster-ip-range={SERVICE_RANGES}"),
            format!("--cluster-cidr={POD_RANGE_V4},{POD_RANGE_V6}"),
            "--allocate-node-cidrs=false".to_owned(),
            "--use-service-account-credentials=true".to_owned(),
            "--leader-elect=false".to_owned(),
        ],
    );
    let scheduler = program(
        "kube-scheduler",
        vec![
            format!("--kubeconfig={}", kubeconfig("scheduler")),
            "--leader-elect=false".to_owned(),
        ],
    );
    let forward = Program {
        name: "forward".to_owned(),
        command: vec![
            executable.display().to_string(),
            "forward".to_owned(),
            format!("127.0.0.1:{API_PORT}"),
        ],
        inherits_stdin: true,
    };
    Plan {
        steps: network(),
        programs: vec![etcd, api_server, controller_manager, scheduler, forward],
        place,
        logs: layout.logs.clone(),
    }
}

/// A bridge that joins the nodes, with the ways to their pods, and addresses outside the cluster.
fn network() -> Vec<Step> {
    let mut lines =
        String::from("mount -t proc proc /proc\nip link set lo up\nip link add br0 type bridge\nip link set br0 up\n");
    for node in NODES {
        let _ = writeln!(lines, "ip link set {node} master br0 up");
    }
    let _ = writeln!(lines, "ip address add {CONTROL_PLANE_V4}/24 dev br0");
    let _ = writeln!(lines, "ip address add {CONTROL_PLANE_V6}/64 dev br0 nodad");
    let _ = writeln!(lines, "ip address add {OUTSIDE_V4}/32 dev lo");
    let _ = writeln!(lines, "ip address add {OUTSIDE_V6}/128 dev lo nodad");
    for index in 0..NODES.len() {
        let node = Addresses::of(index);
        let _ = writeln!(lines, "ip route add {} via {}", node.pods_v4, node.v4);
        let _ = writeln!(lines, "ip route add {} via {}", node.pods_v6, node.v6);
    }
    let _ = writeln!(lines, "ip route add {LOAD_BALANCER_RANGE} via {}", Addresses::of(0).v4);
    let mut steps: Vec<Step> = lines.lines().map(Step::run).collect();
    steps.push(Step::write("/proc/sys/net/ipv4/ip_forward", "1"));
    steps.push(Step::write("/proc/sys/net/ipv6/conf/all/forwarding", "1"));
    steps
}
