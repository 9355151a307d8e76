//! The object's fields as options: each field gives the value of one row of the option table.

use std::collections::BTreeMap;

use super::{BUILT_FEATURES, DATAWAY_TOKEN_FILE, EbpfCollectorSpec, policy};
use crate::{
    AgentConfig, ConfigBuilder, ConfigError, ConfigErrors, DatawayEncoding, DatawayUrl, FileFormat, FlowFormat,
    FlowLogTypes, KafkaCompression, LogFormat, Raw, StdoutFormat, builder::without_token,
};

/// The value of an option, as a field of the object gives it.
#[derive(Clone, Debug, PartialEq)]
pub struct OptionValue {
    /// The option's key.
    pub key: &'static str,
    /// The field below `spec`.
    pub field: &'static str,
    /// The value.
    pub raw: Raw,
}

/// Options that no field of the object sets, with the reason.
pub const NOT_IN_OBJECT: &[(&str, &str)] = &[
    ("hostname", "the operator sets it on each node to the node's name"),
    (
        "bearer_token_string",
        "a secret does not stand in an object; the pod's service account has a token",
    ),
    ("collector", "it names the object itself"),
    (
        "aggregator",
        "the operator knows the address of the aggregator it makes",
    ),
    ("tls_ca", "the operator issues the certificates and mounts them"),
    ("tls_cert", "the operator issues the certificates and mounts them"),
    ("tls_key", "the operator issues the certificates and mounts them"),
    (
        "tls_server_name",
        "the operator issues the certificates and knows the name in them",
    ),
    ("allow_plaintext", "the operator gives every connection TLS"),
    (
        "queue_dir",
        "the operator mounts the queue's volume at a place of its own",
    ),
    ("kafka_tls_ca", "it is a file; this build mounts no Secret for it"),
    ("kafka_tls_cert", "it is a file; this build mounts no Secret for it"),
    ("kafka_tls_key", "it is a file; this build mounts no Secret for it"),
    ("kafka_sasl", "it takes files; this build mounts no Secret for them"),
    ("kafka_user_file", "it is a file; this build mounts no Secret for it"),
    (
        "kafka_password_file",
        "it is a file; this build mounts no Secret for it",
    ),
    ("loki_token_file", "it is a file; this build mounts no Secret for it"),
    ("loki_user", "it takes a file; this build mounts no Secret for it"),
    ("loki_password_file", "it is a file; this build mounts no Secret for it"),
    ("loki_tls_ca", "it is a file; this build mounts no Secret for it"),
    ("loki_tls_cert", "it is a file; this build mounts no Secret for it"),
    ("loki_tls_key", "it is a file; this build mounts no Secret for it"),
    ("admin_listen", "the operator sets the port that its probes ask"),
    ("datakit_apiserver", "it has no effect"),
    ("log", "it has no effect"),
    ("daemon", "it belongs to the documented collector's launcher"),
    ("name", "it belongs to the documented collector's launcher"),
    ("cmd", "it belongs to the documented collector's launcher"),
    ("args", "it belongs to the documented collector's launcher"),
    ("envs", "it belongs to the documented collector's launcher"),
];

/// Which program a field configures.
#[derive(Clone, Copy, PartialEq)]
enum Of {
    Agent,
    Aggregator,
}

struct Field {
    of: Of,
    key: &'static str,
    path: &'static str,
    get: fn(&EbpfCollectorSpec) -> Option<Raw>,
}

/// `field!(Of "option" "path.in.the.spec" rust.path)`: each step of the Rust path is an `Option`.
macro_rules! field {
    ($of:ident $key:literal $path:literal $($step:ident).+) => {
        Field { of: Of::$of, key: $key, path: $path, get: |spec| Some(spec$(.$step.as_ref()?)+.to_raw()) }
    };
    ($of:ident $key:literal $path:literal = $get:expr) => {
        Field { of: Of::$of, key: $key, path: $path, get: $get }
    };
}

