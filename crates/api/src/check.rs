//! What no single option can say: values that contradict each other, and names that would hide a record's own.

use std::collections::BTreeMap;

use crate::{AgentConfig, ConfigError, FlowLogTypes, KafkaSasl, L7Flow, Plugin, config::OutputTls};

/// Options that a source gave, with that source.
pub(crate) type Explicit = BTreeMap<&'static str, String>;

/// Tags and fields of the documented records, and the reserved words of the wire formats: a tag of the user's under
/// one of these names would hide, or be hidden by, the record's own.
pub(crate) const RECORD_KEYS: &[&str] = &[
    "app_parent_id",
    "app_trace_id",
    "bytes_read",
    "bytes_written",
    "chunk_id",
    "client_ip",
    "client_port",
    "cmd",
    "conn_side",
    "count",
    "date",
    "direction",
    "dst_domain",
    "dst_ip",
    "dst_ip_type",
    "dst_k8s_deployment_name",
    "dst_k8s_namespace",
    "dst_k8s_pod_name",
    "dst_k8s_service_name",
    "dst_nat_ip",
    "dst_nat_port",
    "dst_port",
    "duration",
    "ebpf_parent_id",
    "ebpf_trace_id",
    "err_msg",
    "family",
    "grpc_status_code",
    "host",
    "host_network",
    "http_method",
    "http_path",
    "http_route",
    "http_status_code",
    "http_version",
    "inner_traceid",
    "k8s_container_name",
    "k8s_namespace",
    "k8s_pod_name",
    "l4_proto",
    "l7_proto",
    "l7_traceid",
    "latency",
    "latency_max",
    "message",
    "method",
    "mysql_err_msg",
    "mysql_status_code",
    "netns",
    "nic_mac",
    "nic_name",
    "operation",
    "parent_id",
    "path",
    "pid",
    "process_name",
    "query_name",
    "query_type",
    "rcode",
    "resource_type",
    "retransmits",
    "rtt",
    "rtt_var",
    "rx_bytes",
    "rx_packets",
    "rx_retrans",
    "rx_seq",
    "rx_seq_max",
    "rx_seq_min",
    "server_ip",
    "server_port",
    "service",
    "source",
    "source_type",
    "span_id",
    "span_type",
    "src_ip",
    "src_ip_type",
    "src_k8s_deployment_name",
    "src_k8s_namespace",
    "src_k8s_pod_name",
    "src_k8s_service_name",
    "src_port",
    "start",
    "status",
    "status_code",
    "status_msg",
    "sub_source",
    "tcp_closed",
    "tcp_established",
    "tcp_syn_retrans",
    "thread_name",
    "time",
    "trace_id",
    "transport",
    "truncated",
    "tx_bytes",
    "tx_packets",
    "tx_retrans",
    "tx_seq",
    "tx_seq_max",
    "tx_seq_min",
    "user",
    "virtual_nic",
    "vni_id",
    "vxlan_packet",
];

/// Longest tag key and value that the DataWay protocol keeps whole, in bytes.
const TAG_KEY_MAX: usize = 256;
const TAG_VALUE_MAX: usize = 1024;

/// Checks the user's tags; used as the parser of the option `tags`.
pub(crate) fn tags(tags: BTreeMap<String, String>) -> Result<BTreeMap<String, String>, String> {
    let problems: Vec<String> = tags.iter().filter_map(|(key, value)| tag_problem(key, value)).collect();
    if problems.is_empty() {
        Ok(tags)
    } else {
        Err(problems.join("; "))
    }
}

fn tag_problem(key: &str, value: &str) -> Option<String> {
    let well_formed = key.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
    if !well_formed || key.len() > TAG_KEY_MAX {
        return Some(format!("the key {key:?} is not well-formed"));
    }
    if RECORD_KEYS.contains(&key) {
        return Some(match key {
            "host" => "`host` is set with the option hostname".into(),
            "service" => "`service` is set with the option service".into(),
            _ => format!("`{key}` is a key of the records themselves"),
        });
    }
    if value.is_empty() || value.len() > TAG_VALUE_MAX {
        return Some(format!("the value of `{key}` is {} bytes long", value.len()));
    }
    if value.chars().any(char::is_control) || value.ends_with('\\') {
        return Some(format!(
            "the value of `{key}` holds a control character or ends with a back-slash"
        ));
    }
    None
}

