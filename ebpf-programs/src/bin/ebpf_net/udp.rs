//! UDP datagrams at the socket: sent, delivered, and taken back when the receive queue was full.
//!
//! The cgroup hooks see every datagram of every socket once (copies looped back to the sender's host carry no socket on
//! their way out), with the addresses on the wire, whatever call sent it
//! (sendmmsg, io_uring, segmentation offload). They run for TCP packets too, which are handed on or leave.

use core::mem::MaybeUninit;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_ANY, BPF_NOEXIST},
    helpers::{bpf_ktime_get_ns, generated},
    macros::{cgroup_skb, cgroup_sock, raw_tracepoint},
    maps::HashMap,
    programs::{RawTracePointContext, SkBuffContext, SockContext},
};
use ebpf_common::net::{
    EVENT_VERSION, EventHead, NetConfig, SockOwner, UdpAgg, UdpKey, UdpSpillEvent, beside, direction, event, stat,
};
use ebpf_programs::{
    memory::cleared,
    net::{is_loopback, is_v4, mapped},
};

use crate::{
    beside::hand_on,
    kernel::{Probed, Process, atomic_add, current_process_by_task, read, read_netns},
    maps::{EVENTS, SOCK_OWNERS, UDP_AGG_0, UDP_AGG_1, UDP_LAST, config, count, offsets},
    policy::{bits, is_on, udp_skip},
    report::wake_flag,
};

const ALLOW: i32 = 1;
const IPPROTO_UDP: u8 = 17;
const UDP_HEADER: u32 = 8;

/// Outgoing packets of sockets in the cgroup and below; in the sending process's context.
#[cgroup_skb]
pub(crate) fn udp_egress(ctx: SkBuffContext) -> i32 {
    let mut key = MaybeUninit::uninit();
    if let Some(config) = config()
        && let Some(payload) = parse(&ctx, key.as_mut_ptr(), true)
    {
        // SAFETY: `parse` has written it.
        let key = unsafe { key.assume_init_ref() };
        if admit(key, payload, config) {
            sent(&ctx, key, payload, config);
        }
    }
    hand_on::<{ beside::EGRESS }>(&ctx);
    ALLOW
}

/// Packets about to be queued to sockets in the cgroup and below; in softirq.
#[cgroup_skb]
pub(crate) fn udp_ingress(ctx: SkBuffContext) -> i32 {
    let Some(last) = UDP_LAST.get_ptr_mut(0) else {
        return ALLOW;
    };
    // SAFETY: this CPU's slot; softirqs do not nest.
    let last = unsafe { &mut *last };
    if let Some(config) = config()
        && let Some(payload) = parse(&ctx, &raw mut last.key, false)
    {
        last.valid = 0;
        if admit(&last.key, payload, config) {
            last.bytes = payload.bytes;
            last.datagrams = payload.segments;
            last.map = config.active as u64;
            last.valid = 1;
            delivered(&ctx, &last.key, payload, config);
        }
    }
    hand_on::<{ beside::INGRESS }>(&ctx);
    ALLOW
}

/// `udp_fail_queue_rcv_skb(int rc, struct sock *sk[, ...])`, right after the ingress hook on the same CPU.
#[raw_tracepoint(tracepoint = "udp_fail_queue_rcv_skb")]
pub(crate) fn udp_overflow(_ctx: RawTracePointContext) -> i32 {
    let Some(last) = UDP_LAST.get_ptr_mut(0) else { return 0 };
    // SAFETY: this CPU's slot; nothing else runs on it inside the softirq.
    let last = unsafe { &mut *last };
    if last.valid == 0 {
        return 0;
    }
    last.valid = 0;
    if let Some(agg) = agg_map(last.map as u32).get_ptr_mut(&last.key) {
        // SAFETY: aligned fields of a live map value.
        unsafe {
            atomic_add(&raw mut (*agg).read, last.bytes.wrapping_neg());
            atomic_add(&raw mut (*agg).datagrams_read, last.datagrams.wrapping_neg());
        }
        count(stat::UDP_SKIP_RCVBUF, last.datagrams);
    }
    0
}

/// A process creates a socket.
#[cgroup_sock(sock_create)]
pub(crate) fn sock_create(ctx: SockContext) -> i32 {
    // SAFETY: the context is valid for this run; checked fields of `struct bpf_sock`.
    if unsafe { (*ctx.sock).protocol } == IPPROTO_UDP as u32 {
        let Some(config) = config() else { return ALLOW };
        let Process { pid, comm, cgroup } = current_process_by_task(config);
        let owner = SockOwner {
            pid,
            _pad: 0,
            comm,
            cgroup,
        };
        // SAFETY: the context is this program type's `struct bpf_sock`.
        let cookie = unsafe { generated::bpf_get_socket_cookie(ctx.as_ptr()) };
        let _ = SOCK_OWNERS.insert(cookie, owner, BPF_ANY as u64);
    }
    ALLOW
}

/// What a packet carries.
#[derive(Clone, Copy)]
struct Payload {
    bytes: u64,
    segments: u64,
}

