//! From what the user asked for to a kernel image and its modules on disk.
//!
//! ```text
//! kernels/lines.json               which release a line or version means, and since when
//! kernels/<release>/vmlinuz        unpacked once
//! kernels/<release>/lib/modules/   with the dependency list that depmod makes
//! kernels/<release>/record.json    packages, versions and checksums it came from; written last
//! ```
//! All of it lies in the project's cache directory, outside the checkout.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::debian::{Archive, Package};
use crate::project;

/// The kernels we promise to run on. To add one, add its line here.
pub(crate) const LINES: &[&str] = &["5.10", "6.1", "6.12", "7.3"];

/// How long a line keeps meaning the same release before the mirror is asked again.
const FRESH: Duration = Duration::from_secs(7 * 24 * 3600);

/// A kernel that can be booted.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    /// As the user named it; made fit for a file name.
    pub(crate) name: String,
    /// What `uname -r` says in the machine.
    pub(crate) release: String,
    /// The image.
    pub(crate) image: PathBuf,
    /// `lib/modules/<release>`, when there is one.
    pub(crate) modules: Option<PathBuf>,
}

/// Which release a name means.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Lines(BTreeMap<String, Line>);

#[derive(Debug, Serialize, Deserialize)]
struct Line {
    release: String,
    /// Seconds since the epoch.
    asked: u64,
}

/// Where a kernel came from.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    release: String,
    packages: Vec<Package>,
}

/// Makes every wanted kernel ready to boot, downloading what is missing.
pub(crate) fn resolve(wanted: &[String], update: bool) -> Result<Vec<Kernel>> {
    let directory = directory()?;
    fs::create_dir_all(&directory).with_context(|| format!("creating {}", directory.display()))?;
    let mut lines = read_lines(&directory)?;
    // The package lists are read once, and only if something is missing or old.
    let mut archive: Option<Archive> = None;
    let mut kernels = Vec::new();
    for name in wanted {
        if name.contains('/') || Path::new(name).is_file() {
            kernels.push(from_image(Path::new(name))?);
            continue;
        }
        let known = lines
            .0
            .get(name)
            .filter(|line| record_path(&directory, &line.release).exists());
        let fresh = known.is_some_and(|line| now().saturating_sub(line.asked) < FRESH.as_secs());
        let release = match known.map(|line| line.release.clone()) {
            Some(release) if fresh && !update => release,
            known => match ask(&mut archive, name) {
                Ok(release) => {
                    lines.0.insert(
                        name.clone(),
                        Line {
                            release: release.clone(),
                            asked: now(),
                        },
                    );
                    release
                }
                // An older kernel of the line is better than none, and a cached one needs no network.
                Err(error) => {
                    let release = known.ok_or(error)?;
                    println!("kernels: {name}: the mirror gave no answer, taking {release} from the cache");
                    release
                }
            },
        };
        if !record_path(&directory, &release).exists() {
            download(open(&mut archive)?, &directory, &release)?;
        }
        write_lines(&directory, &lines)?;
        kernels.push(cached(&directory, name, &release));
    }
    Ok(kernels)
}

/// Prints the lines and what the cache holds.
pub(crate) fn list() -> Result<()> {
    let directory = directory()?;
    let lines = read_lines(&directory)?;
    let others = lines.0.keys().map(String::as_str).filter(|name| !LINES.contains(name));
    for name in LINES.iter().copied().chain(others) {
        let record = lines
            .0
            .get(name)
            .and_then(|line| fs::read(record_path(&directory, &line.release)).ok());
        let Some(record) = record else {
            println!("{name:<8} not downloaded yet");
            continue;
        };
        let record: Record = serde_json::from_slice(&record).context("reading the record of a cached kernel")?;
        println!(
            "{name:<8} {}  {}",
            record.release,
            directory.join(&record.release).display()
        );
        for package in record.packages {
            println!(
                "         {} {} sha256:{}",
                package.name, package.version, package.sha256
            );
        }
    }
    Ok(())
}

fn directory() -> Result<PathBuf> {
    Ok(project::cache_dir()?.join("kernels"))
}

fn record_path(directory: &Path, release: &str) -> PathBuf {
    directory.join(release).join("record.json")
}

fn read_lines(directory: &Path) -> Result<Lines> {
    let path = directory.join("lines.json");
    match fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text).with_context(|| format!("reading {}", path.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Lines::default()),
        Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
    }
}

