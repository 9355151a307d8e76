//! What is known of the cluster, with times. No I/O.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use ahash::RandomState;
use hashbrown::{HashMap, HashSet, HashTable};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use records::{K8sEndpoint, Str, Transport};

use super::objects::{EndpointSlice, Job, Node, Pod, ReplicaSet, Service};
use crate::identity::cgroup::Uid;

/// How long what ended is remembered, nanoseconds.
const HISTORY_NS: i64 = 600 * 1_000_000_000;
/// How long after its end an address still names its last holder: the last segments of a connection trail behind.
const TRAIL_NS: i64 = 10 * 1_000_000_000;
/// How long before a pod's end its service may have let its address go and still be its service.
const LET_GO_NS: i64 = 60 * 1_000_000_000;
/// Ended pods remembered at most.
const HISTORY_MAX: usize = 16_384;
/// `to` of what has not ended.
const OPEN: i64 = i64::MAX;
/// Annotation with the uid that the cgroup of a static pod carries.
const CONFIG_HASH: &str = "kubernetes.io/config.hash";
/// Label of a slice with the service's name.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// Why an end has no name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unnamed {
    /// No object is known by this address, uid or port.
    Unknown,
    /// Two pods may have held the address at that time.
    AddressAmbiguous,
    /// The address was not held at that time.
    NotHeldThen,
    /// Several pods in the node's network declare the port: the node is named in their place.
    PortAmbiguous,
    /// The pod is named, its workload is not: the replica set or job that owns it has not been seen.
    OwnerUnseen,
}

/// Lookups that gave no name or a lesser one, by [`Unnamed`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UnnamedCounts {
    /// [`Unnamed::Unknown`].
    pub unknown: u64,
    /// [`Unnamed::AddressAmbiguous`].
    pub address_ambiguous: u64,
    /// [`Unnamed::NotHeldThen`].
    pub not_held_then: u64,
    /// [`Unnamed::PortAmbiguous`].
    pub port_ambiguous: u64,
    /// [`Unnamed::OwnerUnseen`].
    pub owner_unseen: u64,
}

/// [`UnnamedCounts`] while they grow; lookups share the store.
#[derive(Debug, Default)]
struct Unnameds {
    unknown: AtomicU64,
    address_ambiguous: AtomicU64,
    not_held_then: AtomicU64,
    port_ambiguous: AtomicU64,
    owner_unseen: AtomicU64,
}

impl Unnameds {
    fn add(&self, why: Unnamed) {
        let counter = match why {
            Unnamed::Unknown => &self.unknown,
            Unnamed::AddressAmbiguous => &self.address_ambiguous,
            Unnamed::NotHeldThen => &self.not_held_then,
            Unnamed::PortAmbiguous => &self.port_ambiguous,
            Unnamed::OwnerUnseen => &self.owner_unseen,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

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
    list: u32,
    own: bool,
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
    parent: Option<(Str, Str)>,
    /// Pods that have it.
    pods: u32,
    seen: Seen,
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
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Pod,
        Self::Service,
        Self::EndpointSlice,
        Self::Node,
        Self::ReplicaSet,
        Self::Job,
        Self::Namespace,
    ];
}

/// The number of each kind's latest list; an object has the number of the list it was last seen in or after.
#[derive(Debug, Default)]
struct Lists([u32; Kind::ALL.len()]);

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
    own_node: Option<Uid>,
    texts: HashSet<Str, RandomState>,
    history: std::collections::VecDeque<(i64, Uid)>,
    dropped: u64,
    lists: Lists,
    /// Services that pods had, and until when: addresses of living pods that were let go, and ended pods.
    let_go: HashMap<Uid, (Str, i64), RandomState>,
    unnamed: Unnameds,
}

/// Pods by uid; the uid is in the entry, a table slot is one word.
#[derive(Debug, Default)]
struct Pods {
    table: HashTable<Box<PodEntry>>,
    hasher: RandomState,
}

impl Pods {
    fn get(&self, uid: Uid) -> Option<&PodEntry> {
        let found = self.table.find(self.hasher.hash_one(uid), |pod| pod.uid == uid);
        found.map(|pod| &**pod)
    }

    fn get_mut(&mut self, uid: Uid) -> Option<&mut PodEntry> {
        let hash = self.hasher.hash_one(uid);
        self.table.find_mut(hash, |pod| pod.uid == uid).map(|pod| &mut **pod)
    }

