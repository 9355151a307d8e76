//! The two programs under test: their options, the aggregator's several lives, and what is read from them.

use std::{
    fs::OpenOptions,
    io::Write as _,
    net::SocketAddr,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;

use super::peers::Certificates;
use crate::{
    service::{Launch, LedgerCounts, Service},
    traffic::sys,
};

/// Longest wait for a program to be ready: loading the agent's programs takes a few seconds on a slow machine.
const START_PATIENCE: Duration = Duration::from_secs(60);

/// Where everything is.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Path of `node-agent`.
    pub agent: PathBuf,
    /// Path of `aggregator`.
    pub aggregator: PathBuf,
    /// Directory for queue, logs, certificates and the token's file.
    pub directory: PathBuf,
    /// The agent's admin server.
    pub agent_admin: SocketAddr,
    /// Where agents connect.
    pub listen: SocketAddr,
    /// The aggregator's admin server.
    pub aggregator_admin: SocketAddr,
    /// Where DataWay listens.
    pub dataway: SocketAddr,
    /// DataWay's token.
    pub token: String,
    /// Certificates of both ends, for TLS between them.
    pub certificates: Option<Certificates>,
    /// More arguments of the agent.
    pub agent_arguments: Vec<String>,
    /// More arguments of the aggregator.
    pub aggregator_arguments: Vec<String>,
}

/// The aggregator, through all its lives.
#[derive(Debug)]
pub struct Aggregator {
    launch: Launch,
    current: Option<Service>,
    /// Largest resident size of each life that has ended, KiB.
    pub peaks_kib: Vec<u64>,
    /// How often it was killed.
    pub kills: u32,
}

/// What waits in the aggregator's disk queue.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Backlog {
    /// Points.
    pub points: f64,
    /// Bytes.
    pub bytes: f64,
}

// === impl Setup ===

impl Setup {
    /// Writes the token's file; other users can read the arguments of a process, but not this.
    fn token_file(&self) -> anyhow::Result<PathBuf> {
        let path = self.directory.join("token");
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)
            .and_then(|mut file| file.write_all(self.token.as_bytes()))
            .with_context(|| format!("writing {}", path.display()))?;
        Ok(path)
    }

    /// The logs that the programs write.
    #[must_use]
    pub fn logs(&self) -> [PathBuf; 2] {
        [self.directory.join("agent.log"), self.directory.join("aggregator.log")]
    }

    /// The aggregator's disk queue.
    #[must_use]
    pub fn queue(&self) -> PathBuf {
        self.directory.join("queue")
    }

    /// Starts the aggregator for the first time, ready.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_aggregator(&self) -> anyhow::Result<Aggregator> {
        let [_, log] = self.logs();
        let mut arguments = vec![
            format!("--listen={}", self.listen),
            format!("--queue-dir={}", self.queue().display()),
            format!("--dataway=http://{}", self.dataway),
            format!("--dataway-token-file={}", self.token_file()?.display()),
            // A run is short: it has to meet many failures, not wait for few.
            "--dataway-timeout=2s".to_owned(),
            "--dataway-retry-max=1s".to_owned(),
        ];
        if let Some(certificates) = &self.certificates {
            arguments.extend(tls(certificates, "aggregator"));
        }
        arguments.extend(self.aggregator_arguments.iter().cloned());
        let launch = Launch {
            name: "aggregator",
            binary: self.aggregator.clone(),
            arguments,
            admin: self.aggregator_admin,
            log,
        };
        let current = Service::start(&launch, START_PATIENCE)?;
        Ok(Aggregator {
            launch,
            current: Some(current),
            peaks_kib: Vec::new(),
            kills: 0,
        })
    }

    /// Starts the agent, ready.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_agent(&self) -> anyhow::Result<Service> {
        let [log, _] = self.logs();
        let scheme = if self.certificates.is_some() { "https" } else { "http" };
        let mut arguments = vec![
            "run".to_owned(),
            format!("--aggregator={scheme}://{}", self.listen),
            "--interval=1s".to_owned(),
            "--loopback=true".to_owned(),
        ];
        if let Some(certificates) = &self.certificates {
            arguments.extend(tls(certificates, "agent"));
        }
        arguments.extend(self.agent_arguments.iter().cloned());
        Service::start(
            &Launch {
                name: "agent",
                binary: self.agent.clone(),
                arguments,
                admin: self.agent_admin,
                log,
            },
            START_PATIENCE,
        )
    }
}

