//! From flushed records to an aggregator that has them safe.
//!
//! ```text
//! UplinkHandle::send ▶ split (≤ 2,000 records, ≤ 1 MiB) ▶ window (numbered, bounded, kept until acknowledged)
//!     ▶ grpc (stream, resend after reconnect) │ local (the aggregator in this process)
//! ```
//! Delivery is at least once: a batch leaves the window when it is acknowledged, and is sent again, with the same number,
//! after every reconnect until then. The aggregator drops what it has already.
//!
//! A batch carries the tags that were in force when the window took it. One stream has one set of tags: it ends when the
//! batches of the old tags are acknowledged, and the next one begins with the new.
//!
//! Ledger stage `uplink.send`, in records: entered when the window takes them, emitted when acknowledged, lost with
//! `uplink_window_full` ([`UplinkHandle::discard`]), `uplink_closed`, `uplink_send_cancelled`, `uplink_unsendable` (a text
//! longer than the protocol allows), `uplink_rejected` (refused as malformed by two streams), `uplink_shutdown`.
//!
//! Entry: [`Uplink::start`].

mod config;
mod grpc;
mod local;
mod metrics;
mod report;
mod split;
mod window;

use std::{sync::Arc, time::Duration};

use proto::convert::Hello;
use records::{Globals, RecordBatch};
use telemetry::{Ledger, LogLimit};
use tokio::{
    sync::watch,
    time::{self, Instant},
};
use tokio_util::sync::CancellationToken;

pub use config::{Backoff, ClientTls, GrpcConfig, Transport, UplinkConfig, UplinkError};
pub use metrics::UplinkMetrics;
pub use report::NodeReport;
pub use window::Unacked;

use grpc::Grpc;
use local::Local;
use split::Splitter;
use window::{NotTaken, Window};

/// An aggregator that is away is told about at this pace.
static LOG_LIMIT: LogLimit = LogLimit::new(Duration::from_secs(5));

/// Starts the uplink.
#[derive(Debug)]
pub struct Uplink;

/// Sends through a started uplink. Cheap to clone. The uplink runs until its token is cancelled or it is drained, also
/// when all handles are gone.
#[derive(Clone, Debug)]
pub struct UplinkHandle {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    window: Window,
    report: watch::Sender<NodeReport>,
    stop: CancellationToken,
    batch_records: usize,
    batch_bytes: usize,
}

/// Why records were not taken. They are handed back; nothing of them is in the ledger yet.
#[derive(Debug, thiserror::Error)]
pub enum TrySendError {
    /// The window is full: the aggregator is slow or away.
    #[error("uplink window is full: {} records not taken", .0.len())]
    Full(RecordBatch),
    /// The uplink was drained or stopped.
    #[error("uplink is closed: {} records not taken", .0.len())]
    Closed(RecordBatch),
}

/// Counts the rest of a `send` as lost if the future is dropped in between.
struct Sending<'a> {
    shared: &'a Shared,
    rest: Option<Splitter>,
    /// Handed back by a full window.
    piece: Option<split::Piece>,
}

// === impl Uplink ===

impl Uplink {
    /// Checks the settings and starts sending in the background. Cancelling `stop` ends the uplink at once, and what is
    /// not acknowledged by then is counted as lost: call [`UplinkHandle::drain`] before.
    ///
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`UplinkError`] when a setting can not be used.
    pub fn start(config: UplinkConfig, ledger: &Ledger, stop: CancellationToken) -> Result<UplinkHandle, UplinkError> {
        config.validate()?;
        let UplinkConfig {
            node,
            boot_id,
            agent_version,
            globals,
            transport,
            window_batches,
            window_bytes,
            batch_records,
            batch_bytes,
            backoff,
            ack_timeout,
        } = config;
        let window = Window::new(
            Arc::clone(&globals),
            window_batches,
            window_bytes,
            ledger.stage("uplink.send"),
            UplinkMetrics::default(),
        );
        let shared = Arc::new(Shared {
            window,
            report: watch::Sender::default(),
            stop,
            batch_records,
            batch_bytes,
        });
        let handle = UplinkHandle {
            shared: Arc::clone(&shared),
        };
        tokio::spawn(async move {
            let (window, stop) = (&shared.window, &shared.stop);
            match transport {
                Transport::Grpc(config) => {
                    let hello = Hello {
                        node,
                        boot_id,
                        agent_version,
                        globals,
                    };
                    Grpc {
                        hello,
                        config,
                        backoff,
                        ack_timeout,
                        report: shared.report.subscribe(),
                    }
                    .run(window, stop)
                    .await;
                }
                Transport::Local(accept) => {
                    Local {
                        node,
                        boot_id,
                        accept,
                        backoff,
                    }
                    .run(window, stop)
                    .await;
                }
            }
            let held = window.abandon("uplink_shutdown");
            if held.records > 0 {
                tracing::error!(
                    batches = held.batches,
                    records = held.records,
                    "stopped with unacknowledged batches"
                );
            }
        });
        Ok(handle)
    }
}

// === impl UplinkHandle ===

