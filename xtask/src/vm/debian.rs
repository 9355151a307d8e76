//! Kernels from Debian packages, without touching the machine's own package lists.
//!
//! A private source list names the suites that hold the kernel lines; apt checks signatures and checksums. Nothing is
//! installed: packages are downloaded and unpacked.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use crate::project::{output, output_text, run};

/// Suites with kernels, oldest first. `security` suites are in an archive of their own.
const SUITES: &[(&str, &str)] = &[
    ("debian", "bullseye"),
    ("debian-security", "bullseye-security"),
    ("debian", "bookworm"),
    ("debian-security", "bookworm-security"),
    ("debian", "trixie"),
    ("debian-security", "trixie-security"),
    ("debian", "trixie-backports"),
];
const DEFAULT_MIRROR: &str = "http://deb.debian.org";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The flavour for virtual machines: small, and the drivers we need are in it.
const FLAVOUR: &str = "-cloud-amd64";

/// Packages that together make one kernel; older releases have all in the first.
const PARTS: &[&str] = &["linux-image-", "linux-binary-", "linux-modules-"];

/// One downloaded package, for the record.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Package {
    /// Package name.
    pub(crate) name: String,
    /// Package version.
    pub(crate) version: String,
    /// Checksum of the `.deb`, in hex.
    pub(crate) sha256: String,
}

/// The private package lists.
pub(crate) struct Archive {
    directory: TempDir,
    names: Vec<String>,
}

impl Archive {
    /// Downloads the package lists (about 30 MB).
    pub(crate) fn open() -> Result<Self> {
        if !Path::new(KEYRING).exists() {
            bail!("{KEYRING} is missing: install the package debian-archive-keyring (`make setup` does)");
        }
        let mirror = env::var("EBPFCOLLECTOR_DEBIAN_MIRROR").unwrap_or_else(|_| DEFAULT_MIRROR.to_owned());
        let directory = tempfile::tempdir().context("making a directory for the package lists")?;
        for name in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(directory.path().join(name))?;
        }
        let sources: String = SUITES
            .iter()
            .map(|(archive, suite)| {
                format!("deb [arch=amd64 target=Packages signed-by={KEYRING}] {mirror}/{archive} {suite} main\n")
            })
            .collect();
        fs::write(directory.path().join("sources.list"), sources)?;
        let mut archive = Self {
            directory,
            names: Vec::new(),
        };
        println!("kernels: reading the Debian package lists from {mirror}");
        output(archive.apt("apt-get").arg("update")).context("reading the Debian package lists")?;
        let names = output_text(archive.apt("apt-cache").args(["pkgnames", "linux-"]))?;
        archive.names = names.lines().map(str::to_owned).collect();
        // apt calls an unreachable mirror a warning.
        if archive.names.is_empty() {
            bail!("no package list could be read from {mirror} (EBPFCOLLECTOR_DEBIAN_MIRROR names another mirror)");
        }
        Ok(archive)
    }

    /// The newest kernel release whose version starts with `prefix`, such as `6.1.0-56-cloud-amd64` for `6.1`.
    pub(crate) fn newest(&self, prefix: &str) -> Option<String> {
        newest(self.names.iter().map(String::as_str), prefix)
    }

    /// Downloads the packages of one release and unpacks them into `into`.
    pub(crate) fn unpack(&self, release: &str, into: &Path) -> Result<Vec<Package>> {
        let wanted: Vec<String> = PARTS
            .iter()
            .map(|part| format!("{part}{release}"))
            .filter(|name| self.names.iter().any(|known| known == name))
            .collect();
        let place = self.directory.path().join(release);
        fs::create_dir_all(&place)?;
        println!("kernels: downloading {}", wanted.join(", "));
        output(self.apt("apt-get").arg("download").args(&wanted).current_dir(&place))?;
        let mut packages = Vec::new();
        for entry in fs::read_dir(&place)? {
            let deb = entry?.path();
            run(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(into))?;
            packages.push(describe(&deb)?);
        }
        fs::remove_dir_all(&place)?;
        packages.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(packages)
    }

    fn apt(&self, program: &str) -> Command {
        let at = |name: &str| self.directory.path().join(name).display().to_string();
        let mut command = Command::new(program);
        for option in [
            format!("Dir::Etc::sourcelist={}", at("sources.list")),
            "Dir::Etc::sourceparts=-".to_owned(),
            format!("Dir::State::lists={}", at("lists")),
            format!("Dir::Cache={}", at("cache")),
            "Dir::State::status=/dev/null".to_owned(),
            "APT::Architecture=amd64".to_owned(),
            // The usual user for downloads cannot enter our private directory.
            "APT::Sandbox::User=root".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::Retries=3".to_owned(),
        ] {
            command.arg("-o").arg(option);
        }
        command
    }
}

fn describe(deb: &PathBuf) -> Result<Package> {
    let field = |name: &str| -> Result<String> {
        Ok(output_text(Command::new("dpkg-deb").arg("-f").arg(deb).arg(name))?
            .trim()
            .to_owned())
    };
    let sum = output_text(Command::new("sha256sum").arg(deb))?;
    let sha256 = sum
        .split_whitespace()
        .next()
        .context("sha256sum printed nothing")?
        .to_owned();
    Ok(Package {
        name: field("Package")?,
        version: field("Version")?,
        sha256,
    })
}

fn newest<'a>(names: impl Iterator<Item = &'a str>, prefix: &str) -> Option<String> {
    names
        .filter_map(|name| name.strip_prefix("linux-image-"))
        .filter(|release| release.ends_with(FLAVOUR))
        .filter(|release| match release.strip_prefix(prefix) {
            // `6.1` is neither `6.12` nor the meta package `6.1-cloud-amd64`.
            Some(rest) => !rest.starts_with(|c: char| c.is_ascii_digit()) && (rest != FLAVOUR || dots(prefix) > 1),
            None => false,
        })
        .max_by_key(|release| numbers(release))
        .map(str::to_owned)
}

fn dots(text: &str) -> usize {
    text.matches('.').count()
}

/// The numbers in a release, in order: enough to compare releases of one naming scheme.
fn numbers(release: &str) -> Vec<u64> {
    let release = release.trim_end_matches(FLAVOUR);
    release
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|part| part.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newest_compares_numbers_and_skips_meta_packages() {
        let names = [
            "linux-image-6.1-cloud-amd64",
            "linux-image-6.1.0-0.deb11.52-cloud-amd64",
            "linux-image-6.1.0-9-cloud-amd64",
            "linux-image-6.1.0-56-cloud-amd64",
            "linux-image-6.1.0-99-amd64",
            "linux-image-6.12-cloud-amd64",
            "linux-image-6.12.117+deb12-cloud-amd64",
            "linux-image-6.12.117+deb13-cloud-amd64",
            "linux-image-6.12.94+deb13-cloud-amd64",
            "linux-image-6.12.200+deb13-cloud-amd64-unsigned",
        ];
        let find = |prefix| newest(names.iter().copied(), prefix);
        assert_eq!(find("6.1").as_deref(), Some("6.1.0-56-cloud-amd64"));
        assert_eq!(find("6.12").as_deref(), Some("6.12.117+deb13-cloud-amd64"));
        assert_eq!(find("6.12.94").as_deref(), Some("6.12.94+deb13-cloud-amd64"));
        assert_eq!(find("6.1.0-9").as_deref(), Some("6.1.0-9-cloud-amd64"));
        assert_eq!(find("6.1.0-9-cloud-amd64").as_deref(), Some("6.1.0-9-cloud-amd64"));
        assert_eq!(find("7.3"), None);
    }
}