static FIELDS: &[Field] = &[
    field!(Agent "enabled_plugins" "plugins" = |spec| spec.plugins.as_ref().map(|_| {
        let plugins = policy::plugins_anywhere(spec).plugins;
        if plugins.is_empty() { Raw::Text("none".into()) } else { plugins.to_raw() }
    })),
    field!(Agent "l7net_enabled" "plugins.ebpf-net.l7" = |spec| {
        let somewhere = spec.net_rules().any(|net| net.l7.is_some() || net.l7_disabled.is_some());
        let here = spec.plugins.as_ref()?.net.as_ref()?;
        (here.l7.is_some() || (here.l7_disabled.is_none() && somewhere))
            .then(|| policy::plugins_anywhere(spec).l7.to_raw())
    }),
    field!(Agent "l7net_disabled" "plugins.ebpf-net.l7Disabled" = |spec| {
        let _ = spec.plugins.as_ref()?.net.as_ref()?.l7_disabled.as_ref()?;
        let read = policy::plugins_anywhere(spec).l7;
        let unread: Vec<crate::L7Flow> = crate::L7Flow::ALL.iter().copied().filter(|l7| !read.contains(l7)).collect();
        Some(unread.to_raw())
    }),
    field!(Agent "interval" "interval" interval),
    field!(Agent "ipv6_disabled" "plugins.ebpf-net.ipv6Disabled" plugins.net.ipv6_disabled),
    field!(Agent "ephemeral_port" "plugins.ebpf-net.ephemeralPort" plugins.net.ephemeral_port),
    field!(Agent "tags" "tags" tags),
    field!(Agent "loopback" "plugins.ebpf-net.loopback" plugins.net.loopback),
    field!(Agent "dns_ports" "plugins.ebpf-net.dnsPorts" plugins.net.dns_ports),
    field!(Agent "dns_names" "plugins.ebpf-net.dnsNames" plugins.net.dns_names),
    field!(Agent "http_keep_query" "plugins.ebpf-net.httpKeepQuery" plugins.net.http_keep_query),
    field!(Agent "http_path_limit" "plugins.ebpf-net.httpPathLimit" plugins.net.http_path_limit),
    field!(Agent "http_routes" "plugins.ebpf-net.httpRoutes" plugins.net.http_routes),
    field!(Agent "http_series_max" "plugins.ebpf-net.httpSeriesMax" plugins.net.http_series_max),
    field!(Agent "trace_server" "plugins.ebpf-trace.server" plugins.trace.server),
    field!(Agent "trace_all_process" "plugins.ebpf-trace.allProcess" plugins.trace.all_process),
    field!(Agent "trace_env_list" "plugins.ebpf-trace.envList" plugins.trace.env_list),
    field!(Agent "trace_env_blacklist" "plugins.ebpf-trace.envBlacklist" plugins.trace.env_blacklist),
    field!(Agent "trace_name_list" "plugins.ebpf-trace.nameList" plugins.trace.name_list),
    field!(Agent "trace_name_blacklist" "plugins.ebpf-trace.nameBlacklist" plugins.trace.name_blacklist),
    field!(Agent "conv_to_ddtrace" "plugins.ebpf-trace.convToDdtrace" plugins.trace.conv_to_ddtrace),
    field!(Agent "netlog_blacklist" "plugins.bpf-netlog.blacklist" plugins.netlog.blacklist),
    field!(Agent "netlog_metric" "plugins.bpf-netlog.metric" plugins.netlog.metric),
    field!(Agent "netlog_log" "plugins.bpf-netlog.log" plugins.netlog.log),
    field!(Agent "netlog_sampling" "plugins.bpf-netlog.sampling" plugins.netlog.sampling),
    field!(Agent "netlog_cache_active_timeout" "plugins.bpf-netlog.cacheActiveTimeout"
        plugins.netlog.cache_active_timeout),
    field!(Agent "netlog_cache_max_flows" "plugins.bpf-netlog.cacheMaxFlows" plugins.netlog.cache_max_flows),
    field!(Agent "netlog_interfaces" "plugins.bpf-netlog.interfaces" plugins.netlog.interfaces),
    field!(Agent "netlog_exclude_interfaces" "plugins.bpf-netlog.excludeInterfaces" plugins.netlog.exclude_interfaces),
    field!(Agent "netlog_cluster_name" "plugins.bpf-netlog.clusterName" plugins.netlog.cluster_name),
    field!(Agent "netlog_infra_namespaces" "plugins.bpf-netlog.infraNamespaces" plugins.netlog.infra_namespaces),
    field!(Agent "netlog_subnet_labels" "plugins.bpf-netlog.subnetLabels" plugins.netlog.subnet_labels),
    field!(Agent "sampling_rate" "sampling.rate" sampling.rate),
    field!(Agent "sampling_rate_pts_per_min" "sampling.ptsPerMin" sampling.pts_per_min),
    field!(Agent "cpu_limit" "limits.cpu" limits.cpu),
    field!(Agent "mem_limit" "limits.mem" limits.mem),
    field!(Agent "net_limit" "limits.net" limits.net),
    field!(Agent "service" "identity.service" identity.service),
    field!(Agent "host_root" "agent.hostRoot" agent.host_root),
    field!(Agent "host_proc" "agent.hostProc" agent.host_proc),
    field!(Agent "kubernetes_url" "kubernetes.url" kubernetes.url),
    field!(Agent "bearer_token" "kubernetes.bearerToken" kubernetes.bearer_token),
    field!(Agent "workload_labels" "kubernetes.workloadLabels" kubernetes.workload_labels),
    field!(Agent "workload_label_prefix" "kubernetes.workloadLabelPrefix" kubernetes.workload_label_prefix),
    field!(Agent "tcp_connections_max" "agent.kernel.tcpConnectionsMax" agent.kernel.tcp_connections_max),
    field!(Agent "flow_map_entries" "agent.kernel.flowMapEntries" agent.kernel.flow_map_entries),
    field!(Agent "ring_buffer_size" "agent.kernel.ringBufferSize" agent.kernel.ring_buffer_size),
    field!(Agent "log_level" "agent.log.level" agent.log.level),
    field!(Agent "log_format" "agent.log.format" agent.log.format),
    field!(Agent "pprof_host" "agent.pprof.host" agent.pprof.host),
    field!(Agent "pprof_port" "agent.pprof.port" agent.pprof.port),
    field!(Aggregator "dataway" "dataway.urls" = |spec| {
        let addresses = spec.dataway.as_ref()?.addresses();
        (!addresses.is_empty()).then(|| addresses.to_raw())
    }),
    field!(Aggregator "dataway_token_file" "dataway.tokenSecretRef" = |spec| {
        spec.dataway.as_ref()?.token_secret_ref.as_ref().map(|_| Raw::Text(DATAWAY_TOKEN_FILE.into()))
    }),
    field!(Aggregator "dataway_encoding" "dataway.encoding" dataway.encoding),
    field!(Aggregator "dataway_gzip" "dataway.gzip" dataway.gzip),
    field!(Aggregator "output_file" "outputs.file.path" outputs.file.path),
    field!(Aggregator "output_format" "outputs.file.format" outputs.file.format),
    field!(Aggregator "output_stdout" "outputs.stdout" outputs.stdout),
    field!(Aggregator "kafka_address" "outputs.kafka.address" outputs.kafka.address),
    field!(Aggregator "kafka_topic" "outputs.kafka.topic" outputs.kafka.topic),
    field!(Aggregator "kafka_compression" "outputs.kafka.compression" outputs.kafka.compression),
    field!(Aggregator "kafka_tls" "outputs.kafka.tls.enable" = |spec| {
        let tls = spec.outputs.as_ref()?.kafka.as_ref()?.tls.as_ref()?;
        Some(tls.enable.unwrap_or(true).to_raw())
    }),
    field!(Aggregator "kafka_tls_insecure" "outputs.kafka.tls.insecureSkipVerify" outputs.kafka.tls.insecure_skip_verify),
    field!(Aggregator "flow_format" "outputs.flowFormat" outputs.flow_format),
    field!(Aggregator "flow_log_types" "outputs.flowLogTypes" outputs.flow_log_types),
    field!(Aggregator "flow_conversation_heartbeat" "outputs.conversations.heartbeat" outputs.conversations.heartbeat),
    field!(Aggregator "flow_conversation_end_timeout" "outputs.conversations.endTimeout" outputs.conversations.end_timeout),
    field!(Aggregator "flow_conversation_terminating_timeout" "outputs.conversations.terminatingTimeout"
        outputs.conversations.terminating_timeout),
    field!(Aggregator "flow_conversations_max" "outputs.conversations.max" outputs.conversations.max),
    field!(Aggregator "loki_url" "outputs.loki.url" outputs.loki.url),
    field!(Aggregator "loki_tenant" "outputs.loki.tenant" outputs.loki.tenant),
    field!(Aggregator "loki_timeout" "outputs.loki.writeTimeout" outputs.loki.write_timeout),
    field!(Aggregator "loki_batch_size" "outputs.loki.writeBatchSize" = |spec| {
        let bytes = spec.outputs.as_ref()?.loki.as_ref()?.write_batch_size?;
        Some(Raw::Text(format!("{bytes}B")))
    }),
    field!(Aggregator "loki_min_backoff" "outputs.loki.writeMinBackoff" outputs.loki.write_min_backoff),
    field!(Aggregator "loki_max_backoff" "outputs.loki.writeMaxBackoff" outputs.loki.write_max_backoff),
    field!(Aggregator "loki_static_labels" "outputs.loki.staticLabels" outputs.loki.static_labels),
    field!(Aggregator "loki_exclude_labels" "outputs.loki.excludeLabels" outputs.loki.exclude_labels),
    field!(Aggregator "loki_tls_insecure" "outputs.loki.tls.insecureSkipVerify" outputs.loki.tls.insecure_skip_verify),
    field!(Aggregator "flow_metrics" "outputs.prometheus.enable" = |spec| {
        let metrics = spec.outputs.as_ref()?.prometheus.as_ref()?;
        Some(metrics.enable.unwrap_or(true).to_raw())
    }),
    field!(Aggregator "flow_metrics_prefix" "outputs.prometheus.prefix" outputs.prometheus.prefix),
    field!(Aggregator "flow_metrics_include" "outputs.prometheus.includeList" outputs.prometheus.include_list),
    field!(Aggregator "flow_metrics_custom" "outputs.prometheus.metrics" = |spec| {
        let metrics = spec.outputs.as_ref()?.prometheus.as_ref()?.metrics.as_ref()?;
        Some(Raw::Text(serde_json::to_string(metrics).ok()?))
    }),
    field!(Aggregator "flow_metrics_series_max" "outputs.prometheus.seriesMax" outputs.prometheus.series_max),
    field!(Aggregator "flow_metrics_expiry" "outputs.prometheus.expiry" outputs.prometheus.expiry),
    field!(Aggregator "queue_max_size" "aggregator.queue.size" aggregator.queue.size),
    field!(Aggregator "queue_max_age" "aggregator.queue.age" aggregator.queue.age),
    field!(Aggregator "log_level" "aggregator.log.level" aggregator.log.level),
    field!(Aggregator "log_format" "aggregator.log.format" aggregator.log.format),
];

