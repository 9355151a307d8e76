//! From an accepted batch to the sinks' disk queues.

use std::sync::Arc;

use records::{Globals, RecordBatch, Str};

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
