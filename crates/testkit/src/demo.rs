//! The demo: the whole way of the data on this machine, in the terminal, with a verdict.
//!
//! ```text
//! cast (processes that talk and count) ▶ node-agent standalone ▶ DataWay stub ▶ table (live), compare (verdict)
//! ```
//! Everybody's traffic is shown; only that of the demo's own processes is compared, since only they count it. Entry:
//! [`run::run`] (binary `demo`).

pub mod cast;
pub mod compare;
pub mod run;
pub mod screen;
pub mod table;
