//! The real `node-agent` process under what users and machines do to it: bad options, missing rights, a kernel that lacks
//! something, too little room, a DataWay that refuses, sudden ends. What it should have counted is known from outside: the
//! tests make the traffic themselves and count it.
//!
//! Tests marked `native` load programs into this machine's kernel; the native tier runs them as root, one at a time.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    missing_docs,
    unreachable_pub
)]

mod bash;
mod conntrack;
mod dataway;
mod degrade;
mod dns;
mod dns_net;
mod forks;
mod gotls;
mod http;
mod http_ends;
mod http_grpc;
mod http_net;
mod http_programs;
mod http_truth;
mod lifecycle;
mod live;
mod load;
mod nat_net;
mod options;
mod packets;
mod privileges;
mod process;
mod refusals;
mod tls;
mod tls_net;
mod traffic;
