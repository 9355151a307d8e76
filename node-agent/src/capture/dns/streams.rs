//! DNS over TCP: messages out of the packets of many connections, bounded. No I/O.
//!
//! ```text
//! packets of one direction ▶ in order ([`Segments`]) ▶ cut into messages ([`TcpSplitter`]) ▶ sink
//! ```

use ahash::RandomState;
use ebpf_common::{dns::flag, net::Tuple};
use hashbrown::HashMap;

use super::events::Packet;
use crate::protocols::{
    Piece, Way,
    dns::{Segment, Segments, TcpMessage, TcpSplitter},
};

/// Connections followed at once; the one that was silent for longest makes room.
const STREAMS_MAX: usize = 4096;
/// Bytes of packets that wait for those before them, of all connections.
const WAITING_BYTES_MAX: usize = 16 << 20;
/// A silent connection is forgotten after this long, and found again at its next message.
const SILENT_NS: u64 = 120 * 1_000_000_000;
/// The same of one that is closing: what was sent before may come late.
const CLOSING_NS: u64 = 5 * 1_000_000_000;

/// What the connections lost, since it was last asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct StreamLosses {
    /// Bytes that were never seen, between others that were.
    pub(super) missing: u64,
    /// Times the boundary of a message was lost.
    pub(super) resyncs: u64,
    /// Connections that made room for others.
    pub(super) evicted: u64,
}

/// The connections.
#[derive(Debug, Default)]
pub(super) struct Streams {
    streams: HashMap<Tuple, Stream, RandomState>,
    waiting_bytes: usize,
    losses: StreamLosses,
}

#[derive(Debug, Default)]
struct Stream {
    sent: Option<Half>,
    received: Option<Half>,
    last_ns: u64,
    closing: bool,
}

#[derive(Debug)]
struct Half {
    segments: Segments,
    splitter: TcpSplitter,
}

impl Half {
    /// A direction that begins with this sequence number, or is joined somewhere.
    fn new(way: Way, first: Option<u32>) -> Self {
        Self {
            segments: Segments::new(way, first),
            splitter: TcpSplitter::new(first.is_none()),
        }
    }
}

impl Streams {
    /// Takes a packet and gives the messages that end with it.
    pub(super) fn push(&mut self, packet: &Packet<'_>, sink: &mut dyn FnMut(&TcpMessage<'_>)) {
        let head = packet.head;
        if self.streams.len() >= STREAMS_MAX && !self.streams.contains_key(&head.tuple) {
            self.make_room();
        }
        let stream = self.streams.entry(head.tuple).or_default();
        stream.last_ns = stream.last_ns.max(head.time_ns);
        let has = |flag| head.flags & flag != 0;
        // Who is the client does not matter here: the two directions only have to be told apart.
        let (half, way) = if has(flag::EGRESS) {
            (&mut stream.sent, Way::ToServer)
        } else {
            (&mut stream.received, Way::ToClient)
        };
        let mut seq = head.seq;
        if has(flag::SYN) {
            // It has a number of its own.
            seq = seq.wrapping_add(1);
            *half = Some(Half::new(way, Some(seq)));
            stream.closing = false;
        }
        let Half { segments, splitter } = half.get_or_insert_with(|| Half::new(way, None));
        let before = segments.waiting_bytes();
        let mut messages = |piece: &Piece<'_>| splitter.push(piece, &mut |message| sink(&message));
        if head.length > 0 {
            let segment = Segment {
                seq,
                ts_ns: head.time_ns,
                captured: packet.bytes,
                true_len: head.length,
            };
            segments.push(&segment, &mut messages);
        }
        if has(flag::RST) || self.waiting_bytes > WAITING_BYTES_MAX {
            segments.finish(&mut messages);
        }
        self.waiting_bytes = (self.waiting_bytes + segments.waiting_bytes()).saturating_sub(before);
        self.losses.missing += segments.take_losses().missing;
        self.losses.resyncs += splitter.take_resyncs();
        stream.closing |= has(flag::FIN | flag::RST);
    }

    /// Forgets connections that have been silent for long at `now_ns`.
    pub(super) fn expire(&mut self, now_ns: u64) {
        let gone = |stream: &Stream| {
            let after = if stream.closing { CLOSING_NS } else { SILENT_NS };
            stream.last_ns.saturating_add(after) <= now_ns
        };
        for (_, stream) in self.streams.extract_if(|_, stream| gone(stream)) {
            self.waiting_bytes = self.waiting_bytes.saturating_sub(stream.waiting_bytes());
        }
    }

    /// Connections followed.
    pub(super) fn len(&self) -> usize {
        self.streams.len()
    }

    /// What was lost since the last call.
    pub(super) fn take_losses(&mut self) -> StreamLosses {
        std::mem::take(&mut self.losses)
    }

    /// Takes an eighth of the connections out, those that were silent for longest.
    fn make_room(&mut self) {
        let mut times: Vec<u64> = self.streams.values().map(|stream| stream.last_ns).collect();
        let (_, limit, _) = times.select_nth_unstable(STREAMS_MAX / 8);
        let limit = *limit;
        for (_, stream) in self.streams.extract_if(|_, stream| stream.last_ns <= limit) {
            self.waiting_bytes = self.waiting_bytes.saturating_sub(stream.waiting_bytes());
            self.losses.evicted += u64::from(!stream.closing);
        }
    }
}

