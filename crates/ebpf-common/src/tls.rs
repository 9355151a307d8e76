//! Layouts of `httpflow-tls`, the part of plugin `ebpf-net` that reads HTTP where libraries take and give its plain text.
//!
//! Events of connections are those of [`crate::http`]. Their `cookie` is a number of the connection's own, for data may
//! come before its socket is known; sequence numbers count the bytes of plain text of each way, from zero on.

use core::mem::size_of;

use crate::{http::HttpSock, net::Tuple};

/// Bytes of a record of TLS by which it is recognised at a socket: header, and what looks random behind it.
pub const RECORD: usize = 40;
/// Calls of one thread that are under way one inside another: TLS within TLS.
pub const DEPTH: usize = 2;
/// Version of [`ProcessEvent`].
pub const PROCESS_VERSION: u16 = 1;

/// Indices of `STATS`: those of [`crate::http::stat`], and from here on.
pub mod stat {
    use crate::http;

    /// Calls that found no room among those under way.
    pub const CALLS_FULL: u32 = http::stat::COUNT;
    /// Calls of which plain text was taken.
    pub const CALLS: u32 = CALLS_FULL + 1;
    /// Connections that could not be remembered.
    pub const CONNECTIONS_FULL: u32 = CALLS_FULL + 2;
    /// Connections whose socket was found by a packet that left inside a call.
    pub const BY_NESTING: u32 = CALLS_FULL + 3;
    /// Connections whose socket was found by the bytes of a record.
    pub const BY_RECORD: u32 = CALLS_FULL + 4;
    /// Connections whose socket is the one of a descriptor.
    pub const BY_DESCRIPTOR: u32 = CALLS_FULL + 5;
    /// Starts and ends of processes that found no room in the ring.
    pub const PROCESSES_MISSED: u32 = CALLS_FULL + 6;
    /// Returns without a call: it began before the probe was there.
    pub const NO_CALL: u32 = CALLS_FULL + 7;
    /// Calls of Go programs on connections that lead to no descriptor of a TCP socket.
    pub const NO_DESCRIPTOR: u32 = CALLS_FULL + 8;
    /// Calls whose memory, of the process, was not there to be read.
    pub const UNREADABLE: u32 = CALLS_FULL + 9;
    /// Number of counters.
    pub const COUNT: u32 = CALLS_FULL + 10;
}

/// Kinds of [`ProcessEvent`].
pub mod process {
    /// A process started another program.
    pub const EXEC: u16 = 1;
    /// A process that has an entry in `TRACKED` ended.
    pub const EXIT: u16 = 2;
}

/// How a call tells how much it moved.
pub mod result {
    /// The number it returns, if that is above zero (an `int`, or a number that fits).
    pub const NUMBER: u8 = 0;
    /// It returns 1, and the number is where an argument points to.
    pub const POINTER: u8 = 1;
    /// It moves no plain text.
    pub const NOTHING: u8 = 2;
}

/// A connection, as its process knows it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ConnKey {
    /// Address of the library's object (`SSL`, `gnutls_session_t`, `tls.Conn`).
    pub object: u64,
    /// Thread group id, as the kernel knows it.
    pub tgid: u32,
    /// Zero.
    pub _pad: u32,
}

/// A call under way.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Call {
    /// Whose it is.
    pub key: ConnKey,
    /// Stack pointer at its begin, by which its return is known; 0 if there is none.
    pub stack: u64,
    /// Address of the plain text; 0 if it is nowhere.
    pub buffer: u64,
    /// Where the number of bytes moved is found, for [`result::POINTER`].
    pub moved_at: u64,
    /// Monotonic time of its begin, nanoseconds.
    pub time_ns: u64,
    /// [`crate::http::way`] of the plain text.
    pub way: u8,
    /// [`result`]
    pub result: u8,
    /// Zero.
    pub _pad: [u8; 6],
}

/// Calls of a thread that are under way, the outer one first.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Calls {
    /// Calls; those without a stack pointer are none.
    pub calls: [Call; DEPTH],
}

/// What the kernel side remembers of a connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TlsConn {
    /// As of a socket, with plain text for segments; its cookie is the connection's number.
    pub sock: HttpSock,
    /// The ends.
    pub tuple: Tuple,
    /// Address of its `struct sock`; 0 while that is not known.
    pub sk: u64,
}

/// What is kept with a socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TlsSock {
    /// See `HttpConfig::generation`; what was given up is looked at again.
    pub generation: u32,
    /// Segments out of it that told nothing.
    pub looks: u16,
    /// 1 if its connection is known, 2 if it was given up.
    pub state: u8,
    /// Zero.
    pub _pad: u8,
}

/// A process started a program, or ended.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcessEvent {
    /// [`PROCESS_VERSION`].
    pub version: u16,
    /// See [`process`].
    pub kind: u16,
    /// Process id in the agent's pid namespace.
    pub pid: u32,
}

const _: () = {
    assert!(size_of::<ConnKey>() == 16);
    assert!(size_of::<Call>() == 56);
    assert!(size_of::<Calls>() == 112);
    assert!(size_of::<TlsConn>() == 112);
    assert!(size_of::<TlsSock>() == 8);
    assert!(size_of::<ProcessEvent>() == 8);
};
