//! Boots one machine, follows its console and takes what it sends back.

use std::fmt;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use super::kernel::Kernel;
use super::{Job, Outcome};

const QEMU: &str = "qemu-system-x86_64";
/// Printed by `vm-init` when it is about to start the program, and when the program has ended.
const READY: &str = "vm-init: ready";
const EXIT: &str = "vm-init: exit code ";
const PANIC: &str = "Kernel panic - not syncing";
/// Console lines that may wait to be read; a machine that prints faster waits for us.
const PENDING_LINES: usize = 1024;

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The program ended with this code (128 plus the number for a signal).
    Exit(i32),
    /// The time was up.
    TimedOut,
    /// The kernel panicked.
    Panicked(String),
    /// QEMU ended without an answer from the machine.
    Died,
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exit(0) => f.write_str("ok"),
            Self::Exit(code) => write!(f, "FAILED: exit code {code}"),
            Self::TimedOut => f.write_str("FAILED: time is up"),
            Self::Panicked(line) => write!(f, "FAILED: {line}"),
            Self::Died => f.write_str("FAILED: the machine ended without an answer"),
        }
    }
}

/// Boots the machine and waits for its end.
pub(crate) fn boot(kernel: &Kernel, initramfs: &Path, job: &Job, directory: &Path) -> Result<Outcome> {
    let log_path = directory.join(format!("{}.log", kernel.name));
    let wire_path = directory.join(format!("{}.wire", kernel.name));
    let files = directory.join(&kernel.name);
    if files.exists() {
        fs::remove_dir_all(&files).with_context(|| format!("removing {}", files.display()))?;
    }
    let mut log = File::create(&log_path).with_context(|| format!("creating {}", log_path.display()))?;

    let started = Instant::now();
    let mut machine = Machine(
        command(kernel, initramfs, job, &wire_path, &log)?
            .spawn()
            .with_context(|| format!("starting {QEMU} (is it installed? `make setup` does)"))?,
    );
    let console = machine.0.stdout.take().context("qemu has no standard output")?;
    let lines = follow(console);

    let (mut boot, mut exit, mut panic) = (None, None, None);
    let timed_out = loop {
        let left = job.timeout.saturating_sub(started.elapsed());
        let line = match lines.recv_timeout(left) {
            Ok(line) => line,
            Err(RecvTimeoutError::Disconnected) => break false,
            Err(RecvTimeoutError::Timeout) => break true,
        };
        writeln!(log, "{line}").context("writing the console log")?;
        if !job.quiet {
            println!("[{}] {line}", kernel.name);
        }
        if line.contains(READY) {
            boot = boot.or_else(|| Some(started.elapsed()));
        } else if let Some((_, code)) = line.split_once(EXIT) {
            exit = code.trim().parse().ok();
        } else if line.contains(PANIC) {
            panic = Some(line);
        }
    };
    if !timed_out {
        machine.0.wait().context("waiting for qemu")?;
    }
    drop(machine);
    let total = started.elapsed();

    let ending = match (exit, panic) {
        // The answer counts even if the machine then hung while powering off, or panicked there.
        (Some(code), _) => Ending::Exit(code),
        (None, Some(line)) => Ending::Panicked(line),
        (None, None) if timed_out => Ending::TimedOut,
        (None, None) => Ending::Died,
    };
    if let Ending::Exit(_) = ending {
        let wire = fs::read(&wire_path).with_context(|| format!("reading {}", wire_path.display()))?;
        unpack(&wire, &files).with_context(|| format!("files sent by the machine, log in {}", log_path.display()))?;
    }
    let _ = fs::remove_file(&wire_path);
    Ok(Outcome {
        ending,
        boot,
        total,
        log: log_path,
        files,
    })
}

/// A running QEMU that does not outlive its owner.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn command(kernel: &Kernel, initramfs: &Path, job: &Job, wire: &Path, log: &File) -> Result<Command> {
    let mut command = Command::new(QEMU);
    command
        // Emulated, also where /dev/kvm exists: nested guests hang on some hosts, and results stay comparable.
        .args(["-accel", "tcg,thread=multi"])
        // `max` fails a self-test of 6.12's crypto code; older models lack what the C library of a static init needs.
        .args(["-cpu", "Haswell"])
        .args(["-m", &job.memory.to_string(), "-smp", &job.cpus.to_string()])
        .args(["-display", "none", "-monitor", "none", "-nic", "none", "-no-reboot"])
        .args(["-serial", "stdio", "-serial"])
        .arg(format!("file:{}", wire.display()))
        .arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(initramfs)
        .args(["-append", "console=ttyS0 panic=-1 oops=panic quiet"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // Complaints about processor features that emulation lacks, and the reason when it does not start.
        .stderr(log.try_clone().context("sharing the console log")?);
    // SAFETY: the closure only makes one system call, which is allowed between fork and exec.
    unsafe {
        command.pre_exec(|| {
            // When we are killed, nobody else would end the machine.
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
    Ok(command)
}

/// Reads the console in a thread, so that waiting for a line can end at a deadline.
fn follow(console: ChildStdout) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::sync_channel(PENDING_LINES);
    thread::spawn(move || {
        let mut console = BufReader::new(console);
        let mut bytes = Vec::new();
        while console.read_until(b'\n', &mut bytes).is_ok_and(|read| read > 0) {
            let line = String::from_utf8_lossy(&bytes)
                .trim_end_matches(['\r', '\n'])
                .to_owned();
            bytes.clear();
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    receiver
}

/// Writes the files that `vm-init` framed on the second serial line below a directory.
fn unpack(mut wire: &[u8], directory: &Path) -> Result<()> {
    loop {
        let mut head = String::new();
        wire.read_line(&mut head).context("reading a frame's head")?;
        let head = head.trim_end_matches('\n');
        if head == "end" {
            return Ok(());
        }
        let frame = head.strip_prefix("file ").and_then(|rest| rest.split_once(' '));
        let Some((size, name)) = frame else {
            bail!("cut off or garbled at {head:?}")
        };
        let size: usize = size.parse().with_context(|| format!("size in {head:?}"))?;
        let name = PathBuf::from(name);
        if name.is_absolute() || name.components().any(|part| part.as_os_str() == "..") {
            bail!("{} would be written outside the results", name.display());
        }
        let path = directory.join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        let mut content = vec![0; size];
        wire.read_exact(&mut content)
            .with_context(|| format!("{head:?} is cut off"))?;
        fs::write(&path, content).with_context(|| format!("writing {}", path.display()))?;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn unpacks_frames_and_refuses_bad_ones() {
        let place = tempfile::tempdir().unwrap();
        unpack(b"file 3 a.json\n{}\nfile 3 sub/b\n\x00\n\xffend\n", place.path()).unwrap();
        assert_eq!(fs::read(place.path().join("a.json")).unwrap(), b"{}\n");
        assert_eq!(fs::read(place.path().join("sub/b")).unwrap(), [0, 10, 255]);
        assert!(unpack(b"file 9 a\nshort", place.path()).is_err());
        assert!(unpack(b"file 1 a\nx", place.path()).is_err());
        assert!(unpack(b"file 1 ../a\nxend\n", place.path()).is_err());
        assert!(unpack(b"", place.path()).is_err());
    }
}
