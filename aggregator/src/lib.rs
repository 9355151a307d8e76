//! The aggregator: accepts record batches from node agents, stores them on disk, delivers them to the sinks.
//!
//! ```text
//! ingest (gRPC) ─┐
//! standalone ────┴▶ pipeline::Pipeline::accept ▶ de-duplicate + encode + queue (disk) ▶ one delivery task per sink
//! ```
//! Entry: [`pipeline::Pipeline`]. A batch is acknowledged when `accept` returns: by then it is safe on disk.

pub mod ingest;
pub mod pipeline;
