//! The committer: one thread that turns waiting batches into one transaction at a time.
//!
//! For each group: recognise duplicates, encode and compress, check every sink's room, write the file sinks, commit bodies
//! and batch identities together, and only then answer the senders. A group that cannot be stored leaves no trace: its
//! identities are forgotten again and its senders told to keep it. Removals of delivered bodies ride along.

mod change;
mod store_group;
mod upkeep;

use std::{
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use records::FlowLog;
use telemetry::{ComponentHandle, Stage};
use tokio::sync::{OwnedSemaphorePermit, oneshot};

pub(crate) use change::Change;

use super::{
    AcceptError, Accepted, Delivery,
    conversations::Conversations,
    dedup::{AgentKey, Dedup, Touched},
    encode::Encoders,
    metrics::PipelineMetrics,
};
use crate::{
    config::WhenFull,
    queue::{BodyMeta, PkgIds, QueueClock, RESERVE_BYTES, Store, StoreError},
    route::Plan,
    sinks::{
        Sink,
        flow_metrics::FlowMetrics,
        text::{FileSink, Terminal},
    },
};

/// Records in one group; bounds the memory of encoding and the size of a transaction.
const GROUP_RECORDS: usize = 16_384;
/// A group of this many records fills a body: it takes what is waiting already, but waits for no more.
const LINGER_RECORDS: usize = 2_048;
/// Commands that may wait. Batches are bounded in records besides.
pub(crate) const COMMANDS: usize = 1024;
/// Pause before another try when too many commands wait.
const FULL_PAUSE: Duration = Duration::from_millis(2);
/// How often an idle committer looks after the queue file.
const TICK: Duration = Duration::from_secs(1);
/// A queue file above this size that is mostly unused is compacted, bytes.
const COMPACT_ABOVE: u64 = 64 << 20;
/// How often idle agent starts are looked for, and a compaction considered.
const EXPIRE_EVERY: Duration = Duration::from_secs(300);

/// What the committer is asked to do.
pub(crate) enum Command {
    /// Store a batch.
    Accept(Request),
    /// Delete a body that is done with.
    Remove(Removal),
    /// Work with other sinks from now on.
    Change(Change),
    /// Tell up to which number all batches of an agent start are stored.
    LastContiguous(AgentKey, oneshot::Sender<u64>),
    /// Store what waits, then end.
    Stop,
}

/// A batch and who waits for it.
pub(crate) struct Request {
    pub(crate) delivery: Delivery,
    pub(crate) reply: oneshot::Sender<Result<Accepted, AcceptError>>,
    pub(crate) permit: OwnedSemaphorePermit,
}

/// A body that was delivered, refused or expired.
pub(crate) struct Removal {
    pub(crate) sink: Arc<Sink>,
    pub(crate) id: u64,
    pub(crate) meta: BodyMeta,
}

/// Where one sink's bodies go.
pub(crate) enum Outlet {
    /// Its slot of the disk queue.
    Queue(u32),
    /// A file.
    File(FileSink),
    /// Standard output.
    Terminal(Terminal),
    /// Metrics made from flow logs.
    Metrics(Arc<FlowMetrics>),
}

/// The committer's state.
pub(crate) struct Committer {
    pub(crate) commands: mpsc::Receiver<Command>,
    pub(crate) store: Arc<Store>,
    pub(crate) sinks: Vec<(Arc<Sink>, Outlet)>,
    /// No longer in use; what their queues hold stays.
    pub(crate) retired: Vec<Arc<Sink>>,
    pub(crate) plan: Plan,
    pub(crate) dedup: Dedup,
    pub(crate) encoders: Encoders,
    /// Conversations of flow logs, if they are followed.
    pub(crate) conversations: Option<Conversations>,
    pub(crate) started: Instant,
    pub(crate) clock: QueueClock,
    pub(crate) pkg_ids: PkgIds,
    pub(crate) linger: Duration,
    pub(crate) min_free_disk: u64,
    pub(crate) accept: Stage,
    pub(crate) metrics: PipelineMetrics,
    pub(crate) health: ComponentHandle,
    pub(crate) upkeep: Upkeep,
}

/// What is carried from group to group.
#[derive(Default)]
pub(crate) struct Upkeep {
    removals: Vec<Removal>,
    forget: Vec<AgentKey>,
    expired_at: Option<Instant>,
    reopened_at: Option<Instant>,
    disk_was_full: bool,
}

/// Who waits for a batch of the group, and what to tell them if it is stored.
struct Waiter {
    reply: oneshot::Sender<Result<Accepted, AcceptError>>,
    stored: Accepted,
    records: u64,
    _permit: OwnedSemaphorePermit,
}

/// Why a group was not stored; cloned to each sender.
#[derive(Clone, Debug)]
enum Refusal {
    Full { sink: String, why: String },
    Storage(String),
}

/// Hands a command over; waits while the committer has too many. The command comes back if it has ended.
pub(crate) async fn hand_over(commands: &mpsc::SyncSender<Command>, command: Command) -> Result<(), Command> {
    let mut command = command;
    loop {
        match commands.try_send(command) {
            Ok(()) => return Ok(()),
            Err(mpsc::TrySendError::Disconnected(back)) => return Err(back),
            Err(mpsc::TrySendError::Full(back)) => command = back,
        }
        tokio::time::sleep(FULL_PAUSE).await;
    }
}

// === impl Committer ===

impl Committer {
    /// Runs until told to stop or nobody is left to ask.
    pub(crate) fn run(mut self) {
        let mut stop = false;
        while !stop {
            let mut requests = Vec::new();
            let mut change = None;
            let mut records = 0;
            let mut deadline = None;
            while change.is_none() {
                let patience = match deadline {
                    _ if stop || records >= LINGER_RECORDS => Duration::ZERO,
                    Some(deadline) => Instant::saturating_duration_since(&deadline, Instant::now()),
                    None => TICK,
                };
                if stop && deadline.is_none() || records >= GROUP_RECORDS {
                    break;
                }
                match self.commands.recv_timeout(patience) {
                    Ok(Command::Accept(request)) => {
                        records += request.delivery.batch.len();
                        requests.push(request);
                    }
                    Ok(Command::Remove(removal)) => self.upkeep.removals.push(removal),
                    Ok(Command::Change(new)) => change = Some(new),
                    Ok(Command::LastContiguous(key, reply)) => {
                        // Only committed numbers are known here: this group's are added below.
                        let _ = reply.send(self.dedup.last_contiguous(&key));
                        continue;
                    }
                    Ok(Command::Stop) | Err(mpsc::RecvTimeoutError::Disconnected) => stop = true,
                    Err(mpsc::RecvTimeoutError::Timeout) => break,
                }
                deadline.get_or_insert_with(|| Instant::now() + self.linger);
            }
            self.look_after();
            if !requests.is_empty()
                || !self.upkeep.removals.is_empty()
                || !self.upkeep.forget.is_empty()
                || self.conversations_are_due()
            {
                self.commit_group(requests);
            }
            if let Some(change) = change {
                self.change(change);
            }
        }
        self.store.close();
    }

    fn commit_group(&mut self, requests: Vec<Request>) {
        let started = Instant::now();
        self.delete_first();
        let told = !requests.is_empty() || self.conversations_are_due();
        let refused = if told { self.admit() } else { Ok(()) };
        let mut touched = Touched::default();
        let mut waiters = Vec::with_capacity(requests.len());
        let mut fresh = Vec::new();
        let now = self.clock.unix_seconds();
        for Request {
            delivery,
            reply,
            permit,
        } in requests
        {
            let records = delivery.batch.len() as u64;
            let new = refused.is_ok() && self.dedup.insert(&delivery.id, now, &mut touched);
            let stored = if new { Accepted::Stored } else { Accepted::Duplicate };
            waiters.push(Waiter {
                reply,
                stored,
                records,
                _permit: permit,
            });
            if new {
                fresh.push(delivery);
            }
        }
        let result = refused.and_then(|()| self.store_told(&fresh, &touched));
        if result.is_err() {
            // The batches stay with their senders, but what was delivered must still be deleted: it makes the room.
            self.dedup.undo(std::mem::take(&mut touched));
            if !self.upkeep.removals.is_empty() && self.store.is_open() {
                let _ = self.store_group(&[], &[], &touched);
            }
        }
        self.metrics.commit(started.elapsed(), waiters.len(), result.is_ok());
        self.answer(waiters, result);
    }

    /// Stores a group, with what is told of conversations in place of its flows if they are followed.
    fn store_told(&mut self, fresh: &[Delivery], touched: &Touched) -> Result<(), Refusal> {
        let now_ms = self.now_ms();
        let Some(conversations) = &mut self.conversations else {
            let flows: Vec<&FlowLog> = fresh.iter().flat_map(|delivery| &delivery.batch.flowlog).collect();
            return self.store_group(fresh, &flows, touched);
        };
        let told = conversations.tell(now_ms, fresh);
        let flows: Vec<&FlowLog> = told.iter().collect();
        let result = self.store_group(fresh, &flows, touched);
        if let Some(conversations) = &mut self.conversations {
            if result.is_err() {
                conversations.take_back();
            }
            self.metrics
                .conversations(conversations.len(), conversations.take_untracked());
        }
        result
    }

    fn conversations_are_due(&self) -> bool {
        let now_ms = self.now_ms();
        self.conversations
            .as_ref()
            .is_some_and(|conversations| conversations.is_due(now_ms))
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn answer(&self, waiters: Vec<Waiter>, result: Result<(), Refusal>) {
        self.report(&result, waiters.is_empty());
        for waiter in waiters {
            let answer = match &result {
                Ok(()) => {
                    self.accept.entered(waiter.records);
                    match waiter.stored {
                        Accepted::Stored => self.accept.emitted(waiter.records),
                        Accepted::Duplicate => self.accept.skipped("duplicate", waiter.records),
                    }
                    Ok(waiter.stored)
                }
                Err(refusal) => {
                    self.metrics.refused(matches!(refusal, Refusal::Full { .. }));
                    Err(refusal.clone().into())
                }
            };
            // Nobody waits any more when the connection is gone; the batch comes again and is a duplicate then.
            let _ = waiter.reply.send(answer);
        }
    }

    fn report(&self, result: &Result<(), Refusal>, deletions_only: bool) {
        match result {
            Ok(()) if deletions_only => {}
            Ok(()) => self.health.set_ok(),
            Err(Refusal::Full { sink, why }) => {
                self.health.set_degraded(format!("no room for sink {sink}: {why}"));
                if let Some(suppressed) = self.metrics.refusal_log.allow() {
                    tracing::warn!(
                        sink,
                        why,
                        suppressed,
                        "No room: batches are refused and stay with the agents"
                    );
                }
            }
            Err(Refusal::Storage(why)) => {
                self.health.set_failed(format!("cannot store: {why}"));
                if let Some(suppressed) = self.metrics.refusal_log.allow() {
                    tracing::error!(
                        why,
                        suppressed,
                        "The queue cannot store: batches are refused and stay with the agents"
                    );
                }
            }
        }
    }

    /// Refuses early what cannot be stored anyway.
    fn admit(&self) -> Result<(), Refusal> {
        if !self.store.is_open() {
            return Err(Refusal::Storage(StoreError::Closed.to_string()));
        }
        let queued = || self.sinks.iter().filter(|(sink, _)| sink.slot.is_some());
        // What the reserve gave free is for deleting.
        let deleting = if self.upkeep.disk_was_full {
            2 * RESERVE_BYTES
        } else {
            0
        };
        let least = self.min_free_disk.max(deleting);
        if let Some(free) = self.room().filter(|free| *free < least) {
            let sink = queued().next().map(|(sink, _)| sink.name.clone()).unwrap_or_default();
            let path = self
                .store
                .path()
                .map(|path| path.display().to_string())
                .unwrap_or_default();
            let why =
                format!("the file system of `{path}` has room for {free} bytes, {least} are to stay free; make room");
            return Err(Refusal::Full { sink, why });
        }
        match queued().find(|(sink, _)| sink.when_full == WhenFull::Withhold && sink.is_full(0)) {
            Some((sink, _)) => Err(full(sink)),
            None => Ok(()),
        }
    }
}

fn full(sink: &Sink) -> Refusal {
    let held = sink.backlog().bytes;
    Refusal::Full {
        sink: sink.name.clone(),
        why: format!("it holds {held} of {} bytes", sink.max_bytes()),
    }
}

// === impl Refusal ===

impl From<Refusal> for AcceptError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Full { sink, why } => Self::Full { sink, why },
            Refusal::Storage(why) => Self::Storage(why),
        }
    }
}
