//! Packets at the socket: sent, and about to be received, after fragments were put together and before others are made.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP},
    helpers::{bpf_ktime_get_ns, generated},
    macros::cgroup_skb,
    programs::SkBuffContext,
};
use ebpf_common::{
    dns::{DnsConfig, EVENT_VERSION, LARGE, MIDDLE, PIECES_MAX, Packet, PacketHead, SMALL, TCP, UDP, flag, stat},
    net::{Tuple, policy},
};
use ebpf_programs::net::{is_loopback, is_v4};

use crate::{
    maps::{CONFIG, EVENTS, POLICY, PORTS, count},
    socket::{Socket, mapped},
};

const ALLOW: i32 = 1;
const UDP_HEADER: u32 = 8;
const BPF_RB_AVAIL_DATA: u64 = 0;

/// Outgoing packets of sockets in the cgroup and below.
#[cgroup_skb]
pub(crate) fn dns_egress(ctx: SkBuffContext) -> i32 {
    look(&ctx, flag::EGRESS);
    ALLOW
}

/// Packets about to be queued to sockets in the cgroup and below; in softirq.
#[cgroup_skb]
pub(crate) fn dns_ingress(ctx: SkBuffContext) -> i32 {
    look(&ctx, 0);
    ALLOW
}

/// Where the headers are, and what they say.
struct Headers {
    tuple: Tuple,
    protocol: u8,
    /// Offset of the transport's header.
    at: u32,
}

#[inline(always)]
fn look(ctx: &SkBuffContext, way: u8) {
    let Some(config) = CONFIG.get(0) else { return };
    if config.on == 0 {
        return;
    }
    let mut headers = Headers {
        tuple: Tuple {
            local: [0; 16],
            remote: [0; 16],
            local_port: 0,
            remote_port: 0,
            netns: 0,
        },
        protocol: 0,
        at: 0,
    };
    if parse(ctx, way, &mut headers).is_some()
        && (watched(headers.tuple.remote_port) || watched(headers.tuple.local_port))
    {
        tell(ctx, way, &mut headers, config);
    }
}

/// True if DNS is looked for at this port.
#[inline(always)]
fn watched(port: u16) -> bool {
    PORTS
        .get((port >> 6) as u32)
        .is_some_and(|word| word >> (port & 63) & 1 != 0)
}

/// Reads addresses and ports. `None` for everything but TCP and UDP.
#[inline(always)]
fn parse(ctx: &SkBuffContext, way: u8, headers: &mut Headers) -> Option<()> {
    // SAFETY: plain context reads; the verifier turns them into packet pointers.
    let (data, end) = unsafe { ((*ctx.skb.skb).data as usize, (*ctx.skb.skb).data_end as usize) };
    if data + 28 > end {
        return None;
    }
    // SAFETY: bounds checked against data_end just above, as the verifier demands.
    let head = unsafe { *(data as *const u8) };
    let (source, destination, ports): ([u8; 16], [u8; 16], [u8; 4]);
    if head >> 4 == 4 {
        // SAFETY: within the 28 bytes checked.
        headers.protocol = unsafe { *((data + 9) as *const u8) };
        if headers.protocol != UDP && headers.protocol != TCP {
            return None;
        }
        // SAFETY: within the 28 bytes checked; byte arrays have no alignment.
        unsafe {
            source = mapped(*((data + 12) as *const [u8; 4]));
            destination = mapped(*((data + 16) as *const [u8; 4]));
        }
        headers.at = (head & 0x0f) as u32 * 4;
        // SAFETY: as above: without options the ports follow the 20-byte header.
        ports = if headers.at == 20 {
            unsafe { *((data + 20) as *const [u8; 4]) }
        } else {
            ctx.load(headers.at as usize).ok()?
        };
    } else {
        if data + 48 > end {
            return None;
        }
        // SAFETY: within the 48 bytes checked; byte arrays have no alignment.
        unsafe {
            headers.protocol = *((data + 6) as *const u8);
            source = *((data + 8) as *const [u8; 16]);
            destination = *((data + 24) as *const [u8; 16]);
        }
        headers.at = 40;
        if headers.protocol == UDP || headers.protocol == TCP {
            // SAFETY: within the 48 bytes checked.
            ports = unsafe { *((data + 40) as *const [u8; 4]) };
        } else {
            skip_extensions(ctx, headers)?;
            ports = ctx.load(headers.at as usize).ok()?;
        }
    }
    let source_port = u16::from_be_bytes([ports[0], ports[1]]);
    let destination_port = u16::from_be_bytes([ports[2], ports[3]]);
    let tuple = &mut headers.tuple;
    if way == flag::EGRESS {
        (tuple.local, tuple.remote) = (source, destination);
        (tuple.local_port, tuple.remote_port) = (source_port, destination_port);
    } else {
        (tuple.local, tuple.remote) = (destination, source);
        (tuple.local_port, tuple.remote_port) = (destination_port, source_port);
    }
    Some(())
}

#[inline(always)]
fn is_extension(next: u8) -> bool {
    // Hop-by-hop, routing, fragment, destination options.
    next == 0 || next == 43 || next == 44 || next == 60
}

