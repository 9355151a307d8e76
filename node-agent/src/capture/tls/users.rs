//! Files with probes, and who uses them. No I/O, bounded.
//!
//! Probes are for all processes that use a file. They are there once per file, however many mounts show it, and go some time
//! after the last user: programs that run for a moment come again, and are then seen from the first byte on.

use std::time::{Duration, Instant};

use ahash::RandomState;
use hashbrown::{HashMap, HashSet};

use crate::capture::files::FileKey;

/// Files with probes at most.
pub(super) const FILES_MAX: usize = 1_024;
/// How long probes stay after their last user.
const LINGER: Duration = Duration::from_secs(60);
/// The same where they keep the file system of a container in use.
const LINGER_OVERLAY: Duration = Duration::from_secs(5);

/// All of them. `P` is what holds the probes of a file; dropping it takes them away.
#[derive(Debug)]
pub(super) struct Files<P> {
    files: HashMap<FileKey, Probed<P>, RandomState>,
}

#[derive(Debug)]
struct Probed<P> {
    _probes: P,
    kind: &'static str,
    users: HashSet<u32, RandomState>,
    /// Since when there is no user.
    unused: Option<Instant>,
}

impl<P> Default for Files<P> {
    fn default() -> Self {
        Self {
            files: HashMap::default(),
        }
    }
}

impl<P> Files<P> {
    /// A process uses a file; false if that has no probes.
    pub(super) fn is_used(&mut self, key: &FileKey, pid: u32) -> bool {
        let Some(file) = self.files.get_mut(key) else {
            return false;
        };
        file.users.insert(pid);
        file.unused = None;
        true
    }

    /// A process uses a file no longer.
    pub(super) fn is_left(&mut self, key: &FileKey, pid: u32, now: Instant) {
        if let Some(file) = self.files.get_mut(key)
            && file.users.remove(&pid)
            && file.users.is_empty()
        {
            file.unused = Some(now);
        }
    }

    /// True if there is room for the probes of another file.
    pub(super) fn has_room(&self) -> bool {
        self.files.len() < FILES_MAX
    }

    /// A file that a process uses got its probes.
    pub(super) fn probed(&mut self, key: FileKey, probes: P, kind: &'static str, pid: u32) {
        let file = Probed {
            _probes: probes,
            kind,
            users: HashSet::from_iter([pid]),
            unused: None,
        };
        self.files.insert(key, file);
    }

    /// Takes away probes that had no user for a while.
    pub(super) fn expire(&mut self, now: Instant) {
        self.files.retain(|key, file| {
            let linger = if key.device == 0 { LINGER_OVERLAY } else { LINGER };
            file.unused
                .is_none_or(|since| now.saturating_duration_since(since) < linger)
        });
    }

    /// Takes all probes away.
    pub(super) fn clear(&mut self) {
        self.files.clear();
    }

    /// Number of files.
    pub(super) fn len(&self) -> usize {
        self.files.len()
    }

    /// Kinds of files, each once.
    pub(super) fn kinds(&self) -> Vec<&'static str> {
        let mut kinds: Vec<&'static str> = self.files.values().map(|file| file.kind).collect();
        kinds.sort_unstable();
        kinds.dedup();
        kinds
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, rc::Rc};

    use super::*;

    /// Probes that tell when they go.
    struct Probes(Rc<Cell<u32>>);

    impl Drop for Probes {
        fn drop(&mut self) {
            self.0.set(self.0.get() - 1);
        }
    }

    fn key(inode: u64) -> FileKey {
        FileKey {
            device: 1,
            inode,
            size: 1,
            modified_ns: 0,
        }
    }

    #[test]
    fn probes_go_some_time_after_the_last_user() {
        let (live, now) = (Rc::new(Cell::new(1)), Instant::now());
        let mut files = Files::default();
        assert!(!files.is_used(&key(1), 10));
        files.probed(key(1), Probes(Rc::clone(&live)), "openssl", 10);
        assert!(files.is_used(&key(1), 11));
        files.is_left(&key(1), 10, now);
        files.expire(now + 2 * LINGER);
        assert_eq!((live.get(), files.len()), (1, 1), "one uses it");
        files.is_left(&key(1), 11, now);
        // Somebody who never did, and the same again, later.
        files.is_left(&key(1), 12, now + LINGER);
        files.is_left(&key(1), 11, now + LINGER);
        files.expire(now + LINGER / 2);
        assert!(files.is_used(&key(1), 13), "it comes again");
        files.expire(now + 2 * LINGER);
        assert_eq!((live.get(), files.kinds()), (1, vec!["openssl"]));
        files.is_left(&key(1), 13, now + 2 * LINGER);
        files.expire(now + 3 * LINGER);
        assert_eq!((live.get(), files.len()), (0, 0));
    }

    #[test]
    fn file_systems_of_containers_are_let_go_soon() {
        let (mut files, now) = (Files::default(), Instant::now());
        let overlay = FileKey { device: 0, ..key(1) };
        for key in [overlay, key(2)] {
            files.probed(key, (), "openssl", 1);
            files.is_left(&key, 1, now);
        }
        files.expire(now + LINGER_OVERLAY);
        assert!(!files.is_used(&overlay, 1) && files.is_used(&key(2), 1));
    }

    #[test]
    fn files_are_bounded() {
        let mut files = Files::default();
        for n in 0..FILES_MAX as u64 {
            assert!(files.has_room());
            files.probed(key(n), (), "gnutls", 1);
        }
        assert!(!files.has_room());
    }
}
