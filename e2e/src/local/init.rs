//! The first process of a namespace: prepares it, keeps its programs running, collects what is orphaned.
//!
//! Data flow: writes its process id as the machine sees it to `pid` ▶ waits for `init.json` ([`Plan`]) ▶ takes its steps
//! ▶ starts its programs, and again when one ends. A file `stopped/NAME` in its directory keeps a program from running:
//! that is how tests take an API server away. It never ends by itself; killed, it takes all its programs with it, for it
//! is the first process of their process namespace.

use std::{
    collections::HashMap,
    fs::{self, OpenOptions},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use rustix::process::{Pid, Signal, WaitOptions};
use serde::{Deserialize, Serialize};

const POLL: Duration = Duration::from_millis(50);
/// Between two starts of the same program.
const RESTART: Duration = Duration::from_secs(1);

/// What one namespace runs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Done once, one after the other.
    pub steps: Vec<Step>,
    /// Kept running.
    pub programs: Vec<Program>,
    /// Directory of `stopped/NAME`, as seen after the steps.
    pub place: PathBuf,
    /// Directory of the programs' logs, as seen after the steps.
    pub logs: PathBuf,
}

/// One step of preparation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Runs a command, which has to succeed.
    Run(Vec<String>),
    /// Writes a file: a setting of the kernel, for example.
    Write(PathBuf, String),
}

/// One program.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Program {
    /// Name of its log and of its file in `stopped/`.
    pub name: String,
    /// Executable and arguments.
    pub command: Vec<String>,
    /// Gets this process' standard input, which may be a listening socket.
    #[serde(default)]
    pub inherits_stdin: bool,
}

struct Running {
    program: Program,
    child: Option<Child>,
    started: Option<Instant>,
    asked_to_stop: Option<Instant>,
}

// === impl Step ===

impl Step {
    /// A command from its words.
    #[must_use]
    pub fn run(line: &str) -> Self {
        Self::Run(line.split_whitespace().map(str::to_owned).collect())
    }

    /// A file and its text.
    #[must_use]
    pub fn write(path: &str, text: &str) -> Self {
        Self::Write(path.into(), text.to_owned())
    }

    fn take(&self) -> anyhow::Result<()> {
        match self {
            Self::Run(words) => {
                let (program, arguments) = words.split_first().context("an empty command")?;
                let output = Command::new(program)
                    .args(arguments)
                    .stdin(Stdio::null())
                    .output()
                    .with_context(|| format!("start `{}`", words.join(" ")))?;
                anyhow::ensure!(
                    output.status.success(),
                    "`{}` ended with {}: {}",
                    words.join(" "),
                    output.status,
                    String::from_utf8_lossy(&output.stderr).trim()
                );
            }
            Self::Write(path, text) => {
                fs::write(path, text).with_context(|| format!("write `{}` to {}", text.trim(), path.display()))?;
            }
        }
        Ok(())
    }
}

/// Runs as the first process; never returns without an error.
///
/// # Errors
/// A step failed, or a file of the directory cannot be written.
pub fn run(directory: &Path) -> anyhow::Result<()> {
    // Still the machine's /proc: the link names this process as the machine sees it.
    let pid = fs::read_link("/proc/self").context("read /proc/self")?;
    fs::write(directory.join("pid"), pid.as_os_str().as_encoded_bytes()).context("write the file pid")?;
    let path = directory.join("init.json");
    let plan: Plan = loop {
        match fs::read(&path) {
            Ok(text) => break serde_json::from_slice(&text).with_context(|| format!("read {}", path.display()))?,
            Err(_) => std::thread::sleep(POLL),
        }
    };
    let prepared = plan.steps.iter().try_for_each(Step::take);
    // The directory itself may be hidden by what the steps mounted.
    let outcome = match &prepared {
        Ok(()) => "ok".to_owned(),
        Err(error) => format!("{error:#}"),
    };
    fs::write(plan.place.join("prepared"), outcome).context("write the file prepared")?;
    prepared?;
    supervise(&plan)
}

