//! Layouts of the packet capture of `bpf-netlog`: `FLOWS_0`, `FLOWS_1`, `OTHER`, `FRAGMENTS`, `CONFIG`, `STATS`.

use crate::net::ABSENT;

/// Values of `FlowKey::direction`, as seen from the interface.
pub mod direction {
    /// It received the packets.
    pub const INGRESS: u8 = 0;
    /// It sends the packets.
    pub const EGRESS: u8 = 1;
}

/// Values of `OtherKey::kind`.
pub mod other {
    /// Packets of flows that found no room.
    pub const OVERFLOW: u8 = 0;
    /// Frames that are not IP, or whose IP header is none.
    pub const NOT_IP: u8 = 1;
    /// How many there are.
    pub const COUNT: u8 = 2;
}

/// Places in `FlowValue::flags`: TCP's own by bit, then what a packet combines.
pub mod flag {
    /// SYN and ACK.
    pub const SYN_ACK: u32 = 8;
    /// FIN and ACK.
    pub const FIN_ACK: u32 = 9;
    /// RST and ACK.
    pub const RST_ACK: u32 = 10;
    /// How many there are.
    pub const COUNT: u32 = 11;
}

/// Indices of `STATS`. All but the last count packets; a frame that the kernel or the card cuts up is as many as it becomes.
pub mod stat {
    /// Seen while the capture was on.
    pub const ENTERED: u32 = 0;
    /// Of them: left out by sampling.
    pub const NOT_SAMPLED: u32 = 1;
    /// Not IP, or with a header of IP that is none.
    pub const NOT_IP: u32 = 2;
    /// Of flows that found no room in the table: counted for their interface alone.
    pub const TABLE_FULL: u32 = 3;
    /// Of them, and of what is not IP: what found no room even there.
    pub const LOST: u32 = 4;
    /// Bytes of what is lost.
    pub const LOST_BYTES: u32 = 5;
    /// How many there are.
    pub const COUNT: u32 = 6;
}

/// Values of `PacketConfig::on` and `PacketConfig::active` beside the obvious ones need no names; one entry of an array map.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PacketConfig {
    /// 1: packets are counted.
    pub on: u32,
    /// The table that is written, 0 or 1.
    pub active: u32,
    /// N of 1:N; 0 and 1 for all.
    pub sampling: u32,
    /// Zero.
    pub _pad: u32,
}

/// A flow of one direction at one interface. IPv4 addresses are v4-mapped.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// Source address.
    pub src: [u8; 16],
    /// Destination address.
    pub dst: [u8; 16],
    /// Inode number of the interface's network namespace; 0 for the agent's own.
    pub netns: u32,
    /// Number of the interface there.
    pub ifindex: u32,
    /// Source port; 0 if there is none.
    pub src_port: u16,
    /// Destination port; 0 if there is none.
    pub dst_port: u16,
    /// Type of the frame behind its VLAN tags.
    pub etype: u16,
    /// Id of the outermost VLAN; 0 if there is none.
    pub vlan: u16,
    /// Protocol above IP and its extension headers.
    pub proto: u8,
    /// See [`direction`].
    pub direction: u8,
    /// Type of ICMP.
    pub icmp_type: u8,
    /// Code of ICMP.
    pub icmp_code: u8,
}

/// What is known of a flow.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowValue {
    /// Bytes of all frames, from the link's header on.
    pub bytes: u64,
    /// Packets.
    pub packets: u64,
    /// First packet, monotonic nanoseconds.
    pub first_ns: u64,
    /// Last packet, monotonic nanoseconds.
    pub last_ns: u64,
    /// 1 where a flag was seen, see [`flag`]: bytes, so that two CPUs do not undo each other's.
    pub flags: [u8; 16],
    /// Source MAC address of the first frame.
    pub src_mac: [u8; 6],
    /// Destination MAC address of the first frame.
    pub dst_mac: [u8; 6],
    /// Flags that need not be looked at again; may lack some.
    pub seen: u16,
    /// Differentiated services code point of the last packet.
    pub dscp: u8,
    /// Zero.
    pub _pad: u8,
}

/// What is not in the table: a sum per interface, direction and kind.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct OtherKey {
    /// As in [`FlowKey`].
    pub netns: u32,
    /// As in [`FlowKey`].
    pub ifindex: u32,
    /// As in [`FlowKey`].
    pub direction: u8,
    /// See [`other`].
    pub kind: u8,
    /// Zero.
    pub _pad: u16,
}

/// Its sums, since the interface is followed.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OtherValue {
    /// Bytes.
    pub bytes: u64,
    /// Packets.
    pub packets: u64,
}

/// A packet that comes in fragments, at one interface.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FragmentKey {
    /// As in [`FlowKey`].
    pub src: [u8; 16],
    /// As in [`FlowKey`].
    pub dst: [u8; 16],
    /// Its identification.
    pub id: u32,
    /// As in [`FlowKey`].
    pub netns: u32,
    /// As in [`FlowKey`].
    pub ifindex: u32,
    /// As in [`FlowKey`].
    pub proto: u8,
    /// As in [`FlowKey`].
    pub direction: u8,
    /// Zero.
    pub _pad: u16,
}

/// What its first fragment said.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FragmentValue {
    /// Source port.
    pub src_port: u16,
    /// Destination port.
    pub dst_port: u16,
    /// Type of ICMP.
    pub icmp_type: u8,
    /// Code of ICMP.
    pub icmp_code: u8,
    /// Zero.
    pub _pad: u16,
}

/// Byte offsets of kernel members, resolved from the running kernel's BTF before load. [`ABSENT`] where missing.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PacketOffsets {
    /// `sk_buff.dev`
    pub skb_dev: u32,
    /// `net_device.nd_net.net`
    pub dev_net: u32,
    /// `net.ns.inum` (u32)
    pub netns_inum: u32,
}

const _: () = {
    assert!(size_of::<PacketConfig>() == 16);
    assert!(size_of::<FlowKey>() == 52);
    assert!(size_of::<FlowValue>() == 64);
    assert!(size_of::<OtherKey>() == 12);
    assert!(size_of::<OtherValue>() == 16);
    assert!(size_of::<FragmentKey>() == 48);
    assert!(size_of::<FragmentValue>() == 8);
    assert!(size_of::<PacketOffsets>() == 12);
};

// === impl PacketOffsets ===

impl PacketOffsets {
    /// Nothing known: what the object holds until the loader fills it.
    pub const UNKNOWN: Self = Self {
        skb_dev: ABSENT,
        dev_net: ABSENT,
        netns_inum: ABSENT,
    };
}

#[cfg(feature = "user")]
mod pod {
    use super::{FlowKey, FlowValue, FragmentKey, FragmentValue, OtherKey, OtherValue, PacketConfig, PacketOffsets};

    // SAFETY: `repr(C)`, integers and byte arrays only, no padding: every bit pattern is valid.
    unsafe impl aya::Pod for PacketConfig {}
    // SAFETY: as above.
    unsafe impl aya::Pod for FlowKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for FlowValue {}
    // SAFETY: as above.
    unsafe impl aya::Pod for OtherKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for OtherValue {}
    // SAFETY: as above.
    unsafe impl aya::Pod for FragmentKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for FragmentValue {}
    // SAFETY: as above.
    unsafe impl aya::Pod for PacketOffsets {}
}
