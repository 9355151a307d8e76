//! What the kernel side of `bpf-netlog` shares with the agent.

/// Rules that the kernel side compares at most.
pub const BLACKLIST_RULES: usize = 64;

/// Address family of a rule.
pub const FAMILY_V4: u8 = 1;
/// Address family of a rule.
pub const FAMILY_V6: u8 = 2;
/// Protocol of a rule.
pub const PROTOCOL_TCP: u8 = 1;
/// Protocol of a rule.
pub const PROTOCOL_UDP: u8 = 2;
/// Any other protocol.
pub const PROTOCOL_OTHER: u8 = 4;

/// One rule of the blacklist: a packet that matches all of it is left out. Addresses are those of IPv6, IPv4 ones
/// v4-mapped, as words in the order of the wire; a packet's are masked and compared word by word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct BlacklistRule {
    /// Source address, masked.
    pub src: [u32; 4],
    /// Bits of it that are compared.
    pub src_mask: [u32; 4],
    /// Destination address, masked.
    pub dst: [u32; 4],
    /// Bits of it that are compared.
    pub dst_mask: [u32; 4],
    /// First and last source port, host byte order.
    pub src_ports: [u16; 2],
    /// First and last destination port, host byte order.
    pub dst_ports: [u16; 2],
    /// [`FAMILY_V4`], [`FAMILY_V6`].
    pub families: u8,
    /// [`PROTOCOL_TCP`], [`PROTOCOL_UDP`], [`PROTOCOL_OTHER`].
    pub protocols: u8,
    /// 1: the source address must not be so.
    pub not_src: u8,
    /// 1: the destination address must not be so.
    pub not_dst: u8,
}

const _: () = assert!(size_of::<BlacklistRule>() == 76);

/// What of a packet is compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct BlacklistPacket {
    /// Source address.
    pub src: [u32; 4],
    /// Destination address.
    pub dst: [u32; 4],
    /// Source port, host byte order.
    pub src_port: u16,
    /// Destination port, host byte order.
    pub dst_port: u16,
    /// One of the families.
    pub family: u8,
    /// One of the protocols.
    pub protocol: u8,
    /// Padding.
    pub pad: [u8; 2],
}

const _: () = assert!(size_of::<BlacklistPacket>() == 40);

// === impl BlacklistRule ===

impl BlacklistRule {
    /// Whether a packet matches. Without a branch per condition: each would multiply what the verifier walks.
    #[inline]
    #[must_use]
    pub fn matches(&self, packet: &BlacklistPacket) -> bool {
        let differs = |own: &[u32; 4], mask: &[u32; 4], rule: &[u32; 4]| {
            ((own[0] & mask[0]) ^ rule[0])
                | ((own[1] & mask[1]) ^ rule[1])
                | ((own[2] & mask[2]) ^ rule[2])
                | ((own[3] & mask[3]) ^ rule[3])
        };
        let src = (differs(&packet.src, &self.src_mask, &self.src) == 0) ^ (self.not_src != 0);
        let dst = (differs(&packet.dst, &self.dst_mask, &self.dst) == 0) ^ (self.not_dst != 0);
        let src_port = (self.src_ports[0] <= packet.src_port) & (packet.src_port <= self.src_ports[1]);
        let dst_port = (self.dst_ports[0] <= packet.dst_port) & (packet.dst_port <= self.dst_ports[1]);
        let kind = (self.families & packet.family != 0) & (self.protocols & packet.protocol != 0);
        src & dst & src_port & dst_port & kind
    }
}
