//! The operator: turns one `EbpfCollector` object into agents (a DaemonSet) and an aggregator.
//!
//! The decisions do no I/O: what the object asks for ([`inputs`]), which manifests must exist ([`desired`]), which
//! certificates ([`certificates`]), whether a live object needs a write ([`drift`]), who of several operators works
//! ([`lease`]), what the object's status tells ([`status`]). [`cluster`] applies manifests, [`secrets`] reads Secrets, and
//! [`controller`] is the loop over both.

pub mod certificates;
pub mod cluster;
pub mod controller;
pub mod desired;
pub mod drift;
pub mod inputs;
pub mod lease;
pub mod names;
pub mod secrets;
pub mod status;
