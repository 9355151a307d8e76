//! Whose connections and datagrams are reported: switched on for the pod or namespace, and of this node.

use ebpf_common::net::{FOREIGN_PID, NetConfig, policy, stat};

use crate::maps::POLICY;

/// What is on for a local end, as `ebpf_common::net::policy` has it. `pid` is 0 if no process is known; `netns` is asked
/// only where an entry of a network namespace could decide.
#[inline(always)]
pub(crate) fn bits(pid: u32, cgroup: u64, netns: impl FnOnce() -> u32, config: &NetConfig) -> u32 {
    if pid == FOREIGN_PID {
        return policy::OTHER_NODE;
    }
    if config.policy_entries != 0 {
        if pid != 0
            && let Some(bits) = POLICY.get_ptr(policy::of_cgroup(cgroup))
        {
            // SAFETY: a live map value.
            return unsafe { *bits };
        }
        if let Some(bits) = POLICY.get_ptr(policy::of_netns(netns())) {
            // SAFETY: a live map value.
            return unsafe { *bits };
        }
    }
    if pid != 0 { config.policy } else { config.policy_unowned }
}

/// True if `netflow` is on.
#[inline(always)]
pub(crate) fn is_on(bits: u32) -> bool {
    bits & policy::NETFLOW != 0
}

/// The counter of a connection end that is not reported.
#[inline(always)]
pub(crate) fn tcp_skip(bits: u32) -> u32 {
    if bits & policy::OTHER_NODE != 0 {
        stat::TCP_SKIP_OTHER_NODE
    } else {
        stat::TCP_SKIP_POLICY
    }
}

/// The counter of datagrams that are not reported.
#[inline(always)]
pub(crate) fn udp_skip(bits: u32) -> u32 {
    if bits & policy::OTHER_NODE != 0 {
        stat::UDP_SKIP_OTHER_NODE
    } else {
        stat::UDP_SKIP_POLICY
    }
}
