//! The driver: stub, agent, cast, live table, orderly end, summary.

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::Write as _,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clap::Parser;
use rand::Rng as _;

use super::{
    cast::{self, Cast},
    compare::{self, Feature, Line},
    screen::Screen,
    table,
};
use crate::{
    dataway::{DatawayStub, StubConfig, StubHandle, Summary},
    exactness::{
        agent::{Agent, AgentOptions},
        flow,
    },
    service::LedgerCounts,
    traffic::{launch::Stage, report::Counts, sys},
};

/// Flush interval of the agent, and time between two tables.
const INTERVAL: Duration = Duration::from_secs(2);
/// Longest wait for the agent to load its programs; a slow machine takes a few seconds.
const START_PATIENCE: Duration = Duration::from_secs(60);
/// Longest wait for the agent to flush and deliver the rest; its own limits add up to less.
const STOP_PATIENCE: Duration = Duration::from_secs(60);
/// Points kept for the table: far more than one flush of a busy machine.
const KEEP_POINTS: usize = 20_000;

/// Watches this machine's TCP and UDP traffic for a while: a real agent delivers it to a strict DataWay stub, a table
/// shows what arrives, and some processes of the demo's own make traffic that they count themselves. Ends with 0 only if
/// everything they counted has arrived exactly. Needs root.
#[derive(Parser, Clone, Debug)]
#[command(name = "demo", version)]
pub struct Options {
    /// How long traffic is made, in seconds; Ctrl-C ends it earlier
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub seconds: u32,
    /// The `node-agent` program; by default the one next to this one
    #[arg(long)]
    pub agent: Option<PathBuf>,
    /// One more argument for the agent; may be given several times
    #[arg(long, allow_hyphen_values = true)]
    pub agent_arg: Vec<String>,
    /// The `traffic` program; by default the one next to this one
    #[arg(long)]
    pub traffic: Option<PathBuf>,
}

/// What is left when all processes have ended.
struct Outcome {
    features: Vec<Feature>,
    lines: Vec<Line>,
    traffic_errors: Vec<String>,
    stub: Summary,
    ledger: LedgerCounts,
    /// How long traffic was made.
    seconds: f64,
}

/// Runs the demo. `true` when everything agrees.
///
/// # Errors
/// The demo could not be carried out; the error says what to do.
pub fn run(options: &Options) -> anyhow::Result<bool> {
    let agent = program(options.agent.as_deref(), "node-agent")?;
    let traffic = program(options.traffic.as_deref(), "traffic")?;
    // SIGINT and SIGTERM end the show early; the alarm does so if something hangs, and everything after it is bounded.
    sys::install_signals(options.seconds + 120).context("installing signal handlers")?;

    let directory = std::env::temp_dir().join(format!("ebpf-collector-demo-{}", std::process::id()));
    DirBuilder::new()
        .mode(0o700)
        .create(&directory)
        .with_context(|| format!("making the directory {}", directory.display()))?;
    let result = carry_out(options, &agent, &traffic, &directory);
    let agreed = match &result {
        Ok(outcome) => report(outcome)?,
        Err(_) => false,
    };
    if agreed {
        fs::remove_dir_all(&directory).with_context(|| format!("removing {}", directory.display()))?;
    } else {
        eprintln!("The agent's log and output are kept in {}", directory.display());
    }
    result.map(|_| agreed)
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
        "there is no {}: `make demo` builds it, or give another with --{}",
        path.display(),
        if name == "traffic" { "traffic" } else { "agent" }
    );
    Ok(path)
}

