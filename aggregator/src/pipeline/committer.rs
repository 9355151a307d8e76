//! The committer: one thread that turns waiting batches into one transaction at a time.
//!
//! For each group: recognise duplicates, encode and compress, check every sink's room, write the file sinks, commit bodies
//! and batch identities together, and only then answer the senders. A group that cannot be stored leaves no trace: its
//! identities are forgotten again and its senders told to keep it. Removals of delivered bodies ride along.

use std::{
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use telemetry::Stage;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::{
    AcceptError, Accepted, Delivery,
    dedup::{AgentKey, Dedup, Touched},
    encode::{Encoded, Encoders, Packed},
    metrics::PipelineMetrics,
};
use crate::{
    config::WhenFull,
    queue::{BodyMeta, Changes, PkgIds, QueueClock, RESERVE_BYTES, Store, StoreError},
    route::{Form, Plan},
    sinks::{
        Sink,
        text::{FileSink, Terminal},
    },
};

/// Records in one group; bounds the memory of encoding and the size of a transaction.
const GROUP_RECORDS: usize = 16_384;
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
    /// Index of the sink.
    pub(crate) index: usize,
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
}

/// The committer's state.
pub(crate) struct Committer {
    pub(crate) commands: mpsc::Receiver<Command>,
    pub(crate) store: Arc<Store>,
    pub(crate) sinks: Vec<(Arc<Sink>, Outlet)>,
    pub(crate) plan: Plan,
    pub(crate) dedup: Dedup,
    pub(crate) encoders: Encoders,
    pub(crate) clock: QueueClock,
    pub(crate) pkg_ids: PkgIds,
    pub(crate) linger: Duration,
    pub(crate) min_free_disk: u64,
    pub(crate) accept: Stage,
    pub(crate) metrics: PipelineMetrics,
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

// === impl Committer ===

impl Committer {
    /// Runs until told to stop or nobody is left to ask.
    pub(crate) fn run(mut self) {
        let mut stop = false;
        while !stop {
            let mut requests = Vec::new();
            let mut records = 0;
            let mut deadline = None;
            loop {
                let patience = match deadline {
                    _ if stop || records >= GROUP_RECORDS => Duration::ZERO,
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
            if !requests.is_empty() || !self.upkeep.removals.is_empty() || !self.upkeep.forget.is_empty() {
                self.commit_group(requests);
            }
        }
        self.store.close();
    }

    /// Opens a closed queue file again, and forgets idle agents.
    fn look_after(&mut self) {
        let due = |last: Option<Instant>, period| last.is_none_or(|at| at.elapsed() >= period);
        if !self.store.is_open() && due(self.upkeep.reopened_at, TICK) {
            self.upkeep.reopened_at = Some(Instant::now());
            match self.reopen() {
                Ok(()) => tracing::info!("The queue file is open again"),
                Err(why) => {
                    self.metrics.storage_failures.inc();
                    tracing::warn!(why, "The queue file cannot be opened; batches are refused until it can");
                }
            }
        }
        if due(self.upkeep.expired_at, EXPIRE_EVERY) {
            self.upkeep.expired_at = Some(Instant::now());
            self.upkeep.forget.extend(self.dedup.expire(self.clock.unix_seconds()));
            self.metrics
                .agents
                .set(i64::try_from(self.dedup.len()).unwrap_or(i64::MAX));
            let used = self.store.disk_used();
            if used > COMPACT_ABOVE && self.queued_bytes() < used / 8 {
                match self.store.compact() {
                    Ok(()) => tracing::info!(
                        before = used,
                        after = self.store.disk_used(),
                        "Compacted the queue file"
                    ),
                    Err(error) => tracing::warn!(%error, "The queue file cannot be compacted"),
                }
            }
        }
    }

    fn queued_bytes(&self) -> u64 {
        self.sinks.iter().map(|(sink, _)| sink.backlog().bytes).sum()
    }

    /// Bytes that new bodies may take: free on the disk, or free inside the queue file, which does not shrink at once.
    fn room(&self) -> Option<u64> {
        let inside = self
            .store
            .disk_used()
            .saturating_sub(self.queued_bytes())
            .saturating_sub(RESERVE_BYTES);
        Some(self.store.disk_free()?.saturating_add(inside))
    }

    /// After the disk was full, deleting goes first and alone, in the room of the reserve: it makes more.
    fn delete_first(&mut self) {
        let spare = self.store.disk_free().is_none_or(|free| free >= 2 * RESERVE_BYTES);
        if spare && self.store.keep_reserve() {
            self.upkeep.disk_was_full = false;
        }
        if self.upkeep.disk_was_full && !self.upkeep.removals.is_empty() {
            let _ = self.store_group(&[], &Touched::default());
        }
    }

    fn reopen(&mut self) -> Result<(), String> {
        let anew = self.store.reopen().map_err(|error| error.to_string())?.is_some();
        if anew {
            self.queue_lost();
        }
        self.reload(anew).map_err(|error| {
            self.store.close();
            error.to_string()
        })
    }

    /// The queue file was moved aside.
    fn queue_lost(&self) {
        let lost: u64 = self
            .sinks
            .iter()
            .filter(|(sink, _)| sink.slot.is_some())
            .map(|(sink, _)| sink.forget_stored())
            .sum();
        self.metrics.damaged_files.inc();
        tracing::error!(
            points = lost,
            "The queue file was damaged; the points it held are lost to the sinks"
        );
    }

    /// After opening: what is stored is the truth again. A new file (`anew`) knows no batches; memory still does.
    fn reload(&mut self, anew: bool) -> Result<(), StoreError> {
        if !anew {
            self.dedup = Dedup::new(self.store.agents()?);
        }
        for (sink, _) in &self.sinks {
            if let Some(slot) = sink.slot {
                if anew {
                    self.store.keep_slot(&sink.name, slot)?;
                }
                sink.restore(self.store.backlog(slot)?);
            }
        }
        Ok(())
    }

    fn commit_group(&mut self, requests: Vec<Request>) {
        let started = Instant::now();
        self.delete_first();
        let refused = if requests.is_empty() { Ok(()) } else { self.admit() };
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
        let result = refused.and_then(|()| self.store_group(&fresh, &touched));
        if result.is_err() {
            // The batches stay with their senders, but what was delivered must still be deleted: it makes the room.
            self.dedup.undo(std::mem::take(&mut touched));
            if !self.upkeep.removals.is_empty() && self.store.is_open() {
                let _ = self.store_group(&[], &touched);
            }
        }
        self.metrics.commit(started.elapsed(), waiters.len(), result.is_ok());
        self.answer(waiters, result);
    }

    fn answer(&self, waiters: Vec<Waiter>, result: Result<(), Refusal>) {
        if let Err(refusal) = &result {
            match refusal {
                Refusal::Full { sink, why } => {
                    if let Some(suppressed) = self.metrics.refusal_log.allow() {
                        tracing::warn!(
                            sink,
                            why,
                            suppressed,
                            "No room: batches are refused and stay with the agents"
                        );
                    }
                }
                Refusal::Storage(why) => {
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

    fn store_group(&mut self, fresh: &[Delivery], touched: &Touched) -> Result<(), Refusal> {
        let encoded = if fresh.is_empty() {
            Vec::new()
        } else {
            self.encoders.encode(&self.plan, fresh)
        };
        let mut puts: Vec<(usize, u32, u64, BodyMeta, &[u8])> = Vec::new();
        let mut dropped: Vec<(usize, &'static str, u64)> = Vec::new();
        let mut texts: Vec<(usize, &Encoded)> = Vec::new();
        for ((form, indexes), encoded) in self.plan.forms.iter().zip(&encoded) {
            for &index in indexes {
                let Some((sink, outlet)) = self.sinks.get(index) else {
                    continue;
                };
                dropped.push((index, "too_large", encoded.too_large));
                let Outlet::Queue(slot) = outlet else {
                    texts.push((index, encoded));
                    continue;
                };
                let mut id = sink.backlog().next_id;
                let mut rows = Vec::with_capacity(encoded.bodies.len());
                for body in &encoded.bodies {
                    rows.push((index, *slot, id, self.meta(form, body), body.bytes.as_slice()));
                    id += 1;
                }
                if !rows.is_empty() && sink.is_full(rows.iter().map(|(.., meta, _)| meta.cost()).sum()) {
                    if sink.when_full == WhenFull::Withhold {
                        return Err(full(sink));
                    }
                    dropped.push((
                        index,
                        "queue_full",
                        encoded.bodies.iter().map(|body| u64::from(body.points)).sum(),
                    ));
                    continue;
                }
                puts.append(&mut rows);
            }
        }
        let mut marks = Vec::new();
        for (index, encoded) in &texts {
            if let Some((sink, Outlet::File(file))) = self.sinks.get_mut(*index) {
                match write_file(file, encoded) {
                    Ok(mark) => marks.push((*index, mark)),
                    Err(error) => {
                        let why = format!("`{}` cannot be written: {error}", sink.target);
                        sink.failed("file", &why);
                        if sink.when_full == WhenFull::Withhold {
                            let sink = sink.name.clone();
                            self.take_back(&marks);
                            return Err(Refusal::Full { sink, why });
                        }
                        dropped.push((*index, "file_failed", points_of(encoded)));
                    }
                }
            }
        }
        let changes = Changes {
            put: puts
                .iter()
                .map(|(_, slot, id, meta, body)| (*slot, *id, *meta, *body))
                .collect(),
            remove: self
                .upkeep
                .removals
                .iter()
                .filter_map(|removal| Some((self.sinks.get(removal.index)?.0.slot?, removal.id)))
                .collect(),
            seen: self
                .dedup
                .rows(touched)
                .map(|(key, seen)| (key, seen.to_bytes()))
                .collect(),
            forget: self.upkeep.forget.clone(),
        };
        let removed = match self.store.commit(&changes) {
            Ok(removed) => removed,
            Err(error) => {
                self.take_back(&marks);
                return Err(self.storage_failed(error));
            }
        };
        self.upkeep.forget.clear();
        for (removal, existed) in self.upkeep.removals.drain(..).zip(removed) {
            if let Some((sink, _)) = self.sinks.get(removal.index) {
                sink.release(removal.meta.points);
                if existed {
                    sink.removed(&removal.meta);
                }
            }
        }
        for (index, (sink, _)) in self.sinks.iter().enumerate() {
            let mine: Vec<(u64, BodyMeta)> = puts
                .iter()
                .filter(|(of, ..)| *of == index)
                .map(|(_, _, id, meta, _)| (*id, *meta))
                .collect();
            sink.stored(&mine);
        }
        for (index, reason, points) in dropped {
            if let Some((sink, _)) = self.sinks.get(index) {
                sink.queue.entered(points);
                sink.queue.lost(reason, points);
            }
        }
        for (index, encoded) in texts {
            let Some((sink, outlet)) = self.sinks.get(index) else {
                continue;
            };
            match outlet {
                Outlet::Queue(_) => {}
                Outlet::File(_) if !marks.iter().any(|(marked, _)| *marked == index) => {}
                Outlet::File(_) => {
                    let points = points_of(encoded);
                    sink.deliver.entered(points);
                    sink.deliver.emitted(points);
                    sink.succeeded(points);
                }
                Outlet::Terminal(terminal) => {
                    for body in &encoded.bodies {
                        let points = u64::from(body.points);
                        sink.deliver.entered(points);
                        if !terminal.write(body.bytes.clone(), points) {
                            sink.failed("stdout", "standard output takes nothing; rows are dropped");
                            sink.deliver.lost("stdout_blocked", points);
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn meta(&self, form: &Form, body: &Packed) -> BodyMeta {
        BodyMeta {
            format: form.format,
            gzip: body.gzip,
            points: body.points,
            raw_len: body.raw_len,
            wire_len: u32::try_from(body.bytes.len()).unwrap_or(u32::MAX),
            created_ms: self.clock.unix_ms(),
            pkg: self.pkg_ids.next(self.clock.unix_seconds()),
        }
    }

    fn take_back(&mut self, marks: &[(usize, u64)]) {
        for (index, mark) in marks {
            if let Some((_, Outlet::File(file))) = self.sinks.get_mut(*index) {
                file.take_back(*mark);
            }
        }
    }

    /// The file is closed now and is opened again shortly; a damaged one is put aside at once.
    fn storage_failed(&mut self, error: StoreError) -> Refusal {
        self.metrics.storage_failures.inc();
        let sink = self.sinks.iter().find(|(sink, _)| sink.slot.is_some());
        let sink = sink.map(|(sink, _)| sink.name.clone()).unwrap_or_default();
        match error {
            StoreError::DiskFull(_) => {
                self.upkeep.disk_was_full = true;
                self.store.give_up_reserve();
                self.upkeep.reopened_at = Some(Instant::now());
                if let Err(why) = self.reopen() {
                    tracing::warn!(why, "The queue file cannot be opened after the disk was full");
                }
                Refusal::Full {
                    sink,
                    why: error.to_string(),
                }
            }
            StoreError::Damaged(why) => {
                tracing::error!(why, "The queue file is damaged");
                match self.store.start_anew() {
                    Ok(_) => {
                        self.queue_lost();
                        if let Err(error) = self.reload(true) {
                            self.store.close();
                            tracing::error!(%error, "The new queue file cannot be read");
                        }
                    }
                    Err(error) => tracing::error!(%error, "A new queue file cannot be made"),
                }
                Refusal::Storage(why)
            }
            other => Refusal::Storage(other.to_string()),
        }
    }
}

fn full(sink: &Sink) -> Refusal {
    let held = sink.backlog().bytes;
    Refusal::Full {
        sink: sink.name.clone(),
        why: format!("it holds {held} of {} bytes", sink.max_bytes),
    }
}

fn points_of(encoded: &Encoded) -> u64 {
    encoded.bodies.iter().map(|body| u64::from(body.points)).sum()
}

/// Writes all bodies; returns the length before. On an error the file is as before.
fn write_file(file: &mut FileSink, encoded: &Encoded) -> std::io::Result<u64> {
    let mut text = Vec::with_capacity(encoded.bodies.iter().map(|body| body.bytes.len()).sum());
    for body in &encoded.bodies {
        text.extend_from_slice(&body.bytes);
    }
    file.write(&text)
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
