//! `cargo xtask bench`: speed and memory, with and without the agent.
//!
//! ```text
//! load (traffic roles) ─┬─ without agent ─┐
//!                       └─ with agent ────┴▶ pairs (medians, ratio) ▶ table ▶ docs/PERFORMANCE.md
//! ```
//! Each pair is interleaved within one run, so that a machine that gets slower or faster in between moves both.

mod cost;
mod http;
mod http_rate;
mod kernel;
mod load;
mod sections;
mod table;

use std::{
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use clap::ValueEnum;

use crate::project;

use self::{
    sections::Bench,
    table::{Document, Row},
};

/// Options of `cargo xtask bench`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Fewer and shorter runs: under 3 minutes instead of under 10
    #[arg(long)]
    quick: bool,
    /// Only these parts
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// The agent to measure; by default it is built from this checkout, optimised
    #[arg(long)]
    agent: Option<PathBuf>,
    /// One more argument for the agent; may be given several times
    #[arg(long, allow_hyphen_values = true)]
    agent_arg: Vec<String>,
    /// The traffic generator; by default it is built from this checkout, optimised
    #[arg(long)]
    traffic: Option<PathBuf>,
    /// Where the table goes, relative to the checkout
    #[arg(long, default_value = "docs/PERFORMANCE.md")]
    output: PathBuf,
    /// End with a failure when a target is missed
    #[arg(long)]
    check: bool,
}

/// Parts of the benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    /// TCP connections opened, used and closed as fast as the machine can
    Churn,
    /// CPU time of agent and kernel programs per connection end
    Cost,
    /// Bulk transfer on a long-lived connection
    Bulk,
    /// Datagrams as fast as the machine can
    Udp,
    /// HTTP exchanges at full speed, nginx and wrk
    Http,
    /// HTTP exchanges at a fixed rate: latency, and whether all are told
    HttpRate,
    /// Memory with many HTTP connections
    HttpOpen,
    /// Memory and drain time with many open connections
    Open,
    /// Memory and processor time of a large cluster's names
    Identity,
    /// Speed of the protocol parsers
    Parsers,
    /// `cargo bench` of the aggregator's crates
    Aggregator,
}

/// How long and how often.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    /// On/off pairs of each measurement.
    pairs: usize,
    /// Length of one run.
    run: Duration,
}