/// Finds the transport's header behind at most three IPv6 extension headers.
#[inline(always)]
fn skip_extensions(ctx: &SkBuffContext, headers: &mut Headers) -> Option<()> {
    for _ in 0..3 {
        if !is_extension(headers.protocol) {
            break;
        }
        let head: [u8; 2] = ctx.load(headers.at as usize).ok()?;
        headers.at += if headers.protocol == 44 {
            8
        } else {
            (head[1] as u32 + 1) * 8
        };
        headers.protocol = head[0];
    }
    (headers.protocol == UDP || headers.protocol == TCP).then_some(())
}

/// Tells user space of a packet of DNS.
#[inline(always)]
fn tell(ctx: &SkBuffContext, way: u8, headers: &mut Headers, config: &DnsConfig) {
    let (mut flags, mut seq) = (way, 0);
    let header = if headers.protocol == TCP {
        let Ok(head) = ctx.load::<[u8; 16]>(headers.at as usize) else {
            return;
        };
        seq = u32::from_be_bytes([head[4], head[5], head[6], head[7]]);
        let bits = head[13];
        flags |= (bits & 1) * flag::FIN | (bits >> 1 & 1) * flag::SYN | (bits >> 2 & 1) * flag::RST;
        (head[12] >> 4) as u32 * 4
    } else {
        UDP_HEADER
    };
    let payload = headers.at + header;
    // SAFETY: a plain context read.
    let length = unsafe { (*ctx.skb.skb).len }.saturating_sub(payload);
    if length == 0 && (headers.protocol == UDP || flags == way) {
        return;
    }
    let socket = Socket::of(ctx.as_ptr() as u64);
    // SAFETY: the context is this program type's `struct __sk_buff`.
    let cgroup = if config.cgroups != 0 {
        unsafe { generated::bpf_skb_cgroup_id(ctx.skb.skb) }
    } else {
        0
    };
    if let Some(reason) = left_out(socket, cgroup, &headers.tuple, config) {
        count(stat::ENTERED);
        count(reason);
        return;
    }
    headers.tuple.netns = socket.netns();
    if socket.ends(&mut headers.tuple) {
        flags |= flag::CONNECTED;
    }
    let mut head = PacketHead {
        version: EVENT_VERSION,
        captured: 0,
        protocol: headers.protocol,
        flags,
        _pad: 0,
        // SAFETY: takes no argument.
        time_ns: unsafe { bpf_ktime_get_ns() },
        cgroup,
        length,
        seq,
        tuple: headers.tuple,
    };
    // A datagram is one message, and what matters of it is at its beginning.
    if headers.protocol == UDP || length <= LARGE as u32 {
        send(ctx, &head, payload, config);
        return;
    }
    let mut done = 0;
    for piece in 1..=PIECES_MAX {
        let left = length - done;
        // The last piece stands for all that is left.
        head.length = if piece < PIECES_MAX && left > LARGE as u32 {
            LARGE as u32
        } else {
            left
        };
        count(stat::ENTERED);
        send_in::<LARGE>(ctx, &head, payload + done, config);
        done += head.length;
        if done >= length {
            return;
        }
        head.seq = seq.wrapping_add(done);
        // Only the first piece begins the stream.
        head.flags &= !flag::SYN;
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
fn send(ctx: &SkBuffContext, head: &PacketHead, at: u32, config: &DnsConfig) {
    count(stat::ENTERED);
    if head.length as usize <= SMALL {
        send_in::<SMALL>(ctx, head, at, config);
    } else if head.length as usize <= MIDDLE {
        send_in::<MIDDLE>(ctx, head, at, config);
    } else {
        send_in::<LARGE>(ctx, head, at, config);
    }
}

#[inline(always)]
fn send_in<const N: usize>(ctx: &SkBuffContext, head: &PacketHead, at: u32, config: &DnsConfig) {
    let Some(mut entry) = EVENTS.reserve::<Packet<N>>(0) else {
        count(stat::LOST_FULL);
        return;
    };
    let event = entry.as_mut_ptr();
    let wanted = if head.length < N as u32 { head.length } else { N as u32 };
    // One less than is wanted is tested, so that every kernel sees that it is neither nothing nor too much.
    let less = core::hint::black_box((wanted as u64).wrapping_sub(1));
    if less < N as u64 {
        // SAFETY: reserved memory with room for N bytes, and no more than that are written.
        let failed = unsafe {
            generated::bpf_skb_load_bytes(ctx.as_ptr(), at, (&raw mut (*event).bytes).cast(), (less + 1) as u32)
        };
        if failed != 0 {
            entry.discard(0);
            count(stat::LOST_UNREADABLE);
            return;
        }
    }
    // SAFETY: reserved memory of this type; the head is written whole.
    unsafe {
        (*event).head = *head;
        (*event).head.captured = wanted as u16;
    }
    let flag = if EVENTS.query(BPF_RB_AVAIL_DATA) > config.wake_bytes {
        BPF_RB_FORCE_WAKEUP as u64
    } else {
        BPF_RB_NO_WAKEUP as u64
    };
    entry.submit(flag);
}
