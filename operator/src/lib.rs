//! The operator: turns one `EbpfCollector` object into agents (a DaemonSet) and an aggregator.
//!
//! This crate holds the decisions, none of which does I/O: which manifests must exist ([`desired`]), which certificates
//! ([`certificates`]), whether a live object needs a write ([`drift`]), who of several operators works ([`lease`]). The
//! loop that watches the cluster and applies them is not in this build.

pub mod certificates;
pub mod desired;
pub mod drift;
pub mod lease;
pub mod names;