/// Options and the fields below `spec` that set them.
pub fn option_fields() -> impl Iterator<Item = (&'static str, &'static str)> {
    FIELDS.iter().map(|field| (field.key, field.path))
}

trait ToRaw {
    fn to_raw(&self) -> Raw;
}

macro_rules! text {
    ($($type:ty),+) => {
        $(impl ToRaw for $type {
            fn to_raw(&self) -> Raw {
                Raw::Text(self.to_string())
            }
        })+
    };
}

text!(
    String,
    bool,
    u16,
    u32,
    u64,
    f64,
    LogFormat,
    DatawayEncoding,
    FileFormat,
    StdoutFormat,
    FlowFormat,
    FlowLogTypes,
    KafkaCompression
);

impl<T: ToString> ToRaw for Vec<T> {
    fn to_raw(&self) -> Raw {
        Raw::List(self.iter().map(ToString::to_string).collect())
    }
}

impl<T: ToString> ToRaw for std::collections::BTreeSet<T> {
    fn to_raw(&self) -> Raw {
        Raw::List(self.iter().map(ToString::to_string).collect())
    }
}

impl ToRaw for BTreeMap<String, String> {
    fn to_raw(&self) -> Raw {
        Raw::Map(self.clone())
    }
}

// === impl EbpfCollectorSpec ===

