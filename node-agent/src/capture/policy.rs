//! Whose traffic is reported: keeps a kernel object's map `POLICY` like pods, namespaces and the object.
//!
//! ```text
//! pods, cgroups, namespaces, EbpfCollector ▶ [`wanted`] (pure) ▶ what differs ▶ map `POLICY`
//!                                                     └▶ [`Switches`] ▶ capture: settings, connections to drop or adopt
//! ```
//! The map is empty while nothing differs from the default, so that a cluster without rules pays nothing. [`Keeper`] owns it.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    sync::Arc,
};

use ahash::RandomState;
use api::{
    L7Flow, Plugin,
    collector::{EbpfCollectorSpec, NamespacePlugins, plugins_for, policy::plugins_for_host},
};
use ebpf_common::net::{NetConfig, policy};
use hashbrown::HashMap;
use prometheus_client::metrics::{counter::Counter, gauge::Gauge};
use records::Str;
use telemetry::Telemetry;
use tokio::sync::watch;

use crate::{
    capture::ends::Pods,
    ebpf::sys,
    identity::{
        cgroup::Uid,
        k8s::{Names, Namespaces, Places},
    },
};

/// Entries of the kernel's map.
const ENTRIES_MAX: usize = 16_384;

/// What is on and off.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Switches {
    /// [`policy`] bits of processes outside pods.
    pub host: u32,
    /// Those of processes that have no entry, by cgroup or by network namespace.
    pub processes: u32,
    /// Those of ends whose process is not known.
    pub unowned: u32,
    /// The kernel side has to ask for each end.
    pub asks: bool,
    /// Pods of this node that the flow is on for.
    pub on: Arc<Pods>,
    /// Pods of this node that it is off for.
    pub off: Arc<Pods>,
    /// Pods of this node whose flows are not looked up in connection tracking.
    pub nat_off: Arc<Pods>,
    /// Those of processes outside pods are not.
    pub host_nat_off: bool,
}

impl Switches {
    /// Sets the defaults of the kernel side.
    pub(super) fn write_to(&self, kernel: &mut NetConfig) {
        kernel.policy = self.processes;
        kernel.policy_unowned = self.unowned;
        kernel.policy_entries = u32::from(self.asks);
    }
}

/// Whether nodes share this kernel, each with a pid namespace of its own, as in kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sharing {
    /// The machine is this node's.
    Not,
    /// They do; the kernel side tells processes of other nodes.
    ByProcess,
    /// They do, and it cannot.
    Unknown,
}

/// What the policy is made of.
pub(super) struct Inputs<'a> {
    /// The object.
    pub spec: &'a EbpfCollectorSpec,
    /// All namespaces.
    pub namespaces: &'a Namespaces,
    /// Where pods are.
    pub places: &'a Places,
    /// Inode number of the node's network namespace.
    pub host_netns: Option<u32>,
    /// Whether other nodes share this kernel.
    pub sharing: Sharing,
    /// The [`policy`] bit that it is about.
    pub flow: u32,
}

