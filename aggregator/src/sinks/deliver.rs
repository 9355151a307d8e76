//! Takes bodies from one sink's queue to their destination, a few at a time, until each is answered for good.

use std::{
    collections::BTreeSet,
    sync::{Arc, mpsc},
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt, stream::FuturesUnordered};
use parking_lot::Mutex;
use telemetry::LogLimit;
use tokio_util::sync::CancellationToken;

use super::{Sink, dead_letter::DeadLetters, gate::Gate, metrics::SinkMetrics};
use crate::{
    pipeline::committer::{Command, Removal, hand_over},
    queue::{BodyMeta, QueueClock, Store, StoreError, Waiting},
};

/// Pause after the queue file could not be read.
const READ_RETRY: Duration = Duration::from_secs(1);
/// Time that attempts under way are given to end when the task is to make way for another.
const GRACE: Duration = Duration::from_secs(2);

/// One body on its way.
#[derive(Clone, Debug)]
pub(crate) struct QueuedBody {
    pub(crate) id: u64,
    pub(crate) meta: BodyMeta,
    pub(crate) bytes: Bytes,
}

/// Answer to one attempt. Texts hold no secret.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// Taken.
    Delivered,
    /// Not now.
    Retry {
        /// A word of a small fixed set.
        kind: &'static str,
        /// What happened.
        text: String,
        /// Wait at least this long.
        at_least: Option<Duration>,
    },
    /// Never: the destination will not take this body.
    Refused {
        /// HTTP status.
        status: u16,
        /// What the destination said.
        answer: String,
    },
}

/// A destination.
#[async_trait::async_trait]
pub(crate) trait Destination: Send + Sync + 'static {
    /// Tries once.
    async fn attempt(&self, body: &QueuedBody) -> Verdict;
}

#[async_trait::async_trait]
impl Destination for Box<dyn Destination> {
    async fn attempt(&self, body: &QueuedBody) -> Verdict {
        (**self).attempt(body).await
    }
}

/// How a delivery task is told to end.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ending {
    /// Now; bodies under way stay in the queue.
    pub(crate) stop: CancellationToken,
    /// To make way for another task of the same sink: attempts under way may end.
    pub(crate) retire: CancellationToken,
    /// They may not any longer.
    abort: CancellationToken,
}

/// Where one delivery task of a sink ended, and the next begins.
#[derive(Clone, Debug, Default)]
pub(crate) struct Progress {
    /// Numbers below `next` that are still to be delivered.
    left: BTreeSet<u64>,
    /// Nothing from this number on was begun.
    next: u64,
}

/// The delivery task of one sink.
pub(crate) struct Delivery<D> {
    pub(crate) sink: Arc<Sink>,
    pub(crate) store: Arc<Store>,
    pub(crate) commands: mpsc::SyncSender<Command>,
    pub(crate) destination: D,
    pub(crate) dead_letters: Arc<Mutex<DeadLetters>>,
    pub(crate) gate: Gate,
    pub(crate) in_flight: usize,
    pub(crate) max_age: Duration,
    pub(crate) clock: QueueClock,
    pub(crate) metrics: SinkMetrics,
    /// Failures repeat with every try; the log gets some of them, the metrics all.
    pub(crate) failure_log: LogLimit,
}

// === impl Delivery ===

impl<D: Destination> Delivery<D> {
    /// Runs from where the one before ended until it is told to end.
    pub(crate) async fn run(self, mut progress: Progress, ending: Ending) -> Progress {
        let Some(slot) = self.sink.slot else { return progress };
        let mut under_way = FuturesUnordered::new();
        loop {
            let mut pause = None;
            while under_way.len() < self.in_flight && pause.is_none() {
                match self.read(slot, &progress, self.in_flight - under_way.len()).await {
                    Ok(bodies) if bodies.is_empty() => break,
                    Ok(bodies) => {
                        for body in bodies {
                            if !progress.left.remove(&body.id) {
                                progress.next = body.id + 1;
                            }
                            self.sink.claim(body.meta.points);
                            under_way.push(self.carry(body, &ending));
                        }
                    }
                    Err(error) => {
                        tracing::debug!(sink = self.sink.name, %error, "Queue cannot be read now");
                        pause = Some(READ_RETRY);
                    }
                }
            }
            tokio::select! {
                () = ending.stop.cancelled() => return progress,
                () = ending.retire.cancelled() => break,
                Some(left) = under_way.next() => progress.left.extend(left),
                // Wakes also for what was stored while the queue was read: a notification is kept.
                () = self.sink.arrived.notified(), if pause.is_none() => {}
                () = tokio::time::sleep(pause.unwrap_or(READ_RETRY)), if pause.is_some() => {}
            }
        }
        let grace = tokio::time::sleep(GRACE);
        tokio::pin!(grace);
        // To the end of each: a body that was taken is removed, or it would be delivered again.
        while !under_way.is_empty() {
            tokio::select! {
                () = ending.stop.cancelled() => break,
                Some(left) = under_way.next() => progress.left.extend(left),
                () = &mut grace, if !ending.abort.is_cancelled() => ending.abort.cancel(),
            }
        }
        drop(under_way);
        progress
    }

