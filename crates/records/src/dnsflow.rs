//! `dnsflow`: DNS look-ups of one interval, one row per pair of ends, direction and outcome.

mod table;

pub use table::COLUMNS;

use crate::{Flow, Str};

/// Response code of look-ups that got no answer in time.
pub const TIMED_OUT: i32 = -1;

/// One `dnsflow` row. The measurement does not name the process: `flow.pid` and `flow.process_name` are not written.
#[derive(Clone, Debug, PartialEq)]
pub struct Dnsflow {
    /// Time of the flush, nanoseconds since the Unix epoch.
    pub time_unix_ns: i64,
    /// Who asked whom.
    pub flow: Flow,
    /// What was asked for; `None` while that is not reported.
    pub question: Option<Question>,
    /// Response code, or [`TIMED_OUT`].
    pub rcode: i32,
    /// Look-ups in the interval.
    pub count: u64,
    /// Time to the answer, nanoseconds, mean over the row's look-ups; 0 without an answer.
    pub latency_ns: u64,
    /// The longest of them, nanoseconds.
    pub latency_max_ns: u64,
}

/// What a look-up asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Question {
    /// Name, in lower case, without the dot at its end.
    pub name: Str,
    /// Type of record, as in `AAAA`.
    pub kind: Str,
}
