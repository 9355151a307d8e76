//! `dnsflow`, a part of plugin `ebpf-net`: look-ups of DNS over UDP and TCP, at both ends.
//!
//! ```text
//! packets at sockets (ring) ▶ [`sessions`]: messages, pairs of query and answer ▶ rows ▶ every interval: records ▶ out
//!                                   └▶ [`DomainNames`]: which names clients know addresses by, for the other captures
//! ```
//! Times are the kernel's: a look-up lasts from its first query to its answer as they pass the socket. One thread owns all
//! of it. While `out` has no room, rows go on summing up and are sent later. Entry: [`DnsCapture`] as a [`Beside`].

mod events;
mod metrics;
mod rows;
mod sessions;
mod streams;

use std::{
    collections::BTreeSet,
    os::fd::AsRawFd as _,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use ebpf_common::{dns::DnsConfig as KernelConfig, net::policy as bits};
use records::RecordBatch;
use telemetry::{Stage, Telemetry};
use tokio::sync::{mpsc, watch};
use tokio_util::task::AbortOnDropHandle;

pub use self::metrics::DnsMetrics;
use self::{
    events::Batch,
    metrics::Packets,
    rows::{LeftOut, Rows},
    sessions::Sessions,
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
        dns::{self, DNSFLOW, DnsObject},
        offsets::CgroupHierarchy,
        sys::{ProgramStats, monotonic_ns, wait_for_running_programs},
    },
    identity::process::Proc,
};

/// Longest time a packet waits in the ring below its wake-up mark.
const POLL: Duration = Duration::from_millis(100);
/// Time given to more packets to come once there is one, so that many are taken at a time.
const GATHER: Duration = Duration::from_millis(10);
/// Time given to the uplink to make room at the last end.
const PATIENCE_AT_STOP: Duration = Duration::from_secs(5);
/// Rows handed on in one batch.
const RECORDS_PER_BATCH: usize = 4096;
/// Rows kept at most; a flush is made early at half of them. About 250 bytes each.
const ROWS_MAX: usize = 32_768;
/// Batches of packets taken before other things have their turn.
const BATCHES_PER_TURN: usize = 64;
/// Pause between looks at what the kernel side counted, nanoseconds.
const COUNT_NS: u64 = 500_000_000;
/// So long after packets were lost a query without an answer may have had one, nanoseconds: a time-out, and that pause.
const LOSSY_NS: u64 = 8_000_000_000;
/// Pause between looks at rows whose ends the API may still tell more about.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Settings of the capture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DnsConfig {
    /// Time between two flushes.
    pub interval: Duration,
    /// Ports that DNS is looked for at.
    pub ports: BTreeSet<u16>,
    /// Tell names and types of what was looked up.
    pub questions: bool,
    /// Report flows with an end on a loopback address.
    pub loopback: bool,
    /// Leave IPv6 out.
    pub ipv6_disabled: bool,
    /// `/proc` of the host's pid namespace.
    pub proc: PathBuf,
    /// Other nodes may share this kernel, as kind's do.
    pub own_node_only: bool,
    /// Bytes of the ring; a power of two and a multiple of the page size.
    pub ring_buffer_size: u32,
    /// Whose ids name cgroups.
    pub cgroups: CgroupHierarchy,
    /// Kernel programs to treat as refused.
    pub refuse: Vec<String>,
}

/// The running capture.
pub struct DnsCapture {
    object: DnsObject,
    kernel: KernelConfig,
    tell: watch::Sender<Capabilities>,
    /// In a cluster: what is on for whom.
    switches: Option<watch::Receiver<Switches>>,
    /// Keeps the kernel's switches for as long as the capture runs.
    _keeper: Option<AbortOnDropHandle<()>>,
    nat: watch::Receiver<Option<Nat>>,
    proc: Proc,
    batch: Batch,
    sessions: Sessions,
    rows: Rows,
    domains: DomainNames,
    packets: Packets,
    /// When the kernel side's counts were taken over last, and until when an answer may have been lost. Monotonic
    /// nanoseconds.
    counted_ns: u64,
    lossy_until_ns: u64,
    rows_stage: Stage,
    metrics: DnsMetrics,
    health: telemetry::ComponentHandle,
}

impl Beside for DnsCapture {
    const NAME: &'static str = DNSFLOW;
    type Config = DnsConfig;
    type Metrics = DnsMetrics;

