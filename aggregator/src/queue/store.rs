//! The queue file: tables, transactions, and what happens when the file or its disk fails.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use parking_lot::RwLock;
use records::Str;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, backends::InMemoryBackend};

use super::{
    BodyMeta, OpenError,
    open::{OpenFailure, allocate, free_bytes, move_aside, open_file, prepared},
};
use crate::pipeline::dedup::{AgentKey, Seen};

/// (slot, body number) → bytes as sent.
pub(super) const BODIES: TableDefinition<(u32, u64), &[u8]> = TableDefinition::new("bodies");
/// (slot, body number) → [`BodyMeta`].
pub(super) const METAS: TableDefinition<(u32, u64), &[u8]> = TableDefinition::new("metas");
/// (node, boot id) → [`Seen`].
pub(super) const AGENTS: TableDefinition<(&str, u64), &[u8]> = TableDefinition::new("agents");
/// Sink name → slot.
pub(super) const SINKS: TableDefinition<&str, u32> = TableDefinition::new("sinks");

pub(super) const FILE_NAME: &str = "queue.redb";
/// Room for deleting on a full disk: the storage writes changed pages to new places, also when it deletes.
const RESERVE_NAME: &str = "queue.reserve";
/// Size of the reserve, bytes.
pub(crate) const RESERVE_BYTES: u64 = 1 << 20;

/// A transaction or a read failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    /// The disk has no room.
    #[error("no space left for `{0}`")]
    DiskFull(String),
    /// The file is damaged.
    #[error("queue file is damaged: {0}")]
    Damaged(String),
    /// Everything else.
    #[error("{0}")]
    Failed(String),
    /// An earlier failure closed the file; it is opened again shortly.
    #[error("the queue file is closed after an earlier failure")]
    Closed,
}

/// One transaction.
#[derive(Debug, Default)]
pub(crate) struct Changes<'a> {
    /// New bodies.
    pub(crate) put: Vec<(u32, u64, BodyMeta, &'a [u8])>,
    /// Bodies that are done with.
    pub(crate) remove: Vec<(u32, u64)>,
    /// Batch identities.
    pub(crate) seen: Vec<(&'a AgentKey, Vec<u8>)>,
    /// Agent starts to forget.
    pub(crate) forget: Vec<AgentKey>,
}

/// One body's place and meta.
pub(crate) type Waiting = (u64, BodyMeta);

/// What one sink has in the queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Backlog {
    /// Bodies.
    pub(crate) bodies: u64,
    /// Points in them.
    pub(crate) points: u64,
    /// Bytes on disk, see [`BodyMeta::cost`].
    pub(crate) bytes: u64,
    /// Number for the next body.
    pub(crate) next_id: u64,
}

/// The queue file.
#[derive(Debug)]
pub(crate) struct Store {
    /// `None`: in memory.
    path: Option<PathBuf>,
    db: RwLock<Option<Arc<Database>>>,
}

// === impl Store ===

impl Store {
    /// Opens or creates the queue in `dir`, or in memory. A damaged file is moved aside; its new path is returned too.
    ///
    /// # Errors
    /// [`OpenError`].
    pub(crate) fn open(dir: Option<&Path>) -> Result<(Self, Option<PathBuf>), OpenError> {
        let path = match dir {
            None => None,
            Some(dir) => {
                fs::create_dir_all(dir).map_err(|source| OpenError::Unusable {
                    path: dir.to_owned(),
                    source,
                })?;
                Some(dir.join(FILE_NAME))
            }
        };
        let store = Self {
            path,
            db: RwLock::new(None),
        };
        let aside = store.reopen()?;
        Ok((store, aside))
    }

