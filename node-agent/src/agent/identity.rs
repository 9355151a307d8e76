//! The names of a cluster's ends, from before the first capture until the agent ends.

use std::time::Duration;

use telemetry::Telemetry;
use tokio::time;

use super::Cluster;
use crate::identity::k8s::{self, Kind, Names, Options, Report};

/// Objects per page of a list.
const PAGE: u32 = 500;
/// Longest wait for the first lists: captures should not start without, but must without an API server.
const PATIENCE: Duration = Duration::from_secs(10);
/// Pause between looks whether the first lists are there.
const LOOK: Duration = Duration::from_millis(20);
/// How often metrics and health are brought up to date.
const REPORT: Duration = Duration::from_secs(5);

/// Starts to follow the cluster's objects and this node's cgroups, and waits until the first lists are there, or for 10 s.
pub(super) async fn start(cluster: &Cluster, telemetry: &Telemetry) -> Names {
    let options = {
        let config = cluster.config.borrow();
        Options {
            node: cluster.node.clone(),
            host_root: config.identity.host_root.clone(),
            proc: config.identity.proc_dir(),
            page_size: PAGE,
        }
    };
    let (names, feed) = k8s::names(cluster.client.clone(), &options);
    tokio::spawn(feed);
    let listed = async {
        while !Kind::ALL.iter().all(|kind| names.health(*kind).lists > 0) {
            time::sleep(LOOK).await;
        }
    };
    if time::timeout(PATIENCE, listed).await.is_err() {
        tracing::warn!("The Kubernetes API has not listed all objects yet; ends are without names until it has");
    }
    let report = Report::new(names.clone(), telemetry);
    tokio::spawn(async move {
        let mut ticks = time::interval(REPORT);
        loop {
            ticks.tick().await;
            report.update();
        }
    });
    names
}
