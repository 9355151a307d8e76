//! One direction of an HTTP/1 connection: where messages begin and end. What they mean is the [`Role`]'s.

use super::{
    heads::{Heads, Said, Tag},
    lines::{Line, Lines},
};
use crate::protocols::Piece;

/// What is kept of a line besides a path: method, authority, header names and values.
const LINE: usize = 512;

/// How a message goes on after its head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Body {
    /// This many bytes, perhaps none.
    Fixed(u64),
    Chunked,
    /// As long as the connection.
    UntilClose,
    /// No HTTP/1 follows on this connection.
    Stop,
}

/// What a start line begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum First {
    Message,
    /// Something else than HTTP/1.
    Stop,
}

/// Bytes that cannot be what they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Malformed;

/// What the wire tells of its messages.
pub(super) trait Role {
    /// True if a message certainly begins with these bytes.
    fn begins(&self, bytes: &[u8]) -> bool;
    /// True if the message under way, which has no end of its own, ends where another begins.
    fn may_end(&self) -> bool;
    /// True if the length of the message under way may not be what its head says.
    fn is_doubtful(&self) -> bool;
    /// The first byte of a message.
    fn start(&mut self, ts_ns: u64);
    /// The start line; `whole` is false if its end was not captured.
    fn first_line(&mut self, line: Line<'_>, whole: bool) -> Result<First, Malformed>;
    fn header(&mut self, line: &[u8]) -> Result<(), Malformed>;
    fn head_done(&mut self) -> Result<Body, Malformed>;
    /// The head under way, of which only the start was told, says the same as this one; false if it cannot.
    fn says(&mut self, said: &Said) -> bool;
    /// What the head under way says, before it is done.
    fn tell(&self, said: &mut Said);
    /// Bytes of the message under way; if there is none, bytes that belong to nothing.
    fn count(&mut self, ts_ns: u64, bytes: u64);
    /// The message under way has ended.
    fn done(&mut self);
    /// The end of the message under way (if any), and further messages after it, were not seen.
    fn lost(&mut self, why: Lost);
}

/// Why the wire does not know where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lost {
    Uncaptured,
    Malformed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Between,
    FirstLine,
    Headers,
    Fixed(u64),
    ChunkSize,
    ChunkData(u64),
    ChunkEnd,
    Trailers,
    UntilClose,
    /// Somewhere in a message, or between two; in a chunked body, if that is known.
    Lost {
        chunked: bool,
    },
    Stopped,
}

/// What became of a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pushed {
    Taken,
    /// HTTP/1 ended after this many of the piece's captured bytes.
    Stopped(usize),
}

/// A piece being read.
struct Reading<'b, 'h> {
    heads: &'h mut Heads,
    /// The bytes from where a head began in this piece.
    head: Option<(Tag, &'b [u8])>,
}

/// Follows one direction.
#[derive(Debug)]
pub(super) struct Wire {
    place: Place,
    lines: Lines,
    /// Longest line kept.
    limit: usize,
    /// A whole head has been seen.
    proved: bool,
}

impl Wire {
    pub(super) fn new(joined: bool, path_limit: u16) -> Self {
        Self {
            place: if joined {
                Place::Lost { chunked: false }
            } else {
                Place::Between
            },
            lines: Lines::default(),
            limit: usize::from(path_limit) + LINE,
            proved: false,
        }
    }

    /// True if the message under way ends with the connection.
    pub(super) fn is_until_close(&self) -> bool {
        self.place == Place::UntilClose
    }

    /// True if a head has been read to its end: this is HTTP/1.
    pub(super) fn is_proved(&self) -> bool {
        self.proved
    }

    /// Takes the next bytes of the direction.
    pub(super) fn push(&mut self, piece: &Piece<'_>, heads: &mut Heads, role: &mut impl Role) -> Pushed {
        let seen = usize::try_from(piece.true_len).unwrap_or(usize::MAX);
        let captured = piece.captured.get(..seen).unwrap_or(piece.captured);
        let unseen = piece.true_len - captured.len() as u64;
        let mut bytes = captured;
        if !bytes.is_empty() {
            self.at_beginning(bytes, unseen == 0, role);
        }
        let mut reading = Reading { heads, head: None };
        while !bytes.is_empty() {
            self.step(&mut bytes, piece.ts_ns, &mut reading, role);
            if self.place == Place::Stopped {
                return Pushed::Stopped(captured.len() - bytes.len());
            }
        }
        if unseen > 0 {
            let stopped = self.place == Place::Stopped;
            self.skip(unseen, piece.ts_ns, role);
            if !stopped && self.place == Place::Stopped {
                return Pushed::Stopped(captured.len());
            }
        }
        Pushed::Taken
    }

