//! The rows of the current interval: exchanges are summed by ends and by what was asked and answered, until the flush makes
//! records of them.

use std::hash::{Hash, Hasher};

use ahash::RandomState;
use ebpf_common::net::{FlowKey, Tuple, direction, folded};
use ebpf_programs::net::fold_ports;
use hashbrown::{Equivalent, HashMap};
use records::{Direction, Endpoint, Family, Flow, Httpflow, Port, Str, Transport};

use super::{events::Owner, routes::Routes};
use crate::{
    capture::{
        conntrack::End,
        ends::{Ends, Names, Pair, Which, Whose, ip},
    },
    identity::{k8s::LocalEnd, process::Comm},
    protocols::{Exchange, Version, classify::METHODS},
};

/// What stands for paths, and for methods that nobody knows, when there are too many different ones.
const OTHER: &str = "other";

/// Where exchanges come from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Origin {
    /// The ends, as packets have them.
    pub(super) tuple: Tuple,
    /// The local end sends requests.
    pub(super) client: bool,
    pub(super) owner: Owner,
}

/// What is known of an origin, for as long as that may be believed.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Known(Option<(u64, Reported)>);

#[derive(Clone, Copy, Debug)]
enum Reported {
    As(Of),
    Off,
    OtherNode,
}

/// What all exchanges of a connection have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Of {
    /// Of all the others: they are long, and exchanges many.
    hash: u64,
    /// Ends (folded ports are 0), process and direction.
    flow: FlowKey,
    local: LocalEnd,
    /// See [`Ends::remote_holders`].
    holders: u32,
    /// Where a translated flow really goes.
    nat: Option<End>,
}

/// What was asked and answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Said<'a> {
    method: &'a str,
    path: &'a str,
    truncated: bool,
    version: Version,
    status: u16,
    grpc: Option<Option<u32>>,
}

/// What makes a row.
#[derive(Clone, Debug)]
struct Key {
    of: Of,
    method: Str,
    path: Str,
    truncated: bool,
    version: Version,
    status: u16,
    grpc: Option<Option<u32>>,
}

/// The same, borrowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Borrowed<'a> {
    of: &'a Of,
    said: Said<'a>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Row {
    count: u64,
    /// Of those with an answer: how many, and the sum of their latencies.
    answered: u64,
    latency_sum_ns: u64,
    sent: u64,
    received: u64,
    comm: Comm,
    /// When the first request and the last answer passed, monotonic nanoseconds.
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
    routes: Routes,
    /// Rows with paths of their own.
    series_max: usize,
    /// All rows.
    max: usize,
    ephemeral_port: u32,
    /// What was found out of connections before is not believed any more.
    age: u64,
    counts: Counts,
}

/// Exchanges, by what became of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    /// All.
    pub(super) exchanges: u64,
    /// Of what is switched off.
    pub(super) switched_off: u64,
    /// Of other nodes that share this kernel.
    pub(super) other_node: u64,
    /// There was no room for a row.
    pub(super) refused: u64,
    /// Told without their path: there was no room for as many.
    pub(super) other: u64,
    /// Nothing is known but that something passed.
    pub(super) nothing: u64,
    /// Of a connection that was joined in the middle, and so perhaps not a pair.
    pub(super) joined: u64,
    /// Bytes of them were not seen that were needed.
    pub(super) bytes_missing: u64,
    /// The connection or stream ended before they did.
    pub(super) aborted: u64,
    /// Their last byte was not seen.
    pub(super) unfinished: u64,
}

impl Rows {
    /// No row yet; there will be at most `series_max` with paths of their own. Client-side ports from `ephemeral_port` on
    /// are left out.
    pub(super) fn new(series_max: usize, ephemeral_port: u16, ends: Ends) -> Self {
        Self {
            rows: HashMap::default(),
            ends,
            routes: Routes::default(),
            series_max,
            max: series_max + series_max / 4 + 1024,
            ephemeral_port: u32::from(ephemeral_port),
            age: 0,
            counts: Counts::default(),
        }
    }

    /// Has these patterns stand for the paths that match them.
    pub(super) fn with_routes(mut self, routes: Routes) -> Self {
        self.routes = routes;
        self
    }

    /// Who the ends are.
    pub(super) fn ends(&mut self) -> &mut Ends {
        &mut self.ends
    }