    fn metrics(telemetry: &Telemetry) -> DnsMetrics {
        DnsMetrics::new(telemetry)
    }

    fn interval(config: &mut DnsConfig) -> &mut Duration {
        &mut config.interval
    }

    fn start(config: &DnsConfig, with: Surroundings<DnsMetrics>) -> anyhow::Result<Self> {
        let Surroundings {
            telemetry,
            metrics,
            cluster,
            nat,
            domains,
            entry,
        } = with;
        let mut capabilities = Capabilities::default();
        let object = dns::load(
            config.ring_buffer_size,
            &config.ports,
            &config.refuse,
            &entry,
            &mut capabilities,
        )?;
        if config.cgroups != CgroupHierarchy::V2 {
            capabilities.replace_degraded(
                DNSFLOW,
                "cgroups are of version 1: pods in the node's network are taken for the node",
            );
        }
        let shared = config.own_node_only && !pid_namespace_is_first();
        let mut ends = Ends::new(cluster.as_ref().map(|cluster| cluster.names.clone()));
        let (mut keeper, mut switches) = (None, None);
        if let Some(cluster) = cluster {
            // No process is told: what is in no pod's cgroup or network is another node's, where nodes share the kernel.
            let sharing = if shared { Sharing::Unknown } else { Sharing::Not };
            let map = object.policy()?;
            let (keeps, told) = Keeper::start(
                map,
                cluster.names,
                cluster.spec,
                sharing,
                bits::NETFLOW,
                PolicyMetrics::default(),
            );
            keeper = Some(AbortOnDropHandle::new(tokio::spawn(keeps.run())));
            switches = Some(told);
        }
        if shared {
            ends.share_kernel();
        }
        let report = telemetry.health.component(DNSFLOW);
        let reasons: Vec<&str> = capabilities
            .features
            .iter()
            .map(|feature| feature.reason.as_str())
            .filter(|reason| !reason.is_empty())
            .collect();
        if reasons.is_empty() {
            report.set_ok();
        } else {
            report.set_degraded(reasons.join("; "));
        }
        let mut this = Self {
            kernel: KernelConfig {
                on: 1,
                loopback: u32::from(config.loopback),
                ipv6_disabled: u32::from(config.ipv6_disabled),
                cgroups: u32::from(config.cgroups == CgroupHierarchy::V2),
                policy: if shared { bits::OTHER_NODE } else { bits::NETFLOW },
                policy_entries: 0,
                wake_bytes: u64::from(config.ring_buffer_size) / 2,
            },
            object,
            tell: watch::Sender::new(capabilities),
            switches,
            _keeper: keeper,
            nat,
            proc: Proc::new(&config.proc),
            batch: Batch::default(),
            sessions: Sessions::new(config.questions, domains.clone()),
            rows: Rows::new(ROWS_MAX, ends),
            domains,
            packets: Packets::new(telemetry.ledger.stage("capture.dns")),
            counted_ns: 0,
            lossy_until_ns: 0,
            rows_stage: telemetry.ledger.stage("agent.dnsflow"),
            metrics,
            health: report,
        };
        this.take_switches();
        this.follow_nat();
        this.object.set_config(this.kernel)?;
        this.domains.read_until(0);
        Ok(this)
    }

    fn capabilities(&self) -> watch::Receiver<Capabilities> {
        self.tell.subscribe()
    }

