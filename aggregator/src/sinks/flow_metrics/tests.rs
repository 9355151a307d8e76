#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::{net::IpAddr, sync::Arc};

use prometheus_client::registry::Registry;
use records::flowlog::{FlowDirection, FlowInterface, FlowL4, FlowPeer, TCP};

use super::*;

fn flow(namespace: &str, bytes: u64) -> FlowLog {
    let ip = |text: &str| text.parse::<IpAddr>().unwrap();
    let mut flow = FlowLog::new(ip("10.0.0.1"), ip("10.0.0.2"), TCP, FlowL4::Ports { src: 1, dst: 80 });
    flow.bytes = bytes;
    flow.direction = Some(FlowDirection::Ingress);
    flow.src_k8s = Some(Arc::new(FlowPeer {
        namespace: namespace.into(),
        ..FlowPeer::default()
    }));
    flow.interfaces = [("eth0", 0), ("veth1", 1)]
        .map(|(name, direction)| FlowInterface {
            name: name.into(),
            direction,
        })
        .into();
    flow
}

fn limits(series_max: usize, expiry: Duration) -> Limits {
    Limits {
        prefix: "netobserv_".to_owned(),
        series_max,
        expiry,
    }
}

fn metric(json: &str) -> FlowMetric {
    let metric: FlowMetric = serde_json::from_str(json).unwrap();
    check(&metric).unwrap();
    metric
}

fn text(in_use: &FlowMetricsInUse) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(in_use.clone()));
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    text
}

