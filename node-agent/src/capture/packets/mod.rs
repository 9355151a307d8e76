//! Plugin `bpf-netlog`: what packets at the interfaces say, as flows in the NetObserv format.
//!
//! ```text
//! [`links`]: interfaces of all network namespaces ▶ programs at each
//! every `netlog_cache_active_timeout`: the kernel's other table is written ▶ the quiet one ▶ [`flows`]: one flow per
//!   packets' way over the interfaces ▶ records ▶ out
//! ```
//! One thread owns all of it. While there is no room further on, the kernel's table goes on summing up. Entry:
//! [`PacketCapture`] as a [`Beside`].

mod flows;
mod labels;
mod links;
mod metrics;
mod peers;

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use ebpf_common::packets::{PacketConfig as KernelConfig, other};
use records::RecordBatch;
use telemetry::{Stage, Telemetry};
use tokio::sync::{mpsc, watch};

use self::{flows::Flows, links::Links, metrics::Ledger, peers::Peers};
pub use self::{metrics::PacketMetrics, peers::FlowLabels};
use crate::{
    capture::{
        beside::{Beside, Surroundings},
        ebpf_net::{End, Orders},
    },
    ebpf::{
        capability::Capabilities,
        packets::{self, PacketObject},
        sys::{ProgramStats, wait_for_running_programs},
    },
    identity::process::Proc,
};

/// The plugin.
pub const NETLOG: &str = "bpf-netlog";
/// Packets at interfaces.
pub const PACKETS: &str = "bpf-netlog/packets";
/// Those of other network namespaces than the agent's.
pub const NAMESPACES: &str = "bpf-netlog/namespaces";

/// Longest pause between looks at orders and interfaces.
const POLL: Duration = Duration::from_millis(200);
/// Time given to the uplink to make room at the last end.
const PATIENCE_AT_STOP: Duration = Duration::from_secs(5);
/// Records handed on in one batch.
const RECORDS_PER_BATCH: usize = 2048;

/// Settings of the capture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PacketConfig {
    /// Time between two drains.
    pub interval: Duration,
    /// N of 1:N.
    pub sampling: u32,
    /// Flows in the kernel at most.
    pub max_flows: u32,
    /// Interfaces, by name or expression; empty for all.
    pub interfaces: Vec<String>,
    /// Interfaces that are left out.
    pub exclude: Vec<String>,
    /// What flows say by settings alone.
    pub labels: FlowLabels,
    /// `/proc` of the host's pid namespace.
    pub proc: PathBuf,
    /// Kernel programs to treat as refused.
    pub refuse: Vec<String>,
}

/// The running capture.
pub struct PacketCapture {
    object: PacketObject,
    kernel: KernelConfig,
    links: Links,
    flows: Flows,
    peers: Peers,
    capabilities: Capabilities,
    tell: watch::Sender<Capabilities>,
    ledger: Ledger,
    rows: Stage,
    metrics: PacketMetrics,
    health: telemetry::ComponentHandle,
}

impl Beside for PacketCapture {
    const NAME: &'static str = NETLOG;
    type Config = PacketConfig;
    type Metrics = PacketMetrics;

    fn metrics(telemetry: &Telemetry) -> PacketMetrics {
        PacketMetrics::new(telemetry)
    }

    fn interval(config: &mut PacketConfig) -> &mut Duration {
        &mut config.interval
    }

    fn start(config: &PacketConfig, with: Surroundings<PacketMetrics>) -> anyhow::Result<Self> {
        let object = packets::load(config.max_flows, &config.refuse)?;
        let mut this = Self {
            links: Links::new(Proc::new(&config.proc), &config.interfaces, &config.exclude)?,
            kernel: KernelConfig {
                on: 1,
                sampling: config.sampling,
                ..KernelConfig::default()
            },
            flows: Flows::new(config.sampling),
            peers: Peers::new(with.cluster, &config.labels),
            capabilities: Capabilities::default(),
            tell: watch::Sender::new(Capabilities::default()),
            ledger: Ledger::new(with.telemetry.ledger.stage("capture.packets")),
            rows: with.telemetry.ledger.stage("agent.flows"),
            metrics: with.metrics,
            health: with.telemetry.health.component(NETLOG),
            object,
        };
        this.object.set_config(this.kernel)?;
        this.links.look(&this.object)?;
        this.report();
        let (spaces, interfaces) = this.links.counts();
        tracing::info!(interfaces, namespaces = spaces, "Counts packets");
        Ok(this)
    }

    fn capabilities(&self) -> watch::Receiver<Capabilities> {
        self.tell.subscribe()
    }

