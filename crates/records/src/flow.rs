//! What records of flows have in common: the two ends, who they are, and the tags that say so.

use std::{net::IpAddr, sync::Arc};

use crate::{
    Direction, Endpoint, Family, K8sEndpoint, Str, Transport,
    column::{Cell, Column, K8sKey, Output, Side},
};

/// Who talked to whom. `local` is always the end on this host (`src_*`), whatever the direction.
#[derive(Clone, Debug, PartialEq)]
pub struct Flow {
    /// This host's end; tags `src_*`.
    pub local: Endpoint,
    /// The other end; tags `dst_*`.
    pub remote: Endpoint,
    /// Tag `transport`.
    pub transport: Transport,
    /// Tag `family`.
    pub family: Family,
    /// Tag `direction`.
    pub direction: Direction,
    /// Inode number of the network namespace of the socket; tag `netns`.
    pub netns: u32,
    /// Process (thread group) id in the host's pid namespace; 0 when unknown.
    pub pid: u32,
    /// Process name; empty when unknown.
    pub process_name: Str,
    /// Destination after DNAT; `None` is written as `N/A`.
    pub dst_nat: Option<(IpAddr, u16)>,
    /// Domain the client resolved to reach `remote`; empty when unknown.
    pub dst_domain: Str,
    /// Kubernetes names of `local`.
    pub local_k8s: Option<Arc<K8sEndpoint>>,
    /// Kubernetes names of `remote`.
    pub remote_k8s: Option<Arc<K8sEndpoint>>,
}

