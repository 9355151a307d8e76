//! Which batches were stored before.
//!
//! Per agent start (node, boot id) the sequence numbers seen, as ranges: agents send in order with a small window, so one
//! range is the rule and each gap costs 16 bytes. The rows are stored in the same transaction as the bodies, so a crash
//! leaves both in step.

use std::collections::HashMap;

use records::Str;

use super::BatchId;

/// Gaps remembered per agent start; an agent's window is far smaller. When there are more, the lowest gap is closed.
const MAX_RANGES: usize = 1024;
/// Agent starts remembered; beyond that the longest idle one goes.
const MAX_AGENTS: usize = 100_000;
/// An agent start not heard of for this long is forgotten, seconds.
pub(crate) const IDLE_SECONDS: u64 = 24 * 3600;

/// Names one agent start.
pub(crate) type AgentKey = (Str, u64);

/// Sequence numbers seen from one agent start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Inclusive, ascending, never touching.
    ranges: Vec<(u64, u64)>,
    /// When the last batch came, Unix seconds of the queue clock.
    pub(crate) last_seen: u64,
}

/// All agent starts.
#[derive(Debug, Default)]
pub(crate) struct Dedup {
    agents: HashMap<AgentKey, Seen>,
}

/// What one group changed, so that it can be stored or undone.
#[derive(Debug, Default)]
pub(crate) struct Touched {
    before: HashMap<AgentKey, Option<Seen>>,
}

// === impl Seen ===

impl Seen {
    /// True if the number was seen before.
    pub(crate) fn contains(&self, seq: u64) -> bool {
        let after = self.ranges.partition_point(|&(start, _)| start <= seq);
        after
            .checked_sub(1)
            .and_then(|index| self.ranges.get(index))
            .is_some_and(|&(_, end)| seq <= end)
    }

    /// Adds a number; false if it was there.
    pub(crate) fn insert(&mut self, seq: u64) -> bool {
        if self.contains(seq) {
            return false;
        }
        let after = self.ranges.partition_point(|&(start, _)| start <= seq);
        let joins_next = self
            .ranges
            .get(after)
            .is_some_and(|&(start, _)| seq.checked_add(1) == Some(start));
        let before = after.checked_sub(1);
        let joins_before = before
            .and_then(|index| self.ranges.get(index))
            .is_some_and(|&(_, end)| end.checked_add(1) == Some(seq));
        match (joins_before.then_some(before).flatten(), joins_next) {
            (Some(before), true) => {
                let (_, end) = self.ranges.remove(after);
                if let Some(range) = self.ranges.get_mut(before) {
                    range.1 = end;
                }
            }
            (Some(before), false) => {
                if let Some(range) = self.ranges.get_mut(before) {
                    range.1 = seq;
                }
            }
            (None, true) => {
                if let Some(range) = self.ranges.get_mut(after) {
                    range.0 = seq;
                }
            }
            (None, false) => self.ranges.insert(after, (seq, seq)),
        }
        if self.ranges.len() > MAX_RANGES {
            let (start, _) = self.ranges.remove(0);
            if let Some(range) = self.ranges.first_mut() {
                range.0 = start;
            }
        }
        true
    }

    /// Highest number up to which all from 1 were seen, 0 if the first is missing.
    pub(crate) fn contiguous(&self) -> u64 {
        self.ranges
            .first()
            .filter(|(start, _)| *start <= 1)
            .map_or(0, |(_, end)| *end)
    }

    /// Stored form: `last_seen`, then start and end of each range, little endian.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(8 + self.ranges.len() * 16);
        out.extend_from_slice(&self.last_seen.to_le_bytes());
        for (start, end) in &self.ranges {
            out.extend_from_slice(&start.to_le_bytes());
            out.extend_from_slice(&end.to_le_bytes());
        }
        out
    }

    /// Reads the stored form; `None` if it is not one.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (words, rest) = bytes.as_chunks::<8>();
        if !rest.is_empty() {
            return None;
        }
        let mut words = words.iter().map(|word| u64::from_le_bytes(*word));
        let last_seen = words.next()?;
        let mut ranges = Vec::new();
        while let Some(start) = words.next() {
            let end = words.next()?;
            let ordered = start <= end && ranges.last().is_none_or(|&(_, last): &(u64, u64)| last < start);
            if !ordered {
                return None;
            }
            ranges.push((start, end));
        }
        Some(Self { ranges, last_seen })
    }
}

// === impl Dedup ===

impl Dedup {
    /// From stored rows.
    pub(crate) fn new(rows: impl IntoIterator<Item = (AgentKey, Seen)>) -> Self {
        Self {
            agents: rows.into_iter().collect(),
        }
    }

    /// Marks a batch as seen; false if it was before. `touched` collects what to store or undo.
    pub(crate) fn insert(&mut self, id: &BatchId, now: u64, touched: &mut Touched) -> bool {
        let key = (id.node.clone(), id.boot_id);
        let entry = self.agents.get(&key);
        touched.before.entry(key.clone()).or_insert_with(|| entry.cloned());
        let seen = self.agents.entry(key).or_default();
        seen.last_seen = now;
        seen.insert(id.seq)
    }

    /// See [`Seen::contiguous`]; 0 for an unknown agent start.
    pub(crate) fn last_contiguous(&self, key: &AgentKey) -> u64 {
        self.agents.get(key).map_or(0, Seen::contiguous)
    }

