//! HTTP/2, and gRPC on it.
//!
//! ```text
//! pieces ▶ wire (one per direction: frames, header blocks) ▶ hpack (one per direction) ▶ streams ▶ exchanges
//!              └ frame (the nine bytes before each)
//! ```
//! DATA is skipped by its length without being seen. Where a frame boundary is lost, a direction looks for frames at the
//! beginning of each piece; what its header compression refers to from before is not known from then on.
//!
//! Pushed responses are not told; frames of the connection (SETTINGS, PING, WINDOW_UPDATE, ...) belong to no exchange.

pub(crate) mod frame;
pub(crate) mod hpack;
mod side;
mod streams;
#[cfg(test)]
mod tests;
mod wire;

pub use self::side::way_of_frames;
use self::{
    hpack::{Decoder, Scratch},
    streams::{Frames, Streams, is_of_interest},
    wire::{Begin, Wire},
};
use super::{HttpOptions, Losses, Piece, Sink, Way, record::Record};

/// One connection.
#[derive(Debug)]
pub(super) struct Session {
    requests: Direction,
    responses: Direction,
    streams: Streams,
    scratch: Scratch,
}

#[derive(Debug)]
struct Direction {
    wire: Wire,
    decoder: Decoder,
}

impl Direction {
    fn new(begin: Begin) -> Self {
        Self {
            wire: Wire::new(begin),
            decoder: Decoder::new(begin != Begin::Joined, is_of_interest),
        }
    }
}

impl Session {
    /// A connection from its start: of the client's preface so many bytes have been read.
    pub(super) fn fresh(options: HttpOptions, preface: usize) -> Self {
        Self::new(options, Begin::Preface(preface), Begin::Frames)
    }

    /// A connection that was changed to HTTP/2 by this request.
    pub(super) fn upgraded(options: HttpOptions, request: Record) -> Self {
        let mut session = Self::fresh(options, 0);
        session.streams.upgraded(request);
        session
    }

    /// A connection that was there before.
    pub(super) fn joined(options: HttpOptions) -> Self {
        Self::new(options, Begin::Joined, Begin::Joined)
    }

    fn new(options: HttpOptions, requests: Begin, responses: Begin) -> Self {
        Self {
            requests: Direction::new(requests),
            responses: Direction::new(responses),
            streams: Streams::new(options, requests == Begin::Joined),
            scratch: Scratch::default(),
        }
    }

    /// True once a message's headers were read: this is HTTP/2.
    pub(super) fn is_proved(&self) -> bool {
        self.streams.proved
    }

    /// Takes the next piece. False if the connection does not begin as HTTP/2 does.
    pub(super) fn push(&mut self, piece: &Piece<'_>, sink: &mut Sink<'_>) -> bool {
        let malformed = self.streams.losses.malformed;
        let Direction { wire, decoder } = match piece.way {
            Way::ToServer => &mut self.requests,
            Way::ToClient => &mut self.responses,
        };
        let mut frames = Frames {
            way: piece.way,
            streams: &mut self.streams,
            decoder,
            scratch: &mut self.scratch,
            sink,
        };
        wire.push(piece, &mut frames);
        self.is_proved() || self.streams.losses.malformed == malformed
    }

    pub(super) fn close(&mut self, sink: &mut Sink<'_>) {
        self.streams.close(sink);
    }

    pub(super) fn expire(&mut self, since_ns: u64, sink: &mut Sink<'_>) {
        self.streams.expire(since_ns, sink);
    }

    pub(super) fn take_losses(&mut self) -> Losses {
        std::mem::take(&mut self.streams.losses)
    }
}
