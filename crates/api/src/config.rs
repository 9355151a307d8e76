//! The agent's configuration, typed: what every option of the table ends up as.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use crate::{
    Bytes, ConfigError, ConfigErrors, DatawayEncoding, DatawayUrl, Endpoint, FileFormat, FlowFormat, FlowLogTypes,
    HostPort, HttpRoute, KafkaCompression, KafkaSasl, L7Flow, LogFormat, Plugin, Raw, Secret, StdoutFormat,
    SubnetLabel, options,
};

/// All options. Build it with [`crate::ConfigBuilder`].
#[derive(Clone, Debug, PartialEq)]
pub struct AgentConfig {
    /// Plugins to run.
    pub plugins: BTreeSet<Plugin>,
    /// Collection cycle.
    pub interval: Duration,
    /// Tags added to every record.
    pub tags: BTreeMap<String, String>,
    /// `ebpf-net`.
    pub net: NetConfig,
    /// `ebpf-trace`.
    pub trace: TraceConfig,
    /// `bpf-netlog`.
    pub netlog: NetlogConfig,
    /// Sampling of records.
    pub sampling: SamplingConfig,
    /// Resource limits.
    pub limits: LimitsConfig,
    /// Names on records.
    pub identity: IdentityConfig,
    /// Kubernetes access.
    pub kubernetes: KubernetesConfig,
    /// Agent to aggregator.
    pub uplink: UplinkConfig,
    /// Where records go (standalone and aggregator).
    pub outputs: OutputsConfig,
    /// Disk queue (standalone and aggregator).
    pub queue: QueueConfig,
    /// Sizes of kernel maps.
    pub kernel: KernelConfig,
    /// Logs.
    pub log: LogConfig,
    /// Profiling service.
    pub pprof: PprofConfig,
    /// Where the admin server listens.
    pub admin_listen: SocketAddr,
    /// Options that were given and have no effect, with the reason. To be logged at start.
    pub warnings: Vec<String>,
}

/// `ebpf-net`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// Application protocols to read.
    pub l7: BTreeSet<L7Flow>,
    /// Only until the builder has folded it into `l7`.
    pub(crate) l7_disabled: Option<BTreeSet<L7Flow>>,
    /// Leave IPv6 out.
    pub ipv6_disabled: bool,
    /// First port that counts as ephemeral.
    pub ephemeral_port: u16,
    /// Report flows of the loopback interface.
    pub loopback: bool,
    /// Ports that look-ups of DNS are looked for at; none for no `dnsflow`.
    pub dns_ports: BTreeSet<u16>,
    /// Tell the names that were looked up.
    pub dns_names: bool,
    /// Keep the query strings of HTTP requests.
    pub http_keep_query: bool,
    /// Longest path of an HTTP request that is kept, in bytes.
    pub http_path_limit: u16,
    /// Patterns that stand for the paths that match them.
    pub http_routes: Vec<HttpRoute>,
    /// `httpflow` records of an interval that have paths of their own.
    pub http_series_max: u32,
}

/// `ebpf-trace`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceConfig {
    /// Where spans go.
    pub server: Option<HostPort>,
    /// Trace every process.
    pub all_process: bool,
    /// Trace processes with any of these environment variables.
    pub env_list: Vec<String>,
    /// Never trace processes with any of these environment variables.
    pub env_blacklist: Vec<String>,
    /// Trace processes of these names.
    pub name_list: Vec<String>,
    /// Never trace processes of these names.
    pub name_blacklist: Vec<String>,
    /// Convert trace ids of applications to decimal.
    pub conv_to_ddtrace: bool,
}

