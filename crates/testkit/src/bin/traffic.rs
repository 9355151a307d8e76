//! Counting clients and servers; see `testkit::traffic`.

use clap::Parser as _;

fn main() -> anyhow::Result<()> {
    testkit::traffic::cli::run(&testkit::traffic::cli::Cli::parse())
}
