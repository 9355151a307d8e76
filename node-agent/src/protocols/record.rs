//! One exchange as a session holds it: names in buffers that are used again.

use super::{Exchange, Flags, Grpc, HttpOptions, Transfer, Version, classify::METHODS};

/// Longest method kept; all registered ones are shorter.
const METHOD_LIMIT: usize = 32;
/// Longest host kept: a name with its dots and a port.
pub(crate) const HOST_LIMIT: usize = 262;
/// Largest buffer that is kept for further use, in bytes.
const KEEP: usize = 1024;
/// Records kept for further use, per session.
const SPARE: usize = 4;

/// An exchange under way.
#[derive(Debug, Default)]
pub(crate) struct Record {
    method: Method,
    path: String,
    path_known: bool,
    path_truncated: bool,
    host: String,
    pub(crate) status: Option<u16>,
    pub(crate) version: Version,
    pub(crate) grpc: Option<Grpc>,
    pub(crate) request: Option<Transfer>,
    pub(crate) response: Option<Transfer>,
    pub(crate) flags: Flags,
}

/// A method. The common ones cost nothing.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) enum Method {
    #[default]
    Unknown,
    Common(&'static str),
    Other(Box<str>),
}

impl Method {
    /// `None` if this is no method: not a token, or too long for one.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let common = METHODS.iter().find(|method| method.strip_suffix(b" ") == Some(bytes));
        if let Some(name) = common {
            return std::str::from_utf8(name).ok().map(|name| Self::Common(name.trim_end()));
        }
        let token = !bytes.is_empty() && bytes.len() <= METHOD_LIMIT && bytes.iter().all(|byte| is_token(*byte));
        let name = token.then(|| std::str::from_utf8(bytes).ok()).flatten()?;
        Some(Self::Other(name.into()))
    }

    pub(crate) fn as_str(&self) -> Option<&str> {
        match self {
            Self::Unknown => None,
            Self::Common(name) => Some(name),
            Self::Other(name) => Some(name),
        }
    }
}

/// A character of a token, RFC 9110 section 5.6.2.
pub(crate) fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

impl Record {
    pub(crate) fn set_method(&mut self, method: Method) {
        self.method = method;
    }

    pub(crate) fn method(&self) -> Option<&str> {
        self.method.as_str()
    }

    /// Takes over a path with its query. `whole` is false if its end was not captured.
    pub(crate) fn set_path(&mut self, target: &[u8], whole: bool, options: &HttpOptions) {
        let query = if options.keep_query {
            None
        } else {
            memchr::memchr(b'?', target)
        };
        let path = query.and_then(|at| target.get(..at)).unwrap_or(target);
        let limit = usize::from(options.path_limit);
        self.path_truncated = path.len() >= limit || (!whole && query.is_none());
        set_text(&mut self.path, path.get(..limit).unwrap_or(path), self.path_truncated);
        self.path_known = true;
    }

    pub(crate) fn has_host(&self) -> bool {
        !self.host.is_empty()
    }

    /// Takes over a host; one that cannot be a host is left out.
    pub(crate) fn set_host(&mut self, host: &[u8]) {
        self.host.clear();
        if host.len() <= HOST_LIMIT && host.iter().all(|byte| byte.is_ascii_graphic()) {
            set_text(&mut self.host, host, false);
        }
    }

    /// Takes the host for the path: what a CONNECT without path is about.
    pub(crate) fn set_path_to_host(&mut self, options: &HttpOptions) {
        let host = std::mem::take(&mut self.host);
        if !host.is_empty() {
            self.set_path(host.as_bytes(), true, options);
        }
        self.host = host;
    }

    /// Bytes of names held.
    pub(crate) fn names(&self) -> usize {
        self.path.len() + self.host.len()
    }

