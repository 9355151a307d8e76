//! The rows of the current interval: contributions are summed by flow until the flush makes records of them.

use std::hash::Hash;

use ahash::RandomState;
use ebpf_common::net::{FlowKey, Tuple, direction, folded};
use ebpf_programs::net::fold_ports;
use hashbrown::HashMap;
use records::{Direction, Endpoint, Family, Netflow, Port, Transport};

use crate::{
    capture::{
        conntrack::End,
        ends::{Ends, Names, Pair, Which, Whose, ip},
    },
    ebpf::sys::monotonic_ns,
    identity::{k8s::LocalEnd, process::Comm},
};

/// Where a contribution comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Origin {
    /// Ends (ports that the kernel side folded are 0), process, direction.
    pub flow: FlowKey,
    /// TCP or UDP.
    pub udp: bool,
    /// Cgroup of the process, 0 if not known.
    pub cgroup: u64,
}

/// What makes a row: process, folded ends, direction, transport, and who the ends are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct RowKey {
    /// Ends (folded ports are 0), process, direction.
    pub flow: FlowKey,
    /// TCP or UDP.
    pub udp: bool,
    /// Whose the local end is.
    pub local: LocalEnd,
    /// See [`Ends::remote_holders`].
    pub holders: u32,
    /// Where a translated flow really goes.
    pub nat: Option<End>,
}

/// Sums of one row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Row {
    /// Payload bytes read.
    pub read: u64,
    /// Payload bytes written.
    pub written: u64,
    /// Segments retransmitted.
    pub retransmits: u64,
    /// Sum of round-trip times, microseconds.
    pub rtt_sum_us: u64,
    /// Sum of their mean deviations, microseconds.
    pub rtt_var_sum_us: u64,
    /// Connections in the two sums.
    pub rtt_count: u64,
    /// Connections closed.
    pub closed: u64,
    /// Connections established.
    pub established: u64,
    /// Datagrams received.
    pub datagrams_read: u64,
    /// Datagrams sent.
    pub datagrams_written: u64,
    /// Process name.
    pub comm: Comm,
    /// When the ends first were who they are: a connection's establishment, or the first datagram or close. Monotonic
    /// nanoseconds, 0 if not known.
    pub first_ns: u64,
    /// When they last were.
    pub last_ns: u64,
    /// Left out of a flush because the API may still tell who the ends are.
    pub held: bool,
}

/// All rows of the interval.
#[derive(Debug)]
pub struct Rows {
    rows: HashMap<RowKey, Row, RandomState>,
    ends: Ends,
    max: usize,
    /// Client-side ports from here on are left out.
    fold_from: u32,
    refused: u64,
    left_out: LeftOut,
}

/// Contributions that make no row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct LeftOut {
    /// Of what is switched off.
    pub switched_off: u64,
    /// Of other nodes that share this kernel.
    pub other_node: u64,
}

impl Rows {
    /// No row yet; there will be at most `max`.
    pub(super) fn new(max: usize, ends: Ends) -> Self {
        Self {
            rows: HashMap::default(),
            ends,
            max,
            fold_from: u32::MAX,
            refused: 0,
            left_out: LeftOut::default(),
        }
    }

    /// Leaves client-side ports from `ephemeral_port` on out, so that one client's connections share a row.
    pub(super) fn folding(mut self, ephemeral_port: u16) -> Self {
        self.fold_from = u32::from(ephemeral_port);
        self
    }

    /// Who the ends are.
    pub(super) fn ends(&mut self) -> &mut Ends {
        &mut self.ends
    }

    /// Contributions left out since the last call.
    pub(super) fn take_left_out(&mut self) -> LeftOut {
        std::mem::take(&mut self.left_out)
    }

    /// Contributions to new rows refused for lack of room since the last call.
    pub(super) fn take_refused(&mut self) -> u64 {
        std::mem::take(&mut self.refused)
    }

