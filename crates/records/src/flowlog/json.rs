//! Flow logs as JSON: one compact object each, keys in the order of their names, nothing for what is not known.

use super::{
    FieldSet, FlowFormat, FlowLog, FlowValue,
    fields::{FIELDS, FLAG_NAMES, FlowField},
};
use crate::encode::text::Cursor;

/// Writes flow logs. Allocates nothing beyond the growth of the caller's buffer.
#[derive(Clone, Debug)]
pub struct FlowJson {
    format: FlowFormat,
    fields: Box<[&'static FlowField]>,
}

/// Bytes that go into a JSON text as they are: all but quotes, back-slashes, control characters, what HTML takes apart,
/// and the first byte of the two line separators of Unicode.
#[expect(
    clippy::indexing_slicing,
    reason = "runs while compiling, where a wrong index is an error"
)]
static PLAIN: [bool; 256] = {
    let mut table = [true; 256];
    let mut byte = 0;
    while byte < 0x20 {
        table[byte] = false;
        byte += 1;
    }
    let mut at = 0;
    let escaped = b"\"\\<>&\xe2";
    while at < escaped.len() {
        table[escaped[at] as usize] = false;
        at += 1;
    }
    table
};

// === impl FlowJson ===

impl FlowJson {
    /// Writes all fields of `format` but those in `without`.
    #[must_use]
    pub fn new(format: FlowFormat, without: FieldSet) -> Self {
        let fields = FIELDS
            .iter()
            .filter(|field| field.ty(format).is_some() && !without.has(field.id))
            .collect();
        Self { format, fields }
    }

    /// The format.
    #[must_use]
    pub const fn format(&self) -> FlowFormat {
        self.format
    }

    /// Appends one object to `out`, without a line end. `received` is what `TimeReceived` tells, seconds.
    pub fn encode_into(&self, flow: &FlowLog, received: i64, out: &mut Vec<u8>) {
        out.reserve(2048);
        let start = out.len();
        for field in &self.fields {
            let value = flow.value(field.id, received);
            if matches!(value, FlowValue::Absent) {
                continue;
            }
            out.extend_from_slice(field.lead.as_bytes());
            match self.format {
                FlowFormat::Current => put(value, out),
                FlowFormat::Seed => put_single(value, out),
            }
        }
        // The comma before the first key.
        match out.get_mut(start) {
            Some(first) => *first = b'{',
            None => out.push(b'{'),
        }
        out.push(b'}');
    }
}

fn put(value: FlowValue<'_>, out: &mut Vec<u8>) {
    match value {
        FlowValue::Absent => out.extend_from_slice(b"null"),
        FlowValue::Unsigned(number) => out.extend_from_slice(itoa::Buffer::new().format(number).as_bytes()),
        FlowValue::Signed(number) => out.extend_from_slice(itoa::Buffer::new().format(number).as_bytes()),
        FlowValue::Bool(value) => out.extend_from_slice(if value { b"true" } else { b"false" }),
        FlowValue::Text(text) => quoted(text, out),
        FlowValue::Hex(_) | FlowValue::Ip(_) | FlowValue::Mac(_) => {
            out.push(b'"');
            value.plain(out);
            out.push(b'"');
        }
        FlowValue::Flags(flags) => {
            let mut names = FLAG_NAMES
                .iter()
                .filter(|(bit, _)| flags & bit != 0)
                .map(|(_, name)| *name)
                .peekable();
            if names.peek().is_none() {
                out.extend_from_slice(b"null");
            } else {
                list(names, out, quoted);
            }
        }
        FlowValue::Names(seen) => list(seen.iter().map(|seen| &*seen.name), out, quoted),
        FlowValue::Directions(seen) => list(seen, out, |seen, out| {
            out.extend_from_slice(itoa::Buffer::new().format(seen.direction).as_bytes());
        }),
        FlowValue::Events(events) => list(events, out, |event, out| {
            out.push(b'{');
            for (at, (key, value)) in event.values.iter().enumerate() {
                if at > 0 {
                    out.push(b',');
                }
                quoted(key, out);
                out.push(b':');
                quoted(value, out);
            }
            out.push(b'}');
        }),
    }
}

/// One value where today there are several: the flags as a number, the interface that counted the flow.
fn put_single(value: FlowValue<'_>, out: &mut Vec<u8>) {
    let value = match value {
        FlowValue::Flags(flags) => FlowValue::Unsigned(flags.into()),
        FlowValue::Names([first, ..]) => FlowValue::Text(&first.name),
        FlowValue::Directions([first, ..]) => FlowValue::Unsigned(first.direction.into()),
        other => other,
    };
    put(value, out);
}

