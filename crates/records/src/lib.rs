//! Typed records, one output table per sink format, and the encoders.
//!
//! Data flow: a plugin fills a typed record ([`Netflow`], ...); records travel in a [`RecordBatch`]; an encoder in
//! [`encode`] walks the record's table and writes DataWay points (protobuf or line protocol) or JSON lines.
//! No I/O, no clock, no kernel, no cluster: everything here is a pure function of its arguments.

pub mod bash;
mod batch;
pub mod column;
pub mod dnsflow;
pub mod encode;
mod flow;
pub mod flowlog;
pub mod httpflow;
mod measurement;
pub mod netflow;
mod table;
mod types;

pub use bash::Bash;
pub use batch::{AnyRecord, IntoIter, RecordBatch};
pub use dnsflow::{Dnsflow, Question};
pub use flow::Flow;
pub use flowlog::FlowLog;
pub use httpflow::Httpflow;
pub use measurement::{Category, Measurement};
pub use netflow::Netflow;
pub use types::{Direction, Endpoint, Family, Globals, IpType, K8sEndpoint, Port, Str, Transport};
