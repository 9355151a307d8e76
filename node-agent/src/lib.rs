//! The node agent: kernel programs in, records out.
//!
//! ```text
//! ebpf/ (probe, offsets, load) ▶ capture/<plugin> (drain, sessions) ▶ identity/ (names) ▶ uplink/ (batches, acks)
//! ```
//! Entry: [`agent::run`].

pub mod agent;
pub mod capture;
pub mod cli;
pub mod doctor;
pub mod ebpf;
pub mod identity;
pub mod protocols;
pub mod uplink;
