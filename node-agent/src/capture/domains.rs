//! By which names the clients of this machine know addresses, shared by the captures: `dnsflow` tells what look-ups were
//! answered with, the others ask when they make records.
//!
//! A client is a network namespace: a pod's processes have one resolver configuration, and what a resolver of the node asks
//! on behalf of others is known there. Entry: [`DomainNames`].

use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex, RwLock};

use crate::{
    ebpf::sys::monotonic_ns,
    protocols::dns::{Domains, DomainsOptions},
};

/// Longest wait for answers to be read that have passed.
const PATIENCE: Duration = Duration::from_millis(500);

/// Names by client and address. Clones share what is known.
#[derive(Clone, Debug)]
pub struct DomainNames(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    known: RwLock<Domains<u32>>,
    read_until: Mutex<Reading>,
    moved: Condvar,
}

#[derive(Debug, Default)]
struct Reading {
    /// Answers that passed before are known. Monotonic nanoseconds.
    until_ns: u64,
    /// Somebody reads.
    on: bool,
}

impl Default for DomainNames {
    fn default() -> Self {
        Self(Arc::new(Shared {
            known: RwLock::new(Domains::new(DomainsOptions::default())),
            read_until: Mutex::default(),
            moved: Condvar::new(),
        }))
    }
}

impl DomainNames {
    /// A look-up of `name` in network namespace `netns` was answered with these addresses, each with its seconds to live, at
    /// `now_ns`.
    pub fn learn(&self, netns: u32, name: &str, addresses: impl Iterator<Item = (IpAddr, u32)>, now_ns: u64) {
        let mut addresses = addresses.peekable();
        if addresses.peek().is_none() {
            return;
        }
        let mut known = self.0.known.write();
        for (ip, ttl_s) in addresses {
            known.learn(netns, name, ip, ttl_s, now_ns);
        }
    }

    /// The name that clients in `netns` knew `ip` by at `at_ns`.
    #[must_use]
    pub fn name(&self, netns: u32, ip: IpAddr, at_ns: u64) -> Option<Arc<str>> {
        self.0.known.read().name(netns, ip, at_ns).cloned()
    }

    /// Addresses known.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.known.read().len()
    }

    /// True if none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Names that could still have been used and made room for others, since the last call.
    pub(crate) fn take_forgotten(&self) -> u64 {
        self.0.known.write().take_forgotten()
    }

    /// All answers that passed before `until_ns` have been told.
    pub(crate) fn read_until(&self, until_ns: u64) {
        let mut reading = self.0.read_until.lock();
        (reading.until_ns, reading.on) = (until_ns, true);
        self.0.moved.notify_all();
    }

    /// Nobody reads any more.
    pub(crate) fn end(&self) {
        self.0.read_until.lock().on = false;
        self.0.moved.notify_all();
    }

    /// Waits, but not for long, until all answers are known that passed before this call.
    pub fn catch_up(&self) {
        let (now_ns, deadline) = (monotonic_ns(), Instant::now() + PATIENCE);
        let mut reading = self.0.read_until.lock();
        while reading.on && reading.until_ns < now_ns {
            if self.0.moved.wait_until(&mut reading, deadline).timed_out() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_know_what_they_were_told() {
        let (names, ip) = (DomainNames::default(), IpAddr::from([10, 0, 0, 1]));
        names.learn(1, "a.example", std::iter::once((ip, 60)), 1_000);
        names.learn(1, "b.example", std::iter::empty(), 1_000);
        assert_eq!(names.name(1, ip, 1_000).as_deref(), Some("a.example"));
        assert_eq!(names.name(2, ip, 1_000), None);
        assert_eq!(names.len(), 1);
    }

    #[test]
    fn who_asks_waits_for_who_reads() {
        let names = DomainNames::default();
        // Nobody reads.
        names.catch_up();
        names.read_until(0);
        let reader = names.clone();
        let reading = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            reader.read_until(monotonic_ns());
        });
        let start = Instant::now();
        names.catch_up();
        let waited = start.elapsed();
        assert!(waited >= Duration::from_millis(40) && waited < PATIENCE, "{waited:?}");
        assert!(reading.join().is_ok());
        names.end();
        names.catch_up();
    }
}
