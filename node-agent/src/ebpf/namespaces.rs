//! Network namespaces of the machine's processes, and work done inside each. Entry: [`in_each_new`].

use std::{
    fs::{self, File},
    io,
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
};

use ahash::RandomState;
use anyhow::Context as _;
use hashbrown::HashSet;

use crate::identity::process::Proc;

/// Inode numbers of namespaces that the work was done in.
pub type Done = HashSet<u64, RandomState>;

/// Does `work`, which is given the inode number, in each network namespace that a process of `proc` is in and that is not among
/// `done`, on a thread that enters it. Namespaces that cannot be looked at or entered are left out: some process may have ended,
/// some refuse whoever asks.
///
/// # Errors
/// What `work` said last in a namespace; if none could be entered (needs `CAP_SYS_ADMIN`).
pub fn in_each_new(
    proc: &Proc,
    done: &mut Done,
    work: impl Fn(u64) -> anyhow::Result<()> + Sync,
) -> anyhow::Result<()> {
    let own = fs::metadata("/proc/thread-self/ns/net")
        .context("cannot look at the agent's network namespace")?
        .ino();
    if !done.contains(&own) {
        work(own)?;
        done.insert(own);
    }
    let mut problem = None;
    for pid in proc.pids() {
        let path = proc.path(pid, "ns/net");
        let Ok(metadata) = fs::metadata(&path) else { continue };
        if done.contains(&metadata.ino()) {
            continue;
        }
        let Ok(namespace) = File::open(&path) else { continue };
        // The process may have gone, and another be there.
        let Ok(inode) = namespace.metadata().map(|metadata| metadata.ino()) else {
            continue;
        };
        if done.contains(&inode) {
            continue;
        }
        match inside(&namespace, || work(inode)) {
            Ok(()) => {
                done.insert(inode);
            }
            Err(error) => {
                problem = Some(error.context(format!("in the network namespace of process {pid}")));
                // Nor could others be entered.
                break;
            }
        }
    }
    problem.map_or(Ok(()), Err)
}

fn inside(namespace: &File, work: impl Fn() -> anyhow::Result<()> + Sync) -> anyhow::Result<()> {
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
