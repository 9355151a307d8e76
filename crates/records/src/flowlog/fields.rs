//! The field table of the format: each field once, with its types, its class as a label, and where its value is.

use std::net::IpAddr;

use super::{FlowEvent, FlowInterface, FlowL4, FlowLog, FlowPeer};

/// Types that the fields have on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FlowFormat {
    /// As today's consumers read it: flags by name, interfaces and their directions as lists.
    #[default]
    Current,
    /// As the documented field reference says: one value per field, and no other fields.
    Seed,
}

/// Type of a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowType {
    /// A whole number.
    Number,
    /// A text.
    Text,
    /// True or false.
    Bool,
    /// Texts.
    Texts,
    /// Numbers.
    Numbers,
    /// Objects with texts.
    Objects,
}

/// What a field means for the number of series when it is a label of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cardinality {
    /// Few values.
    Fine,
    /// May be many.
    Careful,
    /// Without bound: no label.
    Avoid,
}

/// Whether Loki has the field as a label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Label {
    No,
    Both,
    /// In the documented reference only.
    Seed,
    /// Today only.
    Current,
}

/// One field.
#[derive(Debug)]
pub struct FlowField {
    /// Which it is.
    pub id: Field,
    /// Key in the record.
    pub name: &'static str,
    /// Type today; `None` where the field is gone.
    pub current: Option<FlowType>,
    /// Type in the documented reference; `None` where it is newer.
    pub seed: Option<FlowType>,
    /// Class as a label of a metric.
    pub cardinality: Cardinality,
    label: Label,
    /// `,"NAME":`
    pub(super) lead: &'static str,
}

