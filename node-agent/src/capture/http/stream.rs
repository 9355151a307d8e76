//! One way of a connection: segments as they came, put into the order of their stream. Pure.
//!
//! Out of a socket they come in order: what is missing was lost on its way to here. Into it they may overtake each other:
//! those ahead are kept until what is missing came, or will not come any more.

use super::events::Data;

/// Segments that are kept while others are missing.
const WAITING_MAX: usize = 64;
/// Captured bytes of them.
const BYTES_MAX: usize = 128 * 1024;

/// A part of the stream, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part<'a> {
    pub(super) time_ns: u64,
    /// What was captured of its beginning.
    pub(super) captured: &'a [u8],
    pub(super) len: u64,
}

/// The state of one way.
#[derive(Debug)]
pub(super) struct Stream {
    /// Sequence number of the next byte.
    next: u32,
    /// Segments ahead of it, by sequence number.
    waiting: Vec<Waiting>,
    bytes: usize,
    /// Where it ends.
    end: Option<u32>,
}

#[derive(Debug)]
struct Waiting {
    seq: u32,
    len: u32,
    time_ns: u64,
    captured: Box<[u8]>,
    tail: Box<[u8]>,
}

impl Stream {
    /// A stream whose next byte has this sequence number.
    pub(super) const fn new(next: u32) -> Self {
        Self {
            next,
            waiting: Vec::new(),
            bytes: 0,
            end: None,
        }
    }

