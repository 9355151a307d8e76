//! Which processes are shells, and where their lines are read. No I/O, bounded.
//!
//! ```text
//! process ▶ file of its program ▶ file that has `readline` (its own, or a library) ▶ one probe for all its users
//! ```
//! A probe is for all processes that use a file. It is there once per file, however many mounts show it, and goes a moment
//! after the last user: it keeps the file system it was found on in use.

use std::time::{Duration, Instant};

use ahash::RandomState;
use hashbrown::{HashMap, HashSet};

use super::users;
use crate::{capture::files::FileKey, identity::cgroup::Uid};

/// Shells followed at most.
pub(super) const SHELLS_MAX: usize = 8_192;
/// Files with a probe at most.
pub(super) const FILES_MAX: usize = 1_024;
/// How long a probe stays after its last user: scripts come and go, and a new probe costs more than one that waits.
pub(super) const LINGER: Duration = Duration::from_secs(1);
/// Programs that are remembered as to whether they are a bash.
const PROGRAMS_MAX: usize = 8_192;

/// What a program is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Program {
    /// No bash.
    Other,
    /// A bash that has `readline` in itself, which returns at these file offsets.
    Own(Vec<u64>),
    /// A bash that has it from a library.
    Library,
    /// A bash whose lines cannot be seen, with the reason.
    Blind(String),
}

/// One shell.
#[derive(Clone, Debug)]
pub(super) struct Shell {
    /// Its program.
    pub(super) program: FileKey,
    /// The file with its `readline`, once that is known.
    pub(super) reads_in: Option<FileKey>,
    /// The pod it is in.
    pub(super) pod: Option<Uid>,
    /// Who its users are.
    pub(super) users: users::Of,
}

/// All of it. `P` is what holds a probe; dropping it takes the probe away.
#[derive(Debug)]
pub(super) struct Shells<P> {
    shells: HashMap<u32, Shell, RandomState>,
    files: HashMap<FileKey, Probed<P>, RandomState>,
    programs: HashMap<FileKey, Program, RandomState>,
}

#[derive(Debug)]
struct Probed<P> {
    _probe: P,
    users: HashSet<u32, RandomState>,
    /// Since when there is no user.
    unused: Option<Instant>,
}

/// There is no room for another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Full;

impl<P> Shells<P> {
    pub(super) fn new() -> Self {
        Self {
            shells: HashMap::default(),
            files: HashMap::default(),
            programs: HashMap::default(),
        }
    }

    /// What is known of a program.
    pub(super) fn program(&self, key: &FileKey) -> Option<&Program> {
        self.programs.get(key)
    }

    /// Remembers what a program is.
    pub(super) fn learn(&mut self, key: FileKey, program: Program) {
        if self.programs.len() >= PROGRAMS_MAX {
            self.programs.clear();
        }
        self.programs.insert(key, program);
    }

    /// A shell is there; it may have been another one before.
    ///
    /// # Errors
    /// If there are too many.
    pub(super) fn start(&mut self, pid: u32, shell: Shell, now: Instant) -> Result<(), Full> {
        self.end(pid, now);
        if self.shells.len() >= SHELLS_MAX {
            return Err(Full);
        }
        self.shells.insert(pid, shell);
        Ok(())
    }

    /// A process is no shell, or no more; true if it was one.
    pub(super) fn end(&mut self, pid: u32, now: Instant) -> bool {
        let Some(shell) = self.shells.remove(&pid) else {
            return false;
        };
        if let Some(file) = shell.reads_in.and_then(|key| self.files.get_mut(&key)) {
            file.users.remove(&pid);
            if file.users.is_empty() {
                file.unused = Some(now);
            }
        }
        true
    }

    /// True if a file has a probe.
    pub(super) fn is_probed(&self, file: &FileKey) -> bool {
        self.files.contains_key(file)
    }

    /// True if there is room for another probe.
    pub(super) fn has_room(&self) -> bool {
        self.files.len() < FILES_MAX
    }

