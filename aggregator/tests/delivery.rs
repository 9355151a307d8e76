//! The aggregator as a library against the strict stub: what arrives, what is kept, what is counted.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod common;

use std::{fs, time::Duration};

use aggregator::{
    Aggregator,
    config::{AggregatorConfig, Endpoint, PointEncoding, SinkConfig, SinkKind, TextFormat, WhenFull},
    pipeline::{AcceptError, Accepted},
};
use common::{assert_exactly, assert_ledger_closes, config, dataway, delivery, eventually, start, stub};
use telemetry::Telemetry;
use testkit::dataway::{DatawayStub, Fault, StubConfig};
use tokio_util::sync::CancellationToken;

const DRAIN: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
async fn every_record_arrives_exactly_once_through_all_failures() {
    let dir = tempfile::tempdir().unwrap();
    let stub = stub().await;
    // Small bodies, so that there are many to fail.
    let sink = dataway("main", &stub.url(), |d| d.max_body_bytes = 8 << 10);
    let (aggregator, telemetry) = start(config(dir.path(), vec![sink])).await;
    let accept = aggregator.accept();
    let faults = [
        Fault::Status {
            status: 503,
            retry_after: None,
        },
        Fault::Status {
            status: 429,
            retry_after: Some(1),
        },
        Fault::Hang { seconds: 5.0 },
        Fault::Close,
        Fault::DropAnswer,
        Fault::Status {
            status: 302,
            retry_after: None,
        },
        Fault::None,
    ];
    for (index, fault) in faults.into_iter().enumerate() {
        let before = stub.summary();
        stub.set_fault(fault.clone());
        let first = 1 + index as u32 * 500;
        assert_eq!(
            accept
                .accept(delivery(9, 1 + index as u64, first..first + 500))
                .await
                .unwrap(),
            Accepted::Stored
        );
        if fault != Fault::None {
            eventually("requests fail", || {
                let now = stub.summary();
                now.faulted.values().sum::<u64>() >= before.faulted.values().sum::<u64>() + 2
            })
            .await;
        }
    }
    let drained = aggregator.drain(DRAIN).await;
    assert!(drained.left.is_empty(), "{drained:?}");
    assert_exactly(&stub, 1..3501);
    assert!(
        stub.summary().duplicates > 0,
        "a dropped answer makes the sender repeat itself"
    );
    assert_ledger_closes(&telemetry);
    let ledger = telemetry.ledger.snapshot();
    assert_eq!(ledger["aggregator.accept"].emitted, 3500);
    assert_eq!(ledger["sink.main.deliver"].emitted, 3500);
    assert!(ledger["sink.main.queue"].lost.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn line_protocol_and_uncompressed_bodies_are_taken_too() {
    let dir = tempfile::tempdir().unwrap();
    let stub = stub().await;
    let sink = dataway("main", &stub.url(), |d| {
        d.encoding = PointEncoding::LineProtocol;
        d.gzip_level = 0;
    });
    let (aggregator, telemetry) = start(config(dir.path(), vec![sink])).await;
    aggregator.accept().accept(delivery(1, 1, 1..5001)).await.unwrap();
    aggregator.drain(DRAIN).await;
    assert_exactly(&stub, 1..5001);
    assert_eq!(stub.summary().gzip_bodies, 0);
    assert!(stub.summary().bodies > 1 && stub.summary().largest_body <= 1 << 20);
    assert_ledger_closes(&telemetry);
}

/// Bodies of logs lie in the queue beside those of flows, also over a restart.
#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_record_goes_where_it_belongs() {
    let dir = tempfile::tempdir().unwrap();
    let stub = stub().await;
    stub.set_fault(Fault::Status {
        status: 503,
        retry_after: None,
    });
    let sink = || dataway("main", &stub.url(), |_| {});
    let (aggregator, _) = start(config(dir.path(), vec![sink()])).await;
    let mut all = delivery(9, 1, 1..4);
    all.batch.httpflow = vec![common::httpflow(7)];
    all.batch.dnsflow = vec![common::dnsflow(8)];
    all.batch.bash = vec![common::bash(9), common::bash(10)];
    assert_eq!(aggregator.accept().accept(all).await.unwrap(), Accepted::Stored);
    aggregator.drain(Duration::ZERO).await;
    stub.set_fault(Fault::None);
    let text = dir.path().join("rows.txt");
    let file = SinkConfig::file(text.clone(), TextFormat::Json);
    let (aggregator, telemetry) = start(config(dir.path(), vec![sink(), file])).await;
    let mut more = delivery(9, 2, 4..6);
    more.batch.bash = vec![common::bash(11)];
    assert_eq!(aggregator.accept().accept(more).await.unwrap(), Accepted::Stored);
    assert!(aggregator.drain(DRAIN).await.left.is_empty());
    let summary = stub.summary();
    assert_eq!(summary.violations, Vec::<String>::new());
    let counts = ["netflow", "httpflow", "dnsflow", "bash"].map(|name| summary.points_by_measurement[name]);
    assert_eq!(counts, [5, 1, 1, 3]);
    assert_eq!(
        fs::read_to_string(text).unwrap().lines().count(),
        3,
        "a text takes all kinds"
    );
    assert_ledger_closes(&telemetry);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_batch_is_dropped_also_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let stub = stub().await;
    let config = config(dir.path(), vec![dataway("main", &stub.url(), |_| {})]);
    let (aggregator, telemetry) = start(config.clone()).await;
    let accept = aggregator.accept();
    // Out of order within the window; 3 stays open.
    for seq in [1, 2, 5, 4] {
        let first = seq as u32 * 100;
        assert_eq!(
            accept.accept(delivery(7, seq, first..first + 100)).await.unwrap(),
            Accepted::Stored
        );
    }
    assert_eq!(
        accept.accept(delivery(7, 5, 500..600)).await.unwrap(),
        Accepted::Duplicate
    );
    assert_eq!(accept.last_contiguous("node-1", 7).await, 2);
    assert_eq!(accept.last_contiguous("node-1", 8).await, 0);
    aggregator.drain(DRAIN).await;
    assert_eq!(
        telemetry.ledger.snapshot()["aggregator.accept"].skipped["duplicate"],
        100
    );

    let (aggregator, telemetry) = start(config).await;
    let accept = aggregator.accept();
    for (seq, becomes) in [
        (4, Accepted::Duplicate),
        (3, Accepted::Stored),
        (3, Accepted::Duplicate),
    ] {
        let first = seq as u32 * 100;
        assert_eq!(
            accept.accept(delivery(7, seq, first..first + 100)).await.unwrap(),
            becomes
        );
    }
    assert_eq!(accept.last_contiguous("node-1", 7).await, 5);
    // The same numbers of another start of the agent are other batches.
    assert_eq!(accept.accept(delivery(8, 1, 600..700)).await.unwrap(), Accepted::Stored);
    aggregator.drain(DRAIN).await;
    assert_exactly(&stub, 100..700);
    assert_ledger_closes(&telemetry);
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_of_many_agents_share_bodies_and_commits() {
    let dir = tempfile::tempdir().unwrap();
    let stub = stub().await;
    let mut config = config(dir.path(), vec![dataway("main", &stub.url(), |_| {})]);
    config.commit_linger = Duration::from_millis(500);
    let (aggregator, telemetry) = start(config).await;
    let accepts = (0..200u64).map(|boot| {
        let accept = aggregator.accept();
        async move {
            let first = 1 + boot as u32 * 5;
            accept.accept(delivery(boot, 1, first..first + 5)).await
        }
    });
    let results = futures::future::join_all(accepts).await;
    assert!(results.into_iter().all(|result| matches!(result, Ok(Accepted::Stored))));
    aggregator.drain(DRAIN).await;
    assert_exactly(&stub, 1..1001);
    assert!(
        stub.summary().bodies <= 20,
        "{} bodies for 200 small batches",
        stub.summary().bodies
    );
    assert_ledger_closes(&telemetry);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_token_loses_nothing_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let stub = stub().await;
    let wrong = format!("http://{}/?token=tkn_wrong", stub.addr);
    let (aggregator, telemetry) = start(config(dir.path(), vec![dataway("main", &wrong, |_| {})])).await;
    aggregator.accept().accept(delivery(1, 1, 1..101)).await.unwrap();
    eventually("the refusal is reported", || aggregator.statuses()[0].failing).await;
    let status = aggregator.statuses().remove(0);
    let error = status.last_error.unwrap();
    assert_eq!(error.kind, "unauthorized");
    assert!(
        error.text.contains("403") && error.text.contains("check the token"),
        "{}",
        error.text
    );
    let health = format!("{:?}", telemetry.health.snapshot());
    assert!(
        health.contains("check the token") && !health.contains("tkn_wrong"),
        "{health}"
    );
    assert!(!telemetry.render_metrics().unwrap().contains("tkn_wrong"));
    assert_eq!(status.backlog_points, 100);
    let drained = aggregator.drain(Duration::from_millis(200)).await;
    assert_eq!(drained.left, [("main".to_owned(), 100)]);

    // The next start has the right one.
    let (aggregator, telemetry) = start(config(dir.path(), vec![dataway("main", &stub.url(), |_| {})])).await;
    assert_eq!(aggregator.statuses()[0].backlog_points, 100);
    aggregator.drain(DRAIN).await;
    assert_eq!(common::arrived(&stub).len(), 100);
    assert_ledger_closes(&telemetry);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_body_becomes_a_dead_letter_with_the_answer() {
    let dir = tempfile::tempdir().unwrap();
    let stub = stub().await;
    let (aggregator, telemetry) = start(config(dir.path(), vec![dataway("main", &stub.url(), |_| {})])).await;
    stub.set_fault(Fault::Status {
        status: 400,
        retry_after: None,
    });
    aggregator.accept().accept(delivery(1, 1, 1..51)).await.unwrap();
    let dead = dir.path().join("queue/dead-letter/main-000001.jsonl");
    eventually("the dead letter", || {
        fs::metadata(&dead).is_ok_and(|file| file.len() > 0)
    })
    .await;
    stub.set_fault(Fault::None);
    aggregator.accept().accept(delivery(1, 2, 51..101)).await.unwrap();
    aggregator.drain(DRAIN).await;
    assert_exactly(&stub, 51..101);
    let letter: serde_json::Value = serde_json::from_str(fs::read_to_string(&dead).unwrap().trim()).unwrap();
    assert_eq!((&letter["status"], &letter["points"]), (&400.into(), &50.into()));
    assert_eq!(letter["answer"], "the stub was told to answer this");
    assert_eq!(telemetry.ledger.snapshot()["sink.main.deliver"].lost["dead_letter"], 50);
    assert_ledger_closes(&telemetry);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_refuses_and_takes_again_when_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let stub = stub().await;
    stub.set_fault(Fault::Status {
        status: 503,
        retry_after: None,
    });
    let sink = dataway("main", &stub.url(), |d| d.gzip_level = 0);
    let mut config = config(dir.path(), vec![sink]);
    config.queue_max_bytes = 1 << 20;
    let (aggregator, telemetry) = start(config).await;
    let accept = aggregator.accept();
    let mut seq = 1;
    let refused = loop {
        let first = seq as u32 * 100;
        match accept.accept(delivery(1, seq, first..first + 100)).await {
            Ok(stored) => assert_eq!(stored, Accepted::Stored),
            Err(error) => break error,
        }
        assert!(seq < 100, "the bound does not hold");
        seq += 1;
    };
    assert!(
        matches!(&refused, AcceptError::Full { sink, .. } if sink == "main"),
        "{refused}"
    );
    assert!(seq > 5, "full after {seq} batches");
    assert!(aggregator.statuses()[0].backlog_bytes <= 1 << 20);
    assert!(
        telemetry
            .render_metrics()
            .unwrap()
            .contains("pipeline_refused_batches_total{reason=\"full\"} 1")
    );
    // What was refused is no duplicate later.
    stub.set_fault(Fault::None);
    let first = seq as u32 * 100;
    let mut tries = 0;
    while accept.accept(delivery(1, seq, first..first + 100)).await.is_err() {
        tries += 1;
        assert!(tries < 600, "no room again within a minute");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    aggregator.drain(DRAIN).await;
    assert_exactly(&stub, 100..first + 100);
    assert_ledger_closes(&telemetry);
}

#[tokio::test(flavor = "multi_thread")]
async fn sinks_progress_independently_and_one_may_drop() {
    let dir = tempfile::tempdir().unwrap();
    let (good, dead) = (stub().await, stub().await);
    dead.set_fault(Fault::Status {
        status: 500,
        retry_after: None,
    });
    let mut drops = dataway("dead", &dead.url(), |d| d.gzip_level = 0);
    drops.when_full = WhenFull::DropNewest;
    let mut config = config(dir.path(), vec![dataway("good", &good.url(), |_| {}), drops]);
    config.queue_max_bytes = 256 << 10;
    let (aggregator, telemetry) = start(config).await;
    for seq in 1..=40 {
        let first = seq as u32 * 100;
        aggregator
            .accept()
            .accept(delivery(1, seq, first..first + 100))
            .await
            .unwrap();
        eventually("the good sink takes it", || {
            common::arrived(&good).len() == seq as usize * 100
        })
        .await;
    }
    dead.set_fault(Fault::None);
    aggregator.drain(DRAIN).await;
    assert_exactly(&good, 100..4100);
    let ledger = telemetry.ledger.snapshot();
    let (lost, kept) = (
        ledger["sink.dead.queue"].lost["queue_full"],
        ledger["sink.dead.deliver"].emitted,
    );
    assert!(lost > 0 && kept > 0 && lost + kept == 4000, "lost {lost}, kept {kept}");
    assert_eq!(common::arrived(&dead).len() as u64, kept);
    assert_ledger_closes(&telemetry);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_old_is_given_up_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    let stub = stub().await;
    stub.set_fault(Fault::Close);
    let mut config = config(
        dir.path(),
        vec![dataway("main", &stub.url(), |d| d.max_body_bytes = 8 << 10)],
    );
    config.queue_max_age = Duration::from_secs(1);
    let (aggregator, telemetry) = start(config).await;
    aggregator.accept().accept(delivery(1, 1, 1..1001)).await.unwrap();
    eventually("all expired", || aggregator.statuses()[0].backlog_points == 0).await;
    aggregator.drain(DRAIN).await;
    assert_eq!(telemetry.ledger.snapshot()["sink.main.queue"].lost["expired"], 1000);
    assert_ledger_closes(&telemetry);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_holds_each_acknowledged_record_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.jsonl");
    let config = AggregatorConfig::new(None, vec![SinkConfig::file(path.clone(), TextFormat::Json)]);
    let (aggregator, telemetry) = start(config).await;
    let accept = aggregator.accept();
    accept.accept(delivery(1, 1, 1..3001)).await.unwrap();
    // Acknowledged means written: no drain in between.
    assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 3000);
    assert_eq!(
        accept.accept(delivery(1, 1, 1..3001)).await.unwrap(),
        Accepted::Duplicate
    );
    aggregator.drain(DRAIN).await;
    let text = fs::read_to_string(&path).unwrap();
    let rows: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(rows.len(), 3000);
    assert_ledger_closes(&telemetry);
    assert_eq!(telemetry.ledger.snapshot()["sink.file.deliver"].emitted, 3000);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_used_is_refused_at_start() {
    let dir = tempfile::tempdir().unwrap();
    let telemetry = Telemetry::new("aggregator", "test");
    let refused =
        async |config: AggregatorConfig| match Aggregator::start(config, &telemetry, CancellationToken::new()).await {
            Ok(_) => panic!("started"),
            Err(error) => error.to_string(),
        };
    let endpoint = || Endpoint::parse("http://127.0.0.1:9/?token=tkn_x").unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    let below_a_file = dir.path().join("file/queue");
    let text = refused(AggregatorConfig::new(
        Some(below_a_file.clone()),
        vec![SinkConfig::dataway("main", endpoint())],
    ))
    .await;
    assert!(
        text.contains(below_a_file.to_str().unwrap()) && text.contains("can write"),
        "{text}"
    );
    let text = refused(AggregatorConfig::new(
        None,
        vec![SinkConfig::file(below_a_file.clone(), TextFormat::Json)],
    ))
    .await;
    assert!(
        text.starts_with("sink `file`: `") && text.contains(below_a_file.to_str().unwrap()),
        "{text}"
    );
    let mut sink = SinkConfig::dataway("main", endpoint());
    let SinkKind::Dataway(config) = &mut sink.kind else {
        unreachable!()
    };
    config.ca_file = Some(dir.path().join("absent.pem"));
    let text = refused(common::config(dir.path(), vec![sink])).await;
    assert!(
        text.starts_with("sink `main`: ") && text.contains("absent.pem"),
        "{text}"
    );

    let sinks = || vec![SinkConfig::dataway("main", endpoint())];
    let (first, _) = start(common::config(dir.path(), sinks())).await;
    let text = refused(common::config(dir.path(), sinks())).await;
    assert!(text.contains("in use by another process"), "{text}");
    first.drain(Duration::ZERO).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_aggregator_refuses() {
    let dir = tempfile::tempdir().unwrap();
    let stub = DatawayStub::start(StubConfig::default()).await.unwrap();
    let (aggregator, _) = start(config(dir.path(), vec![dataway("main", &stub.url(), |_| {})])).await;
    let accept = aggregator.accept();
    aggregator.drain(DRAIN).await;
    assert!(matches!(
        accept.accept(delivery(1, 1, 1..2)).await,
        Err(AcceptError::Stopping)
    ));
}
