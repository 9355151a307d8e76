//! Project chores that deserve types: `cargo xtask <chore> --help`.
//!
//! - [`vm`] runs a program on real kernels in QEMU;
//! - [`dist`] builds the static binaries that virtual machines and the image take.

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
    /// Build the static binaries into dist/.
    Dist(dist::Args),
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
        Chore::Dist(arguments) => dist::main(&arguments),
    }
}
