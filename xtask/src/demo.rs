//! `cargo xtask demo`: builds the agent and the demo, and runs it as root.
//!
//! The demo itself is `testkit::demo`. Only it runs as root: nothing of the build ever belongs to root.

use std::env;
use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

use crate::project;

/// Arguments of `cargo xtask demo`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Cargo profile to build with; the default shares what `make test` builds and compiles fastest.
    #[arg(long, default_value = "dev")]
    profile: String,
    /// Arguments for the demo, such as --seconds 60; `-- --help` lists them.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// Builds, and becomes the demo.
pub(crate) fn main(arguments: &Args) -> Result<ExitCode> {
    println!("==> Building the agent and the demo (a few minutes the first time)");
    let profile = arguments.profile.as_str();
    project::run(
        Command::new(env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")))
            .current_dir(project::root()?)
            .args(["build", "--profile", profile])
            .args(["--package", "ec-node-agent", "--bin", "node-agent"])
            .args(["--package", "ec-testkit", "--bin", "demo", "--bin", "traffic"]),
    )?;
    let directory = project::target_dir()?.join(if profile == "dev" { "debug" } else { profile });
    let demo = directory.join("demo");
    let mut command = if is_root() {
        Command::new(&demo)
    } else {
        println!("==> Loading kernel programs needs root: sudo may ask for your password");
        let mut sudo = Command::new("sudo");
        sudo.arg(&demo);
        sudo
    };
    command.args(&arguments.arguments);
    // Not a child: Ctrl-C is for the demo alone to answer.
    let error = command.exec();
    Err(error).with_context(|| {
        format!(
            "starting {} (not root: is sudo installed? else run `make demo` as root)",
            command.get_program().to_string_lossy()
        )
    })
}

fn is_root() -> bool {
    // SAFETY: no pointers involved.
    unsafe { libc::geteuid() == 0 }
}