fn carry_out(options: &Options, agent: &Path, traffic: &Path, directory: &Path) -> anyhow::Result<Outcome> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("starting the runtime of the DataWay stub")?;
    let token = format!("tkn_{:032x}", rand::rng().random::<u128>());
    let stub = runtime.block_on(DatawayStub::start(StubConfig {
        token: token.clone(),
        keep_points: KEEP_POINTS,
        ..StubConfig::default()
    }))?;
    say(&format!(
        "DataWay stub on http://{}, with a token of its own",
        stub.addr
    ))?;

    let agent = start_agent(options, agent, directory, &stub, &token)?;
    let features = compare::features(&agent.get("/metrics")?.1);
    say(&format!(
        "Agent is ready (pid {}), {}, loopback included",
        agent.pid(),
        count_features(&features)
    ))?;

    let v6 = cast::has_ipv6();
    if !v6 {
        say("This machine has no IPv6 on loopback: that half of the traffic is left out")?;
    }
    let cast = Cast::new(cast::free_ports(v6)?, v6, u64::from(options.seconds) + 120);
    let stage = Stage::new(directory.join("stage"), traffic)?;
    let start = Instant::now();
    perform(options, &cast, &stage, &stub)?;
    let seconds = start.elapsed().as_secs_f64();

    say("Traffic has stopped; the agent flushes and delivers the rest")?;
    let output = agent.stop(STOP_PATIENCE)?;
    let flows = flow::read_flows(&output).context("reading the agent's output file")?;
    let log_path = directory.join("agent.log");
    let log = fs::read_to_string(&log_path).with_context(|| format!("reading {}", log_path.display()))?;
    let reports = stage.reports()?;
    let lines = compare::compare(cast::NAME_PREFIX, &reports, &stub.sums(), &flows);
    let summary = stub.summary();
    runtime.block_on(stub.stop());
    Ok(Outcome {
        features,
        lines,
        traffic_errors: reports
            .iter()
            .flat_map(|report| {
                report
                    .errors
                    .iter()
                    .map(move |(what, count)| format!("{} (pid {}): {count} x {what}", report.name, report.pid))
            })
            .collect(),
        stub: summary,
        ledger: compare::final_ledger(&log),
        seconds,
    })
}

fn start_agent(
    options: &Options,
    binary: &Path,
    directory: &Path,
    stub: &StubHandle,
    token: &str,
) -> anyhow::Result<Agent> {
    // In a file, because everybody can read the arguments of a process.
    let token_file = directory.join("token");
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&token_file)
        .and_then(|mut file| file.write_all(token.as_bytes()))
        .with_context(|| format!("writing {}", token_file.display()))?;
    let mut arguments = vec![
        format!("--dataway=http://{}", stub.addr),
        format!("--dataway-token-file={}", token_file.display()),
    ];
    arguments.extend(options.agent_arg.iter().cloned());
    say(&format!("Starting {} standalone", binary.display()))?;
    let agent_options = AgentOptions {
        binary: binary.to_owned(),
        interval: INTERVAL,
        loopback: true,
        arguments,
        directory: directory.to_owned(),
    };
    Agent::start(&agent_options, START_PATIENCE).map_err(|error| {
        // SAFETY: no pointers involved.
        let root = unsafe { libc::geteuid() } == 0;
        let advice = if root {
            format!(
                "`{} doctor` says what this kernel lets it do, and why not",
                binary.display()
            )
        } else {
            "this is not root: run `make demo`, which asks sudo, or run this as root".to_owned()
        };
        // Last, because the agent's own words are long.
        anyhow::anyhow!("{error:#}\nWhat to do: {advice}")
    })
}

/// Lets the cast play while the table shows what arrives.
fn perform(options: &Options, cast: &Cast, stage: &Stage, stub: &StubHandle) -> anyhow::Result<()> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let playing = scope.spawn(|| cast.play(stage, &stop));
        let total = Duration::from_secs(options.seconds.into());
        let shown = show(total, stub, || playing.is_finished());
        stop.store(true, Ordering::Relaxed);
        let played = match playing.join() {
            Ok(played) => played.context("making traffic"),
            Err(_) => Err(anyhow::anyhow!("the thread that makes traffic panicked")),
        };
        shown.and(played)
    })
}