    /// Time has passed: who the ends are is asked again.
    pub(super) fn grow_older(&mut self) {
        self.age += 1;
    }

    /// Adds an exchange.
    #[inline]
    pub(super) fn add(&mut self, origin: &Origin, known: &mut Known, exchange: &Exchange<'_>) {
        self.counts.exchanges += 1;
        if exchange.method.is_none() && exchange.status.is_none() {
            self.counts.nothing += 1;
            return;
        }
        let first_ns = exchange.request.or(exchange.response).map_or(0, |part| part.first_ns);
        let of = match known.0.filter(|(age, _)| *age == self.age) {
            Some((_, reported)) => reported,
            None => {
                let reported = self.look_up(origin, first_ns);
                known.0 = Some((self.age, reported));
                reported
            }
        };
        let of = match of {
            Reported::As(of) => of,
            Reported::Off => {
                self.counts.switched_off += 1;
                return;
            }
            Reported::OtherNode => {
                self.counts.other_node += 1;
                return;
            }
        };
        self.count_flags(exchange);
        let path = exchange.path.unwrap_or_default();
        let (path, truncated) = match self.routes.of(path, exchange.path_truncated) {
            Some(pattern) => (pattern, false),
            None => (path, exchange.path_truncated),
        };
        let said = Said {
            method: exchange.method.unwrap_or_default(),
            path,
            truncated,
            version: exchange.version,
            status: exchange.status.unwrap_or(0),
            grpc: exchange.grpc.map(|grpc| grpc.status),
        };
        let key = Borrowed { of: &of, said };
        let row = if self.rows.len() < self.series_max {
            Some(self.rows.entry_ref(&key).or_default())
        } else {
            row_of_many(&mut self.rows, self.max, key, &mut self.counts)
        };
        let Some(row) = row else {
            self.counts.refused += 1;
            return;
        };
        row.count += 1;
        if let Some(latency_ns) = exchange.latency_ns() {
            row.answered += 1;
            row.latency_sum_ns = row.latency_sum_ns.saturating_add(latency_ns);
        }
        let bytes = |part: Option<crate::protocols::Transfer>| part.map_or(0, |part| part.bytes);
        let (asked, answered) = (bytes(exchange.request), bytes(exchange.response));
        let (sent, received) = if origin.client {
            (asked, answered)
        } else {
            (answered, asked)
        };
        row.sent = row.sent.saturating_add(sent);
        row.received = row.received.saturating_add(received);
        if row.comm[0] == 0 {
            row.comm = origin.owner.comm;
        }
        if row.first_ns == 0 || first_ns < row.first_ns {
            row.first_ns = first_ns;
        }
        let last_ns = exchange.response.or(exchange.request).map_or(0, |part| part.last_ns);
        row.last_ns = row.last_ns.max(last_ns);
    }

    fn look_up(&mut self, origin: &Origin, at_ns: u64) -> Reported {
        let Origin { tuple, client, owner } = *origin;
        let local = match self.ends.local(owner.cgroup, owner.pid, &tuple) {
            Whose::Ours(local) => local,
            Whose::Off => return Reported::Off,
            Whose::OtherNode => return Reported::OtherNode,
        };
        let mut flow = FlowKey {
            tuple: if client { self.ends.connected(&tuple) } else { tuple },
            pid: owner.pid,
            direction: if client {
                direction::OUTGOING
            } else {
                direction::INCOMING
            },
            ..FlowKey::default()
        };
        let nat = self.ends.destination(&flow, false, local, at_ns);
        fold_ports(&mut flow, self.ephemeral_port);
        let holder = nat.map_or_else(|| ip(flow.tuple.remote), |end| end.ip);
        let holders = self.ends.remote_holders(holder);
        Reported::As(Of {
            hash: self.rows.hasher().hash_one((flow, local, holders, nat)),
            flow,
            local,
            holders,
            nat,
        })
    }

    fn count_flags(&mut self, exchange: &Exchange<'_>) {
        let flags = exchange.flags;
        self.counts.joined += u64::from(flags.joined);
        self.counts.bytes_missing += u64::from(flags.bytes_missing);
        self.counts.aborted += u64::from(flags.aborted);
        self.counts.unfinished += u64::from(flags.unfinished);
    }

