//! For which processes a part of the agent is on: the object and its namespaces decide, by the pod that a process is in.

use ahash::RandomState;
use api::collector::{NamespacePlugins, plugins_for, policy::plugins_for_host};
use hashbrown::HashMap;
use parking_lot::Mutex;
use records::{K8sEndpoint, Str};
use std::sync::Arc;
use tokio::sync::watch;

use crate::{
    capture::ebpf_net::InCluster,
    identity::{
        cgroup::Uid,
        k8s::{Namespaces, When},
    },
};

/// What becomes of what a process does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whose {
    /// It is reported.
    On,
    /// Switched off.
    Off,
    /// The pod is on another node that shares this kernel.
    OtherNode,
}

/// Outside clusters all is on.
pub(super) struct Policy {
    cluster: Option<Followed>,
}

struct Followed {
    cluster: InCluster,
    wanted: fn(&NamespacePlugins) -> bool,
    changes: watch::Receiver<u64>,
    namespaces: watch::Receiver<Namespaces>,
    /// By namespace, and of what is in no pod; until something changes.
    known: Mutex<HashMap<Option<Str>, bool, RandomState>>,
}

impl Policy {
    /// `wanted` says whether what is on for a namespace includes that part.
    pub(super) fn new(cluster: Option<InCluster>, wanted: fn(&NamespacePlugins) -> bool) -> Self {
        let cluster = cluster.map(|cluster| Followed {
            wanted,
            changes: cluster.names.changes(),
            namespaces: cluster.names.namespaces(),
            known: Mutex::default(),
            cluster,
        });
        Self { cluster }
    }

    /// True if something changed since the last call.
    pub(super) fn changed(&mut self) -> bool {
        let Some(followed) = &mut self.cluster else {
            return false;
        };
        let Followed {
            cluster,
            changes,
            namespaces,
            known,
            ..
        } = followed;
        let changed = changes.has_changed().unwrap_or(false)
            | namespaces.has_changed().unwrap_or(false)
            | cluster.spec.has_changed().unwrap_or(false);
        if changed {
            changes.mark_unchanged();
            namespaces.mark_unchanged();
            cluster.spec.mark_unchanged();
            known.lock().clear();
        }
        changed
    }

    /// For a process in `pod`, or in none. A pod that is not known is treated like the node's own processes.
    pub(super) fn of(&self, pod: Option<Uid>) -> Whose {
        let Some(followed) = &self.cluster else {
            return Whose::On;
        };
        match pod.and_then(|uid| followed.cluster.names.placement(uid)) {
            Some((_, false)) => Whose::OtherNode,
            Some((namespace, true)) => followed.is_on(Some(namespace)),
            None => followed.is_on(None),
        }
    }

    /// For a pod of a namespace.
    pub(super) fn of_namespace(&self, namespace: &Str) -> Whose {
        let Some(followed) = &self.cluster else {
            return Whose::On;
        };
        followed.is_on(Some(namespace.clone()))
    }

    /// The names of a pod, as it was at a time (nanoseconds since 1970).
    pub(super) fn name(&self, pod: Option<Uid>, at: i64) -> Option<Arc<K8sEndpoint>> {
        let names = &self.cluster.as_ref()?.cluster.names;
        names.pod(pod?, When::long_ago(at)).name.ok()
    }
}

impl Followed {
    fn is_on(&self, namespace: Option<Str>) -> Whose {
        let mut known = self.known.lock();
        let on = *known.entry(namespace).or_insert_with_key(|namespace| {
            let spec = self.cluster.spec.borrow();
            let plugins: NamespacePlugins = match namespace {
                Some(namespace) => {
                    let namespaces = self.namespaces.borrow();
                    let meta = namespaces.get(&**namespace).cloned().unwrap_or_default();
                    plugins_for(&spec, namespace, &meta.labels, &meta.annotations)
                }
                None => plugins_for_host(&spec),
            };
            (self.wanted)(&plugins)
        });
        if on { Whose::On } else { Whose::Off }
    }
}
