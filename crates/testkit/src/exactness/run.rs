//! The driver: sets up the network, runs agent and scenarios, compares, prints.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clap::Parser;
use serde::Serialize;

use super::{
    agent::{Agent, AgentOptions},
    compare::{self, Check, ScenarioSum},
    flow,
    scenario::{self, Plan, Scenario, Topology, When},
};
use crate::{
    service::LedgerCounts,
    traffic::{
        launch::{Role, Stage},
        netns::{Side, TestNet},
        report::Report,
    },
};

/// Checks that the agent reports exactly what processes count themselves: bytes, connections and datagrams per
/// process. Ends with 0 only if there is no difference at all. Needs root.
#[derive(Parser, Clone, Debug)]
#[command(name = "exactness", version)]
pub struct Options {
    /// The `node-agent` binary; none compares clients and servers with each other only
    #[arg(long)]
    pub agent: Option<PathBuf>,
    /// One more argument for the agent; may be given several times
    #[arg(long, allow_hyphen_values = true)]
    pub agent_arg: Vec<String>,
    /// The agent's flush interval in milliseconds
    #[arg(long, default_value_t = 2000)]
    pub interval_ms: u64,
    /// Number of short TCP connections
    #[arg(long, default_value_t = 10_000)]
    pub tcp: u64,
    /// Number of datagrams that clients send
    #[arg(long, default_value_t = 100_000)]
    pub udp: u64,
    /// Where the traffic runs; may be given several times, each adds a full set
    #[arg(long, value_enum, default_values = ["veth"])]
    pub topology: Vec<Topology>,
    /// Only scenarios whose tag begins so; may be given several times
    #[arg(long)]
    pub only: Vec<String>,
    /// Not the scenario with this tag; may be given several times
    #[arg(long)]
    pub skip: Vec<String>,
    /// Seed of all sizes
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// The `traffic` binary; by default the one next to this one
    #[arg(long)]
    pub traffic: Option<PathBuf>,
    /// Directory for reports, the agent's output and its log
    #[arg(long)]
    pub work_dir: Option<PathBuf>,
    /// Longest wait for any process, in seconds
    #[arg(long, default_value_t = 300)]
    pub patience: u64,
    /// Print every check, and the agent's rows of failed processes
    #[arg(long)]
    pub verbose: bool,
    /// Print one JSON object instead of tables
    #[arg(long)]
    pub json: bool,
}

/// What came out.
#[derive(Debug, Serialize)]
pub struct Outcome {
    /// Per scenario.
    pub scenarios: BTreeMap<String, ScenarioSum>,
    /// Failed checks, and with `--verbose` all.
    pub checks: Vec<Check>,
    /// Number of checks passed.
    pub passed: usize,
    /// Number of checks failed.
    pub failed: usize,
    /// Things that the kernel could not do and errors that the tools counted.
    pub notes: BTreeSet<String>,
}

struct Running {
    servers: Vec<Role>,
    clients: Vec<Role>,
}

/// Runs the test and prints the outcome. `true` when nothing failed.
///
/// # Errors
/// The test could not be carried out: not root, agent not ready, a role failed.
pub fn run(options: &Options) -> anyhow::Result<bool> {
    let directory = options
        .work_dir
        .clone()
        .unwrap_or_else(|| std::env::temp_dir().join(format!("exactness-{}", std::process::id())));
    let outcome = carry_out(options, &directory);
    if options.work_dir.is_none() && outcome.as_ref().map_or(true, |outcome| outcome.failed == 0) {
        // A failed start says all it knows in its error; only differences are worth a second look.
        let _ = std::fs::remove_dir_all(&directory);
    }
    let outcome = outcome?;
    if options.json {
        println!("{}", serde_json::to_string(&outcome)?);
    } else {
        print(&outcome, options);
        if outcome.failed > 0 {
            println!("the agent's output and log are in {}", directory.display());
        }
    }
    println!("exactness: {} passed, {} failed", outcome.passed, outcome.failed);
    Ok(outcome.failed == 0)
}

