//! Cuts and hostile bytes.

use proptest::prelude::*;

use super::Run;
use crate::protocols::{HttpOptions, HttpSession, Losses, Piece, Start, Way};

/// A conversation with everything in it, and where the piece of each message ends.
fn conversation() -> Vec<(Way, Vec<u8>)> {
    use Way::{ToClient, ToServer};
    let long = "/".to_owned() + &"p".repeat(700) + "?" + &"q".repeat(900);
    [
        (
            ToServer,
            format!("GET {long} HTTP/1.0\r\nHost: h\r\nConnection: keep-alive\r\n\r\n"),
        ),
        (ToClient, "HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabc".into()),
        (
            ToServer,
            "POST /c?x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n".into(),
        ),
        (
            ToClient,
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 201 X\r\ntransfer-encoding: chunked\r\n\r\n".into(),
        ),
        (ToClient, "a\r\n0123456789\r\n0\r\nT: 1\r\n\r\n".into()),
        (ToServer, "HEAD /h HTTP/1.1\r\n\r\nGET /p HTTP/1.1\nHost: x\n\n".into()),
        (
            ToClient,
            "HTTP/1.1 200\r\nContent-Length: 9\r\n\r\nHTTP/1.1 204 No\r\n\r\n".into(),
        ),
        (ToServer, "GET /last HTTP/1.1\r\n\r\n".into()),
        (ToClient, "HTTP/1.1 500 Oh\r\n\r\nuntil the end".into()),
    ]
    .into_iter()
    .map(|(way, text): (Way, String)| (way, text.into_bytes()))
    .collect()
}

/// Everything told of the conversation, cut at `cuts` within each part.
fn told_cut(cuts: &[usize]) -> (Vec<String>, Losses) {
    let mut run = Run::new(Start::Fresh);
    for (number, (way, bytes)) in conversation().iter().enumerate() {
        let mut from = 0;
        for cut in cuts
            .iter()
            .copied()
            .filter(|cut| *cut < bytes.len())
            .chain([bytes.len()])
        {
            let cut = cut.max(from);
            run.piece(number as u64, *way, &bytes[from..cut], 0);
            from = cut;
        }
    }
    let mut told = run.told();
    told.extend(run.close());
    (told, run.losses)
}

#[test]
fn cuts_change_nothing() {
    let whole = told_cut(&[]);
    assert_eq!(whole.0.len(), 5);
    assert_eq!(whole.1, Losses::default());
    let longest = conversation().iter().map(|(_, bytes)| bytes.len()).max().unwrap();
    for cut in 0..longest {
        assert_eq!(told_cut(&[cut]), whole, "cut at {cut}");
    }
    let every: Vec<usize> = (0..longest).collect();
    assert_eq!(told_cut(&every), whole, "byte by byte");
}

/// Bytes that are often HTTP.
pub(crate) fn hostile() -> impl Strategy<Value = Vec<u8>> {
    let word = prop::sample::select(vec![
        "GET / HTTP/1.1\r\n",
        "POST /a HTTP/1.0\r\n",
        "HTTP/1.1 200 OK\r\n",
        "HTTP/1.1 100 C\r\n",
        "HTTP/1.1 101 S\r\n",
        "Content-Length: 5\r\n",
        "Content-Length: 9223372036854775807\r\n",
        "Transfer-Encoding: chunked\r\n",
        "\r\n",
        "\n",
        "5\r\n",
        "hello",
        "0\r\n\r\n",
        "fffffffffffffff\r\n",
        "CONNECT a:1 HTTP/1.1\r\n",
        "Upgrade: h2c\r\n",
        "HEAD /",
        " ",
        "HTTP/1.1 204 \r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ]);
    let part = prop_oneof![
        8 => word.prop_map(|word| word.as_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 0..40),
    ];
    prop::collection::vec(part, 0..8).prop_map(|parts| parts.concat())
}

proptest! {
    #[test]
    fn two_cuts_change_nothing(first in 0..1700_usize, second in 0..1700_usize) {
        prop_assert_eq!(told_cut(&[first.min(second), first.max(second)]), told_cut(&[]));
    }

    /// Whatever comes: no panic, no more bytes told than there were, and what is told of a request is at most once.
    #[test]
    fn any_bytes(
        joined in any::<bool>(),
        pieces in prop::collection::vec((any::<bool>(), hostile(), prop_oneof![4 => Just(0_u64), 1 => 0..30_u64, 1 => any::<u64>()]), 0..30),
    ) {
        let start = if joined { Start::Joined } else { Start::Fresh };
        let options = HttpOptions { max_pending: 3, ..HttpOptions::default() };
        let mut session = HttpSession::new(start, options);
        let (mut requests, mut responses) = (0_u128, 0_u128);
        let (mut up, mut down) = (0_u128, 0_u128);
        for (number, (to_server, bytes, unseen)) in pieces.iter().enumerate() {
            let piece = Piece {
                way: if *to_server { Way::ToServer } else { Way::ToClient },
                ts_ns: number as u64,
                captured: bytes,
                true_len: (bytes.len() as u64).saturating_add(*unseen),
            };
            *(if *to_server { &mut up } else { &mut down }) += u128::from(piece.true_len);
            session.push(&piece, &mut |exchange| {
                requests += u128::from(exchange.request.map_or(0, |request| request.bytes));
                responses += u128::from(exchange.response.map_or(0, |response| response.bytes));
            });
        }
        session.close(&mut |exchange| {
            requests += u128::from(exchange.request.map_or(0, |request| request.bytes));
            responses += u128::from(exchange.response.map_or(0, |response| response.bytes));
        });
        prop_assert!(requests <= up, "{} of {}", requests, up);
        prop_assert!(responses <= down, "{} of {}", responses, down);
    }
}
