//! Finds shells and the code that reads their lines, through `/proc`.
//!
//! ```text
//! /proc/PID/exe ▶ known program? else its symbols ▶ readline in it ─────────────────────────▶ probe
//!                                                 └ in a library ▶ /proc/PID/maps ▶ library ▶ probe
//! ```
//! A library is not mapped yet when a process has just started its program: it is looked for again, a few times.

use std::{
    fs::{self, File},
    io,
    os::fd::AsFd as _,
    path::Path,
    time::{Duration, Instant},
};

use ahash::RandomState;
use hashbrown::HashMap;

use super::{
    elf,
    shells::{Program, Shell, Shells},
    users::Users,
};
use crate::{
    capture::files::{FileKey, Mapped, key_of, key_of_file, open_mapped, read_maps},
    ebpf::{bash::BashObject, privileges, uprobe::Attached},
    identity::{cgroup, process::Proc},
};

/// Pauses before a library is looked for again.
const LOOKS: &[Duration] = &[
    Duration::from_millis(2),
    Duration::from_millis(5),
    Duration::from_millis(15),
    Duration::from_millis(50),
    Duration::from_millis(150),
    Duration::from_millis(500),
    Duration::from_secs(2),
];
/// Processes whose library is looked for at a time.
const WAITING_MAX: usize = 1024;
/// How looks at processes went.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Looks {
    allowed: u32,
    refused: u32,
}

/// Finds shells.
pub(super) struct Finder {
    /// Since they were set to zero.
    pub(super) looks: Looks,
    proc: Proc,
    users: Users,
    /// Shells whose library is not found yet: looks so far, and when the next one is due.
    waiting: HashMap<u32, (usize, Instant), RandomState>,
}

/// What became of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// No shell, or gone.
    Nothing,
    /// A shell whose lines are, or will be, seen.
    Shell,
    /// A shell whose lines are not seen, with the reason.
    Blind(String),
}

impl Finder {
    pub(super) fn new(proc: Proc) -> Self {
        Self {
            looks: Looks::default(),
            proc,
            users: Users::default(),
            waiting: HashMap::default(),
        }
    }

    /// All processes.
    pub(super) fn pids(&self) -> impl Iterator<Item = u32> + use<> {
        self.proc.pids()
    }

    /// True if there is a process of this number.
    pub(super) fn is_there(&self, pid: u32) -> bool {
        self.proc.path(pid, "exe").symlink_metadata().is_ok()
    }

    /// When [`Self::look_again`] is due next.
    pub(super) fn next_look(&self) -> Option<Instant> {
        self.waiting.values().map(|(_, at)| *at).min()
    }

    /// Looks at a process that started a program, or was found running.
    pub(super) fn look(&mut self, pid: u32, shells: &mut Shells<Attached>, object: &mut BashObject) -> Found {
        let now = Instant::now();
        let path = self.proc.path(pid, "exe");
        let key = match fs::metadata(&path).and_then(|about| key_of(&about, &path)) {
            Ok(key) => key,
            Err(error) => {
                self.looks.refused += u32::from(error.kind() == io::ErrorKind::PermissionDenied);
                self.forget(pid, shells, now);
                return Found::Nothing;
            }
        };
        self.looks.allowed += 1;
        if shells
            .get(pid)
            .is_some_and(|shell| shell.program == key && shell.reads_in.is_some())
        {
            return Found::Shell;
        }
        let program = match shells.program(&key) {
            Some(program) => program.clone(),
            None => {
                let Ok(file) = File::open(&path) else {
                    return Found::Nothing;
                };
                let program = what_is(&file, is_called_bash(&path));
                shells.learn(key, program.clone());
                program
            }
        };
        if program == Program::Other {
            self.forget(pid, shells, now);
            return Found::Nothing;
        }
        // First of all: the first line may come any moment.
        let probed = match &program {
            Program::Own(returns) => probe(key, returns, || File::open(&path), shells, object),
            _ => Ok(()),
        };
        let shell = Shell {
            program: key,
            reads_in: None,
            pod: cgroup::pod_of_process(&self.proc, pid),
            users: self.users.of(&self.proc, pid),
        };
        if shells.start(pid, shell, now).is_err() {
            return Found::Blind("there are more shells than are followed".to_owned());
        }
        match program {
            Program::Other => Found::Nothing,
            Program::Blind(reason) => Found::Blind(reason),
            Program::Own(_) => match probed {
                Ok(()) => {
                    shells.reads(pid, key);
                    Found::Shell
                }
                Err(reason) => Found::Blind(reason),
            },
            Program::Library => self.look_for_library(pid, shells, object),
        }
    }

