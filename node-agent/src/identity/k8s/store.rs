//! What is known of the cluster, with times. No I/O.

mod cluster;
mod labels;
mod lookup;
mod pod_nodes;
mod tables;

use std::{net::IpAddr, sync::Arc};

use ahash::RandomState;
use hashbrown::{HashMap, HashSet};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use records::{K8sEndpoint, Str, Transport};

use super::objects::{Job, Pod, ReplicaSet};
use crate::identity::cgroup::Uid;
use labels::Labels;
pub use lookup::SETTLE_NS;
pub use lookup::{Answer, Host, Unnamed, When};
use pod_nodes::PodNodes;
use tables::{Holders, Pods};

/// How long what ended is remembered, nanoseconds.
const HISTORY_NS: i64 = 600 * 1_000_000_000;
/// How long before a pod's end its service may have let its address go and still be its service.
const LET_GO_NS: i64 = 60 * 1_000_000_000;
/// A pod that has no address for so long does not start.
const WAITS_NS: i64 = 60 * 1_000_000_000;
/// Ended pods remembered at most.
const HISTORY_MAX: usize = 16_384;
/// `to` of what has not ended.
const OPEN: i64 = i64::MAX;
/// Label of a node with its zone.
const ZONE: &str = "topology.kubernetes.io/zone";
/// Annotation with the uid that the cgroup of a static pod carries.
const CONFIG_HASH: &str = "kubernetes.io/config.hash";

/// Sizes and losses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Pods that live.
    pub pods: usize,
    /// Pods that ended and are remembered.
    pub history: usize,
    /// Ended pods forgotten before their time for lack of room.
    pub history_dropped: u64,
}

#[derive(Debug)]
struct PodEntry {
    uid: Uid,
    owner: Option<Uid>,
    ips: [Option<IpAddr>; 2],
    namespace: Str,
    name: Str,
    from: i64,
    to: i64,
    /// The low half of the list's number: with what follows it takes no more than a word.
    list: u16,
    /// The node it was given, by its number in [`PodNodes`]; one without a name before.
    node: u16,
    /// Ports of a pod in the node's network.
    ports: Option<Box<HostPorts>>,
}

/// Ports that tell pods in a node's network apart. Few have them: one word in the others.
#[derive(Debug)]
struct HostPorts(Box<[(u16, Transport)]>);

#[derive(Debug)]
struct Owner {
    kind: Str,
    name: Str,
    /// The workload above it: a replica set's deployment, a job's cron job.
    parent: Option<Parent>,
    /// Pods that have it.
    pods: u32,
    seen: Seen,
}

#[derive(Debug)]
struct Parent {
    uid: Option<Uid>,
    kind: Str,
    name: Str,
}

/// What is known of an owner beyond what its pods say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    /// Its kind is not watched, or it has not come yet.
    Never,
    /// It is; the list it was seen in.
    In(u32),
    /// It was; its last pod takes it away.
    Gone,
}

#[derive(Debug)]
struct SliceEntry {
    namespace: Str,
    service: Str,
    ips: Box<[IpAddr]>,
    list: u32,
}

#[derive(Debug)]
struct ServiceEntry {
    endpoint: Arc<K8sEndpoint>,
    ips: Box<[IpAddr]>,
    node_ports: Box<[(u16, Transport)]>,
    list: u32,
}

#[derive(Debug)]
struct NodeEntry {
    endpoint: Arc<K8sEndpoint>,
    ips: Box<[IpAddr]>,
    zone: Str,
    list: u32,
}

/// A kind that is listed and watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Pods.
    Pod,
    /// Services.
    Service,
    /// Endpoint slices.
    EndpointSlice,
    /// Nodes.
    Node,
    /// Replica sets.
    ReplicaSet,
    /// Jobs.
    Job,
    /// Namespaces; they are kept beside the store.
    Namespace,
    /// Deployments, for their labels.
    Deployment,
    /// Stateful sets, for their labels.
    StatefulSet,
    /// Daemon sets, for their labels.
    DaemonSet,
    /// Cron jobs, for their labels.
    CronJob,
}

