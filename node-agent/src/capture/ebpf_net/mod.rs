//! Plugin `ebpf-net`, measurement `netflow`: TCP and UDP connection statistics per process and pair of ends.
//!
//! ```text
//! every drain period:  flip the kernel's maps, wait for running programs, take the quiet map out ▶ rows
//! as they come:        ring-buffer events (closes of sampled connections, spilled sums)          ▶ rows
//! every interval:      sample open connections, scan descriptors for owners, rows ▶ records ▶ out
//! ```
//! One thread owns all of it. While `out` has no room, rows go on summing up and are sent later: time resolution is
//! lost, counts are not. Entry: [`NetCapture::start`], then [`NetCapture::run`] on a thread of its own.

mod counters;
#[cfg(test)]
mod ends_tests;
mod events;
mod orders;
mod owners;
mod rows;
mod switch;
mod tcp;
mod udp;

use std::{
    os::fd::AsRawFd as _,
    path::PathBuf,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use ebpf_common::net::{FlowKey, NetConfig, TcpAgg, UdpAgg, UdpKey, policy as bits};
use records::RecordBatch;
use telemetry::Stage;
use tokio::sync::{mpsc, watch};

pub use self::{
    counters::Instruments,
    orders::{End, Orders},
    rows::Rows,
    switch::InCluster,
};
use self::{
    counters::{KernelCounters, NetMetrics},
    events::Event,
    orders::Beat,
    owners::Owners,
    rows::LeftOut,
    switch::Policy,
    tcp::Tracker,
    udp::{Flows, Owner},
};
use crate::{
    capture::{
        conntrack::Nat,
        domains::DomainNames,
        ends::{Ends, Names, UnnamedEnds, Which},
        policy::{Keeper, Sharing},
    },
    ebpf::{
        capability::{Capabilities, State},
        entry::EntryMaps,
        net::{self, LoadOptions, NetObject},
        sys::{Batches, monotonic_ns, thread_cpu, wait_for_running_programs},
    },
    identity::process::Proc,
};

/// Longest time an event waits in the ring below its wake-up mark.
const POLL: Duration = Duration::from_millis(200);
/// Time given to the uplink to make room at the last end.
const PATIENCE_AT_STOP: Duration = Duration::from_secs(5);
/// Rows handed on in one batch.
const RECORDS_PER_BATCH: usize = 8192;
/// Closes without an entry are taken as older than the agent for this long: orphans linger about a minute.
const SETTLE: Duration = Duration::from_secs(120);
/// Pause between looks at rows whose ends the API may still tell more about.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// Events taken out of the ring at a time.
const EVENTS_BATCH: usize = 1024;
/// Elements per batched map read.
const BATCH: usize = 4096;

/// Settings of the capture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetCaptureConfig {
    /// Time between two flushes.
    pub interval: Duration,
    /// Report flows with an end on a loopback address.
    pub loopback: bool,
    /// Leave IPv6 out.
    pub ipv6_disabled: bool,
    /// First port that counts as ephemeral.
    pub ephemeral_port: u16,
    /// `/proc` of the host's pid namespace.
    pub proc: PathBuf,
    /// Other nodes may share this kernel, as kind's do: processes outside the agent's pid namespace are theirs.
    pub own_node_only: bool,
    /// Rows kept at most; a flush is made early at half of them.
    pub rows_max: usize,
    /// Map sizes.
    pub load: LoadOptions,
}

/// The running capture.
pub struct NetCapture {
    config: NetCaptureConfig,
    object: NetObject,
    kernel: NetConfig,
    capabilities: Capabilities,
    /// In a cluster.
    policy: Option<Policy>,
    /// Who knows where flows really go.
    nat: watch::Receiver<Option<Nat>>,
    /// By which names clients know addresses.
    domains: DomainNames,
    proc: Proc,
    rows: Rows,
    tracker: Tracker,
    flows: Flows,
    owners: Owners,
    tcp_batches: Batches<FlowKey, TcpAgg>,
    udp_batches: Batches<UdpKey, UdpAgg>,
    counters: KernelCounters,
    metrics: NetMetrics,
    unnamed: UnnamedEnds,
    rows_stage: Stage,
    health: telemetry::ComponentHandle,
}

