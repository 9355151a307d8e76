//! The clock test; see `testkit::clockstep`.

use std::process::ExitCode;

use clap::Parser as _;
use testkit::clockstep::{Options, run};

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("clockstep: {error:#}");
            println!("clockstep: not carried out");
            ExitCode::from(2)
        }
    }
}
