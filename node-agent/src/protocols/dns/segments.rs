//! One direction of a TCP connection put back into order from its packets.

use std::collections::VecDeque;

use crate::protocols::{Piece, Way};

/// Segments that wait for one before them; with more, that one is given up.
const WAITING_MAX: usize = 16;
/// Bytes of them.
const WAITING_BYTES_MAX: usize = 32 << 10;

/// A packet's payload.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    /// Sequence number of its first byte.
    pub seq: u32,
    /// When it passed, nanoseconds.
    pub ts_ns: u64,
    /// The captured beginning.
    pub captured: &'a [u8],
    /// Bytes it carries.
    pub true_len: u32,
}

/// What was done about segments that were not in order, since it was last asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SegmentLosses {
    /// Bytes that came again.
    pub repeated: u64,
    /// Bytes that were given up waiting for.
    pub missing: u64,
}

/// Puts segments in order: what comes twice is left out, what comes too early waits, what does not come is a piece of which
/// nothing was seen.
#[derive(Debug)]
pub struct Segments {
    way: Way,
    /// Sequence number of the next byte; `None` before the first segment.
    next: Option<u32>,
    /// By sequence number.
    waiting: VecDeque<Waiting>,
    waiting_bytes: usize,
    /// A piece is not there before those before it are.
    ts_ns: u64,
    losses: SegmentLosses,
}

#[derive(Debug)]
struct Waiting {
    seq: u32,
    ts_ns: u64,
    captured: Vec<u8>,
    true_len: u32,
}

// === impl Segments ===

impl Segments {
    /// A direction of which `first` is the sequence number of the first byte; without, the first segment begins it.
    #[must_use]
    pub fn new(way: Way, first: Option<u32>) -> Self {
        Self {
            way,
            next: first,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            ts_ns: 0,
            losses: SegmentLosses::default(),
        }
    }

    /// Takes a segment, and gives what is in order by now.
    pub fn push(&mut self, segment: &Segment<'_>, sink: &mut dyn FnMut(&Piece<'_>)) {
        let next = *self.next.get_or_insert(segment.seq);
        if ahead(segment.seq, next) > 0 {
            self.keep(segment);
            while self.waiting.len() > WAITING_MAX || self.waiting_bytes > WAITING_BYTES_MAX {
                self.give_up(sink);
            }
            return;
        }
        self.give(segment.seq, segment.ts_ns, segment.captured, segment.true_len, sink);
        self.follow(sink);
    }

    /// Gives all that waits: the direction has ended.
    pub fn finish(&mut self, sink: &mut dyn FnMut(&Piece<'_>)) {
        while !self.waiting.is_empty() {
            self.give_up(sink);
        }
    }

    /// Captured bytes of the segments that wait.
    #[must_use]
    pub fn waiting_bytes(&self) -> usize {
        self.waiting_bytes
    }

    /// What was done about segments that were not in order, since the last call.
    pub fn take_losses(&mut self) -> SegmentLosses {
        std::mem::take(&mut self.losses)
    }

    fn keep(&mut self, segment: &Segment<'_>) {
        let at = self.waiting.partition_point(|it| ahead(segment.seq, it.seq) > 0);
        let known = self.waiting.get(at);
        if known.is_some_and(|it| it.seq == segment.seq && it.true_len >= segment.true_len) {
            self.losses.repeated += u64::from(segment.true_len);
            return;
        }
        self.waiting_bytes += segment.captured.len();
        let waiting = Waiting {
            seq: segment.seq,
            ts_ns: segment.ts_ns,
            captured: segment.captured.to_vec(),
            true_len: segment.true_len,
        };
        self.waiting.insert(at, waiting);
    }

    /// Gives what waited for the byte that is next now.
    fn follow(&mut self, sink: &mut dyn FnMut(&Piece<'_>)) {
        while let (Some(next), Some(first)) = (self.next, self.waiting.front()) {
            if ahead(first.seq, next) > 0 {
                return;
            }
            let Some(first) = self.waiting.pop_front() else { return };
            self.waiting_bytes -= first.captured.len();
            self.give(first.seq, first.ts_ns, &first.captured, first.true_len, sink);
        }
    }

    /// Waits no longer for what is before the first that waits.
    fn give_up(&mut self, sink: &mut dyn FnMut(&Piece<'_>)) {
        let (Some(next), Some(first)) = (self.next, self.waiting.front()) else {
            return;
        };
        let (seq, ts_ns) = (first.seq, first.ts_ns);
        if let Ok(missing @ 1..) = u32::try_from(ahead(seq, next)) {
            self.losses.missing += u64::from(missing);
            self.give(next, ts_ns, &[], missing, sink);
        }
        self.follow(sink);
    }

    /// Gives a segment that begins at the next byte or before it.
    fn give(&mut self, seq: u32, ts_ns: u64, captured: &[u8], true_len: u32, sink: &mut dyn FnMut(&Piece<'_>)) {
        let next = self.next.unwrap_or(seq);
        let known = u32::try_from(-ahead(seq, next)).unwrap_or_default().min(true_len);
        self.losses.repeated += u64::from(known);
        let new = true_len - known;
        if new == 0 {
            return;
        }
        self.ts_ns = self.ts_ns.max(ts_ns);
        self.next = Some(next.wrapping_add(new));
        let skip = usize::try_from(known).unwrap_or(usize::MAX);
        sink(&Piece {
            way: self.way,
            ts_ns: self.ts_ns,
            captured: captured.get(skip..).unwrap_or_default(),
            true_len: u64::from(new),
        });
    }
}

/// How far `seq` is behind `from` in the stream; negative if before it. Sequence numbers wrap around.
fn ahead(seq: u32, from: u32) -> i64 {
    i64::from(seq.wrapping_sub(from).cast_signed())
}
