//! What an aggregator is to do: the plain structures that the `aggregator` binary and `node-agent standalone` fill in.
//!
//! Nothing here reads files, flags or the environment. [`AggregatorConfig::validate`] names the option, the value and
//! what is accepted; [`crate::Aggregator::start`] calls it first.

mod flows;
mod from_options;

use std::{path::PathBuf, time::Duration};

use records::encode::{DEFAULT_BODY_LIMIT, Format};

pub use flows::{
    ConversationOptions, FlowRecords, KafkaCompression, KafkaConfig, LokiAuth, LokiConfig, PrometheusConfig, Sasl,
    SaslMechanism, TlsFiles,
};

pub use crate::sinks::{
    dataway::endpoint::{Endpoint, EndpointError},
    flow_metrics::{FlowMetric, MetricError},
};

/// Default bound of each sink's disk queue: 2 GiB.
pub const DEFAULT_QUEUE_MAX_BYTES: u64 = 2 << 30;
/// Default age at which a queued body is given up: 12 h.
pub const DEFAULT_QUEUE_MAX_AGE: Duration = Duration::from_secs(12 * 3600);

/// One aggregator.
#[derive(Clone, Debug, PartialEq)]
pub struct AggregatorConfig {
    /// Directory of the disk queue, created if absent; owned by one process at a time. Needed by DataWay sinks. Without
    /// it (terminal or file output only) batch identities are remembered in memory.
    pub queue_dir: Option<PathBuf>,
    /// Bound of each sink's queue in bytes on disk.
    pub queue_max_bytes: u64,
    /// A body older than this is dropped and counted as lost (`expired`).
    pub queue_max_age: Duration,
    /// Free bytes that the queue leaves on its file system; below that batches are refused (acknowledgements withheld).
    pub min_free_disk: u64,
    /// How long a commit waits for more batches when it is not full yet. Small agents share bodies and fsyncs that way.
    pub commit_linger: Duration,
    /// Records held in memory between `accept` and the commit; more wait at the door.
    pub max_pending_records: usize,
    /// Name of this host, for the `User-Agent` header.
    pub hostname: String,
    /// Where records go; each gets every record.
    pub sinks: Vec<SinkConfig>,
    /// Follow the conversations of flow logs; `None` tells flows as they are.
    pub conversations: Option<ConversationOptions>,
}

/// One sink.
#[derive(Clone, Debug, PartialEq)]
pub struct SinkConfig {
    /// Unique name: names its queue, metrics and ledger stages. Lower-case letters, digits, `-` and `_`, at most 63.
    pub name: String,
    /// What to do when the sink's queue has no room.
    pub when_full: WhenFull,
    /// Kind and its options.
    pub kind: SinkKind,
}

/// What happens to new records while a sink's queue has no room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WhenFull {
    /// Refuse the batch: agents keep it and send it again. No loss here, but all sinks wait.
    #[default]
    Withhold,
    /// Drop what is new for this sink alone, counted as lost (`queue_full`).
    DropNewest,
}

/// Kinds of sinks.
#[derive(Clone, Debug, PartialEq)]
#[allow(
    clippy::large_enum_variant,
    reason = "a handful per process; a box would only make it clumsier to fill in"
)]
pub enum SinkKind {
    /// DataWay over HTTP(S), through the disk queue.
    Dataway(DatawayConfig),
    /// Standard output of this process.
    Stdout(TextFormat),
    /// A file, written and synced before a batch is acknowledged.
    File(FileConfig),
    /// Flow logs to a Kafka topic, through the disk queue.
    Kafka(KafkaConfig),
    /// Flow logs to Loki, through the disk queue.
    Loki(LokiConfig),
    /// Metrics made from flow logs, among the process's own.
    Prometheus(PrometheusConfig),
}

/// Form of the text sinks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TextFormat {
    /// One JSON object per line.
    #[default]
    Json,
    /// Line protocol.
    LineProtocol,
    /// A readable table.
    Table,
}

/// Form of the points sent to DataWay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PointEncoding {
    /// `application/protobuf; proto=com.guance.Point`
    #[default]
    Protobuf,
    /// `application/line-protocol`
    LineProtocol,
}

