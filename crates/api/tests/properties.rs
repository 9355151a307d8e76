//! Properties: no input makes the parsers panic, and what is written is read back the same.

#![allow(clippy::unwrap_used, missing_docs)]

use ec_api::{ConfigBuilder, Source, options};
use proptest::prelude::*;

/// Texts near the accepted forms, and far from them.
fn value() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<String>(),
        "[0-9.]{1,22}[a-zA-Z/]{0,5}",
        "([a-z]{1,4}=[^,;]{0,4}[,;]?){0,3}",
        "https?://[^ ]{0,12}(\\?token=[^ ]{0,6})?",
        "(ebpf-net|httpflow|httpflow-tls|json|true|F|1m30s|4GiB|127.0.0.1:80|,| )*",
    ]
}

/// A value that the option accepts, other than its default where there is a choice.
fn accepted(key: &str) -> BoxedStrategy<String> {
    match key {
        "enabled_plugins" => proptest::sample::subsequence(vec!["ebpf-net", "ebpf-bash", "ebpf-conntrack"], 1..=3)
            .prop_map(|plugins| plugins.join(","))
            .boxed(),
        "l7net_enabled" => proptest::sample::subsequence(vec!["httpflow", "httpflow-tls"], 0..=2)
            .prop_map(|flows| flows.join(","))
            .boxed(),
        "interval" => (1_000_u64..=3_600_000).prop_map(|ms| format!("{ms}ms")).boxed(),
        "queue_max_age" => (60_u64..=2_592_000).prop_map(|s| format!("{s}s")).boxed(),
        "sampling_rate" | "cpu_limit" => (1_u32..=100).prop_map(|n| format!("{}", f64::from(n) / 100.0)).boxed(),
        "ephemeral_port" => any::<u16>().prop_map(|port| port.to_string()).boxed(),
        "tcp_connections_max" | "flow_map_entries" => (1024_u32..=16_777_216).prop_map(|n| n.to_string()).boxed(),
        "mem_limit" | "queue_max_size" => (16_u64 << 20..=1 << 46).prop_map(|n| format!("{n}B")).boxed(),
        "net_limit" => (1_u64..=u64::MAX).prop_map(|n| format!("{n}B/s")).boxed(),
        "ring_buffer_size" => (16_u32..=30).prop_map(|shift| format!("{}B", 1_u64 << shift)).boxed(),
        "tags" => proptest::collection::btree_map("x_[a-zA-Z0-9_-]{1,8}", "[^,;\\p{C}\\s\\\\]{1,8}", 0..4)
            .prop_map(|tags| {
                tags.into_iter()
                    .map(|(k, v)| format!("{k}={v}"))
                    .collect::<Vec<_>>()
                    .join(",")
            })
            .boxed(),
        "kafka_compression" => prop_oneof!["none", "gzip"].boxed(),
        "loki_static_labels" => "[a-z]{1,5}=[a-z]{1,5}".boxed(),
        "loki_batch_size" => (1_u64 << 10..=64 << 20).prop_map(|n| format!("{n}B")).boxed(),
        "loki_url" => "https?://[a-z]{1,8}(:[1-9][0-9]{1,3})?".boxed(),
        "flow_metrics_include" => prop_oneof!["default,node_flows", "node_flows"].boxed(),
        "trace_env_list" | "trace_name_list" | "workload_labels" => "[a-zA-Z][a-z]{0,6}(,[A-Z]{1,5}){0,3}".boxed(),
        "trace_server" => "[a-z]{1,8}:[1-9][0-9]{1,3}".boxed(),
        "netlog_blacklist" => {
            "(udp|src_port (==|<) [1-9]{1,4}|!ipv6)( \\|\\| has_prefix\\(k8s_src_pod, ['\"][a-z]{0,5}['\"]\\))?"
                .prop_filter("quotes that match", |text| text.matches('"').count() % 2 == 0)
                .boxed()
        }
        "hostname" | "service" => "[^\\p{C}\\s]([^\\p{C}]{0,20}[^\\p{C}\\s])?".boxed(),
        "queue_dir" | "output_file" | "tls_ca" | "host_root" => "/[^\\p{C}\\s]{1,20}".boxed(),
        "output_stdout" => prop_oneof!["off", "json", "table"].boxed(),
        "admin_listen" => "127\\.0\\.0\\.[1-9]:[1-9][0-9]{0,3}".boxed(),
        "loopback" | "ipv6_disabled" | "dataway_gzip" | "netlog_log" => prop_oneof!["true", "F", "1", "0"].boxed(),
        _ => "".boxed(),
    }
}

const KEYS: &[&str] = &[
    "enabled_plugins",
    "l7net_enabled",
    "interval",
    "queue_max_age",
    "sampling_rate",
    "cpu_limit",
    "ephemeral_port",
    "tcp_connections_max",
    "flow_map_entries",
    "mem_limit",
    "queue_max_size",
    "net_limit",
    "ring_buffer_size",
    "tags",
    "trace_env_list",
    "trace_name_list",
    "workload_labels",
    "trace_server",
    "netlog_blacklist",
    "kafka_compression",
    "loki_static_labels",
    "loki_batch_size",
    "loki_url",
    "flow_metrics_include",
    "hostname",
    "service",
    "queue_dir",
    "output_file",
    "tls_ca",
    "host_root",
    "output_stdout",
    "admin_listen",
    "loopback",
    "ipv6_disabled",
    "dataway_gzip",
    "netlog_log",
];

proptest! {
    #[test]
    fn no_value_panics(index in 0..options().len(), value in value(), again in value()) {
        let spec = &options()[index];
        let mut builder = ConfigBuilder::new();
        builder.set(spec.key, Source::Flag, value.clone()).set(spec.key, Source::Flag, again);
        if let Some(env) = spec.env {
            builder.env([(env, value.clone())]);
        }
        builder.toml_str("f", &format!("{} = {value}", spec.key));
        let _ = builder.build().map_err(|errors| errors.to_string());
    }

    #[test]
    fn no_file_panics(text in prop_oneof![any::<String>(), "(\\[\\[?inputs(\\.ebpf)?\\]?\\]|[a-z_]{1,9} = [0-9\"'\\[\\]{}=,a-z]{0,9}|\n)*"]) {
        let _ = ConfigBuilder::new().toml_str("f", &text).build().map_err(|errors| errors.to_string());
    }

    #[test]
    fn what_is_written_is_read_back(
        values in proptest::collection::btree_map(proptest::sample::select(KEYS), any::<prop::sample::Index>(), 1..12)
            .prop_flat_map(|keys| keys.into_keys().map(|key| (Just(key), accepted(key))).collect::<Vec<_>>()),
    ) {
        let mut builder = ConfigBuilder::new();
        for (key, value) in &values {
            builder.set(key, Source::Flag, value.clone());
        }
        let mut config = match builder.build() {
            Ok(config) => config,
            Err(errors) => return Err(TestCaseError::fail(format!("{values:?}: {errors}"))),
        };
        let text = config.to_toml();
        let mut again = match ConfigBuilder::new().toml_str("f", &text).build() {
            Ok(config) => config,
            Err(errors) => return Err(TestCaseError::fail(format!("{text}: {errors}"))),
        };
        config.warnings.clear();
        again.warnings.clear();
        prop_assert_eq!(config, again);
    }
}
