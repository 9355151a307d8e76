//! Brings image archives into a node's containerd: those that are there when it starts, and those that come or change later.
//!
//! For each archive that is in, a file of the same name in the `done` directory holds the archive's [`stamp`].

use std::{
    fs, io,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, UNIX_EPOCH},
};

use anyhow::Context as _;

const POLL: Duration = Duration::from_millis(300);

/// Watches for ever.
///
/// # Errors
/// The directory cannot be read.
pub fn run(archives: &Path, done: &Path) -> anyhow::Result<()> {
    loop {
        for entry in fs::read_dir(archives).with_context(|| format!("list {}", archives.display()))? {
            let path = entry?.path();
            let (Some(name), true) = (path.file_name(), path.extension().is_some_and(|kind| kind == "tar")) else {
                continue;
            };
            let Ok(stamp) = stamp(&path) else {
                continue;
            };
            let marker = done.join(name);
            if fs::read_to_string(&marker).is_ok_and(|text| text == stamp) {
                continue;
            }
            match import(&path) {
                Ok(()) => fs::write(&marker, stamp).with_context(|| format!("write {}", marker.display()))?,
                // containerd may not be up yet.
                Err(error) => eprintln!("{error:#}"),
            }
        }
        std::thread::sleep(POLL);
    }
}

/// What changes when an archive is replaced.
///
/// # Errors
/// There is no such file.
pub fn stamp(archive: &Path) -> io::Result<String> {
    let metadata = fs::metadata(archive)?;
    let age = metadata.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok(format!("{} bytes, {} ns", metadata.len(), age.as_nanos()))
}

fn import(archive: &Path) -> anyhow::Result<()> {
    let output = Command::new("ctr")
        .args(["--namespace", "k8s.io", "images", "import"])
        .arg(archive)
        .stdin(Stdio::null())
        .output()
        .context("start ctr (package containerd)")?;
    anyhow::ensure!(
        output.status.success(),
        "importing {}: {}",
        archive.display(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}
