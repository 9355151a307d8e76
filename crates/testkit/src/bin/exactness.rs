//! The exactness test; see `testkit::exactness`.

use std::process::ExitCode;

use clap::Parser as _;
use testkit::exactness::run::{Options, require_file, run};

fn main() -> ExitCode {
    let options = Options::parse();
    let result = options
        .agent
        .as_deref()
        .map_or(Ok(()), require_file)
        .and_then(|()| run(&options));
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("exactness: {error:#}");
            println!("exactness: not carried out");
            ExitCode::from(2)
        }
    }
}
