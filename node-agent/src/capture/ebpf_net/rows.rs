//! The rows of the current interval: contributions are summed by flow until the flush makes records of them.

use std::net::{IpAddr, Ipv6Addr};

use ahash::RandomState;
use ebpf_common::net::{FlowKey, direction, folded};
use hashbrown::HashMap;
use records::{Direction, Endpoint, Family, Netflow, Port, Str, Transport};

use crate::identity::process::{Comm, Proc};

/// What makes a row: process, folded ends, direction, transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct RowKey {
    /// Ends (folded ports are 0), process, direction.
    pub flow: FlowKey,
    /// TCP or UDP.
    pub udp: bool,
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
}

/// All rows of the interval.
#[derive(Debug)]
pub struct Rows {
    rows: HashMap<RowKey, Row, RandomState>,
    max: usize,
    refused: u64,
}

impl Rows {
    /// No row yet; there will be at most `max`.
    pub(super) fn new(max: usize) -> Self {
        Self {
            rows: HashMap::default(),
            max,
            refused: 0,
        }
    }

    /// Contributions to new rows refused for lack of room since the last call.
    pub(super) fn take_refused(&mut self) -> u64 {
        std::mem::take(&mut self.refused)
    }

    /// Adds a contribution. With all rows taken, one that needs a new row is refused and counted.
    pub(super) fn add(&mut self, key: RowKey, part: &Row) {
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
    pub(super) fn take(&mut self, max: usize, time_unix_ns: i64, names: &mut Names<'_>) -> Vec<Netflow> {
        let mut records = Vec::with_capacity(max.min(self.rows.len()));
        // extract_if is lazy: what is not taken stays.
        for (key, row) in self.rows.extract_if(|_, _| true).take(max) {
            records.push(record(&key, &row, time_unix_ns, names));
        }
        records
    }
}

/// Process names of one flush; each process is looked up once.
pub(super) struct Names<'a> {
    proc: &'a Proc,
    known: HashMap<(u32, Comm), Str, RandomState>,
    empty: Str,
}

impl<'a> Names<'a> {
    /// Looks up in `proc`.
    #[must_use]
    pub(super) fn new(proc: &'a Proc) -> Self {
        Self {
            proc,
            known: HashMap::default(),
            empty: "".into(),
        }
    }

    fn get(&mut self, pid: u32, comm: &Comm) -> Str {
        let proc = self.proc;
        self.known
            .entry((pid, *comm))
            .or_insert_with(|| proc.name(pid, comm))
            .clone()
    }
}

/// The address in a 16-byte field; v4-mapped becomes IPv4.
#[must_use]
pub(super) fn ip(bytes: [u8; 16]) -> IpAddr {
    let v6 = Ipv6Addr::from(bytes);
    v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4)
}

fn record(key: &RowKey, row: &Row, time_unix_ns: i64, names: &mut Names<'_>) -> Netflow {
    let flow = &key.flow;
    let port = |number: u16, flag: u8| {
        if flow.folded & flag == 0 {
            Port::Number(number)
        } else {
            Port::Any
        }
    };
    let local = Endpoint {
        ip: ip(flow.tuple.local),
        port: port(flow.tuple.local_port, folded::LOCAL),
    };
    let remote = Endpoint {
        ip: ip(flow.tuple.remote),
        port: port(flow.tuple.remote_port, folded::REMOTE),
    };
    let mean = |sum: u64| sum.checked_div(row.rtt_count).unwrap_or(0);
    Netflow {
        time_unix_ns,
        local,
        remote,
        transport: if key.udp { Transport::Udp } else { Transport::Tcp },
        family: if remote.ip.is_ipv4() { Family::V4 } else { Family::V6 },
        direction: if flow.direction == direction::INCOMING {
            Direction::Incoming
        } else {
            Direction::Outgoing
        },
        netns: flow.tuple.netns,
        pid: flow.pid,
        process_name: if row.comm[0] == 0 {
            names.empty.clone()
        } else {
            names.get(flow.pid, &row.comm)
        },
        dst_nat: None,
        dst_domain: names.empty.clone(),
        local_k8s: None,
        remote_k8s: None,
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
    use super::*;

    #[test]
    fn sums_and_folds() {
        let mut key = RowKey {
            flow: FlowKey::default(),
            udp: false,
        };
        key.flow.tuple.local = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 1];
        key.flow.tuple.remote = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
        key.flow.tuple.remote_port = 80;
        key.flow.direction = direction::OUTGOING;
        key.flow.folded = folded::LOCAL;
        let mut rows = Rows::new(1000);
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
        rows.add(key, &part);
        rows.add(key, &Row { rtt_sum_us: 20, ..part });
        assert_eq!(rows.len(), 1);
        let proc = Proc::new("/nonexistent");
        let records = rows.take(10, 7, &mut Names::new(&proc));
        assert!(rows.is_empty());
        let one = &records[0];
        assert_eq!(
            (one.bytes_read, one.rtt_us, one.tcp_closed, &*one.process_name),
            (6, 15, 2, "curl")
        );
        assert_eq!((one.local.port, one.remote.port), (Port::Any, Port::Number(80)));
        assert_eq!(one.local.ip, IpAddr::from([10, 0, 0, 1]));
        assert_eq!(one.family, Family::V6);
    }

    #[test]
    fn rows_are_bounded_and_refusals_counted() {
        let mut rows = Rows::new(2);
        for port in [1, 2, 3, 1] {
            let mut key = RowKey {
                flow: FlowKey::default(),
                udp: true,
            };
            key.flow.tuple.local_port = port;
            rows.add(key, &Row::default());
        }
        assert_eq!((rows.len(), rows.take_refused(), rows.take_refused()), (2, 1, 0));
    }

    #[test]
    fn takes_no_more_than_asked() {
        let mut rows = Rows::new(1000);
        for port in 0..10 {
            let mut key = RowKey {
                flow: FlowKey::default(),
                udp: true,
            };
            key.flow.tuple.local_port = port;
            rows.add(
                key,
                &Row {
                    read: 1,
                    ..Row::default()
                },
            );
        }
        let proc = Proc::new("/nonexistent");
        let mut names = Names::new(&proc);
        assert_eq!(rows.take(4, 0, &mut names).len(), 4);
        assert_eq!(rows.len(), 6);
        assert_eq!(rows.take(100, 0, &mut names).len(), 6);
    }
}
