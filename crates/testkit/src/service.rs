//! One of our programs as a child process with an admin server: start, ask, kill, stop.

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use serde::Deserialize;

use crate::traffic::sys;

/// How to start a program.
#[derive(Clone, Debug)]
pub struct Launch {
    /// What messages call it.
    pub name: &'static str,
    /// The program.
    pub binary: PathBuf,
    /// All its arguments but `--admin-listen`.
    pub arguments: Vec<String>,
    /// Address for its admin server.
    pub admin: SocketAddr,
    /// Its output is appended here.
    pub log: PathBuf,
}

/// A running program. Killed when dropped, and when the thread that started it ends.
#[derive(Debug)]
pub struct Service {
    name: &'static str,
    child: Child,
    admin: SocketAddr,
    log: PathBuf,
}

/// Counters of one stage of a ledger.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct StageCounts {
    /// Items taken in.
    pub entered: u64,
    /// Items handed on.
    pub emitted: u64,
    /// Items left out, by reason.
    pub skipped: BTreeMap<String, u64>,
    /// Items lost, by reason.
    pub lost: BTreeMap<String, u64>,
}

/// The ledger by stage.
pub type LedgerCounts = BTreeMap<String, StageCounts>;

// === impl StageCounts ===

impl StageCounts {
    /// Items that entered and are not accounted for.
    #[must_use]
    pub fn pending(&self) -> i64 {
        let out = self.emitted + self.skipped.values().sum::<u64>() + self.lost();
        self.entered.wrapping_sub(out).cast_signed()
    }

    /// Items lost for any reason.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost.values().sum()
    }
}

// === impl Service ===

