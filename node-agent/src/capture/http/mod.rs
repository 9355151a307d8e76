//! Measurement `httpflow` of plugin `ebpf-net`: HTTP exchanges in plain text, HTTP/1 and HTTP/2, gRPC among them.
//!
//! ```text
//! ring: socket, who sends on it, bytes ▶ [`connections`]: [`stream`] (order) ▶ `protocols::HttpSession` ▶ exchanges
//! exchange ▶ [`rows`]: summed by ends and by what was asked and answered ▶ every interval: records ▶ out
//! ```
//! One thread owns all of it. An exchange of two processes of this machine is seen, and told, at both ends. The ring is
//! that of a [`Source`]: of sockets here, of TLS libraries in `capture::tls`. Entry: [`HttpCapture`] as a [`Beside`].

mod connections;
mod early;
mod events;
mod metrics;
mod routes;
mod rows;
mod source;
mod stream;
#[cfg(test)]
mod switch_tests;

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use api::HttpRoute;
use ebpf_common::{
    http::HttpConfig as KernelConfig,
    net::{NetConfig, policy::OTHER_NODE},
};
use records::RecordBatch;
use telemetry::Stage;
use tokio::sync::{mpsc, watch};
use tokio_util::task::AbortOnDropHandle;

pub(super) use self::source::wait_for;
use self::{connections::Connections, events::Event, metrics::Events, routes::Routes, rows::Rows};
pub use self::{
    metrics::HttpMetrics,
    source::{From, Source, Turn, With},
};
use crate::{
    capture::{
        beside::{Beside, Surroundings},
        conntrack::Nat,
        domains::DomainNames,
        ebpf_net::{End, Orders, pid_namespace_is_first},
        ends::{Ends, Names, Which},
        policy::{Keeper, PolicyMetrics, Sharing, Switches},
    },
    ebpf::{
        capability::Capabilities,
        http::{self, HttpObject, LoadOptions},
        sys::{ProgramStats, monotonic_ns, wait_for_running_programs},
    },
    identity::process::Proc,
    protocols::HttpOptions,
};

/// The part of the plugin.
pub const HTTPFLOW: &str = http::HTTP;

/// Longest time an event waits in the ring below its wake-up mark.
const POLL: Duration = Duration::from_millis(200);
/// Time given to the uplink to make room at the last end.
const PATIENCE_AT_STOP: Duration = Duration::from_secs(5);
/// Rows handed on in one batch.
const RECORDS_PER_BATCH: usize = 4096;
/// Pause between looks at rows whose ends the API may still tell more about.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// Events taken out of the ring before other things have their turn.
const TURN: u64 = 65_536;
/// Connection ends that are followed. An idle one takes about 1 KiB.
const CONNECTIONS_MAX: usize = 65_536;

/// Settings of the capture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpConfig {
    /// Time between two flushes.
    pub interval: Duration,
    /// Report flows with an end on a loopback address.
    pub loopback: bool,
    /// Leave IPv6 out.
    pub ipv6_disabled: bool,
    /// First port that counts as ephemeral.
    pub ephemeral_port: u16,
    /// Keep query strings as part of paths.
    pub keep_query: bool,
    /// Longest path kept, in bytes.
    pub path_limit: u16,
    /// Patterns that stand for the paths that match them.
    pub routes: Vec<HttpRoute>,
    /// Rows of an interval that have paths of their own.
    pub series_max: usize,
    /// `/proc` of the host's pid namespace.
    pub proc: PathBuf,
    /// Other nodes may share this kernel, as kind's do: processes outside the agent's pid namespace are theirs.
    pub own_node_only: bool,
    /// Size of the ring, and what programs are loaded with.
    pub load: LoadOptions,
}

/// The capture of what passes sockets in plain text.
pub type HttpCapture = Capture<HttpObject>;

