//! Interfaces of all network namespaces of this machine, and the programs at them.
//!
//! ```text
//! netlink: something changed ▶ [`Links::look`]: namespaces (processes, /run/netns) ▶ in each: interfaces, addresses
//!    ▶ what is new gets its programs, what is gone is remembered until its flows are told
//! ```
//! Nothing here keeps a namespace alive: each is entered by a thread of its own, which ends.

use std::{
    fs::{self, File},
    io,
    net::IpAddr,
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
    path::PathBuf,
    time::{Duration, Instant},
};

use ahash::RandomState;
use anyhow::Context as _;
use ebpf_common::packets::{OtherKey, OtherValue, direction, other};
use hashbrown::{HashMap, HashSet};
use records::Str;
use regex::Regex;

use super::{NAMESPACES, PACKETS, flows};
use crate::{
    ebpf::{
        capability::Capabilities,
        packets::{PacketObject, Place},
        rtnetlink::{Changes, Interface, Route},
        tc::{self, Attached},
    },
    identity::process::Proc,
};

/// Pause between looks for namespaces and, in those that are known, for changes that nobody told of.
const LOOK: Duration = Duration::from_secs(2);
const LOOK_ALL: Duration = Duration::from_secs(30);
/// The shortest one, when something changed.
const LOOK_SOON: Duration = Duration::from_millis(50);
/// Namespaces and interfaces at most.
const SPACES_MAX: usize = 4096;
const LINKS_MAX: usize = 8192;
/// Both ways, and what may be in no flow.
const OTHERS: u8 = other::COUNT;

/// Which interfaces are followed.
struct Wanted {
    only: Vec<Pattern>,
    not: Vec<Pattern>,
}

enum Pattern {
    Name(String),
    Expression(Regex),
}

/// An interface that is followed.
struct Link {
    name: Str,
    attached: Vec<(u8, Attached)>,
    others: HashMap<(u8, u8), OtherValue, RandomState>,
}

/// A network namespace.
#[derive(Default)]
struct Space {
    links: HashMap<u32, Link, RandomState>,
    addresses: Vec<IpAddr>,
    /// When it was looked at.
    looked: Option<Instant>,
}

/// What is followed.
pub(super) struct Links {
    proc: Proc,
    wanted: Wanted,
    changes: Changes,
    /// The agent's own namespace is 0.
    spaces: HashMap<u32, Space, RandomState>,
    own: u32,
    here: HashSet<IpAddr, RandomState>,
    /// Interfaces that went, until what was drained is told; by namespace and number.
    gone: HashMap<(u32, u32), Link, RandomState>,
    changed: bool,
    looked: Instant,
    /// TCX is to be had.
    tcx: bool,
    /// Why TCX is not, and why interfaces have no programs.
    no_tcx: Option<String>,
    refused: Option<String>,
    /// Why other namespaces are not followed.
    closed: Option<String>,
}

/// What a look into a namespace found.
struct Found {
    interfaces: Vec<Interface>,
    addresses: Vec<IpAddr>,
}

fn inside<T: Send>(namespace: &File, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let enter = || {
        // SAFETY: no pointers; only this thread changes its namespace, and it ends.
        if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
            return Err(io::Error::last_os_error());
        }
        work()
    };
    std::thread::scope(|scope| {
        let entered = std::thread::Builder::new()
            .name("packets-setns".into())
            .spawn_scoped(scope, enter)?;
        entered
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
    })
}

impl Wanted {
    fn new(only: &[String], not: &[String]) -> anyhow::Result<Self> {
        let patterns = |texts: &[String]| {
            texts
                .iter()
                .map(|text| Pattern::new(text))
                .collect::<anyhow::Result<_>>()
        };
        Ok(Self {
            only: patterns(only)?,
            not: patterns(not)?,
        })
    }

    fn has(&self, name: &str) -> bool {
        let any = |patterns: &[Pattern]| patterns.iter().any(|pattern| pattern.is(name));
        (self.only.is_empty() || any(&self.only)) && !any(&self.not)
    }
}

impl Pattern {
    fn new(text: &str) -> anyhow::Result<Self> {
        match text.strip_prefix('/').and_then(|rest| rest.strip_suffix('/')) {
            Some(expression) => Ok(Self::Expression(Regex::new(expression)?)),
            None => Ok(Self::Name(text.to_owned())),
        }
    }

    fn is(&self, name: &str) -> bool {
        match self {
            Self::Name(own) => own == name,
            Self::Expression(expression) => expression.is_match(name),
        }
    }
}

