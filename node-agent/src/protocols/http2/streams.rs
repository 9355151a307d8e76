//! The streams of a connection: which headers and data belong to one exchange.

use ahash::RandomState;
use hashbrown::HashMap;

use super::{
    frame::{Frame, Kind},
    hpack::{Decoder, Field, Scratch},
    wire::{Block, Lost, Role},
};
use crate::protocols::{
    Grpc, HttpOptions, Losses, Sink, Version, Way,
    record::{Method, Pool, Record, add},
};

/// Streams whose reset is remembered, so that what was still on its way is not taken for something new.
const RESETS: usize = 8;

/// What is known of both directions together.
#[derive(Debug)]
pub(super) struct Streams {
    options: HttpOptions,
    open: HashMap<u32, Stream, RandomState>,
    pool: Pool,
    /// Requests may have passed unseen, so that a response without one is not a mistake.
    unseen: bool,
    /// Streams reset last, in no order.
    resets: [u32; RESETS],
    next_reset: usize,
    /// A header block with the pseudo-headers of a message has been read.
    pub(super) proved: bool,
    pub(super) losses: Losses,
}

/// One exchange under way.
#[derive(Debug)]
struct Stream {
    record: Record,
    request: Side,
    response: Side,
}

/// One direction of a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Side {
    /// The headers of the message (of a response: of the final one) have passed.
    head: bool,
    done: bool,
    /// Frames may have been missed, among them the last one.
    lost: bool,
}

impl Stream {
    fn side(&mut self, way: Way) -> &mut Side {
        match way {
            Way::ToServer => &mut self.request,
            Way::ToClient => &mut self.response,
        }
    }

    fn last_ns(&self) -> u64 {
        let last = |transfer: Option<crate::protocols::Transfer>| transfer.map_or(0, |transfer| transfer.last_ns);
        last(self.record.request).max(last(self.record.response))
    }

    /// Both messages have ended, or the response has and the end of the request was missed.
    fn ended(&self) -> bool {
        self.response.done && (self.request.done || self.request.lost)
    }
}

impl Streams {
    pub(super) fn new(options: HttpOptions, joined: bool) -> Self {
        Self {
            options,
            open: HashMap::default(),
            pool: Pool::default(),
            unseen: joined,
            resets: [0; RESETS],
            next_reset: 0,
            proved: false,
            losses: Losses::default(),
        }
    }

    /// The request that asked for the upgrade is the first stream's; it has been sent.
    pub(super) fn upgraded(&mut self, mut record: Record) {
        record.version = Version::Http2;
        let stream = Stream {
            record,
            request: Side {
                head: true,
                done: true,
                lost: false,
            },
            response: Side::default(),
        };
        self.open.insert(1, stream);
    }

    /// The connection has ended; its streams are told in their order.
    pub(super) fn close(&mut self, sink: &mut Sink<'_>) {
        while let Some(first) = self.open.keys().min().copied() {
            self.tell(first, sink, |stream| {
                stream.record.flags.aborted = !stream.ended() && !stream.response.lost;
            });
        }
    }

    /// Tells what has a response of which the end may have been missed, and whatever else does not end, if nothing of it
    /// came since `since_ns`.
    pub(super) fn expire(&mut self, since_ns: u64, sink: &mut Sink<'_>) {
        let over = |stream: &Stream| {
            let ended = stream.response.done || (stream.response.head && stream.response.lost);
            ended && stream.last_ns() <= since_ns
        };
        while let Some(id) = self
            .open
            .iter()
            .filter(|(_, stream)| over(stream))
            .map(|(id, _)| *id)
            .min()
        {
            self.tell(id, sink, |stream| stream.record.flags.unfinished = true);
        }
    }

    fn tell(&mut self, id: u32, sink: &mut Sink<'_>, mark: impl FnOnce(&mut Stream)) {
        let Some(mut stream) = self.open.remove(&id) else {
            return;
        };
        mark(&mut stream);
        stream.record.flags.bytes_missing |= stream.request.lost || stream.response.lost;
        sink(&stream.record.exchange());
        self.pool.put(stream.record);
    }