/// `bpf-netlog`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetlogConfig {
    /// Rules of packets to leave out.
    pub blacklist: Option<String>,
    /// Make network records.
    pub metric: bool,
    /// Make logs.
    pub log: bool,
    /// N of 1:N packets; 1 for all.
    pub sampling: u32,
    /// Time that packets of a flow are summed up for.
    pub cache_active_timeout: Duration,
    /// Flows kept in the kernel.
    pub cache_max_flows: u32,
    /// Names of interfaces, or expressions between slashes; empty for all.
    pub interfaces: Vec<String>,
    /// Interfaces that are left out, likewise.
    pub exclude_interfaces: Vec<String>,
    /// Name of the cluster in flows.
    pub cluster_name: Option<String>,
    /// Namespaces whose traffic is the infrastructure's, by name or by its beginning before a `*`.
    pub infra_namespaces: Vec<String>,
    /// Names of address ranges.
    pub subnet_labels: Vec<SubnetLabel>,
}

/// How conversations of flows are followed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConversationsConfig {
    /// Time between two records of one that goes on.
    pub heartbeat: Duration,
    /// Silence after which one is over.
    pub end_timeout: Duration,
    /// The same once both ends have closed.
    pub terminating_timeout: Duration,
    /// So many at a time.
    pub max: u32,
}

/// Sampling of records; at most one is set.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingConfig {
    /// Share of records to report, 0.01 to 1.
    pub rate: Option<f64>,
    /// Records per minute above which the share is lowered.
    pub pts_per_min: Option<u64>,
}

/// Resource limits; unset means none.
#[derive(Clone, Debug, PartialEq)]
pub struct LimitsConfig {
    /// CPU cores.
    pub cpu: Option<f64>,
    /// Resident memory.
    pub mem: Option<Bytes>,
    /// Traffic of any interface, per second.
    pub net: Option<Bytes>,
}

/// Names on records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentityConfig {
    /// Value of the tag `host`; unset: the kernel's host name.
    pub hostname: Option<String>,
    /// Value of the tag `service`; unset: no such tag.
    pub service: Option<String>,
    /// Where the host's root file system is.
    pub host_root: PathBuf,
    /// Where the host's `/proc` is; unset: `proc` below `host_root`.
    pub host_proc: Option<PathBuf>,
}

/// Kubernetes access.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KubernetesConfig {
    /// The object to run with; unset: none.
    pub collector: Option<String>,
    /// API server; unset: the one of the pod's service account, if the agent is in a pod.
    pub url: Option<Endpoint>,
    /// File with the bearer token.
    pub bearer_token_file: Option<PathBuf>,
    /// The bearer token itself.
    pub bearer_token: Option<Secret>,
    /// Labels of workloads to add as tags.
    pub workload_labels: Vec<String>,
    /// Put before the names of those tags.
    pub workload_label_prefix: Option<String>,
}

/// Agent to aggregator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UplinkConfig {
    /// The aggregator.
    pub aggregator: Option<Endpoint>,
    /// Certificates; the server side uses them too.
    pub tls: TlsConfig,
    /// Allow a connection without TLS beyond loopback.
    pub allow_plaintext: bool,
}

/// Certificates, as PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsConfig {
    /// Authorities to trust.
    pub ca: Option<PathBuf>,
    /// Own certificate chain; set together with `key`.
    pub cert: Option<PathBuf>,
    /// Key of `cert`.
    pub key: Option<PathBuf>,
    /// Name to expect in the server's certificate; unset: the host of the address.
    pub server_name: Option<String>,
}

/// Where records go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutputsConfig {
    /// DataWay servers as given; see [`OutputsConfig::dataway_with_tokens`].
    pub dataway: Vec<DatawayUrl>,
    /// File with the token of servers whose URL has none.
    pub dataway_token_file: Option<PathBuf>,
    /// Body format.
    pub dataway_encoding: DatawayEncoding,
    /// Compress bodies.
    pub dataway_gzip: bool,
    /// Write records to this file too.
    pub file: Option<PathBuf>,
    /// Format of that file.
    pub file_format: FileFormat,
    /// Write records to standard output too.
    pub stdout: StdoutFormat,
    /// Types of the fields of flows.
    pub flow_format: FlowFormat,
    /// What is told of flows.
    pub flow_log_types: FlowLogTypes,
    /// Conversations of flows.
    pub conversations: ConversationsConfig,
    /// Flows to Kafka.
    pub kafka: KafkaOptions,
    /// Flows to Loki.
    pub loki: LokiOptions,
    /// Metrics made from flows.
    pub flow_metrics: FlowMetricsOptions,
}

