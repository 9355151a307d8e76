//! The rows of the current interval: look-ups are summed by ends and outcome until the flush makes records of them.

use std::hash::Hash;

use ahash::RandomState;
use ebpf_common::net::{FlowKey, Tuple, direction, folded};
use hashbrown::HashMap;
use records::{
    Direction, Dnsflow, Endpoint, Family, Flow, Port, Transport,
    dnsflow::{Question, TIMED_OUT},
};

use super::sessions::Told;
use crate::{
    capture::{
        conntrack::End,
        ends::{Ends, Names, Pair, Which, Whose, ip},
    },
    identity::k8s::LocalEnd,
};

/// What makes a row.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    /// Ends and direction. The client's port is always left out: each look-up has one of its own.
    flow: FlowKey,
    udp: bool,
    local: LocalEnd,
    /// See [`Ends::remote_holders`].
    holders: u32,
    /// Where a translated flow really goes.
    nat: Option<End>,
    rcode: i32,
    question: Option<Question>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Row {
    count: u64,
    /// Of those with an answer.
    latency_sum_ns: u64,
    latency_max_ns: u64,
    /// When the first query and the last answer passed, monotonic nanoseconds.
    first_ns: u64,
    last_ns: u64,
    /// Left out of a flush because the API may still tell who the ends are.
    held: bool,
}

/// All rows of the interval.
#[derive(Debug)]
pub(super) struct Rows {
    rows: HashMap<Key, Row, RandomState>,
    ends: Ends,
    max: usize,
    left_out: LeftOut,
}

/// Look-ups that make no row, or less of one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct LeftOut {
    /// Of what is switched off.
    pub(super) switched_off: u64,
    /// Of other nodes that share this kernel.
    pub(super) other_node: u64,
    /// There was no room for a row.
    pub(super) refused: u64,
    /// Told without their question: there was no room for as many.
    pub(super) nameless: u64,
}

impl Rows {
    /// No row yet; there will be at most `max`.
    pub(super) fn new(max: usize, ends: Ends) -> Self {
        Self {
            rows: HashMap::default(),
            ends,
            max,
            left_out: LeftOut::default(),
        }
    }

    /// Who the ends are.
    pub(super) fn ends(&mut self) -> &mut Ends {
        &mut self.ends
    }

