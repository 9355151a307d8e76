//! The capture's life: started, started anew when a setting needs other kernel programs or maps, switched off and on,
//! stopped. Rows that there is no room for when one ends are taken over by the next. `ebpf-conntrack` comes and goes beside
//! it: a running capture asks it while it is there. `dnsflow`, `httpflow` and `httpflow-tls` come after `ebpf-net` and go before it, for what
//! they cost to start would show in what that sees of its own start; `ebpf-bash` and `bpf-netlog` are on
//! their own.
//!
//! The interval alone reaches a running capture. Entry: [`Captures::start`], then [`Captures::run`].

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use api::{AgentConfig, Plugin};
use proto::convert::{Feature, FeatureState};
use records::RecordBatch;
use telemetry::Telemetry;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use super::{
    Cluster, explain, identity, one_line,
    options::{bash_config, capture_config, conntrack_config, dns_config, http_config, packet_config, tls_config},
    side::SidePlugin,
};
use crate::{
    capture::{
        bash::BashCapture,
        beside::Beside,
        conntrack::{self, Conntrack, ConntrackMetrics, Nat},
        dns::DnsCapture,
        domains::DomainNames,
        ebpf_net::{End, InCluster, Instruments, NetCapture, NetCaptureConfig, Orders, Rows},
        http::HttpCapture,
        packets::PacketCapture,
        tls::TlsCapture,
    },
    doctor::NOT_IN_THIS_BUILD,
    ebpf::{
        capability::{Capabilities, State},
        entry::Entry,
    },
    uplink::UplinkHandle,
};

/// Wait before a capture that did not start is tried again.
const RETRY: Duration = Duration::from_secs(30);

/// What captures are started with.
pub(super) struct Captures {
    telemetry: Telemetry,
    instruments: Instruments,
    refuse: Vec<String>,
    out: mpsc::Sender<RecordBatch>,
    uplink: UplinkHandle,
    config: watch::Receiver<Arc<AgentConfig>>,
    cluster: Option<InCluster>,
    running: Option<Running>,
    /// Of the capture before.
    rows: Option<Rows>,
    /// What the running capture can see.
    seen: Capabilities,
    conntrack: Option<(Conntrack, watch::Receiver<Capabilities>)>,
    conntrack_metrics: ConntrackMetrics,
    /// For captures, while the plugin is on.
    nat: watch::Sender<Option<Nat>>,
    bash: SidePlugin<BashCapture>,
    packets: SidePlugin<PacketCapture>,
    dns: SidePlugin<DnsCapture>,
    http: SidePlugin<HttpCapture>,
    tls: SidePlugin<TlsCapture>,
    /// By which names clients know addresses: `dnsflow` tells, the others ask.
    domains: DomainNames,
    /// The way into the hooks of the running capture.
    entry: Entry,
}

struct Running {
    settings: NetCaptureConfig,
    orders: watch::Sender<Orders>,
    /// Comes when the thread has ended.
    rows: oneshot::Receiver<Rows>,
    /// Keeps the kernel's switches for as long as the capture runs.
    _keeper: Option<AbortOnDropHandle<()>>,
}

// === impl Captures ===

impl Captures {
    /// Starts the first capture, if the plugin is on. With a cluster its configuration is followed, else `config` stays.
    ///
    /// # Errors
    /// If nothing can be collected on this machine; the message says what is missing.
    pub(super) async fn start(
        telemetry: &Telemetry,
        refuse: Vec<String>,
        out: mpsc::Sender<RecordBatch>,
        uplink: UplinkHandle,
        config: Arc<AgentConfig>,
        cluster: Option<Cluster>,
    ) -> anyhow::Result<Self> {
        let in_cluster = match &cluster {
            Some(cluster) => Some(InCluster {
                names: identity::start(cluster, telemetry).await,
                spec: cluster.spec.clone(),
            }),
            None => None,
        };
        let (nat, domains) = (watch::Sender::new(None), DomainNames::default());
        let entry = Entry::default();
        let mut captures = Self {
            bash: side(telemetry, &out, &in_cluster, &nat, (&domains, &entry)),
            packets: side(telemetry, &out, &in_cluster, &nat, (&domains, &entry)),
            dns: side(telemetry, &out, &in_cluster, &nat, (&domains, &entry)),
            http: side(telemetry, &out, &in_cluster, &nat, (&domains, &entry)),
            tls: side(telemetry, &out, &in_cluster, &nat, (&domains, &entry)),
            domains,
            entry,
            cluster: in_cluster,
            telemetry: telemetry.clone(),
            instruments: Instruments::new(telemetry),
            refuse,
            out,
            uplink,
            config: cluster.map_or_else(|| watch::channel(config).1, |cluster| cluster.config),
            running: None,
            rows: None,
            seen: Capabilities::default(),
            conntrack: None,
            conntrack_metrics: ConntrackMetrics::new(telemetry),
            nat,
        };
        captures.adapt().await?;
        Ok(captures)
    }

