//! The link's messages (generated) and their conversion to and from records.
//!
//! ```text
//! agent:       RecordBatch ─▶ convert::StreamEncoder (texts numbered once per stream) ─▶ v1::Batch ─▶ wire
//! aggregator:  wire ─▶ v1::Batch ─▶ convert::StreamDecoder (checks everything) ─▶ RecordBatch
//! ```
//! One encoder and one decoder live as long as their stream. The schema is `proto/ebpfcollector/v1/collector.proto`.

pub mod codec;
pub mod convert;
pub mod limits;

/// Generated from `ebpfcollector/v1/collector.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub)]
pub mod v1 {
    tonic::include_proto!("ebpfcollector.v1");
}

/// The version of the protocol this build speaks.
pub const PROTOCOL_VERSION: u32 = 1;