    /// The next bodies; those that were left come first.
    async fn read(&self, slot: u32, progress: &Progress, limit: usize) -> Result<Vec<QueuedBody>, StoreError> {
        let store = Arc::clone(&self.store);
        let (left, next) = (progress.left.clone(), progress.next);
        let read = move || {
            let mut waiting: Vec<Waiting> = Vec::new();
            for id in left.into_iter().take(limit) {
                waiting.extend(
                    store
                        .waiting(slot, id, 1)?
                        .into_iter()
                        .filter(|(found, _)| *found == id),
                );
            }
            if waiting.is_empty() {
                waiting = store.waiting(slot, next, limit)?;
            }
            let mut bodies = Vec::with_capacity(waiting.len());
            for (id, meta) in waiting {
                if let Some(bytes) = store.body(slot, id)? {
                    bodies.push(QueuedBody { id, meta, bytes });
                }
            }
            Ok(bodies)
        };
        tokio::task::spawn_blocking(read)
            .await
            .unwrap_or_else(|error| Err(StoreError::Failed(error.to_string())))
    }

    /// Tries one body until it is delivered, refused or expired. Its number comes back if the task is to end before.
    async fn carry(&self, body: QueuedBody, ending: &Ending) -> Option<u64> {
        let points = u64::from(body.meta.points);
        self.sink.deliver.entered(points);
        loop {
            let age = self.clock.unix_ms().saturating_sub(body.meta.created_ms);
            if u128::from(age) > self.max_age.as_millis() {
                tracing::error!(
                    sink = self.sink.name,
                    points,
                    age_s = age / 1000,
                    "A body is too old; its records are lost"
                );
                self.sink.deliver.skipped("expired_in_queue", points);
                self.sink.queue.lost("expired", points);
                break;
            }
            let Some(round) = ending.retire.run_until_cancelled(self.gate.pass()).await else {
                return self.leave(&body);
            };
            let started = tokio::time::Instant::now();
            let Some(verdict) = ending.abort.run_until_cancelled(self.destination.attempt(&body)).await else {
                return self.leave(&body);
            };
            self.metrics
                .attempt(&self.sink.name, &verdict, &body.meta, started.elapsed());
            match verdict {
                Verdict::Delivered => {
                    self.gate.open();
                    if self.sink.succeeded(points) {
                        tracing::info!(sink = self.sink.name, "Delivery works again");
                    }
                    self.sink.deliver.emitted(points);
                    self.sink.queue.emitted(points);
                    break;
                }
                Verdict::Retry { kind, text, at_least } => {
                    self.sink.failed(kind, &text);
                    let pause = self.gate.shut(round, at_least);
                    if let Some(suppressed) = self.failure_log.allow() {
                        let pause = Duration::from_millis(u64::try_from(pause.as_millis()).unwrap_or(u64::MAX));
                        let retry_in = humantime::format_duration(pause);
                        tracing::warn!(
                            sink = self.sink.name, kind, text, points, %retry_in, suppressed,
                            "Delivery failed; the body stays in the queue"
                        );
                    }
                }
                Verdict::Refused { status, answer } => {
                    self.gate.open();
                    self.sink.failed("refused", &format!("status {status}: {answer}"));
                    self.refuse(status, answer, body.clone()).await;
                    self.sink.deliver.lost("dead_letter", points);
                    self.sink.queue.emitted(points);
                    break;
                }
            }
        }
        // The committer may be gone only when the process stops; the body is then sent again under the same identity.
        let removal = Removal {
            sink: Arc::clone(&self.sink),
            id: body.id,
            meta: body.meta,
        };
        let _ = hand_over(&self.commands, Command::Remove(removal)).await;
        None
    }

    /// The body is for the task that comes after this one.
    fn leave(&self, body: &QueuedBody) -> Option<u64> {
        self.sink.release(body.meta.points);
        self.sink.deliver.skipped("settings_changed", body.meta.points.into());
        Some(body.id)
    }

    async fn refuse(&self, status: u16, answer: String, body: QueuedBody) {
        let letters = Arc::clone(&self.dead_letters);
        let (sink, points) = (self.sink.name.clone(), body.meta.points);
        let unix_ms = self.clock.unix_ms();
        let written = tokio::task::spawn_blocking(move || {
            let mut letters = letters.lock();
            let result = letters.write(unix_ms, status, &answer, &body);
            (answer, letters.path().display().to_string(), result)
        })
        .await;
        match written {
            Ok((answer, path, Ok(dropped))) => {
                self.metrics.dead_letters_dropped(&sink, dropped);
                tracing::error!(
                    sink,
                    status,
                    answer,
                    points,
                    path,
                    dropped,
                    "A body was refused; it is in the dead-letter file"
                );
            }
            Ok((answer, path, Err(error))) => {
                tracing::error!(
                    sink, status, answer, points, path, %error,
                    "A body was refused, and the dead-letter file cannot be written: the records are lost"
                );
            }
            Err(error) => {
                tracing::error!(sink, status, points, %error, "A body was refused, and writing it down failed")
            }
        }
    }
}
