//! Sockets by descriptor: adopts what is older than the agent, and follows sockets from process to process.

use std::{collections::hash_map::Entry, os::fd::AsRawFd as _};

use ahash::{HashMap, HashMapExt as _, HashSet, HashSetExt as _};
use ebpf_common::net::{Adopt, Tuple, adopt};
use ebpf_programs::net::state;

use super::{
    tcp::{Listeners, Tracker},
    udp::{Flows, Owner},
};
use crate::{
    ebpf::net::NetObject,
    identity::{
        process::{Comm, Proc},
        sockets::{self, Held, Lender},
    },
};

const IPPROTO_TCP: u32 = 6;
const IPPROTO_UDP: u32 = 17;
/// New UDP sockets looked at per scan; the rest waits for the next one.
const LOOKS_PER_SCAN: usize = 4096;

/// What the descriptor scans know.
#[derive(Debug, Default)]
pub(super) struct Owners {
    /// UDP cookie by inode; `None` for sockets that are not UDP.
    cookies: HashMap<u64, Option<u64>>,
    /// Listening TCP sockets.
    pub listeners: Listeners,
}

/// Cgroups of processes, by their numbers.
pub(super) type Cgroups = hashbrown::HashMap<u32, u64, ahash::RandomState>;

/// What adopting older sockets came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct AdoptReport {
    /// Open TCP connections now tracked.
    pub connections: u64,
    /// Listening TCP sockets.
    pub listeners: u64,
    /// UDP sockets.
    pub udp: u64,
    /// Processes or descriptors that could not be looked at.
    pub refused: u64,
}

impl Owners {
    /// Looks at every socket of every process: open connections are tracked from now on, listeners and UDP sockets are
    /// remembered. `cgroups` are those of processes in pods; processes that are not `wanted` are passed over.
    ///
    /// # Errors
    /// If the kernel refuses to run the program that looks at a socket.
    pub(super) fn adopt_all(
        &mut self,
        object: &mut NetObject,
        proc: &Proc,
        flows: &mut Flows,
        cgroups: &Cgroups,
        wanted: &dyn Fn(u32) -> bool,
    ) -> anyhow::Result<AdoptReport> {
        let mut report = AdoptReport::default();
        let mut held = Vec::new();
        report.refused = sockets::for_each_socket(proc, |one| held.push(one));
        let mut seen = HashSet::with_capacity(held.len());
        let mut lender: Option<(u32, Option<Lender>, Comm)> = None;
        for Held { inode, pid, fd } in held {
            if !wanted(pid) || !seen.insert(inode) {
                continue;
            }
            if lender.as_ref().is_none_or(|(of, ..)| *of != pid) {
                lender = Some((pid, Lender::open(pid).ok(), proc.comm(pid).unwrap_or_default()));
            }
            let Some((_, Some(from), comm)) = &lender else {
                // Gone; another process may hold the socket too.
                seen.remove(&inode);
                continue;
            };
            let borrowed = match from.borrow(fd) {
                Ok(borrowed) => borrowed,
                Err(error) => {
                    // Closed meanwhile, or gone with its process: nothing to adopt.
                    report.refused += u64::from(error.kind() == std::io::ErrorKind::PermissionDenied);
                    seen.remove(&inode);
                    continue;
                }
            };
            let cgroup = cgroups.get(&pid).copied().unwrap_or(0);
            let ask = Adopt {
                fd: borrowed.as_raw_fd().cast_unsigned(),
                pid,
                comm: *comm,
                cgroup,
                ..Adopt::default()
            };
            let answer = object.adopt(ask)?;
            // The agent's own sockets are no proof that those of others can be looked at.
            let others = u64::from(pid != std::process::id());
            let mut cookie = None;
            if answer.found == 1 && answer.protocol == IPPROTO_TCP {
                if answer.state == state::LISTEN {
                    self.listeners.add(&answer.tuple);
                    report.listeners += others;
                } else if answer.id != 0 {
                    report.connections += others;
                }
            } else if answer.found == 1 && answer.protocol == IPPROTO_UDP {
                cookie = sockets::cookie(&borrowed);
                if let Some(cookie) = cookie {
                    let owner = Owner {
                        pid,
                        comm: *comm,
                        cgroup,
                    };
                    flows.add_older(cookie, is_connected(&answer.tuple), owner);
                    report.udp += others;
                }
            }
            self.cookies.insert(inode, cookie);
        }
        Ok(report)
    }