impl EbpfCollectorSpec {
    /// Reads the field `spec` of a stored object.
    ///
    /// # Errors
    /// The field that cannot be read, and why.
    pub fn from_json(spec: serde_json::Value) -> Result<Self, ConfigErrors> {
        serde_path_to_error::deserialize(spec).map_err(|error| {
            ConfigErrors(vec![ConfigError {
                option: format!("spec.{}", error.path()),
                value: None,
                origin: None,
                problem: without_token(format!("cannot be read: {}", error.inner())),
                accepted: None,
            }])
        })
    }

    /// The options that the object sets for the agents, as a source for their [`ConfigBuilder`].
    #[must_use]
    pub fn agent_options(&self) -> Vec<OptionValue> {
        self.option_values(Of::Agent)
    }

    /// The options that the object sets for the aggregator, as a source for its [`ConfigBuilder`].
    #[must_use]
    pub fn aggregator_options(&self) -> Vec<OptionValue> {
        self.option_values(Of::Aggregator)
    }

    /// The agents' configuration: plugins and protocols are those that run anywhere; [`policy::plugins_for`] says where.
    ///
    /// # Errors
    /// Everything that is wrong with the fields of the agents.
    pub fn agent_config(&self) -> Result<AgentConfig, ConfigErrors> {
        ConfigBuilder::new().object(self.agent_options()).build()
    }