fn tls(certificates: &Certificates, who: &str) -> [String; 3] {
    let path = |name: &str| -> String { certificates.path(name).display().to_string() };
    [
        format!("--tls-ca={}", path("ca.pem")),
        format!("--tls-cert={}", path(&format!("{who}.pem"))),
        format!("--tls-key={}", path(&format!("{who}.key"))),
    ]
}

// === impl Aggregator ===

impl Aggregator {
    /// SIGKILL. Nothing happens while it is down.
    ///
    /// # Errors
    /// It had ended by itself.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        if let Some(current) = self.current.take() {
            self.peaks_kib.push(current.peak_rss_kib()?);
            current.kill()?;
            self.kills += 1;
        }
        Ok(())
    }

    /// SIGSTOP, until it is killed.
    pub fn freeze(&self) {
        if let Some(pid) = self
            .current
            .as_ref()
            .and_then(|current| i32::try_from(current.pid()).ok())
        {
            sys::kill(pid, libc::SIGSTOP);
        }
    }

    /// Starts it again, without waiting for anything. Nothing happens while it runs.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        if self.current.is_none() {
            self.current = Some(Service::spawn(&self.launch)?);
        }
        Ok(())
    }

    /// Makes sure that it runs, and waits until it is ready.
    ///
    /// # Errors
    /// It cannot be started, or is not ready in time.
    pub fn ready(&mut self) -> anyhow::Result<&mut Service> {
        self.restart()?;
        let current = self.current.as_mut().context("the aggregator is down")?;
        current.wait_ready(START_PATIENCE)?;
        Ok(current)
    }

    /// Fails if it ended by itself.
    ///
    /// # Errors
    /// It did.
    pub fn check(&mut self) -> anyhow::Result<()> {
        match &mut self.current {
            Some(current) => still_runs(current, "aggregator"),
            None => Ok(()),
        }
    }

    /// What waits in its queue now.
    ///
    /// # Errors
    /// It is down or does not say.
    pub fn backlog(&self) -> anyhow::Result<Backlog> {
        let current = self.current.as_ref().context("the aggregator is down")?;
        let metric = |name: &str| {
            current
                .metric(name)?
                .with_context(|| format!("the aggregator's /metrics has no {name}"))
        };
        Ok(Backlog {
            points: metric("ebpfcollector_sink_backlog_points")?,
            bytes: metric("ebpfcollector_sink_backlog_bytes")?,
        })
    }

    /// The last word of its last life, then SIGTERM.
    ///
    /// # Errors
    /// It is down, does not answer, or does not end well.
    pub fn stop(mut self, patience: Duration) -> anyhow::Result<(LedgerCounts, Vec<u64>, u32)> {
        let current = self.current.take().context("the aggregator is down")?;
        let ledger = current.ledger()?;
        self.peaks_kib.push(current.peak_rss_kib()?);
        current.stop(patience)?;
        Ok((ledger, self.peaks_kib, self.kills))
    }
}

/// Fails if the program ended by itself.
///
/// # Errors
/// It did; the error ends with its log.
pub fn still_runs(service: &mut Service, name: &str) -> anyhow::Result<()> {
    match service.ended()? {
        Some(status) => anyhow::bail!("the {name} ended by itself: {status}\n{}", service.log_tail()),
        None => Ok(()),
    }
}

/// Names of the logs that hold `secret`.
///
/// # Errors
/// A log cannot be read.
pub fn logs_with(logs: &[PathBuf], secret: &str) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    for log in logs {
        let text = read(log)?;
        if text.contains(secret) {
            found.push(log.display().to_string());
        }
    }
    Ok(found)
}

/// A log's text; bytes that are no UTF-8 are replaced.
///
/// # Errors
/// It cannot be read.
pub fn read(log: &Path) -> anyhow::Result<String> {
    let bytes = std::fs::read(log).with_context(|| format!("reading {}", log.display()))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
