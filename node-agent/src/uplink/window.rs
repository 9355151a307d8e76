//! The batches not acknowledged yet: numbered, in order, bounded in count and bytes.
//!
//! Every record that enters is counted in ledger stage `uplink.send` as entered, and as emitted or lost when it leaves.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use parking_lot::Mutex;
use records::{Globals, Measurement, RecordBatch};
use telemetry::Stage;
use tokio::{sync::Notify, time};

use super::{metrics::UplinkMetrics, split::Piece};

/// Times a batch is sent after the aggregator said that it does not understand it. The second time it is another stream
/// with fresh texts; if that does not help, nothing will.
const MAX_REJECTIONS: u8 = 2;
/// Longest wait between attempts while draining, which is short itself.
const DRAIN_RETRY_MAX: Duration = Duration::from_millis(500);

#[derive(Debug)]
pub(super) struct Window {
    state: Mutex<State>,
    max_batches: usize,
    max_bytes: usize,
    pub(super) stage: Stage,
    pub(super) metrics: UplinkMetrics,
    /// Wakes senders: there is room, or the window is closed.
    pub(super) room: Notify,
    /// Wakes the transport: there is a batch to send, or the window is closed.
    pub(super) work: Notify,
    /// Wakes a transport that waits to try again, once: the window was closed.
    closing: Notify,
}

#[derive(Debug)]
struct State {
    /// Tags of the batches to come.
    globals: Arc<Globals>,
    batches: VecDeque<Kept>,
    bytes: usize,
    next_seq: u64,
    /// Highest number handed to a transport.
    sent_seq: u64,
    closed: bool,
}

#[derive(Debug)]
struct Kept {
    seq: u64,
    batch: Arc<RecordBatch>,
    /// Those in force when it was taken.
    globals: Arc<Globals>,
    bytes: usize,
    rejections: u8,
}

/// Why a piece was not taken.
#[derive(Debug)]
pub(super) enum NotTaken {
    /// No room now.
    Full(Piece),
    /// Closed for ever.
    Closed(Piece),
}

/// What is held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unacked {
    /// Batches (messages).
    pub batches: usize,
    /// Records in them.
    pub records: u64,
    /// Memory they hold, bytes.
    pub bytes: usize,
}

impl Window {
    pub(super) fn new(
        globals: Arc<Globals>,
        max_batches: usize,
        max_bytes: usize,
        stage: Stage,
        metrics: UplinkMetrics,
    ) -> Self {
        let state = State {
            globals,
            batches: VecDeque::new(),
            bytes: 0,
            next_seq: 1,
            sent_seq: 0,
            closed: false,
        };
        Self {
            state: Mutex::new(state),
            max_batches,
            max_bytes,
            stage,
            metrics,
            room: Notify::new(),
            work: Notify::new(),
            closing: Notify::new(),
        }
    }

    /// True if [`push`](Self::push) has something to say other than `Full`.
    pub(super) fn has_room_for(&self, piece: &Piece) -> bool {
        let state = self.state.lock();
        state.closed || self.fits(&state, piece)
    }

    /// An empty window takes any piece, so that none is stuck for ever.
    fn fits(&self, state: &State, piece: &Piece) -> bool {
        state.batches.is_empty()
            || state.batches.len() < self.max_batches && state.bytes + piece.bytes <= self.max_bytes
    }

    /// Takes a piece and gives it the next number.
    #[expect(clippy::result_large_err, reason = "the piece comes back whole, to be tried again")]
    pub(super) fn push(&self, piece: Piece) -> Result<(), NotTaken> {
        let mut state = self.state.lock();
        if state.closed {
            return Err(NotTaken::Closed(piece));
        }
        if !self.fits(&state, &piece) {
            return Err(NotTaken::Full(piece));
        }
        let Piece { batch, bytes } = piece;
        self.stage.entered(count(&batch));
        let seq = state.next_seq;
        let globals = Arc::clone(&state.globals);
        state.next_seq += 1;
        state.bytes += bytes;
        state.batches.push_back(Kept {
            seq,
            batch: Arc::new(batch),
            globals,
            bytes,
            rejections: 0,
        });
        self.show(&state);
        drop(state);
        self.work.notify_one();
        Ok(())
    }

    /// Changes the tags of what is taken from now on.
    pub(super) fn set_globals(&self, globals: Arc<Globals>) {
        self.state.lock().globals = globals;
    }

    /// Tags of the first batch after `seq`, if there is one.
    pub(super) fn globals_after(&self, seq: u64) -> Option<Arc<Globals>> {
        let state = self.state.lock();
        let index = state.batches.partition_point(|kept| kept.seq <= seq);
        Some(Arc::clone(&state.batches.get(index)?.globals))
    }

    /// Tags of the first batch held, else of those to come.
    pub(super) fn first_globals(&self) -> Arc<Globals> {
        let state = self.state.lock();
        let first = state.batches.front().map(|kept| &kept.globals);
        Arc::clone(first.unwrap_or(&state.globals))
    }