/// Flows to Kafka.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KafkaOptions {
    /// Brokers to start from; none for no Kafka.
    pub address: Vec<String>,
    /// Topic.
    pub topic: Option<String>,
    /// Compression of messages.
    pub compression: KafkaCompression,
    /// Speak TLS.
    pub tls: bool,
    /// Certificates.
    pub files: OutputTls,
    /// How user and password are sent.
    pub sasl: KafkaSasl,
    /// File with the user.
    pub user_file: Option<PathBuf>,
    /// File with the password.
    pub password_file: Option<PathBuf>,
}

/// Flows to Loki.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LokiOptions {
    /// Address; unset: no Loki.
    pub url: Option<String>,
    /// Tenant.
    pub tenant: String,
    /// Longest wait for an answer.
    pub timeout: Duration,
    /// Most bytes of one push.
    pub batch_size: Bytes,
    /// First pause before a repeat.
    pub min_backoff: Duration,
    /// Longest pause before a repeat.
    pub max_backoff: Duration,
    /// Labels of every stream.
    pub static_labels: BTreeMap<String, String>,
    /// Fields that stay in the line.
    pub exclude_labels: Vec<String>,
    /// File with the bearer token.
    pub token_file: Option<PathBuf>,
    /// User.
    pub user: Option<String>,
    /// File with the password.
    pub password_file: Option<PathBuf>,
    /// Certificates.
    pub files: OutputTls,
}

/// Certificates of a connection to an output, as PEM files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OutputTls {
    /// Do not check the other end's certificate.
    pub insecure: bool,
    /// Authorities to trust.
    pub ca: Option<PathBuf>,
    /// Own certificate chain; set together with `key`.
    pub cert: Option<PathBuf>,
    /// Key of `cert`.
    pub key: Option<PathBuf>,
}

/// Metrics made from flows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlowMetricsOptions {
    /// Whether they are made.
    pub enable: bool,
    /// Put before their names.
    pub prefix: String,
    /// Predefined ones, `default` for those that are on by default.
    pub include: Vec<String>,
    /// One's own, as a JSON list.
    pub custom: Option<String>,
    /// Series of one metric.
    pub series_max: u32,
    /// How long a series is kept without new flows.
    pub expiry: Duration,
}

/// Disk queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueConfig {
    /// Directory.
    pub dir: PathBuf,
    /// Most bytes on disk.
    pub max_size: Bytes,
    /// Oldest record kept.
    pub max_age: Duration,
}

/// Sizes of kernel maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelConfig {
    /// TCP connections watched at one time.
    pub tcp_connections_max: u32,
    /// Flows per interval in maps keyed by flow.
    pub flow_map_entries: u32,
    /// Bytes of each ring buffer: a power of two times 4 KiB.
    pub ring_buffer_size: Bytes,
}

/// Logs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogConfig {
    /// Level or filter.
    pub level: String,
    /// Shape of a line.
    pub format: LogFormat,
}

/// Profiling service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PprofConfig {
    /// Host to listen on.
    pub host: Option<String>,
    /// Port to listen on.
    pub port: Option<u16>,
}

/// What this build can do; see [`AgentConfig::plugins_not_built`].
const BUILT_PLUGINS: &[Plugin] = &[
    Plugin::EbpfNet,
    Plugin::EbpfBash,
    Plugin::EbpfConntrack,
    Plugin::BpfNetlog,
];

// === impl AgentConfig ===

impl AgentConfig {
    /// True if `ebpf-conntrack` is enabled without `ebpf-net`, to whose records it adds: it has no effect then.
    #[must_use]
    pub fn lacks_net_for_conntrack(&self) -> bool {
        self.plugins.contains(&Plugin::EbpfConntrack) && !self.plugins.contains(&Plugin::EbpfNet)
    }