/// The running capture.
pub struct Capture<S: Source> {
    source: S,
    kernel: KernelConfig,
    tell: watch::Sender<Capabilities>,
    /// In a cluster: what is on for whom.
    switches: Option<watch::Receiver<Switches>>,
    /// Keeps the kernel's switches for as long as the capture runs.
    _keeper: Option<AbortOnDropHandle<()>>,
    nat: watch::Receiver<Option<Nat>>,
    domains: DomainNames,
    proc: Proc,
    connections: Connections,
    rows: Rows,
    events: Events,
    rows_stage: Stage,
    metrics: HttpMetrics,
    capabilities: Capabilities,
    health: telemetry::ComponentHandle,
}

impl<S: Source> Beside for Capture<S> {
    const NAME: &'static str = S::NAME;
    type Config = HttpConfig;
    type Metrics = (HttpMetrics, S::Metrics);

    fn metrics(telemetry: &telemetry::Telemetry) -> Self::Metrics {
        (HttpMetrics::new(telemetry, S::METRICS), S::metrics(telemetry))
    }

    fn interval(config: &mut HttpConfig) -> &mut Duration {
        &mut config.interval
    }

    fn start(config: &HttpConfig, with: Surroundings<Self::Metrics>) -> anyhow::Result<Self> {
        let Surroundings {
            telemetry,
            metrics: (metrics, own_metrics),
            cluster,
            nat,
            domains,
            entry,
        } = with;
        let mut kernel = KernelConfig {
            net: NetConfig {
                loopback: u32::from(config.loopback),
                ipv6_disabled: u32::from(config.ipv6_disabled),
                wake_bytes: u64::from(config.load.ring_buffer_size) / 4,
                policy: S::FLOW,
                policy_unowned: S::FLOW,
                ..NetConfig::default()
            },
            generation: 1,
            busy_bytes: config.load.ring_buffer_size / 4 * 3,
            ..KernelConfig::default()
        };
        let mut source = S::load(&config.load, kernel)?;
        let shared = config.own_node_only && !pid_namespace_is_first();
        if shared {
            (kernel.net.pidns, kernel.net.pidns_level) = source.own_pid_namespace()?;
            kernel.net.policy_unowned = OTHER_NODE;
        }
        let mut ends = Ends::new(cluster.as_ref().map(|cluster| cluster.names.clone()));
        if shared {
            ends.share_kernel();
        }
        let (mut keeper, mut switches) = (None, None);
        if let Some(cluster) = cluster.clone() {
            let sharing = if shared { Sharing::ByProcess } else { Sharing::Not };
            let (keeps, told) = Keeper::start(
                source.policy()?,
                cluster.names,
                cluster.spec,
                sharing,
                S::FLOW,
                PolicyMetrics::default(),
            );
            keeper = Some(AbortOnDropHandle::new(tokio::spawn(keeps.run())));
            switches = Some(told);
        }
        let health = telemetry.health.component(S::NAME);
        let options = HttpOptions {
            path_limit: config.path_limit,
            keep_query: config.keep_query,
            ..HttpOptions::default()
        };
        let mut this = Self {
            source,
            kernel,
            tell: watch::Sender::new(Capabilities::default()),
            switches,
            _keeper: keeper,
            nat,
            domains,
            proc: Proc::new(&config.proc),
            connections: Connections::new(CONNECTIONS_MAX, options, S::FROM),
            rows: Rows::new(config.series_max, config.ephemeral_port, ends).with_routes(Routes::new(&config.routes)),
            events: Events::new(telemetry.ledger.stage(S::STAGES.0)),
            rows_stage: telemetry.ledger.stage(S::STAGES.1),
            metrics,
            capabilities: Capabilities::default(),
            health,
        };
        this.take_switches();
        this.follow_nat();
        this.source.set_config(this.kernel)?;
        let with = With {
            proc: &config.proc,
            refuse: &config.load.refuse,
            cluster,
            metrics: own_metrics,
            entry,
        };
        this.source.begin(with, &mut this.capabilities)?;
        this.report();
        Ok(this)
    }

