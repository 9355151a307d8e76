//! Metrics that are known by name.

use super::{FlowMetric, Match, MetricFilter, MetricKind};

/// Bounds of latencies, seconds: those that dashboards know, and some below and above them.
const LATENCY: &[f64] = &[
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.25, 1.0, 5.0,
];
const CLUSTER: &[&str] = &["K8S_ClusterName", "SrcK8S_Zone", "DstK8S_Zone"];
const NODE: &[&str] = &["SrcK8S_HostName", "DstK8S_HostName"];
const NAMESPACE: &[&str] = &[
    "SrcK8S_Namespace",
    "DstK8S_Namespace",
    "K8S_FlowLayer",
    "SrcSubnetLabel",
    "DstSubnetLabel",
];
const WORKLOAD: &[&str] = &[
    "SrcK8S_OwnerName",
    "DstK8S_OwnerName",
    "SrcK8S_OwnerType",
    "DstK8S_OwnerType",
    "SrcK8S_Type",
    "DstK8S_Type",
];

/// Names of those that are on by default.
pub const DEFAULT: &[&str] = &[
    "node_ingress_bytes_total",
    "node_egress_bytes_total",
    "node_ingress_packets_total",
    "node_drop_packets_total",
    "workload_sampling",
    "workload_ingress_bytes_total",
    "workload_egress_bytes_total",
    "namespace_flows_total",
    "namespace_ingress_packets_total",
    "namespace_drop_packets_total",
    "namespace_rtt_seconds",
    "namespace_dns_latency_seconds",
    "namespace_network_policy_events_total",
    "node_to_node_ingress_flows_total",
];

/// Those that are on by default.
#[must_use]
pub fn default_list() -> Vec<FlowMetric> {
    DEFAULT.iter().filter_map(|name| find(name)).collect()
}

/// Names of all of them.
#[must_use]
pub fn names() -> Vec<String> {
    let what = [
        "ingress_bytes_total",
        "egress_bytes_total",
        "ingress_packets_total",
        "egress_packets_total",
        "sampling",
        "flows_total",
        "rtt_seconds",
        "drop_packets_total",
        "drop_bytes_total",
        "dns_latency_seconds",
        "network_policy_events_total",
    ];
    let mut names: Vec<String> = ["node", "namespace", "workload"]
        .into_iter()
        .flat_map(|level| what.map(|what| format!("{level}_{what}")))
        .collect();
    names.push("node_to_node_ingress_flows_total".to_owned());
    names
}

/// The metric of a name; `_total` and `_seconds` may be left out, as in NetObserv's lists.
#[must_use]
pub fn find(name: &str) -> Option<FlowMetric> {
    let known = names();
    let whole = [name.to_owned(), format!("{name}_total"), format!("{name}_seconds")]
        .into_iter()
        .find(|name| known.contains(name))?;
    let filter = |key: &str, how, value: &str| MetricFilter {
        key: key.to_owned(),
        value: value.to_owned(),
        how,
    };
    let (level, what) = whole.split_once('_')?;
    let mut metric = FlowMetric {
        name: whole.clone(),
        ..FlowMetric::default()
    };
    let mut labels: Vec<&str> = CLUSTER.to_vec();
    match level {
        "node" => labels.extend(NODE),
        "namespace" => labels.extend(NAMESPACE),
        _ => labels.extend(NAMESPACE.iter().chain(WORKLOAD)),
    }
    // An inner flow, and one without direction, counts both ways.
    let ingress = || filter("FlowDirection", Match::NotEqual, "1");
    let egress = || filter("FlowDirection", Match::NotEqual, "0");
    let latency = |metric: &mut FlowMetric, field: &str, scale: f64| {
        metric.kind = MetricKind::Histogram;
        metric.value_key = field.to_owned();
        metric.value_scale = scale;
        metric.buckets = LATENCY.to_vec();
    };
    match what {
        "ingress_bytes_total" => {
            metric.help = "Bytes of incoming flows".to_owned();
            (metric.value_key, metric.filters) = ("Bytes".to_owned(), vec![ingress()]);
        }
        "egress_bytes_total" => {
            metric.help = "Bytes of outgoing flows".to_owned();
            (metric.value_key, metric.filters) = ("Bytes".to_owned(), vec![egress()]);
        }
        "ingress_packets_total" => {
            metric.help = "Packets of incoming flows".to_owned();
            (metric.value_key, metric.filters) = ("Packets".to_owned(), vec![ingress()]);
        }
        "egress_packets_total" => {
            metric.help = "Packets of outgoing flows".to_owned();
            (metric.value_key, metric.filters) = ("Packets".to_owned(), vec![egress()]);
        }
        "sampling" => {
            metric.help = "N of 1:N in the last flow".to_owned();
            (metric.kind, metric.value_key) = (MetricKind::Gauge, "Sampling".to_owned());
        }
        "flows_total" => metric.help = "Flows".to_owned(),
        "rtt_seconds" => {
            metric.help = "Smoothed round trip times".to_owned();
            latency(&mut metric, "TimeFlowRttNs", 1e9);
        }
        "drop_packets_total" | "drop_bytes_total" => {
            metric.help = "What the kernel dropped".to_owned();
            metric.value_key = if what == "drop_bytes_total" {
                "PktDropBytes".to_owned()
            } else {
                "PktDropPackets".to_owned()
            };
            labels.extend(["PktDropLatestState", "PktDropLatestDropCause"]);
        }
        "dns_latency_seconds" => {
            metric.help = "Time from a query of DNS to its answer".to_owned();
            latency(&mut metric, "DnsLatencyMs", 1e3);
            labels.push("DnsFlagsResponseCode");
        }
        "network_policy_events_total" => {
            metric.help = "Decisions of network policies".to_owned();
            metric.flatten = vec!["NetworkEvents".to_owned()];
            metric.filters = vec![filter("NetworkEvents>Feature", Match::Equal, "acl")];
            for key in ["Type", "Namespace", "Name", "Action", "Direction"] {
                let label = format!("NetworkEvents>{key}");
                metric.remap.insert(label.clone(), key.to_ascii_lowercase());
                metric.labels.push(label);
            }
        }
        // node_to_node_ingress_flows_total
        _ => {
            metric.help = "Flows from node to node".to_owned();
            metric.filters = vec![
                ingress(),
                filter("SrcK8S_HostName", Match::Presence, ""),
                filter("DstK8S_HostName", Match::Presence, ""),
            ];
        }
    }
    metric.labels.splice(0..0, labels.into_iter().map(str::to_owned));
    Some(metric)
}
