//! Processes as `/proc` shows them.

use std::{
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use records::Str;

/// A `/proc` of the host's pid namespace.
#[derive(Clone, Debug)]
pub struct Proc {
    root: PathBuf,
}

/// A process name as the kernel keeps it, NUL padded.
pub type Comm = [u8; 16];

/// The kernel cuts names to this many bytes.
const COMM_MAX: usize = 15;

impl Proc {
    /// A `/proc` mounted at `root`.
    #[must_use]
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// All process (thread group) ids.
    pub fn pids(&self) -> impl Iterator<Item = u32> + use<> {
        std::fs::read_dir(&self.root)
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
    }

    /// Path of a file of a process.
    #[must_use]
    pub fn path(&self, pid: u32, file: &str) -> PathBuf {
        self.root.join(pid.to_string()).join(file)
    }

    /// Path of a file that belongs to no process, e.g. `sys/kernel/osrelease`.
    #[must_use]
    pub fn path_of(&self, file: &str) -> PathBuf {
        self.root.join(file)
    }

    /// Inode number of the node's network namespace: that of its first process or, where this may not be looked at, the
    /// agent's own, which runs in it.
    #[must_use]
    pub fn node_netns(&self) -> Option<u64> {
        let metadata = std::fs::metadata(self.path(1, "ns/net")).or_else(|error| {
            tracing::debug!(%error, "Cannot look at the network namespace of process 1");
            std::fs::metadata("/proc/self/ns/net")
        });
        metadata.ok().map(|it| it.ino())
    }

    /// Name of a process as the kernel keeps it; `None` if it is gone.
    #[must_use]
    pub fn comm(&self, pid: u32) -> Option<Comm> {
        let mut text = std::fs::read(self.path(pid, "comm")).ok()?;
        if text.last() == Some(&b'\n') {
            text.pop();
        }
        let mut comm = Comm::default();
        for (to, from) in comm.iter_mut().take(COMM_MAX).zip(&text) {
            *to = *from;
        }
        Some(comm)
    }

    /// Full name of a process that was called `comm` when it was seen.
    ///
    /// A name that fills the kernel's 15 bytes is completed from the command line if the process still runs under that
    /// name; otherwise the kernel's name stands.
    #[must_use]
    pub fn name(&self, pid: u32, comm: &Comm) -> Str {
        let short = comm_str(comm);
        if pid != 0
            && short.len() == COMM_MAX
            && self.comm(pid).as_ref() == Some(comm)
            && let Some(full) = self.command_name(pid).filter(|full| full.starts_with(short.as_ref()))
        {
            return full.into();
        }
        short.as_ref().into()
    }

    fn command_name(&self, pid: u32) -> Option<String> {
        let line = std::fs::read(self.path(pid, "cmdline")).ok()?;
        let first = line.split(|b| *b == 0).next()?;
        let first = std::str::from_utf8(first).ok()?;
        Path::new(first).file_name()?.to_str().map(str::to_owned)
    }
}

/// The text of a kernel process name; bytes that are no UTF-8 are replaced.
#[must_use]
pub fn comm_str(comm: &Comm) -> std::borrow::Cow<'_, str> {
    let len = comm.iter().position(|b| *b == 0).unwrap_or(comm.len());
    String::from_utf8_lossy(comm.get(..len).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn comm(text: &str) -> Comm {
        let mut comm = Comm::default();
        comm.iter_mut().zip(text.bytes()).for_each(|(to, from)| *to = from);
        comm
    }

    #[test]
    fn completes_a_cut_name_of_a_living_process() {
        let dir = tempfile::tempdir().unwrap();
        let process = dir.path().join("42");
        std::fs::create_dir(&process).unwrap();
        std::fs::write(process.join("comm"), "a-very-long-pro\n").unwrap();
        std::fs::write(process.join("cmdline"), b"/opt/a-very-long-process-name\0--flag\0").unwrap();
        let proc = Proc::new(dir.path());
        assert_eq!(&*proc.name(42, &comm("a-very-long-pro")), "a-very-long-process-name");
        // Renamed since, or another process under a reused id.
        assert_eq!(&*proc.name(42, &comm("another-name-xx")), "another-name-xx");
        // Gone.
        assert_eq!(&*proc.name(43, &comm("a-very-long-pro")), "a-very-long-pro");
        assert_eq!(proc.pids().collect::<Vec<_>>(), [42]);
    }
}