    /// Adds a contribution. With all rows taken, one that needs a new row is refused and counted.
    pub(super) fn add(&mut self, origin: &Origin, part: &Row) {
        let Origin { mut flow, udp, cgroup } = *origin;
        let local = match self.ends.local(cgroup, flow.pid, &flow.tuple) {
            Whose::Ours(local) => local,
            Whose::Off => {
                self.left_out.switched_off += 1;
                return;
            }
            Whose::OtherNode => {
                self.left_out.other_node += 1;
                return;
            }
        };
        let at = if part.first_ns == 0 {
            monotonic_ns()
        } else {
            part.first_ns
        };
        let nat = self.ends.destination(&flow, udp, local, at);
        fold_ports(&mut flow, self.fold_from);
        let key = RowKey {
            flow,
            udp,
            local,
            holders: self
                .ends
                .remote_holders(nat.map_or_else(|| ip(flow.tuple.remote), |end| end.ip)),
            nat,
        };
        let Row {
            read,
            written,
            retransmits,
            rtt_sum_us,
            rtt_var_sum_us,
            rtt_count,
            closed,
            established,
            datagrams_read,
            datagrams_written,
            comm,
            first_ns,
            last_ns,
            held: _,
        } = part;
        if self.rows.len() >= self.max && !self.rows.contains_key(&key) {
            self.refused += 1;
            return;
        }
        let row = self.rows.entry(key).or_default();
        row.read += read;
        row.written += written;
        row.retransmits += retransmits;
        row.rtt_sum_us += rtt_sum_us;
        row.rtt_var_sum_us += rtt_var_sum_us;
        row.rtt_count += rtt_count;
        row.closed += closed;
        row.established += established;
        row.datagrams_read += datagrams_read;
        row.datagrams_written += datagrams_written;
        if row.comm[0] == 0 {
            row.comm = *comm;
        }
        if row.first_ns == 0 || (*first_ns != 0 && *first_ns < row.first_ns) {
            row.first_ns = *first_ns;
        }
        row.last_ns = row.last_ns.max(*last_ns);
    }

    /// Number of rows.
    #[must_use]
    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    /// True if there is none.
    #[must_use]
    pub(super) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Takes out up to `max` rows as records of time `time_unix_ns`.
    pub(super) fn take(&mut self, which: Which, max: usize, time_unix_ns: i64, names: &mut Names<'_>) -> Vec<Netflow> {
        let mut records = Vec::with_capacity(max.min(self.rows.len()));
        // extract_if is lazy: what is not taken stays.
        let taken = self.rows.extract_if(|key, row| match which {
            Which::All => true,
            Which::Settled => {
                row.held = !names.is_settled(&key.pair(row));
                !row.held
            }
            Which::Held => row.held && names.is_settled(&key.pair(row)),
        });
        let taken: Vec<_> = taken.take(max).collect();
        records.extend(taken.iter().map(|(key, row)| record(key, row, time_unix_ns, names)));
        records
    }

    /// Rows that [`Which::Settled`] left.
    #[must_use]
    pub(super) fn held(&self) -> usize {
        self.rows.values().filter(|row| row.held).count()
    }
}

// === impl RowKey ===

impl RowKey {
    /// What a record shows of its key.
    fn shown(&self) -> impl Hash {
        let mut flow = self.flow;
        flow.tuple.netns = 0;
        (flow, self.udp, self.nat)
    }

    /// The ends of a row with this key.
    fn pair(&self, row: &Row) -> Pair {
        let Tuple {
            local,
            remote,
            local_port,
            remote_port,
            netns: _,
        } = self.flow.tuple;
        let port = |number, flag| (self.flow.folded & flag == 0).then_some(number);
        Pair {
            local: self.local,
            here: (ip(local), port(local_port, folded::LOCAL)),
            dialled: (ip(remote), port(remote_port, folded::REMOTE)),
            nat: self.nat,
            transport: if self.udp { Transport::Udp } else { Transport::Tcp },
            first_ns: row.first_ns,
            last_ns: row.last_ns,
        }
    }
}

