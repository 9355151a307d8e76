//! Application protocols, read from the outside: bytes of watched sockets in, exchanges out. Pure: no I/O, no clock.
//!
//! ```text
//! pieces of a TCP stream ▶ [`classify()`] (first bytes) ▶ [`HttpSession`] ─ http1/ ┐
//!                                                                        └ http2/ ┴▶ [`Exchange`]
//! datagrams, or a TCP stream through [`dns::TcpSplitter`] ▶ [`dns::Message`] ▶ [`dns::DnsSession`] ▶ [`dns::Lookup`]
//! ```
//! One session per connection. What a session is given is a [`Piece`]: the captured beginning of a transfer together with
//! its true length, so that bodies are counted without being seen. Where bytes are missing that were needed, a session
//! looks for the next message or frame, and marks what it cannot know instead of guessing.
//!
//! No session trusts its input: memory is bounded by [`HttpOptions`] and the constants of each protocol, work by the
//! captured bytes, and every loss is counted in [`Losses`]. In the steady state nothing is allocated: exchanges borrow from
//! their session.
//!
//! Entry: [`HttpSession::push`] and [`dns::DnsSession::message`].

pub mod classify;
pub mod dns;
mod exchange;
mod http1;
mod http2;
mod record;
mod session;

pub use classify::{Verdict, classify};
pub use exchange::{Exchange, Flags, Grpc, Losses, Transfer, Version};
pub use http1::Heads;
pub use http2::way_of_frames;
pub use session::HttpSession;

/// Which way bytes flow, by role: the same on both hosts of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Way {
    /// From the client: requests.
    ToServer,
    /// From the server: responses.
    ToClient,
}

/// A transfer on one connection, or a part of one: what one system call moved.
///
/// Pieces are given in the order of the stream, per way without holes. A transfer of which more than its beginning was
/// captured may be given as several pieces with the same time. Bytes that nobody saw but that are known to have been
/// moved (sendfile, a full ring buffer) are a piece with nothing captured. Across the two ways, pieces are given in the
/// order of their times.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a> {
    /// Which way the bytes went.
    pub way: Way,
    /// When, in nanoseconds of the kernel's monotonic clock.
    pub ts_ns: u64,
    /// The captured beginning; bytes beyond `true_len` are ignored.
    pub captured: &'a [u8],
    /// How many bytes the transfer moved.
    pub true_len: u64,
}

/// What an HTTP session keeps of each exchange, and how much of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HttpOptions {
    /// Longest path kept, in bytes as sent. A path of this length or longer is marked truncated.
    pub path_limit: u16,
    /// Keep the query string as part of the path.
    pub keep_query: bool,
    /// HTTP/1: requests waiting for their response. Further ones are counted but have no method and path.
    pub max_pending: u16,
    /// HTTP/2: streams open at once. The oldest one makes room.
    pub max_streams: u16,
}

impl Default for HttpOptions {
    fn default() -> Self {
        Self {
            path_limit: 512,
            keep_query: false,
            max_pending: 1024,
            max_streams: 256,
        }
    }
}

/// How the capture came to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// It saw the connection being made: the first piece is the first byte.
    Fresh,
    /// The connection was there before: the first piece may be anywhere in the stream.
    Joined,
}

/// What a session can still tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Exchanges are being followed.
    Active,
    /// The protocol was left for another by agreement (WebSocket, a CONNECT tunnel): no exchange will follow.
    Opaque,
    /// This is not HTTP, or no longer: no exchange will follow.
    NotHttp,
}

/// Where exchanges go, in the order in which they end.
pub type Sink<'s> = dyn FnMut(&Exchange<'_>) + 's;