    /// Adds a look-up. From half of the rows on, one that needs a new row is told without its question; with all rows taken
    /// it is refused, and counted.
    pub(super) fn add(&mut self, told: Told) {
        let Told {
            asked,
            question,
            rcode,
            latency_ns,
            query_ns,
        } = told;
        let local = match self.ends.local(asked.cgroup, 0, &asked.tuple) {
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
        let mut flow = FlowKey {
            tuple: asked.tuple,
            direction: asked.direction,
            ..FlowKey::default()
        };
        let nat = self.ends.destination(&flow, asked.udp, local, query_ns);
        if flow.direction == direction::OUTGOING {
            (flow.tuple.local_port, flow.folded) = (0, folded::LOCAL);
        } else {
            (flow.tuple.remote_port, flow.folded) = (0, folded::REMOTE);
        }
        let holder = nat.map_or_else(|| ip(flow.tuple.remote), |end| end.ip);
        let mut key = Key {
            flow,
            udp: asked.udp,
            local,
            holders: self.ends.remote_holders(holder),
            nat,
            rcode,
            question,
        };
        if self.rows.len() >= self.max / 2 && !self.rows.contains_key(&key) {
            self.left_out.nameless += u64::from(key.question.take().is_some());
            if self.rows.len() >= self.max && !self.rows.contains_key(&key) {
                self.left_out.refused += 1;
                return;
            }
        }
        let row = self.rows.entry(key).or_default();
        let latency_ns = latency_ns.unwrap_or(0);
        row.count += 1;
        row.latency_sum_ns += latency_ns;
        row.latency_max_ns = row.latency_max_ns.max(latency_ns);
        if row.first_ns == 0 || query_ns < row.first_ns {
            row.first_ns = query_ns;
        }
        row.last_ns = row.last_ns.max(query_ns + latency_ns);
    }

    /// Look-ups left out since the last call.
    pub(super) fn take_left_out(&mut self) -> LeftOut {
        std::mem::take(&mut self.left_out)
    }

    /// Number of rows.
    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    /// True if there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Rows that [`Which::Settled`] left.
    pub(super) fn held(&self) -> usize {
        self.rows.values().filter(|row| row.held).count()
    }

    /// Takes out up to `max` rows as records of time `time_unix_ns`.
    pub(super) fn take(&mut self, which: Which, max: usize, time_unix_ns: i64, names: &mut Names<'_>) -> Vec<Dnsflow> {
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
        taken
            .into_iter()
            .map(|(key, row)| record(key, &row, time_unix_ns, names))
            .collect()
    }
}

impl Key {
    /// What a record's tags show of its key.
    fn shown(&self) -> impl Hash {
        let mut flow = self.flow;
        flow.tuple.netns = 0;
        (flow, self.udp, self.question.clone())
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

fn record(key: Key, row: &Row, time_unix_ns: i64, names: &mut Names<'_>) -> Dnsflow {
    let pair = key.pair(row);
    let endpoint = |(ip, port): (_, Option<u16>)| Endpoint {
        ip,
        port: port.map_or(Port::Any, Port::Number),
    };
    let (local, remote) = (endpoint(pair.here), endpoint(pair.dialled));
    let (local_k8s, remote_k8s) = names.ends(&pair);
    let mean = if key.rcode == TIMED_OUT {
        0
    } else {
        row.latency_sum_ns.checked_div(row.count).unwrap_or(0)
    };
    Dnsflow {
        time_unix_ns: names.time(key.shown(), time_unix_ns),
        flow: Flow {
            local,
            remote,
            transport: pair.transport,
            family: if remote.ip.is_ipv4() { Family::V4 } else { Family::V6 },
            direction: if key.flow.direction == direction::INCOMING {
                Direction::Incoming
            } else {
                Direction::Outgoing
            },
            netns: key.flow.tuple.netns,
            pid: 0,
            process_name: names.empty(),
            dst_nat: key.nat.map(|end| (end.ip, end.port)),
            dst_domain: names.domain(&key.flow, remote.ip, row.first_ns),
            local_k8s,
            remote_k8s,
        },
        question: key.question,
        rcode: key.rcode,
        count: row.count,
        latency_ns: mean,
        latency_max_ns: row.latency_max_ns,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::indexing_slicing)]
    use super::{super::sessions::Asked, *};
    use crate::{capture::ends::UnnamedEnds, identity::process::Proc};

    fn told(client_port: u16, rcode: i32, latency_ns: Option<u64>, name: Option<&str>) -> Told {
        Told {
            asked: Asked {
                tuple: Tuple {
                    local_port: client_port,
                    remote_port: 53,
                    ..Tuple::default()
                },
                udp: true,
                direction: direction::OUTGOING,
                cgroup: 0,
            },
            question: name.map(|name| Question {
                name: name.into(),
                kind: "A".into(),
            }),
            rcode,
            latency_ns,
            query_ns: 100,
        }
    }

    fn take(rows: &mut Rows) -> Vec<Dnsflow> {
        let (proc, unnamed) = (Proc::new("/nonexistent"), UnnamedEnds::default());
        let mut records = rows.take(Which::All, 100, 7, &mut Names::new(&proc, None, &unnamed));
        records.sort_by_key(|record| record.rcode);
        records
    }

    #[test]
    fn sums_by_outcome() {
        let mut rows = Rows::new(100, Ends::default());
        rows.add(told(40_000, 0, Some(10), None));
        rows.add(told(1_000, 0, Some(21), None));
        rows.add(told(40_002, 3, Some(5), None));
        rows.add(told(40_003, -1, None, None));
        let records = take(&mut rows);
        let seen: Vec<_> = records
            .iter()
            .map(|it| (it.rcode, it.count, it.latency_ns, it.latency_max_ns))
            .collect();
        assert_eq!(seen, [(-1, 1, 0, 0), (0, 2, 15, 21), (3, 1, 5, 5)]);
        for record in &records {
            let flow = &record.flow;
            assert_eq!((flow.local.port, flow.remote.port), (Port::Any, Port::Number(53)));
            assert_eq!(flow.direction, Direction::Outgoing);
        }
        // The response code is no tag: to a database they would be one point.
        let mut times: Vec<i64> = records.iter().map(|it| it.time_unix_ns).collect();
        times.sort_unstable();
        assert_eq!(times, [7, 8, 9]);
    }

    #[test]
    fn a_server_keeps_its_port() {
        let mut rows = Rows::new(100, Ends::default());
        let mut answered = told(53, 0, Some(1), None);
        answered.asked.direction = direction::INCOMING;
        answered.asked.tuple.remote_port = 40_000;
        rows.add(answered);
        let flow = &take(&mut rows)[0].flow;
        assert_eq!((flow.local.port, flow.remote.port), (Port::Number(53), Port::Any));
        assert_eq!(flow.direction, Direction::Incoming);
    }

    #[test]
    fn rows_are_bounded_and_names_go_first() {
        let mut rows = Rows::new(4, Ends::default());
        for name in ["a", "b", "c", "d", "a"] {
            rows.add(told(1, 0, Some(1), Some(name)));
        }
        // a, b, and one for all others.
        assert_eq!((rows.len(), rows.left_out.nameless, rows.left_out.refused), (3, 2, 0));
        for rcode in 1..4 {
            rows.add(told(1, rcode, Some(1), None));
        }
        assert_eq!((rows.len(), rows.take_left_out().refused), (4, 2));
        let counts: u64 = take(&mut rows).iter().map(|it| it.count).sum();
        assert_eq!((counts, rows.is_empty()), (6, true));
    }
}
