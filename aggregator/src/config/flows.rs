//! Options of the sinks that take flow logs.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use api::Secret;
use records::flowlog::{FlowFormat, fields};

use super::{ConfigError, FlowMetric, bad, duration, range};
use crate::sinks::flow_metrics::{self, Limits};

/// Options of a Kafka sink.
#[derive(Clone, Debug, PartialEq)]
pub struct KafkaConfig {
    /// Brokers to start from, `host:port`.
    pub brokers: Vec<String>,
    /// Topic.
    pub topic: String,
    /// Types of the fields.
    pub format: FlowFormat,
    /// Compression of messages.
    pub compression: KafkaCompression,
    /// TLS; `None` for none.
    pub tls: Option<TlsFiles>,
    /// User and password; `None` for none.
    pub sasl: Option<Sasl>,
    /// Largest body before compression, bytes; at most what a broker takes as one batch.
    pub max_body_bytes: usize,
    /// Limit of one attempt.
    pub timeout: Duration,
    /// Bodies under way at once.
    pub in_flight: usize,
    /// First wait after a failure; doubles up to `retry_max`, with jitter.
    pub retry_min: Duration,
    /// Longest wait between tries.
    pub retry_max: Duration,
    /// Wait after a refused log-in.
    pub auth_retry: Duration,
    /// Bytes of dead-letter files kept for this sink.
    pub dead_letter_max_bytes: u64,
}

/// Compression of Kafka messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KafkaCompression {
    /// None.
    None,
    /// gzip
    Gzip,
    /// snappy
    #[default]
    Snappy,
}

/// User and password at Kafka.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sasl {
    /// How they are sent.
    pub mechanism: SaslMechanism,
    /// The user.
    pub user: String,
    /// The password.
    pub password: Secret,
}

/// How user and password are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SaslMechanism {
    /// In the clear, so over TLS only in earnest.
    Plain,
    /// SCRAM-SHA-256
    ScramSha256,
    /// SCRAM-SHA-512
    ScramSha512,
}

/// Certificates of a connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsFiles {
    /// PEM file with authorities beside the system's.
    pub ca: Option<PathBuf>,
    /// PEM file with the own certificate chain; together with `key`.
    pub cert: Option<PathBuf>,
    /// PEM file with its key.
    pub key: Option<PathBuf>,
    /// Accept any server certificate.
    pub insecure: bool,
}

/// Options of a Loki sink.
#[derive(Clone, Debug, PartialEq)]
pub struct LokiConfig {
    /// Address, without `/loki/api/v1/push`.
    pub url: reqwest::Url,
    /// Value of the header `X-Scope-OrgID`; empty for none.
    pub tenant: String,
    /// How we say who we are.
    pub auth: LokiAuth,
    /// Types of the fields.
    pub format: FlowFormat,
    /// Labels of every stream.
    pub static_labels: BTreeMap<String, String>,
    /// Fields that are left in the line.
    pub exclude_labels: Vec<String>,
    /// Largest body before compression, bytes.
    pub max_body_bytes: usize,
    /// Limit of one request.
    pub timeout: Duration,
    /// First wait after a failure; doubles up to `retry_max`, with jitter.
    pub retry_min: Duration,
    /// Longest wait between tries when the server names none.
    pub retry_max: Duration,
    /// Longest `Retry-After` that is obeyed.
    pub retry_after_max: Duration,
    /// Wait after 401 and 403.
    pub auth_retry: Duration,
    /// Bytes of dead-letter files kept for this sink.
    pub dead_letter_max_bytes: u64,
    /// TLS of an `https` address.
    pub tls: TlsFiles,
}

/// How Loki is told who we are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum LokiAuth {
    /// Not at all.
    #[default]
    None,
    /// A bearer token.
    Bearer(Secret),
    /// User and password.
    Basic {
        /// The user.
        user: String,
        /// The password.
        password: Secret,
    },
}

/// Options of metrics made from flows.
#[derive(Clone, Debug, PartialEq)]
pub struct PrometheusConfig {
    /// Put before their names.
    pub prefix: String,
    /// What is made.
    pub metrics: Vec<FlowMetric>,
    /// Series of one metric; further ones are summed up in one with the labels `other`.
    pub series_max: usize,
    /// A series without new flows for this long is dropped.
    pub expiry: Duration,
}

