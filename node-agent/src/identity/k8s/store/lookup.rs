//! Names of the ends of flows, out of a [`Store`].

use std::{net::IpAddr, sync::Arc};

use records::{IpType, K8sEndpoint, Str, Transport};

use super::{NodeEntry, OPEN, PodEntry, Seen, ServiceEntry, Store};
use crate::identity::cgroup::Uid;

/// How long after its end an address still names its last holder: the last segments of a connection trail behind.
const TRAIL_NS: i64 = 10 * 1_000_000_000;
/// How long the API may take to tell who has an address. Until then the next holder may have talked already.
pub const SETTLE_NS: i64 = 3 * 1_000_000_000;

/// The same while pods are without an address that the API knows of: a busy kubelet tells late.
const PATIENT_NS: i64 = 15 * 1_000_000_000;

/// Why an end has no name, or a lesser one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Unnamed {
    /// No object is known by this address, uid or port.
    Unknown,
    /// No object is known by this address, which is a public or multicast one.
    Outside,
    /// Several pods may have held the address at that time; what they have in common is named.
    AddressAmbiguous,
    /// The address was not held at that time.
    NotHeldThen,
    /// Several pods in the node's network declare the port: the node is named in their place.
    PortAmbiguous,
    /// The pod is named, its workload is not: the replica set or job that owns it has not been seen.
    OwnerUnseen,
}

impl Unnamed {
    /// The reason in metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Outside => "outside",
            Self::AddressAmbiguous => "address_ambiguous",
            Self::NotHeldThen => "not_held_then",
            Self::PortAmbiguous => "port_ambiguous",
            Self::OwnerUnseen => "owner_unseen",
        }
    }
}

/// When something happened and when it is asked about, nanoseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct When {
    /// It began no earlier.
    pub first: i64,
    /// It ended no later.
    pub last: i64,
    /// Now.
    pub now: i64,
}

impl When {
    /// What happened at one time, long enough ago that all is known of it.
    #[must_use]
    pub const fn long_ago(at: i64) -> Self {
        Self {
            first: at,
            last: at,
            now: at + SETTLE_NS,
        }
    }
}

/// What a lookup found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The name.
    pub name: Result<Arc<K8sEndpoint>, Unnamed>,
    /// Why the name lacks something.
    pub lesser: Option<Unnamed>,
    /// The answer holds for all that began at this time or later, until now.
    pub since: i64,
}

/// The node behind an address: its own, or of the pod that has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// Name of the node.
    pub name: Str,
    /// Its first address.
    pub ip: Option<IpAddr>,
    /// Its label `topology.kubernetes.io/zone`; empty if it has none.
    pub zone: Str,
    /// Whether it is the agent's own.
    pub own: bool,
}

impl Answer {
    fn always(name: Arc<K8sEndpoint>) -> Self {
        Self {
            name: Ok(name),
            lesser: None,
            since: i64::MIN,
        }
    }

    fn not(why: Unnamed, since: i64) -> Self {
        Self {
            name: Err(why),
            lesser: None,
            since,
        }
    }
}

impl Store {
    /// The pod of a uid as it was then; ended ones too, while they are remembered.
    #[must_use]
    pub fn pod(&self, uid: Uid, when: When) -> Answer {
        match self.pods.get(uid) {
            Some(pod) => self.endpoint(pod, when),
            None => Answer::not(Unnamed::Unknown, i64::MIN),
        }
    }

    /// The agent's own node.
    #[must_use]
    pub fn own_node(&self) -> Option<Arc<K8sEndpoint>> {
        let node = self.own_node.and_then(|uid| self.nodes.get(&uid))?;
        Some(Arc::clone(&node.endpoint))
    }

    /// The node of an address: of a node, or of the pods that held it then, if all were on one. A service has none.
    #[must_use]
    pub fn host(&self, ip: IpAddr, when: When) -> Option<Host> {
        if let Some(node) = self.node_ips.get(&ip).and_then(|uid| self.nodes.get(uid)) {
            return Some(self.host_of(&node.endpoint.workload));
        }
        let held = self.by_ip.of(ip).iter().filter_map(|uid| self.pods.get(*uid));
        // The last segments of a connection trail behind the end of a pod.
        let mut nodes = held
            .filter(|pod| pod.from <= when.last && when.first < pod.to.saturating_add(TRAIL_NS))
            .map(|pod| pod.node);
        let first = nodes.next()?;
        let name = self.pod_nodes.name(first);
        (!name.is_empty() && nodes.all(|node| node == first)).then(|| self.host_of(name))
    }

    /// The agent's own node, as a host.
    #[must_use]
    pub fn own_host(&self) -> Host {
        self.host_of(&self.node)
    }

