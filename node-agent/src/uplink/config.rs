//! What the uplink is told, and what it refuses to be told.

use std::{net::IpAddr, path::PathBuf, sync::Arc, time::Duration};

use aggregator::pipeline::Accept;
use proto::limits;
use records::{Globals, Str};

/// Settings of the uplink. [`UplinkConfig::new`] gives the defaults.
#[derive(Clone)]
pub struct UplinkConfig {
    /// Node (host) name.
    pub node: Str,
    /// Random number of this start of the agent, not 0. [`UplinkConfig::new`] draws one.
    pub boot_id: u64,
    /// Version of the agent, for the aggregator's log.
    pub agent_version: Str,
    /// Tags of all records.
    pub globals: Arc<Globals>,
    /// Where batches go.
    pub transport: Transport,
    /// Batches kept until acknowledged; more make [`send`](super::UplinkHandle::send) wait. Default 1024.
    pub window_batches: usize,
    /// Bytes of memory of the kept batches. Default 64 MiB.
    pub window_bytes: usize,
    /// Records of one message. Default 2,000.
    pub batch_records: usize,
    /// Bytes of one message. Default and most 1 MiB.
    pub batch_bytes: usize,
    /// Wait between attempts.
    pub backoff: Backoff,
    /// A batch not acknowledged for this long means the stream is stuck: it is opened anew. Default 60 s. gRPC only.
    pub ack_timeout: Duration,
}

/// Where batches go.
#[derive(Clone)]
pub enum Transport {
    /// To an aggregator elsewhere.
    Grpc(GrpcConfig),
    /// To the aggregator inside this process (`standalone`).
    Local(Arc<dyn Accept>),
}

/// Settings of the gRPC transport. [`GrpcConfig::new`] gives the defaults.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrpcConfig {
    /// `http://HOST:PORT` or `https://HOST:PORT`.
    pub endpoint: String,
    /// Certificates; needed for `https`, refused for `http`.
    pub tls: Option<ClientTls>,
    /// Plaintext to a host that is not loopback: everybody on the way can read and alter records.
    pub allow_plaintext: bool,
    /// Time for connecting, TLS and the Hello. Default 10 s.
    pub connect_timeout: Duration,
    /// HTTP/2 ping after this silence. Default 20 s.
    pub keepalive_interval: Duration,
    /// A peer that does not answer a ping for this long is gone. Default 10 s.
    pub keepalive_timeout: Duration,
}

/// Client side of TLS with client certificates. The files are read at every connect, so a rotated certificate is used
/// from the next connection on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientTls {
    /// PEM certificate chain of this agent.
    pub cert: PathBuf,
    /// PEM private key of this agent.
    pub key: PathBuf,
    /// PEM certificates of the authorities that sign the aggregator.
    pub ca: PathBuf,
    /// Name the aggregator's certificate must have; default is the endpoint's host.
    pub server_name: Option<String>,
}

/// Jittered exponential backoff: the n-th wait (from 1) is random between `min` and `min * 2^n`, at most `max`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    /// Shortest wait. Default 100 ms.
    pub min: Duration,
    /// Longest wait. Default 30 s.
    pub max: Duration,
}

/// Why the uplink does not start.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum UplinkError {
    /// A setting is out of its range.
    #[error("uplink option `{option}` is {value}: {accepted}")]
    Config {
        /// Field of [`UplinkConfig`] or [`GrpcConfig`].
        option: &'static str,
        /// What was given.
        value: String,
        /// What is accepted.
        accepted: String,
    },
    /// Plaintext was asked for where others can listen.
    #[error(
        "refusing to send to {endpoint} without TLS: it is not a loopback address; use https with a certificate, key \
         and CA, or allow plaintext explicitly"
    )]
    Plaintext {
        /// The endpoint.
        endpoint: String,
    },
}

// === impl UplinkConfig ===

impl UplinkConfig {
    /// Defaults, with a boot id drawn now.
    #[must_use]
    pub fn new(node: Str, globals: Arc<Globals>, transport: Transport) -> Self {
        Self {
            node,
            boot_id: rand::random_range(1..=u64::MAX),
            agent_version: env!("CARGO_PKG_VERSION").into(),
            globals,
            transport,
            window_batches: 1024,
            window_bytes: 64 << 20,
            batch_records: limits::MAX_BATCH_RECORDS,
            batch_bytes: limits::MAX_BATCH_BYTES,
            backoff: Backoff::default(),
            ack_timeout: Duration::from_secs(60),
        }
    }

