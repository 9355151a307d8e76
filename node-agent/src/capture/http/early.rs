//! Bytes of connections whose socket is not known yet. No I/O, bounded.
//!
//! A process may read a request before anything tells by which socket it came: the answer does. Until then it waits here.

use std::collections::VecDeque;

use ahash::RandomState;
use hashbrown::HashMap;

use super::events::Data;

/// Connections that wait.
const CONNECTIONS_MAX: usize = 4_096;
/// Bytes of each, and of all.
const BYTES_MAX: usize = 128 << 10;
const ALL_MAX: usize = 16 << 20;
/// How long they wait.
const PATIENCE_NS: u64 = 60 * 1_000_000_000;

/// All that waits.
#[derive(Debug, Default)]
pub(super) struct Early {
    waiting: HashMap<u64, Vec<Saved>, RandomState>,
    /// In the order in which they came.
    since: VecDeque<(u64, u64)>,
    bytes: usize,
}

/// Bytes that came.
#[derive(Debug)]
pub(super) struct Saved {
    pub(super) time_ns: u64,
    way: u8,
    flags: u8,
    seq: u32,
    len: u32,
    captured: Box<[u8]>,
    tail: Box<[u8]>,
}

impl Saved {
    /// As it was.
    pub(super) fn data(&self) -> Data<'_> {
        Data {
            way: self.way,
            flags: self.flags,
            seq: self.seq,
            len: self.len,
            captured: &self.captured,
            tail: &self.tail,
        }
    }

    fn size(&self) -> usize {
        size_of::<Self>() + self.captured.len() + self.tail.len()
    }
}

impl Early {
    /// Keeps bytes; false if there is no room.
    pub(super) fn keep(&mut self, cookie: u64, time_ns: u64, data: &Data<'_>) -> bool {
        let saved = Saved {
            time_ns,
            way: data.way,
            flags: data.flags,
            seq: data.seq,
            len: data.len,
            captured: data.captured.into(),
            tail: data.tail.into(),
        };
        let size = saved.size();
        let known = self.waiting.contains_key(&cookie);
        if self.bytes + size > ALL_MAX || (!known && self.waiting.len() >= CONNECTIONS_MAX) {
            return false;
        }
        let all = self.waiting.entry(cookie).or_default();
        if all.iter().map(Saved::size).sum::<usize>() + size > BYTES_MAX {
            return false;
        }
        all.push(saved);
        self.bytes += size;
        if !known {
            self.since.push_back((cookie, time_ns));
        }
        true
    }

    /// What waits of a connection.
    pub(super) fn take(&mut self, cookie: u64) -> Vec<Saved> {
        let taken = self.waiting.remove(&cookie).unwrap_or_default();
        self.bytes = self.bytes.saturating_sub(taken.iter().map(Saved::size).sum());
        taken
    }

    /// Gives up what waited for too long; gives the numbers of those connections.
    pub(super) fn expire(&mut self, now_ns: u64) -> Vec<u64> {
        let mut gone = Vec::new();
        while let Some((cookie, since)) = self.since.front().copied() {
            let waits = self.waiting.contains_key(&cookie);
            if waits && now_ns.saturating_sub(since) < PATIENCE_NS {
                break;
            }
            self.since.pop_front();
            if waits {
                self.take(cookie);
                gone.push(cookie);
            }
        }
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(captured: &[u8]) -> Data<'_> {
        Data {
            way: 1,
            flags: 0,
            seq: 0,
            len: 70_000,
            captured,
            tail: &[],
        }
    }

    #[test]
    fn gives_back_what_it_kept() {
        let mut early = Early::default();
        assert!(early.keep(7, 5, &data(b"abc")) && early.keep(7, 6, &data(b"d")));
        let taken = early.take(7);
        let all: Vec<_> = taken.iter().map(|saved| (saved.time_ns, saved.data())).collect();
        assert_eq!(all, [(5, data(b"abc")), (6, data(b"d"))]);
        assert!(early.take(7).is_empty());
        assert_eq!(early.bytes, 0);
    }

    #[test]
    fn waits_in_bounds() {
        let mut early = Early::default();
        let large = vec![0; 60_000];
        assert!(early.keep(1, 0, &data(&large)) && early.keep(1, 0, &data(&large)));
        assert!(!early.keep(1, 0, &data(&large)), "one has its share");
        let kept = (2..10_000).filter(|n| early.keep(*n, 0, &data(&large))).count();
        assert!(kept < 300 && early.bytes <= ALL_MAX, "{kept}");
        assert!(early.expire(PATIENCE_NS - 1).is_empty());
        assert_eq!(early.expire(PATIENCE_NS).len(), kept + 1);
        assert_eq!(early.bytes, 0);
        assert_eq!(
            (1..10_000).filter(|n| early.keep(*n, 0, &data(b""))).count(),
            CONNECTIONS_MAX
        );
    }
}