fn list<T>(items: impl IntoIterator<Item = T>, out: &mut Vec<u8>, item: impl Fn(T, &mut Vec<u8>)) {
    let mut before = b'[';
    for one in items {
        out.push(before);
        item(one, out);
        before = b',';
    }
    if before == b'[' {
        out.push(b'[');
    }
    out.push(b']');
}

fn quoted(text: &str, out: &mut Vec<u8>) {
    const HEX: [u8; 16] = *b"0123456789abcdef";
    // Nearly always: nothing to escape, told without a branch per byte.
    let escapes = text.as_bytes().iter().fold(false, |escapes, byte| {
        escapes | (*byte < 0x20) | matches!(byte, b'"' | b'\\' | b'<' | b'>' | b'&' | 0xe2)
    });
    out.push(b'"');
    if !escapes {
        out.extend_from_slice(text.as_bytes());
        out.push(b'"');
        return;
    }
    let mut rest = text.as_bytes();
    loop {
        let plain = rest
            .iter()
            .position(|byte| !PLAIN.get(usize::from(*byte)).is_some_and(|plain| *plain))
            .unwrap_or(rest.len());
        let (done, from) = rest.split_at(plain);
        out.extend_from_slice(done);
        let Some((byte, after)) = from.split_first() else { break };
        rest = after;
        match (byte, after) {
            (b'"' | b'\\', _) => out.extend_from_slice(&[b'\\', *byte]),
            (0xe2, [0x80, last @ (0xa8 | 0xa9), after @ ..]) => {
                out.extend_from_slice(if *last == 0xa8 { b"\\u2028" } else { b"\\u2029" });
                rest = after;
            }
            (0xe2, _) => out.push(0xe2),
            _ => {
                let digit = |nibble: u8| HEX.get(usize::from(nibble)).copied().unwrap_or(b'0');
                out.extend_from_slice(&[b'\\', b'u', b'0', b'0', digit(byte >> 4), digit(byte & 0xf)]);
            }
        }
    }
    out.push(b'"');
}

// === impl FlowValue ===

impl FlowValue<'_> {
    /// Appends the value as a label has it; of a list, the elements with commas.
    pub fn plain(self, out: &mut Vec<u8>) {
        let commas = |before: &mut bool, out: &mut Vec<u8>| {
            if std::mem::replace(before, true) {
                out.push(b',');
            }
        };
        let mut before = false;
        match self {
            Self::Absent => {}
            Self::Unsigned(_) | Self::Signed(_) | Self::Bool(_) => put(self, out),
            Self::Text(text) => out.extend_from_slice(text.as_bytes()),
            Self::Hex(number) => {
                let digits = if number == 0 {
                    1
                } else {
                    16 - number.leading_zeros() / 4
                };
                for at in (0..digits).rev() {
                    out.push(hex(number >> (4 * at)));
                }
            }
            Self::Ip(ip) => {
                let mut cursor = Cursor::new(out, 48);
                cursor.ip(ip);
                cursor.finish();
            }
            Self::Mac(mac) => {
                let mut text = [b':'; 17];
                for (pair, byte) in text.chunks_mut(3).zip(mac) {
                    if let [high, low, ..] = pair {
                        (*high, *low) = (hex(u64::from(byte) >> 4), hex(byte.into()));
                    }
                }
                out.extend_from_slice(&text);
            }
            Self::Flags(flags) => {
                for (_, name) in FLAG_NAMES.iter().filter(|(bit, _)| flags & bit != 0) {
                    commas(&mut before, out);
                    out.extend_from_slice(name.as_bytes());
                }
            }
            Self::Names(seen) => {
                for seen in seen {
                    commas(&mut before, out);
                    out.extend_from_slice(seen.name.as_bytes());
                }
            }
            Self::Directions(seen) => {
                for seen in seen {
                    commas(&mut before, out);
                    put(FlowValue::Unsigned(seen.direction.into()), out);
                }
            }
            Self::Events(events) => {
                for (_, value) in events.iter().flat_map(|event| &event.values) {
                    commas(&mut before, out);
                    out.extend_from_slice(value.as_bytes());
                }
            }
        }
    }
}

/// The last four bits as a digit.
const fn hex(bits: u64) -> u8 {
    match bits as u8 & 0xf {
        digit @ 0..=9 => b'0' + digit,
        digit => b'a' + digit - 10,
    }
}
