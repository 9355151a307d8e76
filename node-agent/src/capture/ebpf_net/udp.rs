//! UDP on the user side: names the process of each flow and keeps its direction.
//!
//! The kernel side sums by socket and peer. The sender is in the sum; a flow that only receives is named by its socket's
//! owner: whoever holds the descriptor (scan), else whoever made the socket.

use ahash::RandomState;
use ebpf_common::net::{FlowKey, Tuple, UdpAgg, UdpKey, direction};
use hashbrown::HashMap;

use super::rows::{Origin, Row, Rows};
use crate::{capture::ends, ebpf::sys::monotonic_ns, identity::process::Comm};

/// Flows whose direction is remembered, in two generations of this size each.
const REMEMBERED: usize = 65_536;

/// A process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Owner {
    /// Its number.
    pub pid: u32,
    /// Its name.
    pub comm: Comm,
    /// Its cgroup, 0 if not known.
    pub cgroup: u64,
}

/// State of UDP flows across drains.
#[derive(Debug)]
pub(super) struct Flows {
    young: HashMap<UdpKey, u8, RandomState>,
    old: HashMap<UdpKey, u8, RandomState>,
    /// Owners found by the descriptor scan, by cookie.
    holders: HashMap<u64, Owner, RandomState>,
    /// First port of the kernel's own choice for clients (`ip_local_port_range`).
    client_ports_from: u16,
    /// Sockets that were there before the agent, by cookie; true if connected.
    older: HashMap<u64, bool, RandomState>,
}

impl Flows {
    /// No flow seen yet.
    #[must_use]
    pub(super) fn new(client_ports_from: u16) -> Self {
        Self {
            young: HashMap::default(),
            old: HashMap::default(),
            holders: HashMap::default(),
            client_ports_from,
            older: HashMap::default(),
        }
    }

    /// Notes a socket that existed before the agent, and who holds it.
    pub(super) fn add_older(&mut self, cookie: u64, connected: bool, holder: Owner) {
        self.older.insert(cookie, connected);
        self.holders.insert(cookie, holder);
    }

    /// Replaces what the descriptor scan knows.
    pub(super) fn set_holders(&mut self, holders: impl Iterator<Item = (u64, Owner)>) {
        self.holders.clear();
        self.holders.extend(holders);
        self.older.retain(|cookie, _| self.holders.contains_key(cookie));
    }

    /// Adds what the kernel side summed for one socket and peer; `creator` looks up who made the socket.
    pub(super) fn add(
        &mut self,
        key: &UdpKey,
        agg: &UdpAgg,
        creator: impl FnOnce(u64) -> Option<Owner>,
        rows: &mut Rows,
    ) {
        let Owner { pid, comm, cgroup } = if agg.pid != 0 {
            Owner {
                pid: agg.pid,
                comm: agg.comm,
                cgroup: agg.cgroup,
            }
        } else {
            let holder = self.holders.get(&key.cookie).copied();
            holder.or_else(|| creator(key.cookie)).unwrap_or_default()
        };
        let key = &rows.ends().dialled(key, agg.netns);
        let tuple = Tuple {
            local: key.local,
            remote: key.remote,
            local_port: key.local_port,
            remote_port: key.remote_port,
            netns: agg.netns,
        };
        let flow = FlowKey {
            tuple,
            pid,
            direction: self.direction(key, agg),
            ..FlowKey::default()
        };
        rows.add(
            &Origin {
                flow,
                udp: true,
                cgroup,
            },
            &Row {
                first_ns: agg.first_ns,
                last_ns: monotonic_ns(),
                read: agg.read,
                written: agg.written,
                datagrams_read: agg.datagrams_read,
                datagrams_written: agg.datagrams_written,
                comm,
                ..Row::default()
            },
        );
    }

    /// The first datagram between a socket and a peer decides, whichever local address it used; for sockets older than
    /// the agent the first one was not seen.
    fn direction(&mut self, key: &UdpKey, agg: &UdpAgg) -> u8 {
        let peer = UdpKey { local: [0; 16], ..*key };
        if let Some(known) = self.young.get(&peer) {
            return *known;
        }
        let direction = self
            .old
            .get(&peer)
            .copied()
            .unwrap_or_else(|| self.first_direction(key, agg));
        self.remember(peer, direction);
        if direction == direction::OUTGOING && is_group(&key.remote) {
            // Answers to a group come from the members' own addresses.
            self.remember(anyone(key), direction);
        }
        direction
    }

    fn remember(&mut self, key: UdpKey, direction: u8) {
        if self.young.len() >= REMEMBERED {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key, direction);
    }