    /// Takes a segment, and gives what can be given. With `in_order`, what is missing before it was lost. Gives the number of
    /// bytes that were.
    pub(super) fn push(
        &mut self,
        time_ns: u64,
        data: &Data<'_>,
        in_order: bool,
        give: &mut dyn FnMut(Part<'_>),
    ) -> u64 {
        let mut lost = 0;
        if ahead(data.seq, self.next) > 0 {
            if !in_order {
                let size = data.captured.len() + data.tail.len();
                if self.waiting.len() < WAITING_MAX && self.bytes + size <= BYTES_MAX {
                    self.wait(time_ns, data);
                    return 0;
                }
                lost += self.give_up(give);
            }
            lost += self.skip_to(data.seq, time_ns, give);
        }
        self.take(time_ns, data.seq, data.len, data.captured, data.tail, give);
        self.take_waiting(give);
        lost
    }

    /// The stream ends where this sequence number is.
    pub(super) fn ends_at(&mut self, seq: u32) {
        self.end = Some(seq);
    }

    /// True once all was given.
    pub(super) fn is_over(&self) -> bool {
        self.end.is_some_and(|end| ahead(end, self.next) <= 0)
    }

    /// When the first of the segments came that wait for others.
    pub(super) fn waits_since(&self) -> Option<u64> {
        self.waiting.iter().map(|waiting| waiting.time_ns).min()
    }

    /// What is missing will not come any more. Gives the number of bytes that were lost.
    pub(super) fn give_up(&mut self, give: &mut dyn FnMut(Part<'_>)) -> u64 {
        let mut lost = 0;
        while let Some(first) = self.waiting.first() {
            let (seq, time_ns) = (first.seq, first.time_ns);
            lost += self.skip_to(seq, time_ns, give);
            self.take_waiting(give);
        }
        lost
    }

    fn wait(&mut self, time_ns: u64, data: &Data<'_>) {
        let next = self.next;
        let at = self
            .waiting
            .partition_point(|other| ahead(other.seq, next) <= ahead(data.seq, next));
        self.bytes += data.captured.len() + data.tail.len();
        self.waiting.insert(
            at,
            Waiting {
                seq: data.seq,
                len: data.len,
                time_ns,
                captured: data.captured.into(),
                tail: data.tail.into(),
            },
        );
    }

    fn take_waiting(&mut self, give: &mut dyn FnMut(Part<'_>)) {
        while self
            .waiting
            .first()
            .is_some_and(|first| ahead(first.seq, self.next) <= 0)
        {
            let Waiting {
                seq,
                len,
                time_ns,
                captured,
                tail,
            } = self.waiting.remove(0);
            self.bytes = self.bytes.saturating_sub(captured.len() + tail.len());
            self.take(time_ns, seq, len, &captured, &tail, give);
        }
        if self.waiting.is_empty() && self.waiting.capacity() > WAITING_MAX / 4 {
            self.waiting = Vec::new();
        }
    }

    fn skip_to(&mut self, seq: u32, time_ns: u64, give: &mut dyn FnMut(Part<'_>)) -> u64 {
        let missing = u64::try_from(ahead(seq, self.next)).unwrap_or(0);
        if missing > 0 {
            give(Part {
                time_ns,
                captured: &[],
                len: missing,
            });
            self.next = seq;
        }
        missing
    }

    /// Gives a segment that begins at the next byte or before it.
    fn take(&mut self, time_ns: u64, seq: u32, len: u32, captured: &[u8], tail: &[u8], give: &mut dyn FnMut(Part<'_>)) {
        let seen = usize::try_from(ahead(self.next, seq)).unwrap_or(0);
        let all = usize::try_from(len).unwrap_or(usize::MAX);
        if seen >= all {
            return;
        }
        self.next = seq.wrapping_add(len);
        let left = all - seen;
        // Of an end that was seen in part already, the rest is not worth the trouble.
        let tail = if tail.len() > left { &[] } else { tail };
        give(Part {
            time_ns,
            captured: captured.get(seen..).unwrap_or_default(),
            len: (left - tail.len()) as u64,
        });
        if !tail.is_empty() {
            give(Part {
                time_ns,
                captured: tail,
                len: tail.len() as u64,
            });
        }
    }
}

/// How far one sequence number is ahead of another.
fn ahead(seq: u32, of: u32) -> i32 {
    seq.wrapping_sub(of).cast_signed()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a stream gave, with dots for what was not captured.
    #[derive(Default)]
    struct Given(String);

    impl Given {
        fn take(&mut self, part: Part<'_>) {
            self.0.push_str(std::str::from_utf8(part.captured).unwrap_or("?"));
            for _ in part.captured.len() as u64..part.len {
                self.0.push('.');
            }
        }
    }

    fn data<'a>(seq: u32, len: u32, captured: &'a [u8], tail: &'a [u8]) -> Data<'a> {
        Data {
            way: 1,
            flags: 0,
            seq,
            len,
            captured,
            tail,
        }
    }

    fn whole(seq: u32, bytes: &[u8]) -> Data<'_> {
        data(seq, u32::try_from(bytes.len()).unwrap_or(0), bytes, &[])
    }

    #[test]
    fn order_is_that_of_the_stream() {
        // The numbers go round.
        let start = u32::MAX - 3;
        let at = |offset: u32| start.wrapping_add(offset);
        let mut stream = Stream::new(start);
        let mut given = Given::default();
        for (offset, bytes) in [
            (0, &b"abc"[..]),
            (6, b"ghi"),
            (9, b"jk"),
            (6, b"ghi"),
            (2, b"cd"),
            (4, b"ef"),
            (0, b"abcdefghijk"),
            (9, b"jklm"),
        ] {
            let lost = stream.push(1, &whole(at(offset), bytes), false, &mut |part| given.take(part));
            assert_eq!(lost, 0);
        }
        assert_eq!(given.0, "abcdefghijklm");
        assert_eq!((stream.waits_since(), stream.bytes), (None, 0));
        stream.ends_at(at(14));
        assert!(!stream.is_over());
        stream.push(1, &whole(at(13), b"n"), false, &mut |part| given.take(part));
        assert!(stream.is_over());
    }

    #[test]
    fn what_is_not_captured_is_counted() {
        let mut stream = Stream::new(0);
        let mut given = Given::default();
        let mut give = |part: Part<'_>| given.take(part);
        stream.push(1, &data(0, 10, b"ab", b"ij"), true, &mut give);
        // Its beginning was seen already.
        stream.push(1, &data(8, 10, b"ijkl", b"r"), true, &mut give);
        stream.push(1, &data(17, 4, b"", b"tu"), true, &mut give);
        assert_eq!(given.0, "ab......ijkl.....r.tu");
    }

    #[test]
    fn what_is_missing_is_a_hole() {
        let mut stream = Stream::new(0);
        let mut given = Given::default();
        let mut give = |part: Part<'_>| given.take(part);
        assert_eq!(stream.push(1, &whole(2, b"cd"), true, &mut give), 2);
        assert_eq!(stream.push(5, &whole(6, b"gh"), false, &mut give), 0);
        assert_eq!(stream.push(4, &whole(10, b"kl"), false, &mut give), 0);
        assert_eq!(stream.waits_since(), Some(4));
        assert_eq!(stream.give_up(&mut give), 4);
        assert_eq!(given.0, "..cd..gh..kl");
    }

    #[test]
    fn waiting_is_bounded() {
        let mut stream = Stream::new(0);
        let mut given = Given::default();
        let mut lost = 0;
        for number in 1..=200 {
            lost += stream.push(1, &whole(number * 2, b"x"), false, &mut |part| given.take(part));
        }
        assert!(stream.waiting.len() <= WAITING_MAX);
        lost += stream.give_up(&mut |part| given.take(part));
        assert_eq!(given.0.len(), 401);
        assert_eq!(lost, 201);
    }
}
