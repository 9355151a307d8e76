//! The operator: turns one `EbpfCollector` object into agents (a DaemonSet) and an aggregator.
//!
//! The decisions do no I/O: what the object asks for ([`inputs`]), which manifests must exist ([`desired`]), which
//! certificates ([`certificates`]), whether a live object needs a write ([`drift`]), who of several operators works
//! ([`lease`]), what the object's status tells ([`status`]) and what people are told when it happens ([`events`]). [`cluster`] applies manifests, [`secrets`] reads Secrets,
//! [`overview`] asks the aggregator, [`definition`] keeps the object's own definition. [`controller`] is the loop over all that; without the Lease that [`leader`] keeps it
//! does not run.

pub mod certificates;
pub mod cluster;
pub mod controller;
pub mod definition;
pub mod desired;
pub mod drift;
pub mod events;
pub mod inputs;
pub mod leader;
pub mod lease;
pub mod metrics;
pub mod names;
pub mod overview;
pub mod secrets;
pub mod status;
