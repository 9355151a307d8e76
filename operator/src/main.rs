//! The operator: turns one `EbpfCollector` object into agents (a DaemonSet) and an aggregator.
//!
//! `desired(spec)` will be a pure function from the object to what must exist; this crate holds only its head until
//! the object's types are complete.

fn main() {}
