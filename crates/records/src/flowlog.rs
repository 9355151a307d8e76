//! Flow logs: network flows as packets show them, in the NetObserv format.
//!
//! A [`FlowLog`] is one flow of one window on one node, or one report of a conversation. It is no point: DataWay does not
//! take it. [`fields`] is the format's field table and reads a record by field; [`FlowJson`] writes it.

pub mod fields;
mod json;

use std::{net::IpAddr, sync::Arc};

pub use fields::{Cardinality, FieldSet, FlowField, FlowFormat, FlowType, FlowValue};
pub use json::FlowJson;

use crate::Str;

/// Protocol numbers that the format treats apart.
pub const TCP: u8 = 6;

/// One flow.
#[derive(Clone, Debug, PartialEq)]
pub struct FlowLog {
    /// First packet, milliseconds since the Unix epoch.
    pub start_unix_ms: i64,
    /// Last packet, milliseconds since the Unix epoch.
    pub end_unix_ms: i64,
    /// Type of the Ethernet frame; 0 when not told.
    pub etype: u16,
    /// Source; never a v4-mapped IPv6 address.
    pub src: IpAddr,
    /// Destination; never a v4-mapped IPv6 address.
    pub dst: IpAddr,
    /// Source and destination MAC address.
    pub macs: Option<[[u8; 6]; 2]>,
    /// IANA number of the protocol above IP.
    pub proto: u8,
    /// What that protocol has beside.
    pub l4: FlowL4,
    /// Differentiated services code point.
    pub dscp: Option<u8>,
    /// Flags of TCP, by bit, with SYN+ACK 0x100, FIN+ACK 0x200, RST+ACK 0x400; `None` for other protocols.
    pub flags: Option<u16>,
    /// Bytes.
    pub bytes: u64,
    /// Packets.
    pub packets: u64,
    /// N of 1:N; 0 when all packets are counted.
    pub sampling: u32,
    /// Interfaces that the flow passed, that which counted it first.
    pub interfaces: Arc<[FlowInterface]>,
    /// Seen from the node; `None` when neither end is on it.
    pub direction: Option<FlowDirection>,
    /// Address of the node that saw it.
    pub agent_ip: Option<IpAddr>,
    /// Object behind the source.
    pub src_k8s: Option<Arc<FlowPeer>>,
    /// Object behind the destination.
    pub dst_k8s: Option<Arc<FlowPeer>>,
    /// Label of the source's subnet; empty for none.
    pub src_subnet_label: Str,
    /// Label of the destination's subnet; empty for none.
    pub dst_subnet_label: Str,
    /// Whose traffic it is.
    pub layer: Option<FlowLayer>,
    /// Name of the cluster; empty for none.
    pub cluster: Str,
    /// Smoothed round trip time, nanoseconds; 0 when unknown.
    pub rtt_ns: u64,
    /// Feature DNS tracking.
    pub dns: Option<FlowDns>,
    /// Feature drops.
    pub drops: Option<FlowDrops>,
    /// Feature address translation.
    pub xlat: Option<FlowXlat>,
    /// Feature network events.
    pub events: Arc<[FlowEvent]>,
    /// Feature conversation tracking.
    pub conversation: Option<FlowConversation>,
}

/// Ports or ICMP numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowL4 {
    /// Protocols without.
    Other,
    /// TCP, UDP, SCTP.
    Ports {
        /// Of the source.
        src: u16,
        /// Of the destination.
        dst: u16,
    },
    /// ICMP, ICMPv6.
    Icmp {
        /// Type.
        kind: u8,
        /// Code.
        code: u8,
    },
}

/// An interface that a flow passed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlowInterface {
    /// Its name.
    pub name: Str,
    /// 0: in, 1: out, 3: both.
    pub direction: u8,
}

/// Direction seen from a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowDirection {
    /// 0: to the node.
    Ingress,
    /// 1: from the node.
    Egress,
    /// 2: within the node.
    Inner,
}

/// Whose traffic a flow is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowLayer {
    /// `app`
    App,
    /// `infra`
    Infra,
}

/// The Kubernetes object behind an address. Texts are empty where there is none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlowPeer {
    /// `Pod`, `Service` or `Node`.
    pub kind: Str,
    /// Name.
    pub name: Str,
    /// Namespace.
    pub namespace: Str,
    /// What controls it.
    pub owner_name: Str,
    /// Kind of that.
    pub owner_kind: Str,
    /// Address of its node.
    pub host_ip: Option<IpAddr>,
    /// Name of its node.
    pub host_name: Str,
    /// Zone of its node.
    pub zone: Str,
    /// Network that the address belongs to.
    pub network: Str,
}

/// What DNS tracking saw.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlowDns {
    /// The answer that was told.
    pub answer: Option<FlowDnsAnswer>,
    /// Why tracking failed; 0 if it did not.
    pub errno: u8,
    /// Name that was asked for; empty when unknown.
    pub name: Str,
}

