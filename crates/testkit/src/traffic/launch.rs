//! Starts roles as processes and reads their reports.

use std::{
    fs,
    io::{BufRead as _, BufReader, ErrorKind},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::Context as _;

use super::{report::Report, sys};

/// A directory with the report file, and one link to the `traffic` binary per process name: the kernel then shows the
/// name from the very first instruction, and `argv[0]` agrees.
#[derive(Debug)]
pub struct Stage {
    directory: PathBuf,
    traffic: PathBuf,
}

/// A running role.
#[derive(Debug)]
pub struct Role {
    name: String,
    child: Child,
    out: BufReader<ChildStdout>,
}

impl Stage {
    /// Makes the stage in `directory`, which must not be shared; it is removed with the stage.
    ///
    /// # Errors
    /// The directory cannot be made, or `traffic` is not there.
    pub fn new(directory: PathBuf, traffic: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
        let traffic = traffic
            .canonicalize()
            .with_context(|| format!("finding the traffic binary at {}", traffic.display()))?;
        Ok(Self { directory, traffic })
    }

    /// The report file that all roles of this stage share.
    #[must_use]
    pub fn report_path(&self) -> PathBuf {
        self.directory.join("reports.jsonl")
    }

    /// The reports written so far.
    ///
    /// # Errors
    /// The file cannot be read, or a line is no report.
    pub fn reports(&self) -> anyhow::Result<Vec<Report>> {
        let path = self.report_path();
        match fs::read_to_string(&path) {
            Ok(text) => Report::read_all(&text).with_context(|| format!("reading {}", path.display())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
        }
    }

    /// Forgets the reports written so far.
    ///
    /// # Errors
    /// The file cannot be removed.
    pub fn clear_reports(&self) -> anyhow::Result<()> {
        match fs::remove_file(self.report_path()) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error).context("removing old reports"),
            _ => Ok(()),
        }
    }

    /// Makes the link through which a process of that name is started.
    ///
    /// # Errors
    /// The link cannot be made.
    pub fn link(&self, name: &str) -> anyhow::Result<PathBuf> {
        let path = self.directory.join(name);
        match std::os::unix::fs::symlink(&self.traffic, &path) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                Err(error).with_context(|| format!("linking {}", path.display()))
            }
            _ => Ok(path),
        }
    }

    /// Starts a role under `name`. `--name` and `--report` are added to `arguments`.
    ///
    /// # Errors
    /// The process cannot be started.
    pub fn start(&self, name: &str, arguments: &[String]) -> anyhow::Result<Role> {
        let path = self.link(name)?;
        let mut command = Command::new(&path);
        command
            .args(arguments)
            .arg(format!("--name={name}"))
            .arg(format!("--report={}", self.report_path().display()));
        command.arg0(&path).stdin(Stdio::null()).stdout(Stdio::piped());
        // Ctrl-C is the driver's business: roles end in the driver's order, and report.
        command.process_group(0);
        // SAFETY: the hook only makes one async-signal-safe system call.
        unsafe {
            command.pre_exec(sys::die_with_parent);
        }
        let mut child = command
            .spawn()
            .with_context(|| format!("starting {}", path.display()))?;
        let out = child.stdout.take().context("no standard output")?;
        Ok(Role {
            name: name.to_owned(),
            child,
            out: BufReader::new(out),
        })
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

impl Role {
    /// Process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the role prints `word`; blocks as long as the role neither prints nor ends.
    ///
    /// # Errors
    /// The role ended before it did.
    pub fn expect(&mut self, word: &str) -> anyhow::Result<()> {
        let mut line = String::new();
        loop {
            line.clear();
            let read = self
                .out
                .read_line(&mut line)
                .with_context(|| format!("reading from {}", self.name))?;
            anyhow::ensure!(
                read > 0,
                "{} ended before it said `{word}`; see its error above",
                self.name
            );
            if line.trim() == word {
                return Ok(());
            }
        }
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) {
        if let Ok(pid) = i32::try_from(self.child.id()) {
            sys::kill(pid, signal);
        }
    }

    /// Waits for the role to end by itself.
    ///
    /// # Errors
    /// It did not within `patience` (it is killed then), or ended with a failure.
    pub fn join(mut self, patience: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self
                .child
                .try_wait()
                .with_context(|| format!("waiting for {}", self.name))?
            {
                anyhow::ensure!(status.success(), "{} failed: {status}", self.name);
                return Ok(());
            }
            if Instant::now() >= deadline {
                self.child.kill()?;
                self.child.wait()?;
                anyhow::bail!("{} did not end within {patience:?} and was killed", self.name);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Asks the role to finish (SIGTERM) and waits for it.
    ///
    /// # Errors
    /// As [`Role::join`].
    pub fn stop(self, patience: Duration) -> anyhow::Result<()> {
        self.signal(libc::SIGTERM);
        self.join(patience)
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        // Only a role that an error left behind still runs here.
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
