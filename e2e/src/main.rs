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
    images,
    local::{self, layout::Layout, runtime},
};

#[derive(Parser)]
#[command(name = "ec-e2e", about = "Tests on a whole cluster", max_term_width = 120)]
struct Cli {
    /// Directory of the cluster, its images and its logs
    #[arg(long, global = true, default_value = "target/e2e")]
    directory: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start a local cluster
    Up {
        /// Directory of the cluster's programs, as `scripts/e2e.sh programs` prints it
        #[arg(long, env = "E2E_PROGRAMS")]
        programs: PathBuf,
        /// Directory of the static programs, as `cargo xtask dist --with-tests` leaves it
        #[arg(long, default_value = "dist")]
        dist: PathBuf,
    },
    /// Remove it; logs stay
    Down,
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
        run(Cli::parse())
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    let layout = || -> anyhow::Result<Layout> {
        let directory = std::path::absolute(&cli.directory).context("find the working directory")?;
        Ok(Layout::new(&directory))
    };
    match cli.command {
        Command::Up { programs, dist } => up(&layout()?, &programs, &dist),
        Command::Down => local::down(&layout()?),
        Command::Init { place } => local::init::run(&place),
        Command::Forward { target } => local::forward::run(target),
        Command::Import { archives, done } => local::import::run(&archives, &done),
    }
}

fn up(layout: &Layout, programs: &Path, dist: &Path) -> anyhow::Result<()> {
    let programs = std::path::absolute(programs).context("find the working directory")?;
    let directory = layout
        .root
        .parent()
        .context("the cluster's directory has no parent")?
        .join("images");
    let archives = images::write_all(dist, &programs, &directory)?;
    local::up(layout, &programs, &archives)?;
    println!("    export KUBECONFIG={}", layout.kubeconfig().display());
    println!("    kubectl: {}", programs.join("kubectl").display());
    Ok(())
}
