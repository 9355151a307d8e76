//! What the fuzz targets share: how bytes become pieces, and what must hold whatever the pieces are. The parsers are the
//! agent's own sources, without the agent.

#[path = "../../crates/api/src/blacklist/mod.rs"]
pub mod blacklist;
#[path = "../../node-agent/src/protocols/mod.rs"]
pub mod protocols;

use protocols::{Exchange, Heads, HttpOptions, HttpSession, Piece, Start, Way};

/// Takes bytes from the front of the input.
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    /// The next byte, 0 at the end.
    pub fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first
    }

    /// The next piece; `None` at the end. A control byte says its way, how its length is given, and how much of it was not
    /// captured: most pieces are whole.
    pub fn piece(&mut self) -> Option<Piece<'a>> {
        if self.0.is_empty() {
            return None;
        }
        let control = self.byte();
        let len = match control & 0x06 {
            0 => self.0.len(),
            2 => usize::from(self.byte()),
            4 => usize::from(self.byte()) * 16,
            _ => usize::from(control >> 5),
        };
        let unseen = match control & 0x18 {
            0x08 => u64::from(self.byte()),
            0x10 if control & 0x80 != 0 => u64::from(self.byte()) << (self.byte() % 57),
            _ => 0,
        };
        let (captured, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        Some(Piece {
            way: if control & 1 == 0 { Way::ToServer } else { Way::ToClient },
            ts_ns: 0,
            captured,
            true_len: (captured.len() as u64).saturating_add(unseen),
        })
    }
}

/// Bytes that were given and told, by way.
#[derive(Default)]
struct Sums {
    given: [u128; 2],
    told: [u128; 2],
}

impl Sums {
    fn tell(&mut self, exchange: &Exchange<'_>) {
        for (sum, transfer) in self.told.iter_mut().zip([exchange.request, exchange.response]) {
            *sum += u128::from(transfer.map_or(0, |transfer| transfer.bytes));
            assert!(transfer.is_none_or(|transfer| transfer.first_ns <= transfer.last_ns));
        }
        assert!(
            exchange
                .path
                .is_none_or(|path| path.len() <= 3 * usize::from(PATH_LIMIT))
        );
        assert!(exchange.host.is_none_or(|host| host.len() <= 262));
    }
}

const PATH_LIMIT: u16 = 64;

/// Gives pieces to a session. No byte may be told twice, and sessions that share the heads they read say the same.
pub fn drive_http(start: Start, pieces: impl Iterator<Item = (Way, Vec<u8>, u64)>) {
    let options = HttpOptions {
        path_limit: PATH_LIMIT,
        keep_query: false,
        max_pending: 8,
        max_streams: 8,
    };
    let mut session = HttpSession::new(start, options);
    let mut sums = Sums::default();
    let mut beside = [(); 3].map(|()| HttpSession::new(start, options));
    let mut heads = Heads::default();
    for (number, (way, captured, true_len)) in pieces.enumerate() {
        let piece = Piece {
            way,
            ts_ns: number as u64,
            captured: &captured,
            true_len,
        };
        sums.given[way as usize] += u128::from(true_len);
        // What a joined connection asks first.
        let _ = protocols::way_of_frames(piece.captured);
        let mut told = Vec::new();
        session.push(&piece, &mut |exchange| {
            sums.tell(exchange);
            told.push(format!("{exchange:?}"));
        });
        for other in &mut beside {
            let mut said = told.iter();
            other.push_with(&piece, &mut heads, &mut |exchange| {
                assert_eq!(said.next(), Some(&format!("{exchange:?}")));
            });
            assert_eq!(said.next(), None);
        }
        if number % 16 == 15 {
            session.expire(number as u64 - 8, &mut |exchange| sums.tell(exchange));
            for other in &mut beside {
                other.expire(number as u64 - 8, &mut |_| ());
            }
        }
    }
    session.close(&mut |exchange| sums.tell(exchange));
    assert!(sums.told[0] <= sums.given[0] && sums.told[1] <= sums.given[1]);
}

/// Pieces of an input, as owned bytes.
pub fn pieces(mut input: Input<'_>) -> impl Iterator<Item = (Way, Vec<u8>, u64)> {
    std::iter::from_fn(move || {
        input
            .piece()
            .map(|piece| (piece.way, piece.captured.to_vec(), piece.true_len))
    })
}