#[test]
fn every_kind_is_told_by_its_labels() {
    let in_use = FlowMetricsInUse::default();
    let metrics = [
        metric(
            r#"{"name":"bytes_total","type":"counter","valueKey":"Bytes","labels":["SrcK8S_Namespace"],"valueScale":2}"#,
        ),
        metric(r#"{"name":"last","type":"gauge","valueKey":"Bytes"}"#),
        metric(r#"{"name":"spread","type":"histogram","valueKey":"Bytes","buckets":[10,100]}"#),
        metric(
            r#"{"name":"flows","type":"counter","filters":[{"key":"SrcK8S_Namespace","value":"a"},{"key":"SrcK8S_Namespace","value":"^b","type":"match_regex"},{"key":"DstPort","value":"80"}]}"#,
        ),
        metric(
            r#"{"name":"seen","type":"counter","labels":["Interfaces","IfDirections"],"flatten":["Interfaces","IfDirections"],"remap":{"Interfaces":"interface"}}"#,
        ),
    ];
    let used = in_use.put_to_use(&metrics, limits(100, Duration::from_secs(60)));
    let mut sampled = flow("b\"x", 6);
    sampled.sampling = 10;
    used.observe(&[flow("a", 10), flow("a", 200), sampled, flow("c", 1)], 0);
    let text = text(&in_use);
    for line in [
        "# TYPE netobserv_bytes counter",
        "netobserv_bytes_total{SrcK8S_Namespace=\"a\"} 105.0",
        "netobserv_bytes_total{SrcK8S_Namespace=\"b\\\"x\"} 30.0",
        "netobserv_last 1.0",
        "netobserv_spread_bucket{le=\"10.0\"} 2",
        "netobserv_spread_bucket{le=\"100.0\"} 3",
        "netobserv_spread_bucket{le=\"+Inf\"} 4",
        "netobserv_spread_sum 271.0",
        "netobserv_flows_total 3.0",
        "netobserv_seen_total{interface=\"eth0\",IfDirections=\"0\"} 4.0",
        "netobserv_seen_total{interface=\"veth1\",IfDirections=\"1\"} 4.0",
    ] {
        assert!(text.lines().any(|known| known == line), "{line}\n{text}");
    }
}

#[test]
fn series_are_bounded_and_end() {
    let in_use = FlowMetricsInUse::default();
    let metrics = [metric(
        r#"{"name":"x","type":"counter","valueKey":"Bytes","labels":["SrcK8S_Namespace"]}"#,
    )];
    let used = in_use.put_to_use(&metrics, limits(2, Duration::from_millis(40)));
    let flows: Vec<FlowLog> = (0..50).map(|n| flow(&format!("ns{n}"), 1)).collect();
    used.observe(&flows, 0);
    let told = text(&in_use);
    assert_eq!(told.matches("netobserv_x_total{").count(), 3, "{told}");
    assert!(told.contains("{SrcK8S_Namespace=\"other\"} 48.0"), "{told}");
    std::thread::sleep(Duration::from_millis(60));
    assert!(!text(&in_use).contains("netobserv_x_total{"));
}

#[test]
fn what_stays_keeps_its_series() {
    let in_use = FlowMetricsInUse::default();
    let limits = limits(10, Duration::from_secs(60));
    let one = metric(r#"{"name":"one","type":"counter"}"#);
    let two = metric(r#"{"name":"two","type":"counter"}"#);
    let before = in_use.put_to_use(std::slice::from_ref(&one), limits.clone());
    before.observe(&[flow("a", 1)], 0);
    let after = in_use.put_to_use(&[one, two], limits);
    drop(before);
    after.observe(&[flow("a", 1)], 0);
    let told = text(&in_use);
    assert!(
        told.contains("one_total 2.0") && told.contains("two_total 1.0"),
        "{told}"
    );
    drop(after);
    assert!(!text(&in_use).contains("one_total"));
}

#[test]
fn bad_definitions_name_the_part() {
    let refused = |json: &str| check(&serde_json::from_str(json).unwrap()).unwrap_err().to_string();
    for (json, wanted) in [
        (r#"{"name":"1x","type":"counter"}"#, "name: `1x`"),
        (
            r#"{"name":"x","type":"counter","labels":["SrcAddr"]}"#,
            "labels: `SrcAddr` is not accepted; it has too many values",
        ),
        (
            r#"{"name":"x","type":"counter","labels":["SrcPod"]}"#,
            "labels: `SrcPod`",
        ),
        (
            r#"{"name":"x","type":"counter","labels":["Interfaces"]}"#,
            "labels: `Interfaces` is not accepted; a list",
        ),
        (
            r#"{"name":"x","type":"counter","labels":["Proto","Proto"]}"#,
            "labels: `Proto` is not accepted; each label once",
        ),
        (
            r#"{"name":"x","type":"counter","valueKey":"SrcAddr"}"#,
            "valueKey: `SrcAddr`",
        ),
        (r#"{"name":"x","type":"gauge"}"#, "valueKey: ``"),
        (r#"{"name":"x","type":"histogram","valueKey":"Bytes"}"#, "buckets: `[]`"),
        (
            r#"{"name":"x","type":"histogram","valueKey":"Bytes","buckets":[2,1]}"#,
            "buckets: `[2.0, 1.0]`",
        ),
        (
            r#"{"name":"x","type":"counter","filters":[{"key":"Proto","value":"(","type":"match_regex"}]}"#,
            "filters: `(`",
        ),
        (
            r#"{"name":"x","type":"counter","filters":[{"key":"Nope"}]}"#,
            "filters: `Nope`",
        ),
        (
            r#"{"name":"x","type":"counter","flatten":["Bytes"]}"#,
            "flatten: `Bytes`",
        ),
        (r#"{"name":"x","type":"counter","valueScale":-1}"#, "valueScale: `-1`"),
    ] {
        let error = refused(json);
        assert!(error.starts_with(wanted), "{json}: {error}");
    }
    assert!(serde_json::from_str::<FlowMetric>(r#"{"name":"x","type":"counter","label":[]}"#).is_err());
    let careful = metric(r#"{"name":"x","type":"counter","labels":["SrcPort","Proto"]}"#);
    assert_eq!(warnings(&careful).len(), 1);
}

#[test]
fn predefined_metrics_are_sound() {
    for name in predefined::names() {
        let metric = predefined::find(&name).unwrap();
        assert_eq!(metric.name, name);
        check(&metric).unwrap();
        assert!(warnings(&metric).is_empty(), "{name}");
    }
    assert_eq!(predefined::default_list().len(), predefined::DEFAULT.len());
    assert_eq!(predefined::find("namespace_rtt").unwrap().name, "namespace_rtt_seconds");
    assert!(predefined::find("namespace_nothing").is_none());
}
