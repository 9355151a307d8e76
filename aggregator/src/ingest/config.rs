//! What ingest is told, and what it refuses to be told.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use proto::limits;

/// Settings of the gRPC side. [`IngestConfig::new`] gives the defaults.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IngestConfig {
    /// Address to listen on; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Certificates; `None` is plaintext, which is for loopback unless [`allow_plaintext`](Self::allow_plaintext).
    pub tls: Option<ServerTls>,
    /// Plaintext on an address that is not loopback: everybody who reaches the port can send records.
    pub allow_plaintext: bool,
    /// Largest message taken, bytes. Default 4 MiB, at least 2 MiB.
    pub max_message_bytes: usize,
    /// Batches of one stream that may wait for their acknowledgement. Default 8.
    pub max_unacked_batches: usize,
    /// Batches of all streams together that may wait, which bounds memory. Default 256.
    pub max_inflight_batches: usize,
    /// Connections at once; more are closed at once and counted. Default 8192.
    pub max_connections: usize,
    /// Time from the start of a stream to its Hello, and for a TLS handshake. Default 10 s.
    pub first_message_timeout: Duration,
    /// A stream silent for longer is ended. Default 5 min.
    pub idle_timeout: Duration,
    /// HTTP/2 ping after this silence. Default 30 s.
    pub keepalive_interval: Duration,
    /// A peer that does not answer a ping for this long is gone. Default 20 s.
    pub keepalive_timeout: Duration,
    /// What a refused sender is told to wait. Default 1 s.
    pub retry_after: Duration,
    /// Time given to batches already taken when stopping. Default 10 s.
    pub drain_timeout: Duration,
}

/// TLS with mandatory client certificates. The files are read again when they change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerTls {
    /// PEM certificate chain of this server.
    pub cert: PathBuf,
    /// PEM private key of this server.
    pub key: PathBuf,
    /// PEM certificates of the authorities that sign clients.
    pub client_ca: PathBuf,
    /// How often the files are looked at. Default 30 s.
    pub reload_interval: Duration,
}

/// Why ingest does not start or stopped.
#[derive(Debug, thiserror::Error)]
pub enum IngestError {
    /// A setting is out of its range.
    #[error("ingest option `{option}` is {value}: {accepted}")]
    Config {
        /// Field of [`IngestConfig`].
        option: &'static str,
        /// What was given.
        value: String,
        /// What is accepted.
        accepted: String,
    },
    /// Plaintext was asked for where others can reach it.
    #[error(
        "refusing to listen on {listen} without TLS: it is not a loopback address; give a certificate, key and client \
         CA, or allow plaintext explicitly"
    )]
    Plaintext {
        /// The address.
        listen: SocketAddr,
    },
    /// The address can not be listened on.
    #[error("can not listen on {listen}: {source}")]
    Bind {
        /// The address.
        listen: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// A certificate or key can not be used.
    #[error("TLS {what} {path}: {why}", path = path.display())]
    Tls {
        /// Which of the files.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The server stopped by itself.
    #[error("ingest server on {listen} stopped: {why}")]
    Server {
        /// The address.
        listen: SocketAddr,
        /// What the server said.
        why: String,
    },
}

// === impl IngestConfig ===

impl IngestConfig {
    /// Defaults, listening on `listen`.
    #[must_use]
    pub fn new(listen: SocketAddr) -> Self {
        Self {
            listen,
            tls: None,
            allow_plaintext: false,
            max_message_bytes: 4 << 20,
            max_unacked_batches: 8,
            max_inflight_batches: 256,
            max_connections: 8192,
            first_message_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(300),
            keepalive_interval: Duration::from_secs(30),
            keepalive_timeout: Duration::from_secs(20),
            retry_after: Duration::from_secs(1),
            drain_timeout: Duration::from_secs(10),
        }
    }

    /// Checks every setting against its range.
    ///
    /// # Errors
    /// [`IngestError::Config`] names the first setting that is out of range, [`IngestError::Plaintext`] a refused address.
    pub fn validate(&self) -> Result<(), IngestError> {
        in_range(
            "max_message_bytes",
            self.max_message_bytes,
            limits::MIN_MAX_MESSAGE_BYTES,
            64 << 20,
        )?;
        in_range("max_unacked_batches", self.max_unacked_batches, 1, 1024)?;
        in_range("max_inflight_batches", self.max_inflight_batches, 1, 1 << 20)?;
        in_range("max_connections", self.max_connections, 1, 1 << 20)?;
        positive("first_message_timeout", self.first_message_timeout)?;
        positive("idle_timeout", self.idle_timeout)?;
        positive("keepalive_interval", self.keepalive_interval)?;
        positive("keepalive_timeout", self.keepalive_timeout)?;
        positive("retry_after", self.retry_after)?;
        if let Some(tls) = &self.tls {
            positive("tls.reload_interval", tls.reload_interval)?;
        } else if !self.allow_plaintext && !self.listen.ip().to_canonical().is_loopback() {
            return Err(IngestError::Plaintext { listen: self.listen });
        }
        Ok(())
    }
}

// === impl ServerTls ===

impl ServerTls {
    /// With the default reload interval.
    #[must_use]
    pub fn new(cert: PathBuf, key: PathBuf, client_ca: PathBuf) -> Self {
        Self {
            cert,
            key,
            client_ca,
            reload_interval: Duration::from_secs(30),
        }
    }
}

fn in_range(option: &'static str, value: usize, min: usize, max: usize) -> Result<(), IngestError> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    Err(IngestError::Config {
        option,
        value: value.to_string(),
        accepted: format!("accepted is {min} to {max}"),
    })
}

fn positive(option: &'static str, value: Duration) -> Result<(), IngestError> {
    // A day is beyond every use and keeps sums of durations far from overflow.
    if value >= Duration::from_millis(1) && value <= Duration::from_secs(86_400) {
        return Ok(());
    }
    Err(IngestError::Config {
        option,
        value: format!("{value:?}"),
        accepted: "accepted is 1ms to 24h".to_owned(),
    })
}