impl UplinkHandle {
    /// Hands records over, waiting while the window is full. Returns when the window has taken all of them, which is
    /// before they are sent. Records of an uplink that is closed, and the rest of a call whose future is dropped, are
    /// counted as lost.
    pub async fn send(&self, batch: RecordBatch) {
        let shared = &*self.shared;
        let mut sending = Sending {
            shared,
            rest: Some(shared.splitter(batch)),
            piece: None,
        };
        while let Some(piece) = sending.next() {
            match shared.window.push(piece) {
                Ok(()) => {}
                Err(NotTaken::Full(piece)) => {
                    shared.window.metrics.window_full.inc();
                    sending.piece = Some(piece);
                    sending.wait_for_room().await;
                }
                Err(NotTaken::Closed(piece)) => {
                    sending.piece = Some(piece);
                    sending.give_up("uplink_closed");
                    return;
                }
            }
        }
    }

    /// Hands records over without waiting. What does not fit comes back in the error, the first part may have been taken:
    /// the caller keeps the rest, or [`discard`](Self::discard)s it.
    ///
    /// # Errors
    /// [`TrySendError`] holds the records not taken.
    pub fn try_send(&self, batch: RecordBatch) -> Result<(), TrySendError> {
        let shared = &*self.shared;
        let mut rest = shared.splitter(batch);
        while let Some(piece) = rest.next() {
            let (refusal, piece): (fn(RecordBatch) -> TrySendError, _) = match shared.window.push(piece) {
                Ok(()) => continue,
                Err(NotTaken::Full(piece)) => {
                    shared.window.metrics.window_full.inc();
                    (TrySendError::Full, piece)
                }
                Err(NotTaken::Closed(piece)) => (TrySendError::Closed, piece),
            };
            shared.count_unsendable(&mut rest);
            let mut left = piece.batch;
            rest.into_rest().into_iter().for_each(|record| left.push(record));
            return Err(refusal(left));
        }
        shared.count_unsendable(&mut rest);
        Ok(())
    }

    /// Counts records that [`try_send`](Self::try_send) handed back, and that the caller does not keep, as lost for
    /// `uplink_window_full`.
    #[allow(
        clippy::needless_pass_by_value,
        reason = "the records must not be used after they were counted as lost"
    )]
    pub fn discard(&self, batch: RecordBatch) {
        self.shared.lose("uplink_window_full", window::count(&batch));
    }

    /// Takes no more records and waits until all are acknowledged, for `limit` at most; then the uplink ends. Returns
    /// what was given up: counted as lost for `uplink_shutdown`.
    pub async fn drain(&self, limit: Duration) -> Unacked {
        let window = &self.shared.window;
        window.close();
        let deadline = Instant::now() + limit;
        loop {
            let room = window.room.notified();
            tokio::pin!(room);
            room.as_mut().enable();
            if window.is_finished() {
                return Unacked::default();
            }
            if time::timeout_at(deadline, room).await.is_err() {
                let held = window.abandon("uplink_shutdown");
                self.shared.stop.cancel();
                return held;
            }
        }
    }

    /// Changes what the aggregator is told of this node: at once, and again after every reconnect. An aggregator in this
    /// process, or one that does not know of reports, is told nothing.
    pub fn report(&self, change: impl FnOnce(&mut NodeReport)) {
        self.shared.report.send_if_modified(|report| {
            let before = report.clone();
            change(report);
            *report != before
        });
    }

    /// Changes the tags of the records handed over from now on; those that the window holds keep theirs.
    pub fn set_globals(&self, globals: Arc<Globals>) {
        self.shared.window.set_globals(globals);
    }

    /// What waits for its acknowledgement now.
    #[must_use]
    pub fn unacked(&self) -> Unacked {
        self.shared.window.unacked()
    }

    /// True while the aggregator is reached.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.shared.window.metrics.connected.get() == 1
    }

    /// The counters, to be registered.
    #[must_use]
    pub fn metrics(&self) -> &UplinkMetrics {
        &self.shared.window.metrics
    }
}

// === impl Shared ===

impl Shared {
    fn splitter(&self, batch: RecordBatch) -> Splitter {
        Splitter::new(batch, self.batch_records, self.batch_bytes)
    }

    fn lose(&self, reason: &'static str, records: u64) {
        if records > 0 {
            self.window.stage.entered(records);
            self.window.stage.lost(reason, records);
        }
    }

    fn count_unsendable(&self, splitter: &mut Splitter) {
        self.lose("uplink_unsendable", splitter.take_unsendable());
    }
}

// === impl Sending ===

impl Sending<'_> {
    fn next(&mut self) -> Option<split::Piece> {
        if let Some(piece) = self.piece.take() {
            return Some(piece);
        }
        let splitter = self.rest.as_mut()?;
        let piece = splitter.next();
        self.shared.count_unsendable(splitter);
        piece
    }

    /// May return early: the caller looks again.
    async fn wait_for_room(&self) {
        let window = &self.shared.window;
        let since = Instant::now();
        let room = window.room.notified();
        tokio::pin!(room);
        room.as_mut().enable();
        if self.piece.as_ref().is_some_and(|piece| !window.has_room_for(piece)) {
            room.await;
        }
        window.metrics.blocked_seconds.inc_by(since.elapsed().as_secs_f64());
    }

    fn give_up(&mut self, reason: &'static str) {
        let mut records = self.piece.take().map_or(0, |piece| window::count(&piece.batch));
        if let Some(mut splitter) = self.rest.take() {
            self.shared.count_unsendable(&mut splitter);
            records += u64::try_from(splitter.remaining()).unwrap_or(u64::MAX);
        }
        self.shared.lose(reason, records);
    }
}

impl Drop for Sending<'_> {
    fn drop(&mut self) {
        self.give_up("uplink_send_cancelled");
    }
}