/// Refuses values that contradict each other, and folds options that set the same thing.
pub(crate) fn combination(config: &mut AgentConfig, explicit: &Explicit, errors: &mut Vec<ConfigError>) {
    // An option that was refused keeps its blank value: what follows from it would only confuse.
    let refused: Vec<String> = errors.iter().map(|error| error.option.clone()).collect();
    let mut check = Check {
        explicit,
        refused,
        errors,
    };

    check.not_both("sampling_rate", "sampling_rate_pts_per_min");
    check.not_both("l7net_enabled", "l7net_disabled");
    check.not_both("bearer_token", "bearer_token_string");
    check.not_both("aggregator", "dataway");
    if let Some(disabled) = config.net.l7_disabled.take() {
        config.net.l7 = L7Flow::ALL
            .iter()
            .copied()
            .filter(|flow| !disabled.contains(flow))
            .collect();
    }

    if config.plugins.contains(&Plugin::EbpfTrace) {
        let has_http = config.net.l7.contains(&L7Flow::Http);
        if !config.plugins.contains(&Plugin::EbpfNet) || !has_http {
            check.refuse(
                &["enabled_plugins", "l7net_enabled", "l7net_disabled"],
                "ebpf-trace is made from the requests that ebpf-net reads",
                "ebpf-trace together with ebpf-net and its httpflow",
            );
        }
        if config.trace.server.is_none() {
            check.refuse(
                &["trace_server", "enabled_plugins"],
                "ebpf-trace has nowhere to send its spans",
                "trace_server = \"host:port\" together with ebpf-trace",
            );
        }
    }
    if config.plugins.contains(&Plugin::BpfNetlog) && !config.netlog.metric && !config.netlog.log {
        check.refuse(
            &["netlog_metric", "netlog_log"],
            "bpf-netlog is enabled and makes neither records nor logs",
            "netlog_metric or netlog_log true, or bpf-netlog not enabled",
        );
    }
    let silence = config.outputs.conversations.end_timeout;
    if config.outputs.flow_log_types != FlowLogTypes::Flows && silence <= config.netlog.cache_active_timeout {
        check.refuse(
            &["flow_conversation_end_timeout", "netlog_cache_active_timeout"],
            "flows of a conversation that goes on come less often than silence ends it",
            "a flow_conversation_end_timeout longer than netlog_cache_active_timeout",
        );
    }
    uplink(config, &mut check);
    outputs(config, &mut check);
    if let (Some(origin), true) = (explicit.get("enabled_plugins"), config.lacks_net_for_conntrack()) {
        config.warnings.push(format!(
            "enabled_plugins ({origin}): ebpf-conntrack has no effect: it adds to what ebpf-net reports, which is not enabled"
        ));
    }
    if config.kubernetes.collector.is_none() {
        for option in ["kubernetes_url", "bearer_token", "bearer_token_string"] {
            if let Some(origin) = explicit.get(option) {
                config
                    .warnings
                    .push(format!("{option} ({origin}) has no effect: collector is not set"));
            }
        }
    }
    if let (None, Some(origin)) = (&config.outputs.file, explicit.get("output_format")) {
        config.warnings.push(format!(
            "output_format ({origin}) has no effect: output_file is not set"
        ));
    }
}

fn uplink(config: &AgentConfig, check: &mut Check<'_>) {
    let tls = &config.uplink.tls;
    if tls.cert.is_some() != tls.key.is_some() {
        check.refuse(
            &["tls_cert", "tls_key"],
            "one is set without the other",
            "both, or neither",
        );
    }
    let Some(aggregator) = &config.uplink.aggregator else {
        return;
    };
    if aggregator.is_tls() {
        return;
    }
    if tls.ca.is_some() || tls.cert.is_some() || tls.server_name.is_some() {
        check.refuse(
            &["aggregator", "tls_ca", "tls_cert", "tls_server_name"],
            "certificates are set and the aggregator's address is without TLS",
            "an https:// address, or no tls_* options",
        );
    } else if !aggregator.is_loopback() && !config.uplink.allow_plaintext {
        check.refuse(
            &["aggregator", "allow_plaintext"],
            "records would leave the machine without TLS",
            "an https:// address, a loopback address, or allow_plaintext = true",
        );
    }
}

