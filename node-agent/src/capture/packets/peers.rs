//! The Kubernetes objects behind addresses, and whether flows with them are told.

use std::{
    net::IpAddr,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use ahash::RandomState;
use api::Plugin;
use hashbrown::HashMap;
use records::{FlowLog, K8sEndpoint, Str, Transport, flowlog::FlowPeer};

use crate::{
    capture::{
        ebpf_net::InCluster,
        whose::{Policy, Whose},
    },
    identity::k8s::{Names, When},
};

/// Objects by address, port and transport, for one flush.
pub(super) struct Peers {
    names: Option<Names>,
    policy: Policy,
    known: HashMap<(IpAddr, u16, Transport), Option<Arc<FlowPeer>>, RandomState>,
    now: i64,
}

impl Peers {
    pub(super) fn new(cluster: Option<InCluster>) -> Self {
        Self {
            names: cluster.as_ref().map(|cluster| cluster.names.clone()),
            policy: Policy::new(cluster, |on| on.plugins.contains(&Plugin::BpfNetlog)),
            known: HashMap::default(),
            now: 0,
        }
    }

    /// A flush begins: what was looked up may have changed.
    pub(super) fn begin(&mut self) {
        self.known.clear();
        self.policy.changed();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.now = i64::try_from(now.as_nanos()).unwrap_or(i64::MAX);
    }

    /// Names both ends of a flow; false if the flow is switched off for the namespace of either.
    pub(super) fn name(&mut self, flow: &mut FlowLog, ports: [u16; 2]) -> bool {
        if self.names.is_none() {
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
                Some(Arc::new(peer(&found)))
            })
            .clone()
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
        host_name: if node {
            endpoint.workload.clone()
        } else {
            Str::default()
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
}
