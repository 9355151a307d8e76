//! The user space of a machine: a cpio archive with `/init`, the program, its files and the kernel's modules.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::Job;
use super::kernel::Kernel;
use super::modules;
use crate::project;

/// Where programs go in the machine.
const BIN: &str = "/bin";
/// The environment every program starts with; `--env` comes after.
const ENVIRONMENT: &[&str] = &["PATH=/bin", "HOME=/tmp", "RUST_BACKTRACE=1", "TERM=dumb"];

/// Writes the archive for one kernel and one job.
pub(crate) fn write(path: &Path, kernel: &Kernel, job: &Job) -> Result<()> {
    let file = File::create(path).with_context(|| format!("creating {}", path.display()))?;
    let mut archive = Archive::new(BufWriter::new(file));
    let mut config = String::new();

    let init = project::build_static(&["ec-vm-init"], "release", true)?.join("vm-init");
    archive.file("/init", 0o755, &read(&init)?)?;
    // The kernel opens the console before anything is mounted.
    archive.character_device("/dev/console", 5, 1)?;

    if let Some(directory) = &kernel.modules {
        for path in modules::needed(directory, &job.modules)? {
            let place = format!("/modules/{}.ko", modules::module_name(&path.to_string_lossy()));
            archive.file(&place, 0o644, &modules::read(&path)?)?;
            line(&mut config, "module", &place)?;
        }
    }
    let (program, arguments) = job.command.split_first().context("the job has no program")?;
    let place = archive.program(Path::new(program))?;
    for tool in &job.tools {
        archive.program(&find(tool)?)?;
    }
    for (host, guest) in &job.files {
        archive.file(guest, 0o755, &read(host)?)?;
    }

    for pair in ENVIRONMENT
        .iter()
        .copied()
        .chain(job.environment.iter().map(String::as_str))
    {
        line(&mut config, "env", pair)?;
    }
    for word in std::iter::once(&place).chain(arguments) {
        line(&mut config, "arg", word)?;
    }
    archive.file("/vm-init.conf", 0o644, config.as_bytes())?;
    archive
        .finish()?
        .flush()
        .with_context(|| format!("writing {}", path.display()))
}

fn line(config: &mut String, key: &str, value: &str) -> Result<()> {
    if value.contains('\n') {
        bail!("{value:?} holds a line break, which cannot be passed to the machine");
    }
    config.push_str(&format!("{key} {value}\n"));
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("reading {}", path.display()))
}

/// A program of the host by path or by its name on `PATH`.
fn find(tool: &str) -> Result<PathBuf> {
    if tool.contains('/') {
        return Ok(PathBuf::from(tool));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .map(|directory| directory.join(tool))
        .find(|path| path.is_file());
    found.with_context(|| format!("--tool {tool}: not found on PATH"))
}

/// The shared libraries a program needs, as paths of the host; none for a static one.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("starting ldd")?;
    // ldd fails for static programs and for scripts; neither has libraries.
    let text = String::from_utf8_lossy(&output.stdout);
    if let Some(missing) = text.lines().find(|line| line.contains("not found")) {
        bail!(
            "{} cannot run on this host either: {}",
            program.display(),
            missing.trim()
        );
    }
    let words = text
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    Ok(words.map(PathBuf::from).collect())
}

/// A writer of the `newc` format that the kernel reads.
struct Archive<W: Write> {
    out: W,
    /// Everything written so far: directories are made once, files of the same place are written once.
    seen: BTreeSet<String>,
    length: usize,
}

impl<W: Write> Archive<W> {
    fn new(out: W) -> Self {
        Self {
            out,
            seen: BTreeSet::new(),
            length: 0,
        }
    }

    /// Adds a program of the host with its libraries and returns its place in the machine.
    fn program(&mut self, host: &Path) -> Result<String> {
        let name = host
            .file_name()
            .with_context(|| format!("{} names no file", host.display()))?;
        let place = format!("{BIN}/{}", name.to_string_lossy());
        self.file(&place, 0o755, &read(host)?)?;
        for library in libraries(host)? {
            self.file(&library.to_string_lossy(), 0o755, &read(&library)?)?;
        }
        Ok(place)
    }

    fn file(&mut self, place: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.directories_above(place)?;
        if self.seen.insert(place.to_owned()) {
            self.entry(place, 0o100_000 | mode, (0, 0), content)?;
        }
        Ok(())
    }

    fn character_device(&mut self, place: &str, major: u32, minor: u32) -> Result<()> {
        self.directories_above(place)?;
        self.entry(place, 0o020_600, (major, minor), &[])
    }

    fn directories_above(&mut self, place: &str) -> Result<()> {
        for (end, _) in place.match_indices('/').filter(|(end, _)| *end > 0) {
            let directory = place.get(..end).context("a path that is no text")?.to_owned();
            if self.seen.insert(directory.clone()) {
                self.entry(&directory, 0o040_755, (0, 0), &[])?;
            }
        }
        Ok(())
    }

    fn entry(&mut self, place: &str, mode: u32, device: (u32, u32), content: &[u8]) -> Result<()> {
        let name = place.trim_start_matches('/');
        let size = u32::try_from(content.len()).with_context(|| format!("{place} is larger than 4 GiB"))?;
        let inode = u32::try_from(self.seen.len()).context("too many files")?;
        let links = 1;
        let fields = [
            inode,
            mode,
            0,
            0,
            links,
            0,
            size,
            0,
            0,
            device.0,
            device.1,
            u32::try_from(name.len() + 1)?,
            0,
        ];
        let mut head = b"070701".to_vec();
        for field in fields {
            write!(head, "{field:08x}")?;
        }
        head.extend_from_slice(name.as_bytes());
        head.push(0);
        self.padded(&head)?;
        self.padded(content)
    }

    /// Writes bytes and fills up to a multiple of four.
    fn padded(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes)?;
        let fill = bytes.len().next_multiple_of(4) - bytes.len();
        self.out.write_all(&vec![0; fill])?;
        self.length += bytes.len() + fill;
        Ok(())
    }

    fn finish(mut self) -> Result<W> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        let fill = self.length.next_multiple_of(512) - self.length;
        self.out.write_all(&vec![0; fill])?;
        Ok(self.out)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::process::Stdio;

    use super::*;

    #[test]
    fn cpio_reads_the_archive() {
        let mut archive = Archive::new(Vec::new());
        archive.file("/init", 0o755, b"12345").unwrap();
        archive.file("/a/b/c", 0o644, b"").unwrap();
        archive.file("/a/b/c", 0o644, b"written once").unwrap();
        archive.file("/a/b/d", 0o644, &[7; 1000]).unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 512, 0);

        let Ok(mut cpio) = Command::new("cpio")
            .args(["-it", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
        else {
            // cpio is a second opinion; the kernel itself is the judge in every run.
            return;
        };
        cpio.stdin.take().unwrap().write_all(&bytes).unwrap();
        let output = cpio.wait_with_output().unwrap();
        assert!(output.status.success());
        assert_eq!(
            String::from_utf8(output.stdout).unwrap(),
            "init\na\na/b\na/b/c\na/b/d\n"
        );
    }

    #[test]
    fn line_breaks_are_refused() {
        assert!(line(&mut String::new(), "arg", "a\nb").is_err());
    }
}
