//! Places of the project, and running other programs with errors that say what was run.

use std::env;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// The target of every static binary.
pub(crate) const STATIC_TARGET: &str = "x86_64-unknown-linux-gnu";

/// The workspace root.
pub(crate) fn root() -> Result<PathBuf> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest
        .parent()
        .map(Path::to_path_buf)
        .context("xtask is not inside a workspace")
}

/// Cargo's target directory.
pub(crate) fn target_dir() -> Result<PathBuf> {
    Ok(root()?.join(env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into())))
}

/// Where `make setup` and the chores keep what is costly to get; the same rule as in `scripts/lib.sh`.
pub(crate) fn cache_dir() -> Result<PathBuf> {
    let from = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    from("EBPFCOLLECTOR_CACHE")
        .or_else(|| from("XDG_CACHE_HOME").map(|dir| dir.join("ebpf-collector")))
        .or_else(|| from("HOME").map(|dir| dir.join(".cache/ebpf-collector")))
        .context("none of EBPFCOLLECTOR_CACHE, XDG_CACHE_HOME and HOME is set: there is no place for the cache")
}

/// Runs a program to its end, its output on ours.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| not_started(command))?;
    if !status.success() {
        bail!("{} failed: {status}", shown(command));
    }
    Ok(())
}

/// Runs a program and returns its standard output; what it wrote to standard error is part of the error.
pub(crate) fn output(command: &mut Command) -> Result<Vec<u8>> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| not_started(command))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{} failed: {}\n{}", shown(command), output.status, stderr.trim_end());
    }
    Ok(output.stdout)
}

/// Like [`output`], for text.
pub(crate) fn output_text(command: &mut Command) -> Result<String> {
    let bytes = output(command)?;
    String::from_utf8(bytes).with_context(|| format!("{} did not print UTF-8", shown(command)))
}

/// Builds the binaries of packages so that they need no shared library, and returns the directory they are in.
pub(crate) fn build_static(packages: &[&str], profile: &str, quiet: bool) -> Result<PathBuf> {
    let target_dir = target_dir()?;
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")));
    command
        .current_dir(root()?)
        .args(["build", "--bins", "--profile", profile]);
    if quiet {
        command.arg("--quiet");
    }
    for package in packages {
        command.args(["--package", package]);
    }
    command
        .args(["--target", STATIC_TARGET, "--target-dir"])
        .arg(&target_dir)
        .env("RUSTFLAGS", "-C target-feature=+crt-static");
    run(&mut command)?;
    let directory = if profile == "dev" { "debug" } else { profile };
    Ok(target_dir.join(STATIC_TARGET).join(directory))
}

fn not_started(command: &Command) -> String {
    format!(
        "starting {} (is it installed? `make setup` does)",
        command.get_program().to_string_lossy()
    )
}

fn shown(command: &Command) -> String {
    let words: Vec<_> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(OsStr::to_string_lossy)
        .collect();
    words.join(" ")
}
