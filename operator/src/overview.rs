//! What the aggregator knows of its agents and outputs, for the object's status.
//!
//! Data flow: [`fetch`] asks the aggregator over TLS with the operator's certificate, page by page ▶ [`Report`] ▶
//! [`summarize`], a pure function ▶ [`Summary`] ▶ [`crate::status`].

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use api::collector::{FeatureReason, FeatureStatus, SinkStatus};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use proto::v1::{
    FeatureState, NodeOverview, OverviewRequest, SinkOverview, overview_service_client::OverviewServiceClient,
};
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};

use crate::{certificates::Material, names};

/// How long one question with all its pages may take.
pub const TIMEOUT: Duration = Duration::from_secs(5);
/// As many pages as the nodes that an aggregator remembers can fill, and some.
const PAGES_MAX: usize = 100;
/// Reasons told of each feature.
const REASONS_MAX: usize = 3;

/// The aggregator did not tell.
#[derive(Debug, thiserror::Error)]
pub enum OverviewError {
    /// There is no connection.
    #[error("cannot reach the aggregator at {0}: {1}")]
    Connect(String, #[source] tonic::transport::Error),
    /// It refused.
    #[error("the aggregator refused to tell of its nodes: {}", .0.message())]
    Refused(#[source] Box<tonic::Status>),
    /// It took too long.
    #[error("the aggregator did not tell of its nodes within {TIMEOUT:?}")]
    Timeout,
}

/// All pages together.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Start of the aggregator that the totals count from.
    pub boot_id: u64,
    /// The nodes it knows.
    pub nodes: Vec<NodeOverview>,
    /// Its outputs.
    pub sinks: Vec<SinkOverview>,
}

/// Records stored at a time, to make a rate of two.
#[derive(Clone, Copy, Debug)]
pub struct Total {
    at: Timestamp,
    boot_id: u64,
    records: u64,
}

/// What the status tells.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Summary {
    /// Features over all connected nodes, by name.
    pub features: Vec<FeatureStatus>,
    /// Outputs.
    pub sinks: Vec<SinkStatus>,
    /// Records stored per second since the total before, if it is of the same start.
    pub flows_per_second: Option<f64>,
    /// Connected nodes on which a feature is degraded or off.
    pub nodes_degraded: i32,
    /// When an output last accepted records.
    pub last_delivery: Option<Timestamp>,
    /// Connected nodes by the generation of the object that their configuration came from; 0: from no object.
    pub configurations: BTreeMap<i64, i32>,
}

/// Asks the aggregator at `address`, whose certificate must be for `server_name`.
///
/// # Errors
/// [`OverviewError`]; nothing is told in part.
pub async fn fetch(address: SocketAddr, server_name: &str, material: &Material) -> Result<Report, OverviewError> {
    let pages = async {
        let url = format!("https://{address}");
        let connect = |error| OverviewError::Connect(url.clone(), error);
        let tls = ClientTlsConfig::new()
            .domain_name(server_name)
            .ca_certificate(Certificate::from_pem(material.authority.bundle()))
            .identity(Identity::from_pem(
                &material.operator.certificate,
                &material.operator.key,
            ));
        let endpoint = Endpoint::from_shared(url.clone())
            .and_then(|it| it.tls_config(tls))
            .map_err(connect)?;
        let mut client = OverviewServiceClient::new(endpoint.connect().await.map_err(connect)?);
        let mut report = Report::default();
        for _ in 0..PAGES_MAX {
            let after_node = report.nodes.last().map(|node| node.name.clone()).unwrap_or_default();
            let page = client
                .get_overview(OverviewRequest {
                    after_node,
                    max_nodes: 0,
                })
                .await;
            let page = page
                .map_err(|status| OverviewError::Refused(Box::new(status)))?
                .into_inner();
            report.boot_id = page.aggregator_boot_id;
            report.sinks = page.sinks;
            let more = page.more && !page.nodes.is_empty();
            report.nodes.extend(page.nodes);
            if !more {
                break;
            }
        }
        Ok(report)
    };
    tokio::time::timeout(TIMEOUT, pages)
        .await
        .unwrap_or(Err(OverviewError::Timeout))
}

/// Where agents and operator reach the aggregator.
#[must_use]
pub fn endpoint(address: IpAddr) -> SocketAddr {
    SocketAddr::new(address, u16::try_from(names::INGEST_PORT).unwrap_or_default())
}

