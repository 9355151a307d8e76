//! The gRPC service: starts one task per stream and knows which agent start owns which stream.

use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;
use proto::{
    convert::Limits,
    v1::{ClientMessage, ServerMessage, collector_server::Collector},
};
use records::Str;
use telemetry::{Ledger, Stage};
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard, Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::{IngestConfig, IngestMetrics, listen::Peer, nodes::Nodes, stream::Stream};
use crate::pipeline::Accept;

/// What all streams share.
pub(super) struct Shared {
    pub(super) config: IngestConfig,
    pub(super) accept: Arc<dyn Accept>,
    pub(super) stage: Stage,
    pub(super) metrics: IngestMetrics,
    pub(super) nodes: Arc<Nodes>,
    /// Batches waiting to be stored, over all streams.
    pub(super) inflight: Arc<Semaphore>,
    /// Asks streams to finish what they have.
    pub(super) stop: CancellationToken,
    /// Tells streams to end at once.
    pub(super) over: CancellationToken,
    owners: Mutex<HashMap<(Str, u64), Owner>>,
}

/// Implements the generated trait.
#[derive(Clone)]
pub(super) struct CollectorService {
    shared: Arc<Shared>,
}

/// The newest stream of one agent start.
struct Owner {
    superseded: CancellationToken,
    /// Held by the stream that may store; streams of one agent start never store at the same time.
    turn: Arc<AsyncMutex<()>>,
}

/// The right of one stream to store batches of one agent start.
pub(super) struct Claim {
    shared: Arc<Shared>,
    key: (Str, u64),
    /// Cancelled when a newer stream of the same agent start came.
    pub(super) superseded: CancellationToken,
    turn: Option<OwnedMutexGuard<()>>,
}

// === impl CollectorService ===

impl CollectorService {
    pub(super) fn new(
        config: IngestConfig,
        accept: Arc<dyn Accept>,
        ledger: &Ledger,
        nodes: Arc<Nodes>,
        metrics: IngestMetrics,
        stop: CancellationToken,
        over: CancellationToken,
    ) -> Self {
        let inflight = Arc::new(Semaphore::new(config.max_inflight_batches));
        let stage = ledger.stage("ingest.stream");
        let owners = Mutex::default();
        Self {
            shared: Arc::new(Shared {
                config,
                accept,
                stage,
                metrics,
                nodes,
                inflight,
                stop,
                over,
                owners,
            }),
        }
    }
}

#[tonic::async_trait]
impl Collector for CollectorService {
    type StreamStream = ReceiverStream<Result<ServerMessage, Status>>;

    async fn stream(&self, request: Request<Streaming<ClientMessage>>) -> Result<Response<Self::StreamStream>, Status> {
        if self.shared.stop.is_cancelled() {
            return Err(Status::unavailable("the aggregator is stopping"));
        }
        let peer = request.extensions().get::<Peer>().map(|peer| peer.address);
        // Room for every acknowledgement that can be due, the Hello's, and the final status.
        let (out, answers) = mpsc::channel(self.shared.config.max_unacked_batches + 2);
        let stream = Stream::new(Arc::clone(&self.shared), peer, request.into_inner(), out);
        tokio::spawn(stream.run());
        Ok(Response::new(ReceiverStream::new(answers)))
    }
}

// === impl Shared ===

impl Shared {
    pub(super) fn limits(&self) -> Limits {
        Limits {
            max_message_bytes: self.config.max_message_bytes,
            max_unacked_batches: self.config.max_unacked_batches,
            idle_ms: u32::try_from(self.config.idle_timeout.as_millis()).unwrap_or(u32::MAX),
            ..Limits::default()
        }
    }

    /// Makes the caller the stream of this agent start: tells an older stream to end and waits until it has.
    pub(super) async fn claim(self: &Arc<Self>, node: Str, boot_id: u64) -> Claim {
        let key = (node, boot_id);
        let superseded = CancellationToken::new();
        let turn = {
            let mut owners = self.owners.lock();
            let turn = match owners.get(&key) {
                Some(older) => {
                    older.superseded.cancel();
                    Arc::clone(&older.turn)
                }
                None => Arc::default(),
            };
            owners.insert(
                key.clone(),
                Owner {
                    superseded: superseded.clone(),
                    turn: Arc::clone(&turn),
                },
            );
            turn
        };
        // Made before waiting, so that giving up while waiting cleans up too.
        let mut claim = Claim {
            shared: Arc::clone(self),
            key,
            superseded,
            turn: None,
        };
        claim.turn = Some(turn.lock_owned().await);
        claim
    }
}

// === impl Claim ===

impl Drop for Claim {
    fn drop(&mut self) {
        let mut owners = self.shared.owners.lock();
        self.turn = None;
        // Whoever stores or waits for its turn holds the lock's count up; both are taken under the lock on `owners`.
        if owners
            .get(&self.key)
            .is_some_and(|owner| Arc::strong_count(&owner.turn) == 1)
        {
            owners.remove(&self.key);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;
    use crate::pipeline::{AcceptError, Accepted, Delivery};

    struct Never;

    #[tonic::async_trait]
    impl Accept for Never {
        async fn accept(&self, _: Delivery) -> Result<Accepted, AcceptError> {
            Err(AcceptError::Stopping)
        }
    }

    fn shared() -> Arc<Shared> {
        let config = IngestConfig::new("127.0.0.1:0".parse().unwrap());
        let (stop, over) = (CancellationToken::new(), CancellationToken::new());
        let metrics = IngestMetrics::default();
        let nodes = Nodes::new(1, metrics.clone());
        CollectorService::new(config, Arc::new(Never), &Ledger::default(), nodes, metrics, stop, over).shared
    }

    #[tokio::test]
    async fn one_stream_has_the_turn_and_none_leaves_anything_behind() {
        let shared = shared();
        let first = shared.claim("n".into(), 1).await;
        let waiting = shared.claim("n".into(), 1);
        assert!(
            timeout(Duration::from_millis(20), waiting).await.is_err(),
            "two have the turn"
        );
        assert!(first.superseded.is_cancelled());
        // The one that gave up has not opened a second door.
        let waiting = shared.claim("n".into(), 1);
        assert!(
            timeout(Duration::from_millis(20), waiting).await.is_err(),
            "two have the turn"
        );
        let (other, next) = (shared.claim("n".into(), 2).await, shared.claim("n".into(), 1));
        drop(first);
        let next = next.await;
        assert!(!next.superseded.is_cancelled() && !other.superseded.is_cancelled());
        assert_eq!(shared.owners.lock().len(), 2);
        drop((next, other));
        assert!(shared.owners.lock().is_empty());
    }
}
