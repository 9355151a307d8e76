//! The uplink against real ingest servers on loopback: nothing lost, nothing twice, whatever dies in between.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    missing_docs,
    unreachable_pub
)]

mod peers;
mod report;
mod support;
mod tags;
mod tls;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use aggregator::ingest::IngestConfig;
use node_agent::uplink::{Backoff, Transport, TrySendError, Uplink, UplinkConfig, UplinkHandle};
use records::{K8sEndpoint, Netflow};
use telemetry::Ledger;
use tokio::time;
use tokio_util::sync::CancellationToken;

use support::{Mood, PATIENCE, Recorder, Server, closed, flows, grpc, loopback, until, uplink};

fn start(config: UplinkConfig) -> (UplinkHandle, Ledger) {
    let ledger = Ledger::default();
    (
        Uplink::start(config, &ledger, CancellationToken::new()).unwrap(),
        ledger,
    )
}

#[tokio::test]
async fn everything_arrives_once_and_both_ledgers_close() {
    let recorder = Recorder::new(Mood::Willing);
    let server = Server::start(loopback(), recorder.clone()).await;
    let config = uplink(grpc(server.address));
    let globals = Arc::clone(&config.globals);
    let (handle, ledger) = start(config);
    for start in (0..50_000).step_by(5_000) {
        time::timeout(PATIENCE, handle.send(flows(start..start + 5_000)))
            .await
            .unwrap();
    }
    assert_eq!(handle.drain(PATIENCE).await.records, 0);
    recorder.assert_exactly(50_000);
    assert_eq!(recorder.globals(), Some(globals));
    assert_eq!(closed(&ledger, "uplink.send"), (50_000, 50_000, 0, 0));
    assert_eq!(closed(&server.ledger, "ingest.stream"), (50_000, 50_000, 0, 0));
    // 5,000 records are three messages.
    assert_eq!(recorder.order(), (1..=30).collect::<Vec<_>>());
}

fn at(address: SocketAddr) -> IngestConfig {
    IngestConfig {
        listen: address,
        ..loopback()
    }
}

#[tokio::test]
async fn a_server_killed_before_it_acknowledges_gets_each_record_once() {
    const ROUNDS: u64 = 6;
    let recorder = Recorder::new(Mood::Willing);
    let mut server = Server::start(loopback(), recorder.clone()).await;
    let address = server.address;
    let (handle, ledger) = start(uplink(grpc(address)));
    for round in 0..ROUNDS {
        // Stored, not acknowledged: the case in which a record could come twice.
        recorder.set(Mood::StoresAndHangs);
        let calls = recorder.calls().len();
        handle.send(flows(round * 3_000..(round + 1) * 3_000)).await;
        until("the server stores", || recorder.calls().len() > calls).await;
        assert!(handle.unacked().records >= 3_000);
        server.kill();
        // Every other time the next server is killed in the same state, with more to send again.
        if round % 2 == 1 {
            recorder.set(Mood::Willing);
        }
        let calls = recorder.calls().len();
        server = Server::start(at(address), recorder.clone()).await;
        until("the server gets them again", || recorder.calls().len() > calls).await;
        if round % 2 == 1 {
            until("all are acknowledged", || handle.unacked().records == 0).await;
        }
    }
    assert_eq!(handle.drain(PATIENCE).await.records, 0);
    recorder.assert_exactly(ROUNDS * 3_000);
    assert_eq!(closed(&ledger, "uplink.send"), (ROUNDS * 3_000, ROUNDS * 3_000, 0, 0));
    assert!(
        recorder.duplicates() >= ROUNDS,
        "only {} came twice: the test shows nothing",
        recorder.duplicates()
    );
    assert!(handle.metrics().resent_batches() >= ROUNDS && handle.metrics().connects() > ROUNDS);
}

#[tokio::test]
async fn a_server_killed_under_load_gets_each_record_once() {
    const RECORDS: u64 = 200_000;
    let recorder = Recorder::new(Mood::Willing);
    let mut server = Server::start(loopback(), recorder.clone()).await;
    let address = server.address;
    let config = UplinkConfig {
        batch_records: 100,
        window_batches: 32,
        ..uplink(grpc(address))
    };
    let (handle, ledger) = start(config);
    let sender = handle.clone();
    let sending = tokio::spawn(async move { sender.send(flows(0..RECORDS)).await });
    for kills in 1..=8 {
        let goal = kills * 150;
        until("some batches came", || recorder.order().len() >= goal).await;
        server.kill();
        server = Server::start(at(address), recorder.clone()).await;
    }
    time::timeout(PATIENCE, sending).await.unwrap().unwrap();
    assert_eq!(handle.drain(PATIENCE).await.records, 0);
    recorder.assert_exactly(RECORDS);
    assert_eq!(closed(&ledger, "uplink.send"), (RECORDS, RECORDS, 0, 0));
    assert!(handle.metrics().connects() >= 2);
}