    /// The aggregator's configuration: outputs, queue and logs.
    ///
    /// # Errors
    /// Everything that is wrong with the fields of the aggregator.
    pub fn aggregator_config(&self) -> Result<AgentConfig, ConfigErrors> {
        ConfigBuilder::new().object(self.aggregator_options()).build()
    }

    /// Checks all fields.
    ///
    /// # Errors
    /// Everything that is wrong with the object.
    pub fn validate(&self) -> Result<(), ConfigErrors> {
        let mut errors: Vec<_> = [self.agent_config(), self.aggregator_config()]
            .into_iter()
            .filter_map(Result::err)
            .flat_map(|errors| errors.0)
            .collect();
        errors.extend(self.token_in_url());
        if errors.is_empty() {
            Ok(())
        } else {
            Err(ConfigErrors(errors))
        }
    }

    /// Features that the object enables somewhere and that this build does not have, as `plugin` or `plugin/part`.
    ///
    /// # Errors
    /// As [`EbpfCollectorSpec::agent_config`].
    pub fn features_not_built(&self) -> Result<Vec<String>, ConfigErrors> {
        let not_built = self.agent_config()?.plugins_not_built();
        Ok(not_built
            .into_iter()
            .filter(|feature| !BUILT_FEATURES.contains(&feature.as_str()))
            .collect())
    }

    /// Refuses a token in a URL: everybody who reads the object or a pod's arguments would read it. The API server does so
    /// at apply; an object may be older than that rule.
    fn token_in_url(&self) -> Option<ConfigError> {
        let addresses = self.dataway.as_ref()?.addresses();
        let secret = |text: &String| text.parse::<DatawayUrl>().is_ok_and(|url| url.token().is_some());
        addresses.iter().any(secret).then(|| ConfigError {
            option: "dataway".to_owned(),
            value: None,
            origin: Some("field spec.dataway".to_owned()),
            problem: "a URL holds a token".to_owned(),
            accepted: Some("URLs without ?token=..., and tokenSecretRef with the Secret that holds it".to_owned()),
        })
    }

    fn option_values(&self, of: Of) -> Vec<OptionValue> {
        FIELDS
            .iter()
            .filter(|field| field.of == of)
            .filter_map(|field| {
                Some(OptionValue {
                    key: field.key,
                    field: field.path,
                    raw: (field.get)(self)?,
                })
            })
            .collect()
    }

    fn net_rules(&self) -> impl Iterator<Item = &super::NetToggle> {
        self.namespaces
            .iter()
            .flatten()
            .filter_map(|rule| rule.plugins.as_ref()?.net.as_ref())
    }
}
