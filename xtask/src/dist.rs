//! `cargo xtask dist`: the static binaries, in `dist/`.
//!
//! They run on any kernel we support without a root file system, so the virtual machines, the image and a release all
//! take them from there.

use std::fs;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::project;

/// Package and binary of everything we ship.
const BINARIES: &[(&str, &str)] = &[
    ("ec-node-agent", "node-agent"),
    ("ec-aggregator", "aggregator"),
    ("ec-operator", "operator"),
];

/// Arguments of `cargo xtask dist`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Cargo profile to build with.
    #[arg(long, default_value = "release")]
    profile: String,
}

/// Builds everything and copies it into place.
pub(crate) fn main(arguments: &Args) -> Result<ExitCode> {
    let directory = project::root()?.join("dist");
    fs::create_dir_all(&directory).with_context(|| format!("creating {}", directory.display()))?;
    for (package, binary) in BINARIES {
        let start = Instant::now();
        let built = project::build_static(package, binary, &arguments.profile)?;
        let place = directory.join(binary);
        // A running copy cannot be written to, but it can be replaced.
        let fresh = directory.join(format!(".{binary}.new"));
        fs::copy(&built, &fresh).with_context(|| format!("copying {}", built.display()))?;
        fs::rename(&fresh, &place).with_context(|| format!("writing {}", place.display()))?;
        let size = fs::metadata(&place)?.len();
        println!(
            "dist/{binary}: {:.1} MiB, {:.0} s",
            size as f64 / f64::from(1 << 20),
            start.elapsed().as_secs_f64()
        );
    }
    Ok(ExitCode::SUCCESS)
}