impl Links {
    pub(super) fn new(proc: Proc, only: &[String], not: &[String]) -> anyhow::Result<Self> {
        let own = fs::metadata("/proc/thread-self/ns/net").context("cannot look at the agent's network namespace")?;
        Ok(Self {
            wanted: Wanted::new(only, not)?,
            changes: Changes::listen().context("cannot listen for changes of interfaces")?,
            spaces: HashMap::default(),
            own: u32::try_from(own.ino()).unwrap_or(0),
            here: HashSet::default(),
            gone: HashMap::default(),
            changed: true,
            looked: Instant::now(),
            tcx: true,
            no_tcx: None,
            refused: None,
            closed: None,
            proc,
        })
    }

    /// Waits for something to do, not beyond `until` and not longer than `most`.
    pub(super) fn wait(&mut self, until: Instant, most: Duration) {
        let pause = until.saturating_duration_since(Instant::now()).min(most);
        let mut poll = libc::pollfd {
            fd: self.changes.fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let timeout = i32::try_from(pause.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
        // SAFETY: one valid pollfd.
        if unsafe { libc::poll(&raw mut poll, 1, timeout) } > 0 {
            self.changed |= self.changes.any();
        }
    }

    /// True if it is time for [`Self::look`].
    pub(super) fn is_due(&self) -> bool {
        self.looked.elapsed() >= if self.changed { LOOK_SOON } else { LOOK }
    }

    /// Namespaces and interfaces that are followed.
    pub(super) fn counts(&self) -> (usize, usize) {
        let links = self.spaces.values().map(|space| space.links.len()).sum();
        (self.spaces.len(), links)
    }

    /// Looks for namespaces and interfaces, and attaches programs to what is new.
    pub(super) fn look(&mut self, object: &PacketObject) -> anyhow::Result<()> {
        let changed = std::mem::take(&mut self.changed);
        let now = Instant::now();
        self.looked = now;
        (self.refused, self.closed) = (None, None);
        let listed = |space: Option<&Space>| {
            space
                .and_then(|space| space.looked)
                .is_some_and(|looked| !changed && looked + LOOK_ALL > now)
        };
        let mut alive: HashSet<u32, RandomState> = HashSet::default();
        alive.insert(0);
        if !listed(self.spaces.get(&0)) {
            let found = find().context("cannot list the interfaces")?;
            self.reconcile(0, found, object, None);
        }
        for path in self.paths() {
            let Ok(inode) = fs::metadata(&path).map(|metadata| number(&metadata)) else {
                continue;
            };
            if inode == self.own || !alive.insert(inode) || listed(self.spaces.get(&inode)) {
                continue;
            }
            if self.spaces.len() >= SPACES_MAX && !self.spaces.contains_key(&inode) {
                self.closed = Some(format!("there are more than {SPACES_MAX} network namespaces"));
                continue;
            }
            // The process may have gone, and another be there.
            let Ok(namespace) = File::open(&path) else { continue };
            if !namespace.metadata().is_ok_and(|metadata| number(&metadata) == inode) {
                continue;
            }
            match inside(&namespace, find) {
                Ok(found) => self.reconcile(inode, found, object, Some(&namespace)),
                Err(error) => {
                    self.closed = Some(format!("a network namespace cannot be entered: {error}"));
                    // Nor could others be.
                    if error.raw_os_error() == Some(libc::EPERM) {
                        break;
                    }
                }
            }
        }
        let ended: Vec<u32> = self
            .spaces
            .keys()
            .copied()
            .filter(|inode| !alive.contains(inode))
            .collect();
        for inode in ended {
            if let Some(space) = self.spaces.remove(&inode) {
                self.gone
                    .extend(space.links.into_iter().map(|(index, link)| ((inode, index), link)));
            }
        }
        self.here = self
            .spaces
            .values()
            .flat_map(|space| space.addresses.iter().copied())
            .collect();
        Ok(())
    }

    /// Where namespaces may be entered: by each process, and by what `ip netns` keeps, on the host and here.
    fn paths(&self) -> Vec<PathBuf> {
        let kept = [self.proc.path(1, "root/run/netns"), PathBuf::from("/run/netns")];
        let kept = kept.into_iter().filter_map(|directory| fs::read_dir(directory).ok());
        let kept = kept.flatten().flatten().map(|entry| entry.path());
        let processes = self.proc.pids().map(|pid| self.proc.path(pid, "ns/net"));
        processes.chain(kept).collect()
    }

    fn reconcile(&mut self, inode: u32, found: Found, object: &PacketObject, namespace: Option<&File>) {
        let mut space = self.spaces.remove(&inode).unwrap_or_default();
        let mut links = std::mem::take(&mut space.links);
        let mut fresh = Vec::new();
        for interface in found.interfaces {
            let known = links.remove(&interface.index);
            match known {
                // Another one may have its number by now, and one may have another name.
                Some(link) if *link.name == *interface.name => drop(space.links.insert(interface.index, link)),
                known => {
                    if let Some(link) = known {
                        self.gone.insert((inode, interface.index), link);
                    }
                    if self.wanted.has(&interface.name) {
                        fresh.push(interface);
                    }
                }
            }
        }
        self.gone
            .extend(links.into_iter().map(|(index, link)| ((inode, index), link)));
        let all: usize = self.spaces.values().map(|space| space.links.len()).sum();
        if all + space.links.len() + fresh.len() > LINKS_MAX {
            self.refused = Some(format!("there are more than {LINKS_MAX} interfaces"));
            fresh.truncate(LINKS_MAX.saturating_sub(all + space.links.len()));
        }
        let mut attach = Attach {
            object,
            inode,
            tcx: self.tcx,
            no_tcx: None,
            refused: None,
        };
        let made = match namespace {
            None => Ok(attach.all(fresh)),
            Some(_) if fresh.is_empty() => Ok(Vec::new()),
            Some(namespace) => inside(namespace, || Ok(attach.all(fresh))),
        };
        let Attach {
            tcx, no_tcx, refused, ..
        } = attach;
        self.tcx = tcx;
        self.no_tcx = self.no_tcx.take().or(no_tcx);
        self.refused = self.refused.take().or(refused);
        match made {
            Ok(made) => space.links.extend(made),
            Err(error) => self.refused = Some(error.to_string()),
        }
        space.addresses = found.addresses;
        space.looked = Some(Instant::now());
        self.spaces.insert(inode, space);
    }

    /// How much grew what is in no flow, by interface, direction and kind.
    pub(super) fn others(&mut self, object: &PacketObject) -> Vec<(OtherKey, OtherValue)> {
        let mut grown = Vec::new();
        let mut look = |netns: u32, ifindex: u32, link: &mut Link| {
            for ((direction, kind), before) in &mut link.others {
                let key = OtherKey {
                    netns,
                    ifindex,
                    direction: *direction,
                    kind: *kind,
                    _pad: 0,
                };
                if let Ok(Some(now)) = object.other(&key)
                    && now != *before
                {
                    let more = OtherValue {
                        bytes: now.bytes.wrapping_sub(before.bytes),
                        packets: now.packets.wrapping_sub(before.packets),
                    };
                    *before = now;
                    grown.push((key, more));
                }
            }
        };
        for (inode, space) in &mut self.spaces {
            for (index, link) in &mut space.links {
                look(*inode, *index, link);
            }
        }
        for ((inode, index), link) in &mut self.gone {
            look(*inode, *index, link);
        }
        grown
    }

    /// All flows of interfaces that went are told.
    pub(super) fn forget_gone(&mut self, object: &PacketObject) {
        let Self { gone, spaces, .. } = self;
        for ((inode, index), link) in gone.drain() {
            // Its number may be another's by now.
            if spaces.get(&inode).is_some_and(|space| space.links.contains_key(&index)) {
                continue;
            }
            for (direction, kind) in link.others.keys() {
                let key = other_key(inode, index, *direction, *kind);
                if let Err(error) = object.forget_other(&key) {
                    tracing::debug!(error = format!("{error:#}"), "A sum could not be removed");
                }
            }
        }
    }

    /// Takes the programs off.
    pub(super) fn end(&mut self) {
        let paths = self.paths();
        for (inode, space) in self.spaces.drain() {
            let filters: Vec<(u32, u8, Attached)> = space
                .links
                .into_iter()
                .flat_map(|(index, link)| link.attached.into_iter().map(move |(way, what)| (index, way, what)))
                .filter(|(_, _, what)| matches!(what, Attached::Filter { .. }))
                .collect();
            if filters.is_empty() {
                continue;
            }
            // The qdisc is taken away with its last filter: the one that it was made for goes last.
            let mut filters = filters;
            filters.sort_by_key(|(_, _, what)| matches!(what, Attached::Filter { qdisc_made: true, .. }));
            let detach = || {
                for (index, way, what) in filters {
                    tc::detach(what, index, way);
                }
                Ok(())
            };
            if inode == 0 {
                let _ = detach();
                continue;
            }
            let is = |path: &&PathBuf| fs::metadata(path).is_ok_and(|metadata| number(&metadata) == inode);
            let Some(namespace) = paths.iter().find(is).and_then(|path| File::open(path).ok()) else {
                continue;
            };
            if let Err(error) = inside(&namespace, detach) {
                tracing::debug!(%error, "Filters in a network namespace could not be deleted");
            }
        }
    }

    /// What works.
    pub(super) fn tell(&self, capabilities: &mut Capabilities) {
        let hook = if self.tcx { "TCX" } else { "filters of clsact" };
        match &self.refused {
            None => capabilities.on(PACKETS, hook),
            Some(reason) => capabilities.degraded(PACKETS, hook, format!("some interfaces are not followed: {reason}")),
        }
        if let Some(why) = &self.no_tcx {
            tracing::debug!(why, "TCX is not to be had");
        }
        match &self.closed {
            Some(reason) => capabilities.degraded(NAMESPACES, "setns", reason.clone()),
            None if self.changes.all => capabilities.on(NAMESPACES, "setns, netlink"),
            None => capabilities.degraded(
                NAMESPACES,
                "setns",
                "changes of interfaces in other network namespaces are found after up to 30 s: CAP_NET_BROADCAST is missing",
            ),
        }
    }
}

impl flows::Place for Links {
    fn interface(&self, netns: u32, ifindex: u32) -> Str {
        let known = self.spaces.get(&netns).and_then(|space| space.links.get(&ifindex));
        let known = known.or_else(|| self.gone.get(&(netns, ifindex)));
        known.map_or_else(|| "unknown".into(), |link| link.name.clone())
    }

    fn is_here(&self, ip: IpAddr) -> bool {
        ip.is_loopback() || self.here.contains(&ip)
    }
}

/// Attaching in one namespace.
struct Attach<'a> {
    object: &'a PacketObject,
    inode: u32,
    tcx: bool,
    no_tcx: Option<String>,
    refused: Option<String>,
}

impl Attach<'_> {
    fn all(&mut self, interfaces: Vec<Interface>) -> Vec<(u32, Link)> {
        let links = interfaces
            .into_iter()
            .map(|interface| (interface.index, self.one(&interface)));
        links.collect()
    }

