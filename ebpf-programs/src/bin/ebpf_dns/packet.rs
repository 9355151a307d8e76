//! Packets at the socket: sent, and about to be received, after fragments were put together and before others are made.

use core::mem::MaybeUninit;

use aya_ebpf::{
    EbpfContext as _,
    helpers::{bpf_ktime_get_ns, generated},
    macros::cgroup_skb,
    programs::SkBuffContext,
};
use ebpf_common::{
    dns::{DnsConfig, EVENT_VERSION, LARGE, MIDDLE, PIECES_MAX, Packet, PacketHead, SMALL, TCP, UDP, flag, stat},
    net::{Tuple, beside, policy},
};
use ebpf_programs::{
    memory::cleared,
    net::{is_loopback, is_v4, mapped},
    ring::submit_flag,
};

use crate::{
    maps::{AFTER, CONFIG, EVENTS, POLICY, PORTS, count},
    socket::Socket,
};

const ALLOW: i32 = 1;
const UDP_HEADER: u32 = 8;
const BPF_RB_AVAIL_DATA: u64 = 0;

/// Outgoing packets of sockets in the cgroup and below.
#[cgroup_skb]
pub(crate) fn dns_egress(ctx: SkBuffContext) -> i32 {
    look(&ctx, flag::EGRESS);
    // SAFETY: nothing is to be dropped here. An empty slot comes back.
    unsafe { AFTER.tail_call(&ctx, beside::EGRESS) };
    ALLOW
}

/// Packets about to be queued to sockets in the cgroup and below; in softirq.
#[cgroup_skb]
pub(crate) fn dns_ingress(ctx: SkBuffContext) -> i32 {
    look(&ctx, 0);
    // SAFETY: as above.
    unsafe { AFTER.tail_call(&ctx, beside::INGRESS) };
    ALLOW
}

/// A packet, as far as it was looked at.
#[repr(C)]
#[derive(Clone, Copy)]
struct Seen {
    head: PacketHead,
    /// Offset of the transport's header, then of the payload.
    at: u32,
    _pad: u32,
}

#[inline(always)]
fn look(ctx: &SkBuffContext, way: u8) {
    // Nearly all packets end here.
    let Some(transport) = transport(ctx) else { return };
    if !watched(transport.source) && !watched(transport.destination) {
        return;
    }
    let Some(config) = CONFIG.get(0) else { return };
    if config.on == 0 {
        return;
    }
    let mut seen = MaybeUninit::uninit();
    // SAFETY: integers only, without padding.
    let seen: &mut Seen = unsafe { cleared(&mut seen) };
    seen.head.version = EVENT_VERSION;
    seen.head.protocol = transport.protocol;
    seen.head.flags = way;
    seen.at = transport.at;
    if !ends(ctx, &transport, seen) {
        return;
    }
    forget(seen);
    if examine(ctx, seen, config) {
        forget(seen);
        tell(ctx, seen, config);
    }
}

/// Copies a value onto itself, so that the verifier knows nothing of it: it walks what follows once, and not again for each way
/// in which headers differ.
#[inline(always)]
fn forget(seen: &mut Seen) {
    let address = &raw mut *seen;
    // SAFETY: the helper reads a live value and writes as many bytes; integers and byte arrays only.
    unsafe { generated::bpf_probe_read_kernel(address.cast(), size_of::<Seen>() as u32, address.cast()) };
}

/// True if DNS is looked for at this port.
#[inline(always)]
fn watched(port: u16) -> bool {
    PORTS
        .get((port >> 6) as u32)
        .is_some_and(|word| word >> (port & 63) & 1 != 0)
}

/// The transport's header.
struct Transport {
    protocol: u8,
    /// Its offset.
    at: u32,
    source: u16,
    destination: u16,
}

