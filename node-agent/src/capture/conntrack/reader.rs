//! The thread that reads: subscribes, asks for what is there, finds network namespaces, and keeps the table.
//!
//! ```text
//! nf_conntrack there? ▶ subscribe ▶ dump own namespace ▶ loop: events ▶ table
//!         ▲                                                    every 2 s: look for namespaces ▶ number, dump
//!         └────────────── 30 s after a failure                 events lost: dump all anew
//! ```

use std::{
    fs::{self, File},
    io::{self, BufRead as _, BufReader},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use ahash::RandomState;
use anyhow::Context as _;
use hashbrown::HashSet;
use tokio::sync::watch;

use super::{
    CONNTRACK, ConntrackConfig, Shared,
    limits::Limits,
    message::{Entry, Item, items},
    metrics::HowLabel,
    socket::{self, Events, NsidEvents, Nsids, READ, Read},
    spaces::{OWN, Spaces},
    table::Space,
    text,
};
use crate::{
    ebpf::{capability::Capabilities, privileges, sys::monotonic_ns},
    identity::process::Proc,
};

/// Pause before a failed start is tried again.
const RETRY: Duration = Duration::from_secs(30);
/// Pause between looks for namespaces.
const LOOK: Duration = Duration::from_secs(2);
/// The shortest one, when one was heard of that is not known.
const LOOK_SOON: Duration = Duration::from_millis(200);
/// Pause after events were read.
const PAUSE: Duration = Duration::from_millis(10);
/// Pause between dumps of everything, when events are lost.
const DUMP_AGAIN: Duration = Duration::from_secs(5);
/// Dumps of everything: kernels do not tell of the end of what is older than the subscription.
const DUMP_ANYWAY: Duration = Duration::from_secs(600);
/// Connections written to the table at a time.
const BATCH: usize = 256;
/// Datagrams read before other things have their turn.
const TURN: usize = 65_536;

pub(super) struct Reader {
    shared: Arc<Shared>,
    proc: Proc,
    tell: watch::Sender<Capabilities>,
    buffer: Vec<u8>,
    spaces: Spaces,
    node_inode: Option<u32>,
    limits: Limits,
}

/// What is read from.
struct Sources {
    events: Events,
    /// Of other namespaces.
    others: Option<(Nsids, NsidEvents)>,
}

impl Reader {
    pub(super) fn new(shared: Arc<Shared>, config: &ConntrackConfig, tell: watch::Sender<Capabilities>) -> Self {
        Self {
            shared,
            proc: Proc::new(&config.proc),
            tell,
            buffer: vec![0; READ],
            spaces: Spaces::default(),
            node_inode: None,
            limits: Limits::default(),
        }
    }

    pub(super) fn run(mut self) {
        while !self.is_stopped() {
            match self.follow() {
                Ok(()) => break,
                Err(error) => {
                    let reason = crate::agent::one_line(&error);
                    tracing::debug!(reason, "Connection tracking cannot be read");
                    let mut capabilities = Capabilities::default();
                    capabilities.off(CONNTRACK, reason);
                    self.tell(capabilities);
                    self.forget();
                    self.rest(RETRY);
                }
            }
        }
        self.forget();
        self.shared.fence.lock().ended = true;
        self.shared.caught_up.notify_all();
    }

    fn is_stopped(&self) -> bool {
        self.shared.stop.load(Ordering::Acquire)
    }

    /// Reads until stopped.
    fn follow(&mut self) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.proc.path_of("sys/net/netfilter/nf_conntrack_max").exists(),
            "the kernel does not track connections: nf_conntrack is not loaded"
        );
        self.limits = Limits::default();
        let sources = self.subscribe()?;
        let own = fs::metadata("/proc/thread-self/ns/net").context("cannot look at the agent's network namespace")?;
        self.spaces = Spaces::new(inode_of(&own));
        self.node_inode = self.proc.node_netns().and_then(|inode| u32::try_from(inode).ok());
        self.publish();
        self.dump_own().context("cannot ask for tracked connections")?;
        self.look(&sources, false);
        self.report();
        tracing::info!(
            namespaces = self.spaces.len(),
            translations = self.shared.known.read().table.len(),
            "Follows connection tracking"
        );
        let mut looked = Instant::now();
        let (mut dumped, mut dump) = (looked, looked + DUMP_ANYWAY);
        while !self.is_stopped() {
            let look = looked + if self.spaces.wants_a_look() { LOOK_SOON } else { LOOK };
            wait(&sources, &self.shared.wake, look.min(dump));
            let asked = self.shared.fence.lock().asked;
            drain(&self.shared.wake);
            self.read_numbers(&sources);
            let before = self.shared.metrics.overruns.get();
            let busy = self.read_events(&sources.events)?;
            if self.shared.metrics.overruns.get() != before {
                dump = dump.min(dumped + DUMP_AGAIN);
            }
            let now = Instant::now();
            if now >= dump {
                let result = self.dump_own();
                self.look(&sources, true);
                self.read_events(&sources.events)?;
                looked = Instant::now();
                (dumped, dump) = (looked, looked + DUMP_ANYWAY);
                if let Err(error) = result {
                    tracing::warn!(%error, "Asking for tracked connections failed; trying again in {DUMP_AGAIN:?}");
                    dump = dumped + DUMP_AGAIN;
                }
                self.report();
            } else if now >= looked + if self.spaces.wants_a_look() { LOOK_SOON } else { LOOK } {
                self.look(&sources, false);
                looked = Instant::now();
                self.report();
            }
            self.expire();
            self.shared.fence.lock().reached = asked;
            self.shared.caught_up.notify_all();
            if busy {
                // Many at a time cost less; who asks is answered at once.
                poll(&[self.shared.wake.as_raw_fd()], now + PAUSE);
            }
        }
        Ok(())
    }

    fn subscribe(&mut self) -> anyhow::Result<Sources> {
        let (events, everywhere) =
            Events::open().context("cannot subscribe to ctnetlink's events, which takes CAP_NET_ADMIN")?;
        let others = everywhere
            .map_err(|error| format!("it takes CAP_NET_BROADCAST: {error}"))
            .and_then(|()| {
                let numbers = Nsids::open().and_then(|nsids| Ok((nsids, NsidEvents::open()?)));
                numbers.map_err(|error| format!("rtnetlink: {error}"))
            });
        let others = others.map_err(|reason| self.limits.deaf = Some(reason)).ok();
        Ok(Sources { events, others })
    }

    /// Takes what there is; true if there was some.
    fn read_events(&mut self, events: &Events) -> anyhow::Result<bool> {
        let mut batch = Vec::with_capacity(BATCH);
        let mut some = false;
        for _ in 0..TURN {
            match events
                .read(&mut self.buffer)
                .context("cannot read ctnetlink's events")?
            {
                Read::Nothing => break,
                Read::Overrun => drop(self.shared.metrics.overruns.inc()),
                Read::Datagram(length, from) => {
                    some = true;
                    let space = self.spaces.of(from);
                    for item in items(self.buffer.get(..length).unwrap_or_default()) {
                        match (space, item) {
                            (_, Item::Malformed) => drop(self.shared.metrics.malformed.inc()),
                            (Some(space), item @ (Item::There(_) | Item::Gone(_))) => batch.push((space, item)),
                            _ => {}
                        }
                    }
                }
            }
            if batch.len() >= BATCH {
                self.apply(&mut batch);
            }
        }
        self.apply(&mut batch);
        Ok(some)
    }

    fn apply(&self, batch: &mut Vec<(Space, Item)>) {
        if batch.is_empty() {
            return;
        }
        self.shared.metrics.events.inc_by(batch.len() as u64);
        let now = monotonic_ns();
        let mut known = self.shared.known.write();
        let node = known.node;
        for (space, item) in batch.drain(..) {
            match item {
                Item::There(entry) => known.table.there(space, &entry, node != Some(space), now),
                Item::Gone(entry) => known.table.gone(space, &entry, now),
                _ => {}
            }
        }
    }

    /// Takes over which namespaces went.
    fn read_numbers(&mut self, sources: &Sources) {
        let Some((_, changes)) = &sources.others else { return };
        let now = monotonic_ns();
        let gone: Vec<Space> = match changes.changes(&mut self.buffer) {
            Ok(changes) => {
                let mut take = |(nsid, given)| {
                    if given {
                        self.spaces.numbered(nsid);
                        return None;
                    }
                    self.spaces.gone(nsid, now)
                };
                changes.into_iter().filter_map(&mut take).collect()
            }
            // Which ones is not known: all are found anew.
            Err(error) => {
                tracing::warn!(%error, "Lost track of network namespaces; looking for all of them again");
                self.spaces.all_gone(now)
            }
        };
        let mut known = self.shared.known.write();
        for space in gone {
            known.table.all_gone(space, now);
        }
    }

    /// Looks for the namespaces of all processes: those that are new get a number and are dumped, or all with `again`.
    fn look(&mut self, sources: &Sources, again: bool) {
        let Some((nsids, _)) = &sources.others else { return };
        let mut seen: HashSet<u32, RandomState> = HashSet::default();
        let mut limits = std::mem::take(&mut self.limits);
        (limits.crowded, limits.unnumbered) = (false, None);
        let (mut allowed, mut refused) = (0u32, 0u32);
        if again {
            limits.undumped = None;
        }
        for pid in self.proc.pids() {
            let path = self.proc.path(pid, "ns/net");
            let inode = match fs::metadata(&path) {
                Ok(metadata) => {
                    allowed += 1;
                    inode_of(&metadata)
                }
                Err(error) => {
                    refused += u32::from(error.kind() == io::ErrorKind::PermissionDenied);
                    continue;
                }
            };
            if !seen.insert(inode) {
                continue;
            }
            let known = self.spaces.live(inode);
            if known == Some(OWN) || known.is_some() && !again {
                continue;
            }
            if known.is_none() && self.spaces.is_full() {
                limits.crowded = true;
                continue;
            }
            let Some(namespace) = File::open(&path).ok().filter(|file| is_inode(file, inode)) else {
                continue;
            };
            let space = match known {
                Some(space) => space,
                None => match nsids.number(&namespace) {
                    Ok(nsid) => self.enter(inode, nsid),
                    Err(error) => {
                        limits.unnumbered = Some(error.to_string());
                        continue;
                    }
                },
            };
            if let Err(error) = self.dump_other(space, &namespace, pid, &mut limits) {
                if fs::metadata(&path).is_ok_and(|metadata| inode_of(&metadata) == inode) {
                    limits.undumped = Some(error.to_string());
                } else if known.is_none() {
                    // The process went meanwhile; another may be there.
                    self.spaces.unfound(space);
                }
            }
        }
        // Some hardened process may refuse whoever asks; its namespace is mostly that of others too.
        limits.refused = refused > 0 && (!privileges::holds("CAP_SYS_PTRACE") || refused > allowed);
        self.limits = limits;
        self.spaces.looked();
        self.publish();
    }

    fn enter(&mut self, inode: u32, nsid: i32) -> Space {
        let (space, before) = self.spaces.found(inode, nsid);
        if let Some(before) = before {
            self.shared.known.write().table.all_gone(before, monotonic_ns());
        }
        self.publish();
        space
    }

    fn dump_own(&mut self) -> io::Result<()> {
        let socket = socket::here()?;
        self.dump(OWN, &socket)
    }

    /// By a socket in the namespace or, without the right to enter it, by the text in `/proc`.
    fn dump_other(&mut self, space: Space, namespace: &File, pid: u32, limits: &mut Limits) -> io::Result<()> {
        if !limits.locked_out {
            match socket::inside(namespace) {
                Ok(socket) => return self.dump(space, &socket),
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => limits.locked_out = true,
                Err(error) => return Err(error),
            }
        }
        let table = File::open(self.proc.path(pid, "net/nf_conntrack"));
        self.dumping(space, |_, take| {
            for line in BufReader::new(table?).lines() {
                match text::entry(&line?) {
                    Ok(Some(entry)) => take(Item::There(entry)),
                    Ok(None) => {}
                    Err(text::BadLine) => take(Item::Malformed),
                }
            }
            Ok(())
        })
    }

    fn dump(&mut self, space: Space, socket: &OwnedFd) -> io::Result<()> {
        self.dumping(space, |buffer, take| socket::dump(socket, buffer, take))
    }

    /// Writes what a dump finds. After one that failed half-way nothing is taken for ended.
    fn dumping(
        &mut self,
        space: Space,
        dump: impl FnOnce(&mut [u8], &mut dyn FnMut(Item)) -> io::Result<()>,
    ) -> io::Result<()> {
        let number = self.shared.known.write().table.dump_begins();
        let mut batch: Vec<Entry> = Vec::with_capacity(BATCH);
        let shared = &self.shared;
        let write = |batch: &mut Vec<Entry>| {
            let now = monotonic_ns();
            let mut known = shared.known.write();
            let sources = known.node != Some(space);
            for entry in batch.drain(..) {
                known.table.there(space, &entry, sources, now);
            }
        };
        let result = dump(&mut self.buffer, &mut |item| match item {
            Item::There(entry) => {
                batch.push(entry);
                if batch.len() >= BATCH {
                    write(&mut batch);
                }
            }
            Item::Malformed => drop(shared.metrics.malformed.inc()),
            _ => {}
        });
        write(&mut batch);
        if result.is_ok() {
            shared.known.write().table.dumped(space, number, monotonic_ns());
        }
        let result_label = if result.is_ok() { "done" } else { "failed" };
        shared
            .metrics
            .dumps
            .get_or_create(&HowLabel { result: result_label })
            .inc();
        result
    }

    /// Lets captures find namespaces by inode number.
    fn publish(&self) {
        let mut known = self.shared.known.write();
        known.spaces.clone_from(self.spaces.by_inode());
        known.node = self.node_inode.and_then(|inode| self.spaces.of_inode(inode));
    }

    fn expire(&mut self) {
        let now = monotonic_ns();
        if self.spaces.expire(now) {
            self.publish();
        }
        let mut known = self.shared.known.write();
        known.table.expire(now);
        let metrics = &self.shared.metrics;
        metrics.refused.inc_by(known.table.take_refused());
        let number = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        metrics.entries.set(number(known.table.len()));
        metrics.namespaces.set(number(self.spaces.len()));
    }

    fn report(&mut self) {
        self.limits.node_unknown = self
            .node_inode
            .is_none_or(|inode| self.spaces.of_inode(inode).is_none());
        self.limits.silent = fs::read_to_string(self.proc.path_of("sys/net/netfilter/nf_conntrack_events"))
            .is_ok_and(|value| value.trim() == "0");
        self.tell(self.limits.capabilities());
    }

    fn tell(&self, capabilities: Capabilities) {
        self.tell.send_if_modified(|told| {
            let changed = told.features != capabilities.features;
            *told = capabilities;
            changed
        });
    }

    /// Nothing is known any more.
    fn forget(&mut self) {
        let mut known = self.shared.known.write();
        let now = monotonic_ns();
        for space in std::mem::take(&mut known.spaces).into_values() {
            known.table.all_gone(space, now);
        }
        known.node = None;
        known.table.expire(u64::MAX);
    }

    /// Sleeps, but answers captures that wait.
    fn rest(&self, pause: Duration) {
        let until = Instant::now() + pause;
        while Instant::now() < until && !self.is_stopped() {
            poll(&[self.shared.wake.as_raw_fd()], until);
            drain(&self.shared.wake);
            let mut fence = self.shared.fence.lock();
            fence.reached = fence.asked;
            self.shared.caught_up.notify_all();
        }
    }
}

