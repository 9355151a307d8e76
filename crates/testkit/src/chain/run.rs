//! The driver: stub, aggregator, agent, traffic, faults, orderly end, verdict.

use std::{
    fs::{self, DirBuilder},
    io::Write as _,
    net::SocketAddr,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clap::Parser;
use rand::Rng as _;
use tokio::runtime::Runtime;

use super::{
    cast::{self, NAME_PREFIX},
    judge::{self, Outage, Outcome, Wanted},
    peers::{Certificates, Peer},
    processes::{self, Aggregator, Setup, still_runs},
    schedule::{self, Event, Step},
};
use crate::{
    dataway::{DatawayStub, Fault, StubConfig, StubHandle},
    demo::{
        cast::{Cast, free_ports, has_ipv6},
        compare,
    },
    exactness::compare::Check,
    service::Service,
    traffic::{
        launch::Stage,
        report::{Counts, Report},
        sys,
    },
};

/// Longest wait for the agent to flush and hand over the rest; its own limits add up to less.
const STOP_PATIENCE: Duration = Duration::from_secs(60);
/// Longest wait until the aggregator has delivered all.
const DELIVERY_PATIENCE: Duration = Duration::from_secs(120);
/// Time with a working DataWay before and after an outage.
const AROUND_OUTAGE: Duration = Duration::from_secs(4);
/// Pause between two looks at what is due.
const TICK: Duration = Duration::from_millis(20);

/// Sends real traffic through agent, aggregator and a strict DataWay stub while the aggregator is killed with SIGKILL
/// and DataWay fails in every way. Ends with 0 only if every record arrived exactly once. Needs root.
#[derive(Parser, Clone, Debug)]
#[command(name = "chain", version)]
pub struct Options {
    /// How long traffic is made and things fail, in seconds; with --outage its length decides instead
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(5..=3600))]
    pub seconds: u32,
    /// How often the aggregator is killed
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(0..=100))]
    pub kills: u32,
    /// Seed of all sizes and of the moments at which things fail
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// DataWay is gone for a time, instead of kills and other failures
    #[arg(long)]
    pub outage: bool,
    /// How long DataWay is gone, in seconds
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=7200))]
    pub outage_seconds: u32,
    /// TLS with certificates on both ends between agent and aggregator; strangers must be refused
    #[arg(long)]
    pub tls: bool,
    /// Most memory that a process under test may ever have resident, MiB
    #[arg(long, default_value_t = 128)]
    pub memory_mib: u64,
    /// The `node-agent` program; by default the one next to this one
    #[arg(long)]
    pub agent: Option<PathBuf>,
    /// One more argument for the agent; may be given several times
    #[arg(long, allow_hyphen_values = true)]
    pub agent_arg: Vec<String>,
    /// The `aggregator` program; by default the one next to this one
    #[arg(long)]
    pub aggregator: Option<PathBuf>,
    /// One more argument for the aggregator; may be given several times
    #[arg(long, allow_hyphen_values = true)]
    pub aggregator_arg: Vec<String>,
    /// The `traffic` program; by default the one next to this one
    #[arg(long)]
    pub traffic: Option<PathBuf>,
    /// Print every check, not only those that failed
    #[arg(long)]
    pub verbose: bool,
}

/// Runs the test and prints the outcome. `true` when nothing failed.
///
/// # Errors
/// The test could not be carried out; the error says what to do.
pub fn run(options: &Options) -> anyhow::Result<bool> {
    let length = options.seconds.max(options.outage_seconds);
    // The alarm ends the test if something hangs; everything after the traffic is bounded.
    sys::install_signals(length + 600).context("installing signal handlers")?;
    let directory = std::env::temp_dir().join(format!("ebpf-collector-chain-{}", std::process::id()));
    DirBuilder::new()
        .mode(0o700)
        .create(&directory)
        .with_context(|| format!("making the directory {}", directory.display()))?;
    let passed = carry_out(options, &directory).and_then(|outcome| {
        let wanted = Wanted {
            kills: if options.outage { 0 } else { options.kills },
            faults: if options.outage {
                Vec::new()
            } else {
                schedule::faults(Duration::from_secs(options.seconds.into()))
            },
            resends: plan(options).0.iter().any(|step| step.event == Event::Freeze),
            outage: options.outage,
            tls: options.tls,
            memory_kib: options.memory_mib << 10,
        };
        report(options, &outcome, &judge::judge(&wanted, &outcome))
    });
    if matches!(passed, Ok(true)) {
        fs::remove_dir_all(&directory).with_context(|| format!("removing {}", directory.display()))?;
    } else {
        eprintln!("chain: logs and queue are kept in {}", directory.display());
    }
    passed
}

