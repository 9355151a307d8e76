//! The Linux capabilities the agent uses, each with its reason, and which of them it holds.

/// One capability and why it is wanted.
#[derive(Clone, Copy, Debug)]
pub struct Privilege {
    /// Name as in `capabilities(7)`.
    pub name: &'static str,
    /// Bit number, `include/uapi/linux/capability.h`.
    pub bit: u32,
    /// What stops working without it.
    pub reason: &'static str,
}

/// All capabilities the agent can make use of.
pub const WANTED: &[Privilege] = &[
    Privilege {
        name: "CAP_BPF",
        bit: 39,
        reason: "make maps and load programs; without it nothing is collected",
    },
    Privilege {
        name: "CAP_PERFMON",
        bit: 38,
        reason: "attach tracepoints and probes and read kernel memory; without it nothing is collected",
    },
    Privilege {
        name: "CAP_NET_ADMIN",
        bit: 12,
        reason: "attach to the cgroup root; without it there is no UDP",
    },
    Privilege {
        name: "CAP_SYS_PTRACE",
        bit: 19,
        reason: "look at other processes' sockets (pidfd_getfd, /proc/PID/fd); without it connections older than the \
                 agent and sockets handed to another process are missed",
    },
    Privilege {
        name: "CAP_DAC_READ_SEARCH",
        bit: 2,
        reason: "read /proc/PID/fd of other users' processes; without it, as for CAP_SYS_PTRACE",
    },
    Privilege {
        name: "CAP_NET_BROADCAST",
        bit: 11,
        reason: "hear of connections in other network namespaces than the agent's; used by ebpf-conntrack only, which without \
                 it knows the node's own",
    },
    Privilege {
        name: "CAP_SYS_RESOURCE",
        bit: 24,
        reason: "raise the locked-memory limit; needed by kernels before 5.11 only",
    },
];

/// Effective capability bits of this process, from `/proc/self/status`.
#[must_use]
pub fn effective() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

/// True if this process holds one of [`WANTED`].
#[must_use]
pub fn holds(name: &str) -> bool {
    !missing().iter().any(|privilege| privilege.name == name)
}

/// Names of the wanted capabilities this process does not hold.
#[must_use]
pub fn missing() -> Vec<&'static Privilege> {
    let held = effective().unwrap_or(0);
    WANTED.iter().filter(|p| held & (1 << p.bit) == 0).collect()
}