    /// The first batch after `seq`, to be sent now.
    pub(super) fn after(&self, seq: u64) -> Option<(u64, Arc<RecordBatch>)> {
        let mut state = self.state.lock();
        let index = state.batches.partition_point(|kept| kept.seq <= seq);
        let kept = state.batches.get(index)?;
        let found = (kept.seq, Arc::clone(&kept.batch));
        if found.0 <= state.sent_seq {
            self.metrics.resent_batches.inc();
        }
        state.sent_seq = state.sent_seq.max(found.0);
        Some(found)
    }

    /// Highest number ever handed to a transport.
    pub(super) fn sent_seq(&self) -> u64 {
        self.state.lock().sent_seq
    }

    /// Lets go of every batch up to and including `seq`.
    pub(super) fn ack(&self, seq: u64) {
        let mut state = self.state.lock();
        let mut records = 0;
        while let Some(kept) = state.batches.pop_front_if(|kept| kept.seq <= seq) {
            state.bytes -= kept.bytes;
            records += count(&kept.batch);
        }
        self.stage.emitted(records);
        self.left(state);
    }

    /// The aggregator does not understand batch `seq`. True if the batch was given up.
    pub(super) fn reject(&self, seq: u64) -> bool {
        let mut state = self.state.lock();
        let Ok(index) = state.batches.binary_search_by_key(&seq, |kept| kept.seq) else {
            return false;
        };
        let Some(kept) = state.batches.get_mut(index) else {
            return false;
        };
        kept.rejections += 1;
        if kept.rejections < MAX_REJECTIONS {
            return false;
        }
        self.give_up(state, index, "uplink_rejected");
        true
    }

    /// Takes records of kinds that the aggregator does not know out of batch `seq`. Returns what is left of it.
    pub(super) fn leave_out(&self, seq: u64, kinds: &[Measurement]) -> Option<Arc<RecordBatch>> {
        let mut state = self.state.lock();
        let index = state.batches.binary_search_by_key(&seq, |kept| kept.seq).ok()?;
        let kept = state.batches.get_mut(index)?;
        let unknown: usize = kinds.iter().map(|kind| kept.batch.count(*kind)).sum();
        if unknown > 0 {
            let batch = Arc::make_mut(&mut kept.batch);
            kinds.iter().for_each(|kind| batch.clear(*kind));
            self.stage
                .lost("uplink_unknown_kind", u64::try_from(unknown).unwrap_or(u64::MAX));
        }
        Some(Arc::clone(&kept.batch))
    }

    /// Gives up batch `seq` because no aggregator can take it.
    pub(super) fn unsendable(&self, seq: u64) {
        let state = self.state.lock();
        if let Ok(index) = state.batches.binary_search_by_key(&seq, |kept| kept.seq) {
            self.give_up(state, index, "uplink_unsendable");
        }
    }

    fn give_up(&self, mut state: parking_lot::MutexGuard<'_, State>, index: usize, reason: &'static str) {
        if let Some(kept) = state.batches.remove(index) {
            state.bytes -= kept.bytes;
            self.stage.lost(reason, count(&kept.batch));
        }
        self.left(state);
    }

    /// Takes no more; what is held is still sent.
    pub(super) fn close(&self) {
        self.left({
            let mut state = self.state.lock();
            state.closed = true;
            state
        });
        self.closing.notify_one();
    }

    /// Waits before the next attempt; once the window is closed, little time is left for what is held, and the
    /// aggregator may be back.
    pub(super) async fn pause(&self, wait: Duration) {
        let closed = self.state.lock().closed;
        let wait = if closed { wait.min(DRAIN_RETRY_MAX) } else { wait };
        tokio::select! {
            () = time::sleep(wait) => {}
            () = self.closing.notified() => {}
        }
    }

    /// Takes no more and gives up what is held, for `reason`.
    pub(super) fn abandon(&self, reason: &'static str) -> Unacked {
        let mut state = self.state.lock();
        state.closed = true;
        let held = state.unacked();
        state.batches.clear();
        state.bytes = 0;
        self.stage.lost(reason, held.records);
        self.left(state);
        held
    }

    pub(super) fn unacked(&self) -> Unacked {
        self.state.lock().unacked()
    }

    /// Closed and empty: nothing will ever be sent again.
    pub(super) fn is_finished(&self) -> bool {
        let state = self.state.lock();
        state.closed && state.batches.is_empty()
    }

    fn left(&self, state: parking_lot::MutexGuard<'_, State>) {
        self.show(&state);
        drop(state);
        self.room.notify_waiters();
        self.work.notify_one();
    }

    fn show(&self, state: &State) {
        let int = |size: usize| i64::try_from(size).unwrap_or(i64::MAX);
        self.metrics.unacked_batches.set(int(state.batches.len()));
        self.metrics.unacked_bytes.set(int(state.bytes));
    }
}

impl State {
    fn unacked(&self) -> Unacked {
        let records = self.batches.iter().map(|kept| count(&kept.batch)).sum();
        Unacked {
            batches: self.batches.len(),
            records,
            bytes: self.bytes,
        }
    }
}

/// Records, as the ledger counts.
pub(super) fn count(batch: &RecordBatch) -> u64 {
    u64::try_from(batch.len()).unwrap_or(u64::MAX)
}
