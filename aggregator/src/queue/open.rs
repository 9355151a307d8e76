//! Opening the queue file, and what its disk says.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use redb::{Database, DatabaseError, ReadableDatabase as _, StorageError, TableError};

use super::store::{AGENTS, BODIES, FILE_NAME, METAS, SINKS};

/// Pages kept in memory. Bodies are written once and read once, so a cache gains nothing beyond the inner tree pages.
const CACHE_BYTES: usize = 8 << 20;

/// The queue cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Directory or file cannot be made or written.
    #[error("queue directory `{path}` cannot be used: {source}; name a directory that this user can write, on a disk that works", path = path.display())]
    Unusable {
        /// What was tried.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another process has it.
    #[error("queue `{path}` is in use by another process; stop that one, or name another queue directory", path = path.display())]
    Locked {
        /// The queue file.
        path: PathBuf,
    },
    /// Written by a version that this one cannot read.
    #[error("queue `{path}` was written by another version (file format {format}); let that version drain it, or move it away", path = path.display())]
    Format {
        /// The queue file.
        path: PathBuf,
        /// Its format number.
        format: u8,
    },
}

pub(super) enum OpenFailure {
    Refused(OpenError),
    Damaged(String),
}

pub(super) fn open_file(path: &Path) -> Result<Database, OpenFailure> {
    Database::builder()
        .set_cache_size(CACHE_BYTES)
        .create(path)
        .and_then(prepared)
        .map_err(|error| match error {
            DatabaseError::DatabaseAlreadyOpen | DatabaseError::LockProtocolMismatch => {
                OpenFailure::Refused(OpenError::Locked { path: path.to_owned() })
            }
            DatabaseError::UpgradeRequired(format) => OpenFailure::Refused(OpenError::Format {
                path: path.to_owned(),
                format,
            }),
            DatabaseError::Storage(StorageError::Corrupted(why)) => OpenFailure::Damaged(why),
            DatabaseError::Storage(StorageError::Io(error))
                if matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof) =>
            {
                OpenFailure::Damaged(error.to_string())
            }
            DatabaseError::Storage(StorageError::Io(source)) => OpenFailure::Refused(OpenError::Unusable {
                path: path.to_owned(),
                source,
            }),
            other => OpenFailure::Refused(OpenError::Unusable {
                path: path.to_owned(),
                source: io::Error::other(other),
            }),
        })
}

/// Makes the tables, so that readers find them. A file that already has them is not written.
pub(super) fn prepared(db: Database) -> Result<Database, DatabaseError> {
    let storage = |error: redb::Error| match error {
        redb::Error::Corrupted(why) => DatabaseError::Storage(StorageError::Corrupted(why)),
        redb::Error::Io(error) => DatabaseError::Storage(StorageError::Io(error)),
        other => DatabaseError::Storage(StorageError::Io(io::Error::other(other))),
    };
    let exist = || -> Result<bool, redb::Error> {
        let tx = db.begin_read()?;
        let missing = [
            tx.open_table(BODIES).err(),
            tx.open_table(METAS).err(),
            tx.open_table(AGENTS).err(),
            tx.open_table(SINKS).err(),
        ];
        match missing.into_iter().flatten().next() {
            None => Ok(true),
            Some(TableError::TableDoesNotExist(_)) => Ok(false),
            Some(other) => Err(other.into()),
        }
    };
    let make = || -> Result<(), redb::Error> {
        let tx = db.begin_write()?;
        tx.open_table(BODIES)?;
        tx.open_table(METAS)?;
        tx.open_table(AGENTS)?;
        tx.open_table(SINKS)?;
        tx.commit()?;
        Ok(())
    };
    if !exist().map_err(storage)? {
        make().map_err(storage)?;
    }
    Ok(db)
}

/// Renames a damaged file to the first free `queue.redb.damaged-N`.
pub(super) fn move_aside(path: &Path) -> io::Result<PathBuf> {
    for n in 1..1000 {
        let target = path.with_file_name(format!("{FILE_NAME}.damaged-{n}"));
        if !target.try_exists()? {
            fs::rename(path, &target)?;
            return Ok(target);
        }
    }
    Err(io::Error::other(
        "there are 999 damaged files beside it already; remove them",
    ))
}

/// Takes disk for the whole length, unlike setting the length alone.
pub(super) fn allocate(file: &fs::File, len: u64) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let len = libc::off_t::try_from(len).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open for the whole call; no memory is passed.
    match unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, len) } {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(code)),
    }
}

pub(super) fn free_bytes(dir: &Path) -> io::Result<u64> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(dir.as_os_str().as_bytes())?;
    let mut stat = std::mem::MaybeUninit::<libc::statvfs>::zeroed();
    // SAFETY: `path` is a C string and `stat` has the room that the call fills; both live until it returns.
    if unsafe { libc::statvfs(path.as_ptr(), stat.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: all-zero is a valid `statvfs`, and the call succeeded.
    let stat = unsafe { stat.assume_init() };
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}