/// Options of a DataWay sink.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatawayConfig {
    /// Address and token.
    pub endpoint: Endpoint,
    /// Form of the points.
    pub encoding: PointEncoding,
    /// gzip level 1..=9, or 0 for no compression.
    pub gzip_level: u32,
    /// Largest body before compression, bytes.
    pub max_body_bytes: usize,
    /// Limit of one request, from connect to the end of the answer.
    pub timeout: Duration,
    /// Requests under way at once.
    pub in_flight: usize,
    /// First wait after a failure; doubles up to `retry_max`, with jitter.
    pub retry_min: Duration,
    /// Longest wait between tries when the server names none.
    pub retry_max: Duration,
    /// Longest `Retry-After` that is obeyed.
    pub retry_after_max: Duration,
    /// Wait after 401 and 403. A wrong token is a mistake that is corrected later, so nothing is given up for it.
    pub auth_retry: Duration,
    /// Bytes of dead-letter files kept for this sink; the oldest go first.
    pub dead_letter_max_bytes: u64,
    /// PEM file with further certificate authorities.
    pub ca_file: Option<PathBuf>,
    /// Accept any server certificate.
    pub insecure_tls: bool,
    /// Proxy URL; `None` follows `HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY`.
    pub proxy: Option<String>,
    /// Also write the undocumented keys of the existing collector.
    pub compat_keys: bool,
}

/// Options of a file sink.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileConfig {
    /// File to append to.
    pub path: PathBuf,
    /// Form of the rows.
    pub format: TextFormat,
    /// Size at which the file is rotated to `<path>.1`, `<path>.2`, ...; `None` never rotates.
    pub rotate_bytes: Option<u64>,
    /// Rotated files kept.
    pub rotate_keep: u32,
}

/// An option that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{option}: `{value}` is not accepted; {accepted}")]
pub struct ConfigError {
    /// Name of the option as in this module, with the sink's name where there is one.
    pub option: String,
    /// The value given.
    pub value: String,
    /// What is accepted.
    pub accepted: String,
}

// === impl AggregatorConfig ===

impl AggregatorConfig {
    /// Defaults with the given sinks and queue directory.
    #[must_use]
    pub fn new(queue_dir: Option<PathBuf>, sinks: Vec<SinkConfig>) -> Self {
        Self {
            queue_dir,
            queue_max_bytes: DEFAULT_QUEUE_MAX_BYTES,
            queue_max_age: DEFAULT_QUEUE_MAX_AGE,
            min_free_disk: 64 << 20,
            commit_linger: Duration::from_millis(20),
            max_pending_records: 65_536,
            hostname: hostname(),
            sinks,
            conversations: None,
        }
    }

    /// Checks every option.
    ///
    /// # Errors
    /// [`ConfigError`] for the first option that cannot be used.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.sinks.is_empty() {
            return Err(bad("sinks", "(none)", "name at least one output"));
        }
        range("queue_max_bytes", self.queue_max_bytes, 1 << 16, 1 << 44, "bytes")?;
        duration(
            "queue_max_age",
            self.queue_max_age,
            Duration::from_secs(1),
            Duration::from_secs(30 * 86_400),
        )?;
        range(
            "max_pending_records",
            self.max_pending_records as u64,
            1,
            10_000_000,
            "records",
        )?;
        duration(
            "commit_linger",
            self.commit_linger,
            Duration::ZERO,
            Duration::from_secs(5),
        )?;
        if let Some(conversations) = &self.conversations {
            conversations.validate()?;
        }
        for (index, sink) in self.sinks.iter().enumerate() {
            sink.validate()?;
            if self.sinks.iter().take(index).any(|other| other.name == sink.name) {
                return Err(bad("sinks.name", &sink.name, "each sink needs a name of its own"));
            }
            if self.queue_dir.is_none() && sink.kind.is_queued() {
                return Err(bad(
                    "queue_dir",
                    "(none)",
                    "a sink over the network needs a directory for its disk queue",
                ));
            }
        }
        Ok(())
    }
}

// === impl SinkConfig ===