    fn run(mut self, out: &mpsc::Sender<RecordBatch>, orders: &watch::Receiver<Orders>) {
        let mut flushed = Instant::now();
        let (mut due, mut look_again) = (None, None);
        while let Orders::Collect { interval } = Orders::now(orders) {
            self.wait();
            self.follow_switches();
            self.read_events();
            let now = Instant::now();
            if now >= flushed + interval {
                flushed = now;
                self.end_interval();
                due = Some(Which::Settled);
            }
            if self.rows.len() >= ROWS_MAX / 2 {
                due = Some(Which::All);
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
        self.kernel.on = 0;
        if let Err(error) = self.object.set_config(self.kernel) {
            tracing::warn!(error = format!("{error:#}"), "Cannot switch dnsflow off in the kernel");
        }
        wait_for_running_programs();
        self.read_events();
        self.domains.end();
        self.end_interval();
        let (waiting, _) = self.sessions.waiting();
        self.metrics.unfinished.inc_by(waiting as u64);
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

impl DnsCapture {
    /// The kernel's statistics of each program.
    #[must_use]
    pub fn programs(&self) -> Vec<(String, ProgramStats)> {
        self.object.programs()
    }

    fn wait(&self) {
        let mut poll = libc::pollfd {
            fd: self.object.events.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let timeout = i32::try_from(POLL.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: one valid pollfd.
        if unsafe { libc::poll(&raw mut poll, 1, timeout) } > 0 {
            std::thread::sleep(GATHER);
        }
    }

    /// Takes all packets that passed by now, and tells the look-ups that are over.
    fn read_events(&mut self) {
        let now_ns = monotonic_ns();
        for _ in 0..BATCHES_PER_TURN {
            self.batch.clear();
            while !self.batch.is_full()
                && let Some(event) = self.object.events.next()
            {
                self.batch.push(&event);
            }
            if self.batch.is_empty() {
                // All of them are here.
                self.domains.read_until(now_ns);
                if now_ns >= self.counted_ns + COUNT_NS {
                    self.count(now_ns);
                }
                self.sessions.expire(now_ns, now_ns >= self.lossy_until_ns);
                break;
            }
            // Once they are here, so that none is ahead of what is known of it.
            self.rows.ends().catch_up();
            let (mut arrived, mut unknown) = (0, 0);
            for packet in self.batch.packets() {
                match packet {
                    Some(packet) => {
                        arrived += 1;
                        self.sessions.packet(&packet, self.rows.ends());
                    }
                    None => unknown += 1,
                }
            }
            self.packets.arrived(arrived);
            self.packets.unknown(unknown);
            self.add_told();
        }
        self.add_told();
    }

    fn add_told(&mut self) {
        for told in self.sessions.take_told() {
            self.rows.add(told);
        }
    }

    fn end_interval(&mut self) {
        self.rows.ends().forget();
        self.follow_nat();
        self.metrics.sessions(&mut self.sessions, &self.domains);
        self.count(monotonic_ns());
    }

    /// Takes over what the kernel side counted.
    fn count(&mut self, now_ns: u64) {
        self.counted_ns = now_ns;
        match self.object.stats() {
            Ok(stats) if self.packets.update(&stats) => self.lossy_until_ns = now_ns + LOSSY_NS,
            Ok(_) => {}
            Err(error) => self.health.set_degraded(format!("{error:#}")),
        }
    }

    /// Takes over what was switched on or off since the last call.
    fn follow_switches(&mut self) {
        let told = self.switches.as_ref();
        if !told.is_some_and(|told| told.has_changed().unwrap_or(false)) {
            return;
        }
        self.take_switches();
        self.follow_nat();
        if let Err(error) = self.object.set_config(self.kernel) {
            tracing::error!(error = format!("{error:#}"), "Cannot switch dnsflow");
            self.health.set_degraded(format!("{error:#}"));
        }
    }

    fn take_switches(&mut self) {
        if let Some(told) = &mut self.switches {
            let now = told.borrow_and_update();
            self.kernel.policy = now.unowned;
            self.kernel.policy_entries = u32::from(now.asks);
            self.rows
                .ends()
                .leave_out(Arc::clone(&now.off), now.host & bits::NETFLOW == 0);
        }
    }

    /// Takes over whether look-ups are looked up in connection tracking, and whose.
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
            let dnsflow = self.rows.take(which, RECORDS_PER_BATCH, time_unix_ns, &mut names);
            if dnsflow.is_empty() {
                break;
            }
            let count = dnsflow.len() as u64;
            self.rows_stage.entered(count);
            permit.send(RecordBatch {
                dnsflow,
                ..RecordBatch::default()
            });
            self.rows_stage.emitted(count);
        }
        self.rows.ends().give_back(names.into_book());
        let LeftOut {
            switched_off,
            other_node,
            refused,
            nameless,
        } = self.rows.take_left_out();
        self.rows_stage.entered(switched_off + other_node + refused);
        self.rows_stage.skipped("switched_off", switched_off);
        self.rows_stage.skipped("other_node", other_node);
        self.rows_stage.lost("rows_full", refused);
        self.metrics.nameless.inc_by(nameless);
        self.metrics
            .rows
            .set(i64::try_from(self.rows.len()).unwrap_or(i64::MAX));
        done
    }
}
