//! One direction of an HTTP/2 connection: where frames begin and end, and whole header blocks. What they mean is the
//! [`Role`]'s.

use super::frame::{self, END_HEADERS, Frame, HEADER, Kind, PADDED, PRIORITY};
use crate::protocols::{Piece, Verdict, classify::PREFACE};

/// Largest header block that is put together from parts, in bytes. Of a larger one the beginning is read.
const BLOCK_MAX: usize = 32 * 1024;
/// Frames of one header block; no peer needs more, and each costs its sender nothing.
const CONTINUATIONS_MAX: u16 = 64;
/// Buffers larger than this are given back, in bytes.
const KEEP: usize = 1024;

/// Why the wire does not know where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lost {
    Uncaptured,
    Malformed,
}

/// A header block, or its captured beginning.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block<'a> {
    pub(super) bytes: &'a [u8],
    /// All of it was captured.
    pub(super) whole: bool,
    /// It is a pushed request's: read for the table's sake.
    pub(super) pushed: bool,
    pub(super) stream: u32,
    pub(super) end_stream: bool,
    /// Bytes of its frames, with their headers.
    pub(super) wire_bytes: u64,
    /// Times of the first and last byte of its frames.
    pub(super) first_ns: u64,
    pub(super) last_ns: u64,
}

/// What the wire tells of its frames.
pub(super) trait Role {
    /// True if this frame fits what is known of the connection's streams.
    fn expects(&self, frame: &Frame) -> bool;
    fn block(&mut self, block: &Block<'_>);
    /// Bytes of a DATA frame.
    fn data(&mut self, stream: u32, ts_ns: u64, bytes: u64);
    /// A DATA frame that ends its stream's direction has passed.
    fn end_stream(&mut self, stream: u32);
    fn reset(&mut self, stream: u32);
    /// Streams after this one will not be answered.
    fn go_away(&mut self, last_stream: u32);
    /// Bytes that belong to no frame that is known.
    fn unattributed(&mut self, bytes: u64);
    /// Frames may have passed unseen.
    fn lost(&mut self, why: Lost);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// So many bytes of the client's preface have passed.
    Preface(usize),
    /// So many bytes of a frame header are in `header`.
    Header(usize),
    /// So many bytes of the frame are to come.
    Payload(u32),
    Lost,
}

/// Follows one direction.
#[derive(Debug)]
pub(super) struct Wire {
    place: Place,
    header: [u8; HEADER],
    frame: Frame,
    /// When the first byte of the frame came.
    frame_ns: u64,
    /// The header block under way, if it has more than one frame.
    open: Option<Open>,
    /// Its fragments, and the payload of the frame under way where that is needed and not within one piece.
    part: Vec<u8>,
    /// Where in `part` the payload of the frame under way begins.
    payload_at: usize,
    /// Bytes of the payload are missing after those in `part`.
    gap: bool,
}

/// A header block whose end has not come.
#[derive(Clone, Copy, Debug)]
struct Open {
    stream: u32,
    pushed: bool,
    end_stream: bool,
    wire_bytes: u64,
    first_ns: u64,
    frames: u16,
    /// A fragment before was not captured to its end, or there was no room.
    cut: bool,
}

/// How a direction begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Begin {
    /// With the rest of the client's preface, of which so many bytes have been read.
    Preface(usize),
    Frames,
    /// Anywhere.
    Joined,
}

impl Wire {
    pub(super) fn new(begin: Begin) -> Self {
        Self {
            place: match begin {
                Begin::Preface(read) => Place::Preface(read),
                Begin::Frames => Place::Header(0),
                Begin::Joined => Place::Lost,
            },
            header: [0; HEADER],
            frame: Frame::parse(&[0; HEADER]),
            frame_ns: 0,
            open: None,
            part: Vec::new(),
            payload_at: 0,
            gap: false,
        }
    }

    /// Takes the next bytes of the direction.
    pub(super) fn push(&mut self, piece: &Piece<'_>, role: &mut impl Role) {
        let seen = usize::try_from(piece.true_len).unwrap_or(usize::MAX);
        let mut bytes = piece.captured.get(..seen).unwrap_or(piece.captured);
        let mut unseen = piece.true_len - bytes.len() as u64;
        if self.place == Place::Lost && begins(bytes, role) {
            self.place = Place::Header(0);
        }
        while !bytes.is_empty() {
            self.step(&mut bytes, piece.ts_ns, role);
        }
        while unseen > 0 {
            self.skip(&mut unseen, piece.ts_ns, role);
        }
    }

