//! Who the ends of flows are.
//!
//! ```text
//! part of a row ▶ [`Ends`]: whose is the local end, by cgroup, process or namespace (these go before the flush)
//! row ▶ flush ▶ [`Book`]: the names of both ends at the time of the row; each end is looked up once per flush
//! ```
//! Shared by the captures: what a row is of is theirs, a [`Pair`] is what names it. Without a cluster there are no names,
//! and this costs nothing.

use std::{
    hash::Hash,
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
};

use ahash::RandomState;
use ebpf_common::net::{FOREIGN_PID, FlowKey, Tuple, UdpKey, direction, folded};
use hashbrown::{HashMap, HashSet};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
};
use records::{K8sEndpoint, Str, Transport};
use telemetry::Telemetry;

use crate::{
    capture::{
        conntrack::{self, End, Nat, Protocol},
        domains::DomainNames,
    },
    ebpf::sys::monotonic_ns,
    identity::{
        cgroup::Uid,
        k8s::{Answer, LocalEnd, Names as Cluster, SETTLE_NS, Unnamed, When},
        process::{Comm, Proc},
    },
};

/// Pods by their identity.
pub(crate) type Pods = HashSet<Uid, RandomState>;

/// Local ends remembered between two drains.
const SEEN_MAX: usize = 65_536;
/// Addresses without an object that are remembered.
const STRANGERS_MAX: usize = 65_536;
/// How long they are, nanoseconds.
const STRANGER_NS: i64 = 60 * 1_000_000_000;

/// The node's part of the cluster's identity, for as long as a capture runs.
#[derive(Debug, Default)]
pub(crate) struct Ends {
    names: Option<Cluster>,
    /// Whose a cgroup, process and namespace are; `None` for what belongs to another node that shares this kernel.
    seen: HashMap<(u64, u32, u32), Option<LocalEnd>, RandomState>,
    /// Other nodes share this kernel.
    shared: bool,
    /// Pods that are switched off.
    off: Arc<Pods>,
    /// What is in no pod is switched off.
    host_off: bool,
    strangers: Strangers,
    /// Where translated flows go, while that is asked for.
    nat: Option<Nat>,
    /// Pods that it is not asked for.
    nat_off: Arc<Pods>,
    /// It is not asked for what is in no pod.
    host_nat_off: bool,
}

/// Remote addresses that no object had after all time to tell, and when that was found: most of the world. Rows do not
/// wait for their names again.
type Strangers = HashMap<IpAddr, i64, RandomState>;

/// Whose an end is, and whether it is reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Whose {
    /// This node's, and on.
    Ours(LocalEnd),
    /// This node's, and switched off.
    Off,
    /// Another node's that shares this kernel.
    OtherNode,
}

/// Which rows a flush takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    /// All.
    All,
    /// All whose ends are known as well as they will be; the others are held.
    Settled,
    /// Of those held before, the ones that are by now.
    Held,
}

impl Ends {
    /// Named by `names`; without it no end has a name.
    pub(crate) fn new(names: Option<Cluster>) -> Self {
        Self {
            names,
            ..Self::default()
        }
    }

    /// Other nodes share this kernel: an end without a process, in a network namespace of nobody here, is theirs.
    pub(crate) fn share_kernel(&mut self) {
        self.shared = true;
    }

    /// From now on these pods, and with `host_off` what is in no pod, are left out.
    pub(crate) fn leave_out(&mut self, off: Arc<Pods>, host_off: bool) {
        (self.off, self.host_off) = (off, host_off);
    }

    /// From now on translated flows are looked up in `nat`, if any, but not those of these pods and, with `host_off`, of
    /// what is in no pod.
    pub(crate) fn translate(&mut self, nat: Option<Nat>, off: Arc<Pods>, host_off: bool) {
        (self.nat, self.nat_off, self.host_nat_off) = (nat, off, host_off);
    }

    /// Waits until all translations are known that the kernel told of before this call.
    pub(crate) fn catch_up(&self) {
        if let Some(nat) = &self.nat {
            nat.catch_up();
        }
    }

    /// Where a flow that was opened here really goes, if elsewhere; `at` is a monotonic time when it was there.
    pub(crate) fn destination(&self, flow: &FlowKey, udp: bool, local: LocalEnd, at: u64) -> Option<End> {
        let nat = self.nat.as_ref()?;
        let off = match local {
            LocalEnd::Pod(uid) => self.nat_off.contains(&uid),
            LocalEnd::Host | LocalEnd::Unknown => self.host_nat_off,
        };
        if off || flow.direction != direction::OUTGOING || flow.folded & folded::LOCAL != 0 {
            return None;
        }
        let Tuple {
            local,
            remote,
            local_port,
            remote_port,
            netns,
        } = flow.tuple;
        let dialled = conntrack::Tuple {
            protocol: if udp { Protocol::Udp } else { Protocol::Tcp },
            from: end(local, local_port),
            to: end(remote, remote_port),
        };
        nat.destination(netns, &dialled, at)
    }

