//! The chain under faults: agent ▶ aggregator process ▶ DataWay stub on this machine, with real traffic, while the
//! aggregator is killed and DataWay fails. Every record has to arrive exactly once, in bounded memory.
//!
//! ```text
//! cast (processes that talk and count) ▶ node-agent run ▶ gRPC ▶ aggregator ▶ DataWay stub ▶ judge
//!                                              schedule (what fails when) ─┴──────┘
//! ```
//! Entry: [`run::run`] (binary `chain`).

pub mod cast;
pub mod judge;
pub mod peers;
pub mod processes;
pub mod run;
pub mod schedule;