    /// What was counted since the last call.
    pub(super) fn take_counts(&mut self) -> Counts {
        std::mem::take(&mut self.counts)
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
    pub(super) fn take(&mut self, which: Which, max: usize, time_unix_ns: i64, names: &mut Names<'_>) -> Vec<Httpflow> {
        // extract_if is lazy: what is not taken stays.
        let taken = self.rows.extract_if(|key, row| match which {
            Which::All => true,
            Which::Settled => {
                row.held = !names.is_settled(&key.of.pair(row));
                !row.held
            }
            Which::Held => row.held && names.is_settled(&key.of.pair(row)),
        });
        let taken: Vec<_> = taken.take(max).collect();
        taken
            .into_iter()
            .map(|(key, row)| record(key, &row, time_unix_ns, names))
            .collect()
    }
}

/// The row of an exchange where there is no room for further paths: what needs a row of its own is told without its path.
/// With `max` rows there is none.
fn row_of_many<'r>(
    rows: &'r mut HashMap<Key, Row, RandomState>,
    max: usize,
    mut key: Borrowed<'_>,
    counts: &mut Counts,
) -> Option<&'r mut Row> {
    if !rows.contains_key(&key) {
        counts.other += 1;
        let said = key.said;
        key.said = Said {
            path: OTHER,
            truncated: false,
            method: if is_common(said.method) { said.method } else { OTHER },
            ..said
        };
        if rows.len() >= max && !rows.contains_key(&key) {
            return None;
        }
    }
    Some(rows.entry_ref(&key).or_default())
}

fn is_common(method: &str) -> bool {
    method.is_empty()
        || METHODS
            .iter()
            .any(|known| known.strip_suffix(b" ") == Some(method.as_bytes()))
}

// === impl Key ===

impl Key {
    fn borrow(&self) -> Borrowed<'_> {
        Borrowed {
            of: &self.of,
            said: Said {
                method: &self.method,
                path: &self.path,
                truncated: self.truncated,
                version: self.version,
                status: self.status,
                grpc: self.grpc,
            },
        }
    }
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        self.borrow() == other.borrow()
    }
}

impl Eq for Key {}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.borrow().hash(state);
    }
}

impl Equivalent<Key> for Borrowed<'_> {
    fn equivalent(&self, key: &Key) -> bool {
        *self == key.borrow()
    }
}

impl From<&Borrowed<'_>> for Key {
    fn from(from: &Borrowed<'_>) -> Self {
        let Said {
            method,
            path,
            truncated,
            version,
            status,
            grpc,
        } = from.said;
        Self {
            of: *from.of,
            method: method.into(),
            path: path.into(),
            truncated,
            version,
            status,
            grpc,
        }
    }
}

// === impl Of ===

impl Hash for Of {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.hash);
    }
}

impl Of {
    /// The ends of a row of it.
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
            transport: Transport::Tcp,
            first_ns: row.first_ns,
            last_ns: row.last_ns,
        }
    }
}

fn record(key: Key, row: &Row, time_unix_ns: i64, names: &mut Names<'_>) -> Httpflow {
    let pair = key.of.pair(row);
    let endpoint = |(ip, port): (_, Option<u16>)| Endpoint {
        ip,
        port: port.map_or(Port::Any, Port::Number),
    };
    let (local, remote) = (endpoint(pair.here), endpoint(pair.dialled));
    let (local_k8s, remote_k8s) = names.ends(&pair);
    let flow = &key.of.flow;
    // A point is told from others by its tags, and what was asked is in fields.
    let mut shown = *flow;
    shown.tuple.netns = 0;
    Httpflow {
        time_unix_ns: names.time((shown, key.of.nat), time_unix_ns),
        flow: Flow {
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
            dst_nat: key.of.nat.map(|end| (end.ip, end.port)),
            dst_domain: names.domain(flow, remote.ip, row.first_ns),
            local_k8s,
            remote_k8s,
        },
        http_version: key.version.as_str().into(),
        status_code: u32::from(key.status),
        grpc_status: key.grpc.flatten(),
        truncated: key.truncated,
        count: row.count,
        latency_ns: row.latency_sum_ns.checked_div(row.answered).unwrap_or(0),
        bytes_read: row.received,
        bytes_written: row.sent,
        method: key.method,
        path: key.path,
    }
}

#[cfg(test)]
#[path = "rows_tests.rs"]
mod tests;
