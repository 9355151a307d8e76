//! What a segment speaks, and where a head ends: rules of `httpflow`.

/// Bytes that are looked at.
pub const LOOK: usize = 24;

/// What the first bytes of a segment say; the agent's `protocols::classify` says the same, and a little more about frames.
pub mod verdict {
    /// None of the others.
    pub const OTHER: u8 = 0;
    /// An HTTP/1 request begins.
    pub const REQUEST: u8 = 1;
    /// An HTTP/1 response begins.
    pub const RESPONSE: u8 = 2;
    /// The client's HTTP/2 preface.
    pub const PREFACE: u8 = 3;
    /// An HTTP/2 frame.
    pub const FRAMES: u8 = 4;
    /// An HTTP/2 frame SETTINGS, with which a server begins.
    pub const SETTINGS: u8 = 5;
    /// A TLS record.
    pub const TLS: u8 = 6;
    /// The bytes are too few to tell.
    pub const NEED_MORE: u8 = 7;
}

/// The first eight bytes of a word, and its length.
#[derive(Clone, Copy)]
struct Word {
    bytes: u64,
    mask: u64,
    len: usize,
}

const fn word(text: &[u8]) -> Word {
    let (mut bytes, mut mask, mut at) = (0, 0, 0);
    while at < 8 {
        bytes <<= 8;
        mask <<= 8;
        // As a constant there is no other way to look at a byte.
        #[allow(clippy::indexing_slicing, reason = "the index is checked, and at compile time")]
        if at < text.len() {
            bytes |= text[at] as u64;
            mask |= 0xff;
        }
        at += 1;
    }
    Word {
        bytes,
        mask,
        len: text.len(),
    }
}

/// Methods with the blank that follows.
const METHODS: [Word; 18] = [
    word(b"GET "),
    word(b"POST "),
    word(b"PUT "),
    word(b"HEAD "),
    word(b"DELETE "),
    word(b"PATCH "),
    word(b"OPTIONS "),
    word(b"CONNECT "),
    word(b"TRACE "),
    word(b"PROPFIND "),
    word(b"PROPPATCH "),
    word(b"REPORT "),
    word(b"MKCOL "),
    word(b"COPY "),
    word(b"MOVE "),
    word(b"LOCK "),
    word(b"UNLOCK "),
    word(b"PURGE "),
];
const OPTIONS: usize = 6;
const CONNECT: usize = 7;

/// Says what begins with the first `len` of these bytes, [`LOOK`] at most; the others are zero.
#[inline(always)]
pub fn classify(first: &[u8; LOOK], len: u32) -> u8 {
    if len == 0 {
        return verdict::NEED_MORE;
    }
    let start = u64::from_be_bytes([
        first[0], first[1], first[2], first[3], first[4], first[5], first[6], first[7],
    ]);
    // What is there of the first eight bytes.
    let there = if len >= 8 { u64::MAX } else { !(u64::MAX >> (len * 8)) };
    match first[0] {
        b'H' => {
            let http = word(b"HTTP/1.");
            if (start ^ http.bytes) & http.mask & there == 0 {
                return response(first, len);
            }
        }
        b'P' => {
            let (preface, rest) = (word(b"PRI * HT"), u64::from_be_bytes(*b"TP/2.0\r\n"));
            let second = u64::from_be_bytes([
                first[8], first[9], first[10], first[11], first[12], first[13], first[14], first[15],
            ]);
            let more = match len {
                0..=8 => 0,
                9..=15 => !(u64::MAX >> ((len - 8) * 8)),
                _ => u64::MAX,
            };
            if (start ^ preface.bytes) & there == 0 && (second ^ rest) & more == 0 {
                return if len >= 16 {
                    verdict::PREFACE
                } else {
                    verdict::NEED_MORE
                };
            }
        }
        0x14..=0x17 if len < 2 || first[1] == 3 => {
            if len < 3 {
                return verdict::NEED_MORE;
            }
            if first[2] <= 4 {
                return verdict::TLS;
            }
        }
        _ => {}
    }
    if first[0].is_ascii_uppercase() {
        return request(first, start, there, len);
    }
    frame(first, len)
}

#[inline(always)]
fn response(first: &[u8; LOOK], len: u32) -> u8 {
    let version = len < 8 || first[7] == b'0' || first[7] == b'1';
    let blank = len < 9 || first[8] == b' ';
    let status = len < 10 || first[9].is_ascii_digit();
    if !version || !blank || !status {
        verdict::OTHER
    } else if len < 10 {
        verdict::NEED_MORE
    } else {
        verdict::RESPONSE
    }
}

#[inline(always)]
fn request(first: &[u8; LOOK], start: u64, there: u64, len: u32) -> u8 {
    for (number, method) in METHODS.iter().enumerate() {
        if (start ^ method.bytes) & method.mask & there == 0 {
            return after_method(first, len, method.len, number);
        }
    }
    verdict::OTHER
}

