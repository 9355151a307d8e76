//! Finds processes that use TLS, and sees to it that the files with its functions have their probes.
//!
//! ```text
//! a process started, or is there ▶ switched on? ▶ its program, and mapped libraries by name ▶ [`targets`] ▶ probes
//! ```
//! Probes are for all processes that use a file: they are set once, and taken away some time after the last user has gone. A
//! library is not mapped yet when a process has just started its program: it is looked at again, a few times.

use std::{
    fs::{self, File},
    hash::{BuildHasher as _, Hash as _, Hasher as _},
    io,
    os::fd::AsFd as _,
    time::{Duration, Instant},
};

use ahash::RandomState;
use hashbrown::{HashMap, HashSet};

use super::{
    blind::{Named, Reason, by_name},
    targets::{self, Targets},
    users::Files,
};
use crate::{
    capture::{
        elf::{Depth, Own},
        files::{FileKey, Mapped, key_of, key_of_file, open_mapped, read_maps},
        whose::{Policy, Whose},
    },
    ebpf::{tls::TlsObject, uprobe::Attached},
    identity::{cgroup, process::Proc},
};

/// Pauses before a process that started is looked at again.
const LOOKS: &[Duration] = &[
    Duration::from_millis(5),
    Duration::from_millis(30),
    Duration::from_millis(150),
    Duration::from_millis(500),
    Duration::from_secs(2),
];
/// Processes that are looked at again at a time.
const WAITING_MAX: usize = 4_096;
/// Processes followed at most.
const PROCESSES_MAX: usize = 16_384;
/// Files that are remembered as to what is in them.
const KNOWN_MAX: usize = 16_384;
/// Bytes of symbols, or of their names, that are read of programs and of libraries.
const SYMBOLS_MAX: u64 = 24 << 20;

/// Finds them.
pub(super) struct Finder {
    proc: Proc,
    pub(super) policy: Policy,
    processes: HashMap<u32, Process, RandomState>,
    probed: Files<Vec<Attached>>,
    known: HashMap<FileKey, Targets, RandomState>,
    waiting: HashMap<u32, (usize, Instant), RandomState>,
    hasher: RandomState,
}

/// A process that has to do with TLS, or may have.
#[derive(Debug)]
struct Process {
    /// What was seen of it: its program and mapped libraries.
    seen: u64,
    uses: Vec<FileKey>,
    blind: Option<Reason>,
}

/// What is known of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// It has to do with TLS, and its plain text is seen.
    Seen,
    /// It is not.
    Blind(Reason),
    /// It has nothing to do with any TLS that is known.
    Nothing,
}

/// What is followed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) processes: usize,
    pub(super) files: usize,
}

impl Finder {
    pub(super) fn new(proc: Proc, policy: Policy) -> Self {
        Self {
            proc,
            policy,
            processes: HashMap::default(),
            probed: Files::default(),
            known: HashMap::default(),
            waiting: HashMap::default(),
            hasher: RandomState::new(),
        }
    }

    /// A process started a program; true if what it was before used TLS.
    pub(super) fn started(&mut self, pid: u32) -> bool {
        let used = self.forget(pid);
        self.wait(pid, 0);
        used
    }

    /// A process has ended; true if it used TLS.
    pub(super) fn forget(&mut self, pid: u32) -> bool {
        self.waiting.remove(&pid);
        let Some(process) = self.processes.remove(&pid) else {
            return false;
        };
        self.leave(pid, &process.uses);
        !process.uses.is_empty()
    }

    /// When [`Self::look_again`] is due next.
    pub(super) fn next_look(&self) -> Option<Instant> {
        self.waiting.values().map(|(_, at)| *at).min()
    }

    /// Looks at processes that started a moment ago; true if a file got probes.
    pub(super) fn look_again(&mut self, object: &mut TlsObject) -> bool {
        let now = Instant::now();
        let due: Vec<(u32, usize)> = self
            .waiting
            .iter()
            .filter(|(_, (_, at))| *at <= now)
            .map(|(pid, (looks, _))| (*pid, *looks))
            .collect();
        let mut new = false;
        for (pid, looks) in due {
            self.waiting.remove(&pid);
            if let Some(probed) = self.look(pid, object) {
                new |= probed;
                self.wait(pid, looks);
            }
        }
        new
    }

    /// Looks at all processes; true if a file got probes.
    pub(super) fn sweep(&mut self, object: &mut TlsObject) -> bool {
        let there: HashSet<u32, RandomState> = self.proc.pids().collect();
        let gone: Vec<u32> = self
            .processes
            .keys()
            .filter(|pid| !there.contains(*pid))
            .copied()
            .collect();
        for pid in gone {
            self.forget(pid);
            object.forget(pid);
        }
        let mut new = false;
        for pid in there {
            new |= self.look(pid, object).unwrap_or(false);
        }
        new
    }

    /// What was seen is to be looked at again: something was switched.
    pub(super) fn doubt(&mut self) {
        for process in self.processes.values_mut() {
            process.seen = 0;
        }
    }