/// An answer of DNS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowDnsAnswer {
    /// Its id.
    pub id: u16,
    /// The header's flags.
    pub flags: u16,
    /// From the query, milliseconds.
    pub latency_ms: u64,
}

/// Packets that the kernel dropped.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlowDrops {
    /// Bytes.
    pub bytes: u64,
    /// Packets.
    pub packets: u64,
    /// Flags of TCP of the last of them.
    pub flags: u16,
    /// State of TCP at the last of them, as `TCP_ESTABLISHED`.
    pub state: Str,
    /// Cause of the last of them, as `SKB_DROP_REASON_NO_SOCKET`.
    pub cause: Str,
}

/// Addresses after translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowXlat {
    /// Zone of connection tracking.
    pub zone: u16,
    /// Source.
    pub src: IpAddr,
    /// Destination.
    pub dst: IpAddr,
    /// Source port; 0 for none.
    pub src_port: u16,
    /// Destination port; 0 for none.
    pub dst_port: u16,
}

/// Something a network plugin did to a flow.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlowEvent {
    /// Keys and values, such as `Action` and `allow`.
    pub values: Vec<(Str, Str)>,
}

/// Which conversation a record tells of, and what it tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowConversation {
    /// The same for all records of the conversation, both ways.
    pub id: u64,
    /// What the record is.
    pub kind: FlowRecordType,
    /// The first record that tells totals.
    pub first: bool,
    /// Sums of the conversation; `None` in a record of a single flow.
    pub totals: Option<FlowTotals>,
}

/// Kind of a record of conversation tracking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowRecordType {
    /// `flowLog`: a flow like any other.
    Flow,
    /// `newConnection`
    New,
    /// `heartbeat`
    Heartbeat,
    /// `endConnection`
    End,
}

/// Sums of a conversation by direction; A is its first source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowTotals {
    /// Bytes from A to B.
    pub bytes_ab: u64,
    /// Bytes from B to A.
    pub bytes_ba: u64,
    /// Packets from A to B.
    pub packets_ab: u64,
    /// Packets from B to A.
    pub packets_ba: u64,
    /// Flows summed up.
    pub flows: u64,
}

// === impl FlowLog ===

impl FlowLog {
    /// A flow of which only the ends are known.
    #[must_use]
    pub fn new(src: IpAddr, dst: IpAddr, proto: u8, l4: FlowL4) -> Self {
        Self {
            start_unix_ms: 0,
            end_unix_ms: 0,
            etype: 0,
            src: src.to_canonical(),
            dst: dst.to_canonical(),
            macs: None,
            proto,
            l4,
            dscp: None,
            flags: None,
            bytes: 0,
            packets: 0,
            sampling: 0,
            interfaces: Arc::default(),
            direction: None,
            agent_ip: None,
            src_k8s: None,
            dst_k8s: None,
            src_subnet_label: Str::default(),
            dst_subnet_label: Str::default(),
            layer: None,
            cluster: Str::default(),
            rtt_ns: 0,
            dns: None,
            drops: None,
            xlat: None,
            events: Arc::default(),
            conversation: None,
        }
    }

    /// Key of its Kafka message: both addresses as IPv6, the smaller first, so that both directions have one key.
    #[must_use]
    pub fn pair_key(&self) -> [u8; 32] {
        let bits = |ip: IpAddr| match ip {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
            IpAddr::V6(v6) => v6.to_bits(),
        };
        let (a, b) = (bits(self.src), bits(self.dst));
        let mut key = [0; 32];
        let (low, high) = key.split_at_mut(16);
        low.copy_from_slice(&a.min(b).to_be_bytes());
        high.copy_from_slice(&a.max(b).to_be_bytes());
        key
    }
}

// === impl FlowDirection ===

impl FlowDirection {
    /// Number in the format.
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::Ingress => 0,
            Self::Egress => 1,
            Self::Inner => 2,
        }
    }
}

// === impl FlowLayer ===

impl FlowLayer {
    /// Word in the format.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::App => "app",
            Self::Infra => "infra",
        }
    }
}

// === impl FlowRecordType ===

impl FlowRecordType {
    /// Word in the format.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Flow => "flowLog",
            Self::New => "newConnection",
            Self::Heartbeat => "heartbeat",
            Self::End => "endConnection",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_directions_have_one_key() {
        for [a, b] in [
            ["10.0.0.1", "10.0.0.2"],
            ["fd00::1", "10.0.0.2"],
            ["fd00::1", "fd00::2"],
        ] {
            let ip = |text: &str| text.parse::<IpAddr>().unwrap_or(IpAddr::from([0; 4]));
            let flow = |src, dst| FlowLog::new(ip(src), ip(dst), TCP, FlowL4::Other).pair_key();
            assert_eq!(flow(a, b), flow(b, a));
            assert_ne!(flow(a, b), flow(a, a));
        }
    }
}