/// What is told of flows when conversations are followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowRecords {
    /// Conversations as they begin, go on and end.
    Conversations,
    /// Conversations as they end.
    EndedConversations,
    /// Flows as they are, with the conversation's id, and conversations.
    All,
}

/// How conversations are followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConversationOptions {
    /// What is told.
    pub records: FlowRecords,
    /// Time between two records of a conversation that goes on.
    pub heartbeat: Duration,
    /// Silence after which a conversation is over.
    pub end_timeout: Duration,
    /// The same once both ends have said that it is.
    pub terminating_timeout: Duration,
    /// Conversations followed at a time. Flows of further ones are told as they are with [`FlowRecords::All`], else counted.
    pub max: usize,
}

// === impl KafkaConfig ===

impl KafkaConfig {
    /// Defaults for one topic.
    #[must_use]
    pub fn new(brokers: Vec<String>, topic: impl Into<String>) -> Self {
        Self {
            brokers,
            topic: topic.into(),
            format: FlowFormat::Current,
            compression: KafkaCompression::Snappy,
            tls: None,
            sasl: None,
            max_body_bytes: 900 << 10,
            timeout: Duration::from_secs(10),
            in_flight: 4,
            retry_min: Duration::from_millis(500),
            retry_max: Duration::from_secs(30),
            auth_retry: Duration::from_secs(60),
            dead_letter_max_bytes: 256 << 20,
        }
    }

    pub(super) fn validate(&self, option: &dyn Fn(&str) -> String) -> Result<(), ConfigError> {
        let broker = |text: &String| {
            text.rsplit_once(':')
                .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0))
        };
        if self.brokers.is_empty() || !self.brokers.iter().all(broker) {
            return Err(bad(
                &option("address"),
                &self.brokers.join(","),
                "one or more of host:port is accepted",
            ));
        }
        let of_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if self.topic.is_empty() || self.topic.len() > 249 || !self.topic.chars().all(of_name) {
            return Err(bad(
                &option("topic"),
                &self.topic,
                "1 to 249 letters, digits, `.`, `_` and `-` are accepted",
            ));
        }
        range(
            &option("max_body_bytes"),
            self.max_body_bytes as u64,
            1 << 12,
            16 << 20,
            "bytes",
        )?;
        range(&option("in_flight"), self.in_flight as u64, 1, 64, "bodies")?;
        let ms = Duration::from_millis;
        duration(&option("timeout"), self.timeout, ms(1), ms(600_000))?;
        duration(&option("retry_min"), self.retry_min, ms(1), ms(60_000))?;
        duration(&option("retry_max"), self.retry_max, self.retry_min, ms(3_600_000))?;
        match &self.tls {
            Some(tls) => tls.validate(option),
            None => Ok(()),
        }
    }
}

// === impl TlsFiles ===

impl TlsFiles {
    fn validate(&self, option: &dyn Fn(&str) -> String) -> Result<(), ConfigError> {
        if self.cert.is_some() == self.key.is_some() {
            return Ok(());
        }
        Err(bad(
            &option("tls_cert"),
            "one of certificate and key",
            "both, or neither, is accepted",
        ))
    }
}

// === impl LokiConfig ===

impl LokiConfig {
    /// Defaults for one Loki.
    #[must_use]
    pub fn new(url: reqwest::Url) -> Self {
        Self {
            url,
            tenant: "netobserv".to_owned(),
            auth: LokiAuth::None,
            format: FlowFormat::Current,
            static_labels: [("app".to_owned(), "netobserv-flowcollector".to_owned())].into(),
            exclude_labels: Vec::new(),
            max_body_bytes: 10 << 20,
            timeout: Duration::from_secs(10),
            retry_min: Duration::from_secs(1),
            retry_max: Duration::from_secs(5),
            retry_after_max: Duration::from_secs(600),
            auth_retry: Duration::from_secs(60),
            dead_letter_max_bytes: 256 << 20,
            tls: TlsFiles::default(),
        }
    }

