//! The disk queue: bodies that wait for their sink, and the batches they came from.
//!
//! ```text
//! pipeline's committer ─▶ Store::commit (bodies + batch identities + removals, one transaction, one fsync)
//! delivery tasks       ◀─ Store::waiting / Store::body (snapshots; never wait for the writer)
//! ```
//! Storage is one redb file, `queue.redb` (see `docs/adr/0002-disk-queue.md`). Entry: [`Store::open`]. Each sink has a
//! slot; within a slot bodies have ascending numbers and are delivered roughly in that order.

mod meta;
mod open;
mod store;

use std::time::{Instant, SystemTime, UNIX_EPOCH};

pub(crate) use meta::{BodyForm, BodyMeta, PkgIds};
pub use open::OpenError;
pub(crate) use store::{Backlog, Changes, RESERVE_BYTES, Store, StoreError, Waiting};

/// Wall clock at start plus time passed since: a stepped system clock neither expires bodies nor keeps them for ever.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueueClock {
    started: Instant,
    started_unix_ms: u64,
}

// === impl QueueClock ===

impl QueueClock {
    /// Starts from the system clock.
    pub(crate) fn start() -> Self {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            started: Instant::now(),
            started_unix_ms: u64::try_from(unix.as_millis()).unwrap_or(u64::MAX),
        }
    }

    /// Milliseconds since the Unix epoch.
    pub(crate) fn unix_ms(&self) -> u64 {
        let passed = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.started_unix_ms.saturating_add(passed)
    }

    /// Seconds since the Unix epoch.
    pub(crate) fn unix_seconds(&self) -> u64 {
        self.unix_ms() / 1000
    }
}
