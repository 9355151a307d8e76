//! Domain names inside a message.

use super::DnsError;

/// Longest name on the wire, RFC 1035.
const NAME_MAX: usize = 255;

/// A name in a message, checked: following it ends, within the captured bytes.
#[derive(Clone, Copy, Debug)]
pub struct Name<'a> {
    message: &'a [u8],
    at: usize,
}

impl<'a> Name<'a> {
    /// Reads a name and says where what follows it begins.
    pub(super) fn parse(message: &'a [u8], at: usize) -> Result<(Self, usize), DnsError> {
        let mut labels = Labels { message, at };
        let mut length = 0;
        // Where the name ends is known at its first pointer.
        let mut end = None;
        loop {
            match labels.step()? {
                Step::Label(label) => length += label.len() + 1,
                Step::Pointer(after) => _ = end.get_or_insert(after),
                Step::Root => {
                    let end = end.unwrap_or(labels.at);
                    return Ok((Self { message, at }, end));
                }
            }
            if length >= NAME_MAX {
                return Err(DnsError::Malformed("a name of more than 255 bytes"));
            }
        }
    }

    /// Labels from the left, without the root.
    pub fn labels(self) -> impl Iterator<Item = &'a [u8]> {
        let mut labels = Labels {
            message: self.message,
            at: self.at,
        };
        std::iter::from_fn(move || {
            loop {
                match labels.step() {
                    Ok(Step::Label(label)) => return Some(label),
                    Ok(Step::Pointer(_)) => {}
                    Ok(Step::Root) | Err(_) => return None,
                }
            }
        })
    }

    /// True if both are the same name, whatever the case of their letters.
    #[must_use]
    pub fn is(self, other: Name<'_>) -> bool {
        let (mut a, mut b) = (self.labels(), other.labels());
        loop {
            match (a.next(), b.next()) {
                (None, None) => return true,
                (Some(a), Some(b)) if a.eq_ignore_ascii_case(b) => {}
                _ => return false,
            }
        }
    }

    /// Replaces `text` by the name in lower case, without the dot at the end; the root is `.`. Bytes that are no visible
    /// ASCII characters, and dots and backslashes within labels, are escaped as in zone files (`\046`).
    pub fn write_to(self, text: &mut String) {
        text.clear();
        for label in self.labels() {
            if !text.is_empty() {
                text.push('.');
            }
            for byte in label {
                match byte {
                    b'.' | b'\\' => push_escaped(text, *byte),
                    byte if byte.is_ascii_graphic() => text.push(char::from(byte.to_ascii_lowercase())),
                    byte => push_escaped(text, *byte),
                }
            }
        }
        if text.is_empty() {
            text.push('.');
        }
    }
}

fn push_escaped(text: &mut String, byte: u8) {
    text.push('\\');
    for digit in [byte / 100, byte / 10 % 10, byte % 10] {
        text.push(char::from(b'0' + digit));
    }
}

struct Labels<'a> {
    message: &'a [u8],
    at: usize,
}

enum Step<'a> {
    Label(&'a [u8]),
    /// Goes on elsewhere; what follows the name begins here.
    Pointer(usize),
    Root,
}

impl<'a> Labels<'a> {
    fn step(&mut self) -> Result<Step<'a>, DnsError> {
        let length = *self.message.get(self.at).ok_or(DnsError::Cut)?;
        match length {
            0 => {
                self.at += 1;
                Ok(Step::Root)
            }
            1..=63 => {
                let from = self.at + 1;
                let to = from + usize::from(length);
                self.at = to;
                self.message.get(from..to).map(Step::Label).ok_or(DnsError::Cut)
            }
            0xc0..=0xff => {
                let low = *self.message.get(self.at + 1).ok_or(DnsError::Cut)?;
                let to = usize::from(u16::from_be_bytes([length & 0x3f, low]));
                // Names only refer to what came before them, which is why following them ends.
                if to >= self.at {
                    return Err(DnsError::Malformed("a name that refers forwards"));
                }
                let after = self.at + 2;
                self.at = to;
                Ok(Step::Pointer(after))
            }
            _ => Err(DnsError::Malformed("a label of an unknown kind")),
        }
    }
}
