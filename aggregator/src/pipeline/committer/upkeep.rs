//! The committer looks after the queue file: opens it again after a failure, keeps room for deleting, compacts it.

use std::time::Instant;

use super::{COMPACT_ABOVE, Committer, EXPIRE_EVERY, Refusal, TICK};
use crate::{
    pipeline::dedup::{Dedup, Touched},
    queue::{RESERVE_BYTES, StoreError},
};

// === impl Committer ===

impl Committer {
    /// Opens a closed queue file again, and forgets idle agents.
    pub(super) fn look_after(&mut self) {
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

    pub(super) fn queued_bytes(&self) -> u64 {
        self.sinks.iter().map(|(sink, _)| sink.backlog().bytes).sum()
    }

    /// Bytes that new bodies may take: free on the disk, or free inside the queue file, which does not shrink at once.
    pub(super) fn room(&self) -> Option<u64> {
        let inside = self
            .store
            .disk_used()
            .saturating_sub(self.queued_bytes())
            .saturating_sub(RESERVE_BYTES);
        Some(self.store.disk_free()?.saturating_add(inside))
    }

    /// After the disk was full, deleting goes first and alone, in the room of the reserve: it makes more.
    pub(super) fn delete_first(&mut self) {
        let spare = self.store.disk_free().is_none_or(|free| free >= 2 * RESERVE_BYTES);
        if spare && self.store.keep_reserve() {
            self.upkeep.disk_was_full = false;
        }
        if self.upkeep.disk_was_full && !self.upkeep.removals.is_empty() {
            let _ = self.store_group(&[], &[], &Touched::default());
        }
    }

    pub(super) fn reopen(&mut self) -> Result<(), String> {
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
    pub(super) fn queue_lost(&self) {
        let lost: u64 = self.queues().map(|sink| sink.forget_stored()).sum();
        self.metrics.damaged_files.inc();
        tracing::error!(
            points = lost,
            "The queue file was damaged; the points it held are lost to the sinks"
        );
    }

    /// After opening: what is stored is the truth again. A new file (`anew`) knows no batches; memory still does.
    pub(super) fn reload(&mut self, anew: bool) -> Result<(), StoreError> {
        if !anew {
            self.dedup = Dedup::new(self.store.agents()?);
        }
        for sink in self.queues() {
            if let Some(slot) = sink.slot {
                if anew {
                    self.store.keep_slot(&sink.name, slot)?;
                }
                sink.restore(self.store.backlog(slot)?);
            }
        }
        Ok(())
    }

    /// The file is closed now and is opened again shortly; a damaged one is put aside at once.
    pub(super) fn storage_failed(&mut self, error: StoreError) -> Refusal {
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