/// Reads the headers into `key`, whole. `None` for everything but UDP, which leaves it as it is.
#[inline(always)]
fn parse(ctx: &SkBuffContext, key: *mut UdpKey, egress: bool) -> Option<Payload> {
    // SAFETY: plain context reads; the verifier turns them into packet pointers.
    let (data, end) = unsafe { ((*ctx.skb.skb).data as usize, (*ctx.skb.skb).data_end as usize) };
    if data + 28 > end {
        return None;
    }
    // SAFETY: bounds checked against data_end just above, as the verifier demands.
    let head = unsafe { *(data as *const u8) };
    let (source, destination, ports): ([u8; 16], [u8; 16], [u8; 4]);
    let mut l4;
    if head >> 4 == 4 {
        // SAFETY: within the 28 bytes checked.
        if unsafe { *((data + 9) as *const u8) } != IPPROTO_UDP {
            return None;
        }
        // SAFETY: within the 28 bytes checked; byte arrays have no alignment.
        unsafe {
            source = mapped(*((data + 12) as *const [u8; 4]));
            destination = mapped(*((data + 16) as *const [u8; 4]));
        }
        l4 = (head & 0x0f) as u32 * 4;
        // SAFETY: as above: without options the ports follow the 20-byte header.
        ports = if l4 == 20 {
            unsafe { *((data + 20) as *const [u8; 4]) }
        } else {
            ctx.load(l4 as usize).ok()?
        };
    } else {
        // SAFETY: within the 28 bytes checked.
        let next = unsafe { *((data + 6) as *const u8) };
        if next != IPPROTO_UDP && !is_extension(next) {
            return None;
        }
        if data + 48 > end {
            return None;
        }
        // SAFETY: within the 48 bytes checked; byte arrays have no alignment.
        unsafe {
            source = *((data + 8) as *const [u8; 16]);
            destination = *((data + 24) as *const [u8; 16]);
        }
        l4 = 40;
        if next == IPPROTO_UDP {
            // SAFETY: within the 48 bytes checked.
            ports = unsafe { *((data + 40) as *const [u8; 4]) };
        } else {
            l4 = skip_extensions(ctx, next)?;
            ports = ctx.load(l4 as usize).ok()?;
        }
    }
    let source_port = u16::from_be_bytes([ports[0], ports[1]]);
    let destination_port = u16::from_be_bytes([ports[2], ports[3]]);
    // SAFETY: the caller's, writable and of this type.
    let key = unsafe { &mut *key };
    if egress {
        (key.local, key.remote) = (source, destination);
        (key.local_port, key.remote_port) = (source_port, destination_port);
    } else {
        (key.local, key.remote) = (destination, source);
        (key.local_port, key.remote_port) = (destination_port, source_port);
    }
    key._pad = 0;
    // SAFETY: the context is this program type's `struct __sk_buff`.
    key.cookie = unsafe { generated::bpf_get_socket_cookie(ctx.as_ptr()) };
    // SAFETY: plain context reads.
    let (len, segments) = unsafe { ((*ctx.skb.skb).len, (*ctx.skb.skb).gso_segs) };
    Some(Payload {
        bytes: len.saturating_sub(l4 + UDP_HEADER) as u64,
        segments: if segments == 0 { 1 } else { segments as u64 },
    })
}

#[inline(always)]
fn is_extension(next: u8) -> bool {
    // Hop-by-hop, routing, fragment, destination options.
    next == 0 || next == 43 || next == 44 || next == 60
}

/// Offset of the UDP header behind at most three IPv6 extension headers.
#[inline(always)]
fn skip_extensions(ctx: &SkBuffContext, mut next: u8) -> Option<u32> {
    let mut at = 40u32;
    for _ in 0..3 {
        if !is_extension(next) {
            break;
        }
        let head: [u8; 2] = ctx.load(at as usize).ok()?;
        at += if next == 44 { 8 } else { (head[1] as u32 + 1) * 8 };
        next = head[0];
    }
    if next == IPPROTO_UDP { Some(at) } else { None }
}

/// Counts the datagram in and applies the configuration.
#[inline(always)]
fn admit(key: &UdpKey, payload: Payload, config: &NetConfig) -> bool {
    count(stat::UDP_ENTERED, payload.segments);
    if config.loopback == 0 && (is_loopback(&key.remote) || is_loopback(&key.local)) {
        count(stat::UDP_SKIP_LOOPBACK, payload.segments);
        return false;
    }
    if config.ipv6_disabled != 0 && !is_v4(&key.remote) {
        count(stat::UDP_SKIP_IPV6, payload.segments);
        return false;
    }
    true
}

#[inline(always)]
fn agg_map(active: u32) -> &'static HashMap<UdpKey, UdpAgg> {
    if active == 0 { &UDP_AGG_0 } else { &UDP_AGG_1 }
}