fn record(key: &RowKey, row: &Row, time_unix_ns: i64, names: &mut Names<'_>) -> Netflow {
    let flow = &key.flow;
    let pair = key.pair(row);
    let endpoint = |(ip, port): (_, Option<u16>)| Endpoint {
        ip,
        port: port.map_or(Port::Any, Port::Number),
    };
    let (local, remote) = (endpoint(pair.here), endpoint(pair.dialled));
    let (local_k8s, remote_k8s) = names.ends(&pair);
    let mean = |sum: u64| sum.checked_div(row.rtt_count).unwrap_or(0);
    Netflow {
        time_unix_ns: names.time(key.shown(), time_unix_ns),
        local,
        remote,
        transport: pair.transport,
        family: if remote.ip.is_ipv4() { Family::V4 } else { Family::V6 },
        direction: if flow.direction == direction::INCOMING {
            Direction::Incoming
        } else {
            Direction::Outgoing
        },
        netns: flow.tuple.netns,
        pid: flow.pid,
        process_name: names.process(flow.pid, &row.comm),
        dst_nat: key.nat.map(|end| (end.ip, end.port)),
        dst_domain: names.domain(flow, remote.ip, row.first_ns),
        local_k8s,
        remote_k8s,
        bytes_read: row.read,
        bytes_written: row.written,
        retransmits: row.retransmits,
        rtt_us: mean(row.rtt_sum_us),
        rtt_var_us: mean(row.rtt_var_sum_us),
        tcp_closed: row.closed,
        tcp_established: row.established,
        datagrams_read: row.datagrams_read,
        datagrams_written: row.datagrams_written,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::indexing_slicing)]
    use std::net::IpAddr;

    use super::*;
    use crate::{capture::ends::UnnamedEnds, identity::process::Proc};

    fn take(rows: &mut Rows, max: usize) -> Vec<Netflow> {
        let (proc, unnamed) = (Proc::new("/nonexistent"), UnnamedEnds::default());
        rows.take(Which::All, max, 7, &mut Names::new(&proc, None, &unnamed))
    }

    fn udp(local_port: u16) -> Origin {
        let mut origin = Origin {
            udp: true,
            ..Origin::default()
        };
        origin.flow.tuple.local_port = local_port;
        origin
    }

    #[test]
    fn sums_and_folds() {
        let mut origin = Origin::default();
        let flow = &mut origin.flow;
        flow.tuple.local = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 1];
        flow.tuple.remote = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
        flow.tuple.remote_port = 80;
        flow.direction = direction::OUTGOING;
        flow.folded = folded::LOCAL;
        let mut rows = Rows::new(1000, Ends::default());
        let mut comm = Comm::default();
        comm[..4].copy_from_slice(b"curl");
        let part = Row {
            read: 3,
            rtt_sum_us: 10,
            rtt_count: 1,
            closed: 1,
            comm,
            ..Row::default()
        };
        rows.add(&origin, &part);
        rows.add(&origin, &Row { rtt_sum_us: 20, ..part });
        assert_eq!(rows.len(), 1);
        let records = take(&mut rows, 10);
        assert!(rows.is_empty());
        let one = &records[0];
        assert_eq!(
            (one.bytes_read, one.rtt_us, one.tcp_closed, &*one.process_name),
            (6, 15, 2, "curl")
        );
        assert_eq!((one.local.port, one.remote.port), (Port::Any, Port::Number(80)));
        assert_eq!(one.local.ip, IpAddr::from([10, 0, 0, 1]));
        assert_eq!(one.family, Family::V6);
        assert_eq!((&one.local_k8s, &one.remote_k8s), (&None, &None));
    }

    #[test]
    fn rows_are_bounded_and_refusals_counted() {
        let mut rows = Rows::new(2, Ends::default());
        for port in [1, 2, 3, 1] {
            rows.add(&udp(port), &Row::default());
        }
        assert_eq!((rows.len(), rows.take_refused(), rows.take_refused()), (2, 1, 0));
    }

    #[test]
    fn rows_that_show_the_same_have_times_of_their_own() {
        let mut rows = Rows::new(10, Ends::default());
        for netns in 0..3 {
            let mut origin = udp(1);
            origin.flow.tuple.netns = netns;
            rows.add(&origin, &Row::default());
        }
        rows.add(&udp(2), &Row::default());
        let (proc, unnamed) = (Proc::new("/nonexistent"), UnnamedEnds::default());
        let mut names = Names::new(&proc, None, &unnamed);
        let mut times = [0, 0];
        while !rows.is_empty() {
            for record in rows.take(Which::All, 1, 7, &mut names) {
                let one = usize::from(record.local.port == Port::Number(2));
                times[one] += record.time_unix_ns;
            }
        }
        assert_eq!(times, [7 + 8 + 9, 7]);
    }

    #[test]
    fn takes_no_more_than_asked() {
        let mut rows = Rows::new(1000, Ends::default());
        for port in 0..10 {
            rows.add(
                &udp(port),
                &Row {
                    read: 1,
                    ..Row::default()
                },
            );
        }
        assert_eq!(take(&mut rows, 4).len(), 4);
        assert_eq!(rows.len(), 6);
        assert_eq!(take(&mut rows, 100).len(), 6);
    }

    #[test]
    fn a_row_has_the_time_of_all_its_parts() {
        let mut rows = Rows::new(10, Ends::default());
        for (first_ns, last_ns) in [(0, 0), (7, 8), (3, 4), (0, 5)] {
            let part = Row {
                first_ns,
                last_ns,
                ..Row::default()
            };
            rows.add(&udp(1), &part);
        }
        let row = rows.rows.values().next().map(|row| (row.first_ns, row.last_ns));
        assert_eq!(row, Some((3, 8)));
    }
}
