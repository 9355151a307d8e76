//! The nine bytes before every HTTP/2 frame, and whether bytes look like one.

use crate::protocols::Verdict;

/// Length of a frame header.
pub(crate) const HEADER: usize = 9;
/// Largest payload that is believed of a frame whose connection is not known yet: what all common peers allow at most.
const PLAUSIBLE_LEN: u32 = 1 << 20;

/// Frame types of RFC 9113.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Data,
    Headers,
    Priority,
    Reset,
    Settings,
    PushPromise,
    Ping,
    GoAway,
    WindowUpdate,
    Continuation,
    /// An extension: skipped by its length.
    Other,
}

/// Flag END_STREAM of DATA and HEADERS.
pub(crate) const END_STREAM: u8 = 0x1;
/// Flag ACK of SETTINGS and PING.
pub(crate) const ACK: u8 = 0x1;
/// Flag END_HEADERS of HEADERS, PUSH_PROMISE and CONTINUATION.
pub(crate) const END_HEADERS: u8 = 0x4;
/// Flag PADDED of DATA, HEADERS and PUSH_PROMISE.
pub(crate) const PADDED: u8 = 0x8;
/// Flag PRIORITY of HEADERS.
pub(crate) const PRIORITY: u8 = 0x20;

/// A frame's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    /// Bytes of payload.
    pub(crate) len: u32,
    pub(crate) kind: Kind,
    pub(crate) flags: u8,
    /// 0 for the connection.
    pub(crate) stream: u32,
    /// The reserved bit before the stream, which is zero as sent by everybody.
    reserved: bool,
}

impl Frame {
    pub(crate) fn parse(bytes: &[u8; HEADER]) -> Self {
        let [l0, l1, l2, kind, flags, s0, s1, s2, s3] = *bytes;
        Self {
            len: u32::from_be_bytes([0, l0, l1, l2]),
            kind: match kind {
                0 => Kind::Data,
                1 => Kind::Headers,
                2 => Kind::Priority,
                3 => Kind::Reset,
                4 => Kind::Settings,
                5 => Kind::PushPromise,
                6 => Kind::Ping,
                7 => Kind::GoAway,
                8 => Kind::WindowUpdate,
                9 => Kind::Continuation,
                _ => Kind::Other,
            },
            flags,
            stream: u32::from_be_bytes([s0 & 0x7f, s1, s2, s3]),
            reserved: s0 & 0x80 != 0,
        }
    }

    /// True if RFC 9113 allows this frame on some connection.
    pub(crate) fn allowed(&self) -> bool {
        let on_stream = self.stream != 0;
        match self.kind {
            Kind::Data => on_stream && self.len >= self.padding(),
            Kind::Headers => on_stream && self.len >= self.padding() + self.priority(),
            Kind::Priority => on_stream && self.len == 5,
            Kind::Reset => on_stream && self.len == 4,
            Kind::Settings => !on_stream && self.len.is_multiple_of(6) && (self.flags & ACK == 0 || self.len == 0),
            Kind::PushPromise => on_stream && self.len >= 4 + self.padding(),
            Kind::Ping => !on_stream && self.len == 8,
            Kind::GoAway => !on_stream && self.len >= 8,
            Kind::WindowUpdate => self.len == 4,
            Kind::Continuation => on_stream,
            Kind::Other => true,
        }
    }

    /// True if these nine bytes are likely a frame header rather than something else: allowed, of a known type, with no
    /// flag that the type does not have, and of a length that peers agree on.
    pub(crate) fn plausible(&self) -> bool {
        let flags = match self.kind {
            Kind::Data => END_STREAM | PADDED,
            Kind::Headers => END_STREAM | END_HEADERS | PADDED | PRIORITY,
            Kind::Settings | Kind::Ping => ACK,
            Kind::PushPromise => END_HEADERS | PADDED,
            Kind::Continuation => END_HEADERS,
            Kind::Priority | Kind::Reset | Kind::GoAway | Kind::WindowUpdate => 0,
            Kind::Other => return false,
        };
        let len = match self.kind {
            Kind::Settings | Kind::GoAway => 1 << 12,
            _ => PLAUSIBLE_LEN,
        };
        self.allowed() && !self.reserved && self.flags & !flags == 0 && self.len <= len
    }

    /// Bytes of the field "Pad Length".
    fn padding(&self) -> u32 {
        u32::from(self.flags & PADDED != 0)
    }

    /// Bytes of the fields of PRIORITY in HEADERS.
    fn priority(&self) -> u32 {
        if self.flags & PRIORITY != 0 { 5 } else { 0 }
    }
}

/// Whether frames begin here: each frame header within the bytes is plausible.
pub(crate) fn verdict(mut bytes: &[u8]) -> Verdict {
    if bytes.len() < HEADER {
        // The first byte is that of a length below 1 MiB.
        let begins = bytes.first().is_some_and(|byte| *byte <= 0x10) && bytes.get(3).is_none_or(|kind| *kind <= 9);
        return if begins { Verdict::NeedMore } else { Verdict::NotHttp };
    }
    while let Some((header, rest)) = bytes.split_first_chunk::<HEADER>() {
        let frame = Frame::parse(header);
        if !frame.plausible() {
            return Verdict::NotHttp;
        }
        bytes = usize::try_from(frame.len)
            .ok()
            .and_then(|len| rest.get(len..))
            .unwrap_or_default();
    }
    Verdict::Http2Frames
}
