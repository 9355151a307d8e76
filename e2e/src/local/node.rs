//! What runs in a node's namespace: containerd, kubelet, kube-proxy, and how its network and its directories are laid out.
//! Pure: makes a [`Plan`] and the texts of configuration files.
//!
//! A node sees the machine's files, but `/run`, `/var/lib` and `/var/log` are its own, and so is its `/proc`.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::{
    init::{Plan, Program, Step},
    layout::{
        API_PORT, Addresses, CONTROL_PLANE_V4, CONTROL_PLANE_V6, DNS_IP, Layout, NODE_RANGE_V4, NODE_RANGE_V6, NODES,
        POD_RANGE_V4, POD_RANGE_V6,
    },
};

/// Where a node sees the cluster's directory: a mount point that every system has, and short enough for sockets.
const SEEN: &str = "/mnt";

/// Settings of the whole kernel that a kubelet insists on. A node gets files with these values in their place: the kubelet is
/// content, and the machine keeps its own.
const TUNABLES: [(&str, &str); 6] = [
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];

/// Files of a node's directory: name and text. `runtime` is a program of the cluster's directory to use in place of runc.
#[must_use]
pub(super) fn files(layout: &Layout, index: usize, name: &str, runtime: Option<&str>) -> Vec<(String, String)> {
    let mut files = vec![
        ("containerd.toml".to_owned(), containerd(runtime)),
        ("lib/cni/net.d/10-bridge.conflist".to_owned(), cni(index).to_string()),
        ("kubelet.json".to_owned(), kubelet(layout, name).to_string()),
        ("kube-proxy.json".to_owned(), kube_proxy(name).to_string()),
        ("resolv.conf".to_owned(), String::new()),
        (
            "machine-id".to_owned(),
            format!("{:032x}\n", 0xe2e0_0000_u64 + index as u64),
        ),
    ];
    for (path, value) in TUNABLES {
        files.push((format!("tunables/{}", path.replace('/', ".")), format!("{value}\n")));
    }
    files
}

/// Directories of a node's directory.
pub(super) const DIRECTORIES: [&str; 7] = [
    "run",
    "lib/cni/net.d",
    "log/pods",
    "tunables",
    "stopped",
    "programs",
    "imported",
];

/// The steps and programs of the node with this index and name.
#[must_use]
pub(super) fn plan(layout: &Layout, index: usize, name: &str) -> Plan {
    let here = format!("{SEEN}/{name}");
    let program = |name: &str, command: String| Program {
        name: name.to_owned(),
        command: command.split_whitespace().map(str::to_owned).collect(),
        inherits_stdin: false,
    };
    let addresses = Addresses::of(index);
    Plan {
        steps: steps(layout, index, name),
        programs: vec![
            program("containerd", format!("containerd --config {here}/containerd.toml")),
            program("import", format!("{SEEN}/ec-e2e import {SEEN}/images {here}/imported")),
            program(
                "kubelet",
                format!(
                    "{SEEN}/bin/kubelet --config={here}/kubelet.json --kubeconfig={here}/kubelet.kubeconfig \
                     --hostname-override={name} --node-ip={},{} --root-dir=/var/lib/kubelet \
                     --cert-dir=/var/lib/kubelet/pki",
                    addresses.v4, addresses.v6
                ),
            ),
            program(
                "kube-proxy",
                format!("{SEEN}/bin/kube-proxy --config={here}/kube-proxy.json --hostname-override={name}"),
            ),
        ],
        place: here.clone().into(),
        logs: format!("{here}/programs").into(),
    }
}