/// A value, as a record has it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum FlowValue<'a> {
    /// The record has none.
    Absent,
    /// A number.
    Unsigned(u64),
    /// A number.
    Signed(i64),
    /// A number that is told in hexadecimal digits.
    Hex(u64),
    /// A text.
    Text(&'a str),
    /// An address.
    Ip(IpAddr),
    /// A MAC address.
    Mac([u8; 6]),
    /// True or false.
    Bool(bool),
    /// Flags of TCP.
    Flags(u16),
    /// Names of interfaces.
    Names(&'a [FlowInterface]),
    /// Directions at interfaces.
    Directions(&'a [FlowInterface]),
    /// Events.
    Events(&'a [FlowEvent]),
}

/// Some of the fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FieldSet(u128);

/// Names of the flags of TCP, by bit, in the order in which they are told.
pub const FLAG_NAMES: [(u16, &str); 11] = [
    (0x1, "FIN"),
    (0x2, "SYN"),
    (0x4, "RST"),
    (0x8, "PSH"),
    (0x10, "ACK"),
    (0x20, "URG"),
    (0x40, "ECE"),
    (0x80, "CWR"),
    (0x100, "SYN_ACK"),
    (0x200, "FIN_ACK"),
    (0x400, "RST_ACK"),
];

/// `Id "Name" current seed cardinality label`, `-` for a type that does not exist; sorted by name.
macro_rules! fields {
    ($($id:ident $name:literal $current:tt $seed:tt $cardinality:ident $label:ident)+) => {
        /// The fields, in the order of their names.
        #[allow(missing_docs, reason = "named as on the wire")]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum Field { $($id,)+ }

        /// All fields, in the order of their names.
        pub static FIELDS: &[FlowField] = &[$(FlowField {
            id: Field::$id,
            name: $name,
            current: fields!(@type $current),
            seed: fields!(@type $seed),
            cardinality: Cardinality::$cardinality,
            label: Label::$label,
            lead: concat!(",\"", $name, "\":"),
        },)+];
    };
    (@type -) => { None };
    (@type $type:ident) => { Some(FlowType::$type) };
}

fields! {
    AgentIp "AgentIP" Text - Fine No
    Bytes "Bytes" Number Number Avoid No
    BytesAb "Bytes_AB" Number - Avoid No
    BytesBa "Bytes_BA" Number - Avoid No
    DnsErrno "DnsErrno" Number Number Fine No
    DnsFlags "DnsFlags" Number Number Fine No
    DnsFlagsResponseCode "DnsFlagsResponseCode" Text Text Fine No
    DnsId "DnsId" Number Number Avoid No
    DnsLatencyMs "DnsLatencyMs" Number Number Avoid No
    DnsName "DnsName" Text - Careful No
    Dscp "Dscp" Number Number Fine No
    DstAddr "DstAddr" Text Text Avoid No
    DstK8sHostIp "DstK8S_HostIP" Text Text Fine No
    DstK8sHostName "DstK8S_HostName" Text Text Fine No
    DstK8sName "DstK8S_Name" Text Text Careful No
    DstK8sNamespace "DstK8S_Namespace" Text Text Fine Both
    DstK8sNetworkName "DstK8S_NetworkName" Text - Fine No
    DstK8sOwnerName "DstK8S_OwnerName" Text Text Fine Both
    DstK8sOwnerType "DstK8S_OwnerType" Text Text Fine No
    DstK8sType "DstK8S_Type" Text Text Fine Both
    DstK8sZone "DstK8S_Zone" Text Text Fine Both
    DstMac "DstMac" Text Text Avoid No
    DstPort "DstPort" Number Number Careful No
    DstSubnetLabel "DstSubnetLabel" Text Text Fine No
    Duplicate "Duplicate" - Bool Fine Seed
    Etype "Etype" Number - Fine No
    Flags "Flags" Texts Number Careful No
    FlowDirection "FlowDirection" Number Number Fine Both
    IcmpCode "IcmpCode" Number Number Fine No
    IcmpType "IcmpType" Number Number Fine No
    IfDirections "IfDirections" Numbers Number Fine No
    Interfaces "Interfaces" Texts Text Careful No
    K8sClusterName "K8S_ClusterName" Text Text Fine Both
    K8sFlowLayer "K8S_FlowLayer" Text Text Fine Current
    NetworkEvents "NetworkEvents" Objects - Avoid No
    Packets "Packets" Number Number Avoid No
    PacketsAb "Packets_AB" Number - Avoid No
    PacketsBa "Packets_BA" Number - Avoid No
    PktDropBytes "PktDropBytes" Number Number Avoid No
    PktDropLatestDropCause "PktDropLatestDropCause" Text Text Fine No
    PktDropLatestFlags "PktDropLatestFlags" Number Number Fine No
    PktDropLatestState "PktDropLatestState" Text Text Fine No
    PktDropPackets "PktDropPackets" Number Number Avoid No
    Proto "Proto" Number Number Fine No
    Sampling "Sampling" Number - Fine No
    SrcAddr "SrcAddr" Text Text Avoid No
    SrcK8sHostIp "SrcK8S_HostIP" Text Text Fine No
    SrcK8sHostName "SrcK8S_HostName" Text Text Fine No
    SrcK8sName "SrcK8S_Name" Text Text Careful No
    SrcK8sNamespace "SrcK8S_Namespace" Text Text Fine Both
    SrcK8sNetworkName "SrcK8S_NetworkName" Text - Fine No
    SrcK8sOwnerName "SrcK8S_OwnerName" Text Text Fine Both
    SrcK8sOwnerType "SrcK8S_OwnerType" Text Text Fine No
    SrcK8sType "SrcK8S_Type" Text Text Fine Both
    SrcK8sZone "SrcK8S_Zone" Text Text Fine Both
    SrcMac "SrcMac" Text Text Avoid No
    SrcPort "SrcPort" Number Number Careful No
    SrcSubnetLabel "SrcSubnetLabel" Text Text Fine No
    TimeFlowEndMs "TimeFlowEndMs" Number Number Avoid No
    TimeFlowRttNs "TimeFlowRttNs" Number Number Avoid No
    TimeFlowStartMs "TimeFlowStartMs" Number Number Avoid No
    TimeReceived "TimeReceived" Number Number Avoid No
    XlatDstAddr "XlatDstAddr" Text - Avoid No
    XlatDstPort "XlatDstPort" Number - Careful No
    XlatSrcAddr "XlatSrcAddr" Text - Avoid No
    XlatSrcPort "XlatSrcPort" Number - Careful No
    ZoneId "ZoneId" Number - Avoid No
    HashId "_HashId" Text Text Avoid No
    IsFirst "_IsFirst" Bool - Fine No
    RecordType "_RecordType" Text Text Fine Both
    NumFlowLogs "numFlowLogs" Number - Avoid No
}

/// The documentation of the fields as Markdown.
#[must_use]
pub fn markdown() -> String {
    use std::fmt::Write as _;
    let mut out = String::from(
        "## Flow logs\n\nNo points: they go to Kafka, Loki, metrics and JSON lines, under the names of the NetObserv format. Types by \
         `flow_format`; times as the names say (`Ms`, `Ns`; `TimeReceived` in seconds). What is not known is not there; `Bytes` and \
         `Packets` are what was counted, of packets sampled 1:N. Class: what the field means for the number of series when it is a \
         label of a metric; `avoid` is refused, `careful` warned of.\n\n\
         | Field | `current` | `seed` | Label in Loki | Class |\n| --- | --- | --- | --- | --- |\n",
    );
    let ty = |ty: Option<FlowType>| match ty {
        None => "",
        Some(FlowType::Number) => "number",
        Some(FlowType::Text) => "string",
        Some(FlowType::Bool) => "boolean",
        Some(FlowType::Texts) => "strings",
        Some(FlowType::Numbers) => "numbers",
        Some(FlowType::Objects) => "objects",
    };
    for field in FIELDS {
        let label = match field.label {
            Label::No => "",
            Label::Both => "yes",
            Label::Seed => "`seed`",
            Label::Current => "`current`",
        };
        let class = match field.cardinality {
            Cardinality::Fine => "fine",
            Cardinality::Careful => "careful",
            Cardinality::Avoid => "avoid",
        };
        // Writing to a String cannot fail.
        let _ = writeln!(
            out,
            "| `{}` | {} | {} | {label} | {class} |",
            field.name,
            ty(field.current),
            ty(field.seed),
        );
    }
    out
}

/// The field of a name.
#[must_use]
pub fn find(name: &str) -> Option<&'static FlowField> {
    let at = FIELDS.binary_search_by_key(&name, |field| field.name).ok()?;
    FIELDS.get(at)
}

// === impl FlowField ===

impl FlowField {
    /// Its type in a format; `None` where the format has no such field.
    #[must_use]
    pub const fn ty(&self, format: FlowFormat) -> Option<FlowType> {
        match format {
            FlowFormat::Current => self.current,
            FlowFormat::Seed => self.seed,
        }
    }

    /// Whether Loki has it as a label.
    #[must_use]
    pub const fn is_label(&self, format: FlowFormat) -> bool {
        matches!(
            (self.label, format),
            (Label::Both, _) | (Label::Seed, FlowFormat::Seed) | (Label::Current, FlowFormat::Current)
        )
    }
}

// === impl FieldSet ===

impl FieldSet {
    /// None of them.
    pub const NONE: Self = Self(0);

    /// With this one.
    #[must_use]
    pub const fn with(self, field: Field) -> Self {
        Self(self.0 | 1 << field as u8)
    }

    /// Whether it is among them.
    #[must_use]
    pub const fn has(self, field: Field) -> bool {
        self.0 >> field as u8 & 1 == 1
    }
}

// === impl FlowValue ===

impl FlowValue<'_> {
    /// As a number; `None` where it is none.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "metrics are floats")]
    pub const fn number(self) -> Option<f64> {
        match self {
            Self::Unsigned(number) => Some(number as f64),
            Self::Signed(number) => Some(number as f64),
            _ => None,
        }
    }
}

// === impl FlowLog ===

impl FlowLog {
    /// The value of a field. `received` is what `TimeReceived` tells, seconds since the Unix epoch.
    #[must_use]
    pub fn value(&self, field: Field, received: i64) -> FlowValue<'_> {
        use FlowValue::{Absent, Bool, Directions, Events, Flags, Hex, Ip, Mac, Names, Signed, Text, Unsigned};
        let number = |value: u64| if value == 0 { Absent } else { Unsigned(value) };
        let text = |value| if str::is_empty(value) { Absent } else { Text(value) };
        let totals = self.conversation.and_then(|conversation| conversation.totals);
        let total = |value: Option<u64>| value.map_or(Absent, number);
        match field {
            Field::AgentIp => self.agent_ip.map_or(Absent, Ip),
            Field::Bytes => number(self.bytes),
            Field::BytesAb => total(totals.map(|totals| totals.bytes_ab)),
            Field::BytesBa => total(totals.map(|totals| totals.bytes_ba)),
            Field::DnsErrno => self.dns.as_ref().map_or(Absent, |dns| number(dns.errno.into())),
            Field::DnsFlags => self.dns_answer(|answer| Unsigned(answer.flags.into())),
            Field::DnsFlagsResponseCode => self.dns_answer(|answer| Text(rcode_name(answer.flags))),
            Field::DnsId => self.dns_answer(|answer| Unsigned(answer.id.into())),
            Field::DnsLatencyMs => self.dns_answer(|answer| Unsigned(answer.latency_ms)),
            Field::DnsName => self.dns.as_ref().map_or(Absent, |dns| text(&dns.name)),
            Field::Dscp => self.dscp.map_or(Absent, |dscp| Unsigned(dscp.into())),
            Field::DstAddr => Ip(self.dst),
            Field::DstK8sHostIp => host_ip(self.dst_k8s.as_deref()),
            Field::DstK8sHostName => peer(self.dst_k8s.as_deref(), |peer| &peer.host_name),
            Field::DstK8sName => peer(self.dst_k8s.as_deref(), |peer| &peer.name),
            Field::DstK8sNamespace => peer(self.dst_k8s.as_deref(), |peer| &peer.namespace),
            Field::DstK8sNetworkName => peer(self.dst_k8s.as_deref(), |peer| &peer.network),
            Field::DstK8sOwnerName => peer(self.dst_k8s.as_deref(), |peer| &peer.owner_name),
            Field::DstK8sOwnerType => peer(self.dst_k8s.as_deref(), |peer| &peer.owner_kind),
            Field::DstK8sType => peer(self.dst_k8s.as_deref(), |peer| &peer.kind),
            Field::DstK8sZone => peer(self.dst_k8s.as_deref(), |peer| &peer.zone),
            Field::DstMac => self.macs.map_or(Absent, |[_, dst]| Mac(dst)),
            Field::DstPort => match self.l4 {
                FlowL4::Ports { dst, .. } => Unsigned(dst.into()),
                _ => Absent,
            },
            Field::DstSubnetLabel => text(&self.dst_subnet_label),
            // Each flow is counted at one interface alone.
            Field::Duplicate => Bool(false),
            Field::Etype => number(self.etype.into()),
            Field::Flags => self.flags.map_or(Absent, Flags),
            Field::FlowDirection => self
                .direction
                .map_or(Absent, |direction| Unsigned(direction.number().into())),
            Field::IcmpCode => match self.l4 {
                FlowL4::Icmp { code, .. } => Unsigned(code.into()),
                _ => Absent,
            },
            Field::IcmpType => match self.l4 {
                FlowL4::Icmp { kind, .. } => Unsigned(kind.into()),
                _ => Absent,
            },
            Field::IfDirections if self.interfaces.is_empty() => Absent,
            Field::IfDirections => Directions(&self.interfaces),
            Field::Interfaces if self.interfaces.is_empty() => Absent,
            Field::Interfaces => Names(&self.interfaces),
            Field::K8sClusterName => text(&self.cluster),
            Field::K8sFlowLayer => self.layer.map_or(Absent, |layer| Text(layer.as_str())),
            Field::NetworkEvents if self.events.is_empty() => Absent,
            Field::NetworkEvents => Events(&self.events),
            Field::Packets => number(self.packets),
            Field::PacketsAb => total(totals.map(|totals| totals.packets_ab)),
            Field::PacketsBa => total(totals.map(|totals| totals.packets_ba)),
            Field::PktDropBytes => self.drops.as_ref().map_or(Absent, |drops| Unsigned(drops.bytes)),
            Field::PktDropLatestDropCause => self.drops.as_ref().map_or(Absent, |drops| text(&drops.cause)),
            Field::PktDropLatestFlags => self.drops.as_ref().map_or(Absent, |drops| Unsigned(drops.flags.into())),
            Field::PktDropLatestState => self.drops.as_ref().map_or(Absent, |drops| text(&drops.state)),
            Field::PktDropPackets => self.drops.as_ref().map_or(Absent, |drops| Unsigned(drops.packets)),
            Field::Proto => Unsigned(self.proto.into()),
            Field::Sampling => number(self.sampling.into()),
            Field::SrcAddr => Ip(self.src),
            Field::SrcK8sHostIp => host_ip(self.src_k8s.as_deref()),
            Field::SrcK8sHostName => peer(self.src_k8s.as_deref(), |peer| &peer.host_name),
            Field::SrcK8sName => peer(self.src_k8s.as_deref(), |peer| &peer.name),
            Field::SrcK8sNamespace => peer(self.src_k8s.as_deref(), |peer| &peer.namespace),
            Field::SrcK8sNetworkName => peer(self.src_k8s.as_deref(), |peer| &peer.network),
            Field::SrcK8sOwnerName => peer(self.src_k8s.as_deref(), |peer| &peer.owner_name),
            Field::SrcK8sOwnerType => peer(self.src_k8s.as_deref(), |peer| &peer.owner_kind),
            Field::SrcK8sType => peer(self.src_k8s.as_deref(), |peer| &peer.kind),
            Field::SrcK8sZone => peer(self.src_k8s.as_deref(), |peer| &peer.zone),
            Field::SrcMac => self.macs.map_or(Absent, |[src, _]| Mac(src)),
            Field::SrcPort => match self.l4 {
                FlowL4::Ports { src, .. } => Unsigned(src.into()),
                _ => Absent,
            },
            Field::SrcSubnetLabel => text(&self.src_subnet_label),
            Field::TimeFlowEndMs => Signed(self.end_unix_ms),
            Field::TimeFlowRttNs => number(self.rtt_ns),
            Field::TimeFlowStartMs => Signed(self.start_unix_ms),
            Field::TimeReceived => Signed(received),
            Field::XlatDstAddr => self.xlat.map_or(Absent, |xlat| Ip(xlat.dst)),
            Field::XlatDstPort => self.xlat.map_or(Absent, |xlat| number(xlat.dst_port.into())),
            Field::XlatSrcAddr => self.xlat.map_or(Absent, |xlat| Ip(xlat.src)),
            Field::XlatSrcPort => self.xlat.map_or(Absent, |xlat| number(xlat.src_port.into())),
            Field::ZoneId => self.xlat.map_or(Absent, |xlat| Unsigned(xlat.zone.into())),
            Field::HashId => self.conversation.map_or(Absent, |conversation| Hex(conversation.id)),
            Field::IsFirst => match self.conversation {
                Some(conversation) if conversation.totals.is_some() => Bool(conversation.first),
                _ => Absent,
            },
            Field::RecordType => self
                .conversation
                .map_or(Absent, |conversation| Text(conversation.kind.as_str())),
            Field::NumFlowLogs => total(totals.map(|totals| totals.flows)),
        }
    }

    fn dns_answer<'a>(&self, value: impl Fn(super::FlowDnsAnswer) -> FlowValue<'a>) -> FlowValue<'a> {
        let answer = self.dns.as_ref().and_then(|dns| dns.answer);
        answer.map_or(FlowValue::Absent, value)
    }
}

fn peer<'a>(peer: Option<&'a FlowPeer>, text: impl Fn(&'a FlowPeer) -> &'a str) -> FlowValue<'a> {
    match peer.map(text) {
        None | Some("") => FlowValue::Absent,
        Some(text) => FlowValue::Text(text),
    }
}

fn host_ip(peer: Option<&FlowPeer>) -> FlowValue<'_> {
    peer.and_then(|peer| peer.host_ip)
        .map_or(FlowValue::Absent, FlowValue::Ip)
}

/// Name of the response code in the flags of a DNS header.
const fn rcode_name(flags: u16) -> &'static str {
    match flags & 0xf {
        0 => "NoError",
        1 => "FormErr",
        2 => "ServFail",
        3 => "NXDomain",
        4 => "NotImp",
        5 => "Refused",
        6 => "YXDomain",
        7 => "YXRRSet",
        8 => "NXRRSet",
        9 => "NotAuth",
        10 => "NotZone",
        _ => "UnDefined",
    }
}
