//! Which pod a cgroup belongs to.
//!
//! ```text
//! /proc/PID/cgroup  ▶ path ─┐
//! cgroup id ▶ [`Index`] ▶ path ─┴▶ [`parse`] ▶ pod uid, container id
//! ```
//! A path is read by its parts, not by a fixed shape: the kubelet's root may lie below another cgroup (kind, a kubelet
//! in a container), and drivers, runtimes and cgroup versions write the same pod differently.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use ahash::RandomState;
use hashbrown::HashMap;

use super::process::Proc;

/// Uid of a pod: the 128 bits of a UUID. A static pod's cgroup carries the hash of its manifest, of the same length.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Uid(pub [u8; 16]);

impl Uid {
    /// Reads 32 hexadecimal digits; `-` and `_` between them are passed over.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut uid = [0; 16];
        let mut digits = 0_usize;
        for byte in text.bytes().filter(|byte| !matches!(byte, b'-' | b'_')) {
            let digit = u8::try_from(char::from(byte).to_digit(16)?).ok()?;
            let slot = uid.get_mut(digits / 2)?;
            *slot = *slot << 4 | digit;
            digits += 1;
        }
        (digits == 32).then_some(Self(uid))
    }
}

/// What a cgroup path says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodCgroup<'a> {
    /// The pod.
    pub uid: Uid,
    /// The container, if the path leads into one.
    pub container: Option<&'a str>,
}

/// Reads a cgroup path; `None` if it is in no pod.
///
/// The innermost pod of the path counts: in kind the path of a pod lies below that of the node's container.
#[must_use]
pub fn parse(path: &str) -> Option<PodCgroup<'_>> {
    let mut found = None;
    for part in path.split('/') {
        if let Some(uid) = pod(part) {
            // containerd with the drivers mixed up puts the container into the same part.
            found = Some(PodCgroup {
                uid,
                container: container_id(part),
            });
        } else if let Some(PodCgroup { container, .. }) = &mut found
            && container.is_none()
        {
            *container = container_id(part);
        }
    }
    found
}

/// `pod<uid>` (cgroupfs), `kubepods-burstable-pod<uid>.slice`, with a prefix if the kubelet has a root of its own.
fn pod(part: &str) -> Option<Uid> {
    let name = part.split_once(".slice").map_or(part, |(name, _)| name);
    let uid = match name.rfind("-pod") {
        // In systemd's names the uid's dashes are underscores, so the last `-pod` is before it.
        Some(at) => name.get(at + 4..)?,
        None => name.strip_prefix("pod")?,
    };
    Uid::parse(uid)
}

/// `<id>`, `cri-containerd-<id>.scope`, `crio-<id>.scope`, `docker-<id>.scope`, `crio-<id>`, `cri-containerd:<id>`.
fn container_id(part: &str) -> Option<&str> {
    let name = part.strip_suffix(".scope").unwrap_or(part);
    let id = name.rsplit(['-', ':']).next()?;
    (id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit())).then_some(id)
}

/// The cgroup path in the text of `/proc/PID/cgroup`: that of version 2 if it leads into a pod, else the first of
/// version 1 that does. `None` if the process is in no pod.
#[must_use]
pub fn path_of_process(text: &str) -> Option<&str> {
    let path = |line: &'_ str| -> Option<usize> { line.match_indices(':').nth(1).map(|(at, _)| at + 1) };
    let in_pod = |line: &&str| path(line).and_then(|at| line.get(at..)).and_then(parse).is_some();
    let line = text
        .lines()
        .find(|line| line.starts_with("0::") && in_pod(line))
        .or_else(|| text.lines().find(in_pod))?;
    line.get(path(line)?..)
}

/// The pod of a process that runs.
#[must_use]
pub fn pod_of_process(proc: &Proc, pid: u32) -> Option<Uid> {
    let text = fs::read_to_string(proc.path(pid, "cgroup")).ok()?;
    Some(parse(path_of_process(&text)?)?.uid)
}

/// A cgroup's pod, and since when the cgroup is gone.
#[derive(Clone, Copy, Debug)]
struct Entry {
    uid: Uid,
    gone: Option<Instant>,
    scan: u32,
}