    fn host_of(&self, name: &str) -> Host {
        let node = self.node_names.get(name).and_then(|uid| self.nodes.get(uid));
        Host {
            name: name.into(),
            ip: node.and_then(|node| node.ips.first().copied()),
            zone: node.map_or_else(Str::default, |node| node.zone.clone()),
            own: *name == *self.node,
        }
    }

    /// Namespace of a pod, and whether it is on the agent's own node.
    #[must_use]
    pub fn placement(&self, uid: Uid) -> Option<(Str, bool)> {
        self.pods
            .get(uid)
            .map(|pod| (pod.namespace.clone(), self.pod_nodes.name(pod.node) == &*self.node))
    }

    /// Whether a pod is in the node's network.
    #[must_use]
    pub fn in_host_network(&self, uid: Uid) -> bool {
        self.pods.get(uid).is_some_and(|pod| pod.ports.is_some())
    }

    /// How many pods are remembered to have held an address.
    #[must_use]
    pub fn holders(&self, ip: IpAddr) -> usize {
        self.by_ip.of(ip).len()
    }

    /// Who held `ip` then; `port` tells services on a node's address and pods in a node's network.
    #[must_use]
    pub fn by_address(&self, ip: IpAddr, port: Option<u16>, transport: Transport, when: When) -> Answer {
        if let Some(node) = self.node_ips.get(&ip).and_then(|uid| self.nodes.get(uid)) {
            return self.on_node(node, ip, port, transport, when);
        }
        let held = self.holder(ip, when);
        if matches!(held.name, Ok(_) | Err(Unnamed::AddressAmbiguous)) {
            return held;
        }
        if let Some(service) = self.service_ips.get(&ip).and_then(|uid| self.services.get(uid)) {
            return self.service(service);
        }
        // An endpoint of a service without a selector.
        if self.by_ip.of(ip).is_empty()
            && let Some(slice) = self.backs.get(&ip).and_then(|uid| self.slices.get(uid))
        {
            return Answer::always(Arc::new(K8sEndpoint {
                namespace: slice.namespace.clone(),
                service: slice.service.clone(),
                ..K8sEndpoint::default()
            }));
        }
        held
    }

    fn on_node(&self, node: &NodeEntry, ip: IpAddr, port: Option<u16>, transport: Transport, when: When) -> Answer {
        let just_node = || Answer::always(Arc::clone(&node.endpoint));
        let Some(key) = port.map(|port| (port, transport)) else {
            return just_node();
        };
        if let Some(service) = self.node_ports.get(&key).and_then(|uid| self.services.get(uid)) {
            return self.service(service);
        }
        let uids = self.by_ip.of(ip);
        let mut pods = uids
            .iter()
            .filter_map(|uid| self.pods.get(*uid))
            .filter(|pod| pod.ports.as_ref().is_some_and(|ports| ports.0.contains(&key)))
            .filter(|pod| pod.from <= when.last && when.first < pod.to);
        match (pods.next(), pods.next()) {
            (Some(pod), None) => self.endpoint(pod, when),
            (Some(_), Some(_)) => Answer {
                lesser: Some(Unnamed::PortAmbiguous),
                since: i64::MAX,
                ..just_node()
            },
            (None, _) => just_node(),
        }
    }

    /// A service, with the workload behind it if all its pods have the same.
    fn service(&self, service: &ServiceEntry) -> Answer {
        let endpoint = &service.endpoint;
        let key = (endpoint.namespace.clone(), endpoint.service.clone());
        let slices = self.slices_of.get(&key).into_iter().flatten();
        let mut pods = slices
            .filter_map(|uid| self.slices.get(uid))
            .flat_map(|slice| &slice.ips)
            .filter_map(|ip| self.by_ip.of(*ip).last())
            .filter_map(|uid| self.pods.get(*uid))
            .filter(|pod| pod.ports.is_none());
        let Some(first) = pods.next() else {
            return Answer::always(Arc::clone(endpoint));
        };
        if !pods.all(|pod| pod.owner == first.owner || self.workload(pod) == self.workload(first)) {
            return Answer::always(Arc::clone(endpoint));
        }
        let (workload_type, workload) = self.workload(first).unwrap_or_default();
        Answer::always(Arc::new(K8sEndpoint {
            workload,
            workload_type,
            ..K8sEndpoint::clone(endpoint)
        }))
    }

    /// How long the API may take to tell who has this address.
    pub fn patience(&self, ip: IpAddr, now: i64) -> i64 {
        if unknown(ip) == Unnamed::Unknown && self.awaits_addresses(now) {
            PATIENT_NS
        } else {
            SETTLE_NS
        }
    }

