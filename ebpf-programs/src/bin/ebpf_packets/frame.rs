//! Frames at an interface: received ones before anything else looks at them, sent ones after all else did.

use core::mem::MaybeUninit;

use aya_ebpf::{
    EbpfContext as _,
    helpers::{bpf_get_prandom_u32, bpf_ktime_get_ns, generated},
    macros::classifier,
    maps::HashMap,
    programs::TcContext,
};
use ebpf_common::{
    net::ABSENT,
    packets::{FlowKey, FlowValue, FragmentKey, FragmentValue, OtherKey, direction, flag, other, stat},
};
use ebpf_programs::{
    memory::cleared,
    packet::{FRAGMENT_FIRST, FRAGMENT_LATER, Frame, Outside, Seen, flags, on_the_wire, parse},
};

use crate::maps::{CONFIG, FLOWS_0, FLOWS_1, FRAGMENTS, OTHER, add, count, offsets};

/// On to the next program; of TCX and of clsact alike.
const NEXT: i32 = -1;
const BPF_NOEXIST: u64 = 1;

/// Received by interfaces with Ethernet headers in the agent's network namespace.
#[classifier]
pub(crate) fn packet_in(ctx: TcContext) -> i32 {
    look::<false, true>(&ctx, direction::INGRESS)
}

/// Sent by them.
#[classifier]
pub(crate) fn packet_out(ctx: TcContext) -> i32 {
    look::<false, true>(&ctx, direction::EGRESS)
}

/// Received by interfaces with Ethernet headers in other network namespaces.
#[classifier]
pub(crate) fn packet_in_ns(ctx: TcContext) -> i32 {
    look::<true, true>(&ctx, direction::INGRESS)
}

/// Sent by them.
#[classifier]
pub(crate) fn packet_out_ns(ctx: TcContext) -> i32 {
    look::<true, true>(&ctx, direction::EGRESS)
}

/// Received by interfaces without such headers, as tunnels, in the agent's network namespace.
#[classifier]
pub(crate) fn packet_in_bare(ctx: TcContext) -> i32 {
    look::<false, false>(&ctx, direction::INGRESS)
}

/// Sent by them.
#[classifier]
pub(crate) fn packet_out_bare(ctx: TcContext) -> i32 {
    look::<false, false>(&ctx, direction::EGRESS)
}

/// Received by them in other network namespaces.
#[classifier]
pub(crate) fn packet_in_bare_ns(ctx: TcContext) -> i32 {
    look::<true, false>(&ctx, direction::INGRESS)
}

/// Sent by them.
#[classifier]
pub(crate) fn packet_out_bare_ns(ctx: TcContext) -> i32 {
    look::<true, false>(&ctx, direction::EGRESS)
}

struct Packet<'a>(&'a TcContext);

impl Frame for Packet<'_> {
    #[inline(always)]
    fn load<const N: usize>(&self, at: u32) -> Option<[u8; N]> {
        self.0.load(at as usize).ok()
    }
}

#[inline(always)]
fn look<const NAMESPACE: bool, const ETHERNET: bool>(ctx: &TcContext, way: u8) -> i32 {
    let Some(config) = CONFIG.get(0) else { return NEXT };
    if config.on == 0 {
        return NEXT;
    }
    let (active, sampling) = (config.active, config.sampling);
    // SAFETY: plain context reads.
    let (length, segments, ifindex, protocol, tagged, tag) = unsafe {
        let skb = ctx.skb.skb;
        (
            (*skb).len,
            (*skb).gso_segs,
            (*skb).ifindex,
            (*skb).protocol,
            (*skb).vlan_present,
            (*skb).vlan_tci,
        )
    };
    let packets = on_the_wire(length, segments, 0).0;
    count(stat::ENTERED, packets);
    // SAFETY: takes no argument.
    if sampling > 1 && unsafe { bpf_get_prandom_u32() } % sampling != 0 {
        count(stat::NOT_SAMPLED, packets);
        return NEXT;
    }
    let mut key = MaybeUninit::uninit();
    // SAFETY: integers and byte arrays only, aligned to four bytes, without padding.
    let key: &mut FlowKey = unsafe { cleared(&mut key) };
    let mut seen = Seen::default();
    key.ifindex = ifindex;
    key.direction = way;
    if NAMESPACE {
        key.netns = netns(ctx);
    }
    let outside = Outside {
        ethernet: ETHERNET as u32,
        etype: u16::from_be(protocol as u16),
        vlan: if tagged != 0 { tag as u16 & 0x0fff } else { 0 },
    };
    if !parse(&Packet(ctx), outside, key, &mut seen) {
        count(stat::NOT_IP, packets);
        aside(key, other::NOT_IP, on_the_wire(length, segments, seen.headers));
        return NEXT;
    }
    if seen.fragment != 0 {
        follow(key, &seen);
    }
    let counted = on_the_wire(length, segments, seen.headers);
    if active == 0 {
        record(&FLOWS_0, key, &seen, counted);
    } else {
        record(&FLOWS_1, key, &seen, counted);
    }
    NEXT
}