#[inline(always)]
fn sent(ctx: &SkBuffContext, key: &UdpKey, payload: Payload, config: &NetConfig) {
    let map = agg_map(config.active);
    if let Some(agg) = map.get_ptr_mut(key) {
        // SAFETY: a live map value.
        if unsafe { (*agg).pid } == 0 {
            let Process { pid, comm, cgroup } = current_process_by_task(config);
            // SAFETY: as above; two senders at once leave one of their names.
            unsafe {
                (*agg).comm = comm;
                (*agg).cgroup = cgroup;
                (*agg).pid = pid;
            }
        }
        add_sent(agg, payload);
        return;
    }
    let Process { pid, comm, cgroup } = current_process_by_task(config);
    let netns = netns(ctx);
    let bits = bits(pid, cgroup, || netns, config);
    if !is_on(bits) {
        count(udp_skip(bits), payload.segments);
        return;
    }
    let mut agg = MaybeUninit::uninit();
    // SAFETY: integers only, without padding.
    let agg: &mut UdpAgg = unsafe { cleared(&mut agg) };
    agg.written = payload.bytes;
    agg.datagrams_written = payload.segments;
    agg.first_ns = now();
    agg.pid = pid;
    agg.netns = netns;
    agg.comm = comm;
    agg.direction = direction::OUTGOING;
    agg.cgroup = cgroup;
    if map.insert(key, &*agg, BPF_NOEXIST as u64).is_err() {
        // Another CPU made the entry meanwhile, or the map is full.
        match map.get_ptr_mut(key) {
            Some(agg) => add_sent(agg, payload),
            None => spill(key, agg, payload, config),
        }
    }
}

#[inline(always)]
fn add_sent(agg: *mut UdpAgg, payload: Payload) {
    // SAFETY: aligned fields of a live map value.
    unsafe {
        atomic_add(&raw mut (*agg).written, payload.bytes);
        atomic_add(&raw mut (*agg).datagrams_written, payload.segments);
    }
}

#[inline(always)]
fn delivered(ctx: &SkBuffContext, key: &UdpKey, payload: Payload, config: &NetConfig) {
    let map = agg_map(config.active);
    if let Some(agg) = map.get_ptr_mut(key) {
        add_delivered(agg, payload);
        return;
    }
    let netns = netns(ctx);
    if config.policy_entries != 0 || config.pidns != 0 {
        let (pid, cgroup) = match SOCK_OWNERS.get_ptr(key.cookie) {
            // SAFETY: a live map value.
            Some(owner) => unsafe { ((*owner).pid, (*owner).cgroup) },
            None => (0, 0),
        };
        let bits = bits(pid, cgroup, || netns, config);
        if !is_on(bits) {
            count(udp_skip(bits), payload.segments);
            return;
        }
    }
    let mut agg = MaybeUninit::uninit();
    // SAFETY: integers only, without padding.
    let agg: &mut UdpAgg = unsafe { cleared(&mut agg) };
    agg.read = payload.bytes;
    agg.datagrams_read = payload.segments;
    agg.first_ns = now();
    agg.netns = netns;
    agg.direction = direction::INCOMING;
    if map.insert(key, &*agg, BPF_NOEXIST as u64).is_err() {
        match map.get_ptr_mut(key) {
            Some(agg) => add_delivered(agg, payload),
            None => spill(key, agg, payload, config),
        }
    }
}

#[inline(always)]
fn add_delivered(agg: *mut UdpAgg, payload: Payload) {
    // SAFETY: aligned fields of a live map value.
    unsafe {
        atomic_add(&raw mut (*agg).read, payload.bytes);
        atomic_add(&raw mut (*agg).datagrams_read, payload.segments);
    }
}

#[inline(always)]
fn spill(key: &UdpKey, agg: &UdpAgg, payload: Payload, config: &NetConfig) {
    let flag = wake_flag(config);
    let Some(mut entry) = EVENTS.reserve::<UdpSpillEvent>(0) else {
        count(stat::UDP_LOST_FULL, payload.segments);
        return;
    };
    // SAFETY: reserved memory of exactly this type, written whole before it is submitted.
    unsafe {
        let event = entry.as_mut_ptr();
        (*event).head = EventHead {
            kind: event::UDP_SPILL,
            version: EVENT_VERSION,
            len: size_of::<UdpSpillEvent>() as u32,
        };
        (*event).key = *key;
        (*event).agg = *agg;
    }
    entry.submit(flag);
}

#[inline(always)]
fn now() -> u64 {
    // SAFETY: takes no argument.
    unsafe { bpf_ktime_get_ns() }
}

/// Address of the packet's `struct sock`, as a number.
///
/// At run time the context is the kernel's `struct sk_buff`, so its `sk` member is read at the offset that BTF gives;
/// the context's own `sk` is a typed pointer whose use as a number the verifier forbids.
#[inline(always)]
fn sock_address(ctx: &SkBuffContext) -> u64 {
    read(ctx.as_ptr() as u64, offsets().skb_sk)
}

#[inline(always)]
fn netns(ctx: &SkBuffContext) -> u32 {
    read_netns(Probed(sock_address(ctx)))
}
