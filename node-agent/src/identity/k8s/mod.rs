//! Names of Kubernetes objects, dated: a flow is named by who held its address when it happened.
//!
//! ```text
//! objects (trimmed while they are parsed) ▶ [`store::Store`] ◀ lookups
//! ```
//! [`store::Store`] does no I/O. Entry: [`Store::new`].

pub mod objects;
pub mod store;

pub use store::{Counts, Kind, Store, Unnamed, UnnamedCounts};
