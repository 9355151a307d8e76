//! DNS over UDP and TCP.
//!
//! ```text
//! datagram ────────────────────────▶ [`Message`] ▶ [`DnsSession`] ▶ [`Lookup`] (a query with its answer, or none)
//! TCP pieces ▶ [`TcpSplitter`] ──▲        └▶ [`Message::addresses`] (which names the client knows addresses by)
//! ```
//! Messages borrow the captured bytes; nothing is decoded that nobody asks for. One [`DnsSession`] serves all sockets.
//! Which ports are looked at is the capture's matter.

mod message;
mod name;
mod session;
mod tcp;
#[cfg(test)]
mod tests;

pub use message::{Address, Data, DnsError, Message, Question, Record, TYPE_A, TYPE_AAAA};
pub use name::Name;
pub use session::{DnsLosses, DnsOptions, DnsSession, Lookup, RCODE_TIMEOUT, Seen};
pub use tcp::{TcpMessage, TcpSplitter};