/// Inode number of the network namespace of the frame's interface.
#[inline(always)]
fn netns(ctx: &TcContext) -> u32 {
    let off = offsets();
    // The context is, at run time, the kernel's `struct sk_buff`.
    let device: u64 = read(ctx.as_ptr() as u64, off.skb_dev);
    let net: u64 = read(device, off.dev_net);
    read(net, off.netns_inum)
}

/// Reads a plain value at `base + offset`; zero if the member is absent or the memory cannot be read.
#[inline(always)]
fn read<T: Copy>(base: u64, offset: u32) -> T {
    let mut value = MaybeUninit::<T>::zeroed();
    if offset != ABSENT {
        // SAFETY: the helper checks the source and writes exactly size_of::<T>() bytes; T is an integer.
        unsafe {
            generated::bpf_probe_read_kernel(
                value.as_mut_ptr().cast(),
                size_of::<T>() as u32,
                (base + offset as u64) as *const _,
            );
        }
    }
    // SAFETY: zeroed or filled; every bit pattern of T is valid.
    unsafe { value.assume_init() }
}

/// Gives a later fragment the ports of the first one.
#[inline(always)]
fn follow(key: &mut FlowKey, seen: &Seen) {
    let whole = FragmentKey {
        src: key.src,
        dst: key.dst,
        id: seen.id,
        netns: key.netns,
        ifindex: key.ifindex,
        proto: key.proto,
        direction: key.direction,
        _pad: 0,
    };
    if seen.fragment == FRAGMENT_FIRST {
        let value = FragmentValue {
            src_port: key.src_port,
            dst_port: key.dst_port,
            icmp_type: key.icmp_type,
            icmp_code: key.icmp_code,
            _pad: 0,
        };
        // Without it later ones are a flow without ports.
        let _ = FRAGMENTS.insert(&whole, &value, 0);
    } else if seen.fragment == FRAGMENT_LATER {
        // SAFETY: the value is plain and only read.
        if let Some(first) = unsafe { FRAGMENTS.get(&whole) } {
            key.src_port = first.src_port;
            key.dst_port = first.dst_port;
            key.icmp_type = first.icmp_type;
            key.icmp_code = first.icmp_code;
        }
    }
}

/// Counts a frame for its flow.
#[inline(always)]
fn record(flows: &HashMap<FlowKey, FlowValue>, key: &FlowKey, seen: &Seen, counted: (u64, u64)) {
    // SAFETY: takes no argument.
    let now = unsafe { bpf_ktime_get_ns() };
    let new = flags(seen.flags);
    if let Some(value) = flows.get_ptr_mut(key) {
        update(value, seen, new, now, counted);
        return;
    }
    let mut value = MaybeUninit::uninit();
    // SAFETY: integers and byte arrays only, aligned to eight bytes, without padding.
    let value: &mut FlowValue = unsafe { cleared(&mut value) };
    (value.packets, value.bytes) = counted;
    value.first_ns = now;
    value.last_ns = now;
    value.dscp = seen.dscp;
    value.seen = new;
    let mut bit = 0;
    while bit < flag::COUNT {
        value.flags[bit as usize] = (new >> bit & 1) as u8;
        bit += 1;
    }
    let mut byte = 0;
    while byte < 6 {
        value.dst_mac[byte] = seen.macs[byte];
        value.src_mac[byte] = seen.macs[6 + byte];
        byte += 1;
    }
    if flows.insert(key, value, BPF_NOEXIST).is_ok() {
        return;
    }
    // Another CPU was first, or there is no room.
    if let Some(value) = flows.get_ptr_mut(key) {
        update(value, seen, new, now, counted);
        return;
    }
    count(stat::TABLE_FULL, counted.0);
    aside(key, other::OVERFLOW, counted);
}

#[inline(always)]
fn update(value: *mut FlowValue, seen: &Seen, new: u16, now: u64, counted: (u64, u64)) {
    // SAFETY: a live map value. Sums are added to atomically; what else other CPUs write at the same time is as right as
    // this, and a flag is a byte that only ever becomes 1.
    unsafe {
        add(&raw mut (*value).packets, counted.0);
        add(&raw mut (*value).bytes, counted.1);
        (*value).last_ns = now;
        (*value).dscp = seen.dscp;
        let known = (*value).seen;
        if new & !known != 0 {
            let mut bit = 0;
            while bit < flag::COUNT {
                if new >> bit & 1 != 0 {
                    (&raw mut (*value).flags[bit as usize]).write_volatile(1);
                }
                bit += 1;
            }
            (*value).seen = known | new;
        }
    }
}

/// Counts a frame that is in no flow.
#[inline(always)]
fn aside(key: &FlowKey, kind: u8, (packets, bytes): (u64, u64)) {
    let other = OtherKey {
        netns: key.netns,
        ifindex: key.ifindex,
        direction: key.direction,
        kind,
        _pad: 0,
    };
    if let Some(value) = OTHER.get_ptr_mut(&other) {
        // SAFETY: a live map value.
        unsafe {
            add(&raw mut (*value).packets, packets);
            add(&raw mut (*value).bytes, bytes);
        }
    } else {
        count(stat::LOST, packets);
        count(stat::LOST_BYTES, bytes);
    }
}