fn steps(layout: &Layout, index: usize, name: &str) -> Vec<Step> {
    let here = format!("{SEEN}/{name}");
    let mut lines = format!(
        "mount -t proc proc /proc\n\
         mount --rbind {root} {SEEN}\n\
         mount --bind {here}/run /run\n\
         mount --bind {here}/lib /var/lib\n\
         mount --bind {here}/log /var/log\n",
        root = layout.root.display()
    );
    for (path, _) in TUNABLES {
        let _ = writeln!(
            lines,
            "mount --bind {here}/tunables/{} /proc/sys/{path}",
            path.replace('/', ".")
        );
    }
    let mut steps: Vec<Step> = lines.lines().map(Step::run).collect();
    if std::path::Path::new("/etc/machine-id").exists() {
        steps.push(Step::run(&format!("mount --bind {here}/machine-id /etc/machine-id")));
    }
    steps.push(Step::run("mount --make-rshared /"));
    steps.push(Step::write("/proc/sys/kernel/hostname", name));
    for setting in [
        "ipv4/ip_forward",
        "ipv6/conf/all/forwarding",
        "bridge/bridge-nf-call-iptables",
        "bridge/bridge-nf-call-ip6tables",
    ] {
        steps.push(Step::write(&format!("/proc/sys/net/{setting}"), "1"));
    }
    // Addresses of pods are unique by design; waiting for the proof takes a second of each pod's start.
    steps.push(Step::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0"));
    steps.extend(network(index).lines().map(Step::run));
    steps
}

fn network(index: usize) -> String {
    let own = Addresses::of(index);
    let mut lines = format!(
        "ip link set lo up\n\
         ip link set eth0 up\n\
         ip address add {}/24 dev eth0\n\
         ip address add {}/64 dev eth0 nodad\n\
         ip route add default via {CONTROL_PLANE_V4}\n\
         ip -6 route add default via {CONTROL_PLANE_V6}\n",
        own.v4, own.v6
    );
    for other in (0..NODES.len()).filter(|other| *other != index).map(Addresses::of) {
        let _ = writeln!(lines, "ip route add {} via {}", other.pods_v4, other.v4);
        let _ = writeln!(lines, "ip route add {} via {}", other.pods_v6, other.v6);
    }
    // Pods leave the cluster with the node's address, as they do in most clusters.
    for (tables, pods, nodes) in [
        ("iptables", POD_RANGE_V4, NODE_RANGE_V4),
        ("ip6tables", POD_RANGE_V6, NODE_RANGE_V6),
    ] {
        let _ = writeln!(
            lines,
            "{tables} -w -t nat -N E2E-LEAVE\n\
             {tables} -w -t nat -A E2E-LEAVE -d {pods} -j RETURN\n\
             {tables} -w -t nat -A E2E-LEAVE -d {nodes} -j RETURN\n\
             {tables} -w -t nat -A E2E-LEAVE -j MASQUERADE\n\
             {tables} -w -t nat -A POSTROUTING -s {pods} -j E2E-LEAVE"
        );
    }
    lines
}

fn containerd(runtime: Option<&str>) -> String {
    let binary = runtime
        .map(|name| format!("BinaryName = \"{SEEN}/{name}\""))
        .unwrap_or_default();
    format!(
        r#"version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.aufs"]
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "/var/lib/containerd/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
        {binary}
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "/var/lib/cni/net.d"
"#,
        PAUSE = crate::images::PAUSE
    )
}

fn cni(index: usize) -> Value {
    let own = Addresses::of(index);
    json!({
        "cniVersion": "0.4.0", "name": "e2e",
        "plugins": [
            { "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
              "ipam": { "type": "host-local", "dataDir": "/run/cni",
                "ranges": [[range(&own.pods_v4, &own.pods_v4.replace(".0/24", ".48"))], [range(&own.pods_v6, &own.pods_v6.replace("::/64", "::30"))]],
                "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }] } },
            { "type": "portmap", "capabilities": { "portMappings": true } },
        ],
    })
}

/// Few addresses, so that pods that come and go soon get those of others.
fn range(subnet: &str, last: &str) -> Value {
    json!({ "subnet": subnet, "rangeEnd": last })
}

fn kubelet(layout: &Layout, name: &str) -> Value {
    let here = format!("{SEEN}/{name}");
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
        "authentication": { "anonymous": { "enabled": false }, "webhook": { "enabled": true },
            "x509": { "clientCAFile": format!("{SEEN}/ca.crt") } },
        "authorization": { "mode": "Webhook" },
        "tlsCertFile": format!("{here}/kubelet.crt"), "tlsPrivateKeyFile": format!("{here}/kubelet.key"),
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "cgroupDriver": "cgroupfs", "cgroupRoot": format!("/{}/{name}", layout.id),
        "failSwapOn": false, "failCgroupV1": false,
        "clusterDNS": [DNS_IP], "clusterDomain": "cluster.local", "resolvConf": format!("{here}/resolv.conf"),
        // The machine's disk is not the cluster's: no eviction for its sake.
        "evictionHard": { "nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%", "memory.available": "0%" },
        "imageGCHighThresholdPercent": 100,
        "volumePluginDir": "/var/lib/kubelet/volume-plugins",
        "nodeStatusUpdateFrequency": "5s", "maxPods": 250, "registryPullQPS": 0, "kubeAPIQPS": 100, "kubeAPIBurst": 200,
    })
}

fn kube_proxy(name: &str) -> Value {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
        "clientConnection": { "kubeconfig": format!("{SEEN}/{name}/kube-proxy.kubeconfig") },
        "mode": "iptables", "clusterCIDR": format!("{POD_RANGE_V4},{POD_RANGE_V6}"),
        // Limits of connection tracking are the machine's.
        "conntrack": { "maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s" },
    })
}

/// The API server as nodes reach it.
#[must_use]
pub(super) fn server() -> String {
    format!("https://{CONTROL_PLANE_V4}:{API_PORT}")
}