    /// A file got its probe.
    pub(super) fn probed(&mut self, file: FileKey, probe: P, now: Instant) {
        let probed = Probed {
            _probe: probe,
            users: HashSet::default(),
            unused: Some(now),
        };
        self.files.insert(file, probed);
    }

    /// A shell reads its lines in a file that has a probe.
    pub(super) fn reads(&mut self, pid: u32, key: FileKey) {
        if let (Some(shell), Some(file)) = (self.shells.get_mut(&pid), self.files.get_mut(&key)) {
            shell.reads_in = Some(key);
            file.users.insert(pid);
            file.unused = None;
        }
    }

    /// Takes all probes away.
    pub(super) fn unprobe(&mut self) {
        self.files.clear();
    }

    /// Takes away probes that had no user for a while.
    pub(super) fn expire(&mut self, now: Instant) {
        self.files.retain(|_, file| {
            file.unused
                .is_none_or(|since| now.saturating_duration_since(since) < LINGER)
        });
    }

    /// One shell.
    pub(super) fn get(&self, pid: u32) -> Option<&Shell> {
        self.shells.get(&pid)
    }

    /// All of them.
    pub(super) fn all(&self) -> impl Iterator<Item = (u32, &Shell)> {
        self.shells.iter().map(|(pid, shell)| (*pid, shell))
    }

    /// Number of shells, and of files with a probe.
    pub(super) fn counts(&self) -> (usize, usize) {
        (self.shells.len(), self.files.len())
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, rc::Rc};

    use super::*;

    /// A probe that tells when it goes.
    struct Probe(Rc<Cell<u32>>);

    impl Drop for Probe {
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

    fn shell() -> Shell {
        Shell {
            program: key(1),
            reads_in: None,
            pod: None,
            users: users::Of::default(),
        }
    }

    #[test]
    fn a_probe_goes_a_moment_after_its_last_user() {
        let (live, now) = (Rc::new(Cell::new(1)), Instant::now());
        let mut shells = Shells::new();
        for pid in [10, 11] {
            assert_eq!(shells.start(pid, shell(), now), Ok(()));
        }
        shells.probed(key(1), Probe(Rc::clone(&live)), now);
        shells.reads(10, key(1));
        shells.reads(11, key(1));
        assert!(shells.end(10, now) && !shells.end(10, now));
        shells.expire(now + 10 * LINGER);
        assert_eq!((live.get(), shells.counts()), (1, (1, 1)));
        // It starts another program: the same number is another shell, or none.
        assert_eq!(shells.start(11, shell(), now + 10 * LINGER), Ok(()));
        shells.expire(now + 10 * LINGER);
        assert!(shells.is_probed(&key(1)), "it may be the next one's too");
        shells.reads(11, key(1));
        shells.expire(now + 20 * LINGER);
        assert!(shells.is_probed(&key(1)));
        shells.end(11, now + 20 * LINGER);
        shells.expire(now + 21 * LINGER);
        assert_eq!((live.get(), shells.counts()), (0, (0, 0)));
    }

    #[test]
    fn a_probe_without_a_user_goes_too() {
        let (live, now) = (Rc::new(Cell::new(1)), Instant::now());
        let mut shells = Shells::new();
        shells.probed(key(1), Probe(Rc::clone(&live)), now);
        // The process went before it was known to use it.
        shells.reads(10, key(1));
        shells.expire(now + LINGER);
        assert_eq!(live.get(), 0);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut shells = Shells::<()>::new();
        let now = Instant::now();
        for n in 0..20_000u32 {
            shells.learn(key(n.into()), Program::Other);
            let full = n as usize >= SHELLS_MAX;
            assert_eq!(shells.start(n, shell(), now).is_err(), full);
        }
        assert!(shells.programs.len() <= PROGRAMS_MAX);
        assert_eq!(shells.counts().0, SHELLS_MAX);
    }
}