    /// Follows the configuration until `stop`; what the last capture has is handed on then.
    ///
    /// # Errors
    /// When a capture ends unasked.
    pub(super) async fn run(mut self, stop: CancellationToken) -> anyhow::Result<()> {
        let mut retry = None;
        let mut changes = true;
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                changed = self.config.changed(), if changes => changes = changed.is_ok(),
                rows = ended(&mut self.running) => {
                    let Some(rows) = rows else {
                        bail!("the capture thread ended unexpectedly; see the log above");
                    };
                    // Switched off, and all is handed on.
                    (self.running, self.rows) = (None, Some(rows));
                    continue;
                }
                () = told(&mut self.conntrack) => {
                    self.report();
                    continue;
                }
                () = self.bash.told() => {
                    self.adapt_bash().await;
                    self.report();
                    continue;
                }
                () = self.packets.told() => {
                    self.adapt_packets().await;
                    self.report();
                    continue;
                }
                () = self.dns.told() => {
                    self.adapt_dns().await;
                    self.report();
                    continue;
                }
                () = self.http.told() => {
                    self.adapt_http().await;
                    self.report();
                    continue;
                }
                () = self.tls.told() => {
                    self.adapt_tls().await;
                    self.report();
                    continue;
                }
                () = time::sleep_until(retry.unwrap_or_else(time::Instant::now)), if retry.is_some() => {}
            }
            retry = None;
            if let Err(error) = self.adapt().await {
                let health = self.telemetry.health.component("ebpf-net");
                health.set_failed(format!("{}; trying again in {RETRY:?}", one_line(&error)));
                retry = Some(time::Instant::now() + RETRY);
            }
        }
        self.packets.end(End::Stop).await;
        self.bash.end(End::Stop).await;
        self.tls.end(End::Stop).await;
        self.http.end(End::Stop).await;
        self.dns.end(End::Stop).await;
        self.end(End::Stop).await
    }

    async fn adapt_bash(&mut self) {
        let wanted = bash_config(&self.config.borrow(), &self.refuse);
        self.bash.adapt(wanted).await;
    }

    async fn adapt_packets(&mut self) {
        let wanted = packet_config(&self.config.borrow(), &self.refuse);
        self.packets.adapt(wanted).await;
    }

    /// Starts, changes or ends `dnsflow`; it runs while `ebpf-net` does.
    async fn adapt_dns(&mut self) {
        let mut wanted = dns_config(&self.config.borrow(), &self.refuse).filter(|_| self.running.is_some());
        if let (Some(wanted), Some(cluster)) = (&mut wanted, &self.cluster) {
            wanted.cgroups = cluster.names.hierarchy().clone();
        }
        self.dns.adapt(wanted).await;
    }

    /// Starts, changes or ends `httpflow`, likewise.
    async fn adapt_http(&mut self) {
        let mut wanted = http_config(&self.config.borrow(), &self.refuse).filter(|_| self.running.is_some());
        if let (Some(wanted), Some(cluster)) = (&mut wanted, &self.cluster) {
            wanted.load.cgroups = cluster.names.hierarchy().clone();
        }
        self.http.adapt(wanted).await;
    }

    /// Starts, changes or ends `httpflow-tls`, likewise.
    async fn adapt_tls(&mut self) {
        let mut wanted = tls_config(&self.config.borrow(), &self.refuse).filter(|_| self.running.is_some());
        if let (Some(wanted), Some(cluster)) = (&mut wanted, &self.cluster) {
            wanted.load.cgroups = cluster.names.hierarchy().clone();
        }
        self.tls.adapt(wanted).await;
    }

    /// Makes what runs what is wanted.
    async fn adapt(&mut self) -> anyhow::Result<()> {
        let config = Arc::clone(&self.config.borrow_and_update());
        self.track(&config)?;
        self.adapt_bash().await;
        self.adapt_packets().await;
        let wanted = config
            .plugins
            .contains(&Plugin::EbpfNet)
            .then(|| self.settings(&config));
        match (&mut self.running, wanted) {
            (Some(running), Some(wanted)) if running.takes(&wanted) => {
                let interval = wanted.interval;
                running.settings.interval = interval;
                running.orders.send_if_modified(|orders| {
                    let new = Orders::Collect { interval };
                    std::mem::replace(orders, new) != new
                });
            }
            (_, Some(wanted)) => {
                self.tls.end(End::Restart).await;
                self.http.end(End::Restart).await;
                self.dns.end(End::Restart).await;
                self.end(End::Restart).await?;
                tracing::info!(interval = ?wanted.interval, "Plugin ebpf-net is on");
                self.begin(wanted).await?;
            }
            (running, None) => {
                self.tls.adapt(None).await;
                self.http.adapt(None).await;
                self.dns.adapt(None).await;
                self.entry.close();
                match running {
                    // It says itself when its programs are gone.
                    Some(running) => drop(running.orders.send_replace(Orders::Finish(End::Off))),
                    None => tracing::info!("Plugin ebpf-net is off"),
                }
                self.telemetry.health.component("ebpf-net").set_ok();
                self.seen = Capabilities::default();
            }
        }
        self.adapt_dns().await;
        self.adapt_http().await;
        self.adapt_tls().await;
        self.report();
        Ok(())
    }

    /// Starts or ends `ebpf-conntrack`.
    fn track(&mut self, config: &AgentConfig) -> anyhow::Result<()> {
        match (conntrack_config(config), &self.conntrack) {
            (Some(settings), None) => {
                let conntrack = Conntrack::start(&settings, self.conntrack_metrics.clone())?;
                tracing::info!("Plugin ebpf-conntrack is on");
                self.nat.send_replace(Some(conntrack.nat()));
                let told = conntrack.capabilities();
                self.conntrack = Some((conntrack, told));
            }
            (None, Some(_)) => {
                tracing::info!("Plugin ebpf-conntrack is off");
                self.nat.send_replace(None);
                self.conntrack = None;
                self.telemetry.health.component(conntrack::CONNTRACK).set_ok();
            }
            (Some(_), Some(_)) | (None, None) => {}
        }
        Ok(())
    }

    fn settings(&self, config: &AgentConfig) -> NetCaptureConfig {
        let mut settings = capture_config(config, self.refuse.clone());
        if let Some(cluster) = &self.cluster {
            settings.load.cgroups = cluster.names.hierarchy().clone();
        }
        settings
    }

    async fn begin(&mut self, settings: NetCaptureConfig) -> anyhow::Result<()> {
        let (instruments, with, cluster) = (self.instruments.clone(), settings.clone(), self.cluster.clone());
        let nat = self.nat.subscribe();
        // Loading takes a while and blocks.
        let mut capture = tokio::task::spawn_blocking(move || NetCapture::start(with, &instruments, cluster, nat))
            .await?
            .map_err(explain)?;
        for feature in &capture.capabilities().features {
            if feature.reason.is_empty() {
                tracing::info!(feature = feature.name, hook = feature.hook, "Feature is on");
            } else {
                tracing::warn!(feature = feature.name, state = %feature.state, reason = feature.reason, "Feature is limited");
            }
        }
        self.seen = capture.capabilities().clone();
        capture.know_domains(self.domains.clone());
        if let Some(maps) = capture.take_entry() {
            self.entry.open(maps);
        }
        if let Some(rows) = self.rows.take() {
            capture.take_over(rows);
        }
        let keeper = capture
            .take_keeper()
            .map(|keeper| AbortOnDropHandle::new(tokio::spawn(keeper.run())));
        let interval = settings.interval;
        let (orders, told) = watch::channel(Orders::Collect { interval });
        let out = self.out.clone();
        let (ended, rows) = oneshot::channel();
        std::thread::Builder::new()
            .name("ebpf-net".into())
            .spawn(move || {
                // Nobody waits for them when the agent ends in a hurry.
                let _ = ended.send(capture.run(&out, &told));
            })
            .context("cannot start the capture thread")?;
        self.running = Some(Running {
            settings,
            orders,
            rows,
            _keeper: keeper,
        });
        Ok(())
    }

    /// Ends what runs.
    async fn end(&mut self, why: End) -> anyhow::Result<()> {
        self.entry.close();
        let Some(running) = self.running.take() else {
            return Ok(());
        };
        running.orders.send_replace(Orders::Finish(why));
        let rows = running.rows.await.context("the capture thread ended unexpectedly")?;
        self.rows = Some(rows);
        Ok(())
    }

    /// Tells the aggregator what this node can see.
    fn report(&self) {
        let unbuilt = self.config.borrow().plugins_not_built();
        let mut seen = self.seen.clone();
        if let Some((_, told)) = &self.conntrack {
            let told = told.borrow().clone();
            let health = self.telemetry.health.component(conntrack::CONNTRACK);
            let limits: Vec<&str> = told
                .features
                .iter()
                .map(|feature| feature.reason.as_str())
                .filter(|reason| !reason.is_empty())
                .collect();
            if limits.is_empty() {
                health.set_ok();
            } else {
                health.set_degraded(limits.join("; "));
            }
            seen.features.extend(told.features);
        } else if self.config.borrow().plugins.contains(&Plugin::EbpfConntrack) {
            seen.off(conntrack::CONNTRACK, "it adds to what ebpf-net reports, which is off");
        }
        seen.features.extend(self.dns.capabilities().features);
        seen.features.extend(self.http.capabilities().features);
        seen.features.extend(self.tls.capabilities().features);
        seen.features.extend(self.bash.capabilities().features);
        seen.features.extend(self.packets.capabilities().features);
        self.instruments.features(&seen);
        let features = features(&seen, unbuilt);
        self.uplink.report(|report| report.features = features);
    }
}

