//! The pods' cgroups by id, and the pods' network namespaces.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use ahash::RandomState;
use hashbrown::{HashMap, HashSet};

use super::{Uid, hierarchy::is_kubepods, pod};
use crate::identity::process::Proc;

/// How long a removed cgroup still names its pod.
const KEEP: Duration = Duration::from_secs(600);
/// Cgroups kept at most. A node runs some hundred pods with a few cgroups each.
const ENTRIES_MAX: usize = 65_536;
/// Deeper than any kubelet nests.
const DEPTH_MAX: usize = 24;

/// A directory that a walk came by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its path.
    pub path: PathBuf,
    /// Its cgroup's id and pod, if it is a pod's.
    pub pod: Option<(u64, Uid)>,
}

/// Looks through a hierarchy for pods' cgroups, and for the directories that pods are made in.
#[must_use]
pub fn walk(root: &Path) -> Vec<Found> {
    let mut found = Vec::new();
    descend(root, None, false, 0, &mut found);
    found
}

/// Looks through a directory below one that pods are made in; `within` is the pod that it belongs to.
pub(super) fn walk_below(dir: &Path, within: Option<Uid>) -> Vec<Found> {
    let mut found = Vec::new();
    descend(dir, within, true, 0, &mut found);
    found
}

fn descend(dir: &Path, within: Option<Uid>, inside: bool, depth: usize, found: &mut Vec<Found>) {
    let Ok(children) = fs::read_dir(dir) else { return };
    for child in children.flatten() {
        if depth >= DEPTH_MAX || !child.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let name = child.file_name();
        let name = name.to_str().unwrap_or_default();
        let uid = pod(name).or(within);
        let path = child.path();
        let inside = inside || is_kubepods(name);
        if let Some(uid) = uid {
            if let Ok(metadata) = child.metadata() {
                found.push(Found {
                    path: path.clone(),
                    pod: Some((metadata.ino(), uid)),
                });
            }
        } else if inside {
            found.push(Found {
                path: path.clone(),
                pod: None,
            });
        }
        descend(&path, uid, inside, depth + 1, found);
    }
}

/// Processes looked at to find a pod's network namespaces.
const PROCESSES_MAX: usize = 256;

/// What became of the known cgroups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Cgroups that are new.
    pub came: usize,
    /// Cgroups that are gone.
    pub went: usize,
}

/// A cgroup's pod, and since when the cgroup is gone.
#[derive(Debug)]
struct Entry {
    uid: Uid,
    path: PathBuf,
    gone: Option<Instant>,
    scan: u32,
}

/// A pod with cgroups.
#[derive(Debug, Default)]
struct Pod {
    /// Cgroups that are there.
    cgroups: usize,
    /// Its network namespaces were looked for with success: it has some of its own, or is in the node's network.
    looked: bool,
}

/// The pods' cgroups by id: the inode number of the cgroup's directory, as `bpf_get_current_cgroup_id` gives it.
#[derive(Debug, Default)]
pub struct Index {
    entries: HashMap<u64, Entry, RandomState>,
    /// Pods with a cgroup that is there.
    pods: HashMap<Uid, Pod, RandomState>,
    netns: HashMap<u32, Uid, RandomState>,
    scan: u32,
    refused: u64,
}

impl Index {
    /// The pod of a cgroup.
    #[must_use]
    pub fn pod(&self, cgroup_id: u64) -> Option<Uid> {
        self.entries.get(&cgroup_id).map(|entry| entry.uid)
    }

    /// The pod that has this network namespace for itself. Numbers of namespaces are used again at once, so only pods
    /// that still have a cgroup count.
    #[must_use]
    pub fn pod_of_netns(&self, inode: u32) -> Option<Uid> {
        self.netns.get(&inode).copied()
    }

    /// Cgroups that are there, with their pods.
    pub fn cgroups(&self) -> impl Iterator<Item = (u64, Uid)> {
        let there = self.entries.iter().filter(|(_, entry)| entry.gone.is_none());
        there.map(|(id, entry)| (*id, entry.uid))
    }