/// The pods' cgroups by id: the inode number of the cgroup's directory, as `bpf_get_current_cgroup_id` gives it.
#[derive(Debug)]
pub struct Index {
    root: PathBuf,
    entries: HashMap<u64, Entry, RandomState>,
    scan: u32,
    refused: u64,
}

/// How long a removed cgroup still names its pod.
const KEEP: Duration = Duration::from_secs(600);
/// Cgroups kept at most. A node runs some hundred pods with a few cgroups each.
const ENTRIES_MAX: usize = 65_536;
/// Deeper than any kubelet nests.
const DEPTH_MAX: usize = 24;

impl Index {
    /// Of the cgroup file system below `host_root`. With version 1 the hierarchy is that of `pids`, else `memory`.
    #[must_use]
    pub fn new(host_root: &Path) -> Self {
        let base = host_root.join("sys/fs/cgroup");
        let root = if base.join("cgroup.controllers").exists() {
            base
        } else {
            ["pids", "memory", "systemd"]
                .iter()
                .map(|controller| base.join(controller))
                .find(|path| path.is_dir())
                .unwrap_or(base)
        };
        Self {
            root,
            entries: HashMap::default(),
            scan: 0,
            refused: 0,
        }
    }

    /// The pod of a cgroup.
    #[must_use]
    pub fn pod(&self, cgroup_id: u64) -> Option<Uid> {
        self.entries.get(&cgroup_id).map(|entry| entry.uid)
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

    /// Walks the hierarchy. What is no longer there stays for some minutes; an id that the kernel gave to another
    /// cgroup names the new one.
    pub fn scan(&mut self, now: Instant) {
        self.scan = self.scan.wrapping_add(1);
        let root = self.root.clone();
        self.walk(&root, None, 0);
        let scan = self.scan;
        self.entries.retain(|_, entry| {
            if entry.scan == scan {
                return true;
            }
            now.duration_since(*entry.gone.get_or_insert(now)) < KEEP
        });
    }

    fn walk(&mut self, dir: &Path, within: Option<Uid>, depth: usize) {
        let Ok(children) = fs::read_dir(dir) else { return };
        for child in children.flatten() {
            if depth >= DEPTH_MAX || !child.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            let uid = child.file_name().to_str().and_then(pod).or(within);
            if let Some(uid) = uid
                && let Ok(metadata) = child.metadata()
            {
                self.add(metadata.ino(), uid);
            }
            self.walk(&child.path(), uid, depth + 1);
        }
    }

    fn add(&mut self, id: u64, uid: Uid) {
        if self.entries.len() >= ENTRIES_MAX && !self.entries.contains_key(&id) {
            self.refused += 1;
            return;
        }
        self.entries.insert(
            id,
            Entry {
                uid,
                gone: None,
                scan: self.scan,
            },
        );
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const UID: &str = "7f0c1a52-3d0b-4f5e-9a51-6a2f1b7c8d90";
    const SYSTEMD: &str = "7f0c1a52_3d0b_4f5e_9a51_6a2f1b7c8d90";
    const ID: &str = "4c01db0b339c4b1a1d8f7fd1f7b8f8d2b1a5a3f6f0c1f5f2e9c2f8a7b6c5d4e3";

    /// Path layouts of drivers, runtimes and versions.
    #[test]
    fn reads_every_layout() {
        for path in [
            // containerd, systemd driver; burstable, besteffort and guaranteed.
            format!(
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{SYSTEMD}.slice/cri-containerd-{ID}.scope"
            ),
            format!(
                "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{SYSTEMD}.slice/cri-containerd-{ID}.scope"
            ),
            format!("/kubepods.slice/kubepods-pod{SYSTEMD}.slice/cri-containerd-{ID}.scope"),
            // containerd with the driver mixed up: systemd paths below a service.
            format!("/system.slice/containerd.service/kubepods-burstable-pod{SYSTEMD}.slice:cri-containerd:{ID}"),
            // cgroupfs driver.
            format!("/kubepods/burstable/pod{UID}/{ID}"),
            format!("/kubepods/pod{UID}/{ID}"),
            // CRI-O, systemd and cgroupfs, with a nested cgroup of its own.
            format!("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{SYSTEMD}.slice/crio-{ID}.scope"),
            format!("/kubepods.slice/kubepods-pod{SYSTEMD}.slice/crio-{ID}.scope/container"),
            format!("/kubepods/besteffort/pod{UID}/crio-{ID}"),
            // cri-dockerd.
            format!("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{SYSTEMD}.slice/docker-{ID}.scope"),
            // kind: below the node's container, with the kubelet's own root.
            format!(
                "/system.slice/docker-{}.scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod{SYSTEMD}.slice/cri-containerd-{ID}.scope",
                ID.replace('4', "5")
            ),
            format!(
                "/docker/{}/kubelet/kubepods/burstable/pod{UID}/{ID}",
                ID.replace('4', "5")
            ),
            // A systemd inside the container.
            format!("/kubepods.slice/kubepods-pod{SYSTEMD}.slice/cri-containerd-{ID}.scope/system.slice/sshd.service"),
        ] {
            let found = parse(&path);
            assert_eq!(found.map(|it| it.uid), Uid::parse(UID), "{path}");
            assert_eq!(found.and_then(|it| it.container), Some(ID), "{path}");
        }
    }

    #[test]
    fn leaves_other_cgroups_alone() {
        for path in [
            "/",
            "/init.scope",
            "/system.slice/docker-4c01db0b339c4b1a1d8f7fd1f7b8f8d2b1a5a3f6f0c1f5f2e9c2f8a7b6c5d4e3.scope",
            "/user.slice/user-1000.slice/session-1.scope",
            "/machine.slice/libpod-4c01db0b339c4b1a.scope",
            "/kubepods.slice/kubepods-burstable.slice",
            "/kubepods/podnothex",
            "/podman",
        ] {
            assert_eq!(parse(path), None, "{path}");
        }
    }

    #[test]
    fn reads_processes_of_all_versions() {
        let v1 = format!(
            "12:pids:/kubepods/burstable/pod{UID}/{ID}\n1:name=systemd:/kubepods/burstable/pod{UID}/{ID}\n0::/\n"
        );
        assert_eq!(
            parse(path_of_process(&v1).unwrap()).unwrap().uid,
            Uid::parse(UID).unwrap()
        );
        let v2 = format!("0::/kubepods.slice/kubepods-pod{SYSTEMD}.slice/cri-containerd-{ID}.scope\n");
        assert_eq!(parse(path_of_process(&v2).unwrap()).unwrap().container, Some(ID));
        // Seen from another cgroup namespace.
        let relative = format!("0::/../../kubepods-pod{SYSTEMD}.slice/crio-{ID}.scope\n");
        assert!(path_of_process(&relative).is_some());
        assert_eq!(path_of_process("0::/init.scope\n"), None);
        assert_eq!(path_of_process("garbage"), None);
    }

    #[test]
    fn static_pods_have_the_hash_of_their_manifest() {
        let path = "/kubepods/burstable/pod1f7b8f8d2b1a5a3f6f0c1f5f2e9c2f8a/x";
        assert_eq!(
            parse(path).unwrap().uid,
            Uid::parse("1f7b8f8d2b1a5a3f6f0c1f5f2e9c2f8a").unwrap()
        );
    }

    #[test]
    fn a_removed_cgroup_names_its_pod_for_a_while() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("sys/fs/cgroup");
        let pod = base.join(format!("kubepods.slice/kubepods-pod{SYSTEMD}.slice"));
        let container = pod.join(format!("cri-containerd-{ID}.scope"));
        fs::create_dir_all(&container).unwrap();
        fs::create_dir_all(base.join("system.slice")).unwrap();
        fs::write(base.join("cgroup.controllers"), "").unwrap();
        let id = fs::metadata(&container).unwrap().ino();
        let mut index = Index::new(dir.path());
        let start = Instant::now();
        index.scan(start);
        assert_eq!((index.pod(id), index.len()), (Uid::parse(UID), 2));
        fs::remove_dir_all(&pod).unwrap();
        index.scan(start + Duration::from_secs(1));
        assert_eq!(index.pod(id), Uid::parse(UID));
        index.scan(start + Duration::from_secs(1) + KEEP);
        assert_eq!((index.pod(id), index.is_empty()), (None, true));
    }
}
