//! Names of Kubernetes objects, dated: a flow is named by who held its address when it happened.
//!
//! ```text
//! API server ▶ [`watch`] (one list and watch per kind) ▶ objects (trimmed while they are parsed) ▶ [`store::Store`] ─┐
//! cgroup file system ▶ `cgroups` (events, and a walk every few seconds) ▶ [`Index`](super::cgroup::Index) ───────────┤
//!                                                                              lookups ◀ [`Names`] ◀─────────────────┘
//! ```
//! [`store::Store`] does no I/O. Entry: [`watch::names`].

mod cgroups;
#[cfg(test)]
pub(crate) mod fake_api;
mod names;
pub mod objects;
mod report;
pub mod store;
pub mod watch;

pub use names::{Labels, LocalEnd, Names, Places};
pub use report::Report;
pub use store::{Answer, Counts, Host, Kind, SETTLE_NS, Store, Unnamed, When};
pub use watch::{Health, NamespaceMeta, Namespaces, Options, names};
