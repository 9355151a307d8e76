//! Layouts of `dnsflow`, a part of plugin `ebpf-net`: `EVENTS`, `PORTS`, `CONFIG`, `OFFSETS`, `STATS`. Addresses, policy keys
//! and policy bits are those of [`crate::net`].

use core::mem::size_of;

use crate::net::{ABSENT, Tuple};

/// Version of the event layouts.
pub const EVENT_VERSION: u16 = 1;
/// Room for payload in the three sizes of events; together with the head 256, 1024 and 4096 bytes.
pub const SMALL: usize = 256 - size_of::<PacketHead>();
/// See [`SMALL`].
pub const MIDDLE: usize = 1024 - size_of::<PacketHead>();
/// See [`SMALL`].
pub const LARGE: usize = 4096 - size_of::<PacketHead>();
/// Events that the payload of one TCP packet is given in at most; what is behind them is not captured.
pub const PIECES_MAX: u32 = 8;
/// Words of map `PORTS`, 64 ports each.
pub const PORT_WORDS: u32 = 1024;
/// IP protocol number of TCP.
pub const TCP: u8 = 6;
/// IP protocol number of UDP.
pub const UDP: u8 = 17;

/// Flags of [`PacketHead::flags`].
pub mod flag {
    /// Sent by the local end; otherwise received.
    pub const EGRESS: u8 = 1;
    /// Begins a TCP stream: `seq` is the number before its first byte.
    pub const SYN: u8 = 2;
    /// The last packet of a direction.
    pub const FIN: u8 = 4;
    /// The end of the connection.
    pub const RST: u8 = 8;
    /// Addresses are those of a connected socket, as it knows them, whatever NAT does to packets.
    pub const CONNECTED: u8 = 16;
}

/// Indices of `STATS`: pieces of packets with payload, or with a flag that begins or ends a stream, at ports of DNS.
pub mod stat {
    /// All of them.
    pub const ENTERED: u32 = 0;
    /// Skipped: an end on a loopback address while loopback is not reported.
    pub const SKIP_LOOPBACK: u32 = 1;
    /// Skipped: IPv6 while `ipv6_disabled`.
    pub const SKIP_IPV6: u32 = 2;
    /// Skipped: the plugin is switched off for the pod or namespace of the local end.
    pub const SKIP_POLICY: u32 = 3;
    /// Skipped: the local end belongs to another node that shares this kernel.
    pub const SKIP_OTHER_NODE: u32 = 4;
    /// Lost: no room in the ring.
    pub const LOST_FULL: u32 = 5;
    /// Lost: the packet could not be read.
    pub const LOST_UNREADABLE: u32 = 6;
    /// How many there are.
    pub const COUNT: u32 = 7;
}

/// What is told of a piece of a packet's payload, which follows.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PacketHead {
    /// [`EVENT_VERSION`].
    pub version: u16,
    /// Bytes of payload that follow.
    pub captured: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// See [`flag`].
    pub flags: u8,
    /// Zero.
    pub _pad: u16,
    /// Monotonic time, nanoseconds.
    pub time_ns: u64,
    /// Cgroup of the socket in the unified hierarchy, 0 if that is not the one that names cgroups.
    pub cgroup: u64,
    /// Bytes of payload in the piece.
    pub length: u32,
    /// TCP sequence number of the first of them.
    pub seq: u32,
    /// The ends.
    pub tuple: Tuple,
}

/// A piece with room for `N` bytes of payload; what is behind the captured ones is undefined.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Packet<const N: usize> {
    /// What is told of it.
    pub head: PacketHead,
    /// Payload.
    pub bytes: [u8; N],
}

/// Settings that may change while programs run; one entry of an array map.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DnsConfig {
    /// 1: packets are looked at.
    pub on: u32,
    /// 1: report flows with an end on a loopback address.
    pub loopback: u32,
    /// 1: leave IPv6 out.
    pub ipv6_disabled: u32,
    /// 1: cgroups of sockets are told and looked up.
    pub cgroups: u32,
    /// [`crate::net::policy`] bits of an end that has no entry in map `POLICY`.
    pub policy: u32,
    /// 1 if map `POLICY` has entries.
    pub policy_entries: u32,
    /// Ring-buffer fill in bytes from which the reader is woken.
    pub wake_bytes: u64,
}

/// Byte offsets of kernel members, resolved from the running kernel's BTF before load. [`ABSENT`] where missing.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DnsOffsets {
    /// `sk_buff.sk`
    pub skb_sk: u32,
    /// `sock_common.skc_net.net`
    pub net: u32,
    /// `net.ns.inum` (u32)
    pub netns_inum: u32,
    /// `sock_common.skc_family` (u16)
    pub family: u32,
    /// `sock_common.skc_addrpair` (be32 daddr, be32 rcv_saddr)
    pub addrpair: u32,
    /// `sock_common.skc_dport` (be16)
    pub dport: u32,
    /// `sock_common.skc_v6_daddr`
    pub v6_daddr: u32,
    /// `sock_common.skc_v6_rcv_saddr`
    pub v6_saddr: u32,
    /// `inet_sock.inet_sport` (be16)
    pub sport: u32,
}

const _: () = {
    assert!(size_of::<PacketHead>() == 72);
    assert!(size_of::<Packet<SMALL>>() == 256);
    assert!(size_of::<Packet<MIDDLE>>() == 1024);
    assert!(size_of::<Packet<LARGE>>() == 4096);
    assert!(size_of::<DnsConfig>() == 32);
    assert!(size_of::<DnsOffsets>() == 9 * 4);
};

// === impl DnsOffsets ===

impl DnsOffsets {
    /// Nothing known: what the object holds until the loader fills it.
    pub const UNKNOWN: Self = Self {
        skb_sk: ABSENT,
        net: ABSENT,
        netns_inum: ABSENT,
        family: ABSENT,
        addrpair: ABSENT,
        dport: ABSENT,
        v6_daddr: ABSENT,
        v6_saddr: ABSENT,
        sport: ABSENT,
    };
}

#[cfg(feature = "user")]
mod pod {
    use super::{DnsConfig, DnsOffsets};

    // SAFETY: `repr(C)`, integers only, no padding: every bit pattern is valid.
    unsafe impl aya::Pod for DnsConfig {}
    // SAFETY: as above.
    unsafe impl aya::Pod for DnsOffsets {}
}