    /// Takes at least one byte.
    fn step(&mut self, bytes: &mut &[u8], ts_ns: u64, role: &mut impl Role) {
        match self.place {
            Place::Preface(have) => {
                let expected = PREFACE.get(have..).unwrap_or_default();
                let take = expected.len().min(bytes.len());
                let (read, rest) = bytes.split_at_checked(take).unwrap_or((bytes, &[]));
                *bytes = rest;
                if !expected.starts_with(read) {
                    self.lose(Lost::Malformed, role);
                } else if take == expected.len() {
                    self.place = Place::Header(0);
                } else {
                    self.place = Place::Preface(have + take);
                }
            }
            Place::Header(have) => {
                if have == 0 {
                    self.frame_ns = ts_ns;
                }
                let room = self.header.get_mut(have..).unwrap_or_default();
                let take = room.len().min(bytes.len());
                let (read, rest) = bytes.split_at_checked(take).unwrap_or((bytes, &[]));
                for (to, from) in room.iter_mut().zip(read) {
                    *to = *from;
                }
                *bytes = rest;
                if have + take == HEADER {
                    self.begin(ts_ns, role);
                } else {
                    self.place = Place::Header(have + take);
                }
            }
            Place::Payload(left) => {
                let take = (left as usize).min(bytes.len());
                let (payload, rest) = bytes.split_at_checked(take).unwrap_or((bytes, &[]));
                *bytes = rest;
                self.payload(payload, left, ts_ns, role);
            }
            Place::Lost => {
                role.unattributed(bytes.len() as u64);
                *bytes = &[];
            }
        }
    }

    /// A frame header is complete.
    fn begin(&mut self, ts_ns: u64, role: &mut impl Role) {
        let frame = Frame::parse(&self.header);
        let in_block = match &self.open {
            Some(open) => frame.kind == Kind::Continuation && frame.stream == open.stream,
            None => frame.kind != Kind::Continuation,
        };
        if !frame.allowed() || !in_block {
            self.lose(Lost::Malformed, role);
            role.unattributed(HEADER as u64);
            return;
        }
        self.frame = frame;
        self.payload_at = self.part.len();
        self.gap = false;
        match frame.kind {
            Kind::Data => role.data(frame.stream, ts_ns, HEADER as u64),
            Kind::Headers | Kind::PushPromise => {
                self.open = Some(Open {
                    stream: frame.stream,
                    pushed: frame.kind == Kind::PushPromise,
                    end_stream: frame.kind == Kind::Headers && frame.flags & frame::END_STREAM != 0,
                    wire_bytes: 0,
                    first_ns: self.frame_ns,
                    frames: 0,
                    cut: false,
                });
            }
            _ => {}
        }
        self.place = Place::Payload(frame.len);
        if frame.len == 0 {
            self.end(&[], ts_ns, role);
        }
    }

    /// The next bytes of the payload, of which `left` were to come.
    fn payload(&mut self, payload: &[u8], left: u32, ts_ns: u64, role: &mut impl Role) {
        if self.frame.kind == Kind::Data {
            role.data(self.frame.stream, ts_ns, payload.len() as u64);
        }
        // Not longer than `left`, which fits.
        let left = left.saturating_sub(payload.len() as u32);
        self.place = Place::Payload(left);
        let whole = payload.len() == self.frame.len as usize;
        if left == 0 && whole {
            self.end(payload, ts_ns, role);
            return;
        }
        if self.frame.keeps_payload() && !self.gap {
            let room = BLOCK_MAX.saturating_sub(self.part.len()).min(payload.len());
            self.part.extend_from_slice(payload.get(..room).unwrap_or(payload));
            self.gap = room < payload.len();
        }
        if left == 0 {
            self.end_of_parts(ts_ns, role);
        }
    }

    /// The frame has ended, and its payload is in `part`.
    fn end_of_parts(&mut self, ts_ns: u64, role: &mut impl Role) {
        let part = std::mem::take(&mut self.part);
        let (before, payload) = part.split_at_checked(self.payload_at).unwrap_or((&part, &[]));
        if before.is_empty() {
            self.end(payload, ts_ns, role);
            if self.part.is_empty() {
                self.reuse(part);
            }
            return;
        }
        // A CONTINUATION frame: only the fragments are its payload.
        self.part = part;
        self.end(&[], ts_ns, role);
    }

    fn reuse(&mut self, mut buffer: Vec<u8>) {
        buffer.clear();
        if buffer.capacity() <= KEEP {
            self.part = buffer;
        }
    }