    /// Network namespaces of pods that have one of their own.
    pub fn namespaces(&self) -> impl Iterator<Item = (u32, Uid)> {
        self.netns.iter().map(|(inode, uid)| (*inode, *uid))
    }

    /// Whether a pod has a cgroup that is there.
    #[must_use]
    pub fn contains(&self, uid: Uid) -> bool {
        self.pods.contains_key(&uid)
    }

    /// Directories of the cgroups of some pods, with their ids.
    #[must_use]
    pub fn places(&self, which: impl Fn(Uid) -> bool) -> Vec<(u64, Uid, PathBuf)> {
        let there = self.entries.iter().filter(|(_, entry)| entry.gone.is_none());
        there
            .filter(|(_, entry)| which(entry.uid))
            .map(|(id, entry)| (*id, entry.uid, entry.path.clone()))
            .collect()
    }

    /// Pods whose network namespace is not known yet.
    #[must_use]
    pub fn without_netns(&self) -> HashSet<Uid, RandomState> {
        let unknown = self.pods.iter().filter(|(_, pod)| !pod.looked);
        unknown.map(|(uid, _)| *uid).collect()
    }

    /// Cgroups of pods that are known, removed ones included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True if no pod's cgroup is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Cgroups left out for lack of room.
    #[must_use]
    pub const fn refused(&self) -> u64 {
        self.refused
    }

    /// Takes in a walk of the whole hierarchy. What is no longer there stays for some minutes; an id that the kernel
    /// gave to another cgroup names the new one.
    pub fn replace(&mut self, found: Vec<Found>, now: Instant) -> Change {
        self.scan = self.scan.wrapping_add(1);
        let came = self.add(found);
        let scan = self.scan;
        let missing: Vec<u64> = self
            .entries
            .iter()
            .filter(|(_, entry)| entry.scan != scan && entry.gone.is_none())
            .map(|(id, _)| *id)
            .collect();
        let went = missing.into_iter().filter(|id| self.remove(*id, now)).count();
        self.entries
            .retain(|_, entry| entry.gone.is_none_or(|gone| now.duration_since(gone) < KEEP));
        Change { came, went }
    }

    /// Takes in cgroups that were made; returns how many were not known.
    pub fn add(&mut self, found: Vec<Found>) -> usize {
        let mut came = 0;
        for Found { path, pod } in found {
            let Some((id, uid)) = pod else { continue };
            let known = self.entries.get(&id);
            if let Some(known) = known
                && known.uid == uid
                && known.gone.is_none()
            {
                if let Some(entry) = self.entries.get_mut(&id) {
                    entry.scan = self.scan;
                }
                continue;
            }
            if known.is_none() && self.entries.len() >= ENTRIES_MAX {
                self.refused += 1;
                continue;
            }
            self.let_go(id);
            let scan = self.scan;
            self.entries.insert(
                id,
                Entry {
                    uid,
                    path,
                    gone: None,
                    scan,
                },
            );
            self.pods.entry(uid).or_default().cgroups += 1;
            came += 1;
        }
        came
    }

    /// Notes that a cgroup is gone; false if it was not known, or was gone.
    pub fn remove(&mut self, id: u64, now: Instant) -> bool {
        if !self.let_go(id) {
            return false;
        }
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.gone = Some(now);
        }
        true
    }

    /// Takes a cgroup that is there from its pod.
    fn let_go(&mut self, id: u64) -> bool {
        let Some(entry) = self.entries.get(&id).filter(|entry| entry.gone.is_none()) else {
            return false;
        };
        let uid = entry.uid;
        if let Some(pod) = self.pods.get_mut(&uid) {
            pod.cgroups -= 1;
            if pod.cgroups == 0 {
                self.pods.remove(&uid);
                self.netns.retain(|_, of| *of != uid);
            }
        }
        true
    }

    /// Notes a network namespace of a pod; true if that is news.
    pub fn add_netns(&mut self, uid: Uid, inode: u32) -> bool {
        let Some(pod) = self.pods.get_mut(&uid) else {
            return false;
        };
        pod.looked = true;
        self.netns.insert(inode, uid) != Some(uid)
    }

    /// Notes that a pod is in the node's network.
    pub fn set_host_network(&mut self, uid: Uid) {
        if let Some(pod) = self.pods.get_mut(&uid) {
            pod.looked = true;
        }
    }
}