    /// Looks again for libraries that were not found.
    pub(super) fn look_again(&mut self, shells: &mut Shells<Attached>, object: &mut BashObject) -> Vec<(u32, Found)> {
        let now = Instant::now();
        let due: Vec<u32> = self
            .waiting
            .iter()
            .filter(|(_, (_, at))| *at <= now)
            .map(|(pid, _)| *pid)
            .collect();
        due.into_iter()
            .map(|pid| (pid, self.look_for_library(pid, shells, object)))
            .collect()
    }

    /// A process is no shell any more.
    pub(super) fn forget(&mut self, pid: u32, shells: &mut Shells<Attached>, now: Instant) {
        self.waiting.remove(&pid);
        shells.end(pid, now);
    }

    fn look_for_library(&mut self, pid: u32, shells: &mut Shells<Attached>, object: &mut BashObject) -> Found {
        match self.library(pid, shells, object) {
            Ok(Some(key)) => {
                self.waiting.remove(&pid);
                shells.reads(pid, key);
                Found::Shell
            }
            Ok(None) => self.wait(pid),
            Err(reason) => {
                self.waiting.remove(&pid);
                Found::Blind(reason)
            }
        }
    }

    fn wait(&mut self, pid: u32) -> Found {
        let looks = self.waiting.get(&pid).map_or(0, |(looks, _)| *looks);
        let Some(pause) = LOOKS.get(looks) else {
            self.waiting.remove(&pid);
            return Found::Blind("its program takes readline from a library, and none is mapped".to_owned());
        };
        if self.waiting.len() >= WAITING_MAX && !self.waiting.contains_key(&pid) {
            return Found::Blind("too many shells start at a time".to_owned());
        }
        self.waiting.insert(pid, (looks + 1, Instant::now() + *pause));
        Found::Shell
    }

    /// Finds the library with `readline` of a process, and makes sure that it has a probe; `None` if there is none mapped.
    fn library(
        &self,
        pid: u32,
        shells: &mut Shells<Attached>,
        object: &mut BashObject,
    ) -> Result<Option<FileKey>, String> {
        let Some(maps) = read_maps(&self.proc.path(pid, "maps")) else {
            return Ok(None);
        };
        let Some(Mapped { range, path, deleted }) = mapped_library(&maps) else {
            return Ok(None);
        };
        let why = match open_mapped(&self.proc, pid, &Mapped { range, path, deleted }) {
            Ok(file) => return library_file(file, shells, object).map(Some),
            Err(error) => error,
        };
        Err(format!(
            "cannot open its library {path}{}: {why}",
            if deleted {
                ", which was removed or replaced; CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN would do, or a new start of the shell"
            } else {
                ""
            }
        ))
    }
}

impl Looks {
    /// What there is to tell. Some hardened process may refuse whoever asks, and is no shell.
    pub(super) fn tell(self) -> Option<&'static str> {
        let many = self.refused > 0 && (!privileges::holds("CAP_SYS_PTRACE") || self.refused > self.allowed);
        many.then_some("processes refused a look at their program; it takes CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH")
    }
}

fn mapped_library(maps: &str) -> Option<Mapped<'_>> {
    maps.lines().find_map(|line| {
        let at = line.find('/')?;
        let (path, deleted) = match line.get(at..)?.strip_suffix(" (deleted)") {
            Some(path) => (path, true),
            None => (line.get(at..)?, false),
        };
        let range = line.split(' ').next()?;
        let name = path.rsplit('/').next()?;
        name.starts_with("libreadline.so")
            .then_some(Mapped { range, path, deleted })
    })
}

