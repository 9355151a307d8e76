//! HTTP/1.0 and HTTP/1.1.
//!
//! ```text
//! pieces ▶ wire (one per direction: lines, bodies, chunks, where messages end) ▶ pairing (queue of requests) ▶ exchanges
//!              └ lines, head (what they say), heads (what they said before)
//! ```
//! Bodies are skipped by their length without being seen. Where the end of a message cannot be known because bytes are
//! missing, its direction looks for the next message at the beginning of each piece.

mod head;
mod heads;
mod lines;
mod pairing;
#[cfg(test)]
mod tests;
mod wire;

pub use self::heads::Heads;
use self::{
    pairing::{Pairing, Replies, Requests, Switch},
    wire::{Pushed, Wire},
};
use super::{HttpOptions, Losses, Piece, Sink, Way, record::Record};

/// One connection.
#[derive(Debug)]
pub(super) struct Session {
    requests: Wire,
    responses: Wire,
    pairing: Pairing,
}

/// What became of a piece.
#[derive(Debug)]
pub(super) enum Outcome {
    More,
    /// The connection does not begin as HTTP/1 does.
    NotHttp,
    /// HTTP/1 ended after this many of the piece's captured bytes, and another protocol goes on.
    Ended(usize, Next),
}

/// What follows HTTP/1 on a connection.
#[derive(Debug)]
pub(super) enum Next {
    /// HTTP/2, of whose preface the first line has been read.
    Preface,
    /// HTTP/2 by upgrade; the request is the first stream's.
    H2c(Record),
    Opaque,
}

impl Session {
    pub(super) fn new(options: HttpOptions, joined: bool) -> Self {
        Self {
            requests: Wire::new(joined, options.path_limit),
            responses: Wire::new(joined, options.path_limit),
            pairing: Pairing::new(options, joined),
        }
    }

    /// True once a head was read to its end: this is HTTP/1.
    pub(super) fn is_proved(&self) -> bool {
        self.requests.is_proved() || self.responses.is_proved()
    }

    pub(super) fn push(&mut self, piece: &Piece<'_>, heads: &mut Heads, sink: &mut Sink<'_>) -> Outcome {
        let malformed = self.pairing.losses.malformed;
        let pairing = &mut self.pairing;
        let pushed = match piece.way {
            Way::ToServer => self.requests.push(piece, heads, &mut Requests { pairing, sink }),
            Way::ToClient => self.responses.push(piece, heads, &mut Replies { pairing, sink }),
        };
        match pushed {
            Pushed::Stopped(used) => Outcome::Ended(
                used,
                match self.pairing.switch.take() {
                    Some(Switch::Preface) => Next::Preface,
                    Some(Switch::H2c(record)) => Next::H2c(record),
                    Some(Switch::Opaque) | None => Next::Opaque,
                },
            ),
            Pushed::Taken if self.pairing.losses.malformed > malformed && !self.is_proved() => Outcome::NotHttp,
            Pushed::Taken => Outcome::More,
        }
    }

    pub(super) fn close(&mut self, sink: &mut Sink<'_>) {
        self.pairing.close(self.responses.is_until_close(), sink);
    }

    pub(super) fn expire(&mut self, since_ns: u64, sink: &mut Sink<'_>) {
        self.pairing.expire(since_ns, sink);
    }

    pub(super) fn take_losses(&mut self) -> Losses {
        std::mem::take(&mut self.pairing.losses)
    }
}