    /// The stream of this id, made if need be and if it may be.
    fn stream(&mut self, id: u32, way: Way) -> Option<&mut Stream> {
        if !self.open.contains_key(&id) {
            let odd = !id.is_multiple_of(2);
            if !odd || self.resets.contains(&id) || (way == Way::ToClient && !self.unseen) {
                return None;
            }
            if self.open.len() >= usize::from(self.options.max_streams.max(1)) {
                let oldest = self.open.keys().min().copied()?;
                if let Some(stream) = self.open.remove(&oldest) {
                    self.pool.put(stream.record);
                }
                self.losses.refused += 1;
            }
            let mut record = self.pool.take();
            record.version = Version::Http2;
            let mut request = Side::default();
            if way == Way::ToClient {
                // A response whose request was not seen.
                record.flags.joined = true;
                request.done = true;
            }
            let stream = Stream {
                record,
                request,
                response: Side::default(),
            };
            self.open.insert(id, stream);
        }
        self.open.get_mut(&id)
    }

    fn settle(&mut self, id: u32, sink: &mut Sink<'_>) {
        if self.open.get(&id).is_some_and(Stream::ended) {
            self.tell(id, sink, |_| ());
        }
    }

    fn count_unattributed(&mut self, bytes: u64) {
        self.losses.unattributed_bytes = self.losses.unattributed_bytes.saturating_add(bytes);
    }
}

/// Which headers are read.
pub(super) fn is_of_interest(name: &[u8]) -> bool {
    matches!(
        name,
        b":method" | b":path" | b":authority" | b":status" | b"content-type" | b"grpc-status" | b"host"
    )
}

/// Frames of one direction, as they change the streams.
pub(super) struct Frames<'p, 's, 'k> {
    pub(super) way: Way,
    pub(super) streams: &'p mut Streams,
    pub(super) decoder: &'p mut Decoder,
    pub(super) scratch: &'p mut Scratch,
    pub(super) sink: &'s mut Sink<'k>,
}

/// What a header block said.
#[derive(Debug, Default)]
struct Head {
    status: Option<u16>,
    unknown: bool,
    grpc: bool,
    grpc_status: Option<u32>,
}

