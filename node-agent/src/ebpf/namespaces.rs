//! Network namespaces of the machine's processes, and work done inside each. Entry: [`in_each`].

use std::{
    fs::{self, File},
    io,
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
};

use ahash::RandomState;
use anyhow::Context as _;
use hashbrown::HashSet;

use super::privileges;
use crate::identity::process::Proc;

/// Does `work` once in each network namespace that a process of `proc` is in, on a thread that enters it; gives their number.
///
/// Some hardened process may refuse whoever asks; its namespace is mostly that of others too.
///
/// # Errors
/// What `work` said; if a namespace cannot be entered (needs `CAP_SYS_ADMIN`), or processes do not say which is theirs (needs
/// `CAP_SYS_PTRACE`).
pub fn in_each(proc: &Proc, work: impl Fn() -> anyhow::Result<()> + Sync) -> anyhow::Result<usize> {
    let own = fs::metadata("/proc/thread-self/ns/net")
        .context("cannot look at the agent's network namespace")?
        .ino();
    work()?;
    let mut done: HashSet<u64, RandomState> = HashSet::from_iter([own]);
    let (mut allowed, mut refused) = (0u32, 0u32);
    for pid in proc.pids() {
        let path = proc.path(pid, "ns/net");
        let opened = fs::metadata(&path).and_then(|metadata| {
            if done.contains(&metadata.ino()) {
                return Ok(None);
            }
            let namespace = File::open(&path)?;
            let inode = namespace.metadata()?.ino();
            Ok(Some((namespace, inode)))
        });
        match opened {
            Ok(Some((namespace, inode))) if !done.contains(&inode) => {
                inside(&namespace, &work).with_context(|| format!("in the network namespace of process {pid}"))?;
                done.insert(inode);
                allowed += 1;
            }
            Ok(_) => allowed += 1,
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => refused += 1,
            // It is gone, and kernel threads have none.
            Err(error) if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH) => {}
            Err(error) => return Err(error).with_context(|| format!("cannot look at {}", path.display())),
        }
    }
    anyhow::ensure!(
        refused == 0 || (privileges::holds("CAP_SYS_PTRACE") && refused <= allowed),
        "{refused} processes refuse to say which network namespace is theirs; it takes CAP_SYS_PTRACE"
    );
    Ok(done.len())
}

fn inside(namespace: &File, work: &(impl Fn() -> anyhow::Result<()> + Sync)) -> anyhow::Result<()> {
    let enter = || {
        // SAFETY: no pointers; only this thread changes its namespace, and it ends.
        if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
            return Err(io::Error::last_os_error()).context("cannot enter it (setns)");
        }
        work()
    };
    std::thread::scope(|scope| {
        let entered = std::thread::Builder::new()
            .name("netns".into())
            .spawn_scoped(scope, enter)?;
        entered
            .join()
            .unwrap_or_else(|_| anyhow::bail!("the thread in the namespace panicked"))
    })
}
