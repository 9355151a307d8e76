//! The cgroup hierarchy that holds the pods.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{parse, pod};
use crate::ebpf::offsets::CgroupHierarchy;

/// Controllers of version 1 whose hierarchies hold pods, the likeliest first. Named hierarchies have no number that the
/// kernel side could find them by.
const CONTROLLERS: &[&str] = &[
    "memory", "pids", "cpu", "cpuacct", "devices", "cpuset", "blkio", "freezer",
];
/// Levels looked through for pods: kind's lie four below the root of the machine.
const DEPTH_MAX: usize = 8;

/// The hierarchy of the pods, and its directory: the first one below `bases`, version 2 before version 1, with pods in it,
/// else with the kubelet's own cgroups. Without any, `own` decides, the text of `/proc/self/cgroup`; else version 2.
#[must_use]
pub fn find_hierarchy(bases: &[&Path], own: &str) -> (CgroupHierarchy, PathBuf) {
    let mut there: Vec<_> = bases.iter().flat_map(|base| hierarchies(base)).collect();
    let holds: Vec<Holds> = there.iter().map(|(_, dir)| what_holds(dir, 0)).collect();
    let with = |what| holds.iter().position(|holds| *holds == what);
    let with_pods = with(Holds::Pods).or_else(|| with(Holds::Kubelet));
    let with_self = || there.iter().position(|(hierarchy, _)| is_of_pod(hierarchy, own));
    let which = with_pods.or_else(with_self).unwrap_or(0);
    if which < there.len() {
        return there.swap_remove(which);
    }
    (
        CgroupHierarchy::V2,
        bases.first().copied().unwrap_or(Path::new("/sys/fs/cgroup")).to_owned(),
    )
}

/// The hierarchies mounted below `base`, version 2 first.
fn hierarchies(base: &Path) -> Vec<(CgroupHierarchy, PathBuf)> {
    let unified = [base.to_owned(), base.join("unified")]
        .into_iter()
        .find(|dir| dir.join("cgroup.controllers").exists())
        .map(|dir| (CgroupHierarchy::V2, dir));
    let v1 = CONTROLLERS
        .iter()
        .map(|controller| (CgroupHierarchy::V1((*controller).to_owned()), base.join(controller)))
        .filter(|(_, dir)| dir.join("cgroup.procs").exists());
    unified.into_iter().chain(v1).collect()
}

/// Whether a process with the text `own` in `/proc/PID/cgroup` is in a pod in a hierarchy.
fn is_of_pod(hierarchy: &CgroupHierarchy, own: &str) -> bool {
    own.lines().any(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else {
            return false;
        };
        let this = match hierarchy {
            CgroupHierarchy::V2 => controllers.is_empty(),
            CgroupHierarchy::V1(name) => controllers.split(',').any(|controller| controller == name),
        };
        this && parse(path).is_some()
    })
}

/// What is below a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Holds {
    Nothing,
    /// Cgroups of the kubelet.
    Kubelet,
    /// Pods.
    Pods,
}

fn what_holds(dir: &Path, depth: usize) -> Holds {
    let mut most = Holds::Nothing;
    let Ok(children) = fs::read_dir(dir) else { return most };
    for child in children.flatten() {
        if depth > DEPTH_MAX || !child.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let name = child.file_name();
        let name = name.to_string_lossy();
        if pod(&name).is_some() {
            return Holds::Pods;
        }
        if is_kubepods(&name) {
            most = most.max(Holds::Kubelet);
        }
        most = most.max(what_holds(&child.path(), depth + 1));
        if most == Holds::Pods {
            break;
        }
    }
    most
}

