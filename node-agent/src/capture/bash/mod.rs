//! Plugin `ebpf-bash`, measurement `bash`: the lines that users type into interactive shells, on the host and in containers.
//!
//! ```text
//! a program starts ▶ [`find`]: is it a bash? where is its `readline`? ▶ probe, verdict for the process
//! a line is read   ▶ who typed it: process, user (passwd of its root), pod ▶ rows ▶ every interval: records ▶ out
//! ```
//! Both come through one ring in the order that they happened, so that a shell is known when its first line comes. One thread
//! owns all of it. Entry: [`BashCapture`] as a [`Beside`].

mod elf;
mod events;
mod find;
mod metrics;
mod rows;
mod shells;
mod users;

use std::{
    collections::BTreeMap,
    os::fd::AsRawFd as _,
    path::PathBuf,
    time::{Duration, Instant},
};

use api::Plugin;
use ebpf_common::bash::verdict;
use records::RecordBatch;
use telemetry::Telemetry;
use tokio::sync::{mpsc, watch};

pub use self::metrics::BashMetrics;
use self::{
    events::{Event, Line},
    find::{Finder, Found, Looks},
    metrics::Ledger,
    rows::Rows,
    shells::Shells,
};
use crate::{
    capture::{
        beside::{Beside, Surroundings},
        ebpf_net::{End, Orders},
        whose::{Policy, Whose},
    },
    ebpf::{
        bash::{self, BashObject},
        capability::{Capabilities, State},
        sys::ProgramStats,
        uprobe::Attached,
    },
    identity::process::Proc,
};

/// The plugin.
pub const BASH: &str = "ebpf-bash";

/// Longest pause between looks at orders and switches.
const POLL: Duration = Duration::from_millis(200);
/// Pause between looks at all processes, for what was missed.
const SWEEP: Duration = Duration::from_secs(30);
/// The same where the kernel does not tell of starts.
const SWEEP_OFTEN: Duration = Duration::from_secs(1);
/// Time given to the uplink to make room at the last end.
const PATIENCE_AT_STOP: Duration = Duration::from_secs(5);
/// Bytes of the ring: room for thousands of short lines.
const RING: u32 = 1 << 20;
/// Events taken before other things have their turn.
const TURN: usize = 16_384;
/// Shells whose lines are not seen that are named.
const BLIND_MAX: usize = 8;

/// Settings of the capture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BashConfig {
    /// Time between two flushes.
    pub interval: Duration,
    /// `/proc` of the host's pid namespace.
    pub proc: PathBuf,
    /// Kernel programs to treat as refused.
    pub refuse: Vec<String>,
}

/// The running capture.
pub struct BashCapture {
    object: BashObject,
    capabilities: Capabilities,
    tell: watch::Sender<Capabilities>,
    finder: Finder,
    shells: Shells<Attached>,
    policy: Policy,
    rows: Rows,
    ledger: Ledger,
    metrics: BashMetrics,
    /// Why processes could not be looked at.
    refused: Option<&'static str>,
    /// Why lines of some shells are not seen, by process.
    blind: BTreeMap<u32, String>,
    health: telemetry::ComponentHandle,
}

impl Beside for BashCapture {
    const NAME: &'static str = BASH;
    type Config = BashConfig;
    type Metrics = BashMetrics;

    fn metrics(telemetry: &Telemetry) -> BashMetrics {
        BashMetrics::new(telemetry)
    }

    fn interval(config: &mut BashConfig) -> &mut Duration {
        &mut config.interval
    }

    /// Loads the programs and looks for the shells that are there. In a cluster, lines get pods' names, and namespaces may
    /// be switched off.
    fn start(config: &BashConfig, with: Surroundings<BashMetrics>) -> anyhow::Result<Self> {
        let mut capabilities = Capabilities::default();
        let object = bash::load(RING, &config.refuse, &mut capabilities)?;
        let mut this = Self {
            finder: Finder::new(Proc::new(&config.proc)),
            shells: Shells::new(),
            policy: Policy::new(with.cluster, |on| on.plugins.contains(&Plugin::EbpfBash)),
            rows: Rows::default(),
            ledger: Ledger::new(with.telemetry.ledger.stage("agent.bash")),
            metrics: with.metrics,
            refused: None,
            blind: BTreeMap::new(),
            health: with.telemetry.health.component(BASH),
            object,
            tell: watch::Sender::new(capabilities.clone()),
            capabilities,
        };
        this.sweep();
        this.report();
        let (shells, files) = this.shells.counts();
        tracing::info!(shells, files, "Looked for shells");
        Ok(this)
    }

