//! What a capture that runs beside `ebpf-net` is: it has its own kernel programs, thread and rows, and may fail, end and be
//! started anew without any other noticing. `agent::side` gives it its life.

use std::{fmt::Debug, time::Duration};

use records::RecordBatch;
use telemetry::Telemetry;
use tokio::sync::{mpsc, watch};

use super::{
    conntrack::Nat,
    domains::DomainNames,
    ebpf_net::{InCluster, Orders},
};
use crate::ebpf::{capability::Capabilities, entry::Entry};

/// What a capture is started with besides its settings.
pub struct Surroundings<M> {
    /// For its health and its ledger.
    pub telemetry: Telemetry,
    /// Its metrics, which outlive it.
    pub metrics: M,
    /// In a cluster, the names of both ends and the namespaces' switches.
    pub cluster: Option<InCluster>,
    /// What connections are translated to, while `ebpf-conntrack` is on.
    pub nat: watch::Receiver<Option<Nat>>,
    /// By which names clients know addresses.
    pub domains: DomainNames,
    /// The way into the hooks of `ebpf-net`.
    pub entry: Entry,
}

/// A capture that runs on a thread of its own.
pub trait Beside: Send + Sized + 'static {
    /// Its name: of its thread, its health, and of the feature that is off if it does not start.
    const NAME: &'static str;
    /// Settings. One that differs in more than the interval needs a new capture.
    type Config: Clone + PartialEq + Debug + Send + 'static;
    /// Metrics, kept from one capture to the next.
    type Metrics: Clone + Send + 'static;

    /// Registers the metrics.
    fn metrics(telemetry: &Telemetry) -> Self::Metrics;

    /// The setting that a running capture takes over.
    fn interval(config: &mut Self::Config) -> &mut Duration;

    /// Loads and attaches; may take a while.
    ///
    /// # Errors
    /// If nothing of it can work on this machine; the message says what is missing.
    fn start(config: &Self::Config, with: Surroundings<Self::Metrics>) -> anyhow::Result<Self>;

    /// What works here, as it changes.
    fn capabilities(&self) -> watch::Receiver<Capabilities>;

    /// Collects until ordered to end, then hands on what it has. At the last end, what there is no room for is counted as
    /// lost.
    fn run(self, out: &mpsc::Sender<RecordBatch>, orders: &watch::Receiver<Orders>);
}
