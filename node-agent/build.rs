//! Compiles the kernel programs and puts one object per plugin into `OUT_DIR`.
//!
//! ```text
//! ebpf-programs/Cargo.toml [[bin]] names ▶ cargo build --target bpfel-unknown-none ▶ OUT_DIR/<bin name>
//! ```
//! User space embeds an object with `aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/<bin name>"))`.
//!
//! To add an object: add `src/bin/<name>.rs` and a `[[bin]]` section with that name to `ebpf-programs/Cargo.toml`.
//! Nothing changes here.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// The package that holds the kernel programs, and its directory below the workspace root.
const PROGRAMS_PACKAGE: &str = "ec-ebpf-programs";
const PROGRAMS_DIR: &str = "ebpf-programs";

/// What the objects are compiled from, relative to the workspace root.
const INPUTS: &[&str] = &[
    PROGRAMS_DIR,
    "crates/ebpf-common",
    "Cargo.toml",
    "Cargo.lock",
    "rust-toolchain.toml",
];

/// Settings of the surrounding build that must not reach the nested one: they are meant for the host's compiler
/// (static linking, clippy as compiler, a coverage or cache wrapper) and would break or slow the kernel target.
const HOST_ONLY_VARIABLES: &[&str] = &[
    "CARGO_BUILD_RUSTC_WRAPPER",
    "CARGO_BUILD_RUSTC_WORKSPACE_WRAPPER",
    "CARGO_BUILD_RUSTFLAGS",
    "CARGO_BUILD_TARGET",
    "CARGO_BUILD_TARGET_DIR",
    "CARGO_TARGET_DIR",
    "CLIPPY_ARGS",
    "RUSTC_WORKSPACE_WRAPPER",
    "RUSTC_WRAPPER",
    "RUSTFLAGS",
];

fn main() -> Result<()> {
    let root = workspace_root()?;
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").context("OUT_DIR is not set: run this through cargo")?);

    for input in INPUTS {
        println!("cargo::rerun-if-changed={}", root.join(input).display());
    }
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=EBPFCOLLECTOR_CACHE");

    let objects = object_names(&root.join(PROGRAMS_DIR).join("Cargo.toml"))?;
    let built = compile(&root)?;
    for name in objects {
        let from = built.join(&name);
        fs::copy(&from, out_dir.join(&name))
            .with_context(|| format!("copying the kernel object {}", from.display()))?;
    }
    Ok(())
}

fn workspace_root() -> Result<PathBuf> {
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").context("CARGO_MANIFEST_DIR is not set")?);
    manifest
        .parent()
        .map(Path::to_path_buf)
        .with_context(|| format!("{} has no parent directory", manifest.display()))
}

/// The `name` of every `[[bin]]` section. The manifest is ours, so its plain form is enough to read.
fn object_names(manifest: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(manifest).with_context(|| format!("reading {}", manifest.display()))?;
    let mut names = Vec::new();
    let mut in_bin = false;
    for line in text.lines().map(str::trim) {
        if line.starts_with('[') {
            in_bin = line == "[[bin]]";
        } else if in_bin
            && let Some((key, value)) = line.split_once('=')
            && key.trim() == "name"
        {
            names.push(value.trim().trim_matches('"').to_owned());
        }
    }
    if names.is_empty() {
        bail!(
            "{} names no [[bin]]: there is no kernel object to build",
            manifest.display()
        );
    }
    Ok(names)
}

/// Builds all objects and returns the directory they are in.
fn compile(root: &Path) -> Result<PathBuf> {
    let target = match env::var("CARGO_CFG_TARGET_ENDIAN").as_deref() {
        Ok("big") => "bpfeb-unknown-none",
        _ => "bpfel-unknown-none",
    };
    let arch = env::var("CARGO_CFG_TARGET_ARCH").context("CARGO_CFG_TARGET_ARCH is not set")?;
    // Its own directory: the surrounding cargo holds the lock of the usual one. One for all profiles, because the
    // objects do not depend on the profile of the agent.
    let target_dir = match env::var_os("CARGO_TARGET_DIR").map(PathBuf::from) {
        Some(dir) if dir.is_absolute() => dir.join("bpf"),
        _ => root.join("target/bpf"),
    };
    let flags = [
        // BTF is made from debug information by bpf-linker.
        "-C",
        "debuginfo=2",
        "-C",
        "link-arg=--btf",
        "--cfg",
        &format!("bpf_target_arch=\"{arch}\""),
    ]
    .join("\x1f");

    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")));
    cargo
        .current_dir(root)
        .args([
            "build",
            "--release",
            "--package",
            PROGRAMS_PACKAGE,
            "--bins",
            "--target",
            target,
        ])
        .args(["-Z", "build-std=core", "--target-dir"])
        .arg(&target_dir);
    for name in HOST_ONLY_VARIABLES {
        cargo.env_remove(name);
    }
    cargo
        .env("PATH", path_with_linker()?)
        // The pinned stable compiler builds `core` for a target it ships no library for.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", flags);

    let status = cargo.status().with_context(|| format!("starting {cargo:?}"))?;
    if !status.success() {
        bail!(
            "building the kernel programs failed ({status}); the compiler's messages are above. If it names a missing \
             rust-src or a linker problem, run `make setup`"
        );
    }
    Ok(target_dir.join(target).join("release"))
}

/// The search path with the directory of `bpf-linker` first: the one `make setup` installed, else any on `PATH`.
fn path_with_linker() -> Result<OsString> {
    let path = env::var_os("PATH").unwrap_or_default();
    let cache = cache_dir().map(|dir| dir.join("bin"));
    let candidates: Vec<PathBuf> = cache.iter().cloned().chain(env::split_paths(&path)).collect();
    if !candidates.iter().any(|dir| dir.join("bpf-linker").is_file()) {
        bail!(
            "bpf-linker was found neither on PATH nor in {}: run `make setup`",
            cache.map_or_else(|| "the cache directory".to_owned(), |dir| dir.display().to_string())
        );
    }
    env::join_paths(candidates).context("joining PATH")
}

/// Where `make setup` keeps what it installs; the same rule as in `scripts/lib.sh`.
fn cache_dir() -> Option<PathBuf> {
    let from = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    from("EBPFCOLLECTOR_CACHE")
        .or_else(|| from("XDG_CACHE_HOME").map(|dir| dir.join("ebpf-collector")))
        .or_else(|| from("HOME").map(|dir| dir.join(".cache/ebpf-collector")))
}
