//! Lookups that never wait for the API server.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use ahash::RandomState;
use hashbrown::HashMap;
use parking_lot::RwLock;
use records::{K8sEndpoint, Str, Transport};
use tokio::sync::watch;

use super::{
    store::{Answer, Counts, Host, Kind, Store, When},
    watch::{Health, Namespaces, Options, Progress},
};
use crate::{
    ebpf::offsets::CgroupHierarchy,
    identity::{
        cgroup::{self, Index, Uid},
        process::Proc,
    },
};

/// Names of labels, each with that of the tag made of it.
pub type Labels = Arc<[(String, String)]>;

/// Whose process a local end is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum LocalEnd {
    /// Not known.
    #[default]
    Unknown,
    /// No pod's, and in the node's network.
    Host,
    /// A pod's.
    Pod(Uid),
}

/// Where pods are on this machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Places {
    /// Their cgroups, by id.
    pub cgroups: Vec<(u64, Uid)>,
    /// Network namespaces that a pod has for itself, by inode number.
    pub namespaces: Vec<(u32, Uid)>,
}

/// What is known, shared by those who keep it and those who ask.
#[derive(Debug)]
pub(super) struct State {
    pub(super) node: Box<str>,
    pub(super) store: RwLock<Store>,
    pub(super) cgroups: RwLock<Index>,
    pub(super) hierarchy: CgroupHierarchy,
    /// Directory of the hierarchy.
    pub(super) root: PathBuf,
    pub(super) proc: Proc,
    pub(super) host_netns: Option<u64>,
    pub(super) namespaces: watch::Sender<Namespaces>,
    pub(super) progress: [Progress; Kind::COUNT],
    /// Names of labels and of the tags made of them.
    pub(super) labels: watch::Sender<Labels>,
    /// Counts changes of pods and cgroups of this machine.
    pub(super) changes: watch::Sender<u64>,
    /// Directories of cgroups that could not be watched.
    pub(super) unwatched: AtomicU64,
}

impl State {
    pub(super) fn new(options: &Options) -> Self {
        let proc = Proc::new(&options.proc);
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let (hierarchy, root) = cgroup::find_hierarchy(
            &[&options.host_root.join("sys/fs/cgroup"), Path::new("/sys/fs/cgroup")],
            &own,
        );
        tracing::info!(?hierarchy, root = %root.display(), "Cgroups of pods");
        Self {
            node: options.node.as_str().into(),
            store: RwLock::new(Store::new(&options.node)),
            cgroups: RwLock::default(),
            hierarchy,
            root,
            host_netns: proc.node_netns(),
            proc,
            namespaces: watch::Sender::new(Namespaces::default()),
            progress: std::array::from_fn(|_| Progress::default()),
            labels: watch::Sender::new(Labels::default()),
            changes: watch::Sender::new(0),
            unwatched: AtomicU64::new(0),
        }
    }

    /// Tells that pods or cgroups of this machine changed.
    pub(super) fn changed(&self) {
        self.changes.send_modify(|version| *version = version.wrapping_add(1));
    }
}

/// Names of the ends of flows. Clones share what is known.
#[derive(Clone, Debug)]
pub struct Names(Arc<State>);

pub(super) fn now_ns() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_nanos()).unwrap_or(i64::MAX)
}

impl Names {
    pub(super) const fn new(state: Arc<State>) -> Self {
        Self(state)
    }

    /// Makes tags of labels of pods and workloads: names of labels, each with that of its tag. All is listed anew if that is
    /// a change.
    pub fn want_labels(&self, labels: Labels) {
        self.0.labels.send_if_modified(|known| {
            let changed = *known != labels;
            *known = labels;
            changed
        });
    }

    /// Kinds that are followed.
    #[must_use]
    pub fn kinds(&self) -> Vec<Kind> {
        let labelled = !self.0.labels.borrow().is_empty();
        let more = Kind::LABELLED.into_iter().filter(|_| labelled);
        Kind::NAMED.into_iter().chain(more).collect()
    }

    /// Whose process a local end is: by its cgroup (0 if not known), else by the process (0 if not known), else by the
    /// inode number of its network namespace. Ask early: processes and namespaces go.
    #[must_use]
    pub fn local_end(&self, cgroup_id: u64, pid: u32, netns: u32) -> LocalEnd {
        let state = &*self.0;
        let pod = state.cgroups.read().pod(cgroup_id);
        if let Some(uid) = pod {
            return LocalEnd::Pod(uid);
        }
        if pid != 0
            && let Some(uid) = cgroup::pod_of_process(&state.proc, pid)
        {
            return LocalEnd::Pod(uid);
        }
        if state.host_netns == Some(u64::from(netns)) {
            return LocalEnd::Host;
        }
        // Also what is started in a pod's network from outside its cgroups.
        let uid = state.cgroups.read().pod_of_netns(netns);
        uid.map_or(LocalEnd::Unknown, LocalEnd::Pod)
    }

    /// The name of a local end.
    #[must_use]
    pub fn local(&self, end: LocalEnd, ip: IpAddr, port: Option<u16>, transport: Transport, when: When) -> Answer {
        let store = self.0.store.read();
        match end {
            LocalEnd::Pod(uid) => {
                let found = store.pod(uid, when);
                if found.name.is_ok() {
                    return found;
                }
            }
            LocalEnd::Host => {
                if let Some(node) = store.own_node() {
                    return Answer {
                        name: Ok(node),
                        lesser: None,
                        since: i64::MIN,
                    };
                }
            }
            LocalEnd::Unknown => {}
        }
        store.by_address(ip, port, transport, when)
    }

