//! Start lines and the headers that decide how long a message is.

use super::{
    lines::Line,
    wire::{Body, First, Malformed},
};
use crate::protocols::{
    HttpOptions, Version,
    classify::PREFACE,
    record::{Method, Record},
};

/// What the headers of one message say of its body and of what comes after it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Fields {
    length: Option<u64>,
    coding: Coding,
    pub(super) upgrade: Upgrade,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Coding {
    #[default]
    None,
    /// The last coding is "chunked".
    Chunked,
    /// It is another one.
    Other,
}

/// What the client asks to change to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Upgrade {
    #[default]
    None,
    /// HTTP/2 in clear text.
    H2c,
    Other,
}

impl Fields {
    /// Takes over one header line. Gives the value if it is the host's.
    pub(super) fn line<'a>(&mut self, line: &'a [u8]) -> Result<Option<&'a [u8]>, Malformed> {
        let Some(colon) = memchr::memchr(b':', line) else {
            // The continuation of the line before, as it was once allowed, or nonsense that servers differ about.
            return Ok(None);
        };
        let (name, value) = line.split_at_checked(colon).ok_or(Malformed)?;
        let value = value.get(1..).unwrap_or_default().trim_ascii();
        match name.len() {
            4 if name.eq_ignore_ascii_case(b"host") => return Ok(Some(value)),
            7 if name.eq_ignore_ascii_case(b"upgrade") => {
                let h2c = value
                    .split(|byte| *byte == b',')
                    .any(|name| name.trim_ascii().eq_ignore_ascii_case(b"h2c"));
                self.upgrade = if h2c { Upgrade::H2c } else { Upgrade::Other };
            }
            14 if name.eq_ignore_ascii_case(b"content-length") => {
                for part in value.split(|byte| *byte == b',') {
                    let length = number(part.trim_ascii()).ok_or(Malformed)?;
                    if self.length.is_some_and(|other| other != length) {
                        return Err(Malformed);
                    }
                    self.length = Some(length);
                }
            }
            17 if name.eq_ignore_ascii_case(b"transfer-encoding") => {
                let last = value
                    .rsplit(|byte| *byte == b',')
                    .next()
                    .unwrap_or_default()
                    .trim_ascii();
                self.coding = if last.eq_ignore_ascii_case(b"chunked") {
                    Coding::Chunked
                } else {
                    Coding::Other
                };
            }
            _ => {}
        }
        Ok(None)
    }

    /// How a request goes on.
    pub(super) fn request_body(&self) -> Body {
        match self.coding {
            Coding::Chunked => Body::Chunked,
            // RFC 9112 has the server refuse it; there is no end to be found.
            Coding::Other => Body::UntilClose,
            Coding::None => Body::Fixed(self.length.unwrap_or(0)),
        }
    }

    /// How a final response goes on that may have a body.
    pub(super) fn response_body(&self) -> Body {
        match (self.coding, self.length) {
            (Coding::Chunked, _) => Body::Chunked,
            (Coding::None, Some(length)) => Body::Fixed(length),
            _ => Body::UntilClose,
        }
    }
}

/// A decimal number without sign, below 2^63.
fn number(bytes: &[u8]) -> Option<u64> {
    if bytes.is_empty() || bytes.len() > 19 {
        return None;
    }
    bytes.iter().try_fold(0_u64, |number, byte| {
        let digit = char::from(*byte).to_digit(10)?;
        let number = number.checked_mul(10)?.checked_add(u64::from(digit))?;
        (number <= i64::MAX as u64).then_some(number)
    })
}

fn version(bytes: &[u8]) -> Option<Version> {
    match bytes {
        b"HTTP/1.0" => Some(Version::Http10),
        [b'H', b'T', b'T', b'P', b'/', b'1', b'.', digit] if digit.is_ascii_digit() => Some(Version::Http11),
        _ => None,
    }
}

/// Takes over a request line, or what was captured of it.
pub(super) fn request_line(
    line: Line<'_>,
    whole: bool,
    record: &mut Record,
    options: &HttpOptions,
) -> Result<First, Malformed> {
    // The first line of the preface of HTTP/2, or so much of it that no method can be meant.
    if line.bytes == b"PRI * HTTP/2.0" || (!whole && line.bytes.starts_with(b"PRI ") && PREFACE.starts_with(line.bytes))
    {
        return Ok(First::Stop);
    }
    let blank = memchr::memchr(b' ', line.bytes).ok_or(Malformed)?;
    let (method, rest) = line.bytes.split_at_checked(blank).ok_or(Malformed)?;
    let rest = rest.get(1..).unwrap_or_default();
    let (target, ended) = match (line.tail, whole) {
        (Some([b' ', tail @ ..]), true) => {
            record.version = version(&tail).ok_or(Malformed)?;
            (rest, false)
        }
        (Some(_), true) => return Err(Malformed),
        (None, true) => {
            let blank = memchr::memrchr(b' ', rest).ok_or(Malformed)?;
            let (target, tail) = rest.split_at_checked(blank).ok_or(Malformed)?;
            record.version = version(tail.get(1..).unwrap_or_default()).ok_or(Malformed)?;
            (target, true)
        }
        (_, false) => match memchr::memchr(b' ', rest).and_then(|blank| rest.get(..blank)) {
            Some(target) => (target, true),
            None => (rest, false),
        },
    };
    let method = Method::parse(method).ok_or(Malformed)?;
    if target.iter().any(|byte| *byte <= b' ' || *byte == 0x7f) || (ended && target.is_empty()) {
        return Err(Malformed);
    }
    if method.as_str() == Some("CONNECT") {
        record.set_host(target);
        record.set_path(target, ended, options);
    } else if let Some((authority, path)) = absolute(target) {
        record.set_host(authority);
        record.set_path(if path.is_empty() && ended { b"/" } else { path }, ended, options);
    } else if !target.is_empty() {
        record.set_path(target, ended, options);
    }
    record.set_method(method);
    Ok(First::Message)
}

/// Authority and path of a target in absolute form, as proxies get it.
fn absolute(target: &[u8]) -> Option<(&[u8], &[u8])> {
    let scheme = memchr::memchr(b':', target.get(..6)?)?;
    let name = target.get(..scheme)?;
    if !name.eq_ignore_ascii_case(b"http") && !name.eq_ignore_ascii_case(b"https") {
        return None;
    }
    let rest = target.get(scheme..)?.strip_prefix(b"://")?;
    let end = memchr::memchr2(b'/', b'?', rest).unwrap_or(rest.len());
    rest.split_at_checked(end)
}

/// Version and status of a status line.
pub(super) fn status_line(line: Line<'_>) -> Result<(Version, u16), Malformed> {
    let (name, rest) = line.bytes.split_at_checked(8).ok_or(Malformed)?;
    let version = version(name).ok_or(Malformed)?;
    match rest {
        [b' ', a @ b'1'..=b'9', b @ b'0'..=b'9', c @ b'0'..=b'9', rest @ ..]
            if rest.first().is_none_or(|byte| *byte == b' ') =>
        {
            let digit = |byte: &u8| u16::from(byte - b'0');
            Ok((version, digit(a) * 100 + digit(b) * 10 + digit(c)))
        }
        _ => Err(Malformed),
    }
}
