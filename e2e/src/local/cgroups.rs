//! cgroups of the local cluster: one directory with the cluster's name in each hierarchy, for cgroup v1, v2 and hybrid.
//!
//! They are also how leftovers are found: whatever a cluster started is in them, however its end came.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use rustix::process::{Pid, Signal};

const ROOT: &str = "/sys/fs/cgroup";
const PATIENCE: Duration = Duration::from_secs(20);

/// Mount points of all hierarchies of this machine.
///
/// # Errors
/// There are none.
pub(super) fn hierarchies() -> anyhow::Result<Vec<PathBuf>> {
    let root = Path::new(ROOT);
    if root.join("cgroup.controllers").exists() {
        return Ok(vec![root.to_owned()]);
    }
    let all: Vec<PathBuf> = fs::read_dir(root)
        .with_context(|| format!("list {ROOT}"))?
        .filter_map(Result::ok)
        // Names such as `cpu` may be links to `cpu,cpuacct`.
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .filter(|path| path.join("cgroup.procs").exists())
        .collect();
    anyhow::ensure!(!all.is_empty(), "no cgroup hierarchy is mounted below {ROOT}");
    Ok(all)
}

/// Makes `ID/NAME` in every hierarchy and `ID/NAME/programs` for its programs, and puts a process into the latter.
///
/// # Errors
/// A directory or setting cannot be written.
pub(super) fn enter(id: &str, name: &str, pid: u32) -> anyhow::Result<()> {
    for hierarchy in hierarchies()? {
        let mut place = hierarchy.clone();
        for part in [id, name, "programs"] {
            // In cgroup v2 children get only the controllers that the parent hands on.
            if let Ok(controllers) = fs::read_to_string(place.join("cgroup.controllers")) {
                for controller in controllers.split_whitespace() {
                    let _ = fs::write(place.join("cgroup.subtree_control"), format!("+{controller}"));
                }
            }
            let parent = place.clone();
            place.push(part);
            make(&place)?;
            // A v1 cpuset starts empty, and takes no process then.
            for file in ["cpuset.cpus", "cpuset.mems"] {
                if let (true, Ok(value)) = (
                    !place.starts_with(format!("{ROOT}/unified")),
                    fs::read_to_string(parent.join(file)),
                ) && !value.trim().is_empty()
                {
                    let _ = fs::write(place.join(file), value);
                }
            }
        }
        fs::write(place.join("cgroup.procs"), pid.to_string())
            .with_context(|| format!("put process {pid} into {}", place.display()))?;
    }
    Ok(())
}

/// Kills every process of the cluster, waits for their end and removes its cgroups. Tells how many processes there were.
///
/// # Errors
/// Something is still there after a while; it is named.
pub(super) fn clear(id: &str) -> anyhow::Result<usize> {
    let places: Vec<PathBuf> = hierarchies()?
        .into_iter()
        .map(|hierarchy| hierarchy.join(id))
        .filter(|place| place.exists())
        .collect();
    let end = Instant::now() + PATIENCE;
    let mut killed = std::collections::BTreeSet::new();
    loop {
        let mut left = 0_usize;
        for pid in places.iter().flat_map(|place| processes(place)) {
            left += 1;
            killed.insert(pid.as_raw_nonzero());
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
        let stubborn: Vec<String> = places.iter().filter_map(|place| remove(place).err()).collect();
        if left == 0 && stubborn.is_empty() {
            return Ok(killed.len());
        }
        anyhow::ensure!(
            Instant::now() < end,
            "{left} processes of {id} do not end, or cgroups cannot be removed: {}",
            stubborn.join(", ")
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn make(place: &Path) -> anyhow::Result<()> {
    match fs::create_dir(place) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(error).with_context(|| format!("make {}", place.display()))
        }
        _ => Ok(()),
    }
}

fn children(place: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(place) else {
        return Vec::new();
    };
    entries
        .filter_map(Result::ok)
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

fn processes(place: &Path) -> Vec<Pid> {
    let mut all: Vec<Pid> = fs::read_to_string(place.join("cgroup.procs"))
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.parse().ok().and_then(Pid::from_raw))
        .collect();
    all.extend(children(place).iter().flat_map(|child| processes(child)));
    all
}

fn remove(place: &Path) -> Result<(), String> {
    for child in children(place) {
        remove(&child)?;
    }
    match fs::remove_dir(place) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(format!("{}: {error}", place.display())),
        _ => Ok(()),
    }
}