/// Tags of every record of a flow.
pub(crate) const TAGS: &[Column] = &[
    Column::tag(
        "direction",
        Cell::Direction,
        "Who started the connection, seen from the source: `incoming` or `outgoing`.",
    ),
    Column::tag(
        "family",
        Cell::Family,
        "Network layer protocol: `IPv4` or `IPv6`; v4-mapped addresses count as IPv4.",
    ),
    Column::tag(
        "transport",
        Cell::Transport,
        "Transport layer protocol: `tcp` or `udp`.",
    ),
    Column::tag(
        "src_ip",
        Cell::Ip(Side::Local),
        "Source address: always the end on this host.",
    ),
    Column::tag(
        "src_port",
        Cell::Port(Side::Local),
        "Source port; `*` where ephemeral ports are folded.",
    ),
    Column::tag(
        "src_ip_type",
        Cell::IpType(Side::Local),
        "Source address class: `private`, `multicast`, `loopback` or `other`.",
    ),
    Column::tag(
        "dst_ip",
        Cell::Ip(Side::Remote),
        "Destination address: always the other end.",
    ),
    Column::tag(
        "dst_port",
        Cell::Port(Side::Remote),
        "Destination port; `*` where ephemeral ports are folded.",
    ),
    Column::tag(
        "dst_ip_type",
        Cell::IpType(Side::Remote),
        "Destination address class: `private`, `multicast`, `loopback` or `other`.",
    ),
    Column::tag(
        "dst_domain",
        Cell::Domain,
        "Domain that was resolved to the destination; empty when unknown.",
    ),
    Column::tag(
        "sub_source",
        Cell::SubSource,
        "`K8s` when an end has Kubernetes names, else `N/A`; then there is no tag with `k8s` in its name either.",
    ),
    Column::tag(
        "src_k8s_namespace",
        Cell::K8s(Side::Local, K8sKey::Namespace),
        "Namespace of the source's pod; `N/A` when it is not in a pod but the other end has names. The same holds for the tags below.",
    ),
    Column::tag(
        "src_k8s_pod_name",
        Cell::K8s(Side::Local, K8sKey::Pod),
        "Source pod: by the process, so also in the node's network.",
    ),
    Column::tag(
        "src_k8s_service_name",
        Cell::K8s(Side::Local, K8sKey::Service),
        "Service that the source's pod is behind, by its endpoint slices; of several the first by name.",
    ),
    Column::tag(
        "src_k8s_deployment_name",
        Cell::K8s(Side::Local, K8sKey::Workload),
        "What runs the source's pod: deployment, stateful set, daemon set, cron job, job, another owner, or the pod itself; the node for a process outside pods.",
    ),
    Column::tag(
        "dst_k8s_namespace",
        Cell::K8s(Side::Remote, K8sKey::Namespace),
        "Namespace of the destination's pod or service, by its address at that time.",
    ),
    Column::tag(
        "dst_k8s_pod_name",
        Cell::K8s(Side::Remote, K8sKey::Pod),
        "Destination pod; `N/A` where a service's address or port was used.",
    ),
    Column::tag(
        "dst_k8s_service_name",
        Cell::K8s(Side::Remote, K8sKey::Service),
        "Destination service: its cluster, external or load balancer address, its port on a node, or the pod behind it.",
    ),
    Column::tag(
        "dst_k8s_deployment_name",
        Cell::K8s(Side::Remote, K8sKey::Workload),
        "What runs the destination's pod, or all pods behind the service if it is one; the node for its own address.",
    ),
    compat(
        "service",
        Cell::Default("ebpf"),
        "`ebpf`, or the global tag of that name.",
    ),
    compat(
        "conn_side",
        Cell::ConnSide,
        "Role of the local end: `client` or `server`.",
    ),
    compat(
        "client_ip",
        Cell::Ip(Side::Client),
        "Address of the end that started the connection.",
    ),
    compat("client_port", Cell::Port(Side::Client), "Port of the client."),
    compat(
        "client_ip_type",
        Cell::IpType(Side::Client),
        "Address class of the client.",
    ),
    compat(
        "server_ip",
        Cell::Ip(Side::Server),
        "Address of the end that was connected to.",
    ),
    compat("server_port", Cell::Port(Side::Server), "Port of the server."),
    compat(
        "server_ip_type",
        Cell::IpType(Side::Server),
        "Address class of the server.",
    ),
    compat(
        "server_domain",
        Cell::ServerDomain,
        "Domain of the server; empty when the server is the local end.",
    ),
    compat(
        "src_k8s_workload_name",
        Cell::K8s(Side::Local, K8sKey::Workload),
        "Source workload.",
    ),
    compat(
        "src_k8s_workload_type",
        Cell::K8s(Side::Local, K8sKey::WorkloadType),
        "Kind of the source workload.",
    ),
    compat(
        "dst_k8s_workload_name",
        Cell::K8s(Side::Remote, K8sKey::Workload),
        "Destination workload.",
    ),
    compat(
        "dst_k8s_workload_type",
        Cell::K8s(Side::Remote, K8sKey::WorkloadType),
        "Kind of the destination workload.",
    ),
    compat(
        "client_k8s_namespace",
        Cell::K8s(Side::Client, K8sKey::Namespace),
        "Client namespace.",
    ),
    compat(
        "client_k8s_pod_name",
        Cell::K8s(Side::Client, K8sKey::Pod),
        "Client pod.",
    ),
    compat(
        "client_k8s_service_name",
        Cell::K8s(Side::Client, K8sKey::Service),
        "Client service.",
    ),
    compat(
        "client_k8s_deployment_name",
        Cell::K8s(Side::Client, K8sKey::Workload),
        "Client workload.",
    ),
    compat(
        "client_k8s_workload_name",
        Cell::K8s(Side::Client, K8sKey::Workload),
        "Client workload.",
    ),
    compat(
        "client_k8s_workload_type",
        Cell::K8s(Side::Client, K8sKey::WorkloadType),
        "Kind of the client workload.",
    ),
    compat(
        "server_k8s_namespace",
        Cell::K8s(Side::Server, K8sKey::Namespace),
        "Server namespace.",
    ),
    compat(
        "server_k8s_pod_name",
        Cell::K8s(Side::Server, K8sKey::Pod),
        "Server pod.",
    ),
    compat(
        "server_k8s_service_name",
        Cell::K8s(Side::Server, K8sKey::Service),
        "Server service.",
    ),
    compat(
        "server_k8s_deployment_name",
        Cell::K8s(Side::Server, K8sKey::Workload),
        "Server workload.",
    ),
    compat(
        "server_k8s_workload_name",
        Cell::K8s(Side::Server, K8sKey::Workload),
        "Server workload.",
    ),
    compat(
        "server_k8s_workload_type",
        Cell::K8s(Side::Server, K8sKey::WorkloadType),
        "Kind of the server workload.",
    ),
];

/// Tags of the local process, its network namespace and the translation that it is given.
pub(crate) const PROCESS_TAGS: &[Column] = &[
    Column::tag("pid", Cell::Pid, "Process id of the local end; `0` when unknown."),
    Column::tag(
        "process_name",
        Cell::ProcessName,
        "Process name of the local end; empty when unknown.",
    ),
    Column::tag(
        "dst_nat_ip",
        Cell::NatIp,
        "Destination address after DNAT; `N/A` when there is none.",
    ),
    Column::tag(
        "dst_nat_port",
        Cell::NatPort,
        "Destination port after DNAT; `N/A` when there is none.",
    ),
    compat("netns", Cell::Netns, "Inode number of the socket's network namespace."),
];

const fn compat(name: &'static str, cell: Cell, doc: &'static str) -> Column {
    Column::tag(name, cell, doc).only(Output::Compat)
}