fn carry_out(options: &Options, directory: &Path) -> anyhow::Result<Outcome> {
    let interval = Duration::from_millis(options.interval_ms);
    let own = std::env::current_exe().context("finding this executable")?;
    let traffic = options.traffic.clone().unwrap_or_else(|| own.with_file_name("traffic"));
    let stage = Stage::new(directory.join("stage"), &traffic)?;
    stage.clear_reports()?;
    let net = if options.topology.contains(&Topology::Veth) {
        Some(TestNet::up(&format!("exact{}", std::process::id()), 1500).context("making the test network")?)
    } else {
        None
    };
    let scenarios = selected(options, net.as_ref(), interval);
    anyhow::ensure!(!scenarios.is_empty(), "--only and --skip leave no scenario");
    let test = Test {
        stage: &stage,
        patience: Duration::from_secs(options.patience),
        quiet: options.json,
    };

    let older = test.start_all(&scenarios, When::BeforeAgent)?;
    let agent = options
        .agent
        .as_ref()
        .map(|binary| {
            let agent_options = AgentOptions {
                binary: binary.clone(),
                interval,
                loopback: options.topology.contains(&Topology::Loopback),
                arguments: options.agent_arg.clone(),
                directory: directory.to_path_buf(),
            };
            Agent::start(&agent_options, Duration::from_secs(60))
        })
        .transpose()?;
    let older = test.resume(older)?;
    let beside = test.start_all(&scenarios, When::Throughout)?;
    for scenario in scenarios.iter().filter(|scenario| scenario.when == When::Turn) {
        test.one(scenario)
            .with_context(|| format!("scenario {}", scenario.tag))?;
    }
    for running in older.into_iter().chain(beside) {
        test.finish(running)?;
    }

    let (flows, ledger) = match agent {
        Some(agent) => {
            std::thread::sleep(interval * 2 + Duration::from_secs(1));
            let ledger = settled_ledger(&agent, Duration::from_secs(15))?;
            let output = agent.stop(test.patience)?;
            (Some(flow::read_flows(&output)?), Some(ledger))
        }
        None => (None, None),
    };
    Ok(judge(
        options,
        &scenarios,
        &stage.reports()?,
        flows.as_deref(),
        ledger.as_ref(),
    ))
}

fn selected(options: &Options, net: Option<&TestNet>, interval: Duration) -> Vec<Scenario> {
    let mut all = Vec::new();
    for (index, topology) in (0_u16..).zip(&options.topology) {
        let netns = match (topology, net) {
            (Topology::Veth, Some(net)) => Some((net.path(Side::A), net.path(Side::B))),
            _ => None,
        };
        all.extend(scenario::scenarios(&Plan {
            tcp: options.tcp,
            udp: options.udp,
            seed: options.seed,
            topology: *topology,
            netns,
            interval,
            first_port: 7000 + index * 400,
        }));
    }
    all.retain(|scenario| {
        (options.only.is_empty() || options.only.iter().any(|only| scenario.tag.starts_with(only.as_str())))
            && !options.skip.iter().any(|skip| skip == scenario.tag)
    });
    all
}

struct Test<'a> {
    stage: &'a Stage,
    patience: Duration,
    quiet: bool,
}

impl Test<'_> {
    fn start_servers(&self, scenario: &Scenario) -> anyhow::Result<Vec<Role>> {
        let mut servers = Vec::new();
        for process in &scenario.servers {
            self.stage.link(&format!("{}-x", scenario.tag))?;
            let mut role = self.stage.start(&process.name, &process.arguments)?;
            role.expect("ready")?;
            servers.push(role);
        }
        Ok(servers)
    }

    fn start_all(&self, scenarios: &[Scenario], when: When) -> anyhow::Result<Vec<(Scenario, Running)>> {
        let mut all = Vec::new();
        for scenario in scenarios.iter().filter(|scenario| scenario.when == when) {
            let servers = self.start_servers(scenario)?;
            let mut clients = Vec::new();
            for (index, process) in scenario.clients.iter().enumerate() {
                if when == When::BeforeAgent && index > 0 {
                    break;
                }
                let mut role = self.stage.start(&process.name, &process.arguments)?;
                if when == When::BeforeAgent {
                    role.expect("paused")?;
                }
                clients.push(role);
            }
            all.push((scenario.clone(), Running { servers, clients }));
        }
        Ok(all)
    }

    /// The agent runs now: marks what was before it, and lets the older connections go on.
    fn resume(&self, older: Vec<(Scenario, Running)>) -> anyhow::Result<Vec<(Scenario, Running)>> {
        older
            .into_iter()
            .map(|(scenario, mut running)| {
                for server in &mut running.servers {
                    server.signal(libc::SIGUSR1);
                    server.expect("marked")?;
                }
                running.clients.iter().for_each(|client| client.signal(libc::SIGUSR1));
                for process in scenario.clients.iter().skip(1) {
                    running
                        .clients
                        .push(self.stage.start(&process.name, &process.arguments)?);
                }
                Ok((scenario, running))
            })
            .collect()
    }

    fn one(&self, scenario: &Scenario) -> anyhow::Result<()> {
        let start = Instant::now();
        let servers = self.start_servers(scenario)?;
        let clients = scenario
            .clients
            .iter()
            .map(|process| self.stage.start(&process.name, &process.arguments))
            .collect::<anyhow::Result<Vec<_>>>()?;
        self.finish((scenario.clone(), Running { servers, clients }))?;
        if !self.quiet {
            eprintln!(
                "  {:7} {:4.1} s  {}",
                scenario.tag,
                start.elapsed().as_secs_f64(),
                scenario.what
            );
        }
        Ok(())
    }

    fn finish(&self, (scenario, running): (Scenario, Running)) -> anyhow::Result<()> {
        for client in running.clients {
            client
                .join(self.patience)
                .with_context(|| format!("scenario {}", scenario.tag))?;
        }
        for server in running.servers {
            server
                .stop(self.patience)
                .with_context(|| format!("scenario {}", scenario.tag))?;
        }
        Ok(())
    }
}

