//! Counting traffic: clients and servers whose own counts are the truth of every test and benchmark.
//!
//! Each role is a process of its own with a name of its own. It does its exchanges with plain blocking system calls,
//! counts what those calls accepted and returned, and appends one JSON line ([`report::Report`]) when it ends.
//! Drivers start roles with [`launch`], which also reads the reports back. Entry: [`cli::run`] (binary `traffic`).

pub mod cli;
pub mod dns;
pub mod exchange;
pub mod http;
pub mod http_uring;
pub mod launch;
pub mod mmsg;
pub mod netlink;
pub mod netns;
pub mod options;
pub mod report;
pub mod rng;
pub mod role;
pub mod sys;
pub mod tcp_client;
pub mod tcp_event;
pub mod tcp_server;
pub mod udp_client;
pub mod udp_server;
