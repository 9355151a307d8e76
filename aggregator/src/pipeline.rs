//! From an accepted batch to the sinks' disk queues.
//!
//! ```text
//! accept (many callers) ─▶ committer (one thread): duplicates? ▶ conversations ▶ encode ▶ compress ▶ room? ▶ one transaction ─▶ answers
//! ```
//! Entry: [`Accept::accept`] of [`Pipeline`]. What waits for the committer is bounded in records; more waits at the door.

pub(crate) mod committer;
pub(crate) mod conversations;
pub(crate) mod dedup;
pub(crate) mod encode;
pub(crate) mod flows;
pub(crate) mod metrics;

use std::sync::{Arc, mpsc};

use records::{Globals, RecordBatch, Str};
use tokio::sync::{Semaphore, oneshot};
use tokio_util::sync::CancellationToken;

use committer::{Command, Request, hand_over};

/// Names one batch for ever: the agent's node, the agent's start, and a number that grows by one from 1.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BatchId {
    /// Node (host) name of the agent.
    pub node: Str,
    /// Random number drawn at agent start.
    pub boot_id: u64,
    /// Sequence number within the boot, from 1.
    pub seq: u64,
}

/// One batch on its way in.
#[derive(Clone, Debug)]
pub struct Delivery {
    /// Identity for de-duplication.
    pub id: BatchId,
    /// Tags common to all records of this agent.
    pub globals: Arc<Globals>,
    /// The records.
    pub batch: RecordBatch,
}

/// What became of an accepted batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accepted {
    /// Stored now.
    Stored,
    /// Stored before under the same [`BatchId`]; dropped.
    Duplicate,
}

/// Why a batch was not accepted. The sender keeps it and tries again later: nothing is lost.
#[derive(Debug, thiserror::Error)]
pub enum AcceptError {
    /// The queue has no room (configured bound or disk full).
    #[error("queue of sink `{sink}` has no room: {why}")]
    Full {
        /// Name of the sink whose queue refused.
        sink: String,
        /// What was measured.
        why: String,
    },
    /// The queue's storage failed.
    #[error("queue storage failed: {0}")]
    Storage(String),
    /// The process is stopping.
    #[error("stopping")]
    Stopping,
}

/// Takes batches; implemented by the aggregator's pipeline and by fakes in tests.
#[async_trait::async_trait]
pub trait Accept: Send + Sync + 'static {
    /// Returns once the batch is safe (on disk, or recognised as a duplicate).
    ///
    /// # Errors
    /// [`AcceptError`]: the caller keeps the batch and retries.
    async fn accept(&self, delivery: Delivery) -> Result<Accepted, AcceptError>;

    /// Highest sequence number of this agent start up to which every batch is safe, 0 if nothing is known. Lets a sender
    /// that reconnects drop what arrived although the acknowledgement did not; 0 is always a correct answer.
    async fn last_contiguous(&self, _node: &str, _boot_id: u64) -> u64 {
        0
    }
}

/// The way in. Made by [`crate::Aggregator::start`].
#[derive(Debug)]
pub struct Pipeline {
    commands: mpsc::SyncSender<Command>,
    room: Arc<Semaphore>,
    max_pending_records: u32,
    stopping: CancellationToken,
}

// === impl Pipeline ===

impl Pipeline {
    pub(crate) fn new(
        commands: mpsc::SyncSender<Command>,
        max_pending_records: usize,
        stopping: CancellationToken,
    ) -> Self {
        let max_pending_records = u32::try_from(max_pending_records).unwrap_or(u32::MAX).max(1);
        let room = Arc::new(Semaphore::new(max_pending_records as usize));
        Self {
            commands,
            room,
            max_pending_records,
            stopping,
        }
    }
}

#[async_trait::async_trait]
impl Accept for Pipeline {
    async fn accept(&self, delivery: Delivery) -> Result<Accepted, AcceptError> {
        // An empty batch costs a place too; one above the bound passes alone.
        let records = u32::try_from(delivery.batch.len())
            .unwrap_or(u32::MAX)
            .clamp(1, self.max_pending_records);
        let room = Arc::clone(&self.room).acquire_many_owned(records);
        let permit = tokio::select! {
            biased;
            () = self.stopping.cancelled() => return Err(AcceptError::Stopping),
            permit = room => permit.map_err(|_| AcceptError::Stopping)?,
        };
        let (reply, answer) = oneshot::channel();
        let request = Request {
            delivery,
            reply,
            permit,
        };
        hand_over(&self.commands, Command::Accept(request))
            .await
            .map_err(|_| AcceptError::Stopping)?;
        answer.await.unwrap_or(Err(AcceptError::Stopping))
    }

    async fn last_contiguous(&self, node: &str, boot_id: u64) -> u64 {
        let (reply, answer) = oneshot::channel();
        let command = Command::LastContiguous((Str::from(node), boot_id), reply);
        if hand_over(&self.commands, command).await.is_err() {
            return 0;
        }
        answer.await.unwrap_or(0)
    }
}