    fn capabilities(&self) -> watch::Receiver<Capabilities> {
        self.tell.subscribe()
    }

    fn run(mut self, out: &mpsc::Sender<RecordBatch>, orders: &watch::Receiver<Orders>) {
        let mut flushed = Instant::now();
        let mut swept = Instant::now();
        while let Orders::Collect { interval } = Orders::now(orders) {
            self.wait(flushed + interval);
            self.read_events();
            for (pid, found) in self.finder.look_again(&mut self.shells, &mut self.object) {
                self.judge(pid, found);
            }
            if self.policy.changed() {
                self.judge_all();
            }
            let now = Instant::now();
            self.shells.expire(now);
            let pause = if self.capabilities.state(bash::SHELLS) == State::On {
                SWEEP
            } else {
                SWEEP_OFTEN
            };
            let missed = self.account();
            if missed || now >= swept + pause {
                swept = now;
                self.sweep();
                self.report();
            }
            if now >= flushed + interval {
                flushed = now;
                self.flush(out);
            }
        }
        self.object.quiet();
        self.shells.unprobe();
        self.read_events();
        self.account();
        let deadline = Instant::now() + PATIENCE_AT_STOP;
        while !self.flush(out) {
            if Orders::now(orders) == Orders::Finish(End::Stop) && Instant::now() >= deadline {
                self.ledger.lost("uplink_full_at_stop", self.rows.clear());
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.metrics.counts(0, 0, 0);
    }
}

impl BashCapture {
    /// The kernel's statistics of each program.
    #[must_use]
    pub fn programs(&self) -> Vec<(String, ProgramStats)> {
        self.object.programs()
    }

    /// Waits for events, but not beyond what is due.
    fn wait(&self, flush: Instant) {
        let due = self.finder.next_look().map_or(flush, |look| look.min(flush));
        let pause = due.saturating_duration_since(Instant::now()).min(POLL);
        let mut poll = libc::pollfd {
            fd: self.object.events.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // A rest of less than a millisecond is one.
        let timeout = i32::try_from(pause.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
        // SAFETY: one valid pollfd.
        unsafe { libc::poll(&raw mut poll, 1, timeout) };
    }

    fn read_events(&mut self) {
        for _ in 0..TURN {
            let event = match self.object.events.next() {
                Some(bytes) => Event::parse(&bytes),
                None => break,
            };
            match event {
                Event::Exec(pid) => self.look(pid),
                Event::Exit(pid) => {
                    self.finder.forget(pid, &mut self.shells, Instant::now());
                    self.blind.remove(&pid);
                }
                Event::Line(line) => self.line(line),
                Event::Unknown => self.ledger.lost("malformed", 1),
            }
        }
    }

    /// Looks at all processes: at start, and in case something was missed.
    fn sweep(&mut self) {
        let known: Vec<u32> = self.shells.all().map(|(pid, _)| pid).collect();
        let pids = self.finder.pids();
        let mut there: Vec<u32> = pids.collect();
        there.sort_unstable();
        for pid in known.into_iter().filter(|pid| there.binary_search(pid).is_err()) {
            self.finder.forget(pid, &mut self.shells, Instant::now());
            self.object.forget(pid);
        }
        self.blind.retain(|pid, _| there.binary_search(pid).is_ok());
        self.finder.looks = Looks::default();
        for pid in there {
            self.look(pid);
        }
        self.refused = self.finder.looks.tell();
    }

    fn look(&mut self, pid: u32) {
        let found = self.finder.look(pid, &mut self.shells, &mut self.object);
        self.judge(pid, found);
    }

    /// Says to the kernel side what is to be done with the lines of a process.
    fn judge(&mut self, pid: u32, found: Found) {
        match found {
            Found::Nothing => {
                self.blind.remove(&pid);
                return;
            }
            Found::Blind(reason) => {
                tracing::debug!(pid, reason, "Lines of a shell are not seen");
                self.blind.insert(pid, reason);
            }
            Found::Shell => drop(self.blind.remove(&pid)),
        }
        let Some(shell) = self.shells.get(pid) else { return };
        let verdict = match self.policy.of(shell.pod) {
            Whose::Off => verdict::OFF,
            Whose::On | Whose::OtherNode => verdict::REPORT,
        };
        if let Err(error) = self.object.judge(pid, verdict) {
            tracing::debug!(
                error = format!("{error:#}"),
                "A verdict was refused; lines are judged one by one"
            );
        }
    }

    fn judge_all(&mut self) {
        let shells: Vec<u32> = self.shells.all().map(|(pid, _)| pid).collect();
        for pid in shells {
            let found = match self.blind.get(&pid) {
                Some(reason) => Found::Blind(reason.clone()),
                None => Found::Shell,
            };
            self.judge(pid, found);
        }
    }

    fn line(&mut self, line: Line) {
        if self.shells.get(line.pid).is_none() {
            // Its start was missed; or it is another program that uses the library.
            self.look(line.pid);
        }
        let Some(shell) = self.shells.get(line.pid) else {
            if self.finder.is_there(line.pid) {
                self.ledger.skipped("other_program", 1);
                if let Err(error) = self.object.judge(line.pid, verdict::OTHER_PROGRAM) {
                    tracing::debug!(
                        error = format!("{error:#}"),
                        "A verdict was refused; lines are judged one by one"
                    );
                }
            } else {
                self.ledger.lost("process_gone", 1);
            }
            return;
        };
        if line.text.trim().is_empty() {
            self.ledger.skipped("empty", 1);
        } else if self.policy.of(shell.pod) == Whose::Off {
            self.ledger.skipped("off", 1);
        } else if !self.rows.add(line.pid, shell.users.name(line.uid), shell.pod, line) {
            self.ledger.lost("rows_full", 1);
        }
    }

    /// Takes over the kernel's counts; true if it had to leave out starts or ends of processes.
    fn account(&mut self) -> bool {
        let (shells, files) = self.shells.counts();
        self.metrics.counts(shells, files, self.blind.len());
        match self.object.stats() {
            Ok(stats) => {
                let missed = self.ledger.kernel(&stats);
                self.metrics.missed(missed);
                missed > 0
            }
            Err(error) => {
                self.health.set_degraded(format!("{error:#}"));
                false
            }
        }
    }

    /// Hands the rows on; false if there is no room for all.
    fn flush(&mut self, out: &mpsc::Sender<RecordBatch>) -> bool {
        let (policy, ledger) = (&self.policy, &mut self.ledger);
        self.rows.flush(policy, ledger, |batch| {
            out.try_send(batch).map_err(|error| error.into_inner())
        })
    }

    /// Tells what works.
    fn report(&mut self) {
        if let Some(reason) = self.refused {
            self.capabilities.replace_degraded(bash::LINES, reason);
        } else if self.blind.is_empty() {
            self.capabilities.replace_on(bash::LINES);
        } else {
            let mut reasons: BTreeMap<&str, Vec<u32>> = BTreeMap::new();
            for (pid, reason) in self.blind.iter().take(BLIND_MAX) {
                reasons.entry(reason).or_default().push(*pid);
            }
            let text: Vec<String> = reasons
                .iter()
                .map(|(reason, pids)| {
                    let pids: Vec<String> = pids.iter().map(ToString::to_string).collect();
                    format!("{reason} (process {})", pids.join(", "))
                })
                .collect();
            let text = format!("lines of {} shells are not seen: {}", self.blind.len(), text.join("; "));
            self.capabilities.replace_degraded(bash::LINES, text);
        }
        let limits: Vec<&str> = self
            .capabilities
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
        self.tell.send_if_modified(|told| {
            let changed = told.features != self.capabilities.features;
            told.clone_from(&self.capabilities);
            changed
        });
    }
}
