//! The names of a cluster's ends, from before the first capture until the agent ends.

use std::{sync::Arc, time::Duration};

use api::AgentConfig;
use records::{Measurement, encode::check};
use telemetry::Telemetry;
use tokio::{sync::watch, time};

use super::Cluster;
use crate::identity::k8s::{self, Labels, Names, Options, Report};

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
    names.want_labels(labels(&cluster.config.borrow()));
    tokio::spawn(feed);
    tokio::spawn(follow_labels(names.clone(), cluster.config.clone()));
    let listed = async {
        while !names.kinds().iter().all(|kind| names.health(*kind).lists > 0) {
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

async fn follow_labels(names: Names, mut config: watch::Receiver<Arc<AgentConfig>>) {
    while config.changed().await.is_ok() {
        names.want_labels(labels(&config.borrow_and_update()));
    }
}

/// The labels that become tags, with the tags' names. A tag that is there already is never replaced by a label.
fn labels(config: &AgentConfig) -> Labels {
    let prefix = config.kubernetes.workload_label_prefix.as_deref().unwrap_or_default();
    let mut labels: Vec<(String, String)> = Vec::new();
    for label in config
        .kubernetes
        .workload_labels
        .iter()
        .filter(|label| !label.is_empty())
    {
        let tag = format!("{prefix}{label}");
        let key = check::clean_key(&tag);
        let mut columns = Measurement::ALL.into_iter().flat_map(Measurement::columns);
        let column = columns.any(|column| column.name == key);
        let taken = column || key == "host" || key == "service" || config.tags.contains_key(&*key);
        if taken || labels.iter().any(|(_, other)| check::clean_key(other) == key) {
            tracing::warn!(label, %key, "A label is left out: there is a tag of this name; choose another workload_label_prefix");
        } else {
            labels.push((label.clone(), tag));
        }
    }
    labels.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_do_not_take_the_names_of_other_tags() {
        let mut config = AgentConfig::default();
        let names = [
            "app",
            "pid",
            "site",
            "app.kubernetes.io/name",
            "app_kubernetes_io/name",
            "host",
            "",
        ];
        config.kubernetes.workload_labels = names.map(str::to_owned).into();
        config.tags.insert("site".to_owned(), "berlin".to_owned());
        let tags = |config: &AgentConfig| labels(config).iter().map(|(_, tag)| tag.clone()).collect::<Vec<_>>();
        assert_eq!(tags(&config), ["app", "app.kubernetes.io/name"]);
        config.kubernetes.workload_label_prefix = Some("label_".to_owned());
        let all = [
            "label_app",
            "label_pid",
            "label_site",
            "label_app.kubernetes.io/name",
            "label_host",
        ];
        assert_eq!(tags(&config), all);
    }
}