#[tokio::test]
async fn batches_known_from_before_are_not_sent_again() {
    let recorder = Recorder::new(Mood::StoresAndHangs);
    let server = Server::start(loopback(), recorder.clone()).await;
    let address = server.address;
    let (handle, ledger) = start(UplinkConfig {
        batch_records: 10,
        ..uplink(grpc(address))
    });
    handle.send(flows(0..30)).await;
    until("all are stored", || recorder.order().len() == 3).await;
    assert_eq!(handle.unacked().batches, 3);
    server.kill();
    recorder.tell_what_is_known();
    let _server = Server::start(at(address), recorder.clone()).await;
    assert_eq!(handle.drain(PATIENCE).await.records, 0);
    assert_eq!((recorder.calls().len(), recorder.duplicates()), (3, 0));
    assert_eq!(closed(&ledger, "uplink.send"), (30, 30, 0, 0));
}

#[tokio::test]
async fn batches_are_kept_while_there_is_no_server() {
    let recorder = Recorder::new(Mood::Willing);
    let probe = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = probe.local_addr().unwrap();
    drop(probe);
    let (handle, ledger) = start(uplink(grpc(address)));
    handle.send(flows(0..10)).await;
    until("a few attempts failed", || handle.metrics().connect_failures() > 3).await;
    assert!(!handle.is_connected());
    assert_eq!(handle.unacked().records, 10);
    let config = aggregator::ingest::IngestConfig {
        listen: address,
        ..loopback()
    };
    let _server = Server::start(config, recorder.clone()).await;
    assert_eq!(handle.drain(PATIENCE).await.records, 0);
    recorder.assert_exactly(10);
    assert_eq!(closed(&ledger, "uplink.send"), (10, 10, 0, 0));
}

/// A transport whose next attempt is far away is asked to drain; `heal` makes attempts succeed.
async fn draining_does_not_wait(transport: Transport, heal: impl AsyncFnOnce(), failures: fn(&UplinkHandle) -> u64) {
    let hour = Duration::from_secs(3600);
    let (handle, ledger) = start(UplinkConfig {
        backoff: Backoff { min: hour, max: hour },
        ..uplink(transport)
    });
    handle.send(flows(0..10)).await;
    until("an attempt failed", || failures(&handle) > 0).await;
    heal().await;
    assert_eq!(handle.drain(PATIENCE).await.records, 0);
    assert_eq!(closed(&ledger, "uplink.send"), (10, 10, 0, 0));
}

#[tokio::test]
async fn draining_does_not_wait_for_the_next_attempt_over_grpc() {
    let recorder = Recorder::new(Mood::Willing);
    let probe = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = probe.local_addr().unwrap();
    drop(probe);
    let mut server = None;
    let back = async || server = Some(Server::start(at(address), recorder.clone()).await);
    draining_does_not_wait(grpc(address), back, |handle| handle.metrics().connect_failures()).await;
    recorder.assert_exactly(10);
}

#[tokio::test]
async fn draining_does_not_wait_for_the_next_attempt_locally() {
    let recorder = Recorder::new(Mood::Full);
    let heal = async || recorder.set(Mood::Willing);
    draining_does_not_wait(Transport::Local(recorder.clone()), heal, |handle| {
        handle.metrics().busy()
    })
    .await;
    recorder.assert_exactly(10);
}

/// For both transports: withholds acknowledgements and looks at what is held.
async fn window_is_bounded(transport: Transport, recorder: &Recorder) {
    let config = UplinkConfig {
        window_batches: 4,
        batch_records: 100,
        ..uplink(transport)
    };
    let (handle, ledger) = start(config);
    let sender = handle.clone();
    let mut sending = tokio::spawn(async move { sender.send(flows(0..1_000)).await });
    until("the window is full", || handle.unacked().batches == 4).await;
    assert!(
        time::timeout(Duration::from_millis(200), &mut sending).await.is_err(),
        "send did not wait"
    );
    assert_eq!((handle.unacked().batches, handle.unacked().records), (4, 400));

    let Err(TrySendError::Full(rest)) = handle.try_send(flows(5_000..5_250)) else {
        panic!("window took more")
    };
    assert_eq!(rest, flows(5_000..5_250));
    handle.discard(rest);
    assert_eq!(ledger.stage("uplink.send").snapshot().lost["uplink_window_full"], 250);

    recorder.set(Mood::Willing);
    time::timeout(PATIENCE, sending).await.unwrap().unwrap();
    assert_eq!(handle.drain(PATIENCE).await.records, 0);
    recorder.assert_exactly(1_000);
    assert_eq!(closed(&ledger, "uplink.send"), (1_250, 1_000, 0, 250));
    assert!(handle.metrics().blocked_seconds() > 0.0);
    assert!(matches!(handle.try_send(flows(0..1)), Err(TrySendError::Closed(_))));
}

