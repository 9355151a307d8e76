//! Kafka, by a real broker.

use std::{collections::BTreeMap, time::Duration};

use aggregator::config::{KafkaCompression, KafkaConfig, Sasl, SaslMechanism, SinkConfig, SinkKind, TlsFiles};

use crate::{
    DRAIN,
    broker::{Broker, PASSWORD, USER, numbers},
    common::{assert_ledger_closes, config, eventually, start},
    delivery, flow, sink,
};

fn kafka(broker: &str, topic: &str, change: impl FnOnce(&mut KafkaConfig)) -> SinkConfig {
    let mut config = KafkaConfig::new(vec![broker.to_owned()], topic);
    config.retry_min = Duration::from_millis(50);
    config.retry_max = Duration::from_millis(500);
    config.auth_retry = Duration::from_millis(300);
    config.timeout = Duration::from_secs(6);
    change(&mut config);
    sink(topic, SinkKind::Kafka(config))
}

fn once(count: u32) -> BTreeMap<u64, usize> {
    (1..=u64::from(count)).map(|n| (n, 1)).collect()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "native: needs Java and the jars of a broker, which scripts/kafka.sh fetches"]
async fn flows_arrive_through_a_killed_broker_and_over_tls() {
    let mut broker = tokio::task::spawn_blocking(|| Broker::start(4)).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let secure = |password: &str| {
        let password = api::Secret::new(password);
        let ca = broker.ca();
        kafka(&broker.secure(), "secure", |kafka| {
            kafka.compression = KafkaCompression::Gzip;
            kafka.tls = Some(TlsFiles {
                ca: Some(ca),
                ..TlsFiles::default()
            });
            kafka.sasl = Some(Sasl {
                mechanism: SaslMechanism::ScramSha512,
                user: USER.to_owned(),
                password,
            });
        })
    };
    let plain = kafka(&broker.plain(), "plain", |kafka| kafka.max_body_bytes = 64 << 10);
    let wrong = config(dir.path(), vec![plain.clone(), secure("wr0ngword")]);
    let right = config(dir.path(), vec![plain, secure(PASSWORD)]);
    let (mut aggregator, telemetry) = start(wrong).await;
    let accept = aggregator.accept();
    accept.accept(delivery(1, 1..1001)).await.unwrap();
    let delivered = |at: usize, points: u64| {
        let statuses = aggregator.statuses();
        statuses[at].delivered_points >= points
    };
    eventually("the plain sink delivers", || delivered(0, 1000)).await;
    // A wrong password holds nothing up but its own sink, and is told without showing it.
    eventually("the log-in is refused", || aggregator.statuses()[1].failing).await;
    let status = aggregator.statuses().remove(1);
    assert_eq!(status.last_error.as_ref().unwrap().kind, "unauthorized", "{status:?}");
    assert!(!format!("{status:?}").contains("wr0ngword"));
    assert_eq!(status.backlog_points, 1000);

    broker.kill();
    for seq in 2..=6_u32 {
        let first = 1 + (seq - 1) * 1000;
        accept.accept(delivery(seq.into(), first..first + 1000)).await.unwrap();
    }
    eventually("the plain sink fails", || aggregator.statuses()[0].failing).await;
    assert_eq!(aggregator.statuses()[0].backlog_points, 5000);
    assert!(aggregator.reconfigure(right).await.unwrap());
    let broker = tokio::task::spawn_blocking(move || {
        broker.up();
        broker
    })
    .await
    .unwrap();
    let drained = aggregator.drain(DRAIN).await;
    assert!(drained.left.is_empty(), "{drained:?}");
    assert_ledger_closes(&telemetry);

    for topic in ["plain", "secure"] {
        let messages = broker.read(topic);
        assert_eq!(numbers(&messages), once(6000), "{topic}");
        println!("{topic}: {} messages for 6000 flows", messages.len());
        // One key per pair of addresses, whichever is the source, and one partition per key.
        let mut partition_of = BTreeMap::new();
        for message in &messages {
            let flow = flow(message.value["Bytes"].as_u64().unwrap() as u32);
            let hex: String = flow.pair_key().iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(message.key, hex);
            let known = partition_of.entry(hex).or_insert(message.partition);
            assert_eq!(*known, message.partition);
            assert_eq!(message.value["SrcAddr"], flow.src.to_string());
        }
        let partitions: std::collections::BTreeSet<u32> = partition_of.values().copied().collect();
        println!("{topic}: partitions {partitions:?}");
    }
}

/// `cargo test --release ... -- --ignored how_fast`: flows per second from `accept` to the broker's acknowledgement.
#[cfg(not(debug_assertions))]
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Java and the jars of a broker; a measurement"]
async fn how_fast() {
    let broker = tokio::task::spawn_blocking(|| Broker::start(4)).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (aggregator, _telemetry) = start(config(dir.path(), vec![kafka(&broker.plain(), "fast", |_| {})])).await;
    let accept = aggregator.accept();
    accept.accept(delivery(1, 1..10)).await.unwrap();
    eventually("the topic is there", || aggregator.statuses()[0].delivered_points >= 9).await;
    let flows = 200_000_u32;
    let started = std::time::Instant::now();
    let mut waiting = tokio::task::JoinSet::new();
    for seq in 2..2 + u64::from(flows / 2000) {
        let accept = std::sync::Arc::clone(&accept);
        waiting.spawn(async move { accept.accept(delivery(seq, 0..2000)).await.unwrap() });
    }
    while waiting.join_next().await.is_some() {}
    eventually("all is delivered", || {
        aggregator.statuses()[0].delivered_points >= u64::from(flows)
    })
    .await;
    let per_s = f64::from(flows) / started.elapsed().as_secs_f64();
    println!("{per_s:.0} flows/s end to end");
    aggregator.drain(DRAIN).await;
}
