//! What the tests share: a session that is given text, and exchanges as lines.

mod conversations;
mod losses;
mod properties;

use crate::protocols::{Exchange, Flags, HttpOptions, HttpSession, Losses, Piece, Start, State, Way};

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

struct Run {
    session: HttpSession,
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
        let told = &mut self.told;
        let state = self.session.push(&piece, &mut |exchange| told.push(line(exchange)));
        self.losses.add(self.session.take_losses());
        state
    }

    fn up(&mut self, ts_ns: u64, bytes: impl AsRef<[u8]>) -> State {
        self.piece(ts_ns, Way::ToServer, bytes.as_ref(), 0)
    }

    fn down(&mut self, ts_ns: u64, bytes: impl AsRef<[u8]>) -> State {
        self.piece(ts_ns, Way::ToClient, bytes.as_ref(), 0)
    }

    fn close(&mut self) -> Vec<String> {
        let told = &mut self.told;
        self.session.close(&mut |exchange| told.push(line(exchange)));
        self.losses.add(self.session.take_losses());
        std::mem::take(told)
    }

    fn expire(&mut self, since_ns: u64) -> Vec<String> {
        let told = &mut self.told;
        self.session.expire(since_ns, &mut |exchange| told.push(line(exchange)));
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