    /// Enabled plugins that this build does not have, like `bpf-netlog`. The agent logs them and runs the others.
    #[must_use]
    pub fn plugins_not_built(&self) -> Vec<String> {
        let plugins = self.plugins.iter().filter(|plugin| !BUILT_PLUGINS.contains(plugin));
        plugins.map(ToString::to_string).collect()
    }

    /// Options that differ from `new` and take effect at the next start only, as `option = new value`. Secrets are hidden.
    #[must_use]
    pub fn at_next_start(&self, new: &Self) -> Vec<String> {
        options()
            .iter()
            .filter(|spec| spec.at_start && (spec.get)(self) != (spec.get)(new))
            .map(|spec| match (spec.get)(new) {
                Some(value) => format!("{} = {value}", spec.key),
                None => format!("{} unset", spec.key),
            })
            .collect()
    }

    /// The configuration as a TOML file: every option that has a value, secrets hidden.
    #[must_use]
    pub fn to_toml(&self) -> String {
        let mut table = toml::Table::new();
        for spec in options() {
            let value = match (spec.get)(self) {
                None => continue,
                Some(Raw::Text(text)) => toml::Value::String(text),
                Some(Raw::List(items)) => items.into(),
                Some(Raw::Map(map)) => toml::Table::from_iter(map.into_iter().map(|(k, v)| (k, v.into()))).into(),
            };
            table.insert(spec.key.to_owned(), value);
        }
        let inputs = toml::Table::from_iter([("ebpf".to_owned(), toml::Value::Array(vec![table.into()]))]);
        toml::Table::from_iter([("inputs".to_owned(), toml::Value::Table(inputs))]).to_string()
    }

    /// The configuration before defaults are applied.
    pub(crate) fn blank() -> Self {
        Self {
            plugins: BTreeSet::new(),
            interval: Duration::ZERO,
            tags: BTreeMap::new(),
            net: NetConfig {
                l7: BTreeSet::new(),
                l7_disabled: None,
                ipv6_disabled: false,
                ephemeral_port: 0,
                loopback: false,
                dns_ports: BTreeSet::new(),
                dns_names: false,
                http_keep_query: false,
                http_path_limit: 0,
                http_routes: Vec::new(),
                http_series_max: 0,
            },
            trace: TraceConfig {
                server: None,
                all_process: false,
                env_list: Vec::new(),
                env_blacklist: Vec::new(),
                name_list: Vec::new(),
                name_blacklist: Vec::new(),
                conv_to_ddtrace: false,
            },
            netlog: NetlogConfig {
                blacklist: None,
                metric: false,
                log: false,
                sampling: 0,
                cache_active_timeout: Duration::ZERO,
                cache_max_flows: 0,
                interfaces: Vec::new(),
                exclude_interfaces: Vec::new(),
                cluster_name: None,
                infra_namespaces: Vec::new(),
                subnet_labels: Vec::new(),
            },
            sampling: SamplingConfig {
                rate: None,
                pts_per_min: None,
            },
            limits: LimitsConfig {
                cpu: None,
                mem: None,
                net: None,
            },
            identity: IdentityConfig {
                hostname: None,
                service: None,
                host_root: PathBuf::new(),
                host_proc: None,
            },
            kubernetes: KubernetesConfig {
                collector: None,
                url: None,
                bearer_token_file: None,
                bearer_token: None,
                workload_labels: Vec::new(),
                workload_label_prefix: None,
            },
            uplink: UplinkConfig {
                aggregator: None,
                tls: TlsConfig {
                    ca: None,
                    cert: None,
                    key: None,
                    server_name: None,
                },
                allow_plaintext: false,
            },
            outputs: OutputsConfig {
                dataway: Vec::new(),
                dataway_token_file: None,
                dataway_encoding: DatawayEncoding::Protobuf,
                dataway_gzip: false,
                file: None,
                file_format: FileFormat::Json,
                stdout: StdoutFormat::Off,
                flow_format: FlowFormat::Current,
                flow_log_types: FlowLogTypes::Flows,
                conversations: ConversationsConfig {
                    heartbeat: Duration::ZERO,
                    end_timeout: Duration::ZERO,
                    terminating_timeout: Duration::ZERO,
                    max: 0,
                },
                kafka: KafkaOptions {
                    address: Vec::new(),
                    topic: None,
                    compression: KafkaCompression::None,
                    tls: false,
                    files: OutputTls::default(),
                    sasl: KafkaSasl::Disabled,
                    user_file: None,
                    password_file: None,
                },
                loki: LokiOptions {
                    url: None,
                    tenant: String::new(),
                    timeout: Duration::ZERO,
                    batch_size: Bytes(0),
                    min_backoff: Duration::ZERO,
                    max_backoff: Duration::ZERO,
                    static_labels: BTreeMap::new(),
                    exclude_labels: Vec::new(),
                    token_file: None,
                    user: None,
                    password_file: None,
                    files: OutputTls::default(),
                },
                flow_metrics: FlowMetricsOptions {
                    enable: false,
                    prefix: String::new(),
                    include: Vec::new(),
                    custom: None,
                    series_max: 0,
                    expiry: Duration::ZERO,
                },
            },
            queue: QueueConfig {
                dir: PathBuf::new(),
                max_size: Bytes(0),
                max_age: Duration::ZERO,
            },
            kernel: KernelConfig {
                tcp_connections_max: 0,
                flow_map_entries: 0,
                ring_buffer_size: Bytes(0),
            },
            log: LogConfig {
                level: String::new(),
                format: LogFormat::Text,
            },
            pprof: PprofConfig { host: None, port: None },
            admin_listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            warnings: Vec::new(),
        }
    }
}