    /// Opens the file again after a failure; moves a damaged one aside.
    pub(crate) fn reopen(&self) -> Result<Option<PathBuf>, OpenError> {
        *self.db.write() = None;
        let mut aside = None;
        let db = match &self.path {
            None => Database::builder()
                .create_with_backend(InMemoryBackend::new())
                .and_then(prepared)
                .map_err(|error| OpenError::Unusable {
                    path: PathBuf::from("(memory)"),
                    source: io::Error::other(error),
                })?,
            Some(path) => match open_file(path) {
                Ok(db) => db,
                Err(OpenFailure::Refused(error)) => return Err(error),
                Err(OpenFailure::Damaged(why)) => {
                    let moved = move_aside(path).map_err(|source| OpenError::Unusable {
                        path: path.clone(),
                        source,
                    })?;
                    tracing::error!(
                        path = %path.display(), moved_to = %moved.display(), why,
                        "The queue file is damaged; it was moved aside and a new one started. What it held is lost to the sinks"
                    );
                    aside = Some(moved);
                    match open_file(path) {
                        Ok(db) => db,
                        Err(OpenFailure::Refused(error)) => return Err(error),
                        Err(OpenFailure::Damaged(why)) => {
                            return Err(OpenError::Unusable {
                                path: path.clone(),
                                source: io::Error::other(why),
                            });
                        }
                    }
                }
            },
        };
        *self.db.write() = Some(Arc::new(db));
        Ok(aside)
    }

    /// Closes the file until [`Self::reopen`].
    pub(crate) fn close(&self) {
        *self.db.write() = None;
    }

    /// True while the file is open.
    pub(crate) fn is_open(&self) -> bool {
        self.db.read().is_some()
    }

    /// Puts a file that proved damaged aside and starts a new one.
    pub(crate) fn start_anew(&self) -> Result<Option<PathBuf>, OpenError> {
        self.close();
        let moved = match &self.path {
            Some(path) => Some(move_aside(path).map_err(|source| OpenError::Unusable {
                path: path.clone(),
                source,
            })?),
            None => None,
        };
        Ok(self.reopen()?.or(moved))
    }

    /// Free bytes on the queue's file system that an unprivileged process may use; `None` in memory.
    pub(crate) fn disk_free(&self) -> Option<u64> {
        let dir = self.path.as_ref()?.parent()?;
        free_bytes(dir).ok()
    }

    /// Bytes of disk that the queue file takes; 0 in memory.
    pub(crate) fn disk_used(&self) -> u64 {
        use std::os::unix::fs::MetadataExt as _;
        let used = self.path.as_ref().and_then(|path| fs::metadata(path).ok());
        used.map_or(0, |file| file.blocks() * 512)
    }

    /// Makes the reserve file unless it is there; false if the disk has no room for it.
    pub(crate) fn keep_reserve(&self) -> bool {
        let Some(path) = self.reserve() else { return true };
        if fs::metadata(&path).is_ok_and(|file| file.len() == RESERVE_BYTES) {
            return true;
        }
        let made = fs::File::create(&path).and_then(|file| allocate(&file, RESERVE_BYTES));
        if made.is_err() {
            self.give_up_reserve();
        }
        made.is_ok()
    }

    /// Frees the reserve, so that bodies can be deleted from a full disk.
    pub(crate) fn give_up_reserve(&self) {
        if let Some(path) = self.reserve() {
            // Absent is as good; any other failure shows in the next transaction.
            let _ = fs::remove_file(path);
        }
    }

    fn reserve(&self) -> Option<PathBuf> {
        self.path.as_ref().map(|path| path.with_file_name(RESERVE_NAME))
    }

    /// Gives unused pages of the queue file back to the file system. Readers find the file closed meanwhile.
    pub(crate) fn compact(&self) -> Result<(), StoreError> {
        let Some(db) = self.db.write().take() else {
            return Err(StoreError::Closed);
        };
        match Arc::try_unwrap(db) {
            Ok(mut db) => {
                let result = db.compact();
                if result.is_ok() {
                    *self.db.write() = Some(Arc::new(db));
                }
                // After a failure the file stays closed until it is opened again.
                result.map(|_| ()).map_err(|error| self.error(error))
            }
            Err(shared) => {
                // A reader is at work; another time.
                *self.db.write() = Some(shared);
                Ok(())
            }
        }
    }

    /// The queue file.
    pub(crate) fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// The slot of a sink, drawn on first use.
    pub(crate) fn slot(&self, sink: &str) -> Result<u32, StoreError> {
        let tx = self.db()?.begin_write().map_err(|error| self.error(error))?;
        let slot = {
            let mut table = tx.open_table(SINKS).map_err(|error| self.error(error))?;
            let known = table
                .get(sink)
                .map_err(|error| self.error(error))?
                .map(|slot| slot.value());
            match known {
                Some(slot) => slot,
                None => {
                    let mut next = 0;
                    for row in table.iter().map_err(|error| self.error(error))? {
                        next = next.max(row.map_err(|error| self.error(error))?.1.value() + 1);
                    }
                    table.insert(sink, next).map_err(|error| self.error(error))?;
                    next
                }
            }
        };
        tx.commit().map_err(|error| self.error(error))?;
        Ok(slot)
    }

