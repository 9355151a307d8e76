//! `cargo xtask dist`: the static binaries, in `dist/`.
//!
//! They run on any kernel we support without a root file system, so the virtual machines, the image and a release all
//! take them from there. `dist/test/` holds the test tools, which machines and native tests use and no image contains.

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result};

use crate::project;

/// What we ship: packages, and the binaries they have.
const PACKAGES: &[&str] = &["ec-node-agent", "ec-aggregator", "ec-operator"];
const BINARIES: &[&str] = &["node-agent", "aggregator", "operator"];

/// What tests use.
const TEST_PACKAGES: &[&str] = &["ec-testkit"];
const TEST_BINARIES: &[&str] = &["chain", "clockstep", "dataway-stub", "exactness", "pause", "traffic"];

/// Root certificates that binaries without a system around them trust, from this machine.
const CERTIFICATES: &str = "/etc/ssl/certs/ca-certificates.crt";

/// Arguments of `cargo xtask dist`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Cargo profile to build with.
    #[arg(long, default_value = "release")]
    profile: String,
    /// Build the test tools too, into dist/test/.
    #[arg(long)]
    with_tests: bool,
}

/// Builds everything and copies it into place.
pub(crate) fn main(arguments: &Args) -> Result<ExitCode> {
    let directory = project::root()?.join("dist");
    build(PACKAGES, BINARIES, &arguments.profile, &directory)?;
    let certificates = directory.join("ca-certificates.crt");
    fs::copy(CERTIFICATES, certificates)
        .with_context(|| format!("copying {CERTIFICATES}: install ca-certificates (`make setup` does)"))?;
    if arguments.with_tests {
        build(
            TEST_PACKAGES,
            TEST_BINARIES,
            &arguments.profile,
            &directory.join("test"),
        )?;
    }
    Ok(ExitCode::SUCCESS)
}

fn build(packages: &[&str], binaries: &[&str], profile: &str, directory: &Path) -> Result<()> {
    let start = Instant::now();
    let built = project::build_static(packages, profile, false)?;
    fs::create_dir_all(directory).with_context(|| format!("creating {}", directory.display()))?;
    for binary in binaries {
        // A running copy cannot be written to, but it can be replaced.
        let fresh = directory.join(format!(".{binary}.new"));
        let place = directory.join(binary);
        // Function names stay for backtraces; line tables are two thirds of the size and stay in target/.
        project::run(
            Command::new("strip")
                .arg("--strip-debug")
                .arg("-o")
                .arg(&fresh)
                .arg(built.join(binary)),
        )?;
        fs::rename(&fresh, &place).with_context(|| format!("writing {}", place.display()))?;
        let size = fs::metadata(&place)?.len() as f64 / f64::from(1 << 20);
        println!("{}: {size:.1} MiB", place.display());
    }
    println!("{} after {:.0} s", packages.join(", "), start.elapsed().as_secs_f64());
    Ok(())
}