    /// Takes away probes that had no user for a while.
    pub(super) fn expire(&mut self, now: Instant) {
        self.probed.expire(now);
    }

    /// Takes all probes away.
    pub(super) fn unprobe(&mut self) {
        self.probed.clear();
    }

    pub(super) fn counts(&self) -> Counts {
        Counts {
            processes: self
                .processes
                .values()
                .filter(|process| !process.uses.is_empty())
                .count(),
            files: self.probed.len(),
        }
    }

    /// Kinds of libraries with a probe, each once.
    pub(super) fn kinds(&self) -> Vec<&'static str> {
        self.probed.kinds()
    }

    /// Processes whose plain text is not seen.
    pub(super) fn blind(&self) -> impl Iterator<Item = (u32, Reason)> {
        self.processes
            .iter()
            .filter_map(|(pid, process)| Some((*pid, process.blind?)))
    }

    /// All processes.
    pub(super) fn all(&self) -> impl Iterator<Item = (u32, Standing)> {
        self.processes.iter().map(|(pid, process)| {
            let standing = match process.blind {
                Some(reason) => Standing::Blind(reason),
                None if process.uses.is_empty() => Standing::Nothing,
                None => Standing::Seen,
            };
            (*pid, standing)
        })
    }

    fn wait(&mut self, pid: u32, looks: usize) {
        // Whom there is no room for is found with all others, a little later.
        if let Some(pause) = LOOKS.get(looks)
            && self.waiting.len() < WAITING_MAX
        {
            self.waiting.insert(pid, (looks + 1, Instant::now() + *pause));
        }
    }

    fn leave(&mut self, pid: u32, uses: &[FileKey]) {
        let now = Instant::now();
        for key in uses {
            self.probed.is_left(key, pid, now);
        }
    }

    /// Looks at a process; `None` if it is gone, else whether a file got probes.
    fn look(&mut self, pid: u32, object: &mut TlsObject) -> Option<bool> {
        let exe = self.proc.path(pid, "exe");
        // Threads of the kernel have none.
        let program = fs::metadata(&exe).and_then(|about| key_of(&about, &exe)).ok();
        let program = match program {
            Some(key) => key,
            None => {
                self.forget(pid);
                return None;
            }
        };
        let maps = read_maps(&self.proc.path(pid, "maps"))?;
        let mapped = libraries(&maps);
        let seen = self.sight(program, &mapped);
        if self.processes.get(&pid).is_some_and(|process| process.seen == seen) {
            return Some(false);
        }
        let before = self.processes.remove(&pid);
        let mut found = Found::default();
        if self.policy.of(cgroup::pod_of_process(&self.proc, pid)) == Whose::Off {
            found.blind = Some(Reason::SwitchedOff);
        } else {
            self.file(pid, object, &mut found, false, program, || File::open(&exe));
            for library in &mapped {
                self.library(pid, object, &mut found, library);
            }
        }
        // Users that stay are not taken away in between.
        let old: Vec<FileKey> = before
            .map(|process| process.uses)
            .unwrap_or_default()
            .into_iter()
            .filter(|key| !found.uses.contains(key))
            .collect();
        self.leave(pid, &old);
        if self.processes.len() >= PROCESSES_MAX {
            self.leave(pid, &found.uses);
            return Some(found.new);
        }
        if !found.uses.is_empty() {
            if let Err(error) = object.track(pid) {
                tracing::debug!(
                    error = format!("{error:#}"),
                    "The end of a process will be noticed later"
                );
            }
            // What is of use is seen. Besides, it may have a library that is not: Python, with gRPC's own.
            found.blind = found
                .blind
                .filter(|reason| matches!(reason, Reason::NoProbe | Reason::Full | Reason::NoFunctions));
        }
        self.processes.insert(
            pid,
            Process {
                seen,
                uses: found.uses,
                blind: found.blind,
            },
        );
        Some(found.new)
    }

    fn library(&mut self, pid: u32, object: &mut TlsObject, found: &mut Found, library: &Library<'_>) {
        let certain = match library.named {
            Named::Nothing => return,
            Named::Blind(reason) => {
                found.blind = found.blind.or(Some(reason));
                return;
            }
            Named::Library { certain } => certain,
        };
        let file = open_mapped(&self.proc, pid, &library.mapped);
        let key = file.as_ref().ok().and_then(|file| {
            let about = file.metadata().ok().filter(fs::Metadata::is_file)?;
            key_of_file(&about, file).ok()
        });
        match (file, key) {
            (Ok(file), Some(key)) => self.file(pid, object, found, certain, key, || Ok(file)),
            _ => found.blind = found.blind.or(Some(Reason::Unreadable)),
        }
    }

    /// Sees to it that a file that a process uses has its probes.
    fn file(
        &mut self,
        pid: u32,
        object: &mut TlsObject,
        found: &mut Found,
        certain: bool,
        key: FileKey,
        open: impl FnOnce() -> io::Result<File>,
    ) {
        if self.probed.is_used(&key, pid) {
            found.uses.push(key);
            return;
        }
        let mut file = None;
        if !self.known.contains_key(&key) {
            let Ok(opened) = open() else {
                found.blind = found.blind.or(Some(Reason::Unreadable));
                return;
            };
            let depth = Depth {
                max: SYMBOLS_MAX,
                own: Own::IfNone,
            };
            // What cannot be read has nothing to probe.
            let targets = targets::look(&opened, depth).unwrap_or_default();
            if self.known.len() >= KNOWN_MAX {
                self.known.clear();
            }
            self.known.insert(key, targets);
            file = Some(opened);
        } else if self.known.get(&key).is_some_and(|targets| !targets.spots.is_empty()) {
            file = open().ok();
        }
        let Some(targets) = self.known.get(&key) else { return };
        if targets.spots.is_empty() {
            let reason = targets.blind.or(certain.then_some(Reason::NoFunctions));
            found.blind = found.blind.or(reason);
            return;
        }
        let Some(file) = file else {
            found.blind = found.blind.or(Some(Reason::Unreadable));
            return;
        };
        if !self.probed.has_room() {
            found.blind = Some(Reason::Full);
            return;
        }
        match probe(targets, &file, object) {
            Ok(probes) => {
                self.probed.probed(key, probes, targets.kind, pid);
                found.uses.push(key);
                found.new = true;
            }
            Err(error) => {
                tracing::warn!(pid, error = format!("{error:#}"), "A library of TLS got no probes");
                found.blind = Some(Reason::NoProbe);
            }
        }
    }

    /// A number for what there is to see of a process.
    fn sight(&self, program: FileKey, mapped: &[Library<'_>]) -> u64 {
        let mut hasher = self.hasher.build_hasher();
        program.hash(&mut hasher);
        for library in mapped {
            library.line.hash(&mut hasher);
        }
        // Zero is for what is doubted.
        hasher.finish() | 1
    }
}

