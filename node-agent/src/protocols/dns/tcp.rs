//! DNS messages out of a TCP stream: each has its length before it.

use crate::protocols::Piece;

/// Bytes kept of a message that comes in several pieces. Question and addresses are at its beginning.
const KEEP: usize = 4096;
/// Smallest message: a header.
const HEADER: u16 = 12;

/// A message found in a stream.
#[derive(Clone, Copy, Debug)]
pub struct TcpMessage<'a> {
    /// The captured beginning, for [`Message::parse`](super::Message::parse).
    pub bytes: &'a [u8],
    /// Length of the message, without the length before it.
    pub true_len: u64,
    /// Time of the transfer with its first byte, nanoseconds.
    pub first_ns: u64,
    /// Time of the transfer with its last byte, nanoseconds: when it was there.
    pub last_ns: u64,
}

/// Follows one direction of a connection.
#[derive(Debug)]
pub struct TcpSplitter {
    place: Place,
    /// The beginning of the message under way, if it is not within one piece.
    part: Vec<u8>,
    /// `part` has a hole behind it, or is full.
    closed: bool,
    first_ns: u64,
    resyncs: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Length,
    /// The first byte of the length has come.
    LengthLow(u8),
    Message {
        length: u16,
        left: u16,
    },
    Lost,
}

impl TcpSplitter {
    /// A splitter for a stream seen from its start, or `joined` somewhere.
    #[must_use]
    pub fn new(joined: bool) -> Self {
        Self {
            place: if joined { Place::Lost } else { Place::Length },
            part: Vec::new(),
            closed: false,
            first_ns: 0,
            resyncs: 0,
        }
    }

    /// How often the boundary of a message was lost, since the last call.
    pub fn take_resyncs(&mut self) -> u64 {
        std::mem::take(&mut self.resyncs)
    }

    /// Takes the next piece of the direction and gives each message that ends with it.
    pub fn push(&mut self, piece: &Piece<'_>, sink: &mut dyn FnMut(TcpMessage<'_>)) {
        let seen = usize::try_from(piece.true_len).unwrap_or(usize::MAX);
        let mut bytes = piece.captured.get(..seen).unwrap_or(piece.captured);
        let mut unseen = piece.true_len - bytes.len() as u64;
        if self.place == Place::Lost {
            if !begins(bytes) {
                return;
            }
            self.place = Place::Length;
        }
        while let [first, rest @ ..] = bytes {
            match self.place {
                Place::Length => {
                    self.first_ns = piece.ts_ns;
                    self.place = Place::LengthLow(*first);
                    bytes = rest;
                }
                Place::LengthLow(high) => {
                    self.begin(u16::from_be_bytes([high, *first]));
                    bytes = rest;
                }
                Place::Message { length, left } => {
                    let take = usize::from(left).min(bytes.len());
                    let (message, rest) = bytes.split_at_checked(take).unwrap_or((bytes, &[]));
                    bytes = rest;
                    if take == usize::from(length) {
                        // All of it is here.
                        self.place = Place::Length;
                        sink(self.message(message, length, piece.ts_ns));
                        continue;
                    }
                    if !self.closed {
                        let room = (KEEP - self.part.len()).min(take);
                        self.part.extend_from_slice(message.get(..room).unwrap_or(message));
                        self.closed = room < take;
                    }
                    self.advance(length, left, take as u64, piece.ts_ns, sink);
                }
                Place::Lost => return,
            }
        }
        while unseen > 0 {
            match self.place {
                Place::Message { length, left } => {
                    let take = unseen.min(u64::from(left));
                    unseen -= take;
                    self.closed = true;
                    self.advance(length, left, take, piece.ts_ns, sink);
                }
                _ => {
                    self.resyncs += 1;
                    self.place = Place::Lost;
                    return;
                }
            }
        }
    }

    fn begin(&mut self, length: u16) {
        self.part.clear();
        self.closed = false;
        if length < HEADER {
            // No message is as short as that.
            self.resyncs += 1;
            self.place = Place::Lost;
        } else {
            self.place = Place::Message { length, left: length };
        }
    }

    fn advance(&mut self, length: u16, left: u16, by: u64, ts_ns: u64, sink: &mut dyn FnMut(TcpMessage<'_>)) {
        let left = u16::try_from(u64::from(left).saturating_sub(by)).unwrap_or_default();
        if left > 0 {
            self.place = Place::Message { length, left };
            return;
        }
        self.place = Place::Length;
        sink(self.message(&self.part, length, ts_ns));
        self.part.clear();
        if self.part.capacity() > 512 {
            self.part = Vec::new();
        }
    }

    fn message<'a>(&self, bytes: &'a [u8], length: u16, ts_ns: u64) -> TcpMessage<'a> {
        TcpMessage {
            bytes,
            true_len: u64::from(length),
            first_ns: self.first_ns,
            last_ns: ts_ns,
        }
    }
}

/// True if a message very likely begins with these bytes: after the length, the header of a message with one question.
fn begins(bytes: &[u8]) -> bool {
    let Some([l0, l1, _, _, flags0, flags1, 0, 1, ..]) = bytes.first_chunk::<14>() else {
        return false;
    };
    let length = u16::from_be_bytes([*l0, *l1]);
    // Opcodes end at 6, the reserved bit is zero, and queries have no response code.
    length >= HEADER && flags0 & 0x78 <= 6 << 3 && flags1 & 0x40 == 0 && (flags0 & 0x80 != 0 || flags1 & 0xf == 0)
}