pub(crate) fn main(arguments: &Args) -> Result<ExitCode> {
    // SAFETY: no arguments, cannot fail.
    let user = unsafe { libc::geteuid() };
    anyhow::ensure!(user == 0, "the benchmark needs root: network namespaces and BPF");
    let root = project::root()?;
    let start = Instant::now();
    let wanted = |part| arguments.only.is_empty() || arguments.only.contains(&part);
    let needs_agent = [
        Part::Churn,
        Part::Cost,
        Part::Bulk,
        Part::Udp,
        Part::Http,
        Part::HttpRate,
        Part::HttpOpen,
        Part::Open,
    ]
    .into_iter()
    .any(wanted);
    let mut document = Document::new();
    if needs_agent {
        kernel::statistics_are_off()?;
        let traffic = built(&root, arguments.traffic.as_deref(), "ec-testkit", "traffic")?;
        let agent = built(&root, arguments.agent.as_deref(), "ec-node-agent", "node-agent")?;
        let effort = if arguments.quick {
            Effort {
                pairs: 3,
                run: Duration::from_millis(1500),
            }
        } else {
            Effort {
                pairs: 11,
                run: Duration::from_secs(2),
            }
        };
        let bench = Bench::new(effort, &traffic, &agent, &arguments.agent_arg)?;
        for (part, section) in [
            (Part::Churn, Bench::churn as fn(&Bench, &mut Document) -> Result<()>),
            (Part::Cost, cost::cost),
            (Part::Bulk, Bench::bulk),
            (Part::Udp, Bench::udp),
            (Part::Http, Bench::http),
            (Part::HttpRate, http_rate::fixed_rate),
            (Part::HttpOpen, http_rate::open),
            (Part::Open, Bench::open_connections),
        ] {
            if wanted(part) {
                // What failed is a missed target; the other parts are still worth having.
                if let Err(error) = section(&bench, &mut document) {
                    document.row(Row {
                        what: format!("{part:?}"),
                        measured: format!("failed: {error:#}")
                            .lines()
                            .next()
                            .unwrap_or_default()
                            .to_owned(),
                        target: "measured".to_owned(),
                        met: false,
                    });
                    eprintln!("{error:#}");
                }
            }
        }
    }
    if wanted(Part::Identity) {
        document.text(
            "Names of a cluster of 20,000 pods, 5,000 changes a minute",
            &identity(&root)?,
        );
    }
    if wanted(Part::Parsers) {
        document.text(
            "Protocol parsers, one core",
            &cargo_bench(&root, "ec-node-agent", &["--bench", "protocols"])?,
        );
    }
    if wanted(Part::Aggregator) {
        for package in ["ec-records", "ec-api", "ec-aggregator"] {
            document.text(
                &format!("cargo bench -p {package}"),
                &cargo_bench(&root, package, &["--benches"])?,
            );
        }
    }
    let missed = document.missed();
    println!("{}", document.plain());
    let path = root.join(&arguments.output);
    std::fs::write(&path, document.markdown(arguments.quick)).with_context(|| format!("writing {}", path.display()))?;
    println!(
        "written to {} after {:.0} s",
        path.display(),
        start.elapsed().as_secs_f64()
    );
    println!("bench: {} targets met, {missed} missed", document.met());
    Ok(if arguments.check && missed > 0 {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// The binary given, or the optimised one of this checkout.
fn built(root: &Path, given: Option<&Path>, package: &str, binary: &str) -> Result<PathBuf> {
    if let Some(given) = given {
        return given
            .canonicalize()
            .with_context(|| format!("finding {}", given.display()));
    }
    eprintln!("building {binary}, optimised ...");
    project::run(
        cargo()
            .args(["build", "--release", "--package", package, "--bin", binary])
            .current_dir(root),
    )?;
    Ok(project::target_dir()?.join("release").join(binary))
}

/// What the test of the cost of identity prints, optimised.
fn identity(root: &Path) -> Result<String> {
    eprintln!("cost of identity ...");
    let text = project::output_text(
        cargo()
            .args(["test", "--quiet", "--release", "--package", "ec-node-agent"])
            .args(["--test", "identity_cost", "--", "--nocapture"])
            .current_dir(root),
    )?;
    let figures = text.lines().find(|line| line.contains("bytes per pod"));
    Ok(figures.context("the test printed no figures")?.to_owned())
}

/// What the benchmarks of a package print, without the test harness' own lines.
fn cargo_bench(root: &Path, package: &str, which: &[&str]) -> Result<String> {
    eprintln!("cargo bench -p {package} ...");
    let text = project::output_text(
        cargo()
            .args(["bench", "--quiet", "--package", package])
            .args(which)
            .current_dir(root),
    )?;
    let lines = text.lines().filter(|line| {
        let line = line.trim();
        !line.is_empty() && !line.starts_with("running ") && !line.starts_with("test result") && line != "i"
    });
    Ok(lines.collect::<Vec<_>>().join("\n"))
}

impl Document {
    /// Adds an on/off pair whose ratio has to reach `least`.
    fn pair(&mut self, what: &str, unit: &str, pair: &sections::Pair, least: f64) {
        self.row(Row {
            what: what.to_owned(),
            measured: format!(
                "{:.4} ({:.4} to {:.4}); without {} {unit}, with {} {unit}",
                pair.ratio,
                pair.lowest,
                pair.highest,
                table::thousands(pair.without),
                table::thousands(pair.with)
            ),
            target: format!(">= {least}"),
            met: pair.ratio >= least,
        });
    }
}