    fn run(mut self, out: &mpsc::Sender<RecordBatch>, orders: &watch::Receiver<Orders>) {
        let mut drained = Instant::now();
        while let Orders::Collect { interval } = Orders::now(orders) {
            self.links.wait(drained + interval, POLL);
            if self.links.is_due() {
                if let Err(error) = self.links.look(&self.object) {
                    tracing::warn!(error = format!("{error:#}"), "Interfaces cannot be listed");
                }
                self.report();
            }
            self.flush(out);
            let now = Instant::now();
            if now >= drained + interval && self.flows.is_empty() {
                drained = now;
                self.drain();
                self.flush(out);
            }
        }
        self.kernel.on = 0;
        self.configure();
        wait_for_running_programs();
        // What waits was told first; then what is in the tables, of which one was quiet already.
        self.finish(out, orders);
        for table in [1 - self.kernel.active, self.kernel.active] {
            self.take(table);
            self.finish(out, orders);
        }
        self.account();
        self.links.end();
        self.metrics.counts(0, 0, 0);
    }
}

impl PacketCapture {
    /// The kernel's statistics of each program.
    #[must_use]
    pub fn programs(&self) -> Vec<(String, ProgramStats)> {
        self.object.programs()
    }

    /// Takes the programs off all interfaces; what was counted is not told.
    pub fn detach(&mut self) {
        self.links.end();
    }

    fn configure(&mut self) -> bool {
        match self.object.set_config(self.kernel) {
            Ok(()) => true,
            Err(error) => {
                tracing::error!(error = format!("{error:#}"), "Settings of bpf-netlog cannot be written");
                self.health.set_degraded(format!("{error:#}"));
                false
            }
        }
    }

    /// Lets programs write the other table, and takes the quiet one out.
    fn drain(&mut self) {
        let quiet = self.kernel.active;
        self.kernel.active = 1 - quiet;
        if !self.configure() {
            self.kernel.active = quiet;
            return;
        }
        wait_for_running_programs();
        self.take(quiet);
        self.account();
        let (spaces, interfaces) = self.links.counts();
        self.metrics.counts(spaces, interfaces, self.flows.len());
    }

    /// Takes a table out that nothing writes, and the sums of what is in none.
    fn take(&mut self, table: u32) {
        let flows = &mut self.flows;
        let mut packets = 0;
        let taken = self.object.drain(table, |key, value| {
            packets += value.packets;
            flows.add(key, value);
        });
        if let Err(error) = taken {
            tracing::error!(error = format!("{error:#}"), "Flows cannot be read");
            self.health.set_degraded(format!("{error:#}"));
        }
        self.ledger.emitted(packets);
        for (key, grown) in self.links.others(&self.object) {
            if key.kind == other::OVERFLOW {
                self.flows.overflow(&key, grown);
            } else {
                self.metrics.not_ip(grown);
            }
        }
        let told = self.flows.join();
        self.rows.entered(told);
    }

    /// Hands on what waits, while there is room; true if nothing waits any more.
    fn flush(&mut self, out: &mpsc::Sender<RecordBatch>) -> bool {
        if self.flows.is_empty() {
            return true;
        }
        self.peers.begin();
        while !self.flows.is_empty() {
            let permit = match out.try_reserve() {
                Ok(permit) => permit,
                Err(mpsc::error::TrySendError::Full(())) => {
                    self.metrics.held_back();
                    return false;
                }
                Err(mpsc::error::TrySendError::Closed(())) => {
                    self.rows.lost("uplink_closed", self.flows.clear());
                    return true;
                }
            };
            let (flowlog, off) = self.flows.take(RECORDS_PER_BATCH, &self.links, &mut self.peers);
            self.rows.skipped("switched_off", off);
            let count = flowlog.len() as u64;
            if count > 0 {
                permit.send(RecordBatch {
                    flowlog,
                    ..RecordBatch::default()
                });
                self.rows.emitted(count);
            }
        }
        self.links.forget_gone(&self.object);
        true
    }

    /// Hands on all that waits; at the last end not longer than [`PATIENCE_AT_STOP`].
    fn finish(&mut self, out: &mpsc::Sender<RecordBatch>, orders: &watch::Receiver<Orders>) {
        let deadline = Instant::now() + PATIENCE_AT_STOP;
        while !self.flush(out) {
            if Orders::now(orders) == Orders::Finish(End::Stop) && Instant::now() >= deadline {
                self.rows.lost("uplink_full_at_stop", self.flows.clear());
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Takes over what the kernel side counted.
    fn account(&mut self) {
        match self.object.stats() {
            Ok(stats) => self.ledger.kernel(&stats),
            Err(error) => self.health.set_degraded(format!("{error:#}")),
        }
    }

    /// Tells what works.
    fn report(&mut self) {
        let mut capabilities = Capabilities::default();
        self.links.tell(&mut capabilities);
        if !self.object.missing.is_empty() {
            let reason = format!("this kernel lacks {}", self.object.missing.join(", "));
            capabilities.replace_degraded(NAMESPACES, &reason);
        }
        let limits: Vec<&str> = capabilities
            .features
            .iter()
            .map(|feature| feature.reason.as_str())
            .filter(|reason| !reason.is_empty())
            .collect();
        if limits.is_empty() {
            self.health.set_ok();
        } else {
            self.health.set_degraded(limits.join("; "));
        }
        self.capabilities = capabilities;
        self.tell.send_if_modified(|told| {
            let changed = told.features != self.capabilities.features;
            told.clone_from(&self.capabilities);
            changed
        });
    }
}
