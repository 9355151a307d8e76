//! Attaches the programs of `ebpf-net`, hook by hook: each feature tries its hooks from best to last.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, anyhow};
use aya::{
    Btf, Ebpf,
    programs::{
        BtfTracePoint, CgroupAttachMode, CgroupSkb, CgroupSkbAttachType, CgroupSock, FExit, KProbe, Program,
        RawTracePoint,
    },
};
use ebpf_common::net::{ABSENT, NetOffsets};

use super::{
    btf::KernelTypes,
    capability::Capabilities,
    net::{TCP, TCP_OLDER, TCP_OPEN, TCP_OWNER, UDP_OVERFLOW, UDP_OWNER, UDP_RECEIVED, UDP_SENT},
};

/// Programs of [`TCP`] and their tracepoints.
const TCP_HOOKS: [(&str, &str); 6] = [
    ("tcp_destroy", "tcp_destroy_sock"),
    ("tcp_destroy_nested", "tcp_destroy_sock"),
    ("tcp_destroy_third", "tcp_destroy_sock"),
    ("tcp_state", "inet_sock_set_state"),
    ("tcp_state_nested", "inet_sock_set_state"),
    ("tcp_state_third", "inet_sock_set_state"),
];

/// Attaching, hook by hook.
pub(super) struct Attach<'a> {
    pub(super) ebpf: &'a mut Ebpf,
    pub(super) offsets: &'a NetOffsets,
    pub(super) missing: &'a [&'static str],
    pub(super) refuse: &'a [String],
    pub(super) types: &'a KernelTypes,
}

