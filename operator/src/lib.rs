//! The operator: turns one `EbpfCollector` object into agents (a DaemonSet) and an aggregator.
//!
//! The decisions do no I/O: what the object asks for ([`inputs`]), which manifests must exist ([`desired`]), which
//! certificates ([`certificates`]), whether a live object needs a write ([`drift`]), who of several operators works
//! ([`lease`]), what the object's status tells ([`status`]). [`cluster`] applies manifests, [`secrets`] reads Secrets,
//! [`overview`] asks the aggregator. [`controller`] is the loop over all that; without the Lease that [`leader`] keeps it
//! does not run.
//!
//! Limits of this build: agents are given `--collector NAME`, by which they are to follow the object, and node-agent does
//! not know that flag, so their pods do not become ready. Events are not written.

pub mod certificates;
pub mod cluster;
pub mod controller;
pub mod desired;
pub mod drift;
pub mod inputs;
pub mod leader;
pub mod lease;
pub mod names;
pub mod overview;
pub mod secrets;
pub mod status;
