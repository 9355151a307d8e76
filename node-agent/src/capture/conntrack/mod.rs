//! Plugin `ebpf-conntrack`: where connections really go that a NAT rule sends elsewhere.
//!
//! ```text
//! events of connections made and ended, all namespaces (netlink) ┐
//! dump: what was there before (netlink, or /proc as text)        ┴▶ thread ▶ [`table::Table`] ◀ [`Nat`]: captures ask
//! ```
//! One thread reads and writes; captures read. A connection is looked up in its own network namespace and then, as it looks
//! when it leaves that, in the node's: there a pod's connection to a service is translated. [`Nat::catch_up`] makes sure
//! that all is read that the kernel told before the call. Entry: [`Conntrack::start`].

mod limits;
mod message;
mod metrics;
mod reader;
mod socket;
mod spaces;
mod table;
mod text;

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use ahash::RandomState;
use anyhow::Context as _;
use hashbrown::HashMap;
use parking_lot::{Condvar, Mutex, RwLock};
use tokio::sync::watch;

use self::table::{Space, Table};
pub use self::{
    message::{End, Protocol, Tuple},
    metrics::ConntrackMetrics,
};
use crate::ebpf::capability::Capabilities;

/// The feature.
pub const CONNTRACK: &str = "ebpf-conntrack";

/// Translations known at most; about 250 bytes each.
const ENTRIES_MAX: usize = 131_072;
/// Longest wait for the thread to read what is there.
const PATIENCE: Duration = Duration::from_millis(200);

/// Settings of the plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConntrackConfig {
    /// `/proc` of the host's pid namespace.
    pub proc: PathBuf,
}

/// The running plugin. Dropping it ends the thread.
#[derive(Debug)]
pub struct Conntrack {
    nat: Nat,
    told: watch::Receiver<Capabilities>,
}

/// Answers where connections go. Clones share what is known.
#[derive(Clone, Debug)]
pub struct Nat(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    known: RwLock<Known>,
    fence: Mutex<Fence>,
    caught_up: Condvar,
    /// Wakes the thread.
    wake: OwnedFd,
    stop: AtomicBool,
    metrics: ConntrackMetrics,
}

#[derive(Debug)]
struct Known {
    table: Table,
    /// Namespaces, by inode number.
    spaces: HashMap<u32, Space, RandomState>,
    /// The node's.
    node: Option<Space>,
}

#[derive(Debug, Default)]
struct Fence {
    asked: u64,
    reached: u64,
    ended: bool,
}

// === impl Conntrack ===

impl Conntrack {
    /// Starts to read. What cannot be read is in the capabilities, and tried again.
    ///
    /// # Errors
    /// If there are no descriptors or threads to be had.
    pub fn start(config: &ConntrackConfig, metrics: ConntrackMetrics) -> anyhow::Result<Self> {
        let nat = Nat(Arc::new(Shared::new(metrics)?));
        let (tell, mut told) = watch::channel(Capabilities::default());
        let reader = reader::Reader::new(Arc::clone(&nat.0), config, tell);
        told.borrow_and_update();
        std::thread::Builder::new()
            .name("ebpf-conntrack".into())
            .spawn(move || reader.run())
            .context("cannot start the thread of ebpf-conntrack")?;
        Ok(Self { nat, told })
    }

    /// For captures.
    #[must_use]
    pub fn nat(&self) -> Nat {
        self.nat.clone()
    }

    /// What works here, as it changes; empty until it is known.
    #[must_use]
    pub fn capabilities(&self) -> watch::Receiver<Capabilities> {
        self.told.clone()
    }

    /// Looks once what would work here, as [`Self::start`] would find it.
    #[must_use]
    pub fn probe(config: &ConntrackConfig, metrics: ConntrackMetrics) -> Capabilities {
        let mut capabilities = Capabilities::default();
        match Self::start(config, metrics) {
            Ok(this) => {
                let deadline = Instant::now() + 25 * PATIENCE;
                while this.told.borrow().features.is_empty() && Instant::now() < deadline {
                    std::thread::sleep(PATIENCE / 10);
                }
                capabilities = this.told.borrow().clone();
            }
            Err(error) => capabilities.off(CONNTRACK, format!("{error:#}")),
        }
        if capabilities.features.is_empty() {
            capabilities.off(CONNTRACK, "the kernel did not answer in time");
        }
        capabilities
    }
}