fn supervise(plan: &Plan) -> anyhow::Result<()> {
    let mut all: Vec<Running> = plan
        .programs
        .iter()
        .map(|program| Running {
            program: program.clone(),
            child: None,
            started: None,
            asked_to_stop: None,
        })
        .collect();
    loop {
        let ended = collect_orphans();
        for one in &mut all {
            one.tend(plan, &ended)?;
        }
        std::thread::sleep(POLL);
    }
}

/// Waits for every child that has ended, ours or handed to us, and tells how.
fn collect_orphans() -> HashMap<u32, String> {
    let mut ended = HashMap::new();
    while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
        let how = match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => format!("exit code {code}"),
            (_, Some(signal)) => format!("signal {signal}"),
            _ => "no status".to_owned(),
        };
        ended.insert(pid.as_raw_nonzero().get().unsigned_abs(), how);
    }
    ended
}

// === impl Running ===

impl Running {
    fn tend(&mut self, plan: &Plan, ended: &HashMap<u32, String>) -> anyhow::Result<()> {
        let stopped = plan.place.join("stopped").join(&self.program.name).exists();
        if let Some(child) = &self.child {
            if let Some(how) = ended.get(&child.id()) {
                eprintln!("{} ended: {how}", self.program.name);
                self.child = None;
                self.asked_to_stop = None;
            } else if stopped {
                self.stop();
            }
            return Ok(());
        }
        let rested = self.started.is_none_or(|started| started.elapsed() >= RESTART);
        if !stopped && rested {
            self.child = Some(start(&self.program, &plan.logs)?);
            self.started = Some(Instant::now());
        }
        Ok(())
    }

    /// Asks politely once, then kills.
    fn stop(&mut self) {
        let Some(pid) = self
            .child
            .as_ref()
            .and_then(|child| Pid::from_raw(child.id().cast_signed()))
        else {
            return;
        };
        let signal = match self.asked_to_stop {
            None => Signal::TERM,
            Some(asked) if asked.elapsed() > Duration::from_secs(3) => Signal::KILL,
            Some(_) => return,
        };
        self.asked_to_stop = Some(Instant::now());
        if let Err(error) = rustix::process::kill_process(pid, signal) {
            eprintln!("{} cannot be stopped: {error}", self.program.name);
        }
    }
}

fn start(program: &Program, logs: &Path) -> anyhow::Result<Child> {
    let path = logs.join(format!("{}.log", program.name));
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .with_context(|| format!("open {}", path.display()))?;
    let (executable, arguments) = program.command.split_first().context("a program without a command")?;
    Command::new(executable)
        .args(arguments)
        // A proxy set for the machine's programs is not for the cluster's.
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("HOME", "/")
        .stdin(if program.inherits_stdin { Stdio::inherit() } else { Stdio::null() })
        .stdout(log.try_clone().context("share the log")?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("start `{}`", program.command.join(" ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_survives_its_file() {
        let plan = Plan {
            steps: vec![
                Step::run("ip link set lo up"),
                Step::write("/proc/sys/net/ipv4/ip_forward", "1"),
            ],
            programs: vec![Program {
                name: "etcd".to_owned(),
                command: vec!["etcd".to_owned(), "--data-dir=x".to_owned()],
                inherits_stdin: false,
            }],
            place: "/a".into(),
            logs: "/b".into(),
        };
        let text = serde_json::to_string(&plan).unwrap();
        assert_eq!(serde_json::from_str::<Plan>(&text).unwrap(), plan);
    }

    #[test]
    fn a_step_that_fails_names_the_command_and_its_words() {
        let error = Step::run("sh -c false").take().unwrap_err();
        assert!(error.to_string().contains("sh -c false"), "{error}");
        let error = Step::write("/nowhere/at/all", "1").take().unwrap_err();
        assert!(error.to_string().contains("/nowhere/at/all"), "{error}");
    }
}