impl Kind {
    /// As the API spells it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pod => "pods",
            Self::Service => "services",
            Self::EndpointSlice => "endpointslices",
            Self::Node => "nodes",
            Self::ReplicaSet => "replicasets",
            Self::Job => "jobs",
            Self::Namespace => "namespaces",
            Self::Deployment => "deployments",
            Self::StatefulSet => "statefulsets",
            Self::DaemonSet => "daemonsets",
            Self::CronJob => "cronjobs",
        }
    }

    /// Those that are always followed.
    pub const NAMED: [Self; 7] = [
        Self::Pod,
        Self::Service,
        Self::EndpointSlice,
        Self::Node,
        Self::ReplicaSet,
        Self::Job,
        Self::Namespace,
    ];
    /// Those that are followed when labels of workloads are wanted.
    pub const LABELLED: [Self; 4] = [Self::Deployment, Self::StatefulSet, Self::DaemonSet, Self::CronJob];
    /// How many there are.
    pub const COUNT: usize = Self::NAMED.len() + Self::LABELLED.len();
}

/// The number of each kind's latest list; an object has the number of the list it was last seen in or after.
#[derive(Debug, Default)]
struct Lists([u32; Kind::COUNT]);

impl Lists {
    fn get(&self, kind: Kind) -> u32 {
        self.0.get(kind as usize).copied().unwrap_or_default()
    }

    fn next(&mut self, kind: Kind) {
        if let Some(list) = self.0.get_mut(kind as usize) {
            *list = list.wrapping_add(1);
        }
    }
}

/// What is known of the cluster.
#[derive(Debug)]
pub struct Store {
    node: Str,
    pods: Pods,
    by_ip: Holders,
    owners: HashMap<Uid, Owner, RandomState>,
    slices: HashMap<Uid, SliceEntry, RandomState>,
    /// The slice of an address; of several the one whose service is first by name.
    backs: HashMap<IpAddr, Uid, RandomState>,
    /// Addresses that were in several slices at once.
    shared: HashSet<IpAddr, RandomState>,
    services: HashMap<Uid, ServiceEntry, RandomState>,
    service_ips: HashMap<IpAddr, Uid, RandomState>,
    node_ports: HashMap<(u16, Transport), Uid, RandomState>,
    nodes: HashMap<Uid, NodeEntry, RandomState>,
    node_ips: HashMap<IpAddr, Uid, RandomState>,
    node_names: HashMap<Str, Uid, RandomState>,
    pod_nodes: PodNodes,
    own_node: Option<Uid>,
    texts: HashSet<Str, RandomState>,
    history: std::collections::VecDeque<(i64, Uid)>,
    dropped: u64,
    lists: Lists,
    /// Services that pods had, and until when: addresses of living pods that were let go, and ended pods.
    let_go: HashMap<Uid, (Str, i64), RandomState>,
    /// Slices of a service, by namespace and name.
    slices_of: HashMap<(Str, Str), Vec<Uid>, RandomState>,
    /// Pods that wait for an address.
    waiting: HashSet<Uid, RandomState>,
    /// Since when the youngest of them does.
    waiting_since: i64,
    /// The kind of a pod without owner.
    pod_kind: Str,
    labels: Labels,
}

impl Store {
    /// Knows nothing yet; `node` is the agent's own.
    #[must_use]
    pub fn new(node: &str) -> Self {
        Self {
            node: node.into(),
            pods: Pods::default(),
            by_ip: Holders::default(),
            owners: HashMap::default(),
            slices: HashMap::default(),
            backs: HashMap::default(),
            shared: HashSet::default(),
            services: HashMap::default(),
            service_ips: HashMap::default(),
            node_ports: HashMap::default(),
            nodes: HashMap::default(),
            node_ips: HashMap::default(),
            node_names: HashMap::default(),
            pod_nodes: PodNodes::default(),
            own_node: None,
            texts: HashSet::default(),
            history: std::collections::VecDeque::new(),
            dropped: 0,
            lists: Lists::default(),
            let_go: HashMap::default(),
            slices_of: HashMap::default(),
            waiting: HashSet::default(),
            waiting_since: 0,
            pod_kind: "pod".into(),
            labels: Labels::default(),
        }
    }