/// Network namespaces of the processes in some cgroups, other than the node's.
pub(crate) fn namespaces_in(places: &[PathBuf], proc: &Proc, host_netns: Option<u64>) -> HashSet<u32, RandomState> {
    let pids = places.iter().flat_map(|place| processes(place)).take(PROCESSES_MAX);
    let inodes = pids.filter_map(|pid| fs::metadata(proc.path(pid, "ns/net")).ok().map(|it| it.ino()));
    // A process that is just being put into its pod is in the node's for a moment.
    let own = inodes.filter(|inode| Some(*inode) != host_netns);
    own.filter_map(|inode| u32::try_from(inode).ok()).collect()
}

/// Processes of a cgroup, as numbers of the reader's pid namespace.
pub(crate) fn processes(cgroup: &Path) -> Vec<u32> {
    let text = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    // 0 is a process of another pid namespace.
    text.lines()
        .filter_map(|line| line.parse().ok())
        .filter(|pid| *pid != 0)
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const UID: &str = "7f0c1a52-3d0b-4f5e-9a51-6a2f1b7c8d90";
    const SYSTEMD: &str = "7f0c1a52_3d0b_4f5e_9a51_6a2f1b7c8d90";
    const ID: &str = "4c01db0b339c4b1a1d8f7fd1f7b8f8d2b1a5a3f6f0c1f5f2e9c2f8a7b6c5d4e3";

    fn uid() -> Uid {
        Uid::parse(UID).unwrap()
    }

    #[test]
    fn a_removed_cgroup_names_its_pod_for_a_while() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path();
        let pod = base.join(format!("kubepods.slice/kubepods-pod{SYSTEMD}.slice"));
        let container = pod.join(format!("cri-containerd-{ID}.scope"));
        fs::create_dir_all(&container).unwrap();
        fs::create_dir_all(base.join("system.slice")).unwrap();
        let id = fs::metadata(&container).unwrap().ino();
        let mut index = Index::default();
        let start = Instant::now();
        assert_eq!(index.replace(walk(base), start), Change { came: 2, went: 0 });
        assert_eq!(
            (index.pod(id), index.len(), index.cgroups().count()),
            (Some(uid()), 2, 2)
        );
        assert!(index.add_netns(uid(), 7) && !index.add_netns(uid(), 7));
        assert_eq!(index.pod_of_netns(7), Some(uid()));
        fs::remove_dir_all(&pod).unwrap();
        let later = start + Duration::from_secs(1);
        assert_eq!(index.replace(walk(base), later), Change { came: 0, went: 2 });
        assert_eq!(
            (index.pod(id), index.cgroups().count(), index.contains(uid())),
            (Some(uid()), 0, false)
        );
        // The number of the namespace may be another pod's already.
        assert_eq!(index.pod_of_netns(7), None);
        index.replace(walk(base), later + KEEP);
        assert_eq!((index.pod(id), index.is_empty()), (None, true));
    }

    #[test]
    fn cgroups_come_and_go_one_by_one() {
        let found = |id, uid| {
            vec![Found {
                path: format!("/{id}").into(),
                pod: Some((id, uid)),
            }]
        };
        let (one, other) = (uid(), Uid([9; 16]));
        let mut index = Index::default();
        assert_eq!((index.add(found(5, one)), index.add(found(5, one))), (1, 0));
        assert_eq!(index.without_netns().len(), 1);
        index.set_host_network(one);
        assert_eq!((index.without_netns().len(), index.namespaces().count()), (0, 0));
        // The kernel gave the id to another cgroup before the removal was seen.
        assert_eq!(index.add(found(5, other)), 1);
        assert_eq!(
            (index.pod(5), index.contains(one), index.contains(other)),
            (Some(other), false, true)
        );
        assert!(index.remove(5, Instant::now()) && !index.remove(5, Instant::now()));
        assert_eq!((index.contains(other), index.pod(5)), (false, Some(other)));
    }
}
