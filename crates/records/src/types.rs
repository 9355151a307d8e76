//! Value types shared by all records.

use std::{net::IpAddr, sync::Arc};

/// Shared immutable text. Metadata repeats from record to record, so clones must not copy.
pub type Str = Arc<str>;

/// Transport layer protocol; tag `transport`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Transport {
    /// `tcp`
    Tcp,
    /// `udp`
    Udp,
}

/// Network layer protocol; tag `family`. A v4-mapped IPv6 address counts as IPv4.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// `IPv4`
    V4,
    /// `IPv6`
    V6,
}

/// Who started the exchange, seen from the local end (`src_*`); tag `direction`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// The remote end started it.
    Incoming,
    /// The local end started it.
    Outgoing,
}

/// Class of an address; tags `src_ip_type` and `dst_ip_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum IpType {
    /// RFC 1918 and fc00::/7.
    Private,
    /// 127.0.0.0/8 and ::1.
    Loopback,
    /// 224.0.0.0/4 and ff00::/8.
    Multicast,
    /// Everything else.
    Other,
}

/// A port, or `*` where ephemeral ports were folded into one row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Port {
    /// A real port number, host byte order.
    Number(u16),
    /// Folded; written as `*`.
    Any,
}

/// One end of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Endpoint {
    /// Never a v4-mapped IPv6 address.
    pub ip: IpAddr,
    /// Port, or folded.
    pub port: Port,
}

/// Kubernetes names of one end; an absent name is written as `N/A` when the other end is known.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct K8sEndpoint {
    /// Namespace of the object.
    pub namespace: Str,
    /// Pod name.
    pub pod: Str,
    /// Service name, empty if none selects the pod.
    pub service: Str,
    /// Name of the owning workload (`*_k8s_deployment_name`, `*_k8s_workload_name`).
    pub workload: Str,
    /// Kind of the workload in lower case, e.g. `deployment`.
    pub workload_type: Str,
    /// Tags made of labels of the pod and its workload, key and value. Those of the local end are written.
    pub labels: Arc<[(Str, Str)]>,
}

/// Tags that every record of one agent carries: `host` first, then the user's extra tags. Sent once per stream.
/// A global tag never replaces a tag that a record already has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Globals {
    /// Tag key and value, in output order.
    pub tags: Vec<(Str, Str)>,
}

// === impl IpType ===

impl IpType {
    /// Classifies an address.
    #[must_use]
    pub fn of(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(v4) if v4.is_private() => Self::Private,
            IpAddr::V4(v4) if v4.is_loopback() => Self::Loopback,
            IpAddr::V4(v4) if v4.is_multicast() => Self::Multicast,
            IpAddr::V6(v6) if v6.is_unique_local() => Self::Private,
            IpAddr::V6(v6) if v6.is_loopback() => Self::Loopback,
            IpAddr::V6(v6) if v6.is_multicast() => Self::Multicast,
            _ => Self::Other,
        }
    }
}