fn program(given: Option<&Path>, name: &str) -> anyhow::Result<PathBuf> {
    let path = match given {
        Some(path) => path.to_owned(),
        None => std::env::current_exe()
            .context("finding this program")?
            .with_file_name(name),
    };
    anyhow::ensure!(
        path.is_file(),
        "there is no {}: `cargo xtask dist --with-tests` builds it; --agent, --aggregator and --traffic name other places",
        path.display()
    );
    Ok(path)
}

/// What is to happen, and for how long traffic is made.
fn plan(options: &Options) -> (Vec<Step>, Duration) {
    if options.outage {
        let length = Duration::from_secs(options.outage_seconds.into());
        (schedule::outage(AROUND_OUTAGE, length), AROUND_OUTAGE * 2 + length)
    } else {
        let length = Duration::from_secs(options.seconds.into());
        (schedule::storm(length, options.kills, options.seed), length)
    }
}

struct Test<'a> {
    options: &'a Options,
    runtime: &'a Runtime,
    setup: &'a Setup,
    stub: StubHandle,
    agent: Service,
    aggregator: Aggregator,
    outage: Option<Outage>,
}

fn carry_out(options: &Options, directory: &Path) -> anyhow::Result<Outcome> {
    let (agent, aggregator) = (
        program(options.agent.as_deref(), "node-agent")?,
        program(options.aggregator.as_deref(), "aggregator")?,
    );
    let traffic = program(options.traffic.as_deref(), "traffic")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("starting the runtime of the DataWay stub")?;
    let v6 = has_ipv6();
    // None is one that the kernel could give to a client while the server that owns it is down.
    let [
        agent_admin,
        listen,
        aggregator_admin,
        dataway,
        web4,
        web6,
        dns4,
        dns6,
        db,
    ] = free_ports(v6)?;
    let local = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
    let token = format!("tkn_{:032x}", rand::rng().random::<u128>());
    let stub = runtime.block_on(DatawayStub::start(StubConfig {
        listen: local(dataway),
        token: token.clone(),
        keep_points: 0,
        ..StubConfig::default()
    }))?;
    let certificates = options
        .tls
        .then(|| Certificates::make(&directory.join("tls"), local(listen)))
        .transpose()?;
    let setup = Setup {
        agent,
        aggregator,
        directory: directory.to_owned(),
        agent_admin: local(agent_admin),
        listen: local(listen),
        aggregator_admin: local(aggregator_admin),
        dataway: stub.addr,
        token,
        certificates,
        agent_arguments: options.agent_arg.clone(),
        aggregator_arguments: options.aggregator_arg.clone(),
    };
    let mut aggregator = setup.start_aggregator()?;
    let (mut peers, mut refused) = (Vec::new(), 0.0);
    if let Some(certificates) = &setup.certificates {
        for peer in [Peer::Agent, Peer::Nobody, Peer::Stranger, Peer::Plaintext] {
            peers.push((peer, certificates.knock(setup.listen, peer)?));
        }
        refused = aggregator
            .ready()?
            .metric("ebpfcollector_ingest_refused_connections_total")?
            .unwrap_or_default();
    }
    let agent = setup.start_agent()?;
    let mut test = Test {
        options,
        runtime: &runtime,
        setup: &setup,
        stub,
        agent,
        aggregator,
        outage: None,
    };
    let alarm = u64::from(options.seconds.max(options.outage_seconds)) + 300;
    let cast = cast::cast([web4, web6, dns4, dns6, db], v6, options.seed, alarm);
    let stage = Stage::new(directory.join("stage"), &traffic)?;
    test.perform(&cast, &stage)?;
    let mut outcome = test.wind_up(&stage)?;
    outcome.peers = peers;
    outcome.refused.0 = refused;
    Ok(outcome)
}

// === impl Test ===