    /// The frame has ended. `payload` is what was captured of it, or nothing if that is in `part` behind other fragments.
    fn end(&mut self, payload: &[u8], ts_ns: u64, role: &mut impl Role) {
        let frame = self.frame;
        self.place = Place::Header(0);
        match frame.kind {
            Kind::Data if frame.flags & frame::END_STREAM != 0 => role.end_stream(frame.stream),
            Kind::Reset => role.reset(frame.stream),
            Kind::GoAway => {
                if let Some(last) = payload.first_chunk() {
                    role.go_away(u32::from_be_bytes(*last) & 0x7fff_ffff);
                }
            }
            Kind::Headers | Kind::PushPromise | Kind::Continuation => self.fragment(payload, ts_ns, role),
            _ => {}
        }
    }

    /// A frame of a header block has ended.
    fn fragment(&mut self, payload: &[u8], ts_ns: u64, role: &mut impl Role) {
        let frame = self.frame;
        let Some(mut open) = self.open.take() else { return };
        open.wire_bytes += HEADER as u64 + u64::from(frame.len);
        open.frames += 1;
        let (fragment, whole) = frame.fragment(payload, self.gap);
        let ends = frame.flags & END_HEADERS != 0;
        if open.frames > CONTINUATIONS_MAX {
            self.part = Vec::new();
            self.lose(Lost::Malformed, role);
            return;
        }
        let block = |bytes, whole| Block {
            bytes,
            whole,
            pushed: open.pushed,
            stream: open.stream,
            end_stream: open.end_stream,
            wire_bytes: open.wire_bytes,
            first_ns: open.first_ns,
            last_ns: ts_ns,
        };
        if open.frames == 1 && ends {
            role.block(&block(fragment, whole));
            return;
        }
        // More than one frame: fragments are put together, as far as they have no gap and there is room.
        if !open.cut && !payload.is_empty() {
            let room = BLOCK_MAX.saturating_sub(self.part.len()).min(fragment.len());
            self.part.extend_from_slice(fragment.get(..room).unwrap_or(fragment));
            open.cut = room < fragment.len();
        } else if open.cut {
            self.part.truncate(self.payload_at);
        }
        open.cut |= !whole;
        if ends {
            let part = std::mem::take(&mut self.part);
            role.block(&block(&part, !open.cut));
            self.reuse(part);
        } else {
            self.open = Some(open);
        }
    }

    /// Goes past bytes that were not captured.
    fn skip(&mut self, unseen: &mut u64, ts_ns: u64, role: &mut impl Role) {
        if let Place::Payload(left) = self.place {
            let take = u64::from(left).min(*unseen);
            *unseen -= take;
            if self.frame.kind == Kind::Data {
                role.data(self.frame.stream, ts_ns, take);
            }
            self.gap = true;
            let left = left.saturating_sub(u32::try_from(take).unwrap_or(u32::MAX));
            self.place = Place::Payload(left);
            if left == 0 {
                self.end_of_parts(ts_ns, role);
            }
        } else {
            if self.place != Place::Lost {
                self.lose(Lost::Uncaptured, role);
            }
            role.unattributed(std::mem::take(unseen));
        }
    }

    fn lose(&mut self, why: Lost, role: &mut impl Role) {
        self.place = Place::Lost;
        self.open = None;
        self.part = Vec::new();
        role.lost(why);
    }
}

impl Frame {
    /// True if the payload is looked at.
    fn keeps_payload(&self) -> bool {
        matches!(
            self.kind,
            Kind::Headers | Kind::PushPromise | Kind::Continuation | Kind::GoAway
        )
    }

    /// The part of the header block in the captured beginning of the payload, and whether it is all of the frame's.
    fn fragment<'a>(&self, payload: &'a [u8], gap: bool) -> (&'a [u8], bool) {
        if self.kind == Kind::Continuation {
            return (payload, !gap);
        }
        let padded = self.flags & PADDED != 0;
        let padding = if padded {
            payload.first().copied().map_or(0, usize::from)
        } else {
            0
        };
        let mut start = usize::from(padded);
        if self.kind == Kind::Headers && self.flags & PRIORITY != 0 {
            start += 5;
        }
        if self.kind == Kind::PushPromise {
            start += 4;
        }
        let end = (self.len as usize).saturating_sub(padding);
        let captured = end.min(payload.len());
        (
            payload.get(start..captured).unwrap_or_default(),
            captured == end && start <= end,
        )
    }
}

/// True if frames very likely begin here.
fn begins(bytes: &[u8], role: &impl Role) -> bool {
    let Some(header) = bytes.first_chunk() else {
        return false;
    };
    frame::verdict(bytes) == Verdict::Http2Frames && {
        let frame = Frame::parse(header);
        let followed = bytes.len() >= HEADER + frame.len as usize + HEADER;
        match frame.kind {
            // Its block began before.
            Kind::Continuation => false,
            // Any bytes may look like it: some further frame, or the stream, has to agree.
            Kind::Data => followed || role.expects(&frame),
            _ => role.expects(&frame),
        }
    }
}
