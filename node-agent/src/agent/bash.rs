//! Plugin `ebpf-bash` as it comes and goes. If it does not start, the other plugins run, and it is tried again.
//!
//! Entry: [`BashPlugin::adapt`], whenever options changed or [`BashPlugin::told`] came.

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
        bash::{BASH, BashCapture, BashConfig, BashMetrics},
        ebpf_net::{End, InCluster, Orders},
    },
    ebpf::capability::Capabilities,
};

/// Wait before a capture that did not start is tried again.
const RETRY: Duration = Duration::from_secs(30);

/// The plugin, on or off.
pub(super) struct BashPlugin {
    telemetry: Telemetry,
    metrics: BashMetrics,
    out: mpsc::Sender<RecordBatch>,
    cluster: Option<InCluster>,
    running: Option<Running>,
    failed: Option<(Capabilities, time::Instant)>,
}

struct Running {
    settings: BashConfig,
    orders: watch::Sender<Orders>,
    told: watch::Receiver<Capabilities>,
    /// Comes when the thread has ended.
    ended: oneshot::Receiver<()>,
}

impl BashPlugin {
    pub(super) fn new(telemetry: &Telemetry, out: mpsc::Sender<RecordBatch>, cluster: Option<InCluster>) -> Self {
        Self {
            metrics: BashMetrics::new(telemetry),
            telemetry: telemetry.clone(),
            out,
            cluster,
            running: None,
            failed: None,
        }
    }

    /// Makes what runs what is wanted; `None` is nothing.
    pub(super) async fn adapt(&mut self, wanted: Option<BashConfig>) {
        if let Some(running) = &mut self.running
            && let Some(wanted) = &wanted
            && running.takes(wanted)
        {
            return;
        }
        let health = self.telemetry.health.component(BASH);
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
            tracing::warn!(reason, "Plugin ebpf-bash cannot run; trying again in {RETRY:?}");
            health.set_degraded(reason.clone());
            let mut capabilities = Capabilities::default();
            capabilities.off(BASH, reason);
            self.failed = Some((capabilities, time::Instant::now() + RETRY));
        }
    }

    async fn begin(&mut self, settings: BashConfig) -> anyhow::Result<()> {
        let (with, telemetry, metrics) = (settings.clone(), self.telemetry.clone(), self.metrics.clone());
        let cluster = self.cluster.clone();
        // Loading and the look at all processes take a while.
        let start = move || BashCapture::start(&with, &telemetry, metrics, cluster);
        let capture = tokio::task::spawn_blocking(start).await??;
        let told = capture.capabilities();
        let interval = settings.interval;
        let (orders, ordered) = watch::channel(Orders::Collect { interval });
        let (end, ended) = oneshot::channel();
        let out = self.out.clone();
        std::thread::Builder::new()
            .name(BASH.into())
            .spawn(move || {
                capture.run(&out, &ordered);
                // Nobody waits for it when the agent ends in a hurry.
                let _ = end.send(());
            })
            .context("cannot start the thread of ebpf-bash")?;
        tracing::info!(?interval, "Plugin ebpf-bash is on");
        self.running = Some(Running {
            settings,
            orders,
            told,
            ended,
        });
        Ok(())
    }

    /// Comes when the plugin tells something new, has ended unasked, or is to be tried again.
    pub(super) async fn told(&mut self) {
        match (&mut self.running, &self.failed) {
            (Some(running), _) => {
                if running.told.changed().await.is_err() {
                    // Its thread ended, which only a failure makes it do.
                    tracing::error!("The thread of ebpf-bash ended unexpectedly; starting it anew");
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
            tracing::info!("Plugin ebpf-bash is off");
        }
    }
}

impl Running {
    /// True if it goes on with `wanted`: only the interval may differ.
    fn takes(&mut self, wanted: &BashConfig) -> bool {
        let interval = wanted.interval;
        let same = BashConfig {
            interval: self.settings.interval,
            ..wanted.clone()
        };
        if same != self.settings {
            return false;
        }
        self.settings.interval = interval;
        self.orders.send_if_modified(|orders| {
            let new = Orders::Collect { interval };
            std::mem::replace(orders, new) != new
        });
        true
    }
}
