//! Typed records, one output table per sink format, and the encoders.
//!
//! Data flow: a plugin fills a typed record ([`Netflow`], ...); records travel in a [`RecordBatch`]; an encoder in
//! [`encode`] walks the record's table and writes DataWay points (protobuf or line protocol) or JSON lines.
//! No I/O, no clock, no kernel, no cluster: everything here is a pure function of its arguments.

pub mod column;
pub mod encode;
pub mod netflow;
mod types;

pub use netflow::Netflow;
pub use types::{Direction, Endpoint, Family, Globals, IpType, K8sEndpoint, Port, RecordBatch, Str, Transport};
