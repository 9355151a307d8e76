//! What a connection speaks, from the first bytes of a transfer.
//!
//! Made to be mirrored by kernel programs: it looks at no more than [`LOOK`] bytes, at fixed places except for the one blank
//! after a method, with tables of words. It answers for the *beginning* of a message; bytes from the middle are
//! [`Verdict::NotHttp`] unless they look like HTTP/2 frames.

use super::http2::frame;

/// Bytes that are looked at, except where HTTP/2 frames are followed.
pub const LOOK: usize = 24;

/// What the first bytes of a transfer say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// An HTTP/1 request begins: these bytes go to the server.
    Http1Request,
    /// An HTTP/1 response begins: these bytes go to the client.
    Http1Response,
    /// The client's HTTP/2 preface: these bytes go to the server.
    Http2Preface,
    /// HTTP/2 frames, without a word on the way. Weaker than the others, as frames have no mark: for connections whose
    /// first bytes were not seen.
    Http2Frames,
    /// A TLS record.
    Tls,
    /// None of these.
    NotHttp,
    /// The bytes are too few to tell.
    NeedMore,
}

/// The client's HTTP/2 connection preface.
pub const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Methods by which a request is recognised, with the blank that follows. Any other token is accepted as a method once a
/// connection is known to be HTTP/1.
pub const METHODS: [&[u8]; 18] = [
    b"GET ",
    b"POST ",
    b"PUT ",
    b"HEAD ",
    b"DELETE ",
    b"PATCH ",
    b"OPTIONS ",
    b"CONNECT ",
    b"TRACE ",
    b"PROPFIND ",
    b"PROPPATCH ",
    b"REPORT ",
    b"MKCOL ",
    b"COPY ",
    b"MOVE ",
    b"LOCK ",
    b"UNLOCK ",
    b"PURGE ",
];

/// Says what begins with these bytes. Depends on nothing else, so that it may be asked about any transfer.
#[must_use]
pub fn classify(first: &[u8]) -> Verdict {
    let Some(&byte) = first.first() else {
        return Verdict::NeedMore;
    };
    match byte {
        b'P' if is_or_begins(first, PREFACE, 16) => {
            return if first.len() >= 16 {
                Verdict::Http2Preface
            } else {
                Verdict::NeedMore
            };
        }
        b'H' if is_or_begins(first, b"HTTP/1.", 7) => return response(first),
        b'A'..=b'Z' => return request(first),
        0x14..=0x17 if first.get(1).is_none_or(|major| *major == 3) => match first.get(2) {
            None => return Verdict::NeedMore,
            Some(0..=4) => return Verdict::Tls,
            Some(_) => {}
        },
        _ => {}
    }
    frame::verdict(first)
}

/// True if `bytes` and `word` agree in their first `len` bytes, as far as `bytes` go.
fn is_or_begins(bytes: &[u8], word: &[u8], len: usize) -> bool {
    bytes.iter().zip(word).take(len).all(|(a, b)| a == b)
}

fn response(first: &[u8]) -> Verdict {
    // HTTP/1.1 200
    let expect = |at: usize, test: fn(u8) -> bool| first.get(at).map(|byte| test(*byte));
    let version = |byte: u8| byte == b'0' || byte == b'1';
    match (
        expect(7, version),
        expect(8, |byte| byte == b' '),
        expect(9, |byte| byte.is_ascii_digit()),
    ) {
        (Some(false), ..) | (_, Some(false), _) | (.., Some(false)) => Verdict::NotHttp,
        (Some(true), Some(true), Some(true)) => Verdict::Http1Response,
        _ => Verdict::NeedMore,
    }
}