impl Drop for Conntrack {
    fn drop(&mut self) {
        self.nat.0.stop.store(true, Ordering::Release);
        self.nat.0.wake();
    }
}

// === impl Nat ===

impl Nat {
    /// Where a connection of this network namespace (inode number) really goes, if elsewhere: `dialled` is what its socket
    /// shows, from the end that opened it, and `at` when it was there, in monotonic nanoseconds.
    #[must_use]
    pub fn destination(&self, netns: u32, dialled: &Tuple, at: u64) -> Option<End> {
        let known = self.0.known.read();
        let own = known.spaces.get(&netns).copied();
        let there = own
            .and_then(|space| known.table.translated(space, dialled, at))
            .unwrap_or(*dialled);
        // What stays within its namespace is not seen by the node's.
        let there = match known
            .node
            .filter(|node| own != Some(*node) && !there.to.ip.is_loopback())
        {
            Some(node) => known.table.translated(node, &there, at).unwrap_or(there),
            None => there,
        };
        (there.to != dialled.to).then_some(there.to)
    }

    /// What the socket of a flow dialled whose packets look like `seen` when they leave: in its own namespace they are
    /// translated by then.
    #[must_use]
    pub fn dialled(&self, netns: u32, seen: &Tuple) -> Option<Tuple> {
        let known = self.0.known.read();
        known.table.dialled(*known.spaces.get(&netns)?, seen)
    }

    /// Waits until the thread has read all that the kernel told before this call, but not for long.
    pub fn catch_up(&self) {
        let shared = &*self.0;
        let mut fence = shared.fence.lock();
        fence.asked += 1;
        let wanted = fence.asked;
        shared.wake();
        let deadline = Instant::now() + PATIENCE;
        while fence.reached < wanted && !fence.ended {
            if shared.caught_up.wait_until(&mut fence, deadline).timed_out() {
                shared.metrics.late.inc();
                return;
            }
        }
    }
}

// === impl Shared ===

impl Shared {
    fn new(metrics: ConntrackMetrics) -> anyhow::Result<Self> {
        Ok(Self {
            known: RwLock::new(Known {
                table: Table::new(ENTRIES_MAX),
                spaces: HashMap::default(),
                node: None,
            }),
            fence: Mutex::default(),
            caught_up: Condvar::new(),
            wake: event().context("cannot make an eventfd for ebpf-conntrack")?,
            stop: AtomicBool::new(false),
            metrics,
        })
    }

    fn wake(&self) {
        let one = 1u64;
        // SAFETY: eight readable bytes. It fails only if the counter is full, and then the thread is awake.
        unsafe { libc::write(self.wake.as_raw_fd(), (&raw const one).cast(), size_of_val(&one)) };
    }
}

fn event() -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just made, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
impl Nat {
    /// Knows just these, of one network namespace that is the node's: what was dialled, and what it became.
    pub(crate) fn knowing(netns: u32, translations: &[(Tuple, Tuple)]) -> anyhow::Result<Self> {
        let shared = Shared::new(ConntrackMetrics::default())?;
        shared.fence.lock().ended = true;
        {
            let mut known = shared.known.write();
            known.spaces.insert(netns, Space(1));
            known.node = Some(Space(1));
            for (original, translated) in translations {
                let reply = Tuple {
                    protocol: original.protocol,
                    from: translated.to,
                    to: translated.from,
                };
                let entry = message::Entry {
                    original: *original,
                    reply,
                    id: 1,
                };
                known.table.there(Space(1), &entry, false, 1);
            }
        }
        Ok(Self(Arc::new(shared)))
    }
}