    /// The name of a pod.
    #[must_use]
    pub fn pod(&self, uid: Uid, when: When) -> Answer {
        self.0.store.read().pod(uid, when)
    }

    /// The name of a remote end; `port` is `None` where it is a client's and left out.
    #[must_use]
    pub fn remote(&self, ip: IpAddr, port: Option<u16>, transport: Transport, when: When) -> Answer {
        self.0.store.read().by_address(ip, port, transport, when)
    }

    /// The node behind an address.
    #[must_use]
    pub fn host(&self, ip: IpAddr, when: When) -> Option<Host> {
        self.0.store.read().host(ip, when)
    }

    /// The agent's own node, as a host.
    #[must_use]
    pub fn own_host(&self) -> Host {
        self.0.store.read().own_host()
    }

    /// How long the API may take to tell who has an address, nanoseconds; `now` is since 1970.
    #[must_use]
    pub fn patience(&self, ip: IpAddr, now: i64) -> i64 {
        self.0.store.read().patience(ip, now)
    }

    /// How many pods are remembered to have held an address: it grows when the address changes hands.
    #[must_use]
    pub fn holders(&self, ip: IpAddr) -> usize {
        self.0.store.read().holders(ip)
    }

    /// The agent's own node.
    #[must_use]
    pub fn own_node(&self) -> Option<Arc<K8sEndpoint>> {
        self.0.store.read().own_node()
    }

    /// Whether a pod is in the node's network.
    #[must_use]
    pub fn in_host_network(&self, pod: Uid) -> bool {
        self.0.store.read().in_host_network(pod)
    }

    /// The pod of a cgroup.
    #[must_use]
    pub fn pod_of_cgroup(&self, cgroup_id: u64) -> Option<Uid> {
        self.0.cgroups.read().pod(cgroup_id)
    }

    /// Inode number of the node's network namespace, if it could be read.
    #[must_use]
    pub fn host_netns(&self) -> Option<u32> {
        self.0.host_netns.and_then(|inode| u32::try_from(inode).ok())
    }

    /// The hierarchy by whose ids [`Self::local_end`] wants cgroups.
    #[must_use]
    pub fn hierarchy(&self) -> &CgroupHierarchy {
        &self.0.hierarchy
    }

    /// Whether a pod is on the agent's own node; `None` if the pod is not known.
    #[must_use]
    pub fn is_local(&self, pod: Uid) -> Option<bool> {
        self.0.store.read().placement(pod).map(|(_, own)| own)
    }

    /// Namespace of a pod, and whether it is on the agent's own node.
    #[must_use]
    pub fn placement(&self, pod: Uid) -> Option<(Str, bool)> {
        self.0.store.read().placement(pod)
    }

    /// Cgroups of pods that are on this machine, and network namespaces that a pod has for itself.
    #[must_use]
    pub fn places(&self) -> Places {
        let index = self.0.cgroups.read();
        Places {
            cgroups: index.cgroups().collect(),
            namespaces: index.namespaces().collect(),
        }
    }

    /// Processes of some pods, with the ids of their cgroups.
    #[must_use]
    pub fn processes(&self, which: impl Fn(Uid) -> bool) -> HashMap<u32, u64, RandomState> {
        let places = self.0.cgroups.read().places(which);
        let of = |(id, _, path): &(u64, Uid, PathBuf)| {
            let id = *id;
            cgroup::processes(path).into_iter().map(move |pid| (pid, id))
        };
        places.iter().flat_map(of).collect()
    }

    /// Notes that a process of a pod has a socket in a network namespace, unless another pod is known to be in it.
    pub fn learn_netns(&self, pod: Uid, netns: u32) {
        let state = &*self.0;
        let known = netns == 0
            || state.host_netns == Some(u64::from(netns))
            || state.cgroups.read().pod_of_netns(netns).is_some()
            || state.store.read().placement(pod).is_none()
            || self.in_host_network(pod);
        if !known && state.cgroups.write().add_netns(pod, netns) {
            state.changed();
        }
    }

    /// Word of changes to pods and cgroups of this machine.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.0.changes.subscribe()
    }

    /// All namespaces, and word of their changes.
    #[must_use]
    pub fn namespaces(&self) -> watch::Receiver<Namespaces> {
        self.0.namespaces.subscribe()
    }

    /// How the watch of a kind fares.
    #[must_use]
    pub fn health(&self, kind: Kind) -> Health {
        let progress = self.0.progress.get(kind as usize);
        progress.map_or_else(|| Progress::default().health(), Progress::health)
    }

    /// Sizes and losses.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.0.store.read().counts()
    }

    /// Cgroups known, and those left out for lack of room.
    #[must_use]
    pub fn cgroups(&self) -> (usize, u64) {
        let index = self.0.cgroups.read();
        (index.len(), index.refused())
    }

    /// Directories of cgroups that could not be watched.
    #[must_use]
    pub fn unwatched(&self) -> u64 {
        self.0.unwatched.load(Ordering::Relaxed)
    }
}