    /// Sizes and losses.
    #[must_use]
    pub fn counts(&self) -> Counts {
        Counts {
            pods: self.pods.len() - self.history.len().min(self.pods.len()),
            history: self.history.len(),
            history_dropped: self.dropped,
        }
    }

    /// A new list of a kind begins; a list that was under way is abandoned, and nothing is gone by it.
    pub fn begin_list(&mut self, kind: Kind) {
        self.lists.next(kind);
    }

    /// The list of a kind is complete: what of the kind was not in it is gone.
    pub fn end_list(&mut self, kind: Kind, now: i64) {
        let list = self.lists.get(kind);
        let stale = |seen: u32| seen != list;
        match kind {
            Kind::Namespace => {}
            Kind::Deployment | Kind::StatefulSet | Kind::DaemonSet | Kind::CronJob => {
                self.labels.end_list(kind, list);
            }
            Kind::Pod => {
                let gone: Vec<Uid> = self
                    .pods
                    .values()
                    .filter(|pod| pod.to == OPEN && pod.list != list as u16)
                    .map(|pod| pod.uid)
                    .collect();
                gone.into_iter().for_each(|uid| self.end_pod(uid, now));
            }
            Kind::Service => keys(&self.services, |it| stale(it.list))
                .into_iter()
                .for_each(|uid| self.remove_service(uid)),
            Kind::EndpointSlice => keys(&self.slices, |it| stale(it.list))
                .into_iter()
                .for_each(|uid| self.drop_slice(uid, now)),
            Kind::Node => keys(&self.nodes, |it| stale(it.list))
                .into_iter()
                .for_each(|uid| self.remove_node(uid)),
            Kind::ReplicaSet | Kind::Job => {
                let name = if kind == Kind::Job { "job" } else { "replicaset" };
                self.owners.retain(|uid, owner| {
                    if &*owner.kind == name && matches!(owner.seen, Seen::In(seen) if stale(seen)) {
                        owner.seen = Seen::Gone;
                    }
                    let stays = owner.pods > 0 || owner.seen != Seen::Gone;
                    if !stays {
                        self.labels.remove_owner(*uid);
                    }
                    stays
                });
            }
        }
    }

    /// A pod is, or changed.
    pub fn apply_pod(&mut self, pod: &Pod, now: i64) {
        let Some(uid) = pod_uid(&pod.metadata) else { return };
        let ended = matches!(pod.status.phase.as_deref(), Some("Succeeded" | "Failed"));
        let mut ips = pod.status.pod_ips.iter().map(|it| it.ip.as_str());
        let first = ips.next().or(pod.status.pod_ip.as_deref()).and_then(address);
        let ips = [first, ips.next().and_then(address)];
        let list = self.lists.get(Kind::Pod) as u16;
        self.labels.set_pod(uid, &pod.metadata);
        if first.is_some() || ended {
            self.waiting.remove(&uid);
        } else if self.waiting.insert(uid) {
            self.waiting_since = now;
        }
        let node = pod.spec.node_name.as_deref().unwrap_or_default();
        if let Some(entry) = self.pods.get_mut(uid) {
            entry.list = list;
            // A pod is made before it is given a node.
            if self.pod_nodes.name(entry.node) != node {
                self.pod_nodes.release(entry.node);
                entry.node = self.pod_nodes.hold(node);
            }
            if entry.to != OPEN {
                if ended {
                    return;
                }
                // A static pod comes again under the uid its cgroup keeps.
                entry.to = OPEN;
                self.let_go.remove(&uid);
                self.history.retain(|(_, old)| *old != uid);
            }
            let before = entry.ips;
            if ips.iter().any(Option::is_some) {
                entry.ips = ips;
            }
            let after = entry.ips;
            if before != after {
                self.release(uid, before);
                self.hold(uid, after);
            }
        } else {
            let Some(name) = pod.metadata.name.as_deref() else {
                return;
            };
            let owner = controller(&pod.metadata).and_then(|owner| self.refer(owner));
            let namespace = self.text(pod.metadata.namespace.as_deref().unwrap_or_default());
            // A start in the future is a clock's fault.
            let from = pod
                .status
                .start_time
                .as_ref()
                .and_then(|time| i64::try_from(time.0.as_nanosecond()).ok())
                .unwrap_or(now)
                .min(now);
            let ports = pod.spec.host_network.then(|| Box::new(HostPorts(ports(pod))));
            let entry = PodEntry {
                uid,
                owner,
                ips,
                namespace,
                name: name.into(),
                from,
                to: OPEN,
                list,
                node: self.pod_nodes.hold(node),
                ports,
            };
            self.pods.insert(entry);
            self.hold(uid, ips);
        }
        if ended {
            self.end_pod(uid, now);
        }
    }

