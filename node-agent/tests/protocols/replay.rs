//! A record, seen as a capture might see it.

use node_agent::protocols::{Exchange, Flags, HttpOptions, HttpSession, Losses, Piece, Start, Way};
use proptest::prelude::*;

use crate::recorder::Record;

/// How a record is seen.
#[derive(Clone, Debug)]
pub(crate) struct View {
    /// Transfers are cut after each of these many bytes, in turn. None: they are not cut.
    pub(crate) cuts: Vec<usize>,
    /// Bytes captured of each piece.
    pub(crate) limit: usize,
    /// The part of the transfers that passed before anybody looked, in thousandths.
    pub(crate) joins_at: usize,
    /// Transfers of which nothing was captured.
    pub(crate) unseen: Vec<prop::sample::Index>,
}

impl View {
    /// Everything is seen.
    pub(crate) fn whole(cuts: Vec<usize>) -> Self {
        Self {
            cuts,
            limit: usize::MAX,
            joins_at: 0,
            unseen: Vec::new(),
        }
    }
}

pub(crate) fn cuts() -> impl Strategy<Value = Vec<usize>> {
    prop_oneof![
        1 => Just(Vec::new()),
        1 => Just(vec![1]),
        4 => prop::collection::vec(1..400_usize, 1..6),
    ]
}

/// A view in which something is missing.
pub(crate) fn partial() -> impl Strategy<Value = View> {
    let limit = prop_oneof![Just(usize::MAX), 1..3000_usize];
    let joins_at = prop_oneof![Just(0_usize), 0..1000_usize];
    let unseen = prop::collection::vec(any::<prop::sample::Index>(), 0..3);
    (cuts(), limit, joins_at, unseen).prop_map(|(cuts, limit, joins_at, unseen)| View {
        // One byte at a time, nothing can be found again.
        cuts: if cuts == [1] { Vec::new() } else { cuts },
        limit,
        joins_at,
        unseen,
    })
}

/// An exchange as it was told.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Told {
    pub(crate) method: Option<String>,
    pub(crate) path: Option<String>,
    pub(crate) status: Option<u16>,
    pub(crate) grpc: Option<Option<u32>>,
    /// Bytes of request and response.
    pub(crate) bytes: (u64, u64),
    pub(crate) clean: bool,
    pub(crate) truncated: bool,
}

fn told(exchange: &Exchange<'_>) -> Told {
    let bytes = |transfer: Option<node_agent::protocols::Transfer>| transfer.map_or(0, |transfer| transfer.bytes);
    if let (Some(request), Some(response)) = (exchange.request, exchange.response) {
        assert!(request.first_ns <= request.last_ns && response.first_ns <= response.last_ns);
        assert!(
            request.first_ns <= response.first_ns || !clean(exchange),
            "{exchange:?}"
        );
    }
    Told {
        method: exchange.method.map(str::to_owned),
        path: exchange.path.map(str::to_owned),
        status: exchange.status,
        grpc: exchange.grpc.map(|grpc| grpc.status),
        bytes: (bytes(exchange.request), bytes(exchange.response)),
        clean: clean(exchange),
        truncated: exchange.path_truncated,
    }
}

fn clean(exchange: &Exchange<'_>) -> bool {
    exchange.flags == Flags::default()
}

/// Everything told of a record seen in this way.
pub(crate) fn replay(record: &Record, view: &View) -> (Vec<Told>, Losses) {
    let skipped = record.len() * view.joins_at / 1000;
    let start = if skipped == 0 { Start::Fresh } else { Start::Joined };
    let mut session = HttpSession::new(start, HttpOptions::default());
    let mut all = Vec::new();
    let unseen: Vec<usize> = view
        .unseen
        .iter()
        .map(|index| index.index(record.len().max(1)))
        .collect();
    let mut cuts = view.cuts.iter().copied().cycle();
    for (number, (way, bytes)) in record.iter().enumerate().skip(skipped) {
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let (bytes, after) = rest.split_at(cuts.next().unwrap_or(rest.len()).min(rest.len()));
            rest = after;
            let limit = if unseen.contains(&number) { 0 } else { view.limit };
            let piece = Piece {
                way: *way,
                ts_ns: number as u64,
                captured: &bytes[..bytes.len().min(limit)],
                true_len: bytes.len() as u64,
            };
            session.push(&piece, &mut |exchange| all.push(told(exchange)));
        }
    }
    session.close(&mut |exchange| all.push(told(exchange)));
    let (sent, received) = (bytes_of(record, Way::ToServer), bytes_of(record, Way::ToClient));
    assert!(all.iter().map(|told| told.bytes.0).sum::<u64>() <= sent);
    assert!(all.iter().map(|told| told.bytes.1).sum::<u64>() <= received);
    (all, session.take_losses())
}

/// Bytes that passed in one direction.
pub(crate) fn bytes_of(record: &Record, way: Way) -> u64 {
    record
        .iter()
        .filter(|(other, _)| *other == way)
        .map(|(_, bytes)| bytes.len() as u64)
        .sum()
}