/// The summary of `report`, taken at `now`, and the total to compare the next one with.
#[must_use]
pub fn summarize(report: &Report, before: Option<Total>, now: Timestamp) -> (Summary, Total) {
    let total = Total {
        at: now,
        boot_id: report.boot_id,
        records: report
            .nodes
            .iter()
            .fold(0, |sum, node| sum.saturating_add(node.records_accepted)),
    };
    let flows_per_second = before
        .filter(|before| before.boot_id == total.boot_id)
        .and_then(|before| {
            let seconds = now.duration_since(before.at).as_secs_f64();
            #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
            let records = total.records.saturating_sub(before.records) as f64;
            (seconds > 0.0).then(|| (records / seconds * 10.0).round() / 10.0)
        });
    let connected = || report.nodes.iter().filter(|node| node.connected);
    let mut features: BTreeMap<&str, (FeatureStatus, BTreeMap<&str, i32>)> = BTreeMap::new();
    for feature in connected().flat_map(|node| &node.features) {
        let (status, reasons) = features.entry(&feature.name).or_default();
        match feature.state() {
            FeatureState::On => status.on += 1,
            FeatureState::Degraded => status.degraded += 1,
            FeatureState::Off | FeatureState::Unspecified => status.off += 1,
        }
        if feature.state() != FeatureState::On {
            *reasons.entry(&feature.reason).or_default() += 1;
        }
    }
    let lacks = |node: &&NodeOverview| node.features.iter().any(|feature| feature.state() != FeatureState::On);
    let summary = Summary {
        features: features
            .into_iter()
            .map(|(name, (status, reasons))| named(name, status, reasons))
            .collect(),
        sinks: report.sinks.iter().map(sink).collect(),
        flows_per_second,
        nodes_degraded: i32::try_from(connected().filter(lacks).count()).unwrap_or(i32::MAX),
        last_delivery: report.sinks.iter().filter_map(delivered).max(),
        configurations: connected().fold(BTreeMap::new(), |mut counts, node| {
            *counts.entry(node.configuration_generation).or_default() += 1;
            counts
        }),
    };
    (summary, total)
}

// === impl Summary ===

impl Summary {
    /// Connected nodes that follow the object and have not taken up its `generation`.
    #[must_use]
    pub fn behind(&self, generation: i64) -> i32 {
        self.configurations
            .range(1..generation.max(1))
            .map(|(_, nodes)| nodes)
            .sum()
    }
}

fn named(name: &str, mut status: FeatureStatus, reasons: BTreeMap<&str, i32>) -> FeatureStatus {
    name.clone_into(&mut status.name);
    let mut reasons: Vec<FeatureReason> = reasons
        .into_iter()
        .map(|(reason, nodes)| FeatureReason {
            reason: reason.to_owned(),
            nodes,
        })
        .collect();
    // Stable: the same counts stay in the order of their words.
    reasons.sort_by_key(|it| std::cmp::Reverse(it.nodes));
    reasons.truncate(REASONS_MAX);
    status.top_reasons = reasons;
    status
}

fn delivered(sink: &SinkOverview) -> Option<Timestamp> {
    Timestamp::from_millisecond(sink.last_delivery_unix_ms?).ok()
}