impl Attach<'_> {
    pub(super) fn tcp(&mut self, capabilities: &mut Capabilities) {
        let o = self.offsets;
        let needed = [
            o.family,
            o.addrpair,
            o.dport,
            o.protocol,
            o.sport,
            o.bytes_acked,
            o.snd_una,
            o.bytes_received,
            o.rcv_nxt,
            o.copied_seq,
            o.write_seq,
            o.flags,
            o.sock_dead_bit,
            o.sock_done_bit,
        ];
        if needed.contains(&ABSENT) {
            let reason = format!(
                "this kernel lacks members that TCP accounting reads: {}",
                self.missing.join(", ")
            );
            for name in [TCP, TCP_OPEN, TCP_OLDER, TCP_OWNER] {
                capabilities.off(name, reason.clone());
            }
            return;
        }
        // The ends first: a connection that closes between the two must find its end hooked. All are needed: the nested
        // ones see what interrupts the first; without the ends, entries of connections that end in a process's hands
        // would stay. The third ones only where tracepoints are in sections that may be preempted (of SRCU), or were so
        // on idle CPUs.
        let third = self.types.has_variable("tracepoint_srcu_srcu_data");
        let hooked = TCP_HOOKS
            .iter()
            .filter(|(program, _)| third || !program.ends_with("_third"))
            .try_for_each(|(program, tracepoint)| self.btf_tracepoint(program, tracepoint));
        match hooked {
            Ok(()) if self.missing.is_empty() => {
                capabilities.on(TCP, "BTF tracepoints inet_sock_set_state, tcp_destroy_sock")
            }
            Ok(()) => capabilities.degraded(
                TCP,
                "BTF tracepoints inet_sock_set_state, tcp_destroy_sock",
                format!("this kernel lacks {}", self.missing.join(", ")),
            ),
            Err(error) => {
                for (program, _) in TCP_HOOKS {
                    self.unload(program);
                }
                for name in [TCP, TCP_OPEN, TCP_OLDER, TCP_OWNER] {
                    capabilities.off(name, reason(&error));
                }
                return;
            }
        }
        match self.raw_tracepoint("tcp_sample", None) {
            Ok(()) => capabilities.on(TCP_OPEN, "program run on demand"),
            Err(error) => capabilities.off(TCP_OPEN, reason(&error)),
        }
        match self.raw_tracepoint("adopt_socket", None) {
            Ok(()) => capabilities.on(TCP_OLDER, "pidfd_getfd and program run on demand"),
            Err(error) => capabilities.off(TCP_OLDER, reason(&error)),
        }
        self.owner(capabilities);
    }

    /// The accepting process: by return of the accept function, else by who holds and closes the connection.
    fn owner(&mut self, capabilities: &mut Capabilities) {
        let mut refusals = Vec::new();
        let mut hook = None;
        match self.types.parameters("inet_csk_accept") {
            Some(count @ (2 | 4)) => {
                let (first, again) = if count == 2 {
                    ("accept_exit_2", "accept_again_2")
                } else {
                    ("accept_exit_4", "accept_again_4")
                };
                let function = "inet_csk_accept";
                match self.fexit(first, function).and_then(|()| self.fexit(again, function)) {
                    Ok(()) => hook = Some(("fexit inet_csk_accept", "")),
                    Err(error) => refusals.push(format!("fexit: {}", reason(&error))),
                }
            }
            other => refusals.push(format!("fexit: inet_csk_accept has {other:?} parameters")),
        }
        if hook.is_none() {
            match self.kretprobe("accept_return", "inet_csk_accept") {
                Ok(()) => {
                    hook = Some((
                        "kretprobe inet_csk_accept",
                        "with many processes blocked in accept some are named by fork, close and descriptor scan only",
                    ));
                }
                Err(error) => refusals.push(format!("kretprobe: {}", reason(&error))),
            }
        }
        let forks = self
            .raw_tracepoint("process_fork", Some("sched_process_fork"))
            .and_then(|()| self.raw_tracepoint("process_exec", Some("sched_process_exec")));
        let fork_limit = forks
            .err()
            .map(|error| format!("children of forking servers: {}", reason(&error)));
        let (label, limit) = hook.unwrap_or((
            "fork, close and descriptor scan",
            "a connection is named by who closes it, or holds it at the end of an interval, not by who accepted it",
        ));
        if limit.is_empty() && fork_limit.is_none() {
            capabilities.on(TCP_OWNER, label);
        } else {
            let mut reasons: Vec<String> = (!limit.is_empty()).then(|| limit.to_owned()).into_iter().collect();
            reasons.extend(refusals);
            reasons.extend(fork_limit);
            capabilities.degraded(TCP_OWNER, label, reasons.join("; "));
        }
    }

    pub(super) fn udp(&mut self, capabilities: &mut Capabilities) {
        let cgroup = match cgroup2_root() {
            Ok(cgroup) => cgroup,
            Err(error) => {
                for name in [UDP_SENT, UDP_RECEIVED, UDP_OVERFLOW, UDP_OWNER] {
                    capabilities.off(name, reason(&error));
                }
                return;
            }
        };
        let (path, file) = cgroup;
        let partial = !is_whole(&path);
        for (name, program, attach) in [
            (UDP_SENT, "udp_egress", CgroupSkbAttachType::Egress),
            (UDP_RECEIVED, "udp_ingress", CgroupSkbAttachType::Ingress),
        ] {
            match self.cgroup_skb(program, &file, attach) {
                Ok(()) if partial => capabilities.degraded(
                    name,
                    format!("cgroup_skb at {}", path.display()),
                    "this is a cgroup namespace: only sockets of this container are seen; run in the host's (docker: \
                     --cgroupns host)",
                ),
                Ok(()) => capabilities.on(name, format!("cgroup_skb at {}", path.display())),
                Err(error) => capabilities.off(name, reason(&error)),
            }
        }
        match self.raw_tracepoint("udp_overflow", Some("udp_fail_queue_rcv_skb")) {
            Ok(()) => capabilities.on(UDP_OVERFLOW, "raw tracepoint udp_fail_queue_rcv_skb"),
            Err(error) => capabilities.degraded(
                UDP_OVERFLOW,
                "",
                format!(
                    "datagrams dropped at a full receive queue count as received: {}",
                    reason(&error)
                ),
            ),
        }
        match self.cgroup_sock("sock_create", &file) {
            Ok(()) => capabilities.on(UDP_OWNER, format!("cgroup sock_create at {}", path.display())),
            Err(error) => capabilities.degraded(
                UDP_OWNER,
                "sender and descriptor scan",
                format!(
                    "sockets that only receive and live less than an interval have no process: {}",
                    reason(&error)
                ),
            ),
        }
    }

    fn program<'p, T>(&'p mut self, name: &str) -> anyhow::Result<&'p mut T>
    where
        &'p mut T: TryFrom<&'p mut Program, Error: std::error::Error + Send + Sync + 'static>,
    {
        if self.refuse.iter().any(|refused| refused == name) {
            return Err(anyhow!("program {name} is refused by the option refuse_programs"));
        }
        let program = self
            .ebpf
            .program_mut(name)
            .ok_or_else(|| anyhow!("object has no program {name}"))?;
        Ok(program.try_into()?)
    }

    /// Takes back a tracepoint program whose companions were refused.
    fn unload(&mut self, name: &str) {
        if let Some(Program::BtfTracePoint(program)) = self.ebpf.program_mut(name) {
            // It may not have been loaded at all.
            let _ = program.unload();
        }
    }

    fn raw_tracepoint(&mut self, name: &str, tracepoint: Option<&str>) -> anyhow::Result<()> {
        let program: &mut RawTracePoint = self.program(name)?;
        program.load()?;
        if let Some(tracepoint) = tracepoint {
            program
                .attach(tracepoint)
                .with_context(|| format!("tracepoint {tracepoint}"))?;
        }
        Ok(())
    }

    fn btf_tracepoint(&mut self, name: &str, tracepoint: &str) -> anyhow::Result<()> {
        let types = Btf::from_sys_fs()?;
        let program: &mut BtfTracePoint = self.program(name)?;
        program.load(tracepoint, &types)?;
        program.attach().with_context(|| format!("tracepoint {tracepoint}"))?;
        Ok(())
    }

    fn fexit(&mut self, name: &str, function: &str) -> anyhow::Result<()> {
        let types = Btf::from_sys_fs()?;
        let program: &mut FExit = self.program(name)?;
        program.load(function, &types)?;
        program.attach().with_context(|| format!("function {function}"))?;
        Ok(())
    }

    fn kretprobe(&mut self, name: &str, function: &str) -> anyhow::Result<()> {
        let program: &mut KProbe = self.program(name)?;
        program.load()?;
        let attached = program.attach(function, 0);
        if attached.is_err() {
            // A program without a hook is of no use.
            let _ = program.unload();
        }
        attached.with_context(|| format!("function {function}"))?;
        Ok(())
    }

    fn cgroup_skb(&mut self, name: &str, cgroup: &File, attach: CgroupSkbAttachType) -> anyhow::Result<()> {
        let program: &mut CgroupSkb = self.program(name)?;
        program.load()?;
        program
            .attach(cgroup, attach, CgroupAttachMode::Single)
            .context("attach to the cgroup root")?;
        Ok(())
    }

    fn cgroup_sock(&mut self, name: &str, cgroup: &File) -> anyhow::Result<()> {
        let program: &mut CgroupSock = self.program(name)?;
        program.load()?;
        program
            .attach(cgroup, CgroupAttachMode::Single)
            .context("attach to the cgroup root")?;
        Ok(())
    }
}

