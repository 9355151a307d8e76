//! `ec-e2e`: brings clusters up and down and runs the suite. `init`, `forward` and `import` are what the local cluster runs
//! inside its namespaces.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use e2e::{
    cluster::{Cluster, Which},
    local::{self, layout::Layout, runtime},
    suite,
};

#[derive(Parser)]
#[command(name = "ec-e2e", about = "Tests on a whole cluster", max_term_width = 120)]
struct Cli {
    /// Directory of the cluster, its images and its logs
    #[arg(long, global = true, default_value = "target/e2e")]
    directory: PathBuf,
    /// Which cluster
    #[arg(long, global = true, env = "E2E_CLUSTER", value_enum, default_value = "local")]
    cluster: Which,
    /// Directory of the local cluster's programs, as `scripts/e2e.sh programs` prints it
    #[arg(long, global = true, env = "E2E_PROGRAMS")]
    programs: Option<PathBuf>,
    /// Directory of the static programs, as `cargo xtask dist --with-tests` leaves it
    #[arg(long, global = true, default_value = "dist")]
    dist: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start a cluster
    Up,
    /// Remove it; logs stay
    Down,
    /// Run the tests on the cluster that is up
    Test(suite::Options),
    /// Remove what tests left on a cluster that stays
    Clean,
    /// All of it: start, test, remove
    Run {
        /// Leave the cluster up
        #[arg(long, env = "E2E_KEEP")]
        keep: bool,
        #[command(flatten)]
        options: suite::Options,
    },
    /// First process of a namespace
    #[command(hide = true)]
    Init { place: PathBuf },
    /// Bring connections of the socket on standard input to an address
    #[command(hide = true)]
    Forward { target: SocketAddr },
    /// Bring image archives into a node
    #[command(hide = true)]
    Import { archives: PathBuf, done: PathBuf },
}

fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    let name = arguments.next().map(PathBuf::from);
    let result = if name.as_deref().and_then(Path::file_name) == Some(runtime::NAME.as_ref()) {
        runtime::run(&arguments.collect::<Vec<_>>())
    } else {
        run(&Cli::parse())
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> anyhow::Result<()> {
    match &cli.command {
        Command::Init { place } => return local::init::run(place),
        Command::Forward { target } => return local::forward::run(*target),
        Command::Import { archives, done } => return local::import::run(archives, done),
        _ => {}
    }
    let absolute = |path: &PathBuf| std::path::absolute(path).context("find the working directory");
    let programs = cli.programs.as_ref().map(absolute).transpose()?;
    let (dist, layout) = (absolute(&cli.dist)?, Layout::new(&absolute(&cli.directory)?));
    let cluster = Cluster::new(cli.cluster, layout, programs);
    match &cli.command {
        Command::Up => {
            cluster.up(&dist)?;
            println!("    export KUBECONFIG={}", cluster.kubeconfig()?.display());
            println!("    kubectl: {}", cluster.program("kubectl").display());
            Ok(())
        }
        Command::Down => cluster.down(),
        Command::Test(options) => test(cluster, dist, options),
        Command::Clean => wait(suite::clean(cluster, dist)),
        Command::Run { keep, options } => {
            println!("==> cluster");
            let outcome = cluster.up(&dist).and_then(|()| test(cluster.clone(), dist, options));
            if outcome.is_err() {
                cluster.keep_logs()?;
                println!("logs: {}", cluster.layout.logs.display());
            }
            if !keep {
                println!("==> cluster down");
                cluster.down()?;
            }
            outcome
        }
        Command::Init { .. } | Command::Forward { .. } | Command::Import { .. } => Ok(()),
    }
}

fn test(cluster: Cluster, dist: PathBuf, options: &suite::Options) -> anyhow::Result<()> {
    wait(suite::run(cluster, dist, options))
}

fn wait<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the runtime")?
        .block_on(work)
}