    fn one(&mut self, interface: &Interface) -> Link {
        let place = Place {
            ethernet: interface.ethernet,
            own: self.inode == 0,
        };
        let mut link = Link {
            name: interface.name.as_str().into(),
            attached: Vec::new(),
            others: HashMap::default(),
        };
        for way in [direction::INGRESS, direction::EGRESS] {
            for kind in 0..OTHERS {
                let key = other_key(self.inode, interface.index, way, kind);
                if let Err(error) = self.object.make_other(&key) {
                    self.refused = Some(format!("{}: {error:#}", interface.name));
                }
                link.others.insert((way, kind), OtherValue::default());
            }
            let program = match self.object.program(place, way) {
                Ok(program) => program,
                Err(error) => {
                    self.refused = Some(format!("{error:#}"));
                    continue;
                }
            };
            match tc::attach(program, interface.index, way, self.tcx) {
                Ok(what) => {
                    if matches!(what, Attached::Filter { .. }) {
                        self.tcx = false;
                    }
                    link.attached.push((way, what));
                }
                Err((refused, error)) => {
                    self.no_tcx = refused.map(|error| error.to_string());
                    // It went while it was looked at.
                    if error.raw_os_error() != Some(libc::ENODEV) {
                        self.refused = Some(format!("{}: {error}", interface.name));
                    }
                }
            }
        }
        link
    }
}