/// What the kernel's map must hold, and what is on and off. `placement` gives a pod's namespace and whether the pod is on
/// this node; one that is not known is treated like the node's own processes.
pub(super) fn wanted(
    inputs: &Inputs<'_>,
    placement: impl Fn(Uid) -> Option<(Str, bool)>,
) -> (HashMap<u64, u32, RandomState>, Switches) {
    let Inputs {
        spec,
        namespaces,
        places,
        host_netns,
        sharing,
        flow,
    } = *inputs;
    let bits = |plugins: &NamespacePlugins| bits(plugins) & flow;
    let host_plugins = plugins_for_host(spec);
    let host = bits(&host_plugins);
    let translated = |plugins: &NamespacePlugins| plugins.plugins.contains(&Plugin::EbpfConntrack);
    // Where nodes share the kernel, an end of nobody that is in no namespace of this node is another's.
    let shared = sharing != Sharing::Not;
    let unowned = if shared { policy::OTHER_NODE } else { host };
    let processes = if sharing == Sharing::Unknown {
        policy::OTHER_NODE
    } else {
        host
    };
    let mut by_namespace: HashMap<Str, (u32, bool), RandomState> = HashMap::default();
    let mut by_pod: HashMap<Uid, u32, RandomState> = HashMap::default();
    let (mut on, mut off, mut nat_off) = (Pods::default(), Pods::default(), Pods::default());
    let pods = places.cgroups.iter().map(|(_, uid)| uid);
    for uid in pods.chain(places.namespaces.iter().map(|(_, uid)| uid)) {
        if by_pod.contains_key(uid) {
            continue;
        }
        let bits = match placement(*uid) {
            None => host,
            Some((_, false)) => policy::OTHER_NODE,
            Some((namespace, true)) => {
                let of = || {
                    let meta = namespaces.get(&*namespace).cloned().unwrap_or_default();
                    let plugins = plugins_for(spec, &namespace, &meta.labels, &meta.annotations);
                    (bits(&plugins), translated(&plugins))
                };
                let (bits, translated) = *by_namespace.entry(namespace.clone()).or_insert_with(of);
                if !translated {
                    nat_off.insert(*uid);
                }
                if bits & flow != 0 {
                    on.insert(*uid)
                } else {
                    off.insert(*uid)
                };
                bits
            }
        };
        by_pod.insert(*uid, bits);
    }
    let of = |uid: &Uid| by_pod.get(uid).copied().unwrap_or(host);
    let cgroups = places
        .cgroups
        .iter()
        .map(|(id, uid)| (policy::of_cgroup(*id), of(uid), processes));
    let own = host_netns
        .filter(|_| shared)
        .map(|inode| (policy::of_netns(inode), host, unowned));
    let netns = places.namespaces.iter().filter(|(inode, _)| Some(*inode) != host_netns);
    let netns = netns.map(|(inode, uid)| (policy::of_netns(*inode), of(uid), unowned));
    let all: Vec<_> = own.into_iter().chain(cgroups).chain(netns).collect();
    // Once one pod differs each has its entries: a pod's own cgroup decides before its namespace is asked.
    let differs = all.iter().any(|(_, bits, default)| bits != default);
    let entries: HashMap<_, _, _> = all
        .into_iter()
        .filter(|_| differs)
        .map(|(key, bits, _)| (key, bits))
        .collect();
    let rules = spec.namespaces.as_ref().is_some_and(|rules| !rules.is_empty());
    let switches = Switches {
        host,
        processes,
        unowned,
        // Before the first entry is there, so that none is late.
        asks: !entries.is_empty() || rules || spec.allow_namespace_annotation == Some(true) || host == 0,
        on: Arc::new(on),
        off: Arc::new(off),
        nat_off: Arc::new(nat_off),
        host_nat_off: !translated(&host_plugins),
    };
    (entries, switches)
}

fn bits(plugins: &NamespacePlugins) -> u32 {
    if !plugins.plugins.contains(&Plugin::EbpfNet) {
        return 0;
    }
    let on = |flow, bit| if plugins.l7.contains(&flow) { bit } else { 0 };
    policy::NETFLOW | on(L7Flow::Http, policy::HTTPFLOW) | on(L7Flow::HttpTls, policy::HTTPFLOW_TLS)
}

/// Metrics of the policy.
#[derive(Clone, Debug, Default)]
pub(super) struct PolicyMetrics {
    entries: Gauge,
    refused: Counter,
    off: Gauge,
    /// Connections of a pod that began before its namespace's switch reached the kernel.
    pub late: Counter,
}

impl PolicyMetrics {
    pub(super) fn new(telemetry: &Telemetry) -> Self {
        let this = Self::default();
        telemetry.register("policy", |registry| {
            registry.register(
                "entries",
                "Cgroups and network namespaces of pods in the kernel's map; none while no pod differs from the default",
                this.entries.clone(),
            );
            registry.register(
                "refused",
                "Entries left out because the kernel's map is full or refused them",
                this.refused.clone(),
            );
            registry.register(
                "pods_off",
                "Pods of this node that netflow is off for",
                this.off.clone(),
            );
            registry.register(
                "late_connections",
                "Connections of pods that began before it was known that they are off; none of them is reported",
                this.late.clone(),
            );
        });
        this
    }
}

/// Keeps the map.
#[derive(Debug)]
pub struct Keeper {
    map: OwnedFd,
    applied: HashMap<u64, u32, RandomState>,
    names: Names,
    spec: watch::Receiver<Arc<EbpfCollectorSpec>>,
    switches: watch::Sender<Switches>,
    sharing: Sharing,
    flow: u32,
    metrics: PolicyMetrics,
}

