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

/// Field of `Batch` that carries records of a kind.
#[must_use]
pub const fn batch_field(measurement: records::Measurement) -> u32 {
    match measurement {
        records::Measurement::Netflow => 10,
        records::Measurement::Httpflow => 11,
        records::Measurement::Dnsflow => 12,
        records::Measurement::Bash => 13,
        records::Measurement::FlowLog => 14,
    }
}

/// What this build's aggregator says in `HelloAck.takes_records`.
#[must_use]
pub fn takes_records() -> Vec<u32> {
    let kinds = records::Measurement::ALL.into_iter().map(batch_field);
    kinds.filter(|field| *field > 10).collect()
}

// === impl Batch ===

impl v1::Batch {
    /// Records of all kinds.
    #[must_use]
    pub fn records(&self) -> usize {
        let Self {
            seq: _,
            strings: _,
            netflow,
            httpflow,
            dnsflow,
            bash,
            flowlog,
        } = self;
        netflow.len() + httpflow.len() + dnsflow.len() + bash.len() + flowlog.len()
    }
}