    /// Gives a sink the slot it had in an earlier file.
    pub(crate) fn keep_slot(&self, sink: &str, slot: u32) -> Result<(), StoreError> {
        let tx = self.db()?.begin_write().map_err(|error| self.error(error))?;
        tx.open_table(SINKS)
            .map_err(|error| self.error(error))?
            .insert(sink, slot)
            .map_err(|error| self.error(error))?;
        tx.commit().map_err(|error| self.error(error))
    }

    /// All sinks that ever had a slot.
    pub(crate) fn sinks(&self) -> Result<Vec<(String, u32)>, StoreError> {
        let tx = self.db()?.begin_read().map_err(|error| self.error(error))?;
        let table = tx.open_table(SINKS).map_err(|error| self.error(error))?;
        let mut out = Vec::new();
        for row in table.iter().map_err(|error| self.error(error))? {
            let (name, slot) = row.map_err(|error| self.error(error))?;
            out.push((name.value().to_owned(), slot.value()));
        }
        Ok(out)
    }

    /// Forgets a sink with all its bodies; returns their points.
    pub(crate) fn drop_sink(&self, sink: &str, slot: u32) -> Result<u64, StoreError> {
        let mut points = 0;
        let tx = self.db()?.begin_write().map_err(|error| self.error(error))?;
        {
            let mut metas = tx.open_table(METAS).map_err(|error| self.error(error))?;
            metas
                .retain_in((slot, 0)..=(slot, u64::MAX), |_, meta| {
                    points += BodyMeta::from_bytes(meta).map_or(0, |meta| u64::from(meta.points));
                    false
                })
                .map_err(|error| self.error(error))?;
            let mut bodies = tx.open_table(BODIES).map_err(|error| self.error(error))?;
            bodies
                .retain_in((slot, 0)..=(slot, u64::MAX), |_, _| false)
                .map_err(|error| self.error(error))?;
            let mut sinks = tx.open_table(SINKS).map_err(|error| self.error(error))?;
            sinks.remove(sink).map_err(|error| self.error(error))?;
        }
        tx.commit().map_err(|error| self.error(error))?;
        Ok(points)
    }

    /// Adds up what a slot holds.
    pub(crate) fn backlog(&self, slot: u32) -> Result<Backlog, StoreError> {
        let mut backlog = Backlog::default();
        self.scan(slot, 0, |id, meta| {
            backlog.bodies += 1;
            backlog.points += u64::from(meta.points);
            backlog.bytes += meta.cost();
            backlog.next_id = id + 1;
            true
        })?;
        Ok(backlog)
    }

    /// Up to `limit` bodies of a slot from number `from` on.
    pub(crate) fn waiting(&self, slot: u32, from: u64, limit: usize) -> Result<Vec<Waiting>, StoreError> {
        let mut out = Vec::with_capacity(limit);
        self.scan(slot, from, |id, meta| {
            out.push((id, meta));
            out.len() < limit
        })?;
        Ok(out)
    }

    /// One body's bytes; `None` if it is gone.
    pub(crate) fn body(&self, slot: u32, id: u64) -> Result<Option<Bytes>, StoreError> {
        let tx = self.db()?.begin_read().map_err(|error| self.error(error))?;
        let table = tx.open_table(BODIES).map_err(|error| self.error(error))?;
        let value = table.get((slot, id)).map_err(|error| self.error(error))?;
        Ok(value.map(|value| Bytes::copy_from_slice(value.value())))
    }

