//! The chain under faults; see `testkit::chain`.

use std::process::ExitCode;

use clap::Parser as _;
use testkit::chain::run::{Options, run};

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("chain: {error:#}");
            println!("chain: not carried out");
            ExitCode::from(2)
        }
    }
}