#[tokio::test]
async fn window_is_bounded_over_grpc() {
    let recorder = Recorder::new(Mood::Hangs);
    let server = Server::start(loopback(), recorder.clone()).await;
    window_is_bounded(grpc(server.address), &recorder).await;
}

#[tokio::test]
async fn window_is_bounded_locally() {
    let recorder = Recorder::new(Mood::Hangs);
    window_is_bounded(Transport::Local(recorder.clone()), &recorder).await;
}

#[tokio::test]
async fn window_is_bounded_in_bytes() {
    let recorder = Recorder::new(Mood::Hangs);
    let max = 4 << 20;
    let transport = Transport::Local(recorder.clone());
    let (handle, _ledger) = start(UplinkConfig {
        window_bytes: max,
        ..uplink(transport)
    });
    let sender = handle.clone();
    let sending = tokio::spawn(async move { sender.send(flows(0..100_000)).await });
    until("the sender waits", || handle.unacked().bytes > max - (1 << 20)).await;
    time::sleep(Duration::from_millis(100)).await;
    assert!(handle.unacked().bytes <= max, "{:?}", handle.unacked());
    let least = usize::try_from(handle.unacked().records).unwrap() * size_of::<Netflow>();
    assert!(
        handle.unacked().bytes >= least,
        "{:?} of at least {least}",
        handle.unacked()
    );
    recorder.set(Mood::Willing);
    time::timeout(PATIENCE, sending).await.unwrap().unwrap();
    assert_eq!(handle.drain(PATIENCE).await.records, 0);
    recorder.assert_exactly(100_000);
}

/// For both transports: refuses for a while.
async fn refusals_are_tried_again(transport: Transport, recorder: &Recorder) {
    let (handle, ledger) = start(UplinkConfig {
        batch_records: 10,
        ..uplink(transport)
    });
    handle.send(flows(0..500)).await;
    until("refused a few times for lack of room", || handle.metrics().busy() >= 3).await;
    recorder.set(Mood::Broken);
    until("refused a few times by storage", || handle.metrics().busy() >= 6).await;
    assert!(recorder.order().is_empty() && handle.unacked().records == 500);
    recorder.set(Mood::Willing);
    assert_eq!(handle.drain(PATIENCE).await.records, 0);
    recorder.assert_exactly(500);
    assert_eq!(closed(&ledger, "uplink.send"), (500, 500, 0, 0));
}

#[tokio::test]
async fn refusals_are_tried_again_over_grpc() {
    let recorder = Recorder::new(Mood::Full);
    let server = Server::start(loopback(), recorder.clone()).await;
    refusals_are_tried_again(grpc(server.address), &recorder).await;
    let (entered, emitted, skipped, lost) = closed(&server.ledger, "ingest.stream");
    assert_eq!((emitted, lost), (500, 0));
    assert_eq!(entered, emitted + skipped);
    let snapshot = server.ledger.stage("ingest.stream").snapshot();
    assert!(
        snapshot.skipped["refused_full"] > 0 && snapshot.skipped["refused_storage"] > 0,
        "{snapshot:?}"
    );
}

#[tokio::test]
async fn refusals_are_tried_again_locally() {
    let recorder = Recorder::new(Mood::Full);
    refusals_are_tried_again(Transport::Local(recorder.clone()), &recorder).await;
}

#[tokio::test]
async fn mood_swings_lose_and_repeat_nothing() {
    let recorder = Recorder::new(Mood::Willing);
    let server = Server::start(loopback(), recorder.clone()).await;
    let (handle, ledger) = start(UplinkConfig {
        batch_records: 20,
        window_batches: 16,
        ..uplink(grpc(server.address))
    });
    let sender = handle.clone();
    let sending = tokio::spawn(async move { sender.send(flows(0..20_000)).await });
    for round in 0..20 {
        recorder.set(if round % 2 == 0 { Mood::Full } else { Mood::Willing });
        time::sleep(Duration::from_millis(3)).await;
    }
    recorder.set(Mood::Willing);
    time::timeout(PATIENCE, sending).await.unwrap().unwrap();
    assert_eq!(handle.drain(PATIENCE).await.records, 0);
    recorder.assert_exactly(20_000);
    assert_eq!(closed(&ledger, "uplink.send"), (20_000, 20_000, 0, 0));
}

