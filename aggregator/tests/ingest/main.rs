//! The ingest server against a client that says exactly what it is told, right and wrong.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    missing_docs,
    unreachable_pub
)]

mod hostile;
mod overview;
mod support;

use std::time::Duration;

use aggregator::ingest::{IngestConfig, IngestError, ServerTls};
use proto::v1::{self, client_message::Kind, server_message};
use tokio::time;
use tonic::{Code, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use support::{Client, Fake, Mood, PATIENCE, Server, hello, loopback, until};

#[tokio::test]
async fn a_batch_is_acknowledged_after_it_is_stored_and_not_before() {
    let fake = Fake::new(Mood::Hangs);
    let server = Server::start(loopback(), fake.clone()).await;
    let mut client = Client::greeted(server.url()).await;
    client.batch(1).await;
    until("asked", || fake.calls() == [1]).await;
    assert!(
        time::timeout(Duration::from_millis(100), client.hear()).await.is_err(),
        "answered before it was stored"
    );
    fake.mood.send_replace(Mood::Willing);
    client.expect_ack(1).await;
    client.batch(1 << 40).await;
    client.expect_ack(1 << 40).await;
    assert_eq!(server.closed(), (6, 6, 0, 0));
    let id = fake.stored.lock()[0].clone();
    assert_eq!((&*id.node, id.boot_id), ("n1", 7));
}

#[tokio::test]
async fn duplicates_are_acknowledged_and_counted() {
    let server = Server::start(loopback(), Fake::new(Mood::Willing)).await;
    for _ in 0..2 {
        let mut client = Client::greeted(server.url()).await;
        client.batch(1).await;
        client.expect_ack(1).await;
    }
    assert_eq!(server.closed(), (6, 3, 3, 0));
}

#[tokio::test]
async fn after_busy_only_the_refused_batch_is_taken() {
    let fake = Fake::new(Mood::Full);
    let config = IngestConfig {
        retry_after: Duration::from_millis(1234),
        ..loopback()
    };
    let server = Server::start(config, fake.clone()).await;
    let mut client = Client::greeted(server.url()).await;
    client.batch(5).await;
    let server_message::Kind::Busy(busy) = client.hear().await.unwrap() else {
        panic!("not busy")
    };
    assert_eq!(
        (busy.seq, busy.retry_after_ms, busy.reason()),
        (5, 1234, v1::BusyReason::Full)
    );
    assert!(
        busy.detail.contains("dataway") && busy.detail.contains("2 GiB"),
        "{}",
        busy.detail
    );
    fake.mood.send_replace(Mood::Willing);
    // Sent before the agent heard of it: neither stored nor answered.
    client.batch(6).await;
    client.batch(7).await;
    client.batch(5).await;
    client.expect_ack(5).await;
    client.batch(6).await;
    client.expect_ack(6).await;
    assert_eq!(fake.calls(), [5, 5, 6]);
    assert_eq!(server.closed(), (9, 6, 3, 0));
}

#[tokio::test]
async fn a_refusal_is_answered_once_and_what_follows_is_not_acknowledged() {
    let fake = Fake::new(Mood::Hangs);
    let server = Server::start(loopback(), fake.clone()).await;
    let mut client = Client::greeted(server.url()).await;
    for seq in 1..=3 {
        client.batch(seq).await;
    }
    until("all are asked for", || fake.calls().len() == 3).await;
    fake.mood.send_replace(Mood::Full);
    let answer = client.hear().await.unwrap();
    assert!(
        matches!(&answer, server_message::Kind::Busy(busy) if busy.seq == 1),
        "{answer:?}"
    );
    fake.mood.send_replace(Mood::Willing);
    client.batch(1).await;
    client.expect_ack(1).await;
}

#[tokio::test]
async fn no_more_batches_wait_than_the_stream_may_have() {
    let fake = Fake::new(Mood::Hangs);
    let server = Server::start(
        IngestConfig {
            max_unacked_batches: 2,
            ..loopback()
        },
        fake.clone(),
    )
    .await;
    let mut client = Client::greeted(server.url()).await;
    for seq in 1..=10 {
        client.batch(seq).await;
    }
    until("two are asked for", || fake.calls().len() == 2).await;
    time::sleep(Duration::from_millis(100)).await;
    assert_eq!(fake.calls(), [1, 2]);
    fake.mood.send_replace(Mood::Willing);
    for seq in 1..=10 {
        client.expect_ack(seq).await;
    }
}

#[tokio::test]
async fn no_more_batches_wait_than_all_streams_together_may_have() {
    let fake = Fake::new(Mood::Hangs);
    let server = Server::start(
        IngestConfig {
            max_inflight_batches: 1,
            ..loopback()
        },
        fake.clone(),
    )
    .await;
    let mut clients = Vec::new();
    for boot_id in 1..=3 {
        let mut client = Client::connect(server.url()).await;
        client.say(Kind::Hello(v1::Hello { boot_id, ..hello() })).await;
        client.hear().await.unwrap();
        client.batch(1).await;
        clients.push(client);
    }
    until("one is asked for", || fake.calls().len() == 1).await;
    time::sleep(Duration::from_millis(100)).await;
    assert_eq!(fake.calls().len(), 1);
    fake.mood.send_replace(Mood::Willing);
    for client in &mut clients {
        client.expect_ack(1).await;
    }
}

#[tokio::test]
async fn a_newer_stream_of_the_same_agent_start_takes_over() {
    let fake = Fake::new(Mood::Hangs);
    let server = Server::start(loopback(), fake.clone()).await;
    let mut old = Client::greeted(server.url()).await;
    old.batch(1).await;
    until("asked", || fake.calls().len() == 1).await;
    let mut new = Client::connect(server.url()).await;
    new.say(Kind::Hello(hello())).await;
    // The new one waits until the old one has stored what it had.
    assert!(
        time::timeout(Duration::from_millis(100), new.hear()).await.is_err(),
        "did not wait for the old stream"
    );
    fake.mood.send_replace(Mood::Willing);
    assert!(matches!(new.hear().await.unwrap(), server_message::Kind::HelloAck(_)));
    old.expect_ack(1).await;
    assert_eq!(old.end().await.code(), Code::Aborted);
    new.batch(1).await;
    new.expect_ack(1).await;
    assert_eq!(server.closed(), (6, 3, 3, 0));
    // A stream of another start is no rival.
    let mut other = Client::connect(server.url()).await;
    other.say(Kind::Hello(v1::Hello { boot_id: 8, ..hello() })).await;
    other.hear().await.unwrap();
    new.batch(2).await;
    new.expect_ack(2).await;
}

#[tokio::test]
async fn streams_that_give_up_waiting_leave_the_turn_to_the_next() {
    let fake = Fake::new(Mood::Hangs);
    let config = IngestConfig {
        first_message_timeout: Duration::from_millis(100),
        ..loopback()
    };
    let server = Server::start(config, fake.clone()).await;
    let mut old = Client::greeted(server.url()).await;
    old.batch(1).await;
    until("asked", || fake.calls().len() == 1).await;
    for _ in 0..3 {
        let mut waits = Client::connect(server.url()).await;
        waits.say(Kind::Hello(hello())).await;
        assert_eq!(waits.end().await.code(), Code::Unavailable);
    }
    fake.mood.send_replace(Mood::Willing);
    old.expect_ack(1).await;
    assert_eq!(old.end().await.code(), Code::Aborted);
    let mut new = Client::greeted(server.url()).await;
    new.batch(2).await;
    new.expect_ack(2).await;
    assert_eq!(fake.calls(), [1, 2]);
}

#[tokio::test]
async fn silence_ends_a_stream_and_heartbeats_keep_it() {
    let idle = Duration::from_millis(1500);
    let config = IngestConfig {
        idle_timeout: idle,
        first_message_timeout: idle,
        ..loopback()
    };
    let server = Server::start(config, Fake::new(Mood::Willing)).await;
    let mut mute = Client::connect(server.url()).await;
    assert_eq!(mute.end().await.code(), Code::DeadlineExceeded);
    assert_eq!(server.metrics.malformed_of("hello_timeout"), 1);
    let mut client = Client::greeted(server.url()).await;
    for _ in 0..12 {
        client.say(Kind::Heartbeat(v1::Heartbeat {})).await;
        time::sleep(idle / 10).await;
    }
    client.batch(1).await;
    client.expect_ack(1).await;
    let status = client.end().await;
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    assert!(status.message().contains("nothing heard"), "{status}");
}

#[tokio::test]
async fn stopping_finishes_what_was_taken_and_says_so() {
    let fake = Fake::new(Mood::Hangs);
    let server = Server::start(loopback(), fake.clone()).await;
    let channel = Channel::from_shared(server.url()).unwrap().connect().await.unwrap();
    let mut health = HealthClient::new(channel.clone());
    let service = "ebpfcollector.v1.Collector";
    let mut states = health
        .watch(HealthCheckRequest {
            service: service.to_owned(),
        })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        states.message().await.unwrap().unwrap().status(),
        ServingStatus::Serving
    );
    let mut client = Client::over(channel).await;
    client.say(Kind::Hello(hello())).await;
    client.hear().await.unwrap();
    client.batch(1).await;
    until("asked", || fake.calls().len() == 1).await;
    server.stop.cancel();
    assert_eq!(
        states.message().await.unwrap().unwrap().status(),
        ServingStatus::NotServing
    );
    drop(states);
    fake.mood.send_replace(Mood::Willing);
    client.expect_ack(1).await;
    assert_eq!(client.end().await.code(), Code::Unavailable);
    drop((client, health));
    assert_eq!(server.closed(), (3, 3, 0, 0));
    time::timeout(PATIENCE, server.task).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn stopping_cuts_off_what_does_not_finish() {
    let config = IngestConfig {
        drain_timeout: Duration::from_millis(50),
        ..loopback()
    };
    let fake = Fake::new(Mood::Hangs);
    let mut server = Server::start(config, fake.clone()).await;
    let mut client = Client::greeted(server.url()).await;
    client.batch(1).await;
    until("asked", || fake.calls().len() == 1).await;
    server.stop.cancel();
    time::timeout(PATIENCE, &mut server.task)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    let stage = server.ledger.stage("ingest.stream");
    until("counted", || stage.snapshot().pending() == 0).await;
    assert_eq!(stage.snapshot().skipped["cut_off"], 3);
}

#[tokio::test]
async fn plaintext_is_for_loopback_or_by_flag() {
    let open = IngestConfig::new("0.0.0.0:0".parse().unwrap());
    let error = aggregator::ingest::Ingest::bind(open.clone()).await.unwrap_err();
    assert!(
        matches!(error, IngestError::Plaintext { .. }) && error.to_string().contains("0.0.0.0:0"),
        "{error}"
    );
    aggregator::ingest::Ingest::bind(IngestConfig {
        allow_plaintext: true,
        ..open
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn settings_that_can_not_work_are_named() {
    let zero = Duration::ZERO;
    let cases = [
        (
            "max_message_bytes",
            IngestConfig {
                max_message_bytes: 1 << 20,
                ..loopback()
            },
        ),
        (
            "max_unacked_batches",
            IngestConfig {
                max_unacked_batches: 0,
                ..loopback()
            },
        ),
        (
            "max_inflight_batches",
            IngestConfig {
                max_inflight_batches: 0,
                ..loopback()
            },
        ),
        (
            "max_connections",
            IngestConfig {
                max_connections: 0,
                ..loopback()
            },
        ),
        (
            "first_message_timeout",
            IngestConfig {
                first_message_timeout: zero,
                ..loopback()
            },
        ),
        (
            "idle_timeout",
            IngestConfig {
                idle_timeout: zero,
                ..loopback()
            },
        ),
        (
            "keepalive_interval",
            IngestConfig {
                keepalive_interval: zero,
                ..loopback()
            },
        ),
        (
            "keepalive_timeout",
            IngestConfig {
                keepalive_timeout: zero,
                ..loopback()
            },
        ),
        (
            "retry_after",
            IngestConfig {
                retry_after: zero,
                ..loopback()
            },
        ),
    ];
    for (option, config) in cases {
        let error = config.validate().expect_err(option).to_string();
        assert!(error.contains(option), "`{error}` does not name `{option}`");
    }
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let error = aggregator::ingest::Ingest::bind(IngestConfig::new(address))
        .await
        .unwrap_err();
    assert!(
        matches!(error, IngestError::Bind { .. }) && error.to_string().contains(&address.to_string()),
        "{error}"
    );
}

#[tokio::test]
async fn certificates_that_can_not_be_used_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let pair = rcgen::generate_simple_self_signed(vec!["a.test".to_owned()]).unwrap();
    let other = rcgen::generate_simple_self_signed(vec!["b.test".to_owned()]).unwrap();
    std::fs::write(path("cert"), pair.cert.pem()).unwrap();
    std::fs::write(path("key"), pair.signing_key.serialize_pem()).unwrap();
    std::fs::write(path("other-key"), other.signing_key.serialize_pem()).unwrap();
    std::fs::write(path("empty"), "").unwrap();
    let cases = [
        ("absent", ServerTls::new(path("absent"), path("key"), path("cert"))),
        ("empty", ServerTls::new(path("empty"), path("key"), path("cert"))),
        ("empty", ServerTls::new(path("cert"), path("empty"), path("cert"))),
        ("empty", ServerTls::new(path("cert"), path("key"), path("empty"))),
        ("cert", ServerTls::new(path("cert"), path("other-key"), path("cert"))),
    ];
    for (file, tls) in cases {
        let error = aggregator::ingest::Ingest::bind(IngestConfig {
            tls: Some(tls),
            ..loopback()
        })
        .await
        .unwrap_err();
        assert!(
            matches!(&error, IngestError::Tls { path: named, .. } if *named == path(file)),
            "{file}: {error}"
        );
    }
    let good = ServerTls::new(path("cert"), path("key"), path("cert"));
    aggregator::ingest::Ingest::bind(IngestConfig {
        tls: Some(good),
        ..loopback()
    })
    .await
    .unwrap();
}
