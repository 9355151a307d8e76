//! Runs the agent under test, `standalone`, with a file as its output.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::Context as _;

use crate::service::{Launch, LedgerCounts, Service, free_port};

/// How to start the agent.
#[derive(Clone, Debug)]
pub struct AgentOptions {
    /// Path of the `node-agent` binary.
    pub binary: PathBuf,
    /// Flush interval.
    pub interval: Duration,
    /// Report loopback flows too.
    pub loopback: bool,
    /// More arguments.
    pub arguments: Vec<String>,
    /// Directory for its output and its log.
    pub directory: PathBuf,
}

/// A running agent. Killed when dropped.
#[derive(Debug)]
pub struct Agent {
    service: Service,
    output: PathBuf,
}

// === impl Agent ===

impl Agent {
    /// Starts the agent and waits until `/readyz` answers 200.
    ///
    /// # Errors
    /// It cannot be started, ended early or was not ready within `patience`; the error ends with its log.
    pub fn start(options: &AgentOptions, patience: Duration) -> anyhow::Result<Self> {
        let output = options.directory.join("agent.jsonl");
        let log = options.directory.join("agent.log");
        for file in [&output, &log] {
            fs::write(file, b"").with_context(|| format!("making {}", file.display()))?;
        }
        let mut arguments = vec![
            "standalone".to_owned(),
            format!("--interval={}ms", options.interval.as_millis()),
            format!("--output-file={}", output.display()),
            "--output-format=json".to_owned(),
            format!("--queue-dir={}", options.directory.join("queue").display()),
        ];
        if options.loopback {
            arguments.push("--loopback=true".to_owned());
        }
        arguments.extend(options.arguments.iter().cloned());
        let launch = Launch {
            name: "agent",
            binary: options.binary.clone(),
            arguments,
            admin: free_port()?,
            log,
        };
        Ok(Self {
            service: Service::start(&launch, patience)?,
            output,
        })
    }

    /// Process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.service.pid()
    }

    /// Status and body of a page of the admin server.
    ///
    /// # Errors
    /// The server does not answer, or not in HTTP.
    pub fn get(&self, path: &str) -> anyhow::Result<(u16, String)> {
        self.service.get(path)
    }

    /// The ledger now.
    ///
    /// # Errors
    /// The admin server does not answer, or with something else.
    pub fn ledger(&self) -> anyhow::Result<LedgerCounts> {
        self.service.ledger()
    }

    /// Sum of all samples of a metric, whatever their labels; `None` when there is none.
    ///
    /// # Errors
    /// The admin server does not answer.
    pub fn metric(&self, name: &str) -> anyhow::Result<Option<f64>> {
        self.service.metric(name)
    }

    /// Asks the agent to end (SIGTERM), waits until it did, and returns what it wrote.
    ///
    /// # Errors
    /// It did not end within `patience`, ended with a failure, or its output cannot be read.
    pub fn stop(self, patience: Duration) -> anyhow::Result<String> {
        self.service.stop(patience)?;
        fs::read_to_string(&self.output).with_context(|| format!("reading {}", self.output.display()))
    }

    /// The last lines of its log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        self.service.log_tail()
    }
}
