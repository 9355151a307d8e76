//! `GetOverview` over gRPC, while agents come, speak and go.

use std::sync::Arc;

use aggregator::{
    ingest::{Ingest, SinkReport},
    sinks::{SinkError, SinkStatus},
};
use proto::v1::{
    self, FeatureState, client_message::Kind, overview_service_client::OverviewServiceClient, server_message,
};
use telemetry::Ledger;
use tokio_util::sync::CancellationToken;
use tonic::Code;

use crate::support::{Client, Fake, Mood, Server, hello, loopback};

async fn overview(url: &str, after_node: &str, max_nodes: u32) -> v1::Overview {
    let request = v1::OverviewRequest {
        after_node: after_node.to_owned(),
        max_nodes,
    };
    let mut client = OverviewServiceClient::connect(url.to_owned()).await.unwrap();
    client.get_overview(request).await.unwrap().into_inner()
}

fn feature(name: &str, state: FeatureState, reason: &str) -> v1::Feature {
    v1::Feature {
        name: name.to_owned(),
        state: state.into(),
        reason: reason.to_owned(),
    }
}

async fn greeted_as(url: String, node: &str, boot_id: u64) -> Client {
    let mut client = Client::connect(url).await;
    let hello = v1::Hello {
        node: node.to_owned(),
        boot_id,
        ..hello()
    };
    client.say(Kind::Hello(hello)).await;
    let answer = client.hear().await.unwrap();
    assert!(
        matches!(&answer, server_message::Kind::HelloAck(ack) if ack.takes_node_reports),
        "{answer:?}"
    );
    client
}

/// The only node, once `holds` of it.
async fn node_when(url: &str, what: &str, holds: impl Fn(&v1::NodeOverview) -> bool) -> v1::NodeOverview {
    for _ in 0..1_000 {
        let mut overview = overview(url, "", 0).await;
        assert_eq!(overview.nodes.len(), 1);
        let node = overview.nodes.remove(0);
        if holds(&node) {
            return node;
        }
    }
    panic!("never came true: {what}");
}

#[tokio::test]
async fn a_node_is_shown_with_what_it_said_last_and_after_it_left() {
    let server = Server::start(loopback(), Fake::new(Mood::Willing)).await;
    let url = server.url();
    assert!(overview(&url, "", 0).await.nodes.is_empty());
    let mut client = greeted_as(url.clone(), "n1", 7).await;
    let vector = |features| Kind::Capabilities(v1::Capabilities { features });
    client
        .say(vector(vec![feature("ebpf-net/tcp", FeatureState::On, "")]))
        .await;
    let last = vec![
        feature("ebpf-net/tcp", FeatureState::Degraded, "no fentry"),
        feature("ebpf-net/udp", FeatureState::Off, "cgroup v2 is not mounted"),
    ];
    client.say(vector(last.clone())).await;
    client
        .say(Kind::AgentStatus(v1::AgentStatus {
            configuration_generation: 12,
        }))
        .await;
    client.batch(1).await;
    client.expect_ack(1).await;
    let before = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    let node = node_when(&url, "stored", |node| node.records_accepted == 3).await;
    assert_eq!(node.features, last);
    assert_eq!(
        (
            node.name.as_str(),
            node.agent_version.as_str(),
            node.boot_id,
            node.connected
        ),
        ("n1", "0.1.0", 7, true)
    );
    assert_eq!(node.configuration_generation, 12);
    let ago = i64::try_from(before.as_millis()).unwrap() - node.last_seen_unix_ms;
    assert!((-60_000..60_000).contains(&ago), "last seen {ago} ms ago");
    drop(client);
    let left = node_when(&url, "left", |node| !node.connected).await;
    assert_eq!((left.features, left.records_accepted), (last, 3));
    let overview = overview(&url, "", 0).await;
    assert_eq!(
        (overview.nodes_known, overview.nodes_connected, overview.more),
        (1, 0, false)
    );
    assert_ne!(overview.aggregator_boot_id, 0);
    // The agent was started anew: what its last start said does not hold any more, what was stored does.
    let mut again = greeted_as(url.clone(), "n1", 8).await;
    again.batch(1).await;
    again.expect_ack(1).await;
    let node = node_when(&url, "stored", |node| node.records_accepted == 6).await;
    assert!(node.connected && node.features.is_empty());
    assert_eq!((node.boot_id, node.configuration_generation), (8, 0));
}

#[tokio::test]
async fn pages_hold_every_node_once() {
    let server = Server::start(loopback(), Fake::new(Mood::Willing)).await;
    let url = server.url();
    let mut clients = Vec::new();
    for name in ["c", "e", "a", "d", "b"] {
        clients.push(greeted_as(url.clone(), name, 1).await);
    }
    let (mut names, mut pages, mut after) = (Vec::new(), 0, String::new());
    loop {
        let page = overview(&url, &after, 2).await;
        assert_eq!((page.nodes_known, page.nodes_connected), (5, 5));
        names.extend(page.nodes.into_iter().map(|node| node.name));
        pages += 1;
        after = names.last().unwrap().clone();
        if !page.more {
            break;
        }
    }
    assert_eq!((names.concat().as_str(), pages), ("abcde", 3));
}

#[tokio::test]
async fn a_vector_beyond_the_limits_ends_the_stream_and_is_named() {
    let server = Server::start(loopback(), Fake::new(Mood::Willing)).await;
    let mut client = greeted_as(server.url(), "n1", 7).await;
    let features = vec![feature("a", FeatureState::On, &"x".repeat(513))];
    client.say(Kind::Capabilities(v1::Capabilities { features })).await;
    let status = client.end().await;
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(
        status.message().starts_with("capabilities.features.reason: 513 bytes"),
        "{status:?}"
    );
    assert_eq!(server.metrics.malformed_of("capabilities"), 1);
}

#[tokio::test]
async fn sinks_are_shown_as_they_report() {
    let at = std::time::UNIX_EPOCH + std::time::Duration::from_millis(1_700_000_000_123);
    let status = SinkStatus {
        name: "dataway".into(),
        kind: "dataway",
        target: "https://openway.example".into(),
        backlog_bodies: 2,
        backlog_points: 30,
        backlog_bytes: 400,
        oldest: Some(std::time::Duration::from_millis(5_500)),
        delivered_points: 6,
        last_success: Some(at),
        last_error: Some(SinkError {
            kind: "timeout",
            text: "no answer within 30s".into(),
            at,
        }),
        failing: true,
    };
    let report: SinkReport = Arc::new(move || vec![status.clone()]);
    let ingest = Ingest::bind(loopback()).await.unwrap().with_sinks(report);
    let (url, stop) = (format!("http://{}", ingest.local_addr()), CancellationToken::new());
    let serving = tokio::spawn(ingest.serve(Fake::new(Mood::Willing), Ledger::default(), stop.clone()));
    let expected = v1::SinkOverview {
        name: "dataway".into(),
        kind: "dataway".into(),
        backlog_bytes: 400,
        backlog_batches: 2,
        backlog_records: 30,
        oldest_age_ms: Some(5_500),
        last_delivery_unix_ms: Some(1_700_000_000_123),
        delivered_records: 6,
        failing: true,
        last_error: Some(v1::SinkError {
            kind: "timeout".into(),
            text: "no answer within 30s".into(),
            unix_ms: 1_700_000_000_123,
        }),
    };
    assert_eq!(overview(&url, "", 0).await.sinks, [expected]);
    stop.cancel();
    serving.await.unwrap().unwrap();
}
