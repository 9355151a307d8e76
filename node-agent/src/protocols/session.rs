//! One connection that speaks HTTP, of whatever version.

use super::{HttpOptions, Losses, Piece, Sink, Start, State, http1};

/// Follows one connection and tells its exchanges.
#[derive(Debug)]
pub struct HttpSession {
    speaks: Speaks,
    /// Of protocols that this connection has left.
    losses: Losses,
}

#[derive(Debug)]
enum Speaks {
    Http1(Box<http1::Session>),
    Nothing(State),
}

impl HttpSession {
    /// A session for a connection. The version is found from the bytes: a connection seen from its start may begin with
    /// a request or with the preface of HTTP/2; one that was joined may go on with messages or frames.
    #[must_use]
    pub fn new(start: Start, options: HttpOptions) -> Self {
        Self {
            speaks: Speaks::Http1(Box::new(http1::Session::new(options, start == Start::Joined))),
            losses: Losses::default(),
        }
    }

    /// Takes the next piece, and tells the exchanges that ended with it. Once the answer is not [`State::Active`], the
    /// connection need not be followed any more.
    pub fn push(&mut self, piece: &Piece<'_>, sink: &mut Sink<'_>) -> State {
        match &mut self.speaks {
            Speaks::Http1(session) => match session.push(piece, sink) {
                http1::Outcome::More => return State::Active,
                http1::Outcome::NotHttp => {
                    session.close(sink);
                    self.leave(State::NotHttp);
                }
                http1::Outcome::Ended(_, _) => self.leave(State::Opaque),
            },
            Speaks::Nothing(_) => {}
        }
        self.state()
    }

    /// The connection has ended; tells what was under way.
    pub fn close(&mut self, sink: &mut Sink<'_>) {
        if let Speaks::Http1(session) = &mut self.speaks {
            session.close(sink);
        }
        self.leave(State::Opaque);
    }

    /// Tells exchanges whose end cannot be seen because bytes are missing, if nothing of them came since `since_ns`. To
    /// be called once per interval, so that the last exchange of an idle connection is reported.
    pub fn expire(&mut self, since_ns: u64, sink: &mut Sink<'_>) {
        if let Speaks::Http1(session) = &mut self.speaks {
            session.expire(since_ns, sink);
        }
    }

    /// What the session can still tell.
    #[must_use]
    pub fn state(&self) -> State {
        match self.speaks {
            Speaks::Http1(_) => State::Active,
            Speaks::Nothing(state) => state,
        }
    }

    /// What could not be followed since the last call.
    pub fn take_losses(&mut self) -> Losses {
        let mut losses = std::mem::take(&mut self.losses);
        if let Speaks::Http1(session) = &mut self.speaks {
            losses.add(session.take_losses());
        }
        losses
    }

    fn leave(&mut self, state: State) {
        self.losses = self.take_losses();
        self.speaks = Speaks::Nothing(state);
    }
}