impl Default for AgentConfig {
    /// Every option at its documented default.
    fn default() -> Self {
        let mut config = Self::blank();
        for spec in options() {
            if let Some(default) = spec.default {
                // A default that its own parser refuses fails the tests of the table.
                let _ = (spec.set)(&mut config, &Raw::Text(default.to_owned()));
            }
        }
        config
    }
}

// === impl OutputsConfig ===

impl OutputsConfig {
    /// Reads a file with one secret.
    ///
    /// # Errors
    /// When it cannot be read or is empty; names the option.
    pub fn secret_file(option: &str, path: &std::path::Path) -> Result<Secret, ConfigErrors> {
        let refuse = |problem: String| {
            ConfigErrors(vec![ConfigError {
                option: option.into(),
                value: Some(path.display().to_string()),
                origin: None,
                problem,
                accepted: Some("a readable file with one line".into()),
            }])
        };
        let text = fs::read_to_string(path).map_err(|error| refuse(format!("cannot be read: {error}")))?;
        match text.trim() {
            "" => Err(refuse("is empty".into())),
            text => Ok(Secret::new(text)),
        }
    }

    /// The DataWay servers, each with its token: that of its URL, or the one in `dataway_token_file`. Reads that file;
    /// call it again to follow a rotated token.
    ///
    /// # Errors
    /// When the file cannot be read or holds no usable token.
    pub fn dataway_with_tokens(&self) -> Result<Vec<DatawayUrl>, ConfigErrors> {
        let Some(path) = &self.dataway_token_file else {
            return Ok(self.dataway.clone());
        };
        let refuse = |problem: String| {
            ConfigErrors(vec![ConfigError {
                option: "dataway_token_file".into(),
                value: Some(path.display().to_string()),
                origin: None,
                problem,
                accepted: Some("a readable file that holds one token".into()),
            }])
        };
        let token = fs::read_to_string(path).map_err(|error| refuse(format!("cannot be read: {error}")))?;
        self.dataway
            .iter()
            .map(|server| match server.token() {
                Some(_) => Ok(server.clone()),
                None => server.clone().with_token(token.trim()).map_err(refuse),
            })
            .collect()
    }
}

// === impl IdentityConfig ===

impl IdentityConfig {
    /// Where the host's `/proc` is.
    #[must_use]
    pub fn proc_dir(&self) -> PathBuf {
        self.host_proc.clone().unwrap_or_else(|| self.host_root.join("proc"))
    }
}