fn other_key(netns: u32, ifindex: u32, direction: u8, kind: u8) -> OtherKey {
    OtherKey {
        netns,
        ifindex,
        direction,
        kind,
        _pad: 0,
    }
}

/// Interfaces and addresses of the caller's namespace.
fn find() -> io::Result<Found> {
    let route = Route::open()?;
    Ok(Found {
        interfaces: route.interfaces()?,
        addresses: route.addresses()?,
    })
}

fn number(metadata: &fs::Metadata) -> u32 {
    u32::try_from(metadata.ino()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_are_named_or_described() {
        let texts = |texts: &[&str]| -> Vec<String> { texts.iter().map(|text| (*text).to_owned()).collect() };
        let wanted = Wanted::new(&[], &texts(&["lo"])).unwrap();
        assert!(wanted.has("eth0") && wanted.has("lo1") && !wanted.has("lo"));
        let wanted = Wanted::new(&texts(&["/^eth/", "bond0"]), &texts(&["/1$/"])).unwrap();
        let has: Vec<bool> = ["eth0", "eth1", "bond0", "bond00", "veth0"]
            .map(|name| wanted.has(name))
            .into();
        assert_eq!(has, [true, false, true, false, false]);
        assert!(Wanted::new(&texts(&["/(/"]), &[]).is_err());
    }
}