    /// The rows to store for a group.
    pub(crate) fn rows<'a>(&'a self, touched: &'a Touched) -> impl Iterator<Item = (&'a AgentKey, &'a Seen)> {
        touched.before.keys().filter_map(|key| self.agents.get_key_value(key))
    }

    /// Undoes a group that was not stored.
    pub(crate) fn undo(&mut self, touched: Touched) {
        for (key, before) in touched.before {
            match before {
                Some(seen) => self.agents.insert(key, seen),
                None => self.agents.remove(&key),
            };
        }
    }

    /// Takes out agent starts idle for too long, and the longest idle ones beyond the bound.
    pub(crate) fn expire(&mut self, now: u64) -> Vec<AgentKey> {
        let mut gone: Vec<AgentKey> = self
            .agents
            .iter()
            .filter(|(_, seen)| now.saturating_sub(seen.last_seen) > IDLE_SECONDS)
            .map(|(key, _)| key.clone())
            .collect();
        let surplus = (self.agents.len() - gone.len()).saturating_sub(MAX_AGENTS);
        if surplus > 0 {
            let mut by_age: Vec<(u64, &AgentKey)> = self
                .agents
                .iter()
                .filter(|(_, seen)| now.saturating_sub(seen.last_seen) <= IDLE_SECONDS)
                .map(|(key, seen)| (seen.last_seen, key))
                .collect();
            by_age.sort_unstable();
            let oldest: Vec<AgentKey> = by_age.into_iter().take(surplus).map(|(_, key)| key.clone()).collect();
            gone.extend(oldest);
        }
        for key in &gone {
            self.agents.remove(key);
        }
        gone
    }

    /// Agent starts remembered.
    pub(crate) fn len(&self) -> usize {
        self.agents.len()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
mod tests {
    use std::collections::BTreeSet;

    use rand::{Rng, SeedableRng, seq::SliceRandom};

    use super::*;

    fn id(node: &str, boot_id: u64, seq: u64) -> BatchId {
        BatchId {
            node: node.into(),
            boot_id,
            seq,
        }
    }

    #[test]
    fn agrees_with_a_set_in_any_order() {
        let mut rng = rand::rngs::StdRng::seed_from_u64(7);
        for _ in 0..200 {
            let mut model = BTreeSet::new();
            let mut seen = Seen::default();
            for _ in 0..300 {
                let seq = rng.random_range(1..100);
                assert_eq!(seen.contains(seq), model.contains(&seq));
                assert_eq!(seen.insert(seq), model.insert(seq));
            }
            let mut rest: Vec<u64> = (1..=100).collect();
            rest.shuffle(&mut rng);
            let first_gap = (1..).find(|seq| !model.contains(seq)).unwrap();
            assert_eq!(seen.contiguous(), first_gap - 1);
            for seq in rest {
                seen.insert(seq);
            }
            assert_eq!(seen.ranges, [(1, 100)]);
            assert_eq!(seen.contiguous(), 100);
            assert_eq!(Seen::from_bytes(&seen.to_bytes()), Some(seen));
        }
    }

    #[test]
    fn ends_of_the_number_range_do_not_wrap() {
        let mut seen = Seen::default();
        assert!(seen.insert(u64::MAX) && seen.insert(0) && !seen.insert(u64::MAX) && !seen.insert(0));
        assert_eq!(seen.ranges, [(0, 0), (u64::MAX, u64::MAX)]);
    }

    #[test]
    fn gaps_are_bounded_and_the_newest_are_kept() {
        let mut seen = Seen::default();
        for n in 1..=5000 {
            assert!(seen.insert(n * 2));
        }
        assert_eq!(seen.ranges.len(), MAX_RANGES);
        assert!(!seen.contains(9999) && seen.contains(10_000));
    }

    #[test]
    fn damaged_rows_are_refused() {
        let mut bytes = 5u64.to_le_bytes().to_vec();
        bytes.extend(9u64.to_le_bytes());
        assert_eq!(Seen::from_bytes(&bytes), None);
        bytes.extend(3u64.to_le_bytes());
        assert_eq!(Seen::from_bytes(&bytes), None);
        assert_eq!(Seen::from_bytes(b"short"), None);
    }

    #[test]
    fn undo_forgets_what_was_not_stored() {
        let mut dedup = Dedup::default();
        let mut first = Touched::default();
        assert!(dedup.insert(&id("a", 1, 1), 10, &mut first));
        let mut second = Touched::default();
        assert!(dedup.insert(&id("a", 1, 2), 11, &mut second));
        assert!(!dedup.insert(&id("a", 1, 2), 11, &mut second));
        assert!(dedup.insert(&id("b", 1, 1), 11, &mut second));
        dedup.undo(second);
        assert_eq!(dedup.len(), 1);
        let mut third = Touched::default();
        assert!(!dedup.insert(&id("a", 1, 1), 12, &mut third));
        assert!(dedup.insert(&id("a", 1, 2), 12, &mut third));
        assert_eq!(dedup.rows(&third).count(), 1);
    }

    #[test]
    fn idle_agents_are_forgotten_and_their_number_is_bounded() {
        let mut dedup = Dedup::default();
        let mut touched = Touched::default();
        dedup.insert(&id("old", 1, 1), 0, &mut touched);
        dedup.insert(&id("new", 1, 1), 10, &mut touched);
        assert_eq!(dedup.expire(IDLE_SECONDS + 1), [("old".into(), 1)]);
        for boot in 0..=MAX_AGENTS as u64 {
            dedup.insert(&id("x", boot, 1), 20 + boot / 10, &mut touched);
        }
        let gone = dedup.expire(20 + MAX_AGENTS as u64 / 10);
        assert_eq!(gone.len(), 2);
        assert_eq!(gone, [("new".into(), 1), ("x".into(), 0)]);
        assert_eq!(dedup.len(), MAX_AGENTS);
    }
}
