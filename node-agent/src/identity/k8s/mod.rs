//! Names of Kubernetes objects, dated: a flow is named by who held its address when it happened.
//!
//! ```text
//! API server ▶ [`watch`] (one list and watch per kind) ▶ objects (trimmed while they are parsed) ▶ [`store::Store`]
//!                                                                              lookups ◀ [`Names`] ◀──┘
//! ```
//! [`store::Store`] does no I/O. Entry: [`watch::names`].

pub mod objects;
pub mod store;
pub mod watch;

pub use store::{Counts, Kind, Store, Unnamed, UnnamedCounts};
pub use watch::{Local, Names};