impl Role for Frames<'_, '_, '_> {
    fn expects(&self, frame: &Frame) -> bool {
        let odd = !frame.stream.is_multiple_of(2);
        match frame.kind {
            Kind::Data => self.streams.open.contains_key(&frame.stream),
            Kind::Headers => odd,
            _ => true,
        }
    }

    fn block(&mut self, block: &Block<'_>) {
        let request = self.way == Way::ToServer;
        let options = self.streams.options;
        let mut head = Head::default();
        // Trailers have no names that matter; a pushed request is not followed.
        let mut nobody = Record::default();
        let stream = if block.pushed {
            None
        } else {
            self.streams.stream(block.stream, self.way)
        };
        let known = stream.is_some();
        let (record, trailers) = match stream {
            Some(stream) => {
                let trailers = stream.side(self.way).head;
                (&mut stream.record, trailers)
            }
            None => (&mut nobody, true),
        };
        let mut proved = false;
        let mut path = false;
        let result = self
            .decoder
            .decode(block.bytes, self.scratch, &mut |field| match field {
                Field::Unknown => head.unknown = true,
                Field::Known(b":status", value) => {
                    head.status = status(value);
                    proved = true;
                }
                Field::Known(b"content-type", value) => head.grpc |= value.starts_with(b"application/grpc"),
                Field::Known(b"grpc-status", value) => head.grpc_status = number(value),
                Field::Known(name, value) if request && !trailers => match name {
                    b":method" => {
                        if let Some(method) = Method::parse(value) {
                            record.set_method(method);
                            proved = true;
                        }
                    }
                    b":path" => {
                        record.set_path(value, true, &options);
                        path = true;
                    }
                    b":authority" => record.set_host(value),
                    b"host" if !record.has_host() => record.set_host(value),
                    _ => {}
                },
                Field::Known(..) => {}
            });
        if request && !trailers && !path && record.method() == Some("CONNECT") {
            record.set_path_to_host(&options);
        }
        if head.grpc || head.grpc_status.is_some() {
            record.grpc.get_or_insert(Grpc { status: None }).status = head.grpc_status;
        }
        self.streams.proved |= proved && result.is_ok();
        if result.is_err() {
            self.streams.losses.header_states += 1;
            if result == Err(super::hpack::HpackError::Malformed) {
                self.streams.losses.malformed += 1;
            }
        }
        if !known {
            self.streams.count_unattributed(block.wire_bytes);
            return;
        }
        let unknown = head.unknown || result.is_err();
        self.headers(block, &head, unknown);
    }

    fn data(&mut self, stream: u32, ts_ns: u64, bytes: u64) {
        let way = self.way;
        match self.streams.open.get_mut(&stream) {
            Some(stream) if way == Way::ToServer => add(&mut stream.record.request, ts_ns, bytes),
            Some(stream) => add(&mut stream.record.response, ts_ns, bytes),
            None => self.streams.count_unattributed(bytes),
        }
    }

    fn end_stream(&mut self, stream: u32) {
        if let Some(open) = self.streams.open.get_mut(&stream) {
            open.side(self.way).done = true;
            self.streams.settle(stream, self.sink);
        }
    }

    fn reset(&mut self, stream: u32) {
        let streams = &mut *self.streams;
        if let Some(slot) = streams.resets.get_mut(streams.next_reset % RESETS) {
            *slot = stream;
        }
        streams.next_reset = streams.next_reset.wrapping_add(1);
        // A server that has answered may reset to say that it does not want the rest of the request.
        streams.tell(stream, self.sink, |stream| {
            stream.record.flags.aborted = !stream.response.done
        });
    }

    fn go_away(&mut self, last_stream: u32) {
        if self.way == Way::ToServer {
            return;
        }
        loop {
            let streams = self.streams.open.iter();
            let refused = streams
                .filter(|(id, stream)| **id > last_stream && !stream.response.head)
                .map(|(id, _)| *id);
            let Some(id) = refused.min() else { return };
            self.streams
                .tell(id, self.sink, |stream| stream.record.flags.aborted = true);
        }
    }

    fn unattributed(&mut self, bytes: u64) {
        self.streams.count_unattributed(bytes);
    }

    fn lost(&mut self, why: Lost) {
        let losses = &mut self.streams.losses;
        losses.resyncs += 1;
        losses.malformed += u64::from(why == Lost::Malformed);
        losses.header_states += 1;
        self.decoder.forget();
        if self.way == Way::ToServer {
            self.streams.unseen = true;
        }
        let way = self.way;
        for stream in self.streams.open.values_mut() {
            let side = stream.side(way);
            side.lost |= !side.done;
        }
        if way == Way::ToServer {
            while let Some(id) = self
                .streams
                .open
                .iter()
                .filter(|(_, stream)| stream.ended())
                .map(|(id, _)| *id)
                .min()
            {
                self.streams.tell(id, self.sink, |_| ());
            }
        }
    }
}

impl Frames<'_, '_, '_> {
    /// Applies a header block to its stream.
    fn headers(&mut self, block: &Block<'_>, head: &Head, unknown: bool) {
        let way = self.way;
        let Some(stream) = self.streams.open.get_mut(&block.stream) else {
            return;
        };
        let record = &mut stream.record;
        let trailers = match way {
            Way::ToServer => stream.request.head,
            Way::ToClient => stream.response.head,
        };
        let transfer = match way {
            Way::ToServer => &mut record.request,
            Way::ToClient => &mut record.response,
        };
        add(transfer, block.first_ns, block.wire_bytes);
        if let Some(transfer) = transfer {
            transfer.last_ns = block.last_ns;
            let interim = head.status.is_some_and(|status| status < 200) && !block.end_stream;
            if !trailers && !interim {
                transfer.first_ns = block.first_ns;
                stream.side(way).head = true;
            }
        }
        let record = &mut stream.record;
        if !trailers {
            record.flags.joined |= unknown && block.whole;
            record.flags.bytes_missing |= !block.whole;
            if way == Way::ToClient && stream.response.head {
                record.status = head.status;
            }
        }
        if block.end_stream {
            stream.side(way).done = true;
            self.streams.settle(block.stream, self.sink);
        }
    }
}

fn status(value: &[u8]) -> Option<u16> {
    match value {
        [b'1'..=b'9', b'0'..=b'9', b'0'..=b'9'] => number(value).and_then(|status| u16::try_from(status).ok()),
        _ => None,
    }
}

fn number(value: &[u8]) -> Option<u32> {
    if value.is_empty() || value.len() > 9 {
        return None;
    }
    value
        .iter()
        .try_fold(0, |number, byte| Some(number * 10 + char::from(*byte).to_digit(10)?))
}
