//! Files of other processes: what is mapped, through which root, and whether two paths lead to the same file.

use std::{
    fs::{File, Metadata},
    io,
    os::unix::fs::MetadataExt as _,
    path::Path,
};

use rustix::fs::{Mode, OFlags, ResolveFlags};

use crate::identity::process::Proc;

/// `OVERLAYFS_SUPER_MAGIC`
const OVERLAY: i64 = 0x794c_7630;
/// Bytes of `maps` that are read.
const MAPS_MAX: u64 = 4 << 20;

/// A file, the same for all mounts that show it: an overlay has a device number of its own, but shows inode number, size
/// and time of the file below. The time of its last change of attributes is not in it: a file that is removed while it runs
/// is still the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct FileKey {
    /// Device number; 0 on an overlay.
    pub(super) device: u64,
    /// Inode number.
    pub(super) inode: u64,
    /// Bytes.
    pub(super) size: u64,
    /// Time of the last change of its content, nanoseconds.
    pub(super) modified_ns: i128,
}

/// A mapped file.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Mapped<'a> {
    /// Addresses, as the directory `map_files` names them.
    pub(super) range: &'a str,
    pub(super) path: &'a str,
    pub(super) deleted: bool,
}

/// A file below the root directory of a process, whatever links it is behind: they are followed as the process would.
pub(super) fn open_below_root(proc: &Proc, pid: u32, path: &str) -> Option<File> {
    let root = File::open(proc.path(pid, "root")).ok()?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    // The path is from the root on; a leading slash changes nothing.
    rustix::fs::openat2(&root, path, flags, Mode::empty(), resolve)
        .ok()
        .map(File::from)
}

/// Opens a file that a process has mapped.
///
/// # Errors
/// What was said at the mapping itself, the last way there is.
pub(super) fn open_mapped(proc: &Proc, pid: u32, mapped: &Mapped<'_>) -> io::Result<File> {
    let Mapped { range, path, deleted } = mapped;
    // What was removed or replaced is there through the mapping only, which takes more rights.
    if !deleted && let Some(file) = open_below_root(proc, pid, path) {
        return Ok(file);
    }
    match File::open(proc.path(pid, &format!("map_files/{range}"))) {
        Ok(file) => Ok(file),
        // Where the root is another one in the same mount namespace, the path is that of the namespace.
        Err(error) if !deleted => File::open(path).map_err(|_| error),
        Err(error) => Err(error),
    }
}

/// What a process has mapped.
pub(super) fn read_maps(path: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    let file = File::open(path).ok()?;
    io::Read::read_to_end(&mut io::Read::take(file, MAPS_MAX), &mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// Which file it is that `path` leads to.
pub(super) fn key_of(about: &Metadata, path: &Path) -> io::Result<FileKey> {
    Ok(key(about, is_overlay(&rustix::fs::statfs(path)?)))
}

/// Which file it is.
pub(super) fn key_of_file(about: &Metadata, file: &File) -> io::Result<FileKey> {
    Ok(key(about, is_overlay(&rustix::fs::fstatfs(file)?)))
}

fn is_overlay(about: &rustix::fs::StatFs) -> bool {
    #[allow(clippy::useless_conversion, reason = "its width differs between architectures")]
    let kind = i64::from(about.f_type);
    kind == OVERLAY
}

fn key(about: &Metadata, overlay: bool) -> FileKey {
    FileKey {
        device: if overlay { 0 } else { about.dev() },
        inode: about.ino(),
        size: about.len(),
        modified_ns: i128::from(about.mtime()) * 1_000_000_000 + i128::from(about.mtime_nsec()),
    }
}