impl NetCapture {
    /// Loads the programs and adopts what is older than the agent. In a cluster, the ends of flows
    /// get names, and namespaces may be switched off. While there is a `nat`, it is asked where flows really go.
    ///
    /// # Errors
    /// If nothing of the plugin can work on this machine; the message says what is missing.
    pub fn start(
        config: NetCaptureConfig,
        instruments: &Instruments,
        cluster: Option<InCluster>,
        nat: watch::Receiver<Option<Nat>>,
    ) -> anyhow::Result<Self> {
        let mut capabilities = Capabilities::default();
        let mut kernel = NetConfig {
            active: 0,
            loopback: u32::from(config.loopback),
            ipv6_disabled: u32::from(config.ipv6_disabled),
            ephemeral_port: u32::from(config.ephemeral_port),
            settled_ns: monotonic_ns() + u64::try_from(SETTLE.as_nanos()).unwrap_or(u64::MAX),
            wake_bytes: u64::from(config.load.ring_buffer_size) / 2,
            agent_pid: std::process::id(),
            adopts: 0,
            // In a cluster nothing is reported before it is known what is on.
            policy: if cluster.is_some() { 0 } else { bits::NETFLOW },
            policy_unowned: if cluster.is_some() { 0 } else { bits::NETFLOW },
            policy_entries: 0,
            pidns_level: 0,
            pidns: 0,
            keep_local_port: u32::from(nat.borrow().is_some()),
            _pad: 0,
        };
        let shared = config.own_node_only && !pid_namespace_is_first();
        if shared {
            // Nothing is anybody's until it is known who is who.
            (kernel.policy, kernel.policy_unowned) = (bits::OTHER_NODE, bits::OTHER_NODE);
        }
        let mut object = net::load(&config.load, kernel, &mut capabilities)?;
        if shared && capabilities.state(net::TCP_OLDER) != State::Off {
            (kernel.pidns, kernel.pidns_level) = object.own_pid_namespace()?;
            kernel.policy = bits::NETFLOW;
            tracing::info!("Other nodes may share this kernel: processes outside of this pid namespace are left out");
        }
        let names = cluster.as_ref().map(|cluster| cluster.names.clone());
        let policy = match cluster {
            Some(cluster) => {
                let sharing = match (shared, kernel.pidns) {
                    (false, _) => Sharing::Not,
                    (true, 0) => Sharing::Unknown,
                    (true, _) => Sharing::ByProcess,
                };
                Some(Policy::start(cluster, &object, sharing, instruments.policy.clone())?)
            }
            None => None,
        };
        if let Some(policy) = &policy {
            policy.switches().write_to(&mut kernel);
            object.set_config(kernel)?;
        }
        let proc = Proc::new(&config.proc);
        let mut flows = Flows::new(first_client_port(&proc));
        let mut owners = Owners::default();
        if capabilities.state(net::TCP_OLDER) != State::Off {
            let cgroups = policy.as_ref().map(Policy::cgroups).unwrap_or_default();
            let wanted = |pid| policy.as_ref().is_none_or(|policy| policy.adopts(pid, &cgroups, None));
            let report = owners.adopt_all(&mut object, &proc, &mut flows, &cgroups, &wanted)?;
            tracing::info!(
                connections = report.connections,
                listeners = report.listeners,
                udp = report.udp,
                refused = report.refused,
                "Adopted sockets older than the agent"
            );
            if report.refused > 0 {
                capabilities.replace_degraded(
                    net::TCP_OLDER,
                    format!(
                        "{} processes or descriptors refused a look; it takes CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH",
                        report.refused
                    ),
                );
            }
            // Without a single look nothing older is known: then what has no entry may well be older.
            if report.refused == 0 || report.connections + report.listeners + report.udp > 0 {
                kernel.adopts = 1;
            }
        }
        if kernel.adopts == 0 {
            kernel.settled_ns = u64::MAX;
        }
        object.set_config(kernel)?;
        let Instruments {
            telemetry,
            metrics,
            unnamed,
            untracked,
            ..
        } = instruments;
        let health = telemetry.health.component("ebpf-net");
        report_health(&health, &capabilities);
        let mut this = Self {
            tracker: Tracker::new(),
            flows,
            owners,
            rows: Rows::new(config.rows_max, Ends::new(names)).folding(config.ephemeral_port),
            tcp_batches: Batches::take(BATCH),
            udp_batches: Batches::take(BATCH),
            counters: KernelCounters::new(telemetry, untracked.clone()),
            metrics: metrics.clone(),
            unnamed: unnamed.clone(),
            rows_stage: telemetry.ledger.stage("agent.netflow"),
            health,
            proc,
            object,
            kernel,
            capabilities,
            policy,
            nat,
            domains: DomainNames::default(),
            config,
        };
        if shared {
            this.rows.ends().share_kernel();
        }
        this.leave_out();
        this.follow_nat();
        Ok(this)
    }