fn sink(sink: &SinkOverview) -> SinkStatus {
    let error = sink.last_error.as_ref().filter(|_| sink.failing);
    SinkStatus {
        name: sink.name.clone(),
        last_delivery: delivered(sink).map(Time),
        backlog_bytes: i64::try_from(sink.backlog_bytes).ok(),
        backlog_records: i64::try_from(sink.backlog_records).ok(),
        last_error: error.map(|error| format!("{}: {}", error.kind, error.text)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]
    use proto::v1::{
        Feature, SinkError,
        overview_service_server::{OverviewService, OverviewServiceServer},
    };
    use tonic::transport::{Server, ServerTlsConfig, server::TcpIncoming};

    use super::*;
    use crate::certificates::{Existing, Policy};

    fn node(name: &str, records_accepted: u64, state: FeatureState, reason: &str) -> NodeOverview {
        let feature = Feature {
            name: "ebpf-net/tcp".to_owned(),
            state: state.into(),
            reason: reason.to_owned(),
        };
        NodeOverview {
            name: name.to_owned(),
            connected: true,
            features: vec![feature],
            records_accepted,
            ..Default::default()
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn report() -> Report {
        let mut gone = node("d", 5, FeatureState::Off, "gone");
        gone.connected = false;
        Report {
            boot_id: 7,
            nodes: vec![
                node("a", 100, FeatureState::On, ""),
                node("b", 200, FeatureState::Off, "no BTF"),
                node("c", 300, FeatureState::Degraded, "no BTF"),
                gone,
            ],
            sinks: vec![SinkOverview {
                name: "dataway".to_owned(),
                backlog_bytes: 10,
                last_delivery_unix_ms: Some(50_000),
                failing: true,
                last_error: Some(SinkError {
                    kind: "timeout".to_owned(),
                    text: "no answer".to_owned(),
                    unix_ms: 60_000,
                }),
                ..Default::default()
            }],
        }
    }

    #[test]
    fn features_are_counted_over_connected_nodes() {
        let (summary, _) = summarize(&report(), None, at(100));
        let tcp = &summary.features[0];
        assert_eq!((tcp.on, tcp.degraded, tcp.off, summary.nodes_degraded), (1, 1, 1, 2));
        assert_eq!(
            tcp.top_reasons,
            [FeatureReason {
                reason: "no BTF".to_owned(),
                nodes: 2
            }]
        );
        assert_eq!(summary.flows_per_second, None);
    }

    #[test]
    fn an_error_is_told_until_the_output_accepts_records_again() {
        let mut report = report();
        let (summary, _) = summarize(&report, None, at(100));
        assert_eq!(summary.sinks[0].last_error.as_deref(), Some("timeout: no answer"));
        assert_eq!(
            (summary.last_delivery, summary.sinks[0].backlog_bytes),
            (Some(at(50)), Some(10))
        );
        report.sinks[0].failing = false;
        assert_eq!(summarize(&report, None, at(100)).0.sinks[0].last_error, None);
    }

    #[test]
    fn the_rate_is_that_of_one_start() {
        let mut report = report();
        let (_, before) = summarize(&report, None, at(100));
        report.nodes[0].records_accepted += 90;
        assert_eq!(summarize(&report, Some(before), at(160)).0.flows_per_second, Some(1.5));
        report.boot_id = 8;
        assert_eq!(summarize(&report, Some(before), at(160)).0.flows_per_second, None);
    }

    /// An aggregator that tells of one node per page.
    struct OneByOne(Report);

    #[tonic::async_trait]
    impl OverviewService for OneByOne {
        async fn get_overview(
            &self,
            request: tonic::Request<OverviewRequest>,
        ) -> Result<tonic::Response<proto::v1::Overview>, tonic::Status> {
            let after = request.into_inner().after_node;
            let mut rest = self.0.nodes.iter().filter(|node| node.name > after);
            let page = proto::v1::Overview {
                aggregator_boot_id: self.0.boot_id,
                nodes: rest.next().cloned().into_iter().collect(),
                more: rest.next().is_some(),
                sinks: self.0.sinks.clone(),
                ..Default::default()
            };
            Ok(tonic::Response::new(page))
        }
    }

    #[tokio::test]
    async fn all_pages_come_over_tls_and_a_stranger_gets_none() {
        let server_names = names::server_names("cluster", "observe");
        let plan = || Material::plan(Existing::default(), &server_names, &Policy::default(), Timestamp::now()).unwrap();
        let (material, stranger) = (plan(), plan());
        let tls = ServerTlsConfig::new()
            .identity(Identity::from_pem(
                &material.aggregator.certificate,
                &material.aggregator.key,
            ))
            .client_ca_root(Certificate::from_pem(material.authority.bundle()));
        let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = incoming.local_addr().unwrap();
        let server = Server::builder()
            .tls_config(tls)
            .unwrap()
            .add_service(OverviewServiceServer::new(OneByOne(report())))
            .serve_with_incoming(incoming);
        let server = tokio::spawn(server);
        assert_eq!(fetch(address, &server_names[0], &material).await.unwrap(), report());
        assert!(fetch(address, &server_names[0], &stranger).await.is_err());
        let mut posing = material.clone();
        posing.operator = stranger.operator;
        assert!(fetch(address, &server_names[0], &posing).await.is_err());
        assert!(fetch(address, "elsewhere", &material).await.is_err());
        server.abort();
    }
}