    /// Looks whether the beginning of a piece says where we are, if that is not known otherwise.
    fn at_beginning(&mut self, bytes: &[u8], whole: bool, role: &mut impl Role) {
        match self.place {
            Place::Lost { .. } if role.begins(bytes) => {
                role.done();
                self.place = Place::Between;
            }
            Place::UntilClose if role.may_end() && role.begins(bytes) => {
                role.done();
                self.place = Place::Between;
            }
            Place::Fixed(_) | Place::ChunkSize if role.is_doubtful() && role.begins(bytes) => {
                role.done();
                self.lines.forget();
                self.place = Place::Between;
            }
            // Servers write whole chunks.
            Place::Lost { chunked: true } if is_chunk(bytes, whole) => self.place = Place::ChunkSize,
            _ => {}
        }
    }

    /// Takes at least one byte, or changes the place.
    fn step<'b>(&mut self, bytes: &mut &'b [u8], ts_ns: u64, reading: &mut Reading<'b, '_>, role: &mut impl Role) {
        match self.place {
            Place::Between => {
                // A line end too many after a body is allowed.
                while let [b'\r' | b'\n', rest @ ..] = bytes {
                    *bytes = rest;
                }
                if !bytes.is_empty() {
                    self.begin(bytes, ts_ns, reading, role);
                }
            }
            Place::FirstLine | Place::Headers | Place::ChunkSize | Place::Trailers | Place::ChunkEnd => {
                self.line(bytes, ts_ns, reading, role);
            }
            Place::Fixed(left) => self.body(bytes, left, ts_ns, role),
            Place::ChunkData(left) => self.body(bytes, left, ts_ns, role),
            Place::UntilClose | Place::Stopped => {
                role.count(ts_ns, bytes.len() as u64);
                *bytes = &[];
            }
            Place::Lost { chunked } => {
                role.count(ts_ns, bytes.len() as u64);
                // The last chunk ends the body wherever we are in it.
                if chunked && bytes.ends_with(b"\r\n0\r\n\r\n") {
                    self.end(role);
                }
                *bytes = &[];
            }
        }
    }