/// `kubepods`, `kubepods.slice`, `kubelet-kubepods.slice`, `kubepods-burstable.slice`.
pub(super) fn is_kubepods(name: &str) -> bool {
    name.split(['-', '.']).any(|part| part == "kubepods")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const POD: &str = "pod7f0c1a52-3d0b-4f5e-9a51-6a2f1b7c8d90";

    fn tree(dirs: &[&str], files: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let base = root.path().join("sys/fs/cgroup");
        for dir in dirs {
            fs::create_dir_all(base.join(dir)).unwrap();
        }
        for file in files {
            fs::write(base.join(file), "").unwrap();
        }
        root
    }

    fn found(root: &tempfile::TempDir, own: &str) -> (CgroupHierarchy, String) {
        let base = root.path().join("sys/fs/cgroup");
        let (hierarchy, dir) = find_hierarchy(&[&root.path().join("none"), &base], own);
        let below = dir.strip_prefix(base).unwrap();
        (hierarchy, below.to_string_lossy().into_owned())
    }

    fn v1(controller: &str) -> CgroupHierarchy {
        CgroupHierarchy::V1(controller.to_owned())
    }

    #[test]
    fn version_2_alone() {
        let root = tree(
            &["kubepods.slice", "system.slice"],
            &["cgroup.controllers", "cgroup.procs"],
        );
        assert_eq!(found(&root, "0::/\n"), (CgroupHierarchy::V2, String::new()));
    }

    #[test]
    fn version_1_alone() {
        let files = ["memory/cgroup.procs", "pids/cgroup.procs", "cpu/cgroup.procs"];
        let root = tree(&["memory/kubepods/burstable", "pids/kubepods", "cpu"], &files);
        assert_eq!(found(&root, ""), (v1("memory"), "memory".to_owned()));
        // A kubelet without the memory controller.
        let root = tree(&["memory", "pids/kubepods", "cpu"], &files);
        assert_eq!(found(&root, ""), (v1("pids"), "pids".to_owned()));
    }

    #[test]
    fn hybrid_is_decided_by_where_the_pods_are() {
        let files = [
            "unified/cgroup.controllers",
            "unified/cgroup.procs",
            "memory/cgroup.procs",
        ];
        // cgroupfs driver: pods in version 1 only.
        let root = tree(&["unified/system.slice", "memory/kubepods/besteffort"], &files);
        assert_eq!(found(&root, ""), (v1("memory"), "memory".to_owned()));
        // Left over in version 2.
        let root = tree(
            &[
                "unified/kubepods/burstable",
                &format!("memory/kubepods/burstable/{POD}"),
            ],
            &files,
        );
        assert_eq!(found(&root, ""), (v1("memory"), "memory".to_owned()));
        // systemd driver: systemd keeps its slices in both.
        let root = tree(&["unified/kubepods.slice", "memory/kubepods.slice"], &files);
        assert_eq!(found(&root, ""), (CgroupHierarchy::V2, "unified".to_owned()));
    }

    #[test]
    fn kinds_pods_lie_deep() {
        let nested = "docker/4c01db0b339c/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice";
        let root = tree(
            &["unified", "memory", &format!("pids/{nested}")],
            &["unified/cgroup.controllers", "memory/cgroup.procs", "pids/cgroup.procs"],
        );
        assert_eq!(found(&root, ""), (v1("pids"), "pids".to_owned()));
    }

    #[test]
    fn without_pods_the_agents_own_cgroup_decides() {
        let root = tree(
            &["unified", "memory", "pids"],
            &["unified/cgroup.controllers", "memory/cgroup.procs", "pids/cgroup.procs"],
        );
        let own = format!("8:pids:/kubepods/{POD}/x\n4:memory:/\n0::/\n");
        assert_eq!(found(&root, &own), (v1("pids"), "pids".to_owned()));
        let own = format!("4:memory,hugetlb:/kubepods/{POD}/x\n0::/kubepods/{POD}/x\n");
        assert_eq!(found(&root, &own), (CgroupHierarchy::V2, "unified".to_owned()));
        assert_eq!(
            found(&root, "4:memory:/\n0::/\n"),
            (CgroupHierarchy::V2, "unified".to_owned())
        );
    }
}
