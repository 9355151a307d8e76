//! The operator: turns one `EbpfCollector` object into agents (a DaemonSet) and an aggregator.

pub mod certificates;