    /// Its uid must not be there yet.
    fn insert(&mut self, pod: PodEntry) {
        let hasher = &self.hasher;
        let hash = hasher.hash_one(pod.uid);
        self.table
            .insert_unique(hash, Box::new(pod), |pod| hasher.hash_one(pod.uid));
    }

    fn remove(&mut self, uid: Uid) -> Option<Box<PodEntry>> {
        let hash = self.hasher.hash_one(uid);
        let found = self.table.find_entry(hash, |pod| pod.uid == uid).ok()?;
        Some(found.remove().0)
    }

    fn values(&self) -> impl Iterator<Item = &PodEntry> {
        self.table.iter().map(|pod| &**pod)
    }

    fn len(&self) -> usize {
        self.table.len()
    }
}

/// Holders of each address, the latest last. Nearly every address has one; the others have a table of their own.
#[derive(Debug, Default)]
struct Holders {
    one: HashMap<IpAddr, Uid, RandomState>,
    more: HashMap<IpAddr, Vec<Uid>, RandomState>,
}

impl Holders {
    fn of(&self, ip: IpAddr) -> &[Uid] {
        let one = || self.one.get(&ip).map_or(&[][..], std::slice::from_ref);
        self.more.get(&ip).map_or_else(one, Vec::as_slice)
    }

    fn add(&mut self, ip: IpAddr, uid: Uid) {
        if let Some(uids) = self.more.get_mut(&ip) {
            uids.retain(|it| *it != uid);
            uids.push(uid);
        } else if let Some(one) = self.one.insert(ip, uid)
            && one != uid
        {
            self.one.remove(&ip);
            self.more.insert(ip, vec![one, uid]);
        }
    }

    fn remove(&mut self, ip: IpAddr, uid: Uid) {
        if let Some(uids) = self.more.get_mut(&ip) {
            uids.retain(|it| *it != uid);
            if let [one] = *uids.as_slice() {
                self.more.remove(&ip);
                self.one.insert(ip, one);
            }
        } else if self.one.get(&ip) == Some(&uid) {
            self.one.remove(&ip);
        }
    }
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
            own_node: None,
            texts: HashSet::default(),
            history: std::collections::VecDeque::new(),
            dropped: 0,
            lists: Lists::default(),
            let_go: HashMap::default(),
            unnamed: Unnameds::default(),
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

