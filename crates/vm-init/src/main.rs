//! `/init` of the virtual machines that `cargo xtask vm` boots.
//!
//! ```text
//! mount the usual file systems ▶ load modules ▶ bring `lo` up ▶ run the command ▶ send /out back ▶ power off
//! ```
//! It is linked statically and is, with the command itself, all the user space there is. What to do comes from
//! [`config`], the answer leaves over two serial lines: `ttyS0` carries the console and the result line
//! `vm-init: exit code N`, `ttyS1` the files that the command left in `/out` (framed as in [`results`]).

mod config;
mod results;
mod system;

use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::config::Config;

/// Exit code reported when the command could not be run at all (as shells do).
const CANNOT_RUN: i32 = 127;

fn main() {
    let code = match run() {
        Ok(code) => code,
        Err(error) => {
            say(&format!("vm-init: {error:#}"));
            CANNOT_RUN
        }
    };
    if let Err(error) = results::send() {
        say(&format!(
            "vm-init: files in {} were not sent back: {error:#}",
            results::DIRECTORY
        ));
    }
    say(&format!("vm-init: exit code {code}"));
    system::power_off();
}

fn run() -> Result<i32> {
    system::mount_all();
    let config = Config::load()?;
    let start = Instant::now();
    for module in &config.modules {
        if let Err(error) = system::load_module(module) {
            say(&format!("vm-init: module {module} not loaded: {error:#}"));
        }
    }
    system::bring_loopback_up().context("bringing lo up")?;
    std::fs::create_dir_all(results::DIRECTORY).with_context(|| format!("creating {}", results::DIRECTORY))?;
    say(&format!(
        "vm-init: ready, {} modules in {} ms",
        config.modules.len(),
        start.elapsed().as_millis()
    ));

    let (program, arguments) = config.command.split_first().context("no command was given")?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .envs(config.environment.iter().map(|(name, value)| (name, value)));
    let child = command.spawn().with_context(|| format!("starting {program}"))?;
    let pid = i32::try_from(child.id()).context("process id out of range")?;
    // The loop of the first process: orphans are ours to bury, the command's status is the answer.
    loop {
        let (ended, status) = system::wait_any()?;
        if ended == pid {
            return Ok(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)));
        }
    }
}

/// Writes a line to the console. There is nobody to tell when that fails.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}");
    let _ = out.flush();
}