    /// Finds out who holds each socket now, and tells both sides.
    ///
    /// # Errors
    /// If the kernel refuses to run the program that looks at a socket.
    pub(super) fn scan(
        &mut self,
        object: &mut NetObject,
        proc: &Proc,
        tracker: &mut Tracker,
        flows: &mut Flows,
    ) -> anyhow::Result<()> {
        let mut held = Vec::new();
        sockets::for_each_socket(proc, |one| held.push(one));
        held.sort_unstable_by_key(|one| (one.inode, one.pid));
        let mut comms: HashMap<u32, Comm> = HashMap::new();
        let mut comm_of = |pid: u32| *comms.entry(pid).or_insert_with(|| proc.comm(pid).unwrap_or_default());
        tracker.update_owners(|inode, owner| other_holder(&held, inode, owner).map(|pid| (pid, comm_of(pid))));
        self.learn_cookies(object, &held, &mut comm_of)?;
        let holders: Vec<(u64, Owner)> = held
            .iter()
            .filter_map(|one| {
                let cookie = (*self.cookies.get(&one.inode)?)?;
                let owner = Owner {
                    pid: one.pid,
                    comm: comm_of(one.pid),
                    // Found by the process.
                    cgroup: 0,
                };
                Some((cookie, owner))
            })
            .collect();
        flows.set_holders(holders.into_iter());
        Ok(())
    }

    /// Looks at the sockets not looked at before: UDP sockets get their cookie, TCP connections their owner. The owner
    /// must be known before this process lets go of its copy, which may be the last.
    fn learn_cookies(
        &mut self,
        object: &mut NetObject,
        held: &[Held],
        comm_of: &mut impl FnMut(u32) -> Comm,
    ) -> anyhow::Result<()> {
        let mut looks = 0;
        let mut known = HashMap::with_capacity(held.len());
        for one in held {
            let Entry::Vacant(vacant) = known.entry(one.inode) else {
                continue;
            };
            if let Some(cookie) = self.cookies.get(&one.inode) {
                vacant.insert(*cookie);
            } else if looks < LOOKS_PER_SCAN {
                looks += 1;
                if let Ok(borrowed) = Lender::open(one.pid).and_then(|lender| lender.borrow(one.fd)) {
                    let udp = sockets::int_option(&borrowed, libc::SO_PROTOCOL) == Some(libc::IPPROTO_UDP)
                        && sockets::int_option(&borrowed, libc::SO_TYPE) == Some(libc::SOCK_DGRAM);
                    vacant.insert(if udp { sockets::cookie(&borrowed) } else { None });
                    if sockets::int_option(&borrowed, libc::SO_PROTOCOL) == Some(libc::IPPROTO_TCP) {
                        object.adopt(Adopt {
                            op: adopt::OWNER,
                            fd: borrowed.as_raw_fd().cast_unsigned(),
                            pid: one.pid,
                            comm: comm_of(one.pid),
                            ..Adopt::default()
                        })?;
                    }
                }
            }
        }
        // Only what is still held is kept: inode numbers are used again.
        self.cookies = known;
        Ok(())
    }
}

fn is_connected(tuple: &Tuple) -> bool {
    tuple.remote_port != 0
}

/// The process to name for a socket if `owner` does not hold it any more: its first holder.
fn other_holder(held: &[Held], inode: u64, owner: u32) -> Option<u32> {
    let start = held.partition_point(|one| one.inode < inode);
    let holders = held.get(start..)?.iter().take_while(|one| one.inode == inode);
    let mut first = None;
    for one in holders {
        if one.pid == owner {
            return None;
        }
        first.get_or_insert(one.pid);
    }
    first
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_owner_while_it_holds_the_socket() {
        let held = [
            Held {
                inode: 1,
                pid: 10,
                fd: 3,
            },
            Held {
                inode: 2,
                pid: 10,
                fd: 4,
            },
            Held {
                inode: 2,
                pid: 20,
                fd: 4,
            },
        ];
        assert_eq!(other_holder(&held, 2, 20), None);
        assert_eq!(other_holder(&held, 2, 30), Some(10));
        assert_eq!(other_holder(&held, 3, 30), None);
    }
}