fn show(total: Duration, stub: &StubHandle, over: impl Fn() -> bool) -> anyhow::Result<()> {
    let mut screen = Screen::new();
    let start = Instant::now();
    // Half an interval behind the agent's flushes, so that what is shown has arrived as a whole.
    let mut next = start + INTERVAL / 2;
    while start.elapsed() < total && !sys::stopping() && !over() {
        if Instant::now() >= next {
            next += INTERVAL;
            let points = stub.points();
            let latest = table::latest(&points);
            let mut lines = vec![
                format!(
                    "{} s of {} s: {} points decoded, {} rows in the latest flush. Ctrl-C ends.",
                    start.elapsed().as_secs(),
                    total.as_secs(),
                    stub.summary().points,
                    latest.len()
                ),
                String::new(),
            ];
            // Head lines, a line for the cursor, and one to spare.
            let rows = screen.size().rows.saturating_sub(lines.len() + 2).max(4);
            if latest.is_empty() {
                lines.push(format!(
                    "Nothing has arrived yet: the agent flushes every {} s.",
                    INTERVAL.as_secs()
                ));
            } else {
                lines.extend(table::render(&latest, rows));
            }
            screen.draw(&lines).context("writing to standard output")?;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Prints the summary; `true` when everything agrees.
fn report(outcome: &Outcome) -> anyhow::Result<bool> {
    let Outcome {
        features,
        lines,
        traffic_errors,
        stub,
        ledger,
        seconds,
    } = outcome;
    let mut text = format!(
        "\n==> What this machine lets the agent see: {}\n",
        count_features(features)
    );
    for feature in features {
        text += &format!("    {:<24} {:<9} {}\n", feature.name, feature.state, feature.hook);
        if !feature.reason.is_empty() {
            text += &format!("    {:<34} because {}\n", "", feature.reason);
        }
    }
    text += &format!("\n==> What the demo's processes counted in {seconds:.1} s, and what the stub decoded\n");
    text += &counts_table(lines);
    for error in traffic_errors {
        text += &format!("    note: {error}\n");
    }
    text += &stub_text(stub);
    text += "\n==> The agent's ledger: entered = emitted + skipped + lost\n";
    text += &ledger_table(ledger);
    let problems = compare::problems(lines, stub, ledger);
    for problem in &problems {
        text += &format!("    DIFFERENT {problem}\n");
    }
    text += if problems.is_empty() {
        "\n==> Everything agrees: what the processes counted, what the stub decoded, and the ledger; nothing is lost\n"
    } else {
        "\n==> Not everything agrees; see the lines marked DIFFERENT\n"
    };
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .context("writing to standard output")?;
    Ok(problems.is_empty())
}

fn counts_table(lines: &[Line]) -> String {
    let mut text = format!(
        "    {:<15} {:>5}  {:<7}  {:>9} {:>11} {:>11}  {:>9} {:>11} {:>11}\n    {:<15} {:>5}  {:<7}  {:>9} {:>11} {:>11}  {:>9} {:>11} {:>11}  difference\n",
        "",
        "",
        "",
        "own",
        "own",
        "own",
        "stub",
        "stub",
        "stub",
        "process",
        "procs",
        "traffic",
        "count",
        "sent",
        "received",
        "count",
        "sent",
        "received",
    );
    for line in lines {
        let count = |counts: &Counts| match line.transport.as_str() {
            "udp" => counts.datagrams_sent + counts.datagrams_received,
            _ => counts.connections,
        };
        let Line { own, seen, .. } = line;
        let way = if line.direction == "incoming" { "in" } else { "out" };
        text += &format!(
            "    {:<15} {:>5}  {:<7}  {:>9} {:>11} {:>11}  {:>9} {:>11} {:>11}  {}\n",
            line.name,
            line.processes,
            format!("{} {way}", line.transport),
            count(own),
            own.bytes_sent,
            own.bytes_received,
            count(seen),
            seen.bytes_sent,
            seen.bytes_received,
            if line.problems.is_empty() { "0" } else { "DIFFERENT" }
        );
    }
    text += "    Each process is compared by itself; processes of one name are summed up here. The count is that of connections\n    \
             (TCP) or datagrams (UDP). DataWay's record has no count of datagrams: that one is from the agent's output file.\n";
    text
}

fn stub_text(stub: &Summary) -> String {
    let answers: Vec<String> = stub
        .requests
        .iter()
        .map(|(status, count)| format!("{count} x {status}"))
        .collect();
    format!(
        "\n==> The DataWay stub\n    requests {} ({}), points {}, body bytes {} ({} raw), violations {}, duplicates {}\n",
        stub.requests.values().sum::<u64>(),
        answers.join(", "),
        stub.points,
        stub.bytes_wire,
        stub.bytes_raw,
        stub.violations_total,
        stub.duplicates
    )
}

fn ledger_table(ledger: &LedgerCounts) -> String {
    let mut text = format!(
        "    {:<24} {:>9} {:>9} {:>9} {:>9}  closes\n",
        "stage", "entered", "emitted", "skipped", "lost"
    );
    for (name, stage) in ledger {
        let reasons: Vec<String> = stage
            .skipped
            .iter()
            .chain(&stage.lost)
            .filter(|(_, count)| **count > 0)
            .map(|(reason, count)| format!("{reason} {count}"))
            .collect();
        let row = format!(
            "    {name:<24} {:>9} {:>9} {:>9} {:>9}  {:<6}  {}",
            stage.entered,
            stage.emitted,
            stage.skipped.values().sum::<u64>(),
            stage.lost(),
            if stage.pending() == 0 { "yes" } else { "NO" },
            reasons.join(", ")
        );
        text += row.trim_end();
        text.push('\n');
    }
    text
}

fn count_features(features: &[Feature]) -> String {
    let on = features.iter().filter(|feature| feature.state == "on").count();
    format!("{on} of {} features fully on", features.len())
}

fn say(text: &str) -> anyhow::Result<()> {
    writeln!(std::io::stdout().lock(), "==> {text}").context("writing to standard output")
}