impl Test<'_> {
    /// Traffic on, and everything that is to happen meanwhile.
    fn perform(&mut self, cast: &Cast, stage: &Stage) -> anyhow::Result<()> {
        let (steps, total) = plan(self.options);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let playing = scope.spawn(|| cast.play(stage, &stop));
            let happened = self.happen(&steps, total, || playing.is_finished());
            stop.store(true, Ordering::Relaxed);
            let played = match playing.join() {
                Ok(played) => played.context("making traffic"),
                Err(_) => Err(anyhow::anyhow!("the thread that makes traffic panicked")),
            };
            happened.and(played)
        })
    }

    fn happen(&mut self, steps: &[Step], total: Duration, over: impl Fn() -> bool) -> anyhow::Result<()> {
        let start = Instant::now();
        let mut steps = steps.iter().peekable();
        while start.elapsed() < total && !over() {
            anyhow::ensure!(!sys::stopping(), "interrupted");
            still_runs(&mut self.agent, "agent")?;
            self.aggregator.check()?;
            while let Some(step) = steps.next_if(|step| step.at <= start.elapsed()) {
                self.take(&step.event)
                    .with_context(|| format!("at {:.1} s, {:?}", start.elapsed().as_secs_f64(), step.event))?;
            }
            std::thread::sleep(TICK);
        }
        Ok(())
    }

    fn take(&mut self, event: &Event) -> anyhow::Result<()> {
        match event {
            Event::Fault(fault) => self.stub.set_fault(fault.clone()),
            Event::Freeze => self.aggregator.freeze(),
            Event::Kill => self.aggregator.kill()?,
            Event::Restart => self.aggregator.restart()?,
            Event::Gone => {
                self.runtime.block_on(self.stub.close());
                self.outage = Some(Outage {
                    length: Duration::ZERO,
                    points: [self.stub.summary().points; 2],
                    backlog: [self.aggregator.backlog()?; 2],
                });
            }
            Event::Back => {
                if let Some(outage) = &mut self.outage {
                    outage.length = Duration::from_secs(self.options.outage_seconds.into());
                    outage.points[1] = self.stub.summary().points;
                    outage.backlog[1] = self.aggregator.backlog()?;
                }
                self.runtime.block_on(self.stub.reopen())?;
            }
        }
        Ok(())
    }

    /// Nothing fails any more: the agent hands over the rest, the aggregator delivers it, both end.
    fn wind_up(mut self, stage: &Stage) -> anyhow::Result<Outcome> {
        self.stub.set_fault(Fault::None);
        self.aggregator.ready()?;
        let metric = |name: &str| -> anyhow::Result<f64> {
            let value = self.agent.metric(name)?;
            value.with_context(|| format!("the agent's /metrics has no {name}"))
        };
        let connects = metric("ebpfcollector_uplink_connects_total")?;
        let resent = metric("ebpfcollector_uplink_resent_batches_total")?;
        let agent_peak_kib = self.agent.peak_rss_kib()?;
        self.agent.stop(STOP_PATIENCE)?;
        let deadline = Instant::now() + DELIVERY_PATIENCE;
        while self.aggregator.backlog()?.points > 0.0 {
            anyhow::ensure!(
                Instant::now() < deadline,
                "the aggregator did not deliver its queue within {DELIVERY_PATIENCE:?}: {:?}",
                self.aggregator.backlog()?
            );
            std::thread::sleep(TICK);
        }
        let (ledger, aggregator_peaks_kib, kills) = self.aggregator.stop(STOP_PATIENCE)?;
        let [agent_log, aggregator_log] = self.setup.logs();
        let words = processes::read(&aggregator_log)?
            .lines()
            .find(|line| line.contains("connection refused") && line.contains("peer="))
            .map(str::to_owned);
        let sums = self.stub.sums();
        let stub = self.stub.summary();
        self.runtime.block_on(self.stub.stop());
        Ok(Outcome {
            lines: compare::compare(NAME_PREFIX, &without_datagrams(stage.reports()?), &sums, &[]),
            stub,
            agent: compare::final_ledger(&processes::read(&agent_log)?),
            aggregator: ledger,
            agent_peak_kib,
            aggregator_peaks_kib,
            kills,
            connects,
            resent,
            outage: self.outage,
            peers: Vec::new(),
            refused: (0.0, words),
            leaks: processes::logs_with(&[agent_log, aggregator_log], &self.setup.token)?,
            dead_letters: files(&self.setup.queue().join("dead-letter"))?,
        })
    }
}