// === impl Running ===

impl Running {
    /// True if the capture goes on with `wanted` as it is: only the interval may differ.
    fn takes(&self, wanted: &NetCaptureConfig) -> bool {
        let same = NetCaptureConfig {
            interval: self.settings.interval,
            ..wanted.clone()
        };
        same == self.settings && matches!(*self.orders.borrow(), Orders::Collect { .. })
    }
}

/// A capture beside `ebpf-net` that does not run yet.
fn side<C: Beside>(
    telemetry: &Telemetry,
    out: &mpsc::Sender<RecordBatch>,
    cluster: &Option<InCluster>,
    nat: &watch::Sender<Option<Nat>>,
    (domains, entry): (&DomainNames, &Entry),
) -> SidePlugin<C> {
    SidePlugin::new(
        telemetry,
        out.clone(),
        cluster.clone(),
        nat.subscribe(),
        domains.clone(),
        entry.clone(),
    )
}

/// Comes when the plugin tells something new.
async fn told(conntrack: &mut Option<(Conntrack, watch::Receiver<Capabilities>)>) {
    if let Some((_, told)) = conntrack
        && told.changed().await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

/// The rows of a capture that ended; `None` if it left none.
async fn ended(running: &mut Option<Running>) -> Option<Rows> {
    match running {
        Some(running) => (&mut running.rows).await.ok(),
        None => std::future::pending().await,
    }
}

/// The features in the words of the agents' protocol, those of plugins that are not built among them.
fn features(capabilities: &Capabilities, unbuilt: Vec<String>) -> Vec<Feature> {
    let probed = capabilities.features.iter().map(|feature| Feature {
        name: feature.name.into(),
        state: match feature.state {
            State::On => FeatureState::On,
            State::Degraded => FeatureState::Degraded,
            State::Off => FeatureState::Off,
        },
        reason: feature.reason.as_str().into(),
    });
    let unbuilt = unbuilt.into_iter().map(|name| Feature {
        name: name.into(),
        state: FeatureState::Off,
        reason: NOT_IN_THIS_BUILD.into(),
    });
    probed.chain(unbuilt).collect()
}