impl SinkConfig {
    /// A DataWay sink with defaults.
    #[must_use]
    pub fn dataway(name: impl Into<String>, endpoint: Endpoint) -> Self {
        Self {
            name: name.into(),
            when_full: WhenFull::default(),
            kind: SinkKind::Dataway(DatawayConfig::new(endpoint)),
        }
    }

    /// A standard output sink.
    #[must_use]
    pub fn stdout(format: TextFormat) -> Self {
        Self {
            name: "stdout".to_owned(),
            when_full: WhenFull::default(),
            kind: SinkKind::Stdout(format),
        }
    }

    /// A file sink that never rotates.
    #[must_use]
    pub fn file(path: PathBuf, format: TextFormat) -> Self {
        let file = FileConfig {
            path,
            format,
            rotate_bytes: None,
            rotate_keep: 5,
        };
        Self {
            name: "file".to_owned(),
            when_full: WhenFull::default(),
            kind: SinkKind::File(file),
        }
    }

    fn validate(&self) -> Result<(), ConfigError> {
        let name = &self.name;
        let ok = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '_';
        if name.is_empty() || name.len() > 63 || !name.chars().all(ok) {
            return Err(bad(
                "sinks.name",
                name,
                "1 to 63 lower-case letters, digits, `-` and `_` are accepted",
            ));
        }
        let option = |key: &str| format!("sinks.{name}.{key}");
        match &self.kind {
            SinkKind::Stdout(_) => Ok(()),
            SinkKind::File(file) => {
                if file.path.as_os_str().is_empty() || file.path.file_name().is_none() {
                    return Err(bad(&option("path"), &file.path.display().to_string(), "name a file"));
                }
                match file.rotate_bytes {
                    Some(bytes) => range(&option("rotate_bytes"), bytes, 1 << 12, 1 << 44, "bytes"),
                    None => Ok(()),
                }
            }
            SinkKind::Dataway(dataway) => dataway.validate(&option),
            SinkKind::Kafka(kafka) => kafka.validate(&option),
            SinkKind::Loki(loki) => loki.validate(&option),
            SinkKind::Prometheus(metrics) => metrics.validate(&option),
        }
    }
}

// === impl SinkKind ===

impl SinkKind {
    /// Whether its records wait in the disk queue.
    #[must_use]
    pub const fn is_queued(&self) -> bool {
        match self {
            Self::Dataway(_) | Self::Kafka(_) | Self::Loki(_) => true,
            Self::Stdout(_) | Self::File(_) | Self::Prometheus(_) => false,
        }
    }
}

// === impl DatawayConfig ===

impl DatawayConfig {
    /// Defaults for one DataWay.
    #[must_use]
    pub const fn new(endpoint: Endpoint) -> Self {
        Self {
            endpoint,
            encoding: PointEncoding::Protobuf,
            gzip_level: 2,
            max_body_bytes: DEFAULT_BODY_LIMIT,
            timeout: Duration::from_secs(30),
            in_flight: 4,
            retry_min: Duration::from_millis(500),
            retry_max: Duration::from_secs(30),
            retry_after_max: Duration::from_secs(600),
            auth_retry: Duration::from_secs(60),
            dead_letter_max_bytes: 256 << 20,
            ca_file: None,
            insecure_tls: false,
            proxy: None,
            compat_keys: false,
        }
    }

    fn validate(&self, option: &dyn Fn(&str) -> String) -> Result<(), ConfigError> {
        range(&option("gzip_level"), self.gzip_level.into(), 0, 9, "(0 is off)")?;
        range(
            &option("max_body_bytes"),
            self.max_body_bytes as u64,
            1 << 10,
            32 << 20,
            "bytes",
        )?;
        range(&option("in_flight"), self.in_flight as u64, 1, 64, "requests")?;
        let ms = Duration::from_millis;
        duration(&option("timeout"), self.timeout, ms(1), ms(600_000))?;
        duration(&option("retry_min"), self.retry_min, ms(1), ms(60_000))?;
        duration(&option("retry_max"), self.retry_max, self.retry_min, ms(3_600_000))?;
        duration(
            &option("retry_after_max"),
            self.retry_after_max,
            Duration::ZERO,
            ms(86_400_000),
        )?;
        duration(&option("auth_retry"), self.auth_retry, ms(1), ms(3_600_000))?;
        range(
            &option("dead_letter_max_bytes"),
            self.dead_letter_max_bytes,
            0,
            1 << 44,
            "bytes",
        )
    }
}