    /// A pod is gone.
    pub fn delete_pod(&mut self, pod: &Pod, now: i64) {
        if let Some(uid) = pod_uid(&pod.metadata) {
            self.end_pod(uid, now);
        }
    }

    fn end_pod(&mut self, uid: Uid, now: i64) {
        let Some(entry) = self.pods.get_mut(uid).filter(|entry| entry.to == OPEN) else {
            return;
        };
        entry.to = now;
        self.waiting.remove(&uid);
        // Its slice lets it go shortly before or after.
        let let_go = self.let_go.remove(&uid).filter(|(_, when)| now - when < LET_GO_NS);
        let slice = entry.ips.iter().flatten().find_map(|ip| self.backs.get(ip));
        let slice = slice.and_then(|slice| self.slices.get(slice));
        let service = slice
            .filter(|slice| entry.ports.is_none() && slice.namespace == entry.namespace)
            .map(|slice| slice.service.clone())
            .or(let_go.map(|(service, _)| service));
        if let Some(service) = service {
            self.let_go.insert(uid, (service, OPEN));
        }
        self.history.push_back((now, uid));
        if self.history.len() > HISTORY_MAX {
            self.dropped += 1;
            self.forget_oldest();
        }
    }

    /// True while a young pod has no address yet that the API tells.
    fn awaits_addresses(&self, now: i64) -> bool {
        !self.waiting.is_empty() && now - self.waiting_since < WAITS_NS
    }

    /// Forgets what ended long ago. Call it now and then.
    pub fn expire(&mut self, now: i64) {
        while self.history.front().is_some_and(|(to, _)| now - to > HISTORY_NS) {
            self.forget_oldest();
        }
        self.let_go.retain(|_, (_, when)| now - *when <= HISTORY_NS);
        self.texts.retain(|text| Arc::strong_count(text) > 1);
    }

    fn forget_oldest(&mut self) {
        let Some(pod) = self.history.pop_front().and_then(|(_, uid)| self.pods.remove(uid)) else {
            return;
        };
        self.release(pod.uid, pod.ips);
        self.pod_nodes.release(pod.node);
        self.let_go.remove(&pod.uid);
        self.labels.remove_pod(pod.uid);
        if let Some(owner) = pod.owner
            && let Some(entry) = self.owners.get_mut(&owner)
        {
            entry.pods = entry.pods.saturating_sub(1);
            if entry.pods == 0 && !matches!(entry.seen, Seen::In(_)) {
                self.owners.remove(&owner);
                self.labels.remove_owner(owner);
            }
        }
    }

    fn hold(&mut self, uid: Uid, ips: [Option<IpAddr>; 2]) {
        ips.into_iter().flatten().for_each(|ip| self.by_ip.add(ip, uid));
    }

    fn release(&mut self, uid: Uid, ips: [Option<IpAddr>; 2]) {
        ips.into_iter().flatten().for_each(|ip| self.by_ip.remove(ip, uid));
    }

    fn refer(&mut self, owner: &OwnerReference) -> Option<Uid> {
        let uid = Uid::parse(&owner.uid)?;
        if let Some(entry) = self.owners.get_mut(&uid) {
            entry.pods += 1;
        } else {
            let kind = self.text(&owner.kind.to_lowercase());
            let entry = Owner {
                kind,
                name: owner.name.as_str().into(),
                parent: None,
                pods: 1,
                seen: Seen::Never,
            };
            self.owners.insert(uid, entry);
        }
        Some(uid)
    }

    /// A replica set is, or changed.
    pub fn apply_replica_set(&mut self, set: &ReplicaSet) {
        self.apply_owner("replicaset", &set.metadata);
    }

