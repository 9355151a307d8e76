//! The tests, against any cluster that a kubeconfig names.
//!
//! - [`api`] asks the API server, [`stub`] reads what arrived at the DataWay stub, [`workloads`] makes manifests;
//! - [`truth`] says what the API says about the ends of flows.

pub mod api;
pub mod stub;
pub mod truth;
pub mod workloads;
