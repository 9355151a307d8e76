//! Test tools whose own counts are the truth of every test: counting traffic, the exactness test, the demo.

pub mod dataway;
pub mod demo;
pub mod exactness;
pub mod traffic;