/// The ledger once every stage has passed on all that entered, or as it is after `patience`.
///
/// # Errors
/// The admin server does not answer.
pub fn settled_ledger(agent: &Agent, patience: Duration) -> anyhow::Result<LedgerCounts> {
    let deadline = Instant::now() + patience;
    loop {
        let ledger = agent.ledger()?;
        let settled = !ledger.is_empty() && ledger.values().all(|stage| stage.pending() == 0);
        if settled || Instant::now() >= deadline {
            return Ok(ledger);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn judge(
    options: &Options,
    scenarios: &[Scenario],
    reports: &[Report],
    flows: Option<&[flow::Flow]>,
    ledger: Option<&LedgerCounts>,
) -> Outcome {
    let symmetric = scenarios
        .iter()
        .filter(|one| one.symmetric)
        .map(|one| one.tag.to_owned())
        .collect();
    let mut checks = compare::cross_check(reports, &symmetric);
    let mut sums = BTreeMap::new();
    match flows {
        Some(flows) => {
            let (compared, by_scenario) = compare::compare(reports, flows);
            checks.extend(compared);
            sums = by_scenario;
        }
        None => {
            for report in reports {
                let sum: &mut ScenarioSum = sums.entry(compare::scenario_of(&report.name).to_owned()).or_default();
                sum.processes += 1;
                sum.own.add(&report.total());
            }
        }
    }
    if let Some(ledger) = ledger {
        checks.extend(compare::check_ledger(ledger));
    }
    let mut notes = BTreeSet::new();
    for report in reports {
        notes.extend(
            report
                .unsupported
                .iter()
                .map(|what| format!("{}: kernel has no {what}", report.name)),
        );
        notes.extend(
            report
                .errors
                .iter()
                .map(|(what, count)| format!("{}: {count} x {what}", report.name)),
        );
    }
    let failed = checks.iter().filter(|check| check.problem.is_some()).count();
    let passed = checks.len() - failed;
    if !options.verbose {
        checks.retain(|check| check.problem.is_some());
    }
    Outcome {
        scenarios: sums,
        checks,
        passed,
        failed,
        notes,
    }
}

fn print(outcome: &Outcome, options: &Options) {
    println!(
        "{:8} {:>5} {:>9} {:>10} {:>15} {:>15}  difference",
        "scenario", "procs", "tcp", "datagrams", "bytes sent", "bytes received"
    );
    for (tag, sum) in &outcome.scenarios {
        let difference = if options.agent.is_some() {
            compare::difference(&sum.own, &sum.agent).unwrap_or_else(|| "0".to_owned())
        } else {
            "-".to_owned()
        };
        println!(
            "{tag:8} {:5} {:9} {:10} {:15} {:15}  {difference}",
            sum.processes,
            sum.own.connections,
            sum.own.datagrams_sent + sum.own.datagrams_received,
            sum.own.bytes_sent,
            sum.own.bytes_received
        );
    }
    for note in outcome.notes.iter().take(20) {
        println!("note: {note}");
    }
    let most = if options.verbose { usize::MAX } else { 8 };
    let mut shown: BTreeMap<&str, usize> = BTreeMap::new();
    for check in &outcome.checks {
        let count = shown.entry(&check.scenario).or_default();
        *count += 1;
        match &check.problem {
            _ if *count > most => {}
            Some(problem) => println!("FAILED {} {}: {problem}", check.scenario, check.what),
            None => println!("ok     {} {}", check.scenario, check.what),
        }
    }
    for (scenario, count) in shown.into_iter().filter(|(_, count)| *count > most) {
        println!(
            "... and {} more failed checks of {scenario} (--verbose shows all)",
            count - most
        );
    }
}

/// True when the path names an existing file: for a clear message before anything starts.
///
/// # Errors
/// It does not.
pub fn require_file(path: &Path) -> anyhow::Result<()> {
    anyhow::ensure!(path.is_file(), "{} is not a file", path.display());
    Ok(())
}