    /// The pod that held an address.
    fn holder(&self, ip: IpAddr, when: When) -> Answer {
        let uids = self.by_ip.of(ip);
        let pods = || {
            uids.iter()
                .filter_map(|uid| self.pods.get(*uid))
                .filter(|pod| pod.ports.is_none())
        };
        let then = || pods().filter(|pod| pod.from <= when.last && when.first < pod.to);
        match then().count() {
            0 => {}
            1 => {
                let sole = pods().count() == 1;
                return match then().next() {
                    Some(pod) => {
                        let answer = self.endpoint(pod, when);
                        let since = if sole && pod.to == OPEN {
                            answer.since.max(pod.from)
                        } else {
                            i64::MAX
                        };
                        Answer { since, ..answer }
                    }
                    None => Answer::not(Unnamed::Unknown, i64::MAX),
                };
            }
            _ => return self.in_common(then(), when),
        }
        let trailing = pods()
            .filter(|pod| pod.to <= when.first && when.first - pod.to < TRAIL_NS)
            .max_by_key(|pod| pod.to);
        match trailing {
            // Who has it next would be known by now.
            Some(pod) if when.now - when.first >= self.patience(ip, when.now) => Answer {
                since: i64::MAX,
                ..self.endpoint(pod, when)
            },
            _ if uids.is_empty() => Answer::not(unknown(ip), i64::MIN),
            _ => Answer::not(Unnamed::NotHeldThen, i64::MAX),
        }
    }

    /// What several pods that may be meant have in common.
    fn in_common<'a>(&self, pods: impl Iterator<Item = &'a PodEntry>, when: When) -> Answer {
        let mut names = pods.filter_map(|pod| self.endpoint(pod, when).name.ok());
        let nothing = Answer::not(Unnamed::AddressAmbiguous, i64::MAX);
        let Some(first) = names.next() else { return nothing };
        let common = names.fold(K8sEndpoint::clone(&first), |common, other| {
            let same = |a: Str, b: &Str| if a == *b { a } else { Str::default() };
            let workload = common.workload == other.workload && common.workload_type == other.workload_type;
            let of_both = |text: Str| if workload { text } else { Str::default() };
            K8sEndpoint {
                namespace: same(common.namespace, &other.namespace),
                pod: same(common.pod, &other.pod),
                service: same(common.service, &other.service),
                workload: of_both(common.workload),
                workload_type: of_both(common.workload_type),
                labels: if common.labels == other.labels {
                    common.labels
                } else {
                    Arc::default()
                },
            }
        });
        if common.namespace.is_empty() {
            return nothing;
        }
        let whole = common == *first;
        Answer {
            name: Ok(Arc::new(common)),
            lesser: (!whole).then_some(Unnamed::AddressAmbiguous),
            since: i64::MAX,
        }
    }

    /// Kind and name of what runs a pod; `None` while the object between them has not been seen.
    fn workload(&self, pod: &PodEntry) -> Option<(Str, Str)> {
        let Some(owner) = pod.owner.and_then(|uid| self.owners.get(&uid)) else {
            return Some((self.pod_kind.clone(), pod.name.clone()));
        };
        match &owner.parent {
            Some(parent) => Some((parent.kind.clone(), parent.name.clone())),
            // Not seen yet: whether a deployment is above it is not known.
            None if owner.seen == Seen::Never && matches!(&*owner.kind, "replicaset" | "job") => None,
            None => Some((owner.kind.clone(), owner.name.clone())),
        }
    }

    fn endpoint(&self, pod: &PodEntry, when: When) -> Answer {
        let slice = || {
            // The address of a pod in the node's network is not its own.
            let ips = pod.ips.iter().flatten().filter(|_| pod.ports.is_none());
            ips.filter_map(|ip| self.slices.get(self.backs.get(ip)?))
                .find(|slice| slice.namespace == pod.namespace)
                .map(|slice| slice.service.clone())
        };
        let let_go = self.let_go.get(&pod.uid);
        // The address of an ended pod may back another's service by now.
        let service = if pod.to == OPEN { slice() } else { None };
        let service = service.or_else(|| {
            let_go
                .filter(|(_, until)| when.first < *until)
                .map(|(service, _)| service.clone())
        });
        let workload = self.workload(pod);
        let lesser = workload.is_none().then_some(Unnamed::OwnerUnseen);
        let (workload_type, workload) = workload.unwrap_or_default();
        let parent = pod.owner.and_then(|uid| self.owners.get(&uid)?.parent.as_ref()?.uid);
        Answer {
            name: Ok(Arc::new(K8sEndpoint {
                labels: self.labels.of(pod.uid, pod.owner, parent),
                namespace: pod.namespace.clone(),
                pod: pod.name.clone(),
                service: service.unwrap_or_default(),
                workload,
                workload_type,
            })),
            lesser,
            since: if let_go.is_some() { i64::MAX } else { i64::MIN },
        }
    }
}

/// [`Unnamed::Unknown`], told apart from addresses that no cluster gives out.
fn unknown(ip: IpAddr) -> Unnamed {
    match IpType::of(ip) {
        IpType::Multicast | IpType::Other => Unnamed::Outside,
        IpType::Private | IpType::Loopback => Unnamed::Unknown,
    }
}
