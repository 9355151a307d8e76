//! `netflow`: connection statistics of one interval, one row per process and pair of ends.

mod table;

use std::{net::IpAddr, sync::Arc};

pub use table::COLUMNS;

use crate::{Direction, Endpoint, Family, K8sEndpoint, Str, Transport};

/// One `netflow` row. `local` is always the end on this host (`src_*`), whatever the direction.
#[derive(Clone, Debug, PartialEq)]
pub struct Netflow {
    /// Time of the flush, nanoseconds since the Unix epoch.
    pub time_unix_ns: i64,
    /// This host's end; tags `src_*`.
    pub local: Endpoint,
    /// The other end; tags `dst_*`.
    pub remote: Endpoint,
    /// Tag `transport`.
    pub transport: Transport,
    /// Tag `family`.
    pub family: Family,
    /// Tag `direction`.
    pub direction: Direction,
    /// Inode number of the network namespace of the socket; tag `netns`.
    pub netns: u32,
    /// Process (thread group) id in the host's pid namespace; 0 when unknown.
    pub pid: u32,
    /// Process name; empty when unknown.
    pub process_name: Str,
    /// Destination after DNAT; `None` is written as `N/A`.
    pub dst_nat: Option<(IpAddr, u16)>,
    /// Domain the client resolved to reach `remote`; empty when unknown.
    pub dst_domain: Str,
    /// Kubernetes names of `local`.
    pub local_k8s: Option<Arc<K8sEndpoint>>,
    /// Kubernetes names of `remote`.
    pub remote_k8s: Option<Arc<K8sEndpoint>>,
    /// Payload bytes read by the local process in the interval.
    pub bytes_read: u64,
    /// Payload bytes written by the local process in the interval.
    pub bytes_written: u64,
    /// TCP segments retransmitted by the local end in the interval.
    pub retransmits: u64,
    /// Smoothed round-trip time, microseconds, mean over the row's connections. TCP only.
    pub rtt_us: u64,
    /// Mean deviation of the round-trip time, microseconds, mean over the row's connections. TCP only.
    pub rtt_var_us: u64,
    /// TCP connections closed in the interval.
    pub tcp_closed: u64,
    /// TCP connections established in the interval.
    pub tcp_established: u64,
    /// UDP datagrams received in the interval; not part of the documented measurement, written by the JSON and table
    /// encoders only.
    pub datagrams_read: u64,
    /// UDP datagrams sent in the interval; see `datagrams_read`.
    pub datagrams_written: u64,
}