#[tokio::test]
async fn a_stopping_server_acknowledges_what_it_has() {
    let recorder = Recorder::new(Mood::Hangs);
    let server = Server::start(loopback(), recorder.clone()).await;
    let (handle, _ledger) = start(UplinkConfig {
        batch_records: 10,
        ..uplink(grpc(server.address))
    });
    handle.send(flows(0..30)).await;
    until("all three batches are with the server", || recorder.calls().len() == 3).await;
    server.stop.cancel();
    recorder.set(Mood::Willing);
    until("acknowledged", || handle.unacked().records == 0).await;
    recorder.assert_exactly(30);
    until("the stream has ended", || !handle.is_connected()).await;
    assert_eq!(handle.metrics().resent_batches(), 0);
}

#[tokio::test]
async fn what_is_not_acknowledged_in_time_is_counted_as_lost() {
    let recorder = Recorder::new(Mood::Hangs);
    let (handle, ledger) = start(uplink(Transport::Local(recorder)));
    handle.send(flows(0..10)).await;
    let held = handle.drain(Duration::from_millis(50)).await;
    assert_eq!((held.batches, held.records), (1, 10));
    assert_eq!(closed(&ledger, "uplink.send"), (10, 0, 0, 10));
    handle.send(flows(10..15)).await;
    assert_eq!(closed(&ledger, "uplink.send"), (15, 0, 0, 15));
    assert_eq!(ledger.stage("uplink.send").snapshot().lost["uplink_closed"], 5);
}

#[tokio::test]
async fn a_send_given_up_is_counted_as_lost() {
    let recorder = Recorder::new(Mood::Hangs);
    let config = UplinkConfig {
        window_batches: 1,
        batch_records: 10,
        ..uplink(Transport::Local(recorder.clone()))
    };
    let (handle, ledger) = start(config);
    assert!(
        time::timeout(Duration::from_millis(50), handle.send(flows(0..35)))
            .await
            .is_err()
    );
    assert_eq!(ledger.stage("uplink.send").snapshot().lost["uplink_send_cancelled"], 25);
    recorder.set(Mood::Willing);
    assert_eq!(handle.drain(PATIENCE).await.records, 0);
    recorder.assert_exactly(10);
    assert_eq!(closed(&ledger, "uplink.send"), (35, 10, 0, 25));
}

#[tokio::test]
async fn long_texts_are_left_out_and_large_records_split_by_size() {
    let recorder = Recorder::new(Mood::Willing);
    let server = Server::start(loopback(), recorder.clone()).await;
    let (handle, ledger) = start(uplink(grpc(server.address)));
    let mut batch = flows(0..200);
    for record in &mut batch.netflow {
        // Each text is new and as long as is allowed: 10 KiB to 16 KiB of texts per record, some MiB in all.
        let pod = format!("{:016384}", record.bytes_read).into();
        record.local_k8s = Some(Arc::new(K8sEndpoint {
            pod,
            ..K8sEndpoint::default()
        }));
    }
    let too_long = Netflow {
        process_name: "x".repeat(16_385).into(),
        ..batch.netflow[0].clone()
    };
    batch.netflow.insert(100, too_long);
    handle.send(batch).await;
    assert_eq!(handle.drain(PATIENCE).await.records, 0);
    recorder.assert_exactly(200);
    assert!(recorder.order().len() >= 4, "{:?}", recorder.order());
    assert_eq!(closed(&ledger, "uplink.send"), (201, 200, 0, 1));
    assert_eq!(ledger.stage("uplink.send").snapshot().lost["uplink_unsendable"], 1);
}

#[tokio::test]
async fn metrics_are_exposed() {
    let recorder = Recorder::new(Mood::Hangs);
    let (handle, _ledger) = start(uplink(Transport::Local(recorder)));
    handle.send(flows(0..10)).await;
    let mut registry = prometheus_client::registry::Registry::default();
    handle.metrics().register(&mut registry);
    until("connected", || handle.is_connected()).await;
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    for line in [
        "connected 1",
        "unacked_batches 1",
        "connects_total 1",
        "blocked_seconds_total 0.0",
        "ack_seconds_count 0",
    ] {
        assert!(text.lines().any(|have| have == line), "no line `{line}` in\n{text}");
    }
}