fn request(first: &[u8]) -> Verdict {
    for method in METHODS {
        if !is_or_begins(first, method, method.len()) {
            continue;
        }
        return match first.get(method.len()) {
            None => Verdict::NeedMore,
            Some(b'/') => Verdict::Http1Request,
            Some(b'*') if method == b"OPTIONS " => Verdict::Http1Request,
            // The absolute form, as sent to a proxy; RTSP and SIP have the same methods with other schemes.
            Some(b'h' | b'H') if method != b"CONNECT " => Verdict::Http1Request,
            Some(byte) if method == b"CONNECT " && (byte.is_ascii_alphanumeric() || matches!(byte, b'[' | b'_')) => {
                Verdict::Http1Request
            }
            Some(_) => Verdict::NotHttp,
        };
    }
    Verdict::NotHttp
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_begins() {
        for (bytes, verdict) in [
            (&b"GET / HTTP/1.1\r\n"[..], Verdict::Http1Request),
            (b"PROPFIND /dav/ HTTP/1.1\r\n", Verdict::Http1Request),
            (b"GET http://a/ HTTP/1.0\r\n", Verdict::Http1Request),
            (b"OPTIONS * HTTP/1.1", Verdict::Http1Request),
            (b"CONNECT a:443 HTTP/1.1", Verdict::Http1Request),
            (b"CONNECT [::1]:443 HTTP/1.1", Verdict::Http1Request),
            (b"OPTIONS rtsp://cam/ RTSP/1.0", Verdict::NotHttp),
            (b"OPTIONS sip:a@b SIP/2.0", Verdict::NotHttp),
            (b"GETX / HTTP/1.1", Verdict::NotHttp),
            (b"get / http/1.1", Verdict::NotHttp),
            (b"HTTP/1.1 200 OK", Verdict::Http1Response),
            (b"HTTP/1.0 404", Verdict::Http1Response),
            (b"HTTP/1.2 404", Verdict::NotHttp),
            (b"HTTP/2 404", Verdict::NotHttp),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Verdict::Http2Preface),
            (b"\x16\x03\x01\x02\x00\x01", Verdict::Tls),
            (b"\x17\x03\x03\x40\x00", Verdict::Tls),
            (b"\x16\x03\x09\x02\x00", Verdict::NotHttp),
            (b"SSH-2.0-OpenSSH", Verdict::NotHttp),
            (b"*1\r\n$4\r\nPING\r\n", Verdict::NotHttp),
            // SETTINGS with one setting, WINDOW_UPDATE, HEADERS
            (
                b"\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x64",
                Verdict::Http2Frames,
            ),
            (
                b"\x00\x00\x04\x08\x00\x00\x00\x00\x00\x00\x01\x00\x00",
                Verdict::Http2Frames,
            ),
            (b"\x00\x00\x20\x01\x04\x00\x00\x00\x05\x82", Verdict::Http2Frames),
            // A SETTINGS frame on a stream, of a length that is not one of settings.
            (b"\x00\x00\x06\x04\x00\x00\x00\x00\x01", Verdict::NotHttp),
            (b"\x00\x00\x07\x04\x00\x00\x00\x00\x00", Verdict::NotHttp),
            (b"", Verdict::NeedMore),
        ] {
            assert_eq!(classify(bytes), verdict, "{:?}", String::from_utf8_lossy(bytes));
        }
    }

    #[test]
    fn asks_for_more_exactly_while_more_could_decide() {
        for whole in [
            &b"GET / HTTP/1.1\r\n"[..],
            b"DELETE /a HTTP/1.1",
            b"HTTP/1.1 200 OK",
            b"PRI * HTTP/2.0\r\n\r\n",
            b"POST /a HTTP/1.1",
            b"\x16\x03\x01\x02",
            b"\x00\x00\x06\x04\x00\x00\x00\x00\x00",
        ] {
            let last = classify(whole);
            let mut decided = false;
            for len in 0..whole.len() {
                match classify(&whole[..len]) {
                    Verdict::NeedMore => assert!(!decided, "{whole:?} was decided before {len}"),
                    verdict => {
                        assert_eq!(verdict, last, "{whole:?} at {len}");
                        decided = true;
                    }
                }
            }
        }
    }

    proptest::proptest! {
        #[test]
        fn looks_at_a_few_bytes(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..64)) {
            let cut = bytes.get(..LOOK).unwrap_or(&bytes);
            let verdict = classify(&bytes);
            // Following frames may go further, and then only away from "frames".
            if verdict != Verdict::NotHttp && bytes.len() >= LOOK {
                proptest::prop_assert_eq!(verdict, classify(cut));
            }
        }
    }
}
