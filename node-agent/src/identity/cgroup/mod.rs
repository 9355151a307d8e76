//! Which pod a cgroup belongs to.
//!
//! ```text
//! /proc/PID/cgroup  ▶ path ─────────────────────────────┐
//! cgroup id ▶ [`Index`] ▶ path ──────────────────────────┴▶ [`parse`] ▶ pod uid, container id
//! directories ([`walk`] every few seconds, [`Watch`] at once) ▶ [`Index`]
//! ```
//! A path is read by its parts, not by a fixed shape: the kubelet's root may lie below another cgroup (kind, a kubelet
//! in a container), and drivers, runtimes and cgroup versions write the same pod differently. Which of a machine's
//! hierarchies holds the pods is found by [`find_hierarchy`].

mod hierarchy;
mod index;
mod watch;

use std::fs;

pub use hierarchy::find_hierarchy;
pub use index::{Change, Found, Index, walk};
pub(crate) use index::{namespaces_in, processes};
pub use watch::{Seen, Watch};

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
}
