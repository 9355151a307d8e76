//! A capture beside `ebpf-net` as it comes and goes. If it does not start, the others run, and it is tried again.
//!
//! Entry: [`SidePlugin::adapt`], whenever options changed or [`SidePlugin::told`] came.

use std::time::Duration;

use anyhow::Context as _;
use records::RecordBatch;
use telemetry::Telemetry;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time,
};

use super::one_line;
use crate::{
    capture::{
        beside::{Beside, Surroundings},
        conntrack::Nat,
        domains::DomainNames,
        ebpf_net::{End, InCluster, Orders},
    },
    ebpf::{capability::Capabilities, entry::Entry},
};

/// Wait before a capture that did not start is tried again.
const RETRY: Duration = Duration::from_secs(30);

/// The capture, on or off.
pub(super) struct SidePlugin<C: Beside> {
    telemetry: Telemetry,
    metrics: C::Metrics,
    out: mpsc::Sender<RecordBatch>,
    cluster: Option<InCluster>,
    nat: watch::Receiver<Option<Nat>>,
    domains: DomainNames,
    entry: Entry,
    running: Option<Running<C>>,
    failed: Option<(Capabilities, time::Instant)>,
}

struct Running<C: Beside> {
    settings: C::Config,
    orders: watch::Sender<Orders>,
    told: watch::Receiver<Capabilities>,
    /// Comes when the thread has ended.
    ended: oneshot::Receiver<()>,
}

impl<C: Beside> SidePlugin<C> {
    pub(super) fn new(
        telemetry: &Telemetry,
        out: mpsc::Sender<RecordBatch>,
        cluster: Option<InCluster>,
        nat: watch::Receiver<Option<Nat>>,
        domains: DomainNames,
        entry: Entry,
    ) -> Self {
        Self {
            metrics: C::metrics(telemetry),
            telemetry: telemetry.clone(),
            out,
            cluster,
            nat,
            domains,
            entry,
            running: None,
            failed: None,
        }
    }

    /// Makes what runs what is wanted; `None` is nothing.
    pub(super) async fn adapt(&mut self, wanted: Option<C::Config>) {
        if let Some(running) = &mut self.running
            && let Some(wanted) = &wanted
            && running.takes(wanted)
        {
            return;
        }
        let health = self.telemetry.health.component(C::NAME);
        if self.running.is_some() {
            self.end(if wanted.is_some() { End::Restart } else { End::Off }).await;
        }
        self.failed = None;
        let Some(wanted) = wanted else {
            health.set_ok();
            return;
        };
        if let Err(error) = self.begin(wanted).await {
            let reason = one_line(&super::explain(error));
            tracing::warn!(reason, "Plugin {} cannot run; trying again in {RETRY:?}", C::NAME);
            health.set_degraded(reason.clone());
            let mut capabilities = Capabilities::default();
            capabilities.off(C::NAME, reason);
            self.failed = Some((capabilities, time::Instant::now() + RETRY));
        }
    }

    async fn begin(&mut self, mut settings: C::Config) -> anyhow::Result<()> {
        let interval = *C::interval(&mut settings);
        let with = Surroundings {
            telemetry: self.telemetry.clone(),
            metrics: self.metrics.clone(),
            cluster: self.cluster.clone(),
            nat: self.nat.clone(),
            domains: self.domains.clone(),
            entry: self.entry.clone(),
        };
        let config = settings.clone();
        // Loading, and a look at what is there already, take a while.
        let capture = tokio::task::spawn_blocking(move || C::start(&config, with)).await??;
        let told = capture.capabilities();
        let (orders, ordered) = watch::channel(Orders::Collect { interval });
        let (end, ended) = oneshot::channel();
        let out = self.out.clone();
        std::thread::Builder::new()
            .name(C::NAME.into())
            .spawn(move || {
                capture.run(&out, &ordered);
                // Nobody waits for it when the agent ends in a hurry.
                let _ = end.send(());
            })
            .with_context(|| format!("cannot start the thread of {}", C::NAME))?;
        tracing::info!(?interval, "Plugin {} is on", C::NAME);
        self.running = Some(Running {
            settings,
            orders,
            told,
            ended,
        });
        Ok(())
    }

    /// Comes when the capture tells something new, has ended unasked, or is to be tried again.
    pub(super) async fn told(&mut self) {
        match (&mut self.running, &self.failed) {
            (Some(running), _) => {
                if running.told.changed().await.is_err() {
                    // Its thread ended, which only a failure makes it do.
                    tracing::error!("The thread of {} ended unexpectedly; starting it anew", C::NAME);
                    self.running = None;
                }
            }
            (None, Some((_, retry))) => time::sleep_until(*retry).await,
            (None, None) => std::future::pending().await,
        }
    }

    /// What works.
    pub(super) fn capabilities(&self) -> Capabilities {
        match (&self.running, &self.failed) {
            (Some(running), _) => running.told.borrow().clone(),
            (None, Some((capabilities, _))) => capabilities.clone(),
            (None, None) => Capabilities::default(),
        }
    }

    /// Ends what runs.
    pub(super) async fn end(&mut self, why: End) {
        if let Some(running) = self.running.take() {
            running.orders.send_replace(Orders::Finish(why));
            // It says nothing if it failed.
            let _ = running.ended.await;
            tracing::info!("Plugin {} is off", C::NAME);
        }
    }
}

impl<C: Beside> Running<C> {
    /// True if it goes on with `wanted`: only the interval may differ.
    fn takes(&mut self, wanted: &C::Config) -> bool {
        let mut wanted = wanted.clone();
        let interval = *C::interval(&mut wanted);
        *C::interval(&mut self.settings) = interval;
        if wanted != self.settings {
            return false;
        }
        self.orders.send_if_modified(|orders| {
            let new = Orders::Collect { interval };
            std::mem::replace(orders, new) != new
        });
        true
    }
}
