//! Word of new and removed cgroups as the kubelet and the runtime make and remove them.

use std::{
    mem::MaybeUninit,
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use ahash::RandomState;
use hashbrown::HashMap;
use rustix::{
    fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags},
    io::Errno,
};
use tokio::io::unix::AsyncFd;

use super::{
    Uid,
    index::{Found, walk_below},
    pod,
};

/// Directories watched at most; what is beyond waits for the next walk.
const WATCHES_MAX: usize = 32_768;
/// Bytes of events read at once.
const BUFFER: usize = 16 * 1024;

/// What happened to cgroups.
#[derive(Debug, Default)]
pub struct Seen {
    /// Cgroups that were made.
    pub made: Vec<Found>,
    /// Ids of cgroups that are gone.
    pub gone: Vec<u64>,
    /// Events were lost: walk the hierarchy.
    pub overflow: bool,
}

/// A watched directory: its watch, and its cgroup if it is a pod's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Dir {
    watch: i32,
    pod: Option<(u64, Uid)>,
}

/// Watches of the directories that pods' cgroups are made in.
#[derive(Debug)]
pub struct Watch {
    inotify: AsyncFd<OwnedFd>,
    dirs: HashMap<PathBuf, Dir, RandomState>,
    paths: HashMap<i32, PathBuf, RandomState>,
    /// Directories that could not be watched.
    refused: u64,
}

impl Watch {
    /// Watches nothing yet. Takes a tokio runtime.
    ///
    /// # Errors
    /// What the system call said, such as too many watchers of this user.
    pub fn new() -> std::io::Result<Self> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        Ok(Self {
            // SAFETY: an `OwnedFd` is one open descriptor for as long as it lives.
            inotify: unsafe { AsyncFd::register(inotify) }?,
            dirs: HashMap::default(),
            paths: HashMap::default(),
            refused: 0,
        })
    }

    /// Directories that could not be watched so far.
    #[must_use]
    pub const fn refused(&self) -> u64 {
        self.refused
    }

    /// Watches the directories of a walk that are not watched yet, and those only.
    pub fn keep(&mut self, found: &[Found]) {
        let gone: Vec<PathBuf> = {
            let there: hashbrown::HashSet<&Path, RandomState> = found.iter().map(|it| it.path.as_path()).collect();
            let known = self.dirs.keys().filter(|path| !there.contains(path.as_path()));
            known.cloned().collect()
        };
        for path in gone {
            self.forget(&path);
        }
        self.add(found);
    }

    fn add(&mut self, found: &[Found]) {
        for Found { path, pod } in found {
            let known = self.dirs.get(path);
            if known.is_some_and(|known| known.pod == *pod && self.paths.contains_key(&known.watch)) {
                continue;
            }
            self.forget(path);
            let flags = WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::ONLYDIR;
            let watched = if self.dirs.len() < WATCHES_MAX {
                inotify::add_watch(&self.inotify, path, flags)
            } else {
                Err(Errno::NOSPC)
            };
            match watched {
                Ok(watch) => {
                    self.paths.insert(watch, path.clone());
                    self.dirs.insert(path.clone(), Dir { watch, pod: *pod });
                }
                // Removed meanwhile.
                Err(Errno::NOENT) => {}
                Err(error) => {
                    if self.refused == 0 {
                        tracing::warn!(path = %path.display(), %error, "Cannot watch a pod's cgroups; new ones are found by the scan, some seconds later. Raise fs.inotify.max_user_watches");
                    }
                    self.refused += 1;
                }
            }
        }
    }

    /// Ends the watch of a directory; its cgroup, if it was watched.
    fn forget(&mut self, path: &Path) -> Option<(u64, Uid)> {
        let dir = self.dirs.remove(path)?;
        if self.paths.remove(&dir.watch).is_some() {
            // The watch would keep a removed directory in memory.
            let _ = inotify::remove_watch(&self.inotify, dir.watch);
        }
        dir.pod
    }

    /// What happened next. Dropping the future loses nothing.
    ///
    /// # Errors
    /// If the events cannot be read.
    pub async fn next(&mut self) -> std::io::Result<Seen> {
        loop {
            let events = {
                let mut ready = self.inotify.readable().await?;
                match ready.try_io(|fd| read(fd.get_ref())) {
                    Ok(events) => events?,
                    // Not ready after all.
                    Err(_) => continue,
                }
            };
            let mut seen = Seen::default();
            for event in events {
                self.take(event, &mut seen);
            }
            return Ok(seen);
        }
    }

    fn take(&mut self, event: Event, seen: &mut Seen) {
        seen.overflow |= event.flags.contains(ReadFlags::QUEUE_OVERFLOW);
        if event.flags.contains(ReadFlags::IGNORED) {
            // That the directory is gone is told by its parent, now or shortly.
            self.paths.remove(&event.wd);
            return;
        }
        let Some(parent) = self.paths.get(&event.wd) else {
            return;
        };
        let within = self.dirs.get(parent).and_then(|dir| dir.pod).map(|(_, uid)| uid);
        let path = parent.join(&event.name);
        if event.flags.contains(ReadFlags::DELETE) {
            seen.gone.extend(self.forget(&path).map(|(id, _)| id));
        } else if event.flags.contains(ReadFlags::CREATE | ReadFlags::ISDIR) {
            let within = pod(&event.name).or(within);
            let Ok(metadata) = std::fs::metadata(&path) else {
                return;
            };
            let pod = within.map(|uid| (metadata.ino(), uid));
            // What was made in it before the watch is found by the walk, what is made after it by the watch.
            for found in [
                vec![Found {
                    path: path.clone(),
                    pod,
                }],
                walk_below(&path, within),
            ] {
                self.add(&found);
                seen.made.extend(found);
            }
        }
    }
}

