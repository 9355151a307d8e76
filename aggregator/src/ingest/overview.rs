//! Answers `GetOverview`: the nodes page by page, and the sinks.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use prost::Message as _;
use proto::{
    convert::features_to_wire,
    limits,
    v1::{self, overview_service_server::OverviewService},
};
use tonic::{Request, Response, Status};

use super::nodes::{NodeView, Nodes};
use crate::sinks::SinkStatus;

/// Tells the sinks' states; may block for a disk read.
pub type SinkReport = Arc<dyn Fn() -> Vec<SinkStatus> + Send + Sync>;

/// Implements the generated trait.
pub(super) struct Overviewer {
    pub(super) nodes: Arc<Nodes>,
    pub(super) sinks: SinkReport,
    pub(super) boot_id: u64,
}

#[tonic::async_trait]
impl OverviewService for Overviewer {
    async fn get_overview(&self, request: Request<v1::OverviewRequest>) -> Result<Response<v1::Overview>, Status> {
        let v1::OverviewRequest { after_node, max_nodes } = request.into_inner();
        let max = match usize::try_from(max_nodes) {
            Ok(0) => limits::DEFAULT_OVERVIEW_NODES,
            Ok(max) => max.min(limits::MAX_OVERVIEW_NODES),
            Err(_) => limits::MAX_OVERVIEW_NODES,
        };
        let sinks = Arc::clone(&self.sinks);
        let sinks = tokio::task::spawn_blocking(move || sinks())
            .await
            .map_err(|error| Status::internal(format!("sinks cannot be looked at: {error}")))?;
        let now = SystemTime::now();
        let (page, mut more) = self.nodes.page(&after_node, max);
        let (mut nodes, mut bytes) = (Vec::with_capacity(page.len()), 0);
        for view in page {
            let node = node(view, now);
            bytes += node.encoded_len();
            if bytes > limits::MAX_OVERVIEW_BYTES && !nodes.is_empty() {
                more = true;
                break;
            }
            nodes.push(node);
        }
        let counts = self.nodes.counts();
        let int = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        Ok(Response::new(v1::Overview {
            aggregator_version: env!("CARGO_PKG_VERSION").to_owned(),
            aggregator_boot_id: self.boot_id,
            nodes,
            more,
            nodes_known: int(counts.known),
            nodes_connected: int(counts.connected),
            nodes_forgotten: counts.forgotten,
            sinks: sinks.into_iter().map(sink).collect(),
        }))
    }
}

fn node(view: NodeView, now: SystemTime) -> v1::NodeOverview {
    v1::NodeOverview {
        name: view.name.to_string(),
        agent_version: view.agent_version.to_string(),
        boot_id: view.boot_id,
        connected: view.connected,
        last_seen_unix_ms: unix_ms(now.checked_sub(view.silent).unwrap_or(UNIX_EPOCH)),
        configuration_generation: view.generation,
        features: features_to_wire(&view.features).features,
        records_accepted: view.records,
    }
}

fn sink(status: SinkStatus) -> v1::SinkOverview {
    v1::SinkOverview {
        name: status.name,
        kind: status.kind.to_owned(),
        backlog_bytes: status.backlog_bytes,
        backlog_batches: status.backlog_bodies,
        backlog_records: status.backlog_points,
        oldest_age_ms: status.oldest.map(ms),
        last_delivery_unix_ms: status.last_success.map(unix_ms),
        delivered_records: status.delivered_points,
        failing: status.failing,
        last_error: status.last_error.map(|error| v1::SinkError {
            kind: error.kind.to_owned(),
            text: error.text,
            unix_ms: unix_ms(error.at),
        }),
    }
}

fn ms(age: Duration) -> u64 {
    u64::try_from(age.as_millis()).unwrap_or(u64::MAX)
}

fn unix_ms(at: SystemTime) -> i64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}
