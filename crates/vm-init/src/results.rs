//! Sends the files of [`DIRECTORY`] to the host over the second serial line.
//!
//! Per file: a line `file <size in bytes> <path below the directory>`, then exactly that many bytes. At the end a line
//! `end`, so that the host can tell a complete answer from a machine that died while sending.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::system;

/// What the command leaves here goes back to the host.
pub(crate) const DIRECTORY: &str = "/out";
const LINE: &str = "/dev/ttyS1";

/// Sends all regular files below [`DIRECTORY`], in sorted order.
pub(crate) fn send() -> Result<()> {
    let tty = File::options()
        .write(true)
        .open(LINE)
        .with_context(|| format!("opening {LINE}"))?;
    system::make_raw(&tty).with_context(|| format!("setting {LINE} to raw mode"))?;
    let mut out = BufWriter::new(&tty);
    write_all(Path::new(DIRECTORY), &mut out)?;
    out.flush().context("flushing")?;
    drop(out);
    system::drain(&tty).context("draining the serial line")
}

fn write_all(directory: &Path, out: &mut impl Write) -> Result<()> {
    for path in files_below(directory)? {
        let mut file = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
        let size = file.metadata()?.len();
        let name = path.strip_prefix(directory)?.display();
        writeln!(out, "file {size} {name}")?;
        // A process that still runs may change the file: exactly the promised number of bytes must follow.
        let copied = io::copy(&mut (&mut file).take(size), out)?;
        io::copy(&mut io::repeat(0).take(size - copied), out)?;
    }
    writeln!(out, "end")?;
    Ok(())
}

fn files_below(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut open = vec![directory.to_path_buf()];
    while let Some(next) = open.pop() {
        let entries = match fs::read_dir(&next) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries.with_context(|| format!("listing {}", next.display()))?,
        };
        for entry in entries {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                open.push(entry.path());
            } else if kind.is_file() {
                found.push(entry.path());
            }
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn frames_hold_name_size_and_bytes() {
        let dir = std::env::temp_dir().join(format!("vm-init-{}", std::process::id()));
        fs::create_dir_all(dir.join("sub")).unwrap();
        fs::write(dir.join("a.json"), "{}\n").unwrap();
        fs::write(dir.join("sub/b"), [0_u8, 10, 255]).unwrap();
        let mut out = Vec::new();
        write_all(&dir, &mut out).unwrap();
        fs::remove_dir_all(&dir).unwrap();
        assert_eq!(out, b"file 3 a.json\n{}\nfile 3 sub/b\n\x00\n\xffend\n");
    }

    #[test]
    fn a_missing_directory_is_empty() {
        let mut out = Vec::new();
        write_all(Path::new("/nonexistent-out"), &mut out).unwrap();
        assert_eq!(out, b"end\n");
    }
}
