use proptest::prelude::*;

use super::super::{Segment, SegmentLosses, Segments};
use crate::protocols::Way;

/// What comes out: the bytes, `None` for one that was not seen, and the times.
fn given(segments: &mut Segments, parts: &[(u32, u64, &[u8])]) -> (Vec<Option<u8>>, Vec<u64>) {
    let (mut bytes, mut times) = (Vec::new(), Vec::new());
    for (seq, ts_ns, captured) in parts {
        let segment = Segment {
            seq: *seq,
            ts_ns: *ts_ns,
            captured,
            true_len: captured.len() as u32,
        };
        segments.push(&segment, &mut |piece| {
            bytes.extend(piece.captured.iter().map(|byte| Some(*byte)));
            bytes.resize(bytes.len() + piece.true_len as usize - piece.captured.len(), None);
            times.push(piece.ts_ns);
        });
    }
    (bytes, times)
}

fn seen(text: &str) -> Vec<Option<u8>> {
    text.bytes().map(Some).collect()
}

#[test]
fn segments_are_put_in_order_with_the_time_at_which_they_could_be_read() {
    let mut segments = Segments::new(Way::ToServer, Some(u32::MAX - 1));
    let parts: [(u32, u64, &[u8]); 4] = [(u32::MAX - 1, 1, b"ab"), (3, 2, b"fg"), (0, 3, b"cde"), (5, 4, b"h")];
    let (bytes, times) = given(&mut segments, &parts);
    assert_eq!(bytes, seen("abcdefgh"));
    assert_eq!(times, [1, 3, 3, 4]);
    assert_eq!(segments.take_losses(), SegmentLosses::default());
}

#[test]
fn what_is_sent_again_is_left_out() {
    let mut segments = Segments::new(Way::ToServer, None);
    let parts: [(u32, u64, &[u8]); 5] = [
        (10, 1, b"abc"),
        (10, 2, b"abc"),
        (11, 3, b"bcde"),
        (16, 4, b"gh"),
        (16, 5, b"gh"),
    ];
    assert_eq!(given(&mut segments, &parts).0, seen("abcde"));
    assert_eq!(given(&mut segments, &[(15, 6, b"f")]).0, seen("fgh"));
    assert_eq!(segments.take_losses().repeated, 3 + 2 + 2);
}

#[test]
fn what_does_not_come_is_given_up() {
    let mut segments = Segments::new(Way::ToClient, Some(0));
    let parts: Vec<(u32, u64, &[u8])> = (1..=17).map(|n| (n * 2, u64::from(n), &b"xy"[..])).collect();
    let (bytes, _) = given(&mut segments, &parts);
    assert_eq!(bytes.len(), 2 + 34);
    assert_eq!(bytes[..3], [None, None, Some(b'x')]);
    assert_eq!(segments.take_losses().missing, 2);
    assert_eq!(given(&mut segments, &[(0, 20, b"zz")]).0, [], "too late");
}

#[test]
fn large_segments_wait_within_a_bound() {
    let mut segments = Segments::new(Way::ToClient, Some(0));
    let large = vec![1; 40 << 10];
    let (bytes, _) = given(&mut segments, &[(5, 1, &large)]);
    assert_eq!((bytes.len(), bytes[4], bytes[5]), (5 + large.len(), None, Some(1)));
}

proptest! {
    /// Any order and any repetition of a stream's segments gives the stream, as long as few are out of place.
    #[test]
    fn any_order_gives_the_stream(
        first in any::<u32>(),
        lengths in prop::collection::vec(1_usize..9, 1..40),
        swaps in prop::collection::vec((any::<prop::sample::Index>(), 0_usize..8), 0..20),
        repeats in prop::collection::vec((any::<prop::sample::Index>(), 0_usize..4), 0..10),
    ) {
        let stream: Vec<u8> = (0..lengths.iter().sum::<usize>()).map(|n| n as u8).collect();
        let mut at = 0;
        let mut order: Vec<(usize, usize)> = Vec::new();
        for len in &lengths {
            order.push((at, *len));
            at += len;
        }
        let count = order.len();
        let mut touched = vec![false; count];
        for (index, by) in swaps {
            let (one, other) = (index.index(count), (index.index(count) + by).min(count - 1));
            // Each moves once, so that none waits for more than there is room for.
            if !touched[one] && !touched[other] {
                order.swap(one, other);
                (touched[one], touched[other]) = (true, true);
            }
        }
        for (index, later) in repeats {
            let from = index.index(order.len());
            let again = order[from];
            order.insert((from + later + 1).min(order.len()), again);
        }
        let parts: Vec<(u32, u64, &[u8])> = order
            .iter()
            .map(|(at, len)| (first.wrapping_add(*at as u32), 0, &stream[*at..at + len]))
            .collect();
        let mut segments = Segments::new(Way::ToServer, Some(first));
        let (bytes, _) = given(&mut segments, &parts);
        prop_assert_eq!(bytes, stream.iter().map(|byte| Some(*byte)).collect::<Vec<_>>());
        prop_assert_eq!(segments.take_losses().missing, 0);
    }
}