fn wait(sources: &Sources, wake: &OwnedFd, until: Instant) {
    let mut fds = vec![sources.events.fd().as_raw_fd(), wake.as_raw_fd()];
    fds.extend(sources.others.as_ref().map(|(_, changes)| changes.fd().as_raw_fd()));
    poll(&fds, until);
}

/// Waits until one of the descriptors has something to read, but for a second at most.
fn poll(fds: &[libc::c_int], until: Instant) {
    let mut polls: Vec<libc::pollfd> = fds
        .iter()
        .map(|fd| libc::pollfd {
            fd: *fd,
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    let left = until
        .saturating_duration_since(Instant::now())
        .min(Duration::from_secs(1));
    let timeout = i32::try_from(left.as_millis()).unwrap_or(i32::MAX);
    let count = libc::nfds_t::try_from(polls.len()).unwrap_or_default();
    // SAFETY: `count` valid entries.
    unsafe { libc::poll(polls.as_mut_ptr(), count, timeout) };
}

/// Takes the wake-ups out.
fn drain(wake: &OwnedFd) {
    let mut count = 0u64;
    // SAFETY: eight writable bytes; the descriptor does not block.
    unsafe { libc::read(wake.as_raw_fd(), (&raw mut count).cast(), size_of_val(&count)) };
}

/// Inode numbers of namespaces fit.
fn inode_of(metadata: &fs::Metadata) -> u32 {
    u32::try_from(metadata.ino()).unwrap_or(0)
}

fn is_inode(file: &File, inode: u32) -> bool {
    file.metadata().is_ok_and(|metadata| inode_of(&metadata) == inode)
}