    /// A UDP flow with the ends that its socket has: where its own network namespace translates it, its packets were seen
    /// translated.
    pub(crate) fn dialled(&self, key: &UdpKey, netns: u32) -> UdpKey {
        let seen = Tuple {
            local: key.local,
            remote: key.remote,
            local_port: key.local_port,
            remote_port: key.remote_port,
            netns,
        };
        let dialled = self.of_socket(Protocol::Udp, &seen);
        UdpKey {
            local: dialled.local,
            local_port: dialled.local_port,
            remote: dialled.remote,
            remote_port: dialled.remote_port,
            ..*key
        }
    }

    /// The same of a TCP connection.
    pub(crate) fn connected(&self, seen: &Tuple) -> Tuple {
        self.of_socket(Protocol::Tcp, seen)
    }

    fn of_socket(&self, protocol: Protocol, seen: &Tuple) -> Tuple {
        let packet = conntrack::Tuple {
            protocol,
            from: end(seen.local, seen.local_port),
            to: end(seen.remote, seen.remote_port),
        };
        match self.nat.as_ref().and_then(|nat| nat.dialled(seen.netns, &packet)) {
            Some(dialled) => Tuple {
                local: octets(dialled.from.ip),
                local_port: dialled.from.port,
                remote: octets(dialled.to.ip),
                remote_port: dialled.to.port,
                ..*seen
            },
            None => *seen,
        }
    }

    /// Forgets what was looked up: processes' numbers are used again.
    pub(crate) fn forget(&mut self) {
        self.seen.clear();
    }

    /// Whose a local end is.
    pub(crate) fn local(&mut self, cgroup: u64, pid: u32, tuple: &Tuple) -> Whose {
        match self.owner(cgroup, pid, tuple) {
            None => Whose::OtherNode,
            Some(LocalEnd::Pod(uid)) if self.off.contains(&uid) => Whose::Off,
            Some(LocalEnd::Host | LocalEnd::Unknown) if self.host_off => Whose::Off,
            Some(end) => Whose::Ours(end),
        }
    }

    fn owner(&mut self, cgroup: u64, pid: u32, tuple: &Tuple) -> Option<LocalEnd> {
        let Some(names) = &self.names else {
            return Some(LocalEnd::Unknown);
        };
        if pid == FOREIGN_PID {
            return None;
        }
        if self.seen.len() >= SEEN_MAX {
            self.seen.clear();
        }
        *self.seen.entry((cgroup, pid, tuple.netns)).or_insert_with(|| {
            let end = names.local_end(cgroup, pid, tuple.netns);
            if self.shared && pid == 0 && end == LocalEnd::Unknown {
                return None;
            }
            if let LocalEnd::Pod(uid) = end {
                if names.is_local(uid) == Some(false) {
                    return None;
                }
                names.learn_netns(uid, tuple.netns);
            }
            Some(end)
        })
    }

    /// Grows when the remote address changes hands, so that rows before and after stay apart.
    pub(crate) fn remote_holders(&self, remote: IpAddr) -> u32 {
        let holders = self.names.as_ref().map_or(0, |names| names.holders(remote));
        u32::try_from(holders).unwrap_or(u32::MAX)
    }

    /// Names for a flush at `now`, in nanoseconds since 1970 and monotonic. Give the book back when the flush is over.
    pub(crate) fn book(&mut self, now_unix_ns: i64, now_ns: u64) -> Option<Book> {
        let names = self.names.clone()?;
        let mut strangers = std::mem::take(&mut self.strangers);
        strangers.retain(|_, since| now_unix_ns - *since < STRANGER_NS);
        Some(Book {
            names,
            now: now_unix_ns,
            boot: now_unix_ns.saturating_sub_unsigned(now_ns),
            local: HashMap::default(),
            remote: HashMap::default(),
            strangers,
        })
    }

    /// Keeps what a flush learned.
    pub(crate) fn give_back(&mut self, book: Option<Book>) {
        if let Some(book) = book {
            self.strangers = book.strangers;
        }
    }
}

/// Key of an end's name: address, port if it is not folded, transport.
type Address = (IpAddr, Option<u16>, Transport);

/// The two ends of a row, and when they were who they are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pair {
    /// Whose the local end is.
    pub(crate) local: LocalEnd,
    /// Address of the local end, and its port if it is not folded.
    pub(crate) here: (IpAddr, Option<u16>),
    /// The same of the remote end, as it was dialled.
    pub(crate) dialled: (IpAddr, Option<u16>),
    /// Where a translated flow really goes.
    pub(crate) nat: Option<End>,
    pub(crate) transport: Transport,
    /// When the ends first and last were who they are, monotonic nanoseconds; 0 if not known.
    pub(crate) first_ns: u64,
    pub(crate) last_ns: u64,
}