    /// What keeps the kernel's switches; run it for as long as the capture runs. None outside clusters, and once only.
    pub fn take_keeper(&mut self) -> Option<Keeper> {
        self.policy.as_mut()?.keeper.take()
    }

    /// From now on names of destinations are those of `domains`.
    pub fn know_domains(&mut self, domains: DomainNames) {
        self.domains = domains;
    }

    /// The way into the hooks of UDP for programs of other captures.
    pub fn take_entry(&mut self) -> Option<EntryMaps> {
        self.object.take_entry()
    }

    /// What works here.
    #[must_use]
    pub fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// The kernel's statistics of each program.
    #[must_use]
    pub fn programs(&self) -> Vec<(String, crate::ebpf::sys::ProgramStats)> {
        self.object.programs()
    }

    /// Takes over rows that an earlier capture could not hand on.
    pub fn take_over(&mut self, rows: Rows) {
        self.rows = rows.folding(self.config.ephemeral_port);
        self.leave_out();
        self.follow_nat();
    }

    /// Collects until ordered to end, then hands on what it has. The rows that there was no room for come back; at the last
    /// end they are counted as lost.
    pub fn run(mut self, out: &mpsc::Sender<RecordBatch>, orders: &watch::Receiver<Orders>) -> Rows {
        let mut beat = Beat::new(self.config.interval, Instant::now());
        let mut due = None;
        let mut look_again = None;
        while let Orders::Collect { interval } = Orders::now(orders) {
            beat.set(interval, Instant::now());
            self.wait_for_events();
            self.read_events();
            if self.follow_switches() {
                due = Some(Which::Settled);
            }
            let now = Instant::now();
            if beat.drain_due(now) {
                self.guarded("drain", Self::drain);
            }
            if beat.flush_due(now) {
                self.guarded("sample", Self::end_interval);
                due = Some(Which::Settled);
            }
            if self.rows.len() >= self.config.rows_max / 2 {
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
        for (program, stats) in self
            .object
            .programs()
            .iter()
            .filter(|(_, stats)| stats.recursion_misses > 0)
        {
            tracing::info!(
                program,
                missed = stats.recursion_misses,
                "Events this program left to its second instance"
            );
        }
        // No new events from here on; what is in either map is taken out.
        self.object.detach();
        if Orders::now(orders) == Orders::Finish(End::Off) {
            tracing::info!("Plugin ebpf-net is off");
        }
        self.guarded("drain", Self::drain);
        self.tracker.sample_all();
        self.guarded("sample", Self::end_interval);
        let mut deadline = None;
        while !self.flush(Which::All, out) {
            match Orders::now(orders) {
                Orders::Finish(End::Restart) => return self.rows,
                Orders::Finish(End::Stop) => {
                    if Instant::now() >= *deadline.get_or_insert_with(|| Instant::now() + PATIENCE_AT_STOP) {
                        let left = self.rows.len() as u64;
                        self.rows_stage.entered(left);
                        self.rows_stage.lost("uplink_full_at_stop", left);
                        break;
                    }
                }
                Orders::Finish(End::Off) | Orders::Collect { .. } => {}
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.rows
    }

    /// Runs one step; a failure is logged and shown in health, and the next round tries again.
    fn guarded(&mut self, what: &'static str, step: fn(&mut Self) -> anyhow::Result<()>) {
        match step(self) {
            Ok(()) => report_health(&self.health, &self.capabilities),
            Err(error) => {
                tracing::error!(
                    step = what,
                    error = format!("{error:#}"),
                    "Collecting connections failed"
                );
                self.health.set_degraded(format!("{what}: {error:#}"));
            }
        }
    }

    fn end_interval(&mut self) -> anyhow::Result<()> {
        self.drain()?;
        if self.capabilities.state(net::TCP_OPEN) != State::Off {
            let (start, cpu) = (Instant::now(), thread_cpu());
            let listeners = &self.owners.listeners;
            let report = self
                .tracker
                .sample(&mut self.object, &|tuple| listeners.contains(tuple), &mut self.rows)?;
            self.metrics
                .sampled(&report, start.elapsed(), thread_cpu().saturating_sub(cpu));
        }
        if self.capabilities.state(net::TCP_OLDER) != State::Off {
            let start = Instant::now();
            self.owners
                .scan(&mut self.object, &self.proc, &mut self.tracker, &mut self.flows)?;
            self.metrics.scanned(start.elapsed());
        }
        self.tracker.add_unnamed(&mut self.rows);
        // A close that raced with the sample is in the ring by now.
        self.read_events();
        self.metrics.programs(&self.object.programs());
        Ok(())
    }

    /// Flips the maps and takes out the one that is no longer written.
    fn drain(&mut self) -> anyhow::Result<()> {
        let start = Instant::now();
        self.rows.ends().forget();
        self.follow_nat();
        let quiet = self.kernel.active;
        self.kernel.active = 1 - quiet;
        self.object.set_config(self.kernel)?;
        wait_for_running_programs();
        self.rows.ends().catch_up();
        let (tcp, udp) = if quiet == 0 {
            ("TCP_AGG_0", "UDP_AGG_0")
        } else {
            ("TCP_AGG_1", "UDP_AGG_1")
        };
        let mut flows = 0;
        self.tcp_batches.rewind();
        while let Some(batch) = self
            .tcp_batches
            .next(self.object.map(tcp)?)
            .context("cannot drain TCP flows")?
        {
            for (key, agg) in batch {
                flows += 1;
                self.counters.tcp_arrived(agg.closed);
                self.tracker.add_aggregate(key, agg, &mut self.rows);
            }
        }
        self.udp_batches.rewind();
        let mut received = Vec::new();
        while let Some(batch) = self
            .udp_batches
            .next(self.object.map(udp)?)
            .context("cannot drain UDP flows")?
        {
            received.extend(batch.map(|(key, agg)| (*key, *agg)));
        }
        // In the order of their first datagrams: the earlier flow of a socket tells the direction of the later.
        received.sort_unstable_by_key(|(_, agg)| agg.first_ns);
        for (key, agg) in &received {
            flows += 1;
            self.add_udp(key, agg);
        }
        self.read_events();
        self.counters.update(&self.object)?;
        self.metrics.drained(flows, start.elapsed());
        Ok(())
    }

    fn wait_for_events(&self) {
        let mut poll = libc::pollfd {
            fd: self.object.events.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let timeout = i32::try_from(POLL.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: one valid pollfd.
        unsafe { libc::poll(&raw mut poll, 1, timeout) };
    }

    fn read_events(&mut self) {
        loop {
            let mut events = std::iter::from_fn(|| self.object.events.next().map(|item| Event::parse(&item)));
            let batch: Vec<Event> = events.by_ref().take(EVENTS_BATCH).collect();
            if batch.is_empty() {
                return;
            }
            // Once they are here, so that none is ahead of what is known of it.
            self.rows.ends().catch_up();
            for event in batch {
                match event {
                    Event::Close(event) => {
                        self.counters.tcp_arrived(1);
                        self.tracker.add_close(&event, &mut self.rows);
                    }
                    Event::TcpSpill(event) => {
                        self.counters.tcp_arrived(event.agg.closed);
                        self.tracker.add_aggregate(&event.key, &event.agg, &mut self.rows);
                    }
                    Event::UdpSpill(event) => self.add_udp(&event.key, &event.agg),
                    Event::Unknown => self.counters.unknown_event(),
                }
            }
        }
    }

    fn add_udp(&mut self, key: &UdpKey, agg: &UdpAgg) {
        let datagrams = agg.datagrams_read + agg.datagrams_written;
        self.counters.udp_arrived(datagrams);
        if datagrams > 0 {
            let object = &self.object;
            let creator = |cookie| {
                object.sock_owner(cookie).ok().flatten().map(|owner| Owner {
                    pid: owner.pid,
                    comm: owner.comm,
                    cgroup: owner.cgroup,
                })
            };
            self.flows.add(key, agg, creator, &mut self.rows);
        }
    }

    /// Sends rows while there is room; true when all that were to be sent are.
    fn flush(&mut self, which: Which, out: &mpsc::Sender<RecordBatch>) -> bool {
        let time_unix_ns = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| i64::try_from(since.as_nanos()).unwrap_or(i64::MAX));
        let book = self.rows.ends().book(time_unix_ns, monotonic_ns());
        self.domains.catch_up();
        let mut names = Names::new(&self.proc, book, &self.unnamed).with_domains(&self.domains);
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
            let netflow = self.rows.take(which, RECORDS_PER_BATCH, time_unix_ns, &mut names);
            if netflow.is_empty() {
                break;
            }
            let count = netflow.len() as u64;
            self.rows_stage.entered(count);
            permit.send(RecordBatch {
                netflow,
                ..RecordBatch::default()
            });
            self.rows_stage.emitted(count);
        }
        self.rows.ends().give_back(names.into_book());
        let LeftOut {
            switched_off,
            other_node,
        } = self.rows.take_left_out();
        self.rows_stage.entered(switched_off + other_node);
        self.rows_stage.skipped("switched_off", switched_off);
        self.rows_stage.skipped("other_node", other_node);
        let refused = self.rows.take_refused();
        self.rows_stage.entered(refused);
        self.rows_stage.lost("rows_full", refused);
        self.metrics
            .rows
            .set(i64::try_from(self.rows.len()).unwrap_or(i64::MAX));
        done
    }
}

fn report_health(health: &telemetry::ComponentHandle, capabilities: &Capabilities) {
    let off: Vec<String> = capabilities
        .features
        .iter()
        .filter(|feature| feature.state == State::Off)
        .map(|feature| format!("{}: {}", feature.name, feature.reason))
        .collect();
    if capabilities.state(net::TCP) == State::Off && capabilities.state(net::UDP_SENT) == State::Off {
        health.set_failed(off.join("; "));
    } else if off.is_empty() {
        health.set_ok();
    } else {
        health.set_degraded(off.join("; "));
    }
}

/// True in the pid namespace that the kernel started with; its inode number is fixed (`PROC_PID_INIT_INO` in
/// `include/linux/proc_ns.h`).
pub(crate) fn pid_namespace_is_first() -> bool {
    use std::os::unix::fs::MetadataExt as _;
    const PROC_PID_INIT_INO: u64 = 0xEFFF_FFFC;
    std::fs::metadata("/proc/self/ns/pid").is_ok_and(|it| it.ino() == PROC_PID_INIT_INO)
}

/// First port the kernel gives to clients, 32768 if it does not say.
fn first_client_port(proc: &Proc) -> u16 {
    std::fs::read_to_string(proc.path_of("sys/net/ipv4/ip_local_port_range"))
        .ok()
        .and_then(|text| text.split_whitespace().next()?.parse().ok())
        .unwrap_or(32_768)
}