    /// Checks every setting against its range.
    ///
    /// # Errors
    /// [`UplinkError`] names the first setting that is out of range, or the endpoint that may not be plaintext.
    pub fn validate(&self) -> Result<(), UplinkError> {
        if self.node.is_empty() || self.node.len() > limits::MAX_STRING_BYTES {
            return Err(UplinkError::Config {
                option: "node",
                value: format!("{} bytes long", self.node.len()),
                accepted: format!("accepted is a name of 1 to {} bytes", limits::MAX_STRING_BYTES),
            });
        }
        if self.boot_id == 0 {
            return Err(UplinkError::Config {
                option: "boot_id",
                value: "0".to_owned(),
                accepted: "accepted is any other number".to_owned(),
            });
        }
        in_range("window_batches", self.window_batches, 1, 1 << 20)?;
        in_range("batch_records", self.batch_records, 1, limits::MAX_BATCH_RECORDS)?;
        in_range(
            "batch_bytes",
            self.batch_bytes,
            limits::MAX_RECORD_BYTES,
            limits::MAX_BATCH_BYTES,
        )?;
        // Room for one batch of largest size, else `send` could wait for ever.
        in_range("window_bytes", self.window_bytes, 4 * self.batch_bytes, 1 << 40)?;
        self.backoff.validate()?;
        positive("ack_timeout", self.ack_timeout)?;
        match &self.transport {
            Transport::Local(_) => Ok(()),
            Transport::Grpc(grpc) => grpc.validate(),
        }
    }
}

// === impl GrpcConfig ===

impl GrpcConfig {
    /// Defaults for an endpoint.
    #[must_use]
    pub fn new(endpoint: impl Into<String>) -> Self {
        Self {
            endpoint: endpoint.into(),
            tls: None,
            allow_plaintext: false,
            connect_timeout: Duration::from_secs(10),
            keepalive_interval: Duration::from_secs(20),
            keepalive_timeout: Duration::from_secs(10),
        }
    }

    fn validate(&self) -> Result<(), UplinkError> {
        positive("connect_timeout", self.connect_timeout)?;
        positive("keepalive_interval", self.keepalive_interval)?;
        positive("keepalive_timeout", self.keepalive_timeout)?;
        let bad = |accepted: &str| UplinkError::Config {
            option: "endpoint",
            value: format!("`{}`", self.endpoint),
            accepted: accepted.to_owned(),
        };
        let uri: tonic::transport::Uri = self
            .endpoint
            .parse()
            .map_err(|err| bad(&format!("{err}; accepted is http(s)://HOST:PORT")))?;
        let host = uri.host().filter(|host| !host.is_empty());
        let (Some(scheme), Some(host), Some(_)) = (uri.scheme_str(), host, uri.port_u16()) else {
            return Err(bad("accepted is http(s)://HOST:PORT"));
        };
        match (scheme, &self.tls) {
            ("https", Some(_)) => Ok(()),
            ("https", None) => Err(bad("https needs a certificate, a key and a CA")),
            ("http", Some(_)) => Err(bad("certificates are given, so the scheme must be https")),
            ("http", None) if self.allow_plaintext || is_loopback(host) => Ok(()),
            ("http", None) => Err(UplinkError::Plaintext {
                endpoint: self.endpoint.clone(),
            }),
            _ => Err(bad("the scheme must be http or https")),
        }
    }
}

// === impl Backoff ===

impl Default for Backoff {
    fn default() -> Self {
        Self {
            min: Duration::from_millis(100),
            max: Duration::from_secs(30),
        }
    }
}

impl Backoff {
    fn validate(self) -> Result<(), UplinkError> {
        positive("backoff.min", self.min)?;
        positive("backoff.max", self.max)?;
        if self.min > self.max {
            return Err(UplinkError::Config {
                option: "backoff.min",
                value: format!("{:?}", self.min),
                accepted: format!("accepted is at most backoff.max, {:?}", self.max),
            });
        }
        Ok(())
    }

