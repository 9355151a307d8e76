//! What comes out of an HTTP session: one request and its response.

/// Version of the protocol an exchange was made with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Version {
    /// HTTP/1.0
    Http10,
    /// HTTP/1.1
    #[default]
    Http11,
    /// HTTP/2
    Http2,
}

impl Version {
    /// As in the field `http_version`: `1.0`, `1.1`, `2.0`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http10 => "1.0",
            Self::Http11 => "1.1",
            Self::Http2 => "2.0",
        }
    }
}

/// One direction of an exchange: when its bytes passed, and how many there were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Transfer {
    /// Time of the transfer with the first byte, nanoseconds of the kernel's monotonic clock. Of a response: of the final
    /// one, not of a 100 Continue or another interim one before it.
    pub first_ns: u64,
    /// Time of the transfer with the last byte so far, nanoseconds.
    pub last_ns: u64,
    /// Bytes on the connection, seen or not: start line, headers, body with its framing, trailers, interim responses. Of
    /// HTTP/2: the stream's HEADERS, CONTINUATION and DATA frames with their headers.
    pub bytes: u64,
}

/// What gRPC adds to an exchange.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Grpc {
    /// `grpc-status`; `None` if the stream ended without one, or it could not be read.
    pub status: Option<u32>,
}

/// What an exchange's numbers do not say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    /// The connection was joined in the middle, so that the request may not be this response's (HTTP/1), or headers that
    /// were sent before could not be resolved (HTTP/2).
    pub joined: bool,
    /// Bytes that were needed to follow the exchange were not captured: byte counts or the end may be wrong, and where
    /// requests were lost, the pairing.
    pub bytes_missing: bool,
    /// The connection or stream ended before the exchange did.
    pub aborted: bool,
    /// The response's last byte was not seen; the exchange ended because nothing came for a while.
    pub unfinished: bool,
}

/// One request with its response. Names borrow from the session: copy what is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exchange<'a> {
    /// Method as sent; `None` if the request was not seen.
    pub method: Option<&'a str>,
    /// Path without scheme, authority and, unless kept by option, query; `host:port` for CONNECT. Bytes that are not
    /// UTF-8 are replaced. `None` if not seen, or sent in a compressed form that cannot be resolved.
    pub path: Option<&'a str>,
    /// True exactly if the path as sent is as long as the limit or longer, or its end was not captured.
    pub path_truncated: bool,
    /// `Host` or `:authority`, or the authority of the request's target.
    pub host: Option<&'a str>,
    /// Status of the final response; `None` if there was none, or it cannot be resolved.
    pub status: Option<u16>,
    /// The response's version; the request's where there is no response.
    pub version: Version,
    /// Present if the content type is one of gRPC.
    pub grpc: Option<Grpc>,
    /// The request; `None` if not seen.
    pub request: Option<Transfer>,
    /// The response; `None` if not seen.
    pub response: Option<Transfer>,
    /// What the numbers do not say.
    pub flags: Flags,
}

impl Exchange<'_> {
    /// Time to first byte in nanoseconds: from the first byte of the request to the first byte of the final response.
    ///
    /// The documented field is "TTFB" without a start; the first byte is the one that clients measure from, and unlike
    /// the last byte it is never after the response.
    #[must_use]
    pub fn latency_ns(&self) -> Option<u64> {
        match (self.request, self.response) {
            (Some(request), Some(response)) => Some(response.first_ns.saturating_sub(request.first_ns)),
            _ => None,
        }
    }
}

/// What a session could not follow, since it was last asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Losses {
    /// The boundary of a message or frame was lost and had to be searched.
    pub resyncs: u64,
    /// Bytes that belong to no exchange because of that.
    pub unattributed_bytes: u64,
    /// Requests or streams for which there was no room.
    pub refused: u64,
    /// Messages or frames that break the protocol.
    pub malformed: u64,
    /// The state of HTTP/2 header compression was lost.
    pub header_states: u64,
}

impl Losses {
    /// Adds another session's losses.
    pub fn add(&mut self, other: Self) {
        self.resyncs = self.resyncs.saturating_add(other.resyncs);
        self.unattributed_bytes = self.unattributed_bytes.saturating_add(other.unattributed_bytes);
        self.refused = self.refused.saturating_add(other.refused);
        self.malformed = self.malformed.saturating_add(other.malformed);
        self.header_states = self.header_states.saturating_add(other.header_states);
    }
}