    /// Begins a message; goes past its head if that was read before.
    fn begin<'b>(&mut self, bytes: &mut &'b [u8], ts_ns: u64, reading: &mut Reading<'b, '_>, role: &mut impl Role) {
        role.start(ts_ns);
        self.lines.forget();
        self.place = Place::FirstLine;
        reading.head = match reading.heads.find(bytes) {
            Ok((said, len)) => {
                if role.says(said) {
                    role.count(ts_ns, len as u64);
                    *bytes = bytes.get(len..).unwrap_or_default();
                    let next = self.head_done(role);
                    self.go_on(next, role);
                }
                None
            }
            Err(tag) => tag.map(|tag| (tag, *bytes)),
        };
    }

    /// Bytes of a body or chunk of which `left` are to come.
    fn body(&mut self, bytes: &mut &[u8], left: u64, ts_ns: u64, role: &mut impl Role) {
        let take = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
        *bytes = bytes.get(take..).unwrap_or_default();
        self.advance(left, take as u64, ts_ns, role);
    }

    /// Goes `by` bytes of the `left` ones further.
    fn advance(&mut self, left: u64, by: u64, ts_ns: u64, role: &mut impl Role) {
        role.count(ts_ns, by);
        let left = left.saturating_sub(by);
        match self.place {
            Place::Fixed(_) if left == 0 => self.end(role),
            Place::Fixed(_) => self.place = Place::Fixed(left),
            _ if left == 0 => self.place = Place::ChunkEnd,
            _ => self.place = Place::ChunkData(left),
        }
    }

    /// Reads one line of those places that consist of lines.
    fn line<'b>(&mut self, bytes: &mut &'b [u8], ts_ns: u64, reading: &mut Reading<'b, '_>, role: &mut impl Role) {
        let before = bytes.len();
        let line = self.lines.next(bytes, self.limit);
        role.count(ts_ns, (before - bytes.len()) as u64);
        let Some(line) = line else { return };
        let next = match self.place {
            Place::FirstLine => role.first_line(line, true).map(|first| match first {
                First::Message => Some(Place::Headers),
                First::Stop => Some(Place::Stopped),
            }),
            Place::Headers if line.bytes.is_empty() => {
                if let Some((tag, from)) = reading.head.take()
                    && let Some(head) = from.get(..from.len() - bytes.len())
                {
                    reading.heads.keep(tag, head, |said| role.tell(said));
                }
                self.head_done(role)
            }
            Place::Headers => role.header(line.bytes).map(|()| Some(Place::Headers)),
            Place::ChunkSize => chunk_size(line.bytes).map(|size| match size {
                0 => Some(Place::Trailers),
                size => Some(Place::ChunkData(size)),
            }),
            Place::ChunkEnd if line.bytes.is_empty() => Ok(Some(Place::ChunkSize)),
            Place::Trailers if line.bytes.is_empty() => Ok(None),
            Place::Trailers => Ok(Some(Place::Trailers)),
            _ => Err(Malformed),
        };
        self.go_on(next, role);
    }

    /// What comes after a head; `None` is its message's end.
    fn head_done(&mut self, role: &mut impl Role) -> Result<Option<Place>, Malformed> {
        self.proved = true;
        role.head_done().map(|body| match body {
            Body::Fixed(0) => None,
            Body::Fixed(left) => Some(Place::Fixed(left)),
            Body::Chunked => Some(Place::ChunkSize),
            Body::UntilClose => Some(Place::UntilClose),
            Body::Stop => Some(Place::Stopped),
        })
    }

    fn go_on(&mut self, next: Result<Option<Place>, Malformed>, role: &mut impl Role) {
        match next {
            Ok(Some(place)) => self.place = place,
            Ok(None) => self.end(role),
            Err(Malformed) => self.lose(Lost::Malformed, role),
        }
    }

    fn end(&mut self, role: &mut impl Role) {
        self.lines.forget();
        self.place = Place::Between;
        role.done();
    }

    /// Goes past bytes that were not captured.
    fn skip(&mut self, unseen: u64, ts_ns: u64, role: &mut impl Role) {
        let mut unseen = unseen;
        match self.place {
            Place::Fixed(left) | Place::ChunkData(left) if unseen <= left => {
                self.advance(left, unseen, ts_ns, role);
                return;
            }
            // The line end after a chunk needs no look.
            Place::ChunkData(left) if unseen == left + 2 => {
                role.count(ts_ns, unseen);
                self.place = Place::ChunkSize;
                return;
            }
            Place::ChunkEnd if self.lines.unfinished().is_empty() && unseen == 2 => {
                role.count(ts_ns, unseen);
                self.place = Place::ChunkSize;
                return;
            }
            Place::Fixed(left) => {
                self.advance(left, left, ts_ns, role);
                unseen -= left;
            }
            Place::FirstLine => {
                let line = Line {
                    bytes: self.lines.unfinished(),
                    tail: None,
                };
                // Of a request the path may have been there.
                if role.first_line(line, false) == Ok(First::Stop) {
                    self.place = Place::Stopped;
                    return;
                }
            }
            Place::UntilClose | Place::Lost { .. } | Place::Stopped => {
                role.count(ts_ns, unseen);
                return;
            }
            _ => {}
        }
        self.lose(Lost::Uncaptured, role);
        role.count(ts_ns, unseen);
    }

    fn lose(&mut self, why: Lost, role: &mut impl Role) {
        self.lines.forget();
        let chunked = matches!(
            self.place,
            Place::ChunkSize | Place::ChunkData(_) | Place::ChunkEnd | Place::Lost { chunked: true }
        );
        self.place = Place::Lost { chunked };
        role.lost(why);
    }
}

/// The size in the line before a chunk: hexadecimal digits, then perhaps extensions.
fn chunk_size(line: &[u8]) -> Result<u64, Malformed> {
    let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
    let (number, rest) = line.split_at_checked(digits).ok_or(Malformed)?;
    let ends = rest.first().is_none_or(|byte| matches!(byte, b';' | b' ' | b'\t'));
    // Beyond this there is no such chunk, and sums could overflow.
    if !ends || digits == 0 || digits > 15 {
        return Err(Malformed);
    }
    let number = std::str::from_utf8(number).map_err(|_| Malformed)?;
    u64::from_str_radix(number, 16).map_err(|_| Malformed)
}

/// True if these bytes are likely the beginning of a chunk: a size that the rest of the piece does not contradict.
fn is_chunk(bytes: &[u8], whole: bool) -> bool {
    let Some(at) = memchr::memchr(b'\n', bytes.get(..32).unwrap_or(bytes)) else {
        return false;
    };
    let Some(line) = bytes.get(..at).and_then(|line| line.strip_suffix(b"\r")) else {
        return false;
    };
    let Ok(size) = chunk_size(line) else {
        return false;
    };
    let rest = bytes.get(at + 1..).unwrap_or_default();
    match usize::try_from(size).ok().and_then(|size| rest.get(size..)) {
        Some(end) if size == 0 => end.starts_with(b"\r\n"),
        Some(end) => end.starts_with(b"\r\n") || (end.is_empty() && whole) || end == b"\r",
        None => true,
    }
}