fn library_file(file: File, shells: &mut Shells<Attached>, object: &mut BashObject) -> Result<FileKey, String> {
    let about = file.metadata().map_err(|error| error.to_string())?;
    if !about.is_file() {
        return Err("its library is no file".to_owned());
    }
    let key = key_of_file(&about, &file).map_err(|error| error.to_string())?;
    if shells.is_probed(&key) {
        return Ok(key);
    }
    let image = elf::inspect(&file, true).map_err(|error| format!("its library cannot be read: {error}"))?;
    let returns = image.readline.ok_or("its library has no symbol readline")?;
    probe(key, &returns, || Ok(file), shells, object)?;
    Ok(key)
}

/// Makes sure that a file has a probe.
fn probe(
    key: FileKey,
    returns: &[u64],
    open: impl FnOnce() -> io::Result<File>,
    shells: &mut Shells<Attached>,
    object: &mut BashObject,
) -> Result<(), String> {
    if shells.is_probed(&key) {
        return Ok(());
    }
    if !shells.has_room() {
        return Err("there are more programs and libraries with readline than are followed".to_owned());
    }
    let file = open().map_err(|error| format!("its program cannot be opened: {error}"))?;
    let attached = object
        .attach(file.as_fd(), returns)
        .map_err(|error| format!("no probe for its readline: {error:#}"))?;
    shells.probed(key, attached, Instant::now());
    Ok(())
}

fn what_is(file: &File, is_called_bash: bool) -> Program {
    match elf::inspect(file, is_called_bash) {
        Ok(image) if image.is_bash || is_called_bash => match (image.readline, image.imports) {
            (Some(returns), _) => Program::Own(returns),
            (None, true) => Program::Library,
            (None, false) => {
                Program::Blind("its program has no symbol readline: stripped of symbols, or built without".to_owned())
            }
        },
        Ok(_) => Program::Other,
        Err(error) if is_called_bash => Program::Blind(format!("its program cannot be read: {error}")),
        Err(_) => Program::Other,
    }
}

/// What `exe` leads to, by name.
fn is_called_bash(exe: &Path) -> bool {
    let Ok(target) = fs::read_link(exe) else { return false };
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    matches!(name.strip_suffix(" (deleted)").unwrap_or(&name), "bash" | "rbash")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn finds_the_library_among_mappings() {
        let maps = "55d0c0a00000-55d0c0a2d000 r--p 00000000 fe:00 1234                       /usr/bin/bash\n\
                    7f3c5a000000-7f3c5a014000 r--p 00000000 00:2a 99     /usr/lib/x/libreadline.so.8.2\n\
                    7ffd7a5e1000-7ffd7a602000 rw-p 00000000 00:00 0      [stack]\n";
        let found = mapped_library(maps).unwrap();
        assert_eq!(
            (found.range, found.path, found.deleted),
            ("7f3c5a000000-7f3c5a014000", "/usr/lib/x/libreadline.so.8.2", false)
        );
        let gone = maps.replace("so.8.2", "so.8.2 (deleted)");
        let found = mapped_library(&gone).unwrap();
        assert_eq!((found.path, found.deleted), ("/usr/lib/x/libreadline.so.8.2", true));
        assert_eq!(mapped_library("x\n7f-80 r--p 0 0 0 /lib/libc.so.6\n"), None);
    }

    #[test]
    fn tells_bash_by_symbols_and_by_name() {
        let Ok(bash) = File::open("/bin/bash") else {
            println!("SKIPPED: this machine has no bash");
            return;
        };
        assert!(matches!(what_is(&bash, false), Program::Own(_) | Program::Library));
        let own = File::open("/proc/self/exe").unwrap();
        assert_eq!(what_is(&own, false), Program::Other);
        assert!(matches!(what_is(&own, true), Program::Blind(_)));
        let text = File::open("/proc/self/maps").unwrap();
        assert_eq!(what_is(&text, false), Program::Other);
    }
}