impl Service {
    /// Starts the program, without waiting for anything.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn(launch: &Launch) -> anyhow::Result<Self> {
        let Launch {
            name,
            binary,
            arguments,
            admin,
            log,
        } = launch;
        let log_file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("opening {}", log.display()))?;
        let mut command = Command::new(binary);
        command
            .args(arguments)
            .arg(format!("--admin-listen={admin}"))
            // Ctrl-C is the driver's business: it stops the program when that has all there is to report.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(log_file.try_clone()?)
            .stderr(log_file);
        // SAFETY: the hook only makes one async-signal-safe system call.
        unsafe {
            command.pre_exec(sys::die_with_parent);
        }
        let child = command
            .spawn()
            .with_context(|| format!("starting {}", binary.display()))?;
        Ok(Self {
            name,
            child,
            admin: *admin,
            log: log.clone(),
        })
    }

    /// Starts the program and waits until `/readyz` answers 200.
    ///
    /// # Errors
    /// It cannot be started, or as [`Self::wait_ready`].
    pub fn start(launch: &Launch, patience: Duration) -> anyhow::Result<Self> {
        let mut service = Self::spawn(launch)?;
        service.wait_ready(patience)?;
        Ok(service)
    }

    /// Waits until `/readyz` answers 200.
    ///
    /// # Errors
    /// It ended, or was not ready within `patience`; the error ends with its log.
    pub fn wait_ready(&mut self, patience: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.ended()? {
                anyhow::bail!(
                    "the {} ended before it was ready: {status}\n{}",
                    self.name,
                    self.log_tail()
                );
            }
            if self.get("/readyz").is_ok_and(|(status, _)| status == 200) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                anyhow::bail!(
                    "the {} was not ready within {patience:?}\n{}",
                    self.name,
                    self.log_tail()
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it did.
    ///
    /// # Errors
    /// The system call failed.
    pub fn ended(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        self.child
            .try_wait()
            .with_context(|| format!("waiting for the {}", self.name))
    }

    /// Status and body of a page of the admin server.
    ///
    /// # Errors
    /// The server does not answer, or not in HTTP.
    pub fn get(&self, path: &str) -> anyhow::Result<(u16, String)> {
        http_get(self.admin, path)
    }

    /// The ledger now.
    ///
    /// # Errors
    /// The admin server does not answer, or with something else.
    pub fn ledger(&self) -> anyhow::Result<LedgerCounts> {
        let (status, body) = self.get("/ledger")?;
        anyhow::ensure!(status == 200, "GET /ledger: status {status}: {body}");
        serde_json::from_str(&body).with_context(|| format!("reading the ledger `{body}`"))
    }

    /// Sum of all samples of a metric, whatever their labels; `None` when there is none.
    ///
    /// # Errors
    /// The admin server does not answer.
    pub fn metric(&self, name: &str) -> anyhow::Result<Option<f64>> {
        let (_, body) = self.get("/metrics")?;
        Ok(metric_sum(&body, name))
    }

    /// Largest resident size so far, KiB.
    ///
    /// # Errors
    /// It ended, or /proc says something else.
    pub fn peak_rss_kib(&self) -> anyhow::Result<u64> {
        let path = format!("/proc/{}/status", self.pid());
        let status = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:")?.split_whitespace().next()?.parse().ok())
            .with_context(|| format!("no VmHWM in {path}: the {} has ended", self.name))
    }

    /// Ends it with SIGKILL.
    ///
    /// # Errors
    /// It had ended before.
    pub fn kill(mut self) -> anyhow::Result<()> {
        if let Some(status) = self.ended()? {
            anyhow::bail!("the {} had ended by itself: {status}\n{}", self.name, self.log_tail());
        }
        self.child
            .kill()
            .with_context(|| format!("killing the {}", self.name))?;
        self.child
            .wait()
            .with_context(|| format!("waiting for the {}", self.name))?;
        Ok(())
    }

    /// Asks it to end (SIGTERM) and waits until it did.
    ///
    /// # Errors
    /// It did not end within `patience`, or ended with a failure.
    pub fn stop(mut self, patience: Duration) -> anyhow::Result<()> {
        if let Ok(pid) = i32::try_from(self.child.id()) {
            sys::kill(pid, libc::SIGTERM);
        }
        let deadline = Instant::now() + patience;
        let status = loop {
            if let Some(status) = self.ended()? {
                break status;
            }
            if Instant::now() >= deadline {
                anyhow::bail!(
                    "the {} did not end within {patience:?} of SIGTERM\n{}",
                    self.name,
                    self.log_tail()
                );
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        anyhow::ensure!(
            status.success(),
            "the {} ended with {status}\n{}",
            self.name,
            self.log_tail()
        );
        Ok(())
    }

    /// The last lines of its log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        tail(&self.log)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn tail(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines
        .get(lines.len().saturating_sub(40)..)
        .unwrap_or_default()
        .join("\n")
}

/// A loopback address that nobody listens on now.
///
/// # Errors
/// There is none.
pub fn free_port() -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").context("finding a free port on 127.0.0.1")?;
    Ok(listener.local_addr()?)
}

/// A plain HTTP/1.1 GET without redirects.
///
/// # Errors
/// The server does not answer within 5 s, or not in HTTP.
pub fn http_get(server: SocketAddr, path: &str) -> anyhow::Result<(u16, String)> {
    let patience = Duration::from_secs(5);
    let mut stream =
        TcpStream::connect_timeout(&server, patience).with_context(|| format!("connecting to {server}"))?;
    stream.set_read_timeout(Some(patience))?;
    write!(
        stream,
        "GET {path} HTTP/1.0\r\nHost: {server}\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = Vec::new();
    stream
        .read_to_end(&mut answer)
        .with_context(|| format!("reading {path} from {server}"))?;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .with_context(|| format!("{path}: no HTTP answer: {answer}"))?;
    let status = head
        .split_whitespace()
        .nth(1)
        .and_then(|status| status.parse().ok())
        .with_context(|| format!("{path}: no status in `{head}`"))?;
    Ok((status, body.to_owned()))
}

/// Sum of all samples of metric `name` in a Prometheus text; `None` when there is no sample.
#[must_use]
pub fn metric_sum(text: &str, name: &str) -> Option<f64> {
    let values: Vec<f64> = text
        .lines()
        .filter_map(|line| line.strip_prefix(name))
        .filter(|rest| rest.starts_with(['{', ' ']))
        .filter_map(|rest| rest.rsplit_once(['}', ' ']).map(|(_, value)| value.trim()))
        .filter_map(|value| value.split_whitespace().next_back()?.parse().ok())
        .collect();
    if values.is_empty() {
        None
    } else {
        Some(values.iter().sum())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_summed_over_their_labels_only() {
        let text = "# TYPE a_total counter\na_total{p=\"x y\"} 1.5\na_total{p=\"z\"} 2\na_total_more 9\nb 4\n";
        assert_eq!(metric_sum(text, "a_total"), Some(3.5));
        assert_eq!(metric_sum(text, "b"), Some(4.0));
        assert_eq!(metric_sum(text, "c"), None);
    }

    #[test]
    fn a_ledger_is_read_and_its_pending_items_computed() {
        let text = r#"{"a.b":{"entered":10,"emitted":6,"skipped":{"loopback":3},"lost":{}}}"#;
        let ledger: LedgerCounts = serde_json::from_str(text).unwrap();
        assert_eq!(ledger["a.b"].pending(), 1);
    }
}