// === impl TextFormat ===

impl From<TextFormat> for Format {
    fn from(format: TextFormat) -> Self {
        match format {
            TextFormat::Json => Self::Json,
            TextFormat::LineProtocol => Self::LineProtocol,
            TextFormat::Table => Self::Table,
        }
    }
}

// === impl PointEncoding ===

impl From<PointEncoding> for Format {
    fn from(encoding: PointEncoding) -> Self {
        match encoding {
            PointEncoding::Protobuf => Self::Protobuf,
            PointEncoding::LineProtocol => Self::LineProtocol,
        }
    }
}

/// This machine's host name; empty if the kernel has none.
#[must_use]
pub fn hostname() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map(|name| name.trim().to_owned())
        .unwrap_or_default()
}

fn bad(option: &str, value: &str, accepted: &str) -> ConfigError {
    ConfigError {
        option: option.to_owned(),
        value: value.to_owned(),
        accepted: accepted.to_owned(),
    }
}

fn range(option: &str, value: u64, min: u64, max: u64, unit: &str) -> Result<(), ConfigError> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    Err(bad(
        option,
        &value.to_string(),
        format!("{min} to {max} {unit} is accepted").trim(),
    ))
}

fn duration(option: &str, value: Duration, min: Duration, max: Duration) -> Result<(), ConfigError> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    let text = humantime::format_duration;
    Err(bad(
        option,
        &text(value).to_string(),
        &format!("{} to {} is accepted", text(min), text(max)),
    ))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    fn endpoint() -> Endpoint {
        Endpoint::parse("http://127.0.0.1:1/?token=tkn_0123456789abcdef0123456789abcdef").unwrap()
    }

    #[test]
    fn defaults_are_accepted() {
        let dir = Some(PathBuf::from("/q"));
        AggregatorConfig::new(dir, vec![SinkConfig::dataway("dataway", endpoint())])
            .validate()
            .unwrap();
        AggregatorConfig::new(None, vec![SinkConfig::stdout(TextFormat::Table)])
            .validate()
            .unwrap();
    }

    #[test]
    fn errors_name_option_value_and_range() {
        let refused = |change: &dyn Fn(&mut AggregatorConfig)| {
            let mut config =
                AggregatorConfig::new(Some(PathBuf::from("/q")), vec![SinkConfig::dataway("main", endpoint())]);
            change(&mut config);
            config.validate().unwrap_err().to_string()
        };
        let dataway = |config: &mut AggregatorConfig, change: &dyn Fn(&mut DatawayConfig)| {
            let SinkKind::Dataway(dataway) = &mut config.sinks[0].kind else {
                unreachable!()
            };
            change(dataway);
        };
        assert_eq!(
            refused(&|c| c.queue_max_bytes = 10),
            "queue_max_bytes: `10` is not accepted; 65536 to 17592186044416 bytes is accepted"
        );
        assert_eq!(
            refused(&|c| dataway(c, &|d| d.gzip_level = 10)),
            "sinks.main.gzip_level: `10` is not accepted; 0 to 9 (0 is off) is accepted"
        );
        assert_eq!(
            refused(&|c| dataway(c, &|d| d.timeout = Duration::ZERO)),
            "sinks.main.timeout: `0s` is not accepted; 1ms to 10m is accepted"
        );
        assert!(refused(&|c| c.queue_dir = None).starts_with("queue_dir: `(none)`"));
        assert!(refused(&|c| c.sinks.clear()).starts_with("sinks: `(none)`"));
        assert!(refused(&|c| c.sinks[0].name = "Über".to_owned()).starts_with("sinks.name: `Über`"));
        assert!(refused(&|c| c.sinks.push(c.sinks[0].clone())).contains("a name of its own"));
    }
}