    /// The wait before attempt `attempt`, counted from 0.
    pub(super) fn delay(self, attempt: u32) -> Duration {
        let ceiling = self
            .min
            .saturating_mul(2_u32.saturating_pow(attempt.min(30) + 1))
            .min(self.max);
        rand::random_range(self.min..=ceiling.max(self.min))
    }
}

/// Names are not resolved: `localhost` is loopback by RFC 6761, any other name is not known to be.
fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    bare.eq_ignore_ascii_case("localhost")
        || bare
            .parse::<IpAddr>()
            .is_ok_and(|address| address.to_canonical().is_loopback())
}

fn in_range(option: &'static str, value: usize, min: usize, max: usize) -> Result<(), UplinkError> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    Err(UplinkError::Config {
        option,
        value: value.to_string(),
        accepted: format!("accepted is {min} to {max}"),
    })
}

fn positive(option: &'static str, value: Duration) -> Result<(), UplinkError> {
    // A day is beyond every use and keeps sums of durations far from overflow.
    if value >= Duration::from_millis(1) && value <= Duration::from_secs(86_400) {
        return Ok(());
    }
    Err(UplinkError::Config {
        option,
        value: format!("{value:?}"),
        accepted: "accepted is 1ms to 24h".to_owned(),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    fn config(endpoint: &str) -> UplinkConfig {
        UplinkConfig::new("n1".into(), Arc::default(), Transport::Grpc(GrpcConfig::new(endpoint)))
    }

    fn grpc(config: &mut UplinkConfig) -> &mut GrpcConfig {
        match &mut config.transport {
            Transport::Grpc(grpc) => grpc,
            Transport::Local(_) => unreachable!("built as gRPC"),
        }
    }

    #[test]
    fn plaintext_is_for_loopback_or_by_flag() {
        for endpoint in [
            "http://127.0.0.1:1",
            "http://[::1]:1",
            "http://localhost:1",
            "http://[::ffff:127.0.0.1]:1",
        ] {
            assert_eq!(config(endpoint).validate(), Ok(()), "{endpoint}");
        }
        for endpoint in ["http://10.0.0.1:1", "http://[fd00::1]:1", "http://aggregator.svc:1"] {
            let mut refused = config(endpoint);
            assert!(
                matches!(refused.validate(), Err(UplinkError::Plaintext { .. })),
                "{endpoint}"
            );
            grpc(&mut refused).allow_plaintext = true;
            assert_eq!(refused.validate(), Ok(()), "{endpoint}");
        }
    }

    #[test]
    fn endpoints_that_are_none_are_named() {
        for endpoint in [
            "",
            "127.0.0.1",
            "127.0.0.1:80",
            "http://127.0.0.1",
            "ftp://127.0.0.1:1",
            "https://127.0.0.1:1",
        ] {
            let error = config(endpoint).validate().expect_err(endpoint).to_string();
            assert!(
                error.contains("`endpoint`") && error.contains(&format!("`{endpoint}`")),
                "{error}"
            );
        }
    }

    #[test]
    fn ranges_are_checked() {
        let mut wrong = config("http://127.0.0.1:1");
        wrong.backoff = Backoff {
            min: Duration::from_secs(2),
            max: Duration::from_secs(1),
        };
        assert!(
            wrong
                .validate()
                .is_err_and(|err| err.to_string().contains("backoff.min"))
        );
        let mut wrong = config("http://127.0.0.1:1");
        wrong.window_bytes = 1;
        assert!(
            wrong
                .validate()
                .is_err_and(|err| err.to_string().contains("window_bytes"))
        );
        let mut wrong = config("http://127.0.0.1:1");
        wrong.boot_id = 0;
        assert!(wrong.validate().is_err());
    }

    #[test]
    fn backoff_grows_within_its_bounds() {
        let backoff = Backoff {
            min: Duration::from_millis(10),
            max: Duration::from_millis(200),
        };
        for attempt in 0..200 {
            let delay = backoff.delay(attempt);
            assert!(
                delay >= backoff.min && delay <= backoff.max,
                "attempt {attempt}: {delay:?}"
            );
        }
        assert!(backoff.delay(0) <= backoff.min * 2);
    }
}