fn write_lines(directory: &Path, lines: &Lines) -> Result<()> {
    let path = directory.join("lines.json");
    let fresh = directory.join(format!("lines.json.{}", std::process::id()));
    fs::write(&fresh, serde_json::to_vec_pretty(lines)?).with_context(|| format!("writing {}", fresh.display()))?;
    fs::rename(&fresh, &path).with_context(|| format!("writing {}", path.display()))
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |age| age.as_secs())
}

fn open(archive: &mut Option<Archive>) -> Result<&Archive> {
    match archive {
        Some(archive) => Ok(archive),
        None => Ok(archive.insert(Archive::open()?)),
    }
}

fn ask(archive: &mut Option<Archive>, name: &str) -> Result<String> {
    open(archive)?
        .newest(name)
        .with_context(|| format!("no Debian cloud kernel {name} in bullseye, bookworm, trixie or their updates"))
}

fn download(archive: &Archive, directory: &Path, release: &str) -> Result<()> {
    let unpacked = tempfile::tempdir_in(directory).context("making a directory to unpack to")?;
    let packages = archive.unpack(release, unpacked.path())?;
    let place = directory.join(release);
    if place.exists() {
        fs::remove_dir_all(&place).with_context(|| format!("removing the incomplete {}", place.display()))?;
    }
    let modules = place.join("lib/modules").join(release);
    fs::create_dir_all(place.join("lib/modules"))?;
    let source = first_existing(
        unpacked.path(),
        &[&format!("lib/modules/{release}"), &format!("usr/lib/modules/{release}")],
    )?;
    let image = first_existing(
        unpacked.path(),
        &[
            &format!("boot/vmlinuz-{release}"),
            &format!("usr/lib/modules/{release}/vmlinuz"),
        ],
    )?;
    fs::rename(&image, place.join("vmlinuz")).context("taking the kernel image")?;
    fs::rename(&source, &modules).context("taking the modules")?;
    // It complains about lists that some packages leave out and that we do not need.
    // On some systems only root's PATH has it, but anybody may run it.
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    project::output(
        Command::new("depmod")
            .arg("-b")
            .arg(&place)
            .arg(release)
            .env("PATH", path),
    )?;
    let record = Record {
        release: release.to_owned(),
        packages,
    };
    fs::write(record_path(directory, release), serde_json::to_vec_pretty(&record)?)?;
    println!("kernels: {release} is ready");
    Ok(())
}

fn first_existing(below: &Path, candidates: &[&str]) -> Result<PathBuf> {
    match candidates
        .iter()
        .map(|name| below.join(name))
        .find(|path| path.exists())
    {
        Some(path) => Ok(path),
        None => bail!("the packages hold none of {}", candidates.join(", ")),
    }
}

fn cached(directory: &Path, name: &str, release: &str) -> Kernel {
    let place = directory.join(release);
    Kernel {
        name: name.to_owned(),
        release: release.to_owned(),
        image: place.join("vmlinuz"),
        modules: Some(place.join("lib/modules").join(release)),
    }
}

/// A kernel image of the user's own. Its modules are looked for where kernels are built and installed to.
fn from_image(image: &Path) -> Result<Kernel> {
    let release = image_release(image).with_context(|| format!("--kernel {}", image.display()))?;
    let above = image.parent().unwrap_or(Path::new("."));
    let modules = [above.join("lib/modules"), above.join("../lib/modules")]
        .into_iter()
        .map(|modules| modules.join(&release))
        .find(|modules| modules.join("modules.dep").exists());
    if modules.is_none() {
        println!(
            "kernels: no modules of {release} beside {}: only what is built in is there",
            image.display()
        );
    }
    Ok(Kernel {
        name: release.clone(),
        release,
        image: image.to_path_buf(),
        modules,
    })
}

/// The release written in the header of an x86 boot image.
fn image_release(image: &Path) -> Result<String> {
    const MAGIC_AT: usize = 0x202;
    const VERSION_AT: usize = 0x20e;
    let mut head = Vec::new();
    fs::File::open(image)
        .context("opening")?
        .take(1 << 16)
        .read_to_end(&mut head)
        .context("reading")?;
    if head.get(MAGIC_AT..MAGIC_AT + 4) != Some(b"HdrS") {
        bail!("not an x86 kernel image (bzImage)");
    }
    let Some(&[low, high]) = head.get(VERSION_AT..VERSION_AT + 2) else {
        bail!("the header is cut off")
    };
    let start = usize::from(u16::from_le_bytes([low, high])) + 0x200;
    let text = head.get(start..).context("the header points outside the file")?;
    let release: Vec<u8> = text
        .iter()
        .copied()
        .take_while(|byte| byte.is_ascii_graphic())
        .collect();
    if release.is_empty() {
        bail!("the header names no release");
    }
    Ok(String::from_utf8(release)?)
}
