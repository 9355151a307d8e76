//! Test tools whose own counts are the truth of every test: counting traffic, the exactness test.

pub mod dataway;
pub mod exactness;
pub mod traffic;
