//! Tags that change while records are on their way.

use node_agent::uplink::Transport;
use tokio::time;

use super::{
    at, start,
    support::{Mood, PATIENCE, Recorder, Server, closed, flows, grpc, loopback, until, uplink, zone},
};

#[tokio::test]
async fn each_record_carries_the_tags_of_its_time() {
    const ROUNDS: u64 = 6;
    let recorder = Recorder::new(Mood::Willing);
    let server = Server::start(loopback(), recorder.clone()).await;
    let (handle, ledger) = start(uplink(grpc(server.address)));
    let zones = |round: u64| if round.is_multiple_of(2) { "a" } else { "b" };
    for round in 0..ROUNDS {
        handle.set_globals(zone(zones(round)));
        time::timeout(PATIENCE, handle.send(flows(round * 7_000..(round + 1) * 7_000)))
            .await
            .unwrap();
    }
    assert_eq!(handle.drain(PATIENCE).await.records, 0);
    recorder.assert_exactly(ROUNDS * 7_000);
    for round in 0..ROUNDS {
        recorder.assert_zone(round * 7_000..(round + 1) * 7_000, zones(round));
    }
    let all = ROUNDS * 7_000;
    assert_eq!(closed(&ledger, "uplink.send"), (all, all, 0, 0));
    assert_eq!(recorder.duplicates(), 0);
    assert!(
        handle.metrics().connect_failures() == 0,
        "a change of tags counted as a failure"
    );
}

#[tokio::test]
async fn the_same_tags_anew_change_nothing() {
    let recorder = Recorder::new(Mood::Willing);
    let server = Server::start(loopback(), recorder.clone()).await;
    let (handle, _) = start(uplink(grpc(server.address)));
    for round in 0..5 {
        handle.set_globals(zone("z"));
        handle.send(flows(round * 10..(round + 1) * 10)).await;
        until("it is stored", || handle.unacked().records == 0).await;
    }
    assert_eq!(handle.metrics().connects(), 1);
}

#[tokio::test]
async fn batches_held_through_an_outage_keep_their_tags() {
    // Refused, then killed with a stored batch whose acknowledgement did not arrive.
    let recorder = Recorder::new(Mood::Full);
    let server = Server::start(loopback(), recorder.clone()).await;
    let address = server.address;
    let (handle, ledger) = start(uplink(grpc(address)));
    handle.set_globals(zone("old"));
    handle.send(flows(0..5_000)).await;
    until("the server refuses", || !recorder.calls().is_empty()).await;
    handle.set_globals(zone("new"));
    handle.send(flows(5_000..9_000)).await;
    recorder.set(Mood::StoresAndHangs);
    until("the server stores", || !recorder.order().is_empty()).await;
    server.kill();
    handle.set_globals(zone("newest"));
    handle.send(flows(9_000..10_000)).await;
    recorder.set(Mood::Willing);
    let _server = Server::start(at(address), recorder.clone()).await;
    assert_eq!(handle.drain(PATIENCE).await.records, 0);
    recorder.assert_exactly(10_000);
    recorder.assert_zone(0..5_000, "old");
    recorder.assert_zone(5_000..9_000, "new");
    recorder.assert_zone(9_000..10_000, "newest");
    assert_eq!(closed(&ledger, "uplink.send"), (10_000, 10_000, 0, 0));
}

#[tokio::test]
async fn an_aggregator_in_this_process_gets_them_too() {
    let recorder = Recorder::new(Mood::Hangs);
    let (handle, ledger) = start(uplink(Transport::Local(recorder.clone())));
    handle.send(flows(0..10)).await;
    handle.set_globals(zone("new"));
    handle.send(flows(10..20)).await;
    recorder.set(Mood::Willing);
    assert_eq!(handle.drain(PATIENCE).await.records, 0);
    recorder.assert_zone(0..10, "z");
    recorder.assert_zone(10..20, "new");
    assert_eq!(closed(&ledger, "uplink.send"), (20, 20, 0, 0));
}
