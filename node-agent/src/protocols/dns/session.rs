//! Which answer belongs to which query, and which query had none.

use std::hash::Hash;

use ahash::RandomState;
use hashbrown::HashMap;

use super::Message;

/// What the field `rcode` says of a query without an answer.
pub const RCODE_TIMEOUT: i32 = -1;
/// Different names that may be asked under one id between the same ends at once.
const SAME_ID_MAX: usize = 8;
/// Longest name whose buffer is used again.
const NAME_KEEP: usize = 256;
const NONE: u32 = u32::MAX;

/// How long queries are waited for, and how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DnsOptions {
    /// After this long without an answer, counted from its last repetition, a query has none. Nanoseconds.
    pub timeout_ns: u64,
    /// Queries that may wait at once; the oldest makes room.
    pub max_pending: u32,
}

impl Default for DnsOptions {
    fn default() -> Self {
        Self {
            timeout_ns: 6_000_000_000,
            max_pending: 16_384,
        }
    }
}

/// A query with its answer, or with none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lookup<'a, K> {
    /// Between whom.
    pub ends: K,
    /// Transaction id.
    pub id: u16,
    /// The name asked for, in lower case; empty if the query had no question.
    pub name: &'a str,
    /// The type asked for.
    pub qtype: u16,
    /// Response code, or [`RCODE_TIMEOUT`].
    pub rcode: i32,
    /// From the first query to the answer, nanoseconds. `None` for a time-out.
    pub latency_ns: Option<u64>,
    /// How often the query was sent again.
    pub retries: u32,
    /// Time of the first query, nanoseconds of the kernel's monotonic clock.
    pub query_ns: u64,
}

/// What a message was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// A query, which now waits.
    Query,
    /// A query that was already waiting.
    Retry,
    /// The answer to a query that waited.
    Answer,
    /// An answer that nobody waited for: late, repeated, or to a query that was not seen.
    Unmatched,
}

/// What was left out, since it was last asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DnsLosses {
    /// Answers that nobody waited for.
    pub unmatched: u64,
    /// Queries that made room for others and are told as nothing.
    pub evicted: u64,
}

/// Pairs queries with answers, of all sockets. `K` says between whom: the client's end and the server's, with transport
/// and network namespace, the same for both directions.
#[derive(Debug)]
pub struct DnsSession<K> {
    options: DnsOptions,
    /// First of the queries with these ends and this id.
    waiting: HashMap<(K, u16), u32, RandomState>,
    slots: Vec<Slot<K>>,
    /// Slots in use.
    pending: usize,
    /// First free slot.
    free: u32,
    /// Slots by the time of their last query: the first and the last one.
    oldest: u32,
    newest: u32,
    /// For the name of the message at hand.
    name: String,
    losses: DnsLosses,
}

#[derive(Debug)]
struct Slot<K> {
    ends: K,
    id: u16,
    qtype: u16,
    retries: u32,
    name: String,
    query_ns: u64,
    last_ns: u64,
    /// The next one with the same ends and id; of a free slot, the next free one.
    same: u32,
    older: u32,
    newer: u32,
}

impl<K: Copy + Eq + Hash> DnsSession<K> {
    /// A session without queries.
    #[must_use]
    pub fn new(options: DnsOptions) -> Self {
        Self {
            options,
            waiting: HashMap::default(),
            slots: Vec::new(),
            pending: 0,
            free: NONE,
            oldest: NONE,
            newest: NONE,
            name: String::new(),
            losses: DnsLosses::default(),
        }
    }