/// Finds the transport's header. `None` for everything but TCP and UDP.
#[inline(always)]
fn transport(ctx: &SkBuffContext) -> Option<Transport> {
    // SAFETY: plain context reads; the verifier turns them into packet pointers.
    let (data, end) = unsafe { ((*ctx.skb.skb).data as usize, (*ctx.skb.skb).data_end as usize) };
    if data + 28 > end {
        return None;
    }
    // SAFETY: bounds checked against data_end just above, as the verifier demands.
    let head = unsafe { *(data as *const u8) };
    let (mut protocol, mut at, ports): (u8, u32, [u8; 4]);
    if head >> 4 == 4 {
        // SAFETY: within the 28 bytes checked.
        protocol = unsafe { *((data + 9) as *const u8) };
        if protocol != UDP && protocol != TCP {
            return None;
        }
        at = (head & 0x0f) as u32 * 4;
        // SAFETY: as above: without options the ports follow the 20-byte header.
        ports = if at == 20 {
            unsafe { *((data + 20) as *const [u8; 4]) }
        } else {
            ctx.load(at as usize).ok()?
        };
    } else {
        if data + 48 > end {
            return None;
        }
        // SAFETY: within the 48 bytes checked.
        protocol = unsafe { *((data + 6) as *const u8) };
        at = 40;
        if protocol == UDP || protocol == TCP {
            // SAFETY: within the 48 bytes checked.
            ports = unsafe { *((data + 40) as *const [u8; 4]) };
        } else {
            (protocol, at) = skip_extensions(ctx, protocol)?;
            ports = ctx.load(at as usize).ok()?;
        }
    }
    Some(Transport {
        protocol,
        at,
        source: u16::from_be_bytes([ports[0], ports[1]]),
        destination: u16::from_be_bytes([ports[2], ports[3]]),
    })
}

#[inline(always)]
fn is_extension(next: u8) -> bool {
    // Hop-by-hop, routing, fragment, destination options.
    next == 0 || next == 43 || next == 44 || next == 60
}

/// Protocol and offset of the header behind at most three IPv6 extension headers.
#[inline(always)]
fn skip_extensions(ctx: &SkBuffContext, mut next: u8) -> Option<(u8, u32)> {
    let mut at = 40;
    for _ in 0..3 {
        if !is_extension(next) {
            break;
        }
        let head: [u8; 2] = ctx.load(at as usize).ok()?;
        at += if next == 44 { 8 } else { (head[1] as u32 + 1) * 8 };
        next = head[0];
    }
    (next == UDP || next == TCP).then_some((next, at))
}

/// Reads the addresses, and says which end is the local one; false if there are none.
#[inline(always)]
fn ends(ctx: &SkBuffContext, transport: &Transport, seen: &mut Seen) -> bool {
    // SAFETY: plain context reads; the verifier turns them into packet pointers.
    let (data, end) = unsafe { ((*ctx.skb.skb).data as usize, (*ctx.skb.skb).data_end as usize) };
    if data + 28 > end {
        return false;
    }
    let (source, destination): ([u8; 16], [u8; 16]);
    // SAFETY: bounds checked against data_end just above, as the verifier demands.
    if unsafe { *(data as *const u8) } >> 4 == 4 {
        // SAFETY: within the 28 bytes checked; byte arrays have no alignment.
        unsafe {
            source = mapped(*((data + 12) as *const [u8; 4]));
            destination = mapped(*((data + 16) as *const [u8; 4]));
        }
    } else {
        if data + 48 > end {
            return false;
        }
        // SAFETY: within the 48 bytes checked; byte arrays have no alignment.
        unsafe {
            source = *((data + 8) as *const [u8; 16]);
            destination = *((data + 24) as *const [u8; 16]);
        }
    }
    let tuple = &mut seen.head.tuple;
    if seen.head.flags == flag::EGRESS {
        (tuple.local, tuple.remote) = (source, destination);
        (tuple.local_port, tuple.remote_port) = (transport.source, transport.destination);
    } else {
        (tuple.local, tuple.remote) = (destination, source);
        (tuple.local_port, tuple.remote_port) = (transport.destination, transport.source);
    }
    true
}

/// Finds out the rest of what is told; false if there is nothing to tell.
#[inline(always)]
fn examine(ctx: &SkBuffContext, seen: &mut Seen, config: &DnsConfig) -> bool {
    let way = seen.head.flags;
    let udp = seen.head.protocol == UDP;
    if udp {
        seen.at += UDP_HEADER;
    } else {
        let Ok(head) = ctx.load::<[u8; 16]>(seen.at as usize) else {
            return false;
        };
        seen.head.seq = u32::from_be_bytes([head[4], head[5], head[6], head[7]]);
        let bits = head[13];
        seen.head.flags |= (bits & 1) * flag::FIN | (bits >> 1 & 1) * flag::SYN | (bits >> 2 & 1) * flag::RST;
        seen.at += (head[12] >> 4) as u32 * 4;
    }
    // SAFETY: a plain context read.
    seen.head.length = unsafe { (*ctx.skb.skb).len }.saturating_sub(seen.at);
    if seen.head.length == 0 && (udp || seen.head.flags == way) {
        return false;
    }
    let socket = Socket::of(ctx.as_ptr() as u64);
    if config.cgroups != 0 {
        // SAFETY: the context is this program type's `struct __sk_buff`.
        seen.head.cgroup = unsafe { generated::bpf_skb_cgroup_id(ctx.skb.skb) };
    }
    if let Some(reason) = left_out(socket, seen.head.cgroup, &seen.head.tuple, config) {
        count(stat::ENTERED);
        count(reason);
        return false;
    }
    seen.head.tuple.netns = socket.netns();
    if socket.ends(&mut seen.head.tuple) {
        seen.head.flags |= flag::CONNECTED;
    }
    // SAFETY: takes no argument.
    seen.head.time_ns = unsafe { bpf_ktime_get_ns() };
    true
}