impl Keeper {
    /// Fills the map with what is on and off of `flow`, a [`policy`] bit; the switches of then and later are in the
    /// receiver.
    pub(super) fn start(
        map: OwnedFd,
        names: Names,
        spec: watch::Receiver<Arc<EbpfCollectorSpec>>,
        sharing: Sharing,
        flow: u32,
        metrics: PolicyMetrics,
    ) -> (Self, watch::Receiver<Switches>) {
        let (switches, told) = watch::channel(Switches::default());
        let mut this = Self {
            map,
            applied: HashMap::default(),
            names,
            spec,
            switches,
            sharing,
            flow,
            metrics,
        };
        this.apply();
        (this, told)
    }

    /// Follows pods, cgroups, namespaces and the object until it is dropped.
    pub async fn run(mut self) {
        let (mut changes, mut namespaces) = (self.names.changes(), self.names.namespaces());
        let mut spec = self.spec.clone();
        loop {
            self.apply();
            let more = tokio::select! {
                changed = changes.changed() => changed,
                changed = namespaces.changed() => changed,
                changed = spec.changed() => changed,
            };
            if more.is_err() {
                return;
            }
        }
    }

    fn apply(&mut self) {
        let spec = Arc::clone(&self.spec.borrow_and_update());
        let namespaces = Arc::clone(&self.names.namespaces().borrow());
        let inputs = Inputs {
            spec: &spec,
            namespaces: &namespaces,
            places: &self.names.places(),
            host_netns: self.names.host_netns(),
            sharing: self.sharing,
            flow: self.flow,
        };
        let (entries, switches) = wanted(&inputs, |uid| self.names.placement(uid));
        // First what is off: the other order would let some through.
        let mut set: Vec<(u64, u32)> = entries
            .iter()
            .filter(|(key, bits)| self.applied.get(*key) != Some(*bits))
            .map(|(key, bits)| (*key, *bits))
            .collect();
        set.sort_unstable_by_key(|(_, bits)| bits & self.flow);
        let gone: Vec<u64> = self
            .applied
            .keys()
            .filter(|key| !entries.contains_key(*key))
            .copied()
            .collect();
        for key in gone {
            self.applied.remove(&key);
            if let Err(error) = sys::delete(self.map.as_fd(), &key) {
                tracing::warn!(%error, "Cannot remove a switch of a pod from the kernel's map");
            }
        }
        for (key, bits) in set {
            let done = if self.applied.len() >= ENTRIES_MAX && !self.applied.contains_key(&key) {
                Err(io::Error::from_raw_os_error(libc::E2BIG))
            } else {
                sys::update(self.map.as_fd(), &key, &bits)
            };
            match done {
                Ok(()) => drop(self.applied.insert(key, bits)),
                Err(error) => {
                    if self.metrics.refused.inc() == 0 {
                        tracing::warn!(%error, "Cannot switch a pod on or off in the kernel; the default holds for it");
                    }
                }
            }
        }
        self.metrics
            .entries
            .set(i64::try_from(self.applied.len()).unwrap_or(i64::MAX));
        self.metrics
            .off
            .set(i64::try_from(switches.off.len()).unwrap_or(i64::MAX));
        self.switches.send_if_modified(|known| {
            let changed = *known != switches;
            *known = switches;
            changed
        });
    }
}

/// What changed between two states.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Switched {
    /// Pods that were on and are off.
    pub off: Pods,
    /// Pods that are off from the first look at them.
    pub new_off: Pods,
    /// Pods that were off and are on.
    pub on: Pods,
    /// The node's own processes, if they were switched.
    pub host: Option<bool>,
}

impl Switched {
    /// What is to be done to come from `old` to `new`.
    pub(super) fn between(old: &Switches, new: &Switches) -> Self {
        let host = |of: &Switches| of.host & policy::NETFLOW != 0;
        let (off, new_off) = new
            .off
            .iter()
            .filter(|uid| !old.off.contains(*uid))
            .partition(|uid| old.on.contains(*uid));
        Self {
            off,
            new_off,
            on: new.on.intersection(&old.off).copied().collect(),
            host: (host(old) != host(new)).then(|| host(new)),
        }
    }
}

#[cfg(test)]
#[path = "policy_tests.rs"]
mod tests;
