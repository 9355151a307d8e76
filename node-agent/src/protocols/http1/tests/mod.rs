//! What the tests share: a session that is given text, and exchanges as lines.

mod conversations;
mod losses;
mod properties;

use crate::protocols::{Exchange, Flags, Heads, HttpOptions, HttpSession, Losses, Piece, Start, State, Way};

/// An exchange as one line, to compare.
fn line(exchange: &Exchange<'_>) -> String {
    let transfer = |transfer: Option<crate::protocols::Transfer>| match transfer {
        None => "-".to_owned(),
        Some(transfer) => format!("{}..{}/{}", transfer.first_ns, transfer.last_ns, transfer.bytes),
    };
    let Flags {
        joined,
        bytes_missing,
        aborted,
        unfinished,
    } = exchange.flags;
    let flags: String = [(joined, "J"), (bytes_missing, "M"), (aborted, "A"), (unfinished, "U")]
        .into_iter()
        .filter_map(|(set, sign)| set.then_some(sign))
        .collect();
    format!(
        "{} {}{} {} {} {} {} {} {flags}",
        exchange.method.unwrap_or("-"),
        exchange.path.unwrap_or("-"),
        if exchange.path_truncated { "…" } else { "" },
        exchange.host.unwrap_or("-"),
        exchange.status.map_or("-".to_owned(), |status| status.to_string()),
        exchange.version.as_str(),
        transfer(exchange.request),
        transfer(exchange.response),
    )
    .trim_end()
    .to_owned()
}

/// A session, and others beside it that are given the same and share the heads that they read: what all say is the same. A
/// head that the first of them reads for the first time is kept by the second, and told by the third without reading it.
struct Run {
    session: HttpSession,
    beside: [HttpSession; 3],
    heads: Heads,
    told: Vec<String>,
    losses: Losses,
}

impl Run {
    fn new(start: Start) -> Self {
        Self::with(start, HttpOptions::default())
    }

    fn with(start: Start, options: HttpOptions) -> Self {
        Self {
            session: HttpSession::new(start, options),
            beside: [(); 3].map(|()| HttpSession::new(start, options)),
            heads: Heads::default(),
            told: Vec::new(),
            losses: Losses::default(),
        }
    }

    /// A piece of which `captured` was seen and `unseen` further bytes were not.
    fn piece(&mut self, ts_ns: u64, way: Way, captured: &[u8], unseen: u64) -> State {
        let piece = Piece {
            way,
            ts_ns,
            captured,
            true_len: captured.len() as u64 + unseen,
        };
        let before = self.told.len();
        let told = &mut self.told;
        let state = self.session.push(&piece, &mut |exchange| told.push(line(exchange)));
        let losses = self.session.take_losses();
        for beside in &mut self.beside {
            let mut said = Vec::new();
            let other = beside.push_with(&piece, &mut self.heads, &mut |exchange| said.push(line(exchange)));
            assert_eq!((other, said.as_slice()), (state, &self.told[before..]));
            assert_eq!(beside.take_losses(), losses);
        }
        self.losses.add(losses);
        state
    }

    fn up(&mut self, ts_ns: u64, bytes: impl AsRef<[u8]>) -> State {
        self.piece(ts_ns, Way::ToServer, bytes.as_ref(), 0)
    }

    fn down(&mut self, ts_ns: u64, bytes: impl AsRef<[u8]>) -> State {
        self.piece(ts_ns, Way::ToClient, bytes.as_ref(), 0)
    }

    fn close(&mut self) -> Vec<String> {
        let before = self.told.len();
        let told = &mut self.told;
        self.session.close(&mut |exchange| told.push(line(exchange)));
        for beside in &mut self.beside {
            let mut said = Vec::new();
            beside.close(&mut |exchange| said.push(line(exchange)));
            assert_eq!(said, self.told[before..]);
        }
        let told = &mut self.told;
        self.losses.add(self.session.take_losses());
        std::mem::take(told)
    }

    fn expire(&mut self, since_ns: u64) -> Vec<String> {
        let told = &mut self.told;
        self.session.expire(since_ns, &mut |exchange| told.push(line(exchange)));
        for beside in &mut self.beside {
            beside.expire(since_ns, &mut |_| ());
        }
        std::mem::take(told)
    }

    fn told(&mut self) -> Vec<String> {
        std::mem::take(&mut self.told)
    }
}

/// What is told of a conversation (`>` to the server, `<` to the client) given as directions and texts, one piece each, at times 1, 2, ...
fn told(conversation: &[(char, &str)]) -> Vec<String> {
    let mut run = Run::new(Start::Fresh);
    for (number, (way, text)) in conversation.iter().enumerate() {
        let ts_ns = number as u64 + 1;
        match way {
            '>' => run.up(ts_ns, text),
            _ => run.down(ts_ns, text),
        };
    }
    run.told()
}