    fn capabilities(&self) -> watch::Receiver<Capabilities> {
        self.tell.subscribe()
    }

    fn run(mut self, out: &mpsc::Sender<RecordBatch>, orders: &watch::Receiver<Orders>) {
        let mut flushed = Instant::now();
        let (mut due, mut look_again) = (None, None);
        while let Orders::Collect { interval } = Orders::now(orders) {
            self.source.wait(POLL);
            self.follow_switches();
            self.read_events();
            self.take_turn();
            let now = Instant::now();
            if now >= flushed + interval {
                flushed = now;
                self.end_interval(interval);
                due = Some(Which::Settled);
            }
            if look_again.is_some_and(|at| now >= at) {
                look_again = None;
                due = due.or(Some(Which::Held));
            }
            if let Some(which) = due
                && self.flush(which, out)
            {
                due = None;
                look_again = (self.rows.held() > 0).then(|| now + LOOK_AGAIN);
            }
        }
        self.source.detach();
        wait_for_running_programs();
        while self.read_events() {}
        self.end_interval(Duration::ZERO);
        let deadline = Instant::now() + PATIENCE_AT_STOP;
        while !self.flush(Which::All, out) {
            if Orders::now(orders) == Orders::Finish(End::Stop) && Instant::now() >= deadline {
                let left = self.rows.len() as u64;
                self.rows_stage.entered(left);
                self.rows_stage.lost("uplink_full_at_stop", left);
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl<S: Source> Capture<S> {
    /// Where its events come from.
    #[must_use]
    pub fn source(&self) -> &S {
        &self.source
    }

    /// The kernel's statistics of each program.
    #[must_use]
    pub fn programs(&self) -> Vec<(String, ProgramStats)> {
        self.source.programs()
    }

    fn report(&mut self) {
        let reasons: Vec<&str> = self
            .capabilities
            .features
            .iter()
            .map(|feature| feature.reason.as_str())
            .filter(|reason| !reason.is_empty())
            .collect();
        if reasons.is_empty() {
            self.health.set_ok();
        } else {
            self.health.set_degraded(reasons.join("; "));
        }
        self.tell.send_if_modified(|told| {
            let changed = told.features != self.capabilities.features;
            told.clone_from(&self.capabilities);
            changed
        });
    }

    /// Lets the source do what is due besides events.
    fn take_turn(&mut self) {
        let Turn {
            ended,
            look_again,
            changed,
        } = self.source.turn(&self.proc, &mut self.capabilities);
        if !ended.is_empty() {
            // What they did last is in the ring.
            self.read_events();
            self.connections.end_of(&ended, &mut self.rows);
        }
        if look_again {
            self.kernel.generation = self.kernel.generation.wrapping_add(1);
            self.set_config();
        }
        if changed {
            self.report();
        }
    }

    fn set_config(&mut self) {
        if let Err(error) = self.source.set_config(self.kernel) {
            tracing::error!(error = format!("{error:#}"), "Cannot switch {}", S::NAME);
            self.health.set_degraded(format!("{error:#}"));
        }
    }

    /// Takes what the ring holds, up to a turn's worth; true if there may be more.
    fn read_events(&mut self) -> bool {
        self.rows.grow_older();
        // What is known of translations is then at least as new as what is read.
        self.rows.ends().catch_up();
        let (mut arrived, mut unknown) = (0, 0);
        while arrived + unknown < TURN {
            let Some(bytes) = self.source.events().next() else {
                break;
            };
            match Event::parse(&bytes) {
                Some(event) => {
                    arrived += 1;
                    self.connections.take(&event, &mut self.rows);
                }
                None => unknown += 1,
            }
        }
        match self.source.stats() {
            Ok(stats) => self.events.update(&stats, &self.metrics),
            Err(error) => self.health.set_degraded(format!("{error:#}")),
        }
        self.events.arrived(arrived);
        self.events.unknown(unknown);
        self.connections.look_at_waiting(monotonic_ns(), &mut self.rows);
        for cookie in self.connections.take_quit() {
            if let Err(error) = self.source.quit(cookie) {
                tracing::debug!(
                    error = format!("{error:#}"),
                    "Cannot tell the kernel side to leave a socket alone"
                );
            }
        }
        arrived + unknown >= TURN
    }

    fn end_interval(&mut self, interval: Duration) {
        let now_ns = monotonic_ns();
        let interval_ns = u64::try_from(interval.as_nanos()).unwrap_or(u64::MAX);
        self.connections
            .end_interval(now_ns, now_ns.saturating_sub(interval_ns), &mut self.rows);
        self.rows.ends().forget();
        self.follow_nat();
        self.metrics
            .connections(self.connections.len(), &self.connections.take_counts());
    }

    /// Takes over what was switched on or off since the last call.
    fn follow_switches(&mut self) {
        let told = self.switches.as_ref();
        if !told.is_some_and(|told| told.has_changed().unwrap_or(false)) {
            return;
        }
        self.take_switches();
        self.follow_nat();
        self.set_config();
    }

    fn take_switches(&mut self) {
        if let Some(told) = &mut self.switches {
            let now = told.borrow_and_update();
            now.write_to(&mut self.kernel.net);
            // What is followed, or off, is asked about again.
            self.kernel.generation = self.kernel.generation.wrapping_add(1);
            self.rows
                .ends()
                .leave_out(Arc::clone(&now.off), now.host & S::FLOW == 0);
            self.rows.grow_older();
        }
    }

    /// Takes over whether exchanges are looked up in connection tracking, and whose.
    fn follow_nat(&mut self) {
        let nat = self.nat.borrow().clone();
        let switches = self.switches.as_ref().map(watch::Receiver::borrow);
        let (off, host_off) =
            switches.map_or_else(Default::default, |now| (Arc::clone(&now.nat_off), now.host_nat_off));
        self.rows.ends().translate(nat, off, host_off);
    }

    /// Sends rows while there is room; true when all that were to be sent are.
    fn flush(&mut self, which: Which, out: &mpsc::Sender<RecordBatch>) -> bool {
        let time_unix_ns = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| i64::try_from(since.as_nanos()).unwrap_or(i64::MAX));
        let book = self.rows.ends().book(time_unix_ns, monotonic_ns());
        let mut names = Names::new(&self.proc, book, &self.metrics.unnamed).with_domains(&self.domains);
        let mut done = true;
        while !self.rows.is_empty() {
            let permit = match out.try_reserve() {
                Ok(permit) => permit,
                Err(mpsc::error::TrySendError::Full(())) => {
                    self.metrics.held_back.inc();
                    done = false;
                    break;
                }
                Err(mpsc::error::TrySendError::Closed(())) => {
                    let lost = self.rows.take(Which::All, usize::MAX, time_unix_ns, &mut names);
                    self.rows_stage.entered(lost.len() as u64);
                    self.rows_stage.lost("uplink_closed", lost.len() as u64);
                    break;
                }
            };
            let httpflow = self.rows.take(which, RECORDS_PER_BATCH, time_unix_ns, &mut names);
            if httpflow.is_empty() {
                break;
            }
            let count = httpflow.len() as u64;
            self.rows_stage.entered(count);
            permit.send(RecordBatch {
                httpflow,
                ..RecordBatch::default()
            });
            self.rows_stage.emitted(count);
        }
        self.rows.ends().give_back(names.into_book());
        let counts = self.rows.take_counts();
        self.metrics.exchanges(&counts);
        self.rows_stage
            .entered(counts.switched_off + counts.other_node + counts.refused);
        self.rows_stage.skipped("switched_off", counts.switched_off);
        self.rows_stage.skipped("other_node", counts.other_node);
        self.rows_stage.lost("rows_full", counts.refused);
        self.metrics
            .rows
            .set(i64::try_from(self.rows.len()).unwrap_or(i64::MAX));
        done
    }
}
