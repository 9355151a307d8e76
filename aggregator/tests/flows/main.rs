//! The sinks of flow logs: Loki against a strict receiver of its protocol, metrics by what a scrape says, Kafka against a
//! real broker (in the native tier: it takes a Java and `EBPFCOLLECTOR_KAFKA_LIBS`, what `scripts/kafka.sh` prints).
#![allow(
    missing_docs,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing
)]

mod broker;
#[path = "../common/mod.rs"]
mod common;
mod conversations;
mod kafka;
mod loki;

use std::{net::Ipv4Addr, ops::Range, sync::Arc, time::Duration};

use aggregator::{
    config::{PrometheusConfig, SinkConfig, SinkKind},
    pipeline::{BatchId, Delivery},
};
use common::{assert_ledger_closes, config, globals, start};
use records::{
    FlowLog, RecordBatch,
    flowlog::{FlowDirection, FlowL4, FlowLayer, FlowPeer, TCP},
};

pub const DRAIN: Duration = Duration::from_secs(60);

/// Flow `n`: `Bytes` is `n`, so no two of a test are alike.
pub fn flow(n: u32) -> FlowLog {
    let ip = |last: u32| Ipv4Addr::from_bits(0x0af4_0000 | last);
    let ports = FlowL4::Ports { src: 40_000, dst: 443 };
    let mut flow = FlowLog::new(ip(n % 60).into(), ip(61 + n % 7).into(), TCP, ports);
    flow.bytes = n.into();
    flow.packets = 1;
    flow.start_unix_ms = 1_790_000_000_000 + i64::from(n);
    // Some out of order.
    flow.end_unix_ms = flow.start_unix_ms + i64::from(n % 5 * 100);
    flow.direction = Some(FlowDirection::Egress);
    flow.layer = Some(FlowLayer::App);
    flow.src_k8s = Some(Arc::new(FlowPeer {
        namespace: format!("ns-{}", n % 3).into(),
        owner_name: "web".into(),
        kind: "Pod".into(),
        ..FlowPeer::default()
    }));
    flow
}

pub fn delivery(seq: u64, numbers: Range<u32>) -> Delivery {
    Delivery {
        id: BatchId {
            node: "node-1".into(),
            boot_id: 9,
            seq,
        },
        globals: globals(),
        batch: RecordBatch {
            flowlog: numbers.map(flow).collect(),
            ..RecordBatch::default()
        },
    }
}

/// A sink of flow logs.
pub fn sink(name: &str, kind: SinkKind) -> SinkConfig {
    SinkConfig {
        name: name.to_owned(),
        when_full: aggregator::config::WhenFull::Withhold,
        kind,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_count_what_was_stored_and_no_repeat() {
    let dir = tempfile::tempdir().unwrap();
    let metrics = PrometheusConfig {
        metrics: vec![
            serde_json::from_str(
                r#"{"name":"bytes_total","type":"counter","valueKey":"Bytes","labels":["SrcK8S_Namespace","FlowDirection"]}"#,
            )
            .unwrap(),
        ],
        ..PrometheusConfig::new()
    };
    let sinks = vec![sink("prometheus", SinkKind::Prometheus(metrics))];
    let (aggregator, telemetry) = start(config(dir.path(), sinks)).await;
    let accept = aggregator.accept();
    accept.accept(delivery(1, 0..300)).await.unwrap();
    accept.accept(delivery(1, 0..300)).await.unwrap();
    accept.accept(delivery(2, 300..600)).await.unwrap();
    let told = telemetry.render_metrics().unwrap();
    for namespace in 0..3 {
        let sum: u32 = (0..600).filter(|n| n % 3 == namespace).sum();
        let line = format!("netobserv_bytes_total{{SrcK8S_Namespace=\"ns-{namespace}\",FlowDirection=\"1\"}} {sum}.0");
        assert!(told.lines().any(|known| known == line), "{line}\n{told}");
    }
    let status = &aggregator.statuses()[0];
    assert_eq!((status.kind, status.delivered_points), ("prometheus", 600));
    aggregator.drain(DRAIN).await;
    assert_ledger_closes(&telemetry);
}