impl Stream {
    fn waiting_bytes(&self) -> usize {
        let halves = [&self.sent, &self.received].into_iter().flatten();
        halves.map(|half| half.segments.waiting_bytes()).sum()
    }
}

#[cfg(test)]
mod tests {
    use ebpf_common::dns::{PacketHead, TCP};

    use super::*;

    fn packet(port: u16, flags: u8, seq: u32, time_ns: u64, bytes: &[u8]) -> Packet<'_> {
        let length = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
        let head = PacketHead {
            captured: length,
            protocol: TCP,
            flags,
            time_ns,
            length: length.into(),
            seq,
            tuple: Tuple {
                local_port: port,
                ..Tuple::default()
            },
            ..PacketHead::default()
        };
        Packet { head, bytes }
    }

    /// A query with this id, after its length.
    fn query(id: u8) -> Vec<u8> {
        vec![0, 17, 0, id, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]
    }

    fn ids(streams: &mut Streams, packets: &[Packet<'_>]) -> Vec<(u8, u64)> {
        let mut found = Vec::new();
        for packet in packets {
            streams.push(packet, &mut |message| {
                found.push((message.bytes.get(1).copied().unwrap_or(0), message.last_ns));
            });
        }
        found
    }

    #[test]
    fn messages_of_packets_in_any_order() {
        let bytes = [query(1), query(2), query(3)].concat();
        let (a, rest) = bytes.split_at(10);
        let (b, c) = rest.split_at(25);
        let mut streams = Streams::default();
        let found = ids(
            &mut streams,
            &[
                packet(1, flag::EGRESS | flag::SYN, u32::MAX, 1, &[]),
                packet(1, flag::EGRESS, 35, 2, c),
                packet(1, flag::EGRESS, 0, 3, a),
                packet(1, flag::EGRESS, 0, 4, a),
                packet(1, flag::EGRESS, 10, 5, b),
                // The other direction has numbers of its own.
                packet(1, 0, 77, 6, &query(9)),
            ],
        );
        assert_eq!(found, [(1, 5), (2, 5), (3, 5), (9, 6)]);
        assert_eq!((streams.waiting_bytes, streams.len()), (0, 1));
    }

    #[test]
    fn the_number_of_connections_is_bounded() {
        let mut streams = Streams::default();
        for n in 0..STREAMS_MAX + 10 {
            let port = u16::try_from(n).unwrap_or(0);
            // Out of order, so that something waits.
            ids(
                &mut streams,
                &[
                    packet(port, flag::SYN, 0, n as u64, &[]),
                    packet(port, 0, 9, n as u64, b"x"),
                ],
            );
        }
        assert!(streams.len() <= STREAMS_MAX, "{}", streams.len());
        assert_eq!(streams.waiting_bytes, streams.len());
        assert!(streams.take_losses().evicted > 0);
        streams.expire(u64::MAX);
        assert_eq!((streams.len(), streams.waiting_bytes), (0, 0));
    }

    #[test]
    fn what_is_closed_goes_soon() {
        let mut streams = Streams::default();
        ids(
            &mut streams,
            &[packet(1, flag::FIN, 5, 0, &query(1)), packet(2, 0, 5, 0, &query(1))],
        );
        streams.expire(CLOSING_NS);
        assert_eq!(streams.len(), 1);
        streams.expire(SILENT_NS);
        assert_eq!(streams.len(), 0);
    }
}
