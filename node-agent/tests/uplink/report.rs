//! What the aggregator is told of the node, as its overview shows it.

use node_agent::uplink::NodeReport;
use proto::{
    convert::{Feature, FeatureState},
    v1::{NodeOverview, OverviewRequest, overview_service_client::OverviewServiceClient},
};
use std::{net::SocketAddr, time::Duration};
use tokio::time::{self, Instant};

use crate::{
    start,
    support::{Mood, PATIENCE, Recorder, Server, grpc, loopback, uplink},
};

/// The only node, once it runs `generation`.
async fn node(address: SocketAddr, generation: i64) -> NodeOverview {
    let mut client = OverviewServiceClient::connect(format!("http://{address}"))
        .await
        .unwrap();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut overview = client
            .get_overview(OverviewRequest::default())
            .await
            .unwrap()
            .into_inner();
        if let Some(node) = overview.nodes.pop()
            && node.configuration_generation == generation
        {
            return node;
        }
        assert!(Instant::now() < deadline, "generation {generation} never came");
        time::sleep(Duration::from_millis(5)).await;
    }
}

fn features(reason: &str) -> Vec<Feature> {
    vec![Feature {
        name: "ebpf-net/udp".into(),
        state: FeatureState::Off,
        reason: reason.into(),
    }]
}

#[tokio::test]
async fn reports_reach_the_overview_at_the_start_and_when_they_change_and_after_a_reconnect() {
    let server = Server::start(loopback(), Recorder::new(Mood::Willing)).await;
    let (handle, _ledger) = start(uplink(grpc(server.address)));
    let say = |generation, reason: &'static str| {
        handle.report(|report: &mut NodeReport| {
            report.configuration_generation = generation;
            report.features = features(reason);
        });
    };
    say(1, "first");
    assert_eq!(node(server.address, 1).await.features[0].reason, "first");
    say(2, "second");
    assert_eq!(node(server.address, 2).await.features[0].reason, "second");
    // An aggregator that was started anew knows nothing; it is told without a change.
    let address = server.address;
    server.kill();
    let config = aggregator::ingest::IngestConfig {
        listen: address,
        ..loopback()
    };
    let again = Server::start(config, Recorder::new(Mood::Willing)).await;
    assert_eq!(node(again.address, 2).await.features[0].reason, "second");
}
