//! Tests on a whole cluster.
//!
//! - [`local`] is a cluster on this machine, for where no image registry can be reached;
//! - [`suite`] is the tests, [`cluster`] the clusters that they run on;
//! - [`images`] makes the images of the tests, without a container engine.
//!
//! Entry: `scripts/e2e.sh`, which builds what is needed and calls the binary `ec-e2e`.

pub mod cluster;
pub mod images;
pub mod local;
pub mod suite;