    pub(crate) fn exchange(&self) -> Exchange<'_> {
        Exchange {
            method: self.method.as_str(),
            path: self.path_known.then_some(self.path.as_str()),
            path_truncated: self.path_truncated,
            host: (!self.host.is_empty()).then_some(self.host.as_str()),
            status: self.status,
            version: self.version,
            grpc: self.grpc,
            request: self.request,
            response: self.response,
            flags: self.flags,
        }
    }

    /// Takes over what a request's head said: method, path, host, version.
    pub(crate) fn take_names(&mut self, of: &Self) {
        if let Method::Common(name) = of.method {
            self.method = Method::Common(name);
        }
        self.path.clone_from(&of.path);
        self.path_known = of.path_known;
        self.path_truncated = of.path_truncated;
        self.host.clone_from(&of.host);
        self.version = of.version;
    }

    /// True if [`Self::take_names`] takes all over.
    pub(crate) fn has_common_method(&self) -> bool {
        matches!(self.method, Method::Common(_))
    }

    fn clear(&mut self) {
        let (mut path, mut host) = (std::mem::take(&mut self.path), std::mem::take(&mut self.host));
        path.clear();
        host.clear();
        *self = Self {
            path,
            host,
            ..Self::default()
        };
    }
}

/// Adds bytes to a transfer that may just begin.
pub(crate) fn add(transfer: &mut Option<Transfer>, ts_ns: u64, bytes: u64) {
    let transfer = transfer.get_or_insert(Transfer {
        first_ns: ts_ns,
        last_ns: ts_ns,
        bytes: 0,
    });
    transfer.last_ns = ts_ns;
    transfer.bytes = transfer.bytes.saturating_add(bytes);
}

/// Records that have been told and wait to be used again.
#[derive(Debug, Default)]
pub(crate) struct Pool(Vec<Record>);

impl Pool {
    pub(crate) fn take(&mut self) -> Record {
        self.0.pop().unwrap_or_default()
    }

    pub(crate) fn put(&mut self, mut record: Record) {
        if self.0.len() < SPARE && record.path.capacity() <= KEEP {
            record.clear();
            // Most connections never have a second one: the room for four is not taken at once.
            self.0.reserve_exact(1);
            self.0.push(record);
        }
    }
}

/// Replaces `text` by `bytes`, with a sign in place of what is not UTF-8. Of a cut text, the cut character is left out.
fn set_text(text: &mut String, bytes: &[u8], cut: bool) {
    text.clear();
    let mut chunks = bytes.utf8_chunks().peekable();
    while let Some(chunk) = chunks.next() {
        text.push_str(chunk.valid());
        let cut_character = cut && chunks.peek().is_none() && chunk.invalid().first().is_some_and(|byte| *byte >= 0xc0);
        if !chunk.invalid().is_empty() && !cut_character {
            text.push(char::REPLACEMENT_CHARACTER);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn truncated_is_said_exactly_when_the_limit_is_reached() {
        let options = HttpOptions {
            path_limit: 8,
            ..HttpOptions::default()
        };
        for (target, whole, path, truncated) in [
            (&b"/1234567"[..], true, "/1234567", true),
            (b"/123456", true, "/123456", false),
            (b"/12345678", true, "/1234567", true),
            (b"/123456?789abc", true, "/123456", false),
            (b"/123456", false, "/123456", true),
            (b"/123456?789abc", false, "/123456", false),
            ("/12345ä".as_bytes(), true, "/12345ä", true),
            ("/123456ä".as_bytes(), true, "/123456", true),
            (b"/a\xffb", true, "/a\u{fffd}b", false),
        ] {
            let mut record = Record::default();
            record.set_path(target, whole, &options);
            let exchange = record.exchange();
            assert_eq!(
                (exchange.path, exchange.path_truncated),
                (Some(path), truncated),
                "{target:?}"
            );
        }
    }

    #[test]
    fn methods_are_tokens() {
        assert_eq!(Method::parse(b"GET"), Some(Method::Common("GET")));
        assert_eq!(Method::parse(b"BREW"), Some(Method::Other("BREW".into())));
        assert_eq!(Method::parse(b""), None);
        assert_eq!(Method::parse(b"GET "), None);
        assert_eq!(Method::parse(&[b'A'; 33]), None);
    }
}