struct Event {
    wd: i32,
    flags: ReadFlags,
    name: String,
}

fn read(inotify: &OwnedFd) -> std::io::Result<Vec<Event>> {
    let mut buffer = [MaybeUninit::uninit(); BUFFER];
    let mut reader = inotify::Reader::new(inotify, &mut buffer);
    let mut events = Vec::new();
    loop {
        match reader.next() {
            Ok(event) => events.push(Event {
                wd: event.wd(),
                flags: event.events(),
                name: event
                    .file_name()
                    .map(|name| name.to_string_lossy().into_owned())
                    .unwrap_or_default(),
            }),
            Err(Errno::INTR) => {}
            Err(Errno::WOULDBLOCK) if !events.is_empty() => return Ok(events),
            Err(error) => return Err(error.into()),
        }
        if reader.is_buffer_empty() && !events.is_empty() {
            return Ok(events);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::{fs, time::Duration};

    use super::{super::walk, *};

    const UID: &str = "7f0c1a52-3d0b-4f5e-9a51-6a2f1b7c8d90";

    async fn next(watch: &mut Watch) -> Seen {
        tokio::time::timeout(Duration::from_secs(10), watch.next())
            .await
            .unwrap()
            .unwrap()
    }

    #[tokio::test]
    async fn pods_and_containers_are_seen_as_they_come_and_go() {
        let dir = tempfile::tempdir().unwrap();
        let kubepods = dir.path().join("kubepods/burstable");
        fs::create_dir_all(&kubepods).unwrap();
        fs::create_dir_all(dir.path().join("system.slice")).unwrap();
        let mut watch = Watch::new().unwrap();
        let found = walk(dir.path());
        assert_eq!(found.len(), 2, "kubepods and what is in it: {found:?}");
        watch.keep(&found);
        // A class of pods that had none, with a pod already in it.
        let pod = dir.path().join(format!("kubepods/besteffort/pod{UID}"));
        fs::create_dir_all(&pod).unwrap();
        let id = fs::metadata(&pod).unwrap().ino();
        let mut made = Vec::new();
        while made.is_empty() {
            made.extend(next(&mut watch).await.made.into_iter().filter_map(|it| it.pod));
        }
        assert!(made.contains(&(id, Uid::parse(UID).unwrap())), "{made:?}");
        let container = pod.join("c1/nested");
        fs::create_dir_all(&container).unwrap();
        let id = fs::metadata(&container).unwrap().ino();
        let mut made = Vec::new();
        while !made.contains(&id) {
            made.extend(
                next(&mut watch)
                    .await
                    .made
                    .into_iter()
                    .filter_map(|it| it.pod)
                    .map(|it| it.0),
            );
        }
        fs::remove_dir(&container).unwrap();
        let mut gone = Vec::new();
        while gone.is_empty() {
            gone.extend(next(&mut watch).await.gone);
        }
        assert_eq!(gone, [id]);
        assert_eq!(watch.refused(), 0);
    }
}
