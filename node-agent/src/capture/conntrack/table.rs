//! Which translations are known: connections that a NAT rule sent elsewhere, by network namespace. Pure, bounded.
//!
//! A connection that ended stays known for [`LINGER_NS`]: the capture tells of short ones up to a drain period later. If
//! its ports are used again meanwhile, both are known, each with its time. What is not translated takes no room.

use std::collections::VecDeque;

use ahash::RandomState;
use hashbrown::{HashMap, hash_map::Entry as Slot};

use super::message::{Entry, Tuple};

/// How long a connection that ended stays known, nanoseconds: twice the capture's longest drain period.
pub(super) const LINGER_NS: u64 = 10 * 1_000_000_000;
/// A connection is known this long after the kernel made it, at most, nanoseconds; decides between two of the same ports.
const LATE_NS: u64 = 50 * 1_000_000;

/// A network namespace, by a number of our own: the kernel's are used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Space(pub u32);

type Key = (Space, Tuple);

/// The translations of all namespaces.
#[derive(Debug)]
pub(super) struct Table {
    records: HashMap<Key, Record, RandomState>,
    /// What was dialled, by how its packets look when they are translated.
    dialled: HashMap<Key, Tuple, RandomState>,
    /// Records that end, by the time they are forgotten.
    ending: VecDeque<(u64, Key)>,
    max: usize,
    /// Number of the last dump that began.
    dump: u32,
    refused: u64,
}

#[derive(Debug)]
struct Record {
    now: Version,
    /// The connection that had the same ports before.
    before: Option<Box<Version>>,
}

#[derive(Clone, Copy, Debug)]
struct Version {
    /// The same packets, translated; `None` for one that is not translated.
    translated: Option<Tuple>,
    id: u32,
    since: u64,
    /// 0 while it is there.
    until: u64,
    /// The last dump that has it.
    dump: u32,
}

impl Table {
    /// Knows nothing; there will be at most `max` translations.
    #[must_use]
    pub(super) fn new(max: usize) -> Self {
        Self {
            records: HashMap::default(),
            dialled: HashMap::default(),
            ending: VecDeque::new(),
            max,
            dump: 0,
            refused: 0,
        }
    }

    /// How many translations are known.
    #[must_use]
    pub(super) fn len(&self) -> usize {
        self.records.len()
    }

    /// Translations that found no room since the last call.
    pub(super) fn take_refused(&mut self) -> u64 {
        std::mem::take(&mut self.refused)
    }

    /// A connection is there, at `now` in monotonic nanoseconds. With `sources`, one of which only the source is
    /// translated counts too: another namespace may go on from there.
    pub(super) fn there(&mut self, space: Space, entry: &Entry, sources: bool, now: u64) {
        let translated = entry.translated();
        let other = translated.to != entry.original.to || sources && translated.from != entry.original.from;
        let key = (space, entry.original);
        let version = Version {
            translated: other.then_some(translated),
            id: entry.id,
            since: now,
            until: 0,
            dump: self.dump,
        };
        let full = self.records.len() >= self.max;
        match self.records.entry(key) {
            Slot::Occupied(mut slot) => {
                let record = slot.get_mut();
                let same_id = record.now.id == version.id || record.now.id == 0 || version.id == 0;
                let alive = record.now.until == 0;
                if alive && same_id && record.now.translated == version.translated {
                    (record.now.id, record.now.dump) = (version.id, self.dump);
                    return;
                }
                if let Some(old) = record.now.translated.filter(|old| Some(*old) != version.translated) {
                    forget_dialled(&mut self.dialled, space, &old, &key.1);
                }
                let mut before = std::mem::replace(&mut record.now, version);
                if alive {
                    before.until = now;
                }
                record.before = Some(Box::new(before));
                if !other {
                    // Known for the sake of the one before only.
                    record.now.until = now;
                    self.ending.push_back((now + LINGER_NS, key));
                }
            }
            Slot::Vacant(_) if !other => return,
            Slot::Vacant(slot) if !full => {
                slot.insert(Record {
                    now: version,
                    before: None,
                });
            }
            Slot::Vacant(_) => {
                // What ended makes room, the longest ended first.
                if !self.forget_first() {
                    self.refused += 1;
                    return;
                }
                let record = Record {
                    now: version,
                    before: None,
                };
                self.records.insert(key, record);
            }
        }
        if other {
            self.dialled.insert((space, translated), entry.original);
        }
        self.bound_ending();
    }