    /// A job is, or changed.
    pub fn apply_job(&mut self, job: &Job) {
        self.apply_owner("job", &job.metadata);
    }

    fn apply_owner(&mut self, kind: &str, meta: &ObjectMeta) {
        let (Some(uid), Some(name)) = (meta_uid(meta), meta.name.as_deref()) else {
            return;
        };
        let parent = controller(meta).map(|owner| Parent {
            uid: Uid::parse(&owner.uid),
            kind: self.text(&owner.kind.to_lowercase()),
            name: self.text(&owner.name),
        });
        self.labels.set_owner(uid, meta);
        let list = self.lists.get(if kind == "job" { Kind::Job } else { Kind::ReplicaSet });
        let kind = self.text(kind);
        let entry = self.owners.entry(uid).or_insert_with(|| Owner {
            kind,
            name: name.into(),
            parent: None,
            pods: 0,
            seen: Seen::Never,
        });
        (entry.parent, entry.seen) = (parent, Seen::In(list));
    }

    /// A workload is, or changed: its labels.
    pub fn apply_workload(&mut self, kind: Kind, meta: &ObjectMeta) {
        let list = self.lists.get(kind);
        if let Some(uid) = meta_uid(meta) {
            self.labels.set_workload(uid, kind, list, meta);
        }
    }

    /// A workload is gone.
    pub fn delete_workload(&mut self, meta: &ObjectMeta) {
        if let Some(uid) = meta_uid(meta) {
            self.labels.remove_workload(uid);
        }
    }

    /// Labels of pods and workloads that become tags, with the tags' names. Objects that are known get theirs with the
    /// next list.
    pub fn want_labels(&mut self, wanted: &[(String, String)]) {
        self.labels.want(wanted);
    }

    /// A replica set or a job is gone; pods that had it keep its name.
    pub fn delete_owner(&mut self, meta: &ObjectMeta) {
        let Some(uid) = meta_uid(meta) else { return };
        match self.owners.get_mut(&uid) {
            Some(owner) if owner.pods > 0 => owner.seen = Seen::Gone,
            _ => {
                self.owners.remove(&uid);
                self.labels.remove_owner(uid);
            }
        }
    }

    /// The shared copy of a text.
    fn text(&mut self, text: &str) -> Str {
        self.texts.get_or_insert_with(text, |text| text.into()).clone()
    }
}

fn keys<T>(of: &HashMap<Uid, T, RandomState>, which: impl Fn(&T) -> bool) -> Vec<Uid> {
    of.iter().filter(|(_, it)| which(it)).map(|(uid, _)| *uid).collect()
}

fn meta_uid(meta: &ObjectMeta) -> Option<Uid> {
    Uid::parse(meta.uid.as_deref()?)
}

/// The uid by which a pod's cgroup knows it.
pub(super) fn pod_uid(meta: &ObjectMeta) -> Option<Uid> {
    let hash = meta
        .annotations
        .as_ref()
        .and_then(|annotations| annotations.get(CONFIG_HASH));
    hash.and_then(|hash| Uid::parse(hash)).or_else(|| meta_uid(meta))
}

fn controller(meta: &ObjectMeta) -> Option<&OwnerReference> {
    let owners = meta.owner_references.as_deref().unwrap_or_default();
    // The mirror of a static pod is owned by its node, which is no workload.
    owners
        .iter()
        .find(|owner| owner.controller == Some(true) && owner.kind != "Node")
}

fn address(text: &str) -> Option<IpAddr> {
    text.parse::<IpAddr>().ok().map(|ip| ip.to_canonical())
}

fn transport(protocol: Option<&str>) -> Option<Transport> {
    match protocol {
        None | Some("TCP") => Some(Transport::Tcp),
        Some("UDP") => Some(Transport::Udp),
        Some(_) => None,
    }
}

fn ports(pod: &Pod) -> Box<[(u16, Transport)]> {
    let ports = pod.spec.containers.iter().flat_map(|container| &container.ports);
    ports
        .filter_map(|port| {
            let number = port.host_port.filter(|it| *it != 0).unwrap_or(port.container_port);
            Some((number, transport(port.protocol.as_deref())?))
        })
        .collect()
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