    fn first_direction(&self, key: &UdpKey, agg: &UdpAgg) -> u8 {
        match self.older.get(&key.cookie) {
            // Servers rarely connect a UDP socket, and clients rarely choose a port below the kernel's range.
            Some(true) => direction::OUTGOING,
            Some(false) if key.local_port >= self.client_ports_from && key.remote_port < self.client_ports_from => {
                direction::OUTGOING
            }
            Some(false) if key.local_port < self.client_ports_from && key.remote_port >= self.client_ports_from => {
                direction::INCOMING
            }
            _ => {
                let asked = anyone(key);
                self.young
                    .get(&asked)
                    .or_else(|| self.old.get(&asked))
                    .copied()
                    .unwrap_or(agg.direction)
            }
        }
    }
}

/// Stands for every peer of a socket at one port.
fn anyone(key: &UdpKey) -> UdpKey {
    UdpKey {
        local: [0; 16],
        remote: [0; 16],
        ..*key
    }
}

/// Multicast, or an IPv4 address that looks like a broadcast: only a false match of the latter costs anything, and only
/// until the real peer's first datagram.
fn is_group(address: &[u8; 16]) -> bool {
    match ends::ip(*address) {
        std::net::IpAddr::V4(v4) => v4.is_multicast() || v4.octets()[3] == 255,
        std::net::IpAddr::V6(v6) => v6.is_multicast(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]
    use super::*;
    use crate::{
        capture::ends::{Ends, Names, UnnamedEnds, Which},
        identity::process::Proc,
    };

    fn one(flows: &mut Flows, key: &UdpKey, agg: &UdpAgg, creator: Option<Owner>) -> records::Netflow {
        let mut rows = Rows::new(1000, Ends::default()).folding(10_001);
        flows.add(key, agg, |_| creator, &mut rows);
        let (proc, unnamed) = (Proc::new("/nonexistent"), UnnamedEnds::default());
        let mut names = Names::new(&proc, None, &unnamed);
        rows.take(Which::All, 1, 0, &mut names).remove(0)
    }

    fn owner(pid: u32) -> Owner {
        Owner {
            pid,
            ..Owner::default()
        }
    }

    #[test]
    fn first_datagram_decides_and_sticks() {
        let mut flows = Flows::new(32_768);
        let key = UdpKey {
            cookie: 1,
            local_port: 53,
            remote_port: 40_000,
            ..UdpKey::default()
        };
        let agg = UdpAgg {
            datagrams_read: 1,
            direction: direction::INCOMING,
            ..UdpAgg::default()
        };
        assert_eq!(
            one(&mut flows, &key, &agg, None).direction,
            records::Direction::Incoming
        );
        let reply = UdpAgg {
            datagrams_written: 1,
            direction: direction::OUTGOING,
            pid: 9,
            ..UdpAgg::default()
        };
        let row = one(&mut flows, &key, &reply, None);
        assert_eq!(
            (row.direction, row.pid, row.remote.port),
            (records::Direction::Incoming, 9, records::Port::Any)
        );
    }

    #[test]
    fn receivers_are_named_by_holder_then_creator() {
        let mut flows = Flows::new(32_768);
        let key = UdpKey {
            cookie: 5,
            ..UdpKey::default()
        };
        let agg = UdpAgg {
            datagrams_read: 1,
            direction: direction::INCOMING,
            ..UdpAgg::default()
        };
        assert_eq!(one(&mut flows, &key, &agg, Some(owner(7))).pid, 7);
        flows.set_holders(std::iter::once((5, owner(8))));
        assert_eq!(one(&mut flows, &key, &agg, Some(owner(7))).pid, 8);
        flows.set_holders(std::iter::empty());
        assert_eq!(one(&mut flows, &key, &agg, None).pid, 0);
    }

    #[test]
    fn older_sockets_are_judged_by_ports() {
        let mut flows = Flows::new(32_768);
        flows.add_older(1, false, owner(7));
        flows.add_older(2, true, owner(7));
        let client = UdpKey {
            cookie: 1,
            local_port: 40_000,
            remote_port: 443,
            ..UdpKey::default()
        };
        let agg = UdpAgg {
            datagrams_read: 1,
            direction: direction::INCOMING,
            ..UdpAgg::default()
        };
        assert_eq!(
            one(&mut flows, &client, &agg, None).direction,
            records::Direction::Outgoing
        );
        let connected = UdpKey {
            cookie: 2,
            local_port: 1,
            remote_port: 2,
            ..UdpKey::default()
        };
        assert_eq!(
            one(&mut flows, &connected, &agg, None).direction,
            records::Direction::Outgoing
        );
    }
}
