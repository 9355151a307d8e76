//! The aggregator: accepts record batches from node agents, stores them on disk, delivers them to the sinks.
//!
//! ```text
//! ingest (gRPC) ─┐
//! standalone ────┴▶ pipeline::Pipeline::accept ▶ de-duplicate + encode + queue (disk) ▶ one delivery task per sink
//! ```
//! Entry: [`Aggregator::start`]. A batch is acknowledged when `accept` returns: by then it is safe on disk.

mod aggregator;
pub mod config;
pub mod ingest;
pub mod live;
pub mod pipeline;
mod queue;
mod route;
pub mod sinks;

pub use aggregator::{Aggregator, Drained, StartError};
pub use queue::OpenError;