/// What was found of a process.
#[derive(Debug, Default)]
struct Found {
    uses: Vec<FileKey>,
    blind: Option<Reason>,
    new: bool,
}

/// A mapped library whose name tells of TLS.
#[derive(Debug, PartialEq, Eq)]
struct Library<'a> {
    line: &'a str,
    mapped: Mapped<'a>,
    named: Named,
}

/// The libraries of interest among mappings, each once.
fn libraries(maps: &str) -> Vec<Library<'_>> {
    let mut found: Vec<Library<'_>> = Vec::new();
    for line in maps.lines() {
        let Some(at) = line.find('/') else { continue };
        let all = line.get(at..).unwrap_or_default();
        let (path, deleted) = match all.strip_suffix(" (deleted)") {
            Some(path) => (path, true),
            None => (all, false),
        };
        let named = by_name(path.rsplit('/').next().unwrap_or_default());
        if named == Named::Nothing || found.iter().any(|other| other.mapped.path == path) {
            continue;
        }
        if let Some(range) = line.split(' ').next() {
            let mapped = Mapped { range, path, deleted };
            found.push(Library { line, mapped, named });
        }
    }
    found
}

/// Sets all probes of a file.
fn probe(targets: &Targets, file: &File, object: &mut TlsObject) -> anyhow::Result<Vec<Attached>> {
    let mut programs: Vec<&'static str> = targets.spots.iter().map(|spot| spot.program).collect();
    programs.sort_unstable();
    programs.dedup();
    // A call whose begin is seen and not its return would be taken for one under way.
    programs.sort_by_key(|program| !program.starts_with("tls_return"));
    let attach = |program: &'static str| {
        let at: Vec<u64> = targets
            .spots
            .iter()
            .filter(|spot| spot.program == program)
            .map(|spot| spot.at)
            .collect();
        object.probe(program, file.as_fd(), &at)
    };
    programs.into_iter().map(attach).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_libraries_among_mappings() {
        let maps = "55d0c0a00000-55d0c0a2d000 r-xp 00000000 fe:00 1234                       /usr/bin/curl\n\
                    7f3c5a000000-7f3c5a014000 r--p 00000000 00:2a 99     /usr/lib/x/libssl.so.3\n\
                    7f3c5a014000-7f3c5a024000 r-xp 00014000 00:2a 99     /usr/lib/x/libssl.so.3\n\
                    7f3c5b000000-7f3c5b014000 r-xp 00000000 00:2a 98     /opt/old/libssl.so.1.1 (deleted)\n\
                    7ffd7a5e1000-7ffd7a602000 rw-p 00000000 00:00 0      [stack]\n";
        let found: Vec<_> = libraries(maps)
            .iter()
            .map(|library| (library.mapped.path, library.mapped.deleted))
            .collect();
        assert_eq!(
            found,
            [("/usr/lib/x/libssl.so.3", false), ("/opt/old/libssl.so.1.1", true)]
        );
    }
}