#[inline(always)]
fn after_method(first: &[u8; LOOK], len: u32, method: usize, number: usize) -> u8 {
    // PROPFIND and PROPPATCH go beyond eight bytes.
    if method == 9 && len > 8 && first[8] != b' ' {
        return verdict::OTHER;
    }
    if method == 10 && ((len > 8 && first[8] != b'H') || (len > 9 && first[9] != b' ')) {
        return verdict::OTHER;
    }
    if len as usize <= method {
        return verdict::NEED_MORE;
    }
    let next = match method {
        4 => first[4],
        5 => first[5],
        6 => first[6],
        7 => first[7],
        8 => first[8],
        9 => first[9],
        _ => first[10],
    };
    let target = match next {
        b'/' => true,
        b'*' => number == OPTIONS,
        _ if number == CONNECT => next.is_ascii_alphanumeric() || next == b'[' || next == b'_',
        b'h' | b'H' => true,
        _ => false,
    };
    if target { verdict::REQUEST } else { verdict::OTHER }
}

/// Whether the first nine bytes are likely the header of an HTTP/2 frame.
#[inline(always)]
fn frame(first: &[u8; LOOK], len: u32) -> u8 {
    if len < 9 {
        let begins = first[0] <= 0x10 && (len < 4 || first[3] <= 9);
        return if begins { verdict::NEED_MORE } else { verdict::OTHER };
    }
    let payload = (first[0] as u32) << 16 | (first[1] as u32) << 8 | first[2] as u32;
    let (kind, flags) = (first[3], first[4]);
    let stream = u32::from_be_bytes([first[5], first[6], first[7], first[8]]);
    if stream >> 31 != 0 {
        return verdict::OTHER;
    }
    let pad = (flags >> 3 & 1) as u32;
    let priority = if flags & 0x20 != 0 { 5 } else { 0 };
    // The flags that the type has, whether it is on a stream, its least and its largest payload.
    let (has, on_stream, least, most) = match kind {
        0 => (0x09, true, pad, 1 << 20),
        1 => (0x2d, true, pad + priority, 1 << 20),
        2 => (0, true, 5, 5),
        3 => (0, true, 4, 4),
        4 if flags & 1 == 0 => (1, false, 0, 1 << 12),
        4 => (1, false, 0, 0),
        5 => (0x0c, true, 4 + pad, 1 << 20),
        6 => (1, false, 8, 8),
        7 => (0, false, 8, 1 << 12),
        8 => (0, stream != 0, 4, 4),
        9 => (4, true, 0, 1 << 20),
        _ => return verdict::OTHER,
    };
    if flags & !has != 0 || (stream != 0) != on_stream || payload < least || payload > most {
        return verdict::OTHER;
    }
    if kind == 4 {
        return if payload.is_multiple_of(6) {
            verdict::SETTINGS
        } else {
            verdict::OTHER
        };
    }
    verdict::FRAMES
}

/// Marks the line feeds in eight bytes, of which the first is the lowest: the high bit of each.
#[inline(always)]
pub fn line_feeds(eight: u64) -> u64 {
    const LOW: u64 = 0x7f7f_7f7f_7f7f_7f7f;
    let other = eight ^ 0x0a0a_0a0a_0a0a_0a0a;
    !(((other & LOW) + LOW) | other | LOW)
}

/// Marks the line feeds that end an empty line: those two bytes behind another, as a header has at least a name and a
/// colon. `before` are those of the eight bytes before.
#[inline(always)]
pub fn empty_lines(now: u64, before: u64) -> u64 {
    now & ((now << 16) | (before >> 48))
}

/// The place of the first mark in eight bytes; 7 if there is none.
#[inline(always)]
pub fn first_mark(marks: u64) -> u32 {
    let (mut at, mut rest) = (0, marks);
    if rest & 0xffff_ffff == 0 {
        (at, rest) = (4, rest >> 32);
    }
    if rest & 0xffff == 0 {
        (at, rest) = (at + 2, rest >> 16);
    }
    if rest & 0xff == 0 {
        at += 1;
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Offset behind the first empty line, as the kernel program finds it.
    fn head_end(bytes: &[u8]) -> Option<usize> {
        let mut before = 0;
        for (number, chunk) in bytes.chunks(8).enumerate() {
            let mut eight = [0; 8];
            eight[..chunk.len()].copy_from_slice(chunk);
            let now = line_feeds(u64::from_le_bytes(eight));
            let ends = empty_lines(now, before);
            if ends != 0 {
                return Some(number * 8 + first_mark(ends) as usize + 1);
            }
            before = now;
        }
        None
    }

    #[test]
    fn a_head_ends_at_its_empty_line_wherever_that_is() {
        for filler in 0..40 {
            let mut head = [b'x'; 80];
            let line = b"\r\na: b\r\n\r\n";
            head[filler..filler + line.len()].copy_from_slice(line);
            assert_eq!(head_end(&head), Some(filler + line.len()), "{filler}");
            assert_eq!(head_end(&head[..filler + line.len() - 1]), None, "{filler}");
        }
        assert_eq!(head_end(b"GET / HTTP/1.1\r\nHost: a\r\nx:\n"), None);
        // Bytes that differ from a line feed in the high bit only.
        assert_eq!(head_end(&[0x8a; 32]), None);
    }
}
