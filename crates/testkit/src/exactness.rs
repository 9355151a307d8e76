//! The exactness test: does the agent report exactly what the processes themselves counted?
//!
//! ```text
//! scenario (what runs) ▶ traffic roles ▶ reports ─┐
//!                        agent ▶ JSON lines ▶ flow ─┴▶ compare ▶ table, `exactness: N passed, N failed`
//! ```
//! The same binary runs natively as root and as the command of a test VM. Entry: [`run::run`] (binary `exactness`).

pub mod agent;
pub mod compare;
pub mod flow;
pub mod run;
pub mod scenario;
