//! One connection that speaks HTTP, of whatever version.

use super::{Heads, HttpOptions, Losses, Piece, Sink, Start, State, Verdict, Way, classify, http1, http2};

/// First line of the preface of HTTP/2, which the HTTP/1 parser reads before it hands over.
const FIRST_LINE: usize = "PRI * HTTP/2.0\r\n".len();

/// Follows one connection and tells its exchanges.
#[derive(Debug)]
pub struct HttpSession {
    start: Start,
    options: HttpOptions,
    speaks: Speaks,
    /// Of protocols that this connection has left.
    losses: Losses,
}

#[derive(Debug)]
enum Speaks {
    Http1(Box<http1::Session>),
    Http2(Box<http2::Session>),
    Nothing(State),
}

impl HttpSession {
    /// A session for a connection. The version is found from the bytes: a connection seen from its start may begin with
    /// a request or with the preface of HTTP/2; one that was joined may go on with messages or frames.
    #[must_use]
    pub fn new(start: Start, options: HttpOptions) -> Self {
        Self {
            start,
            options,
            speaks: Speaks::Http1(Box::new(http1::Session::new(options, start == Start::Joined))),
            losses: Losses::default(),
        }
    }

    /// Takes the next piece, and tells the exchanges that ended with it. Once the answer is not [`State::Active`], the
    /// connection need not be followed any more.
    pub fn push(&mut self, piece: &Piece<'_>, sink: &mut Sink<'_>) -> State {
        self.push_with(piece, &mut Heads::none(), sink)
    }

    /// The same; heads that were read before, by any session with the same options, are not read again.
    pub fn push_with(&mut self, piece: &Piece<'_>, heads: &mut Heads, sink: &mut Sink<'_>) -> State {
        if !self.is_proved() {
            self.choose(piece, sink);
        }
        match &mut self.speaks {
            Speaks::Http1(session) => match session.push(piece, heads, sink) {
                http1::Outcome::More => {}
                http1::Outcome::NotHttp => self.give_up(sink),
                http1::Outcome::Ended(used, next) => self.hand_over(piece, used, next, sink),
            },
            Speaks::Http2(session) => {
                // Where a joined connection is wrongly believed to be HTTP/2, it is not known to be anything else.
                if !session.push(piece, sink) && self.start == Start::Fresh {
                    self.give_up(sink);
                }
            }
            Speaks::Nothing(_) => {}
        }
        self.state()
    }

    /// The connection has ended; tells what was under way.
    pub fn close(&mut self, sink: &mut Sink<'_>) {
        self.finish(sink);
        self.leave(State::Opaque);
    }

    /// Tells exchanges whose end cannot be seen, if nothing of them came since `since_ns`: because bytes are missing, or the
    /// server answered without waiting for the end of the request. To be called once per interval, so that the last
    /// exchange of an idle connection is reported.
    pub fn expire(&mut self, since_ns: u64, sink: &mut Sink<'_>) {
        match &mut self.speaks {
            Speaks::Http1(session) => session.expire(since_ns, sink),
            Speaks::Http2(session) => session.expire(since_ns, sink),
            Speaks::Nothing(_) => {}
        }
    }

    /// What the session can still tell.
    #[must_use]
    pub fn state(&self) -> State {
        match self.speaks {
            Speaks::Http1(_) | Speaks::Http2(_) => State::Active,
            Speaks::Nothing(state) => state,
        }
    }

    /// True once the headers of a message were read. A joined connection for which this does not become true is not HTTP,
    /// or cannot be followed.
    #[must_use]
    pub fn is_proved(&self) -> bool {
        match &self.speaks {
            Speaks::Http1(session) => session.is_proved(),
            Speaks::Http2(session) => session.is_proved(),
            Speaks::Nothing(_) => true,
        }
    }

    /// What could not be followed since the last call.
    pub fn take_losses(&mut self) -> Losses {
        let mut losses = std::mem::take(&mut self.losses);
        match &mut self.speaks {
            Speaks::Http1(session) => losses.add(session.take_losses()),
            Speaks::Http2(session) => losses.add(session.take_losses()),
            Speaks::Nothing(_) => {}
        }
        losses
    }

    /// Changes to the version that a piece shows, as long as none has been proved.
    fn choose(&mut self, piece: &Piece<'_>, sink: &mut Sink<'_>) {
        let joined = self.start == Start::Joined;
        let http2 = matches!(self.speaks, Speaks::Http2(_));
        match classify(piece.captured) {
            Verdict::Http2Preface if joined && piece.way == Way::ToServer && !http2 => {
                // Just made, after all.
                self.change(Speaks::Http2(Box::new(http2::Session::fresh(self.options, 0))), sink);
            }
            Verdict::Http2Frames if joined && !http2 => {
                self.change(Speaks::Http2(Box::new(http2::Session::joined(self.options))), sink);
            }
            // A server that is faster than its client.
            Verdict::Http2Frames if !http2 && piece.way == Way::ToClient => {
                self.change(Speaks::Http2(Box::new(http2::Session::fresh(self.options, 0))), sink);
            }
            Verdict::Http1Request | Verdict::Http1Response if joined && http2 => {
                self.change(Speaks::Http1(Box::new(http1::Session::new(self.options, true))), sink);
            }
            _ => {}
        }
    }

    /// Another protocol goes on after `used` captured bytes of the piece.
    fn hand_over(&mut self, piece: &Piece<'_>, used: usize, next: http1::Next, sink: &mut Sink<'_>) {
        let mut session = match next {
            http1::Next::Preface => http2::Session::fresh(self.options, FIRST_LINE),
            http1::Next::H2c(request) => http2::Session::upgraded(self.options, request),
            http1::Next::Opaque => {
                self.finish(sink);
                self.leave(State::Opaque);
                return;
            }
        };
        let rest = Piece {
            captured: piece.captured.get(used..).unwrap_or_default(),
            true_len: piece.true_len.saturating_sub(used as u64),
            ..*piece
        };
        let http2 = session.push(&rest, sink);
        self.change(Speaks::Http2(Box::new(session)), sink);
        if !http2 {
            self.give_up(sink);
        }
    }

    fn finish(&mut self, sink: &mut Sink<'_>) {
        match &mut self.speaks {
            Speaks::Http1(session) => session.close(sink),
            Speaks::Http2(session) => session.close(sink),
            Speaks::Nothing(_) => {}
        }
    }

    fn give_up(&mut self, sink: &mut Sink<'_>) {
        self.finish(sink);
        self.leave(State::NotHttp);
    }

    fn change(&mut self, speaks: Speaks, sink: &mut Sink<'_>) {
        self.finish(sink);
        self.losses = self.take_losses();
        self.speaks = speaks;
    }

    fn leave(&mut self, state: State) {
        self.losses = self.take_losses();
        self.speaks = Speaks::Nothing(state);
    }
}
