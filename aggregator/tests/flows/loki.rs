//! Loki, by its protocol.

use std::{collections::BTreeMap, time::Duration};

use aggregator::config::{LokiAuth, LokiConfig, SinkKind};
use testkit::loki::{LokiFault, LokiStub};

use crate::{
    DRAIN,
    common::{assert_ledger_closes, config, eventually, start},
    delivery, flow, sink,
};

fn loki(url: &str, change: impl FnOnce(&mut LokiConfig)) -> aggregator::config::SinkConfig {
    let mut config = LokiConfig::new(url.parse().unwrap());
    config.retry_min = Duration::from_millis(10);
    config.retry_max = Duration::from_millis(100);
    config.auth_retry = Duration::from_millis(100);
    config.timeout = Duration::from_millis(500);
    change(&mut config);
    sink("loki", SinkKind::Loki(config))
}

/// Each of the flows once, by the bytes it tells; and no request broke a rule.
fn assert_once(stub: &LokiStub, count: u32) {
    let seen = stub.seen();
    assert_eq!(seen.refused, Vec::<String>::new());
    let mut bytes: Vec<u64> = seen
        .entries
        .iter()
        .map(|entry| {
            let line: serde_json::Value = serde_json::from_str(&entry.line).unwrap();
            line["Bytes"].as_u64().unwrap()
        })
        .collect();
    bytes.sort_unstable();
    assert_eq!(bytes, (1..=u64::from(count)).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_flow_arrives_once_through_all_failures() {
    let dir = tempfile::tempdir().unwrap();
    let stub = LokiStub::start(Some("netobserv"), None).await.unwrap();
    let sinks = vec![loki(&stub.url(), |loki| loki.max_body_bytes = 64 << 10)];
    let (aggregator, telemetry) = start(config(dir.path(), sinks)).await;
    let accept = aggregator.accept();
    let faults = [
        LokiFault::Status(429, Some(1)),
        LokiFault::Status(500, None),
        LokiFault::Status(503, None),
        LokiFault::Hang(Duration::from_secs(3)),
        LokiFault::Status(401, None),
        LokiFault::LoseAnswer,
        LokiFault::None,
    ];
    for (seq, fault) in (1..).zip(faults) {
        let before = stub.seen().faulted;
        stub.set_fault(fault.clone());
        let first = 1 + (seq as u32 - 1) * 300;
        accept.accept(delivery(seq, first..first + 300)).await.unwrap();
        if fault != LokiFault::None {
            eventually("requests fail", || stub.seen().faulted >= before + 2).await;
            let status = aggregator.statuses().remove(0);
            assert!(status.failing && status.backlog_points > 0, "{status:?}");
        }
    }
    let drained = aggregator.drain(DRAIN).await;
    assert!(drained.left.is_empty(), "{drained:?}");
    assert_once(&stub, 2100);
    assert!(stub.seen().repeated > 0, "a lost answer makes the sender repeat itself");
    assert_ledger_closes(&telemetry);
    let ledger = telemetry.ledger.snapshot();
    assert_eq!(ledger["sink.loki.deliver"].emitted, 2100);
    assert!(ledger["sink.loki.queue"].lost.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn labels_are_the_documented_ones_and_not_in_the_line() {
    let dir = tempfile::tempdir().unwrap();
    let stub = LokiStub::start(Some("team"), Some("Bearer t0ken")).await.unwrap();
    let sinks = vec![loki(&stub.url(), |loki| {
        loki.tenant = "team".to_owned();
        loki.auth = LokiAuth::Bearer(api::Secret::new("t0ken"));
        loki.exclude_labels = vec!["DstK8S_Type".to_owned()];
    })];
    let (aggregator, _telemetry) = start(config(dir.path(), sinks)).await;
    aggregator.accept().accept(delivery(1, 1..40)).await.unwrap();
    aggregator.drain(DRAIN).await;
    assert_once(&stub, 39);
    let seen = stub.seen();
    for entry in &seen.entries {
        let line: BTreeMap<String, serde_json::Value> = serde_json::from_str(&entry.line).unwrap();
        let flow = flow(line["Bytes"].as_u64().unwrap() as u32);
        let namespace = flow.src_k8s.as_ref().unwrap().namespace.to_string();
        let wanted: BTreeMap<String, String> = [
            ("app", "netobserv-flowcollector"),
            ("FlowDirection", "1"),
            ("K8S_FlowLayer", "app"),
            ("SrcK8S_Namespace", &namespace),
            ("SrcK8S_OwnerName", "web"),
            ("SrcK8S_Type", "Pod"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into();
        assert_eq!(entry.labels, wanted);
        assert!(wanted.keys().all(|label| !line.contains_key(label)));
        assert_eq!(entry.time_ns, flow.end_unix_ms * 1_000_000);
    }
    // In each stream by time: nothing is older than what came before it.
    let mut newest: BTreeMap<&BTreeMap<String, String>, i64> = BTreeMap::new();
    for entry in &seen.entries {
        let before = newest.insert(&entry.labels, entry.time_ns).unwrap_or_default();
        assert!(before <= entry.time_ns, "{entry:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_too_far_behind_go_to_the_dead_letters() {
    let dir = tempfile::tempdir().unwrap();
    let stub = LokiStub::start(None, None).await.unwrap();
    let sinks = vec![loki(&stub.url(), |_| {})];
    let (aggregator, telemetry) = start(config(dir.path(), sinks)).await;
    let accept = aggregator.accept();
    accept.accept(delivery(1, 1..4)).await.unwrap();
    eventually("the first arrive", || stub.seen().entries.len() == 3).await;
    let mut late = delivery(2, 4..7);
    for flow in &mut late.batch.flowlog {
        flow.end_unix_ms -= 7_200_000;
    }
    accept.accept(late).await.unwrap();
    accept.accept(delivery(3, 7..10)).await.unwrap();
    let drained = aggregator.drain(DRAIN).await;
    assert!(drained.left.is_empty());
    assert_eq!(stub.seen().entries.len(), 6);
    let text = std::fs::read_to_string(dir.path().join("queue/dead-letter/loki-000001.jsonl")).unwrap();
    let letter: serde_json::Value = serde_json::from_str(text.trim()).unwrap();
    assert!(letter["answer"].as_str().unwrap().contains("too far behind"));
    assert_eq!(
        (&letter["points"], &letter["content_encoding"]),
        (&3.into(), &"snappy".into())
    );
    assert_eq!(telemetry.ledger.snapshot()["sink.loki.deliver"].lost["dead_letter"], 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_credentials_lose_nothing_and_show_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let stub = LokiStub::start(None, Some("Basic dTpnb29k")).await.unwrap();
    let wrong = |password: &str| {
        let password = api::Secret::new(password);
        vec![loki(&stub.url(), |loki| {
            loki.auth = LokiAuth::Basic {
                user: "u".to_owned(),
                password,
            };
        })]
    };
    let (mut aggregator, telemetry) = start(config(dir.path(), wrong("b4dpassword"))).await;
    aggregator.accept().accept(delivery(1, 1..31)).await.unwrap();
    eventually("it is refused", || aggregator.statuses()[0].failing).await;
    let status = aggregator.statuses().remove(0);
    assert_eq!(status.last_error.as_ref().unwrap().kind, "unauthorized");
    assert!(!format!("{status:?}").contains("b4dpassword"));
    assert!(!telemetry.render_metrics().unwrap().contains("b4dpassword"));
    assert!(aggregator.reconfigure(config(dir.path(), wrong("good"))).await.unwrap());
    aggregator.drain(DRAIN).await;
    assert_once(&stub, 30);
}