/// Names of one flush.
#[derive(Debug)]
pub(crate) struct Book {
    names: Cluster,
    /// Nanoseconds since 1970.
    now: i64,
    /// Zero of the monotonic clock, nanoseconds since 1970.
    boot: i64,
    local: HashMap<(LocalEnd, Address), Answer, RandomState>,
    remote: HashMap<Address, Answer, RandomState>,
    strangers: Strangers,
}

impl Book {
    /// Answers for both ends.
    pub(crate) fn ends(&mut self, pair: &Pair) -> (Answer, Answer) {
        let when = self.when(pair);
        let transport = pair.transport;
        let here: Address = (pair.here.0, pair.here.1, transport);
        let dialled: Address = (pair.dialled.0, pair.dialled.1, transport);
        let there = pair.nat.map_or(dialled, |end| (end.ip, Some(end.port), transport));
        let names = &self.names;
        let local = cached(&mut self.local, (pair.local, here), when, || {
            names.local(pair.local, here.0, here.1, transport, when)
        });
        // Both ends are in one network namespace: a pod of its own is on both.
        if there.0.is_loopback() {
            let both = match pair.local {
                LocalEnd::Pod(uid) if !names.in_host_network(uid) => local.clone(),
                _ => Answer {
                    name: names.own_node().ok_or(Unnamed::Unknown),
                    ..local.clone()
                },
            };
            return (local, both);
        }
        let mut remote = |there: Address| {
            cached(&mut self.remote, there, when, || {
                names.remote(there.0, there.1, transport, when)
            })
        };
        let backend = remote(there);
        if there == dialled {
            return (local, backend);
        }
        (local, behind(backend, remote(dialled)))
    }

    /// False while the API may still tell more about these ends.
    pub(crate) fn is_settled(&mut self, pair: &Pair) -> bool {
        let when = self.when(pair);
        let (local, remote) = self.ends(pair);
        let there = pair.nat.map_or(pair.dialled.0, |end| end.ip);
        let old = pair.first_ns == 0 || when.now - when.first >= self.names.patience(there, when.now);
        let less = remote.name.as_ref().err().or(remote.lesser.as_ref());
        let nobody = matches!(less, Some(Unnamed::Unknown | Unnamed::Outside));
        if old {
            if nobody && self.strangers.len() < STRANGERS_MAX {
                self.strangers.entry(there).or_insert(self.now);
            }
            return true;
        }
        let whole = |answer: &Answer| answer.name.is_ok() && answer.lesser.is_none();
        let stranger = nobody && (there.is_loopback() || self.strangers.contains_key(&there));
        whole(&local) && (whole(&remote) || stranger)
    }

    fn when(&self, pair: &Pair) -> When {
        let unix = |ns: u64| match ns {
            0 => self.now - SETTLE_NS,
            ns => self.boot.saturating_add_unsigned(ns).min(self.now),
        };
        When {
            first: unix(pair.first_ns),
            last: unix(pair.last_ns),
            now: self.now,
        }
    }
}

/// Names of processes and ends of one flush; each is looked up once.
pub(crate) struct Names<'a> {
    proc: &'a Proc,
    book: Option<Book>,
    unnamed: &'a UnnamedEnds,
    domains: Option<&'a DomainNames>,
    known: HashMap<(u32, Comm), Str, RandomState>,
    /// How many rows so far show the same of their keys, by hash of that.
    shown: HashMap<u64, i64, RandomState>,
    empty: Str,
}

impl<'a> Names<'a> {
    /// Looks up processes in `proc` and ends in `book`; ends without a name are counted.
    #[must_use]
    pub(crate) fn new(proc: &'a Proc, book: Option<Book>, unnamed: &'a UnnamedEnds) -> Self {
        Self {
            proc,
            book,
            unnamed,
            domains: None,
            known: HashMap::default(),
            shown: HashMap::default(),
            empty: "".into(),
        }
    }

    /// Names of destinations are those of `domains`.
    pub(crate) fn with_domains(self, domains: &'a DomainNames) -> Self {
        Self {
            domains: Some(domains),
            ..self
        }
    }

    /// The name that the local end knew the address by that it opened a flow to, at a monotonic time; empty if it did not
    /// open it, or knew none. Without a time (0) it is now.
    pub(crate) fn domain(&self, flow: &FlowKey, remote: IpAddr, at_ns: u64) -> Str {
        let known = match (flow.direction, self.domains) {
            (direction::OUTGOING, Some(domains)) => {
                let at_ns = if at_ns == 0 { monotonic_ns() } else { at_ns };
                domains.name(flow.tuple.netns, remote, at_ns)
            }
            _ => None,
        };
        known.unwrap_or_else(|| self.empty())
    }