/// The documented record counts UDP's bytes, not its datagrams.
fn without_datagrams(mut reports: Vec<Report>) -> Vec<Report> {
    for row in reports.iter_mut().flat_map(|report| &mut report.rows) {
        row.counts.datagrams_sent = 0;
        row.counts.datagrams_received = 0;
    }
    reports
}

fn files(directory: &Path) -> anyhow::Result<Vec<String>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("reading {}", directory.display())),
    };
    entries
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect()
}

/// Prints tables and failures; `true` when there are none.
fn report(options: &Options, outcome: &Outcome, checks: &[Check]) -> anyhow::Result<bool> {
    let mut text = format!(
        "{:<15} {:>5}  {:<9}  {:>9} {:>14} {:>14}  difference\n",
        "process", "procs", "traffic", "tcp", "bytes sent", "bytes received"
    );
    for line in &outcome.lines {
        let Counts {
            connections,
            bytes_sent,
            bytes_received,
            ..
        } = line.own;
        let way = if line.direction == "incoming" { "in" } else { "out" };
        text += &format!(
            "{:<15} {:>5}  {:<9}  {connections:>9} {bytes_sent:>14} {bytes_received:>14}  {}\n",
            line.name,
            line.processes,
            format!("{} {way}", line.transport),
            if line.problems.is_empty() { "0" } else { "NOT 0" }
        );
    }
    text += &summary(outcome);
    let failed = checks.iter().filter(|check| check.problem.is_some()).count();
    for check in checks {
        match &check.problem {
            Some(problem) => text += &format!("FAILED {} {}: {problem}\n", check.scenario, check.what),
            None if options.verbose => text += &format!("ok     {} {}\n", check.scenario, check.what),
            None => {}
        }
    }
    text += &format!("chain: {} passed, {failed} failed\n", checks.len() - failed);
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .context("writing to standard output")?;
    Ok(failed == 0)
}

fn summary(outcome: &Outcome) -> String {
    let Outcome { stub, .. } = outcome;
    let list = |counts: Vec<String>| {
        if counts.is_empty() {
            "none".to_owned()
        } else {
            counts.join(", ")
        }
    };
    let answers = stub.requests.iter().map(|(status, count)| match status {
        0 => format!("{count} x no answer"),
        status => format!("{count} x {status}"),
    });
    let faulted = stub.faulted.iter().map(|(mode, count)| format!("{count} x {mode}"));
    let mib = |kib: &u64| format!("{:.1}", *kib as f64 / 1024.0);
    let mut text = format!(
        "records   acknowledged {}, decoded {} in {} bodies; {} bodies repeated and recognised\n\
         dataway   answers: {}; faults met: {}; violations {}\n\
         agent     peak {} MiB, opened {} streams, sent {} batches again\n\
         aggregator killed {} times; peak MiB of each life: {}\n",
        judge::acknowledged(&outcome.agent),
        stub.points,
        stub.bodies,
        stub.duplicates,
        list(answers.collect()),
        list(faulted.collect()),
        stub.violations_total,
        mib(&outcome.agent_peak_kib),
        outcome.connects,
        outcome.resent,
        outcome.kills,
        outcome
            .aggregator_peaks_kib
            .iter()
            .map(mib)
            .collect::<Vec<_>>()
            .join(" "),
    );
    if let Some(Outage { length, backlog, .. }) = outcome.outage {
        let [before, after] = backlog;
        let bytes = after.bytes - before.bytes;
        text += &format!(
            "outage    {} s: the queue grew by {} points, {:.0} KiB; in an hour at this rate by {:.1} MiB\n",
            length.as_secs(),
            after.points - before.points,
            bytes / 1024.0,
            bytes / length.as_secs_f64() * 3600.0 / f64::from(1 << 20),
        );
    }
    for (peer, answer) in &outcome.peers {
        text += &format!("tls       {peer:?}: {answer:?}\n");
    }
    if let (true, Some(words)) = (!outcome.peers.is_empty(), &outcome.refused.1) {
        text += &format!("tls       log: {words}\n");
    }
    text
}
