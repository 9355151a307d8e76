//! Heads that were read before. Most are byte for byte like one just read, on this connection or another: what that said
//! is said again, without reading it.

use ahash::RandomState;

use super::head::Fields;
use crate::protocols::{Version, record::Record};

/// Heads that are kept.
const SLOTS: usize = 512;
/// Longest head that is kept, in bytes.
const HEAD_MAX: usize = 1024;
/// Bytes of the beginning by which a head is looked for, together with the number of bytes that are there.
const LOOK: usize = 64;

/// Heads of HTTP/1 as they came, and what they say. For sessions with the same options.
///
/// Of a head that is seen for the first time only that is noted, so that heads that never come again cost little.
#[derive(Debug)]
pub struct Heads {
    slots: Vec<Slot>,
    hasher: RandomState,
}

#[derive(Debug, Default)]
struct Slot {
    tag: u64,
    bytes: Vec<u8>,
    said: Said,
}

/// What a head says.
#[derive(Debug, Default)]
pub(super) enum Said {
    #[default]
    Nothing,
    /// Of the record: method, path, host, version.
    Request(Record, Fields),
    Reply(Version, u16, Fields),
}

/// By what a head that was not found is kept.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tag(u64);

impl Default for Heads {
    fn default() -> Self {
        Self {
            slots: std::iter::repeat_with(Slot::default).take(SLOTS).collect(),
            hasher: RandomState::new(),
        }
    }
}

impl Heads {
    /// Keeps none.
    #[must_use]
    pub fn none() -> Self {
        Self {
            slots: Vec::new(),
            hasher: RandomState::with_seeds(0, 0, 0, 0),
        }
    }

    /// The head that begins these bytes, and its length.
    #[inline]
    pub(super) fn find(&self, bytes: &[u8]) -> Result<(&Said, usize), Option<Tag>> {
        if self.slots.is_empty() {
            return Err(None);
        }
        let tag = self.hasher.hash_one((bytes.get(..LOOK).unwrap_or(bytes), bytes.len()));
        for way in 0..2 {
            if let Some(slot) = self.slots.get(index(tag, way))
                && slot.tag == tag
                && !slot.bytes.is_empty()
                && bytes.starts_with(&slot.bytes)
            {
                return Ok((&slot.said, slot.bytes.len()));
            }
        }
        Err(Some(Tag(tag)))
    }

    /// Keeps what a head said that was not found; `say` writes it over what some other one said.
    pub(super) fn keep(&mut self, Tag(tag): Tag, head: &[u8], say: impl FnOnce(&mut Said)) {
        if head.len() > HEAD_MAX {
            return;
        }
        let known = (0..2).find(|way| self.slots.get(index(tag, *way)).is_some_and(|slot| slot.tag == tag));
        // Either way is taken by half of them.
        let Some(slot) = self.slots.get_mut(index(tag, known.unwrap_or((tag >> 63) as usize))) else {
            return;
        };
        slot.bytes.clear();
        if known.is_some() {
            say(&mut slot.said);
            if !matches!(slot.said, Said::Nothing) {
                slot.bytes.extend_from_slice(head);
            }
        }
        slot.tag = tag;
    }
}

fn index(tag: u64, way: usize) -> usize {
    (tag as usize ^ way) % SLOTS
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(heads: &Heads, bytes: &[u8]) -> Result<(u16, usize), Option<Tag>> {
        heads.find(bytes).map(|(said, len)| match said {
            Said::Reply(_, status, _) => (*status, len),
            _ => panic!("{said:?}"),
        })
    }

    fn keep(heads: &mut Heads, bytes: &[u8], head: usize, status: u16) {
        let tag = heads.find(bytes).expect_err("it is there").expect("a tag");
        heads.keep(tag, &bytes[..head], |said| {
            *said = Said::Reply(Version::Http11, status, Fields::default());
        });
    }

    #[test]
    fn a_head_is_found_from_its_third_time_on() {
        let mut heads = Heads::default();
        let bytes = b"HTTP/1.1 200 OK\r\n\r\nbody";
        for _ in 0..2 {
            keep(&mut heads, bytes, 19, 200);
        }
        assert_eq!(status(&heads, bytes).ok(), Some((200, 19)));
        // Other bytes behind it are no matter; other bytes within are, and where they are not looked at, too.
        assert_eq!(status(&heads, b"HTTP/1.1 200 OK\r\n\r\nmore").ok(), None);
        let long = |end: &str| format!("HTTP/1.1 204 {:060}\r\n\r\n{end}", 0).into_bytes();
        for _ in 0..2 {
            keep(&mut heads, &long("body"), 77, 204);
        }
        assert_eq!(status(&heads, &long("more")).ok(), Some((204, 77)));
        let mut other = long("body");
        other[70] = b'1';
        assert!(status(&heads, &other).is_err());
    }

    #[test]
    fn without_room_nothing_is_kept() {
        let mut heads = Heads::none();
        assert!(matches!(heads.find(b"HTTP/1.1 200 OK\r\n\r\n"), Err(None)));
        heads.keep(Tag(1), b"HTTP/1.1 200 OK\r\n\r\n", |_| ());
        let mut heads = Heads::default();
        let long = [b'x'; HEAD_MAX + 1];
        for _ in 0..3 {
            keep(&mut heads, &long, long.len(), 200);
        }
    }
}