    /// The book, to be given back.
    pub(crate) fn into_book(self) -> Option<Book> {
        self.book
    }

    /// The time of a row, of which `shown` is what it shows of its key. Two that show the same (a process changed its
    /// namespace, an address its holder) would be one and the same point to a database: each further one is of a nanosecond
    /// later.
    pub(crate) fn time(&mut self, shown: impl Hash, time_unix_ns: i64) -> i64 {
        let known = self.shown.entry(self.known.hasher().hash_one(&shown)).or_default();
        let later = *known;
        *known += 1;
        time_unix_ns + later
    }

    /// The empty text.
    #[must_use]
    pub(crate) fn empty(&self) -> Str {
        self.empty.clone()
    }

    /// Name of a process; empty without `comm`.
    pub(crate) fn process(&mut self, pid: u32, comm: &Comm) -> Str {
        if comm[0] == 0 {
            return self.empty();
        }
        let proc = self.proc;
        self.known
            .entry((pid, *comm))
            .or_insert_with(|| proc.name(pid, comm))
            .clone()
    }

    /// Names of both ends, local and remote; ends without are counted.
    pub(crate) fn ends(&mut self, pair: &Pair) -> (Option<Arc<K8sEndpoint>>, Option<Arc<K8sEndpoint>>) {
        let Some(book) = &mut self.book else {
            return (None, None);
        };
        let (local, remote) = book.ends(pair);
        (self.unnamed.name("local", local), self.unnamed.name("remote", remote))
    }

    /// False while the API may still tell more about these ends.
    pub(crate) fn is_settled(&mut self, pair: &Pair) -> bool {
        self.book.as_mut().is_none_or(|book| book.is_settled(pair))
    }
}

/// The address in a 16-byte field; v4-mapped becomes IPv4.
#[must_use]
pub(crate) fn ip(bytes: [u8; 16]) -> IpAddr {
    let v6 = Ipv6Addr::from(bytes);
    v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4)
}

fn end(address: [u8; 16], port: u16) -> End {
    End { ip: ip(address), port }
}

fn octets(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// Who is behind an address that was dialled: the backend, of the service that was dialled. Of one that nobody knows the
/// service is all there is to say.
fn behind(backend: Answer, dialled: Answer) -> Answer {
    match (&backend.name, &dialled.name) {
        (Err(why), Ok(_)) => Answer {
            lesser: Some(*why),
            since: backend.since.max(dialled.since),
            name: dialled.name,
        },
        (Ok(pod), Ok(service))
            if !service.service.is_empty() && service.service != pod.service && service.namespace == pod.namespace =>
        {
            Answer {
                name: Ok(Arc::new(K8sEndpoint {
                    service: service.service.clone(),
                    ..(**pod).clone()
                })),
                since: backend.since.max(dialled.since),
                ..backend
            }
        }
        _ => backend,
    }
}

/// The answer that is known, if it holds for that time.
fn cached<K: Eq + std::hash::Hash>(
    known: &mut HashMap<K, Answer, RandomState>,
    key: K,
    when: When,
    look_up: impl FnOnce() -> Answer,
) -> Answer {
    if let Some(answer) = known.get(&key)
        && answer.since <= when.first
    {
        return answer.clone();
    }
    let answer = look_up();
    known.insert(key, answer.clone());
    answer
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct UnnamedLabel {
    end: &'static str,
    reason: &'static str,
}

/// Ends of rows that were sent without a name, or with a lesser one.
#[derive(Clone, Debug, Default)]
pub(crate) struct UnnamedEnds {
    ends: Family<UnnamedLabel, Counter>,
    named: Family<EndLabel, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EndLabel {
    end: &'static str,
}

impl UnnamedEnds {
    /// Registers the metrics with this prefix.
    pub(crate) fn new(telemetry: &Telemetry, prefix: &'static str) -> Self {
        let this = Self::default();
        telemetry.register(prefix, |registry| {
            registry.register(
                "named_ends",
                "Ends of rows sent with their whole name",
                this.named.clone(),
            );
            registry.register(
                "unnamed_ends",
                "Ends of rows sent without a name, or with a part of it",
                this.ends.clone(),
            );
        });
        this
    }

    /// Counts an end, and takes its name.
    pub(crate) fn name(&self, end: &'static str, answer: Answer) -> Option<Arc<K8sEndpoint>> {
        match answer.name.as_ref().err().copied().or(answer.lesser) {
            Some(why) => {
                let reason = why.as_str();
                self.ends.get_or_create(&UnnamedLabel { end, reason }).inc()
            }
            None => self.named.get_or_create(&EndLabel { end }).inc(),
        };
        answer.name.ok()
    }
}