    /// A connection ended.
    pub(super) fn gone(&mut self, space: Space, entry: &Entry, now: u64) {
        let key = (space, entry.original);
        let Some(record) = self.records.get_mut(&key) else {
            return;
        };
        let same = record.now.id == entry.id || record.now.id == 0 || entry.id == 0;
        if same && record.now.until == 0 {
            record.now.until = now;
            self.ending.push_back((now + LINGER_NS, key));
            self.bound_ending();
        }
    }

    /// All of a namespace ended.
    pub(super) fn all_gone(&mut self, space: Space, now: u64) {
        self.end_where(now, |(of, _), _| *of == space);
    }

    /// A dump begins; all that it finds is told with [`Self::there`], then comes [`Self::dumped`].
    pub(super) const fn dump_begins(&mut self) -> u32 {
        self.dump = self.dump.wrapping_add(1);
        self.dump
    }

    /// A dump found all there is in the namespace: what it did not find ended.
    pub(super) fn dumped(&mut self, space: Space, dump: u32, now: u64) {
        self.end_where(now, |(of, _), version| *of == space && version.dump != dump);
    }

    /// Forgets what ended long enough ago.
    pub(super) fn expire(&mut self, now: u64) {
        while let Some((at, key)) = self.ending.pop_front_if(|(at, _)| *at <= now) {
            self.forget(at, key);
        }
    }

    /// The same packets translated, of the connection that was there at `at`.
    #[must_use]
    pub(super) fn translated(&self, space: Space, original: &Tuple, at: u64) -> Option<Tuple> {
        let record = self.records.get(&(space, *original))?;
        match &record.before {
            Some(before) if at.saturating_add(LATE_NS) < record.now.since => before.translated,
            _ => record.now.translated,
        }
    }

    /// What was dialled, of a flow whose packets were seen translated.
    #[must_use]
    pub(super) fn dialled(&self, space: Space, translated: &Tuple) -> Option<Tuple> {
        self.dialled.get(&(space, *translated)).copied()
    }

    fn end_where(&mut self, now: u64, which: impl Fn(&Key, &Version) -> bool) {
        for (key, record) in &mut self.records {
            if record.now.until == 0 && which(key, &record.now) {
                record.now.until = now;
                self.ending.push_back((now + LINGER_NS, *key));
            }
        }
        self.bound_ending();
    }

    /// Takes the first record that ends; false if none does.
    fn forget_first(&mut self) -> bool {
        while let Some((at, key)) = self.ending.pop_front() {
            if self.forget(at, key) {
                return true;
            }
        }
        false
    }

    /// Takes a record that was to be forgotten at `at`; false if its ports were used again since.
    fn forget(&mut self, at: u64, key: Key) -> bool {
        let Slot::Occupied(mut slot) = self.records.entry(key) else {
            return false;
        };
        let now = slot.get().now;
        if now.until == 0 || now.until + LINGER_NS > at {
            // The one before is no longer asked for.
            slot.get_mut().before = None;
            return false;
        }
        if let Some(translated) = now.translated {
            forget_dialled(&mut self.dialled, key.0, &translated, &key.1);
        }
        slot.remove();
        true
    }

    /// Ports that are used again and again leave marks behind.
    fn bound_ending(&mut self) {
        while self.ending.len() > 2 * self.max
            && let Some((at, key)) = self.ending.pop_front()
        {
            self.forget(at, key);
        }
    }
}

/// Forgets how a flow looks translated, unless another flow looks so by now.
fn forget_dialled(dialled: &mut HashMap<Key, Tuple, RandomState>, space: Space, translated: &Tuple, original: &Tuple) {
    if let Slot::Occupied(slot) = dialled.entry((space, *translated))
        && slot.get() == original
    {
        slot.remove();
    }
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
