//! API servers for tests of what follows an `EbpfCollector`: one that speaks just enough of the protocol and does what a
//! test says, and the real programs.
//!
//! Entry: [`FakeApi::new`] and [`FakeApi::serve`]; [`ControlPlane::start`].

mod fake;
mod real;

pub use fake::FakeApi;
pub use real::ControlPlane;
