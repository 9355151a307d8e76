//! Layouts of `httpflow`, the part of plugin `ebpf-net` that reads HTTP: events, configuration, statistics.
//!
//! Addresses and ports are as in [`crate::net`].

use core::mem::size_of;

use crate::net::{NetConfig, Tuple};

/// Version of the event layouts; a reader refuses others.
pub const EVENT_VERSION: u16 = 1;
/// Bytes of the end of a segment that come along where its middle is left out.
pub const TAIL: usize = 8;
/// Bytes of one segment that are captured at most, in several events.
pub const SEGMENT_MAX: u32 = PART as u32 * PARTS;
/// Bytes of a segment in one event at most.
pub const PART: usize = 4096;
/// Events of one segment at most, without that of what is not captured.
pub const PARTS: u32 = 16;

/// Kinds of events ([`EventHead::kind`]).
pub mod event {
    /// [`super::OpenEvent`]
    pub const OPEN: u16 = 1;
    /// [`super::OwnerEvent`]
    pub const OWNER: u16 = 2;
    /// [`super::DataHead`], followed by what was captured.
    pub const DATA: u16 = 3;
}

/// Which way bytes go, seen from the socket: index of what is kept per way.
pub mod way {
    /// Out of the socket.
    pub const EGRESS: u8 = 0;
    /// Into it.
    pub const INGRESS: u8 = 1;
}

/// What the local end is.
pub mod role {
    /// Not known: the connection is older than the agent, and its bytes do not say.
    pub const UNKNOWN: u8 = 0;
    /// It sends requests.
    pub const CLIENT: u8 = 1;
    /// It answers them.
    pub const SERVER: u8 = 2;
}

/// Flags of [`DataHead::flags`].
pub mod flag {
    /// The sender will send nothing after these bytes.
    pub const FIN: u8 = 1;
    /// The connection is gone.
    pub const RESET: u8 = 2;
    /// It is followed no longer, for it was found to be switched off.
    pub const DROPPED: u8 = 4;
}

/// What is kept with a socket, by value of [`HttpSock::state`].
pub mod state {
    /// It is not known yet what is spoken.
    pub const UNKNOWN: u8 = 0;
    /// HTTP/1.
    pub const HTTP1: u8 = 1;
    /// HTTP/2.
    pub const HTTP2: u8 = 2;
    /// Something else.
    pub const OTHER: u8 = 3;
    /// Switched off, as of [`super::HttpSock::generation`].
    pub const OFF: u8 = 4;
    /// It is older than the programs, and nothing has passed since.
    pub const OLDER: u8 = 5;
}

/// Indices of `STATS`, which count events since load.
pub mod stat {
    /// Connection ends that were found to speak HTTP.
    pub const ENDS: u32 = 0;
    /// Of them: on a loopback address while loopback is not reported.
    pub const SKIP_LOOPBACK: u32 = 1;
    /// Of them: IPv6 while `ipv6_disabled`.
    pub const SKIP_IPV6: u32 = 2;
    /// Of them: switched off for the pod or namespace.
    pub const SKIP_POLICY: u32 = 3;
    /// Of them: of another node that shares this kernel.
    pub const SKIP_OTHER_NODE: u32 = 4;
    /// Events handed on.
    pub const EVENTS: u32 = 5;
    /// Events that found no room in the ring.
    pub const RING_FULL: u32 = 6;
    /// Bytes put into the ring, events' heads included.
    pub const BYTES: u32 = 7;
    /// TCP sockets that could not be remembered.
    pub const NO_STORAGE: u32 = 8;
    /// Number of counters.
    pub const COUNT: u32 = 9;
}

/// First bytes of every event.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventHead {
    /// [`EVENT_VERSION`].
    pub version: u16,
    /// [`event`] kind.
    pub kind: u16,
    /// Zero.
    pub _pad: u32,
    /// Cookie of the socket.
    pub cookie: u64,
    /// Monotonic time, nanoseconds.
    pub time_ns: u64,
}