fn flow_outputs(config: &AgentConfig, check: &mut Check<'_>) {
    let (kafka, loki) = (&config.outputs.kafka, &config.outputs.loki);
    if kafka.address.is_empty() == kafka.topic.is_some() {
        check.refuse(
            &["kafka_address", "kafka_topic"],
            "one is set without the other",
            "both, or neither",
        );
    }
    let sasl = kafka.sasl != KafkaSasl::Disabled;
    if kafka.user_file.is_some() != sasl || kafka.password_file.is_some() != sasl {
        check.refuse(
            &["kafka_sasl", "kafka_user_file", "kafka_password_file"],
            "some are set without the others",
            "all three, or none",
        );
    }
    for (tls, names) in [
        (&kafka.files, ["kafka_tls_cert", "kafka_tls_key"]),
        (&loki.files, ["loki_tls_cert", "loki_tls_key"]),
    ] {
        if tls.cert.is_some() != tls.key.is_some() {
            check.refuse(&names, "one is set without the other", "both, or neither");
        }
    }
    if !kafka.tls && kafka.files != OutputTls::default() {
        check.refuse(
            &[
                "kafka_tls",
                "kafka_tls_ca",
                "kafka_tls_cert",
                "kafka_tls_key",
                "kafka_tls_insecure",
            ],
            "certificates are set and kafka_tls is not",
            "kafka_tls = true, or no kafka_tls_* options",
        );
    }
    check.not_both("loki_token_file", "loki_user");
    if loki.user.is_some() != loki.password_file.is_some() {
        check.refuse(
            &["loki_user", "loki_password_file"],
            "one is set without the other",
            "both, or neither",
        );
    }
    if loki.min_backoff > loki.max_backoff {
        check.refuse(
            &["loki_max_backoff", "loki_min_backoff"],
            "the longest pause is shorter than the first",
            "loki_max_backoff from loki_min_backoff up",
        );
    }
}

fn outputs(config: &AgentConfig, check: &mut Check<'_>) {
    flow_outputs(config, check);
    let outputs = &config.outputs;
    let without_token = outputs.dataway.iter().filter(|server| server.token().is_none()).count();
    match (&outputs.dataway_token_file, without_token) {
        (None, 1..) => check.refuse(
            &["dataway", "dataway_token_file"],
            "a DataWay server has no token",
            "?token=... in each URL, or dataway_token_file",
        ),
        (Some(_), 0) => check.refuse(
            &["dataway_token_file", "dataway"],
            "there is no DataWay server without a token of its own",
            "dataway_token_file together with a URL that has no token",
        ),
        _ => {}
    }
}

struct Check<'a> {
    explicit: &'a Explicit,
    refused: Vec<String>,
    errors: &'a mut Vec<ConfigError>,
}

// === impl Check ===

impl Check<'_> {
    fn not_both(&mut self, one: &'static str, other: &'static str) {
        if self.explicit.contains_key(one) && self.explicit.contains_key(other) {
            self.refuse(&[one, other], "they exclude each other", "one of them");
        }
    }

    /// Refuses a combination, unless one of its options was refused already. Named are those that were given; if none
    /// was, the first.
    fn refuse(&mut self, options: &[&'static str], problem: &str, accepted: &str) {
        if options
            .iter()
            .any(|option| self.refused.iter().any(|refused| refused == option))
        {
            return;
        }
        let given: Vec<&str> = options
            .iter()
            .copied()
            .filter(|option| self.explicit.contains_key(option))
            .collect();
        let named = if given.is_empty() {
            options.get(..1).unwrap_or_default().to_vec()
        } else {
            given
        };
        let mut origins: Vec<&str> = named
            .iter()
            .filter_map(|name| self.explicit.get(name))
            .map(String::as_str)
            .collect();
        origins.dedup();
        self.errors.push(ConfigError {
            option: named.join(", "),
            value: None,
            origin: (!origins.is_empty()).then(|| origins.join(", ")),
            problem: problem.into(),
            accepted: Some(accepted.into()),
        });
    }
}
