//! Keeps the index of cgroups like the cgroup file system: by its events at once, and by a walk every few seconds.

use std::{
    future,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use ahash::RandomState;
use hashbrown::HashMap;
use tokio::time::{self, MissedTickBehavior};

use super::names::{State, now_ns};
use crate::identity::cgroup::{self, Seen, Watch, walk};

/// How often the hierarchy is walked, and what ended long ago is forgotten.
const WALK: Duration = Duration::from_secs(5);
/// How often the processes of a new pod are looked for, to learn its network namespace.
const LOOK: Duration = Duration::from_millis(50);
/// How long they are; then the walks go on with it.
const LOOKS: u32 = 100;

pub(super) async fn follow(state: &Arc<State>) {
    let mut watch = Watch::new()
        .inspect_err(|error| {
            state.unwatched.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(%error, "Cannot watch cgroups; new pods are found by the walk, every 5 s. Raise fs.inotify.max_user_instances");
        })
        .ok();
    let mut walks = time::interval(WALK);
    walks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut looks = time::interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut left = 0;
    loop {
        tokio::select! {
            _ = walks.tick() => {
                walk_all(state, watch.as_mut()).await;
                state.store.write().expire(now_ns());
                learn_namespaces(state);
            }
            seen = next(&mut watch) => {
                let Some(seen) = seen else { continue };
                if seen.overflow {
                    walks.reset_immediately();
                }
                if take(state, seen) {
                    left = LOOKS;
                }
                let unwatched = watch.as_ref().map_or(0, Watch::refused);
                state.unwatched.fetch_max(unwatched, Ordering::Relaxed);
            }
            _ = looks.tick(), if left > 0 => {
                left = if learn_namespaces(state) { 0 } else { left - 1 };
            }
        }
    }
}

/// What the watch sees next; for ever nothing without a watch.
async fn next(watch: &mut Option<Watch>) -> Option<Seen> {
    let Some(watching) = watch else {
        return future::pending().await;
    };
    match watching.next().await {
        Ok(seen) => Some(seen),
        Err(error) => {
            tracing::warn!(%error, "Watch of the cgroups ended; new pods are found by the walk, every 5 s");
            *watch = None;
            None
        }
    }
}

async fn walk_all(state: &Arc<State>, watch: Option<&mut Watch>) {
    let root = state.root.clone();
    // The walk reads directories; it ends by itself if this future is dropped.
    let found = match tokio::task::spawn_blocking(move || walk(&root)).await {
        Ok(found) => found,
        Err(error) => {
            tracing::error!(%error, "Walk of the cgroups failed; the next one tries again");
            return;
        }
    };
    if let Some(watch) = watch {
        watch.keep(&found);
    }
    let change = state.cgroups.write().replace(found, Instant::now());
    if change.came + change.went > 0 {
        state.changed();
    }
}

/// Takes in events; true if a cgroup is new.
fn take(state: &State, seen: Seen) -> bool {
    let mut index = state.cgroups.write();
    let now = Instant::now();
    let went = seen.gone.into_iter().filter(|id| index.remove(*id, now)).count();
    let came = index.add(seen.made);
    drop(index);
    if came + went > 0 {
        state.changed();
    }
    came > 0
}

/// Looks for the network namespaces of pods that have none yet; true if none is left to look for.
fn learn_namespaces(state: &State) -> bool {
    let places = {
        let index = state.cgroups.read();
        let wanted = index.without_netns();
        if wanted.is_empty() {
            return true;
        }
        index.places(|uid| wanted.contains(&uid))
    };
    let mut by_pod: HashMap<_, Vec<_>, RandomState> = HashMap::default();
    for (_, uid, path) in places {
        by_pod.entry(uid).or_default().push(path);
    }
    let (mut learned, mut all) = (false, true);
    for (uid, paths) in by_pod {
        if state.store.read().in_host_network(uid) {
            state.cgroups.write().set_host_network(uid);
            continue;
        }
        let found = cgroup::namespaces_in(&paths, &state.proc, state.host_netns);
        all &= !found.is_empty();
        let mut index = state.cgroups.write();
        for inode in found {
            learned |= index.add_netns(uid, inode);
        }
    }
    if learned {
        state.changed();
    }
    all
}