    /// All batch identities.
    pub(crate) fn agents(&self) -> Result<Vec<(AgentKey, Seen)>, StoreError> {
        let tx = self.db()?.begin_read().map_err(|error| self.error(error))?;
        let table = tx.open_table(AGENTS).map_err(|error| self.error(error))?;
        let mut out = Vec::new();
        for row in table.iter().map_err(|error| self.error(error))? {
            let (key, value) = row.map_err(|error| self.error(error))?;
            let (node, boot_id) = key.value();
            match Seen::from_bytes(value.value()) {
                Some(seen) => out.push(((Str::from(node), boot_id), seen)),
                None => return Err(StoreError::Damaged(format!("identity row of `{node}` cannot be read"))),
            }
        }
        Ok(out)
    }

    /// Applies all changes or none, and returns once they are on disk: for each removal, whether the body was there.
    ///
    /// # Errors
    /// After an error other than [`StoreError::Closed`] the file is closed; whether the changes are on disk is known only
    /// after [`Self::reopen`].
    pub(crate) fn commit(&self, changes: &Changes<'_>) -> Result<Vec<bool>, StoreError> {
        let db = self.db()?;
        let result = self.apply(&db, changes);
        if result.is_err() {
            // The storage refuses everything after a failed write until it is opened again.
            self.close();
        }
        result
    }

    fn apply(&self, db: &Database, changes: &Changes<'_>) -> Result<Vec<bool>, StoreError> {
        let mut removed = Vec::with_capacity(changes.remove.len());
        let tx = db.begin_write().map_err(|error| self.error(error))?;
        {
            let mut bodies = tx.open_table(BODIES).map_err(|error| self.error(error))?;
            let mut metas = tx.open_table(METAS).map_err(|error| self.error(error))?;
            for (slot, id, meta, body) in &changes.put {
                bodies.insert((*slot, *id), *body).map_err(|error| self.error(error))?;
                metas
                    .insert((*slot, *id), meta.to_bytes().as_slice())
                    .map_err(|error| self.error(error))?;
            }
            for key in &changes.remove {
                bodies.remove(*key).map_err(|error| self.error(error))?;
                let existed = metas.remove(*key).map_err(|error| self.error(error))?.is_some();
                removed.push(existed);
            }
            if !changes.seen.is_empty() || !changes.forget.is_empty() {
                let mut agents = tx.open_table(AGENTS).map_err(|error| self.error(error))?;
                for ((node, boot_id), row) in &changes.seen {
                    agents
                        .insert((&**node, *boot_id), row.as_slice())
                        .map_err(|error| self.error(error))?;
                }
                for (node, boot_id) in &changes.forget {
                    agents.remove((&**node, *boot_id)).map_err(|error| self.error(error))?;
                }
            }
        }
        tx.commit().map_err(|error| self.error(error))?;
        Ok(removed)
    }

    fn scan(&self, slot: u32, from: u64, mut each: impl FnMut(u64, BodyMeta) -> bool) -> Result<(), StoreError> {
        let tx = self.db()?.begin_read().map_err(|error| self.error(error))?;
        let table = tx.open_table(METAS).map_err(|error| self.error(error))?;
        for row in table
            .range((slot, from)..=(slot, u64::MAX))
            .map_err(|error| self.error(error))?
        {
            let (key, value) = row.map_err(|error| self.error(error))?;
            let (_, id) = key.value();
            let Some(meta) = BodyMeta::from_bytes(value.value()) else {
                return Err(StoreError::Damaged(format!("row of body {id} cannot be read")));
            };
            if !each(id, meta) {
                break;
            }
        }
        Ok(())
    }

    fn db(&self) -> Result<Arc<Database>, StoreError> {
        self.db.read().clone().ok_or(StoreError::Closed)
    }

    fn disk_full(&self) -> StoreError {
        let path = self.path.as_deref().map(|path| path.display().to_string());
        StoreError::DiskFull(path.unwrap_or_default())
    }

    fn error(&self, error: impl Into<redb::Error>) -> StoreError {
        match error.into() {
            redb::Error::Io(error)
                if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) =>
            {
                self.disk_full()
            }
            redb::Error::Corrupted(why) => StoreError::Damaged(why),
            // The storage tells the first failure only to whoever met it; on a full disk that is the likely one.
            redb::Error::PreviousIo if self.disk_free().is_some_and(|free| free < RESERVE_BYTES) => self.disk_full(),
            redb::Error::PreviousIo | redb::Error::DatabaseClosed => StoreError::Closed,
            other => StoreError::Failed(other.to_string()),
        }
    }
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
