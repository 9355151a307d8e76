//! What every role does at its start and its end.

use std::{
    fs::File,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use anyhow::Context as _;

use super::{options::Common, report::Recorder, sys};

/// Names the process, enters its network namespace, installs signal handlers and the time limit.
///
/// # Errors
/// The namespace cannot be opened or entered.
pub fn start(common: &Common) -> anyhow::Result<()> {
    sys::set_name(&common.name).with_context(|| format!("naming the process `{}`", common.name))?;
    sys::install_signals(common.max_seconds).context("installing signal handlers")?;
    if let Some(netns) = &common.netns {
        let path = netns_path(netns);
        let file = File::open(&path).with_context(|| format!("opening network namespace {}", path.display()))?;
        sys::enter_netns(&file)
            .with_context(|| format!("entering network namespace {} (needs root)", path.display()))?;
    }
    Ok(())
}

/// The file of a namespace given as a path or a process id.
#[must_use]
pub fn netns_path(netns: &str) -> PathBuf {
    if netns.bytes().all(|byte| byte.is_ascii_digit()) {
        Path::new("/proc").join(netns).join("ns/net")
    } else {
        PathBuf::from(netns)
    }
}

/// Tells the driver that the role serves now.
///
/// # Errors
/// Standard output is closed.
pub fn ready() -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "ready")?;
    out.flush()
}

/// Writes the report of this process.
///
/// # Errors
/// The report file cannot be written.
pub fn finish(common: &Common, role: &str, recorder: &mut Recorder) -> anyhow::Result<()> {
    if sys::timed_out() {
        recorder.error("role", &io::Error::from(io::ErrorKind::TimedOut));
    }
    recorder
        .report(&common.name, role, &common.group)
        .append(&common.report)
        .with_context(|| format!("writing the report to {}", common.report.display()))
}

/// Runs `work` for `total` items in this process, or in short-lived children that take `per_process` each.
///
/// # Errors
/// What `work` returns in this process; a child's failure is its exit code, and an error here.
pub fn in_portions(
    total: u64,
    per_process: u64,
    mut work: impl FnMut(u64) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    if per_process == 0 {
        return work(total);
    }
    let mut left = total;
    let mut failed = 0_u64;
    while left > 0 && !sys::stopping() {
        let portion = left.min(per_process);
        match sys::fork().context("forking a short-lived process")? {
            sys::Fork::Child => sys::exit_now(i32::from(work(portion).is_err())),
            sys::Fork::Parent(_) => {
                if sys::wait_any(true).is_none_or(|(_, status)| status != 0) {
                    failed += 1;
                }
            }
        }
        left -= portion;
    }
    anyhow::ensure!(failed == 0, "{failed} short-lived processes failed");
    Ok(())
}
