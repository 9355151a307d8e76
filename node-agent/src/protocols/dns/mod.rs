//! DNS over UDP and TCP.
//!
//! ```text
//! datagram ────────────────────────▶ [`Message`] ▶ [`DnsSession`] ▶ [`Lookup`] (a query with its answer, or none)
//! TCP packets ▶ [`Segments`] ▶ [`TcpSplitter`] ──▲
//!                      [`Message::addresses`] ▶ [`Domains`] (which names a client knows addresses by)
//! ```
//! Messages borrow the captured bytes; nothing is decoded that nobody asks for. One [`DnsSession`] serves all sockets.
//! Which ports are looked at is the capture's matter.

mod domains;
mod message;
mod name;
mod segments;
mod session;
mod tcp;
#[cfg(test)]
mod tests;

pub use domains::{Domains, DomainsOptions};
pub use message::{Address, Data, DnsError, Message, Question, Record, TYPE_A, TYPE_AAAA};
pub use name::Name;
pub use segments::{Segment, SegmentLosses, Segments};
pub use session::{DnsLosses, DnsOptions, DnsSession, Lookup, RCODE_TIMEOUT, Seen};
pub use tcp::{TcpMessage, TcpSplitter};
