//! How the end of a connection leaves the kernel side: into the flow's sum, or as an event of its own.

use aya_ebpf::{bindings::BPF_NOEXIST, maps::HashMap};
use ebpf_common::net::{
    EVENT_VERSION, EventHead, FlowKey, NetConfig, TcpAgg, TcpCloseEvent, TcpCounters, TcpSpillEvent, Tuple, direction,
    event, stat,
};
use ebpf_programs::{
    net::{fold_ports, guess_direction, is_loopback, is_v4, state},
    ring::submit_flag,
};

use crate::{
    kernel::atomic_add,
    maps::{CONNS_WERE_FULL, EVENTS, TCP_AGG_0, TCP_AGG_1, count},
    tcp::now,
};

pub(crate) const IPPROTO_TCP: u16 = 6;
const BPF_RB_AVAIL_DATA: u64 = 0;

#[inline(always)]
pub(crate) fn end(
    key: &mut FlowKey,
    counters: &TcpCounters,
    comm: [u8; 16],
    cgroup: u64,
    established: u64,
    config: &NetConfig,
) {
    if key.direction == direction::UNKNOWN {
        key.direction = guess_direction(key.tuple.local_port, key.tuple.remote_port);
    }
    if config.keep_local_port == 0 || key.direction != direction::OUTGOING {
        fold_ports(key, config.ephemeral_port);
    }
    aggregate(key, counters, comm, cgroup, established, config);
}

#[inline(always)]
pub(crate) fn skip_reason(tuple: &Tuple, old: u32, config: &NetConfig) -> Option<u32> {
    if config.loopback == 0 && (is_loopback(&tuple.remote) || is_loopback(&tuple.local)) {
        return Some(stat::TCP_SKIP_LOOPBACK);
    }
    if config.ipv6_disabled != 0 && !is_v4(&tuple.remote) {
        return Some(stat::TCP_SKIP_IPV6);
    }
    if old == state::SYN_SENT || old == state::SYN_RECV {
        return Some(stat::TCP_SKIP_NOT_ESTABLISHED);
    }
    let were_full = CONNS_WERE_FULL.get(0).is_some_and(|full| *full != 0);
    if now() < config.settled_ns && !were_full {
        return Some(stat::TCP_SKIP_PREDATES);
    }
    // Every connection that is on has an entry.
    if config.policy_entries != 0 && !were_full {
        return Some(stat::TCP_SKIP_POLICY);
    }
    None
}

/// Flag with which an event is submitted.
#[inline(always)]
pub(crate) fn wake_flag(config: &NetConfig) -> u64 {
    submit_flag(EVENTS.query(BPF_RB_AVAIL_DATA), config.wake_bytes)
}

#[inline(always)]
pub(crate) fn send_close(
    key: &FlowKey,
    counters: &TcpCounters,
    comm: &[u8; 16],
    cgroup: u64,
    (id, slot, adopted): (u64, u32, u32),
    config: &NetConfig,
) {
    let flag = wake_flag(config);
    let Some(mut entry) = EVENTS.reserve::<TcpCloseEvent>(0) else {
        count(stat::TCP_LOST_FULL, 1);
        return;
    };
    // SAFETY: reserved memory of exactly this type, written whole before it is submitted.
    unsafe {
        let event = entry.as_mut_ptr();
        (*event).head = EventHead {
            kind: event::TCP_CLOSE,
            version: EVENT_VERSION,
            len: size_of::<TcpCloseEvent>() as u32,
        };
        (*event).id = id;
        (*event).slot = slot;
        (*event).adopted = adopted;
        (*event).counters = *counters;
        (*event).key = *key;
        (*event).comm = *comm;
        (*event).cgroup = cgroup;
    }
    entry.submit(flag);
}

#[inline(always)]
fn aggregate(key: &FlowKey, counters: &TcpCounters, comm: [u8; 16], cgroup: u64, established: u64, config: &NetConfig) {
    let map: &HashMap<FlowKey, TcpAgg> = if config.active == 0 { &TCP_AGG_0 } else { &TCP_AGG_1 };
    if let Some(agg) = map.get_ptr_mut(key) {
        add(agg, counters, established);
        return;
    }
    let agg = TcpAgg {
        read: counters.read,
        written: counters.written,
        retransmits: counters.retransmits as u64,
        rtt_sum_us: counters.rtt_us as u64,
        rtt_var_sum_us: counters.rtt_var_us as u64,
        closed: 1,
        established,
        first_ns: now(),
        comm,
        cgroup,
    };
    if map.insert(key, &agg, BPF_NOEXIST as u64).is_ok() {
        return;
    }
    // Another CPU made the entry meanwhile, or the map is full.
    if let Some(agg) = map.get_ptr_mut(key) {
        add(agg, counters, established);
        return;
    }
    let flag = wake_flag(config);
    let Some(mut entry) = EVENTS.reserve::<TcpSpillEvent>(0) else {
        count(stat::TCP_LOST_FULL, 1);
        return;
    };
    // SAFETY: reserved memory of exactly this type, written whole before it is submitted.
    unsafe {
        let event = entry.as_mut_ptr();
        (*event).head = EventHead {
            kind: event::TCP_SPILL,
            version: EVENT_VERSION,
            len: size_of::<TcpSpillEvent>() as u32,
        };
        (*event).key = *key;
        (*event).agg = agg;
    }
    entry.submit(flag);
}

#[inline(always)]
fn add(agg: *mut TcpAgg, counters: &TcpCounters, established: u64) {
    // SAFETY: aligned fields of a live map value; other CPUs add to them too.
    unsafe {
        atomic_add(&raw mut (*agg).read, counters.read);
        atomic_add(&raw mut (*agg).written, counters.written);
        if counters.retransmits != 0 {
            atomic_add(&raw mut (*agg).retransmits, counters.retransmits as u64);
        }
        atomic_add(&raw mut (*agg).rtt_sum_us, counters.rtt_us as u64);
        atomic_add(&raw mut (*agg).rtt_var_sum_us, counters.rtt_var_us as u64);
        atomic_add(&raw mut (*agg).closed, 1);
        atomic_add(&raw mut (*agg).established, established);
    }
}