    /// Lookups so far that gave no name or a lesser one.
    #[must_use]
    pub fn unnamed(&self) -> UnnamedCounts {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        UnnamedCounts {
            unknown: of(&self.unnamed.unknown),
            address_ambiguous: of(&self.unnamed.address_ambiguous),
            not_held_then: of(&self.unnamed.not_held_then),
            port_ambiguous: of(&self.unnamed.port_ambiguous),
            owner_unseen: of(&self.unnamed.owner_unseen),
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
            Kind::Pod => {
                let gone: Vec<Uid> = self
                    .pods
                    .values()
                    .filter(|pod| pod.to == OPEN && stale(pod.list))
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
                self.owners.retain(|_, owner| {
                    if &*owner.kind == name && matches!(owner.seen, Seen::In(seen) if stale(seen)) {
                        owner.seen = Seen::Gone;
                    }
                    owner.pods > 0 || owner.seen != Seen::Gone
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
        let list = self.lists.get(Kind::Pod);
        if let Some(entry) = self.pods.get_mut(uid) {
            entry.list = list;
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
                own: pod.spec.node_name.as_deref() == Some(&*self.node),
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
        self.let_go.remove(&pod.uid);
        if let Some(owner) = pod.owner
            && let Some(entry) = self.owners.get_mut(&owner)
        {
            entry.pods = entry.pods.saturating_sub(1);
            if entry.pods == 0 && !matches!(entry.seen, Seen::In(_)) {
                self.owners.remove(&owner);
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
        let parent = controller(meta).map(|owner| (self.text(&owner.kind.to_lowercase()), self.text(&owner.name)));
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

    /// A replica set or a job is gone; pods that had it keep its name.
    pub fn delete_owner(&mut self, meta: &ObjectMeta) {
        let Some(uid) = meta_uid(meta) else { return };
        match self.owners.get_mut(&uid) {
            Some(owner) if owner.pods > 0 => owner.seen = Seen::Gone,
            _ => drop(self.owners.remove(&uid)),
        }
    }

    /// A slice is, or changed.
    pub fn apply_slice(&mut self, slice: &EndpointSlice, now: i64) {
        let meta = &slice.metadata;
        let Some(uid) = meta_uid(meta) else { return };
        let Some(service) = meta.labels.as_ref().and_then(|labels| labels.get(SERVICE_NAME)) else {
            return;
        };
        let before = self.remove_slice(uid);
        let entry = SliceEntry {
            namespace: self.text(meta.namespace.as_deref().unwrap_or_default()),
            service: self.text(service),
            ips: addresses(slice.endpoints.iter().flat_map(|it| &it.addresses)),
            list: self.lists.get(Kind::EndpointSlice),
        };
        let names = |slice: &SliceEntry| (slice.namespace.clone(), slice.service.clone());
        for ip in &entry.ips {
            let other = self.backs.get(ip).and_then(|other| self.slices.get(other));
            if other.is_some() {
                self.shared.insert(*ip);
            }
            if other.is_none_or(|other| names(&entry) < names(other)) {
                self.backs.insert(*ip, uid);
            }
        }
        self.slices.insert(uid, entry);
        before.into_iter().for_each(|before| self.let_go(&before, now));
    }

    /// A slice is gone.
    pub fn delete_slice(&mut self, slice: &EndpointSlice, now: i64) {
        meta_uid(&slice.metadata)
            .into_iter()
            .for_each(|uid| self.drop_slice(uid, now));
    }

    fn drop_slice(&mut self, uid: Uid, now: i64) {
        let gone = self.remove_slice(uid);
        gone.into_iter().for_each(|gone| self.let_go(&gone, now));
    }

    /// Remembers the service of living pods whose addresses are in no slice any more.
    fn let_go(&mut self, gone: &SliceEntry, now: i64) {
        for ip in gone.ips.iter().filter(|ip| !self.backs.contains_key(*ip)) {
            for uid in self.by_ip.of(*ip) {
                let pod = self.pods.get(*uid);
                if pod.is_some_and(|pod| pod.to == OPEN && pod.ports.is_none() && pod.namespace == gone.namespace) {
                    self.let_go.insert(*uid, (gone.service.clone(), now));
                }
            }
        }
    }

    fn remove_slice(&mut self, uid: Uid) -> Option<SliceEntry> {
        let gone = self.slices.remove(&uid)?;
        for ip in &gone.ips {
            if self.backs.get(ip) != Some(&uid) {
                continue;
            }
            if !self.shared.contains(ip) {
                self.backs.remove(ip);
                continue;
            }
            // Rare: an address in the slices of two services, or moved between two of one.
            let slices = self.slices.iter().filter(|(_, slice)| slice.ips.contains(ip));
            let next = slices
                .min_by(|(_, a), (_, b)| (&a.namespace, &a.service).cmp(&(&b.namespace, &b.service)))
                .map(|(uid, _)| *uid);
            match next {
                Some(next) => {
                    self.backs.insert(*ip, next);
                }
                None => {
                    self.backs.remove(ip);
                    self.shared.remove(ip);
                }
            }
        }
        Some(gone)
    }

    /// A service is, or changed.
    pub fn apply_service(&mut self, service: &Service) {
        let meta = &service.metadata;
        let (Some(uid), Some(name)) = (meta_uid(meta), meta.name.as_deref()) else {
            return;
        };
        self.remove_service(uid);
        let spec = &service.spec;
        let endpoint = Arc::new(K8sEndpoint {
            namespace: self.text(meta.namespace.as_deref().unwrap_or_default()),
            service: self.text(name),
            ..K8sEndpoint::default()
        });
        let balancer = service.status.load_balancer.ingress.iter().map(|it| &it.ip);
        let ips = addresses(
            spec.cluster_ip
                .iter()
                .chain(&spec.cluster_ips)
                .chain(&spec.external_ips)
                .chain(balancer),
        );
        let node_ports = spec
            .ports
            .iter()
            .filter_map(|port| {
                Some((
                    port.node_port.filter(|it| *it != 0)?,
                    transport(port.protocol.as_deref())?,
                ))
            })
            .collect::<Box<[_]>>();
        self.service_ips.extend(ips.iter().map(|ip| (*ip, uid)));
        self.node_ports.extend(node_ports.iter().map(|port| (*port, uid)));
        let list = self.lists.get(Kind::Service);
        self.services.insert(
            uid,
            ServiceEntry {
                endpoint,
                ips,
                node_ports,
                list,
            },
        );
    }

    /// A service is gone.
    pub fn delete_service(&mut self, service: &Service) {
        meta_uid(&service.metadata)
            .into_iter()
            .for_each(|uid| self.remove_service(uid));
    }

    fn remove_service(&mut self, uid: Uid) {
        let Some(gone) = self.services.remove(&uid) else { return };
        for ip in &gone.ips {
            if self.service_ips.get(ip) == Some(&uid) {
                self.service_ips.remove(ip);
            }
        }
        for port in &gone.node_ports {
            if self.node_ports.get(port) == Some(&uid) {
                self.node_ports.remove(port);
            }
        }
    }

    /// A node is, or changed.
    pub fn apply_node(&mut self, node: &Node) {
        let (Some(uid), Some(name)) = (meta_uid(&node.metadata), node.metadata.name.as_deref()) else {
            return;
        };
        self.remove_node(uid);
        if *name == *self.node {
            self.own_node = Some(uid);
        }
        let endpoint = Arc::new(K8sEndpoint {
            workload: self.text(name),
            workload_type: self.text("node"),
            ..K8sEndpoint::default()
        });
        let ips = addresses(node.status.addresses.iter().map(|it| &it.address));
        self.node_ips.extend(ips.iter().map(|ip| (*ip, uid)));
        let list = self.lists.get(Kind::Node);
        self.nodes.insert(uid, NodeEntry { endpoint, ips, list });
    }

    /// A node is gone.
    pub fn delete_node(&mut self, node: &Node) {
        meta_uid(&node.metadata)
            .into_iter()
            .for_each(|uid| self.remove_node(uid));
    }

    fn remove_node(&mut self, uid: Uid) {
        let Some(gone) = self.nodes.remove(&uid) else { return };
        for ip in &gone.ips {
            if self.node_ips.get(ip) == Some(&uid) {
                self.node_ips.remove(ip);
            }
        }
    }

    /// The pod of a uid as it was at `at`; ended ones too, while they are remembered.
    ///
    /// # Errors
    /// Why there is no name.
    pub fn pod(&self, uid: Uid, at: i64) -> Result<K8sEndpoint, Unnamed> {
        let found = self.pods.get(uid).map(|pod| self.endpoint(pod, at));
        found.ok_or(Unnamed::Unknown).inspect_err(|why| self.unnamed.add(*why))
    }

    /// The agent's own node.
    #[must_use]
    pub fn own_node(&self) -> Option<K8sEndpoint> {
        let node = self.own_node.and_then(|uid| self.nodes.get(&uid))?;
        Some(K8sEndpoint::clone(&node.endpoint))
    }

    /// Namespace of a pod, and whether it is on the agent's own node.
    #[must_use]
    pub fn placement(&self, uid: Uid) -> Option<(Str, bool)> {
        self.pods.get(uid).map(|pod| (pod.namespace.clone(), pod.own))
    }

    /// Who held `ip` at `at`; `port` tells services on a node's address and pods in a node's network.
    ///
    /// # Errors
    /// Why there is no name.
    pub fn by_address(
        &self,
        ip: IpAddr,
        port: Option<u16>,
        transport: Transport,
        at: i64,
    ) -> Result<K8sEndpoint, Unnamed> {
        self.find(ip, port, transport, at)
            .inspect_err(|why| self.unnamed.add(*why))
    }

    fn find(&self, ip: IpAddr, port: Option<u16>, transport: Transport, at: i64) -> Result<K8sEndpoint, Unnamed> {
        if let Some(node) = self.node_ips.get(&ip).and_then(|uid| self.nodes.get(uid)) {
            return Ok(self.on_node(node, ip, port, transport, at));
        }
        let held = match self.by_ip.of(ip) {
            [] => Err(Unnamed::Unknown),
            uids => self.holder(uids, at),
        };
        match held {
            Ok(pod) => return Ok(self.endpoint(pod, at)),
            Err(Unnamed::AddressAmbiguous) => return Err(Unnamed::AddressAmbiguous),
            Err(_) => {}
        }
        if let Some(service) = self.service_ips.get(&ip).and_then(|uid| self.services.get(uid)) {
            return Ok(K8sEndpoint::clone(&service.endpoint));
        }
        // An endpoint of a service without a selector.
        if let (Err(Unnamed::Unknown), Some(slice)) = (&held, self.backs.get(&ip).and_then(|uid| self.slices.get(uid)))
        {
            return Ok(K8sEndpoint {
                namespace: slice.namespace.clone(),
                service: slice.service.clone(),
                ..K8sEndpoint::default()
            });
        }
        held.map(|pod| self.endpoint(pod, at))
    }

    fn on_node(&self, node: &NodeEntry, ip: IpAddr, port: Option<u16>, transport: Transport, at: i64) -> K8sEndpoint {
        let Some(key) = port.map(|port| (port, transport)) else {
            return K8sEndpoint::clone(&node.endpoint);
        };
        if let Some(service) = self.node_ports.get(&key).and_then(|uid| self.services.get(uid)) {
            return K8sEndpoint::clone(&service.endpoint);
        }
        let uids = self.by_ip.of(ip);
        let mut pods = uids
            .iter()
            .filter_map(|uid| self.pods.get(*uid))
            .filter(|pod| pod.ports.as_ref().is_some_and(|ports| ports.0.contains(&key)))
            .filter(|pod| pod.from <= at && at < pod.to);
        match (pods.next(), pods.next()) {
            (Some(pod), None) => self.endpoint(pod, at),
            (Some(_), Some(_)) => {
                self.unnamed.add(Unnamed::PortAmbiguous);
                K8sEndpoint::clone(&node.endpoint)
            }
            (None, _) => K8sEndpoint::clone(&node.endpoint),
        }
    }

    fn holder(&self, uids: &[Uid], at: i64) -> Result<&PodEntry, Unnamed> {
        let pods = || {
            uids.iter()
                .filter_map(|uid| self.pods.get(*uid))
                .filter(|pod| pod.ports.is_none())
        };
        let mut then = pods().filter(|pod| pod.from <= at && at < pod.to);
        match (then.next(), then.next()) {
            (Some(pod), None) => return Ok(pod),
            (Some(_), Some(_)) => return Err(Unnamed::AddressAmbiguous),
            (None, _) => {}
        }
        pods()
            .filter(|pod| pod.to <= at && at - pod.to < TRAIL_NS)
            .max_by_key(|pod| pod.to)
            .ok_or(Unnamed::NotHeldThen)
    }

    fn endpoint(&self, pod: &PodEntry, at: i64) -> K8sEndpoint {
        let slice = || {
            // The address of a pod in the node's network is not its own.
            let ips = pod.ips.iter().flatten().filter(|_| pod.ports.is_none());
            ips.filter_map(|ip| self.slices.get(self.backs.get(ip)?))
                .find(|slice| slice.namespace == pod.namespace)
                .map(|slice| slice.service.clone())
        };
        let let_go = || self.let_go.get(&pod.uid).filter(|(_, when)| at < *when);
        // The address of an ended pod may back another's service by now.
        let service = if pod.to == OPEN { slice() } else { None };
        let service = service.or_else(|| let_go().map(|(service, _)| service.clone()));
        let (workload_type, workload) = match pod.owner.and_then(|uid| self.owners.get(&uid)) {
            None => ("pod".into(), pod.name.clone()),
            Some(owner) => match &owner.parent {
                Some((kind, name)) => (kind.clone(), name.clone()),
                // Not seen yet: whether a deployment is above it is not known.
                None if owner.seen == Seen::Never && matches!(&*owner.kind, "replicaset" | "job") => {
                    self.unnamed.add(Unnamed::OwnerUnseen);
                    (Str::default(), Str::default())
                }
                None => (owner.kind.clone(), owner.name.clone()),
            },
        };
        K8sEndpoint {
            namespace: pod.namespace.clone(),
            pod: pod.name.clone(),
            service: service.unwrap_or_default(),
            workload,
            workload_type,
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
fn pod_uid(meta: &ObjectMeta) -> Option<Uid> {
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

fn addresses<'a>(texts: impl Iterator<Item = &'a String>) -> Box<[IpAddr]> {
    texts.filter_map(|text| address(text)).collect()
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
