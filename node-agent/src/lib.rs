//! The node agent: kernel programs in, records out.
//!
//! ```text
//! ebpf/ (probe, offsets, load) ▶ capture/<plugin> (drain, sessions) ▶ identity/ (names) ▶ uplink/ (batches, acks)
//! ```
//! Entry: [`run`] in `agent.rs`.

pub mod ebpf;
pub mod uplink;
