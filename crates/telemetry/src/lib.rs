//! Logging, metrics, health and the ledger: what a component says about itself.
//!
//! Entry: [`Telemetry::new`] gives one handle per process; components take a [`Stage`] per hand-off, register their
//! metrics with a prefix, and report health. [`admin::serve`] answers `/metrics`, `/healthz` and `/readyz`.

pub mod ledger;

pub use ledger::{Ledger, Stage};