/// A socket is followed from now on, or goes on after a long pause.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenEvent {
    /// Head.
    pub head: EventHead,
    /// The ends, as packets have them.
    pub tuple: Tuple,
    /// Sequence numbers of the next bytes, by [`way`].
    pub next: [u32; 2],
    /// Thread group id of the process that is sending; 0 if the event is not due to one.
    pub pid: u32,
    /// [`role`] of the local end.
    pub role: u8,
    /// 1 if nothing has passed before.
    pub fresh: u8,
    /// Zero.
    pub _pad: [u8; 2],
    /// Name of `pid`'s process.
    pub comm: [u8; 16],
    /// Cgroup of `pid`'s process, as in `net::Conn::owner_cgroup`.
    pub cgroup: u64,
}

/// Another process than before sends on a socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OwnerEvent {
    /// Head.
    pub head: EventHead,
    /// Thread group id.
    pub pid: u32,
    /// Zero.
    pub _pad: u32,
    /// Name of the process.
    pub comm: [u8; 16],
    /// Its cgroup.
    pub cgroup: u64,
}

/// Bytes of a segment that passed: the first `captured` ones follow this head, the last `tail` ones are in it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DataHead {
    /// Head.
    pub head: EventHead,
    /// Sequence number of the first byte.
    pub seq: u32,
    /// How many bytes passed.
    pub len: u32,
    /// How many of them follow.
    pub captured: u32,
    /// [`way`] they went.
    pub way: u8,
    /// [`flag`]s.
    pub flags: u8,
    /// Bytes of `end` that are in use.
    pub tail: u8,
    /// Zero.
    pub _pad: u8,
    /// The last bytes.
    pub end: [u8; TAIL],
}

/// What the kernel side remembers of a TCP socket. Two CPUs may write to it at a time, each its own way's part.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HttpSock {
    /// Cookie.
    pub cookie: u64,
    /// The task that sent last, by address.
    pub task: u64,
    /// Monotonic time of the last event, nanoseconds.
    pub last_ns: u64,
    /// Sequence number of the next byte, by [`way`].
    pub next: [u32; 2],
    /// Bytes that are still captured because a head has not ended, by [`way`].
    pub head: [u32; 2],
    /// Process of `task`.
    pub pid: u32,
    /// Segments that did not tell what is spoken.
    pub looks: u16,
    /// What begins with the bytes at hand, by [`way`], where they come from a library. A value that was in memory is one for
    /// the verifier, which need not follow each way to it.
    pub begins: [u8; 2],
    /// See [`HttpConfig::generation`].
    pub generation: u32,
    /// [`state`].
    pub state: u8,
    /// [`role`].
    pub role: u8,
    /// 1 once user space was told of the socket.
    pub opened: u8,
    /// 1 if nothing had passed when it was first seen, until user space was told.
    pub fresh: u8,
    /// 1 if requests are sent before the one before is answered: everything is captured.
    pub eager: u8,
    /// 1 where heads have been longer than the smallest event has room for, by [`way`].
    pub large: [u8; 2],
    /// Zero.
    pub _pad: u8,
}

/// Settings that may change while programs run; one entry of an array map.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HttpConfig {
    /// Loopback, IPv6, policy and pid namespace, as for `ebpf-net`; the rest of it is not used.
    pub net: NetConfig,
    /// Grows with each change of the policy: what was off is asked about again.
    pub generation: u32,
    /// Ring-buffer fill in bytes beyond which long segments are not captured whole.
    pub busy_bytes: u32,
    /// 1 if connections are marked that are older than the programs: of others that do not speak HTTP nothing is remembered.
    pub marked: u32,
    /// Zero.
    pub _pad: u32,
}

/// The agent's pid namespace.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OwnNamespace {
    /// Its address.
    pub address: u64,
    /// Its level.
    pub level: u64,
}

const _: () = {
    assert!(size_of::<OwnNamespace>() == 16);
    assert!(size_of::<EventHead>() == 24);
    assert!(size_of::<OpenEvent>() == 104);
    assert!(size_of::<OwnerEvent>() == 56);
    assert!(size_of::<DataHead>() == 48);
    assert!(size_of::<HttpSock>() == 64);
    assert!(size_of::<HttpConfig>() == 88);
};

#[cfg(feature = "user")]
mod pod {
    use super::{HttpConfig, OwnNamespace};

    // SAFETY: `repr(C)`, integers only, no padding (size asserted above): every bit pattern is valid.
    unsafe impl aya::Pod for HttpConfig {}
    // SAFETY: as above.
    unsafe impl aya::Pod for OwnNamespace {}
}