    pub(super) fn validate(&self, option: &dyn Fn(&str) -> String) -> Result<(), ConfigError> {
        let shown = format!("{}://{}", self.url.scheme(), self.url.host_str().unwrap_or_default());
        let plain = self.url.username().is_empty() && self.url.password().is_none() && self.url.query().is_none();
        if !matches!(self.url.scheme(), "http" | "https") || !self.url.has_host() || !plain {
            return Err(bad(
                &option("url"),
                &shown,
                "http(s)://HOST[:PORT] without user, password and query is accepted",
            ));
        }
        for (name, value) in &self.static_labels {
            let first = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
            let of_name = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
            if !first || !name.bytes().all(of_name) || value.is_empty() || value.len() > 1024 {
                return Err(bad(
                    &option("static_labels"),
                    &format!("{name}={value}"),
                    "names of letters, digits and `_`, and values of 1 to 1024 bytes are accepted",
                ));
            }
        }
        for name in &self.exclude_labels {
            if !fields::find(name).is_some_and(|field| field.is_label(self.format)) {
                let labels = fields::FIELDS.iter().filter(|field| field.is_label(self.format));
                let names: Vec<&str> = labels.map(|field| field.name).collect();
                return Err(bad(
                    &option("exclude_labels"),
                    name,
                    &format!("any of {} is accepted", names.join(", ")),
                ));
            }
        }
        let labels = fields::FIELDS
            .iter()
            .filter(|field| field.is_label(self.format) && !self.exclude_labels.iter().any(|name| name == field.name));
        if self.static_labels.is_empty() && labels.count() == 0 {
            return Err(bad(
                &option("static_labels"),
                "(none)",
                "at least one label is needed: Loki takes no stream without",
            ));
        }
        range(
            &option("max_body_bytes"),
            self.max_body_bytes as u64,
            1 << 10,
            64 << 20,
            "bytes",
        )?;
        let ms = Duration::from_millis;
        duration(&option("timeout"), self.timeout, ms(1), ms(600_000))?;
        duration(&option("retry_min"), self.retry_min, ms(1), ms(60_000))?;
        duration(&option("retry_max"), self.retry_max, self.retry_min, ms(3_600_000))?;
        self.tls.validate(option)
    }
}

// === impl ConversationOptions ===

impl ConversationOptions {
    pub(crate) fn heartbeat_ms(&self) -> u64 {
        millis(self.heartbeat)
    }

    pub(crate) fn end_timeout_ms(&self) -> u64 {
        millis(self.end_timeout)
    }

    pub(crate) fn terminating_timeout_ms(&self) -> u64 {
        millis(self.terminating_timeout)
    }

    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        let (s, h) = (Duration::from_secs(1), Duration::from_secs(3600));
        duration("conversations.heartbeat", self.heartbeat, s, h)?;
        duration("conversations.end_timeout", self.end_timeout, s, h)?;
        duration("conversations.terminating_timeout", self.terminating_timeout, s, h)?;
        range("conversations.max", self.max as u64, 1, 10_000_000, "conversations")
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

// === impl PrometheusConfig ===

impl PrometheusConfig {
    /// The predefined metrics that are on by default.
    #[must_use]
    pub fn new() -> Self {
        Self {
            prefix: "netobserv_".to_owned(),
            metrics: flow_metrics::predefined::default_list(),
            series_max: 10_000,
            expiry: Duration::from_secs(120),
        }
    }

    /// What bounds the series.
    pub(crate) fn limits(&self) -> Limits {
        Limits {
            prefix: self.prefix.clone(),
            series_max: self.series_max,
            expiry: self.expiry,
        }
    }

    pub(super) fn validate(&self, option: &dyn Fn(&str) -> String) -> Result<(), ConfigError> {
        range(&option("series_max"), self.series_max as u64, 1, 1_000_000, "series")?;
        let s = Duration::from_secs;
        duration(&option("expiry"), self.expiry, s(1), s(86_400))?;
        let of_name = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
        if self.prefix.starts_with(|c: char| c.is_ascii_digit()) || !self.prefix.bytes().all(of_name) {
            return Err(bad(
                &option("prefix"),
                &self.prefix,
                "letters, digits and `_` are accepted",
            ));
        }
        for (at, metric) in self.metrics.iter().enumerate() {
            let refused = |error: &flow_metrics::MetricError| {
                bad(
                    &option(&format!("metrics.{}.{}", metric.name, error.part)),
                    &error.value,
                    &error.accepted,
                )
            };
            flow_metrics::check(metric).map_err(|error| refused(&error))?;
            if self.metrics.iter().take(at).any(|other| other.name == metric.name) {
                return Err(bad(
                    &option("metrics"),
                    &metric.name,
                    "each metric needs a name of its own",
                ));
            }
        }
        Ok(())
    }
}

impl Default for PrometheusConfig {
    fn default() -> Self {
        Self::new()
    }
}