    /// Takes a message that passed at `ts_ns` between `ends`; tells the lookup if it is the answer to one. Over TCP, the time
    /// is that of a message's last byte.
    pub fn message(
        &mut self,
        ends: K,
        ts_ns: u64,
        message: &Message<'_>,
        sink: &mut dyn FnMut(&Lookup<'_, K>),
    ) -> Seen {
        let qtype = message.question.map_or(0, |question| question.qtype);
        match message.question {
            Some(question) => question.name.write_to(&mut self.name),
            None => self.name.clear(),
        }
        let key = (ends, message.id);
        let (found, length) = self.find(key, qtype, message.is_response);
        match (message.is_response, found) {
            (false, Some(at)) => {
                if let Some(slot) = self.slot(at) {
                    slot.retries = slot.retries.saturating_add(1);
                    slot.last_ns = ts_ns;
                }
                self.unlink_age(at);
                self.link_newest(at);
                Seen::Retry
            }
            (false, None) => {
                if length >= SAME_ID_MAX {
                    self.evict(self.waiting.get(&key).copied().unwrap_or(NONE));
                }
                self.add(key, qtype, ts_ns);
                Seen::Query
            }
            (true, Some(at)) => {
                let rcode = i32::from(message.rcode);
                self.tell(at, rcode, Some(ts_ns), sink);
                Seen::Answer
            }
            (true, None) => {
                self.losses.unmatched += 1;
                Seen::Unmatched
            }
        }
    }

    /// Tells the lookups that have waited too long at `now_ns`, oldest first.
    pub fn expire(&mut self, now_ns: u64, sink: &mut dyn FnMut(&Lookup<'_, K>)) {
        let timeout_ns = self.options.timeout_ns;
        while let Some(slot) = self.slot(self.oldest) {
            if slot.last_ns.saturating_add(timeout_ns) > now_ns {
                return;
            }
            self.tell(self.oldest, RCODE_TIMEOUT, None, sink);
        }
    }

    /// Queries that wait.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.pending
    }

    /// What was left out since the last call.
    pub fn take_losses(&mut self) -> DnsLosses {
        std::mem::take(&mut self.losses)
    }

    fn slot(&mut self, at: u32) -> Option<&mut Slot<K>> {
        self.slots.get_mut(at as usize)
    }

    /// The query of this name and type, and how many there are of its ends and id. An answer without question belongs to
    /// the only one there is.
    fn find(&self, key: (K, u16), qtype: u16, is_response: bool) -> (Option<u32>, usize) {
        let first = self.waiting.get(&key).copied().unwrap_or(NONE);
        let (mut at, mut found, mut length) = (first, None, 0);
        while let Some(slot) = self.slots.get(at as usize) {
            if slot.qtype == qtype && slot.name == self.name {
                found = Some(at);
            }
            length += 1;
            at = slot.same;
        }
        if found.is_none() && is_response && self.name.is_empty() && length == 1 {
            found = Some(first);
        }
        (found, length)
    }

    fn add(&mut self, key: (K, u16), qtype: u16, ts_ns: u64) {
        if self.free == NONE && self.slots.len() >= self.options.max_pending as usize {
            self.evict(self.oldest);
        }
        let same = self.waiting.get(&key).copied().unwrap_or(NONE);
        let at = self.free;
        let at = if let Some(slot) = self.slots.get_mut(at as usize) {
            self.free = slot.same;
            (slot.ends, slot.id) = key;
            slot.qtype = qtype;
            slot.retries = 0;
            slot.name.clear();
            slot.name.push_str(&self.name);
            (slot.query_ns, slot.last_ns) = (ts_ns, ts_ns);
            slot.same = same;
            at
        } else {
            let Ok(at) = u32::try_from(self.slots.len()) else {
                return;
            };
            self.slots.push(Slot {
                ends: key.0,
                id: key.1,
                qtype,
                retries: 0,
                name: self.name.clone(),
                query_ns: ts_ns,
                last_ns: ts_ns,
                same,
                older: NONE,
                newer: NONE,
            });
            at
        };
        self.pending += 1;
        self.waiting.insert(key, at);
        self.link_newest(at);
    }

    fn evict(&mut self, at: u32) {
        if (at as usize) < self.slots.len() {
            self.losses.evicted += 1;
            self.remove(at);
        }
    }

    fn tell(&mut self, at: u32, rcode: i32, answer_ns: Option<u64>, sink: &mut dyn FnMut(&Lookup<'_, K>)) {
        if let Some(slot) = self.slots.get(at as usize) {
            sink(&Lookup {
                ends: slot.ends,
                id: slot.id,
                name: &slot.name,
                qtype: slot.qtype,
                rcode,
                latency_ns: answer_ns.map(|answer_ns| answer_ns.saturating_sub(slot.query_ns)),
                retries: slot.retries,
                query_ns: slot.query_ns,
            });
        }
        self.remove(at);
    }

    /// Takes a query out of all lists.
    fn remove(&mut self, at: u32) {
        self.unlink_age(at);
        let free = self.free;
        let Some(slot) = self.slot(at) else { return };
        let key = (slot.ends, slot.id);
        let next = std::mem::replace(&mut slot.same, free);
        if slot.name.capacity() > NAME_KEEP {
            slot.name = String::new();
        }
        self.free = at;
        self.pending -= 1;
        let first = self.waiting.get(&key).copied().unwrap_or(NONE);
        if first == at {
            if next == NONE {
                self.waiting.remove(&key);
            } else {
                self.waiting.insert(key, next);
            }
            return;
        }
        let mut before = first;
        while let Some(slot) = self.slot(before) {
            if slot.same == at {
                slot.same = next;
                return;
            }
            before = slot.same;
        }
    }

    fn unlink_age(&mut self, at: u32) {
        let Some(slot) = self.slot(at) else { return };
        let (older, newer) = (slot.older, slot.newer);
        match self.slot(older) {
            Some(slot) => slot.newer = newer,
            None => self.oldest = newer,
        }
        match self.slot(newer) {
            Some(slot) => slot.older = older,
            None => self.newest = older,
        }
    }

    fn link_newest(&mut self, at: u32) {
        let newest = std::mem::replace(&mut self.newest, at);
        match self.slot(newest) {
            Some(slot) => slot.newer = at,
            None => self.oldest = at,
        }
        if let Some(slot) = self.slot(at) {
            (slot.older, slot.newer) = (newest, NONE);
        }
    }
}
