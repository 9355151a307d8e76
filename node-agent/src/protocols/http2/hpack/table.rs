//! The dynamic table: what was sent before and is referred to by its age.

use std::collections::VecDeque;

/// Size before any update, RFC 9113 section 6.5.2.
const DEFAULT_SIZE: u32 = 4096;
/// Largest table that is followed. Of a larger one, the oldest entries are not known.
const SIZE_MAX: u32 = 64 * 1024;
/// What the RFC counts for each entry besides its name and value.
const OVERHEAD: u32 = 32;

/// The table of one direction.
///
/// Only what somebody reads is stored: most entries are cookies, dates and agents, of which the size is all that matters.
#[derive(Debug)]
pub(super) struct Table {
    /// The newest comes first.
    entries: VecDeque<Entry>,
    /// Names and values of the stored entries. The oldest come first.
    bytes: VecDeque<u8>,
    /// Bytes that have left `bytes` since it was last empty by [`Table::forget`].
    gone: u64,
    size: u32,
    max: u32,
    /// There are no entries beyond ours.
    complete: bool,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    size: u32,
    kind: Kind,
    /// Length of its name.
    name: u32,
    /// Where its stored bytes begin and end, counted like `gone`.
    start: u64,
    end: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Stored,
    /// A header that nobody reads.
    Other,
    /// Its name referred to an entry that is not known.
    Unknown,
}

/// What an index refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Name and value have been copied.
    Stored,
    /// A header that nobody reads, with a name of this length.
    Other(usize),
    /// It was sent before we came, or in bytes that were not captured.
    Unknown,
    /// There is no such entry.
    None,
}

/// What to insert.
#[derive(Clone, Copy, Debug)]
pub(super) enum Insert<'a> {
    Stored(&'a [u8], &'a [u8]),
    /// A header that nobody reads: lengths of its name and value.
    Other(usize, usize),
    /// The length of its value.
    Unknown(usize),
}

impl Table {
    pub(super) fn new(complete: bool) -> Self {
        Self {
            entries: VecDeque::new(),
            bytes: VecDeque::new(),
            gone: 0,
            size: 0,
            max: DEFAULT_SIZE,
            complete,
        }
    }

    /// Entries may have been added that were not seen: what was known about ages is void.
    pub(super) fn forget(&mut self) {
        self.entries.clear();
        self.bytes.clear();
        self.gone = 0;
        self.size = 0;
        self.complete = false;
    }

    /// A table size update.
    pub(super) fn resize(&mut self, max: u32) {
        if max == 0 {
            self.complete = true;
        } else if max > SIZE_MAX {
            self.complete = false;
        }
        self.max = max.min(SIZE_MAX);
        self.evict(0);
    }

    /// Adds an entry.
    pub(super) fn insert(&mut self, insert: Insert<'_>) {
        let (kind, name, value) = match insert {
            Insert::Stored(name, value) => (Kind::Stored, name.len(), value.len()),
            Insert::Other(name, value) => (Kind::Other, name, value),
            // Too small a size, and thus an entry that may stay longer than it does in truth: nobody refers to it then.
            Insert::Unknown(value) => (Kind::Unknown, 0, value),
        };
        let fit = |length: usize| u32::try_from(length).unwrap_or(u32::MAX);
        let size = fit(name).saturating_add(fit(value)).saturating_add(OVERHEAD);
        self.evict(size);
        if size > self.max {
            return;
        }
        let start = self.gone + self.bytes.len() as u64;
        if let Insert::Stored(name, value) = insert {
            self.bytes.extend(name);
            self.bytes.extend(value);
        }
        self.size += size;
        self.entries.push_front(Entry {
            size,
            kind,
            name: fit(name),
            start,
            end: self.gone + self.bytes.len() as u64,
        });
    }

    /// Looks up the entry of this age, 0 being the newest, and replaces `name` and `value` by its own if they are stored.
    pub(super) fn get(&self, age: u32, name: &mut Vec<u8>, value: &mut Vec<u8>) -> Found {
        let age = age as usize;
        let Some(entry) = self.entries.get(age) else {
            return if self.complete { Found::None } else { Found::Unknown };
        };
        match entry.kind {
            Kind::Other => return Found::Other(entry.name as usize),
            Kind::Unknown => return Found::Unknown,
            Kind::Stored => {}
        }
        let place = |at: u64| usize::try_from(at.saturating_sub(self.gone)).unwrap_or(usize::MAX);
        let middle = place(entry.start + u64::from(entry.name));
        self.copy(place(entry.start), middle, name);
        self.copy(middle, place(entry.end), value);
        Found::Stored
    }

    /// Replaces `out` by the stored bytes from `start` to `end`.
    fn copy(&self, start: usize, end: usize, out: &mut Vec<u8>) {
        let (first, second) = self.bytes.as_slices();
        out.clear();
        let mut part = |bytes: &[u8], before: usize| {
            let range = start.saturating_sub(before).min(bytes.len())..end.saturating_sub(before).min(bytes.len());
            out.extend_from_slice(bytes.get(range).unwrap_or_default());
        };
        part(first, 0);
        part(second, first.len());
    }

    /// Its size as the RFC counts it, in bytes.
    #[cfg(test)]
    pub(super) fn size(&self) -> u32 {
        self.size
    }

    /// Makes room for `size`.
    fn evict(&mut self, size: u32) {
        while self.size.saturating_add(size) > self.max {
            let Some(oldest) = self.entries.pop_back() else { return };
            self.size -= oldest.size;
            let stored = usize::try_from(oldest.end - oldest.start).unwrap_or_default();
            self.bytes.drain(..stored.min(self.bytes.len()));
            self.gone += stored as u64;
        }
    }
}