/// Tells user space of a packet of DNS.
#[inline(always)]
fn tell(ctx: &SkBuffContext, seen: &mut Seen, config: &DnsConfig) {
    let length = seen.head.length;
    // A datagram is one message, and what matters of it is at its beginning.
    if seen.head.protocol == UDP || length <= LARGE as u32 {
        send(ctx, seen, config);
        return;
    }
    let mut left = length;
    for piece in 1..=PIECES_MAX {
        // The last piece stands for all that is left.
        seen.head.length = if piece < PIECES_MAX && left > LARGE as u32 {
            LARGE as u32
        } else {
            left
        };
        count(stat::ENTERED);
        send_in::<LARGE>(ctx, seen, config);
        left -= seen.head.length;
        if left == 0 {
            return;
        }
        seen.at += LARGE as u32;
        seen.head.seq = seen.head.seq.wrapping_add(LARGE as u32);
        // Only the first piece begins the stream.
        seen.head.flags &= !flag::SYN;
    }
}

/// The counter of a packet that is not reported.
#[inline(always)]
fn left_out(socket: Socket, cgroup: u64, tuple: &Tuple, config: &DnsConfig) -> Option<u32> {
    let mut bits = config.policy;
    if config.policy_entries != 0 {
        if cgroup != 0
            && let Some(own) = POLICY.get_ptr(policy::of_cgroup(cgroup))
        {
            // SAFETY: a live map value.
            bits = unsafe { *own };
        } else if let Some(own) = POLICY.get_ptr(policy::of_netns(socket.netns())) {
            // SAFETY: a live map value.
            bits = unsafe { *own };
        }
    }
    if bits & policy::OTHER_NODE != 0 {
        return Some(stat::SKIP_OTHER_NODE);
    }
    if bits & policy::NETFLOW == 0 {
        return Some(stat::SKIP_POLICY);
    }
    if config.loopback == 0 && (is_loopback(&tuple.remote) || is_loopback(&tuple.local)) {
        return Some(stat::SKIP_LOOPBACK);
    }
    if config.ipv6_disabled != 0 && !is_v4(&tuple.remote) {
        return Some(stat::SKIP_IPV6);
    }
    None
}

/// Sends one piece in the smallest event with room for it.
#[inline(always)]
fn send(ctx: &SkBuffContext, seen: &Seen, config: &DnsConfig) {
    count(stat::ENTERED);
    if seen.head.length as usize <= SMALL {
        send_in::<SMALL>(ctx, seen, config);
    } else if seen.head.length as usize <= MIDDLE {
        send_in::<MIDDLE>(ctx, seen, config);
    } else {
        send_in::<LARGE>(ctx, seen, config);
    }
}

#[inline(always)]
fn send_in<const N: usize>(ctx: &SkBuffContext, seen: &Seen, config: &DnsConfig) {
    let Some(mut entry) = EVENTS.reserve::<Packet<N>>(0) else {
        count(stat::LOST_FULL);
        return;
    };
    let event = entry.as_mut_ptr();
    let length = seen.head.length;
    let wanted = if length < N as u32 { length } else { N as u32 };
    // One less than is wanted is tested, so that every kernel sees that it is neither nothing nor too much.
    let less = core::hint::black_box((wanted as u64).wrapping_sub(1));
    if less < N as u64 {
        // SAFETY: reserved memory with room for N bytes, and no more than that are written.
        let failed = unsafe {
            generated::bpf_skb_load_bytes(
                ctx.as_ptr(),
                seen.at,
                (&raw mut (*event).bytes).cast(),
                (less + 1) as u32,
            )
        };
        if failed != 0 {
            entry.discard(0);
            count(stat::LOST_UNREADABLE);
            return;
        }
    }
    // SAFETY: reserved memory of this type; the head is written whole.
    unsafe {
        (*event).head = seen.head;
        (*event).head.captured = wanted as u16;
    }
    entry.submit(submit_flag(EVENTS.query(BPF_RB_AVAIL_DATA), config.wake_bytes));
}
