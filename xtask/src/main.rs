//! Project chores that deserve types: `cargo xtask <chore> --help`.
//!
//! - [`vm`] runs a program on real kernels in QEMU;
//! - [`bench`] measures speed and memory with and without the agent;
//! - [`crds`] writes the custom resource definition;
//! - [`demo`] builds and runs the demo;
//! - [`dist`] builds the static binaries that virtual machines and the image take.

mod bench;
mod crds;
mod demo;
mod dist;
mod project;
mod vm;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Project chores", max_term_width = 120)]
struct Cli {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Run a program on real kernels in QEMU.
    Vm(vm::Args),
    /// Watch this machine's traffic for 20 s, delivered to a DataWay stub (needs root or sudo).
    Demo(demo::Args),
    /// Build the static binaries into dist/.
    Dist(dist::Args),
    /// Measure speed and memory with and without the agent, and write docs/PERFORMANCE.md.
    Bench(bench::Args),
    /// Write the custom resource definition into crds/.
    Crds(crds::Args),
}

fn main() -> ExitCode {
    run(Cli::parse()).unwrap_or_else(|error| {
        eprintln!("cargo xtask: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(cli: Cli) -> Result<ExitCode> {
    match cli.chore {
        Chore::Vm(arguments) => vm::main(&arguments),
        Chore::Demo(arguments) => demo::main(&arguments),
        Chore::Dist(arguments) => dist::main(&arguments),
        Chore::Bench(arguments) => bench::main(&arguments),
        Chore::Crds(arguments) => crds::main(&arguments),
    }
}
