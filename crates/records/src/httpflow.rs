//! `httpflow`: HTTP exchanges of one interval, one row per process, pair of ends, method, path and status.

mod table;

pub use table::COLUMNS;

use crate::{Flow, Str};

/// One `httpflow` row.
#[derive(Clone, Debug, PartialEq)]
pub struct Httpflow {
    /// Time of the flush, nanoseconds since the Unix epoch.
    pub time_unix_ns: i64,
    /// Who talked to whom.
    pub flow: Flow,
    /// Field `method`.
    pub method: Str,
    /// Field `path`.
    pub path: Str,
    /// Field `http_version`, as in `1.1`.
    pub http_version: Str,
    /// Field `status_code`.
    pub status_code: u32,
    /// Status of a gRPC call; `None` for other exchanges.
    pub grpc_status: Option<u32>,
    /// The path reached the limit and was cut there.
    pub truncated: bool,
    /// Exchanges in the interval.
    pub count: u64,
    /// Time to the first byte of the response, nanoseconds, mean over the row's exchanges.
    pub latency_ns: u64,
    /// Bytes read by the local process for these exchanges.
    pub bytes_read: u64,
    /// Bytes written by the local process for these exchanges.
    pub bytes_written: u64,
}