/// The root of the cgroup v2 hierarchy: on hybrid systems it is mounted beside the v1 controllers, and in a container the
/// host's may be mounted beside the container's own part.
pub(super) fn cgroup2_root() -> anyhow::Result<(PathBuf, File)> {
    let mountinfo = std::fs::read_to_string("/proc/self/mountinfo").context("cannot read /proc/self/mountinfo")?;
    let mounts: Vec<PathBuf> = cgroup2_mounts(&mountinfo).map(PathBuf::from).collect();
    let path = mounts
        .iter()
        .find(|path| is_whole(path))
        .or(mounts.first())
        .ok_or_else(|| {
            anyhow!("cgroup v2 is not mounted; mount it, e.g. `mount -t cgroup2 none /sys/fs/cgroup/unified`")
        })?
        .clone();
    let file = File::open(&path).with_context(|| format!("cannot open cgroup root {}", path.display()))?;
    Ok((path, file))
}

/// True at the root of the whole hierarchy, which alone has no type. A cgroup namespace shows a part of it as its root.
pub(super) fn is_whole(path: &Path) -> bool {
    path.join("cgroup.controllers").exists() && !path.join("cgroup.type").exists()
}

/// Where cgroup v2 is mounted from the root of the reader's cgroup namespace or from above it (`/..`).
fn cgroup2_mounts(mountinfo: &str) -> impl Iterator<Item = &str> {
    mountinfo.lines().filter_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(3);
        let above = left.next()?.split('/').all(|part| part.is_empty() || part == "..");
        (right.starts_with("cgroup2 ") && above).then(|| left.next())?
    })
}

/// An error with its causes on one line, without the verifier's log.
pub(super) fn reason(error: &anyhow::Error) -> String {
    let mut text = error.chain().map(ToString::to_string).collect::<Vec<_>>().join(": ");
    if let Some(end) = text.find('\n') {
        text.truncate(end);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_cgroup2_at_the_root_and_above() {
        let mounts = |text| cgroup2_mounts(text).collect::<Vec<_>>();
        let unified = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate";
        assert_eq!(mounts(unified), ["/sys/fs/cgroup"]);
        let hybrid = "34 33 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
                      35 33 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory";
        assert_eq!(mounts(hybrid), ["/sys/fs/cgroup/unified"]);
        // A pod in a cgroup namespace of its own, with the host's hierarchy mounted for it.
        let pod = "901 880 0:26 / /sys/fs/cgroup ro - cgroup2 cgroup rw\n\
                   915 880 0:26 /../../../.. /host/sys/fs/cgroup ro master:4 - cgroup2 cgroup2 rw";
        assert_eq!(mounts(pod), ["/sys/fs/cgroup", "/host/sys/fs/cgroup"]);
        // A part of it is no root.
        let part = "915 880 0:26 /system.slice /mnt rw - cgroup2 cgroup2 rw";
        assert_eq!(mounts(part), Vec::<&str>::new());
    }
}
