//! The Kubernetes objects behind addresses, where they are, and whether flows with them are told.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use ahash::RandomState;
use api::{Plugin, SubnetLabel};
use hashbrown::HashMap;
use records::{
    FlowLog, K8sEndpoint, Str, Transport,
    flowlog::{FlowDirection, FlowPeer},
};

use super::labels::{Layers, Subnets};
use crate::{
    capture::{
        ebpf_net::InCluster,
        whose::{Policy, Whose},
    },
    identity::k8s::{Host, Names, When},
};

/// Addresses towards which the machine's own address is asked for: of documentation, nothing is sent there.
const FAR: [&str; 2] = ["192.0.2.1:9", "[2001:db8::1]:9"];

/// What flows say by settings alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlowLabels {
    /// Name of the cluster; empty for none.
    pub cluster: String,
    /// Namespaces of the infrastructure, by name or by its beginning before a `*`.
    pub infra: Vec<String>,
    /// Names of address ranges.
    pub subnets: Vec<SubnetLabel>,
}

/// Objects by address, port and transport, for one flush.
pub(super) struct Peers {
    names: Option<Names>,
    policy: Policy,
    known: HashMap<(IpAddr, u16, Transport), Option<Arc<FlowPeer>>, RandomState>,
    now: i64,
    cluster: Str,
    layers: Layers,
    subnets: Subnets,
    /// The agent's own node, as of this flush.
    own: Host,
    /// The machine's address, as of this flush.
    agent_ip: Option<IpAddr>,
}

impl Peers {
    pub(super) fn new(cluster: Option<InCluster>, labels: &FlowLabels) -> Self {
        Self {
            names: cluster.as_ref().map(|cluster| cluster.names.clone()),
            policy: Policy::new(cluster, |on| on.plugins.contains(&Plugin::BpfNetlog)),
            known: HashMap::default(),
            now: 0,
            cluster: labels.cluster.as_str().into(),
            layers: Layers::new(&labels.infra),
            subnets: Subnets::new(&labels.subnets),
            own: Host::default(),
            agent_ip: None,
        }
    }

    /// A flush begins: what was looked up may have changed.
    pub(super) fn begin(&mut self) {
        self.known.clear();
        self.policy.changed();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.now = i64::try_from(now.as_nanos()).unwrap_or(i64::MAX);
        self.own = self.names.as_ref().map(Names::own_host).unwrap_or_default();
        self.agent_ip = self.own.ip.or_else(|| FAR.iter().find_map(|far| towards(far)));
    }

    /// Names both ends of a flow; false if the flow is switched off for the namespace of either. `here` tells the addresses
    /// of interfaces that can be seen: those of pods are known by the node they are on, too.
    pub(super) fn name(&mut self, flow: &mut FlowLog, ports: [u16; 2], here: impl Fn(IpAddr) -> bool) -> bool {
        self.sign(flow);
        flow.src_subnet_label = self.subnets.name(flow.src);
        flow.dst_subnet_label = self.subnets.name(flow.dst);
        if self.names.is_none() {
            flow.direction = direction(here(flow.src), here(flow.dst));
            return true;
        }
        let transport = if flow.proto == 17 {
            Transport::Udp
        } else {
            Transport::Tcp
        };
        let times = [flow.start_unix_ms, flow.end_unix_ms].map(|ms| ms.saturating_mul(1_000_000));
        flow.src_k8s = self.peer(flow.src, ports[0], transport, times);
        flow.dst_k8s = self.peer(flow.dst, ports[1], transport, times);
        flow.layer = Some(self.layers.of(flow.src_k8s.as_deref(), flow.dst_k8s.as_deref()));
        let is_here = |ip: IpAddr, peer: &Option<Arc<FlowPeer>>| {
            let on = peer.as_ref().map_or("", |peer| &peer.host_name);
            here(ip) || (!on.is_empty() && *on == *self.own.name)
        };
        flow.direction = direction(is_here(flow.src, &flow.src_k8s), is_here(flow.dst, &flow.dst_k8s));
        let namespaces = [&flow.src_k8s, &flow.dst_k8s].map(|peer| peer.as_ref().map(|peer| peer.namespace.clone()));
        let mut in_pods = namespaces
            .into_iter()
            .flatten()
            .filter(|name| !name.is_empty())
            .peekable();
        if in_pods.peek().is_none() {
            return self.policy.of(None) == Whose::On;
        }
        in_pods.all(|namespace| self.policy.of_namespace(&namespace) == Whose::On)
    }

