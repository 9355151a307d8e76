//! Test tools whose own counts are the truth of every test: counting traffic, the exactness test, the demo, the chain under
//! faults.

pub mod chain;
pub mod clockstep;
pub mod dataway;
pub mod demo;
pub mod exactness;
pub mod kube;
pub mod loki;
pub mod service;
pub mod traffic;
