//! What the tests of the aggregator share: records that can be told apart, a stub to deliver to, and waiting.
#![allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing
)]

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    ops::Range,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use aggregator::{
    Aggregator,
    config::{AggregatorConfig, DatawayConfig, Endpoint, SinkConfig, SinkKind},
    pipeline::{BatchId, Delivery},
};
use records::{
    Bash, Direction, Dnsflow, Family, Flow, Globals, Httpflow, Netflow, Port, Question, RecordBatch, Transport,
};
use telemetry::Telemetry;
use testkit::dataway::{DatawayStub, StubConfig, StubHandle};
use tokio_util::sync::CancellationToken;

/// A record whose tag `pid` is `n`: no two of a test are alike.
pub fn record(n: u32) -> Netflow {
    Netflow {
        time_unix_ns: 1_700_000_000_000_000_000 + i64::from(n),
        local: records::Endpoint {
            ip: IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)),
            port: Port::Number(40_000),
        },
        remote: records::Endpoint {
            ip: IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2)),
            port: Port::Number(443),
        },
        transport: Transport::Tcp,
        family: Family::V4,
        direction: Direction::Outgoing,
        netns: 4_026_531_840,
        pid: n,
        process_name: "curl".into(),
        dst_nat: None,
        dst_domain: "".into(),
        local_k8s: None,
        remote_k8s: None,
        bytes_read: u64::from(n) * 3,
        bytes_written: u64::from(n) * 7,
        retransmits: 1,
        rtt_us: 200,
        rtt_var_us: 30,
        tcp_closed: 1,
        tcp_established: 1,
        datagrams_read: 0,
        datagrams_written: 0,
    }
}

fn flow(n: u32) -> Flow {
    let it = record(n);
    Flow {
        local: it.local,
        remote: it.remote,
        transport: it.transport,
        family: it.family,
        direction: it.direction,
        netns: it.netns,
        pid: it.pid,
        process_name: it.process_name,
        dst_nat: it.dst_nat,
        dst_domain: it.dst_domain,
        local_k8s: it.local_k8s,
        remote_k8s: it.remote_k8s,
    }
}

pub fn httpflow(n: u32) -> Httpflow {
    Httpflow {
        time_unix_ns: record(n).time_unix_ns,
        flow: flow(n),
        method: "GET".into(),
        path: "/".into(),
        http_version: "1.1".into(),
        status_code: 200,
        grpc_status: None,
        truncated: false,
        count: 1,
        latency_ns: 5,
        bytes_read: 6,
        bytes_written: 7,
    }
}

pub fn dnsflow(n: u32) -> Dnsflow {
    Dnsflow {
        time_unix_ns: record(n).time_unix_ns,
        flow: flow(n),
        question: Some(Question {
            name: "a.example".into(),
            kind: "A".into(),
        }),
        rcode: records::dnsflow::TIMED_OUT,
        count: 1,
        latency_ns: 0,
        latency_max_ns: 0,
    }
}

pub fn bash(n: u32) -> Bash {
    Bash::new(
        record(n).time_unix_ns,
        n,
        "root".into(),
        "ls \"a b\"".into(),
        true,
        None,
    )
}

pub fn globals() -> Arc<Globals> {
    Arc::new(Globals {
        tags: vec![("host".into(), "node-1".into())],
    })
}

pub fn delivery(boot_id: u64, seq: u64, numbers: Range<u32>) -> Delivery {
    Delivery {
        id: BatchId {
            node: "node-1".into(),
            boot_id,
            seq,
        },
        globals: globals(),
        batch: RecordBatch {
            netflow: numbers.map(record).collect(),
            ..RecordBatch::default()
        },
    }
}

pub async fn stub() -> StubHandle {
    DatawayStub::start(StubConfig::default()).await.unwrap()
}

/// A DataWay sink that retries fast.
pub fn dataway(name: &str, url: &str, change: impl FnOnce(&mut DatawayConfig)) -> SinkConfig {
    let mut sink = SinkConfig::dataway(name, Endpoint::parse(url).unwrap());
    let SinkKind::Dataway(config) = &mut sink.kind else {
        unreachable!()
    };
    config.retry_min = Duration::from_millis(10);
    config.retry_max = Duration::from_millis(100);
    config.auth_retry = Duration::from_millis(100);
    config.timeout = Duration::from_millis(500);
    change(config);
    sink
}

pub fn config(dir: &Path, sinks: Vec<SinkConfig>) -> AggregatorConfig {
    let mut config = AggregatorConfig::new(Some(dir.join("queue")), sinks);
    config.min_free_disk = 0;
    config
}

pub async fn start(config: AggregatorConfig) -> (Aggregator, Telemetry) {
    // For a failing test: TEST_LOG=debug cargo test -- --nocapture
    if let Ok(level) = std::env::var("TEST_LOG") {
        let format = telemetry::logging::LogFormat::Text;
        let _ = telemetry::logging::init(&telemetry::logging::LogConfig { level, format });
    }
    let telemetry = Telemetry::new("aggregator", "test");
    let aggregator = Aggregator::start(config, &telemetry, CancellationToken::new())
        .await
        .unwrap();
    (aggregator, telemetry)
}

/// How often each record number arrived at the stub, duplicates of bodies left out by the stub.
pub fn arrived(stub: &StubHandle) -> BTreeMap<u32, usize> {
    let mut counts = BTreeMap::new();
    for point in stub.points() {
        *counts.entry(point.tags["pid"].parse().unwrap()).or_default() += 1;
    }
    counts
}

/// Each number exactly once, no other, and no request broke a rule.
pub fn assert_exactly(stub: &StubHandle, numbers: Range<u32>) {
    let summary = stub.summary();
    assert_eq!(summary.violations, Vec::<String>::new());
    assert_eq!(arrived(stub), numbers.map(|n| (n, 1)).collect());
}

/// Every stage of the ledger adds up with nothing under way.
pub fn assert_ledger_closes(telemetry: &Telemetry) {
    for (name, stage) in telemetry.ledger.snapshot() {
        assert_eq!(stage.pending(), 0, "{name}: {stage:?}");
    }
}

/// Waits for a condition; generous, because the machine may be busy.
pub async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "{what}: not within 60 s");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