    /// Says which agent tells a flow.
    pub(super) fn sign(&self, flow: &mut FlowLog) {
        flow.agent_ip = self.agent_ip;
        flow.cluster = self.cluster.clone();
    }

    fn peer(&mut self, ip: IpAddr, port: u16, transport: Transport, [first, last]: [i64; 2]) -> Option<Arc<FlowPeer>> {
        let (names, now) = (self.names.as_ref()?, self.now);
        self.known
            .entry((ip, port, transport))
            .or_insert_with(|| {
                let when = When {
                    first: first.min(now),
                    last: last.min(now),
                    now,
                };
                let found = names
                    .remote(ip, (port != 0).then_some(port), transport, when)
                    .name
                    .ok()?;
                let mut found = peer(&found);
                // A service is nowhere; what stands behind its address on a node is elsewhere.
                if &*found.kind != "Service"
                    && let Some(host) = names.host(ip, when)
                {
                    found.host_name = host.name;
                    found.host_ip = host.ip;
                    found.zone = host.zone;
                }
                Some(Arc::new(found))
            })
            .clone()
    }
}

/// The address from which the machine would talk to another; asking sends nothing.
fn towards(far: &str) -> Option<IpAddr> {
    let far: SocketAddr = far.parse().ok()?;
    let any: SocketAddr = if far.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse().ok()?;
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect(far).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

fn direction(from_here: bool, to_here: bool) -> Option<FlowDirection> {
    match (from_here, to_here) {
        (true, true) => Some(FlowDirection::Inner),
        (true, false) => Some(FlowDirection::Egress),
        (false, true) => Some(FlowDirection::Ingress),
        (false, false) => None,
    }
}

/// The object in the words of the format.
fn peer(endpoint: &K8sEndpoint) -> FlowPeer {
    let kind = |kind: &str| -> Str {
        match kind {
            "deployment" => "Deployment".into(),
            "statefulset" => "StatefulSet".into(),
            "daemonset" => "DaemonSet".into(),
            "replicaset" => "ReplicaSet".into(),
            "cronjob" => "CronJob".into(),
            other => {
                let mut letters = other.chars();
                let first = letters.next().map(|letter| letter.to_ascii_uppercase());
                first.into_iter().chain(letters).collect::<String>().into()
            }
        }
    };
    let node = &*endpoint.workload_type == "node";
    let (name, own_kind) = if !endpoint.pod.is_empty() {
        (endpoint.pod.clone(), "Pod")
    } else if node {
        (endpoint.workload.clone(), "Node")
    } else {
        (endpoint.service.clone(), "Service")
    };
    let owned = own_kind == "Pod" && !endpoint.workload.is_empty();
    FlowPeer {
        kind: own_kind.into(),
        namespace: endpoint.namespace.clone(),
        owner_name: if owned { endpoint.workload.clone() } else { name.clone() },
        owner_kind: if owned {
            kind(&endpoint.workload_type)
        } else {
            own_kind.into()
        },
        name,
        ..FlowPeer::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(pod: &str, service: &str, workload: &str, kind: &str) -> K8sEndpoint {
        K8sEndpoint {
            namespace: "shop".into(),
            pod: pod.into(),
            service: service.into(),
            workload: workload.into(),
            workload_type: kind.into(),
            labels: Arc::default(),
        }
    }

    #[test]
    fn objects_are_told_in_the_words_of_the_format() {
        for (endpoint, wanted) in [
            (
                endpoint("a-1", "a", "a", "deployment"),
                ["Pod", "a-1", "Deployment", "a"],
            ),
            (endpoint("a-1", "", "", ""), ["Pod", "a-1", "Pod", "a-1"]),
            (endpoint("", "a", "", ""), ["Service", "a", "Service", "a"]),
            (endpoint("", "", "n1", "node"), ["Node", "n1", "Node", "n1"]),
            (endpoint("c", "", "b", "rollout"), ["Pod", "c", "Rollout", "b"]),
        ] {
            let peer = peer(&endpoint);
            assert_eq!([&*peer.kind, &*peer.name, &*peer.owner_kind, &*peer.owner_name], wanted);
        }
    }

    #[test]
    fn directions_are_those_of_the_node() {
        assert_eq!(direction(true, true), Some(FlowDirection::Inner));
        assert_eq!(direction(false, true), Some(FlowDirection::Ingress));
        assert_eq!(direction(true, false), Some(FlowDirection::Egress));
        assert_eq!(direction(false, false), None);
    }
}
