//! Which response answers which request: in the order of the requests, as HTTP/1 has it.

use std::collections::VecDeque;

use super::{
    head::{self, Fields, Upgrade},
    heads::Said,
    lines::Line,
    wire::{Body, First, Lost, Malformed, Role},
};
use crate::protocols::{
    HttpOptions, Losses, Sink, Transfer, Verdict, Version, classify,
    record::{Pool, Record, add},
};

/// Bytes of names that the requests in the queue may hold together.
const NAMES_MAX: usize = 128 * 1024;

/// The requests that wait, and the response under way.
#[derive(Debug)]
pub(super) struct Pairing {
    options: HttpOptions,
    queue: VecDeque<Pending>,
    pool: Pool,
    /// Bytes of names that the queue holds.
    names: usize,
    /// Where the bytes of the request direction belong.
    sending: Sending,
    /// Requests behind the queue that found no room in it.
    refused: u64,
    /// The headers of the one of them that is being received.
    refused_fields: Fields,
    reply: Option<Reply>,
    /// More than one request was seen waiting.
    pipelined: bool,
    /// Whether pairs may be wrong because the connection was joined in the middle, until nothing waits.
    joined: bool,
    /// The same because requests were not captured.
    missed: bool,
    /// Responses may have passed unseen.
    replies_missed: bool,
    pub(super) losses: Losses,
    /// What the connection is used for from now on.
    pub(super) switch: Option<Switch>,
}

/// What comes after HTTP/1.
#[derive(Debug)]
pub(super) enum Switch {
    /// The client began with the preface of HTTP/2, of which the first line has been read.
    Preface,
    /// HTTP/2, by agreement; this request is its first stream's.
    H2c(Record),
    /// Something else.
    Opaque,
}

/// A request in the queue.
#[derive(Debug)]
struct Pending {
    record: Record,
    fields: Fields,
    sent: Sent,
    /// Its part of [`Pairing::names`].
    names: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sent {
    Open,
    /// Its end was not seen.
    Lost,
    Done,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sending {
    Nothing,
    /// The last request in the queue.
    Last,
    /// One that found no room.
    Refused,
}

/// A response, from its first byte until its exchange is told.
#[derive(Debug)]
struct Reply {
    transfer: Transfer,
    status: Option<u16>,
    version: Version,
    fields: Fields,
    /// It answers the first request in the queue; otherwise one that is not known.
    known: bool,
    /// What was read was an interim response: the final one is to come.
    interim: bool,
    sent: Sent,
}

impl Pairing {
    pub(super) fn new(options: HttpOptions, joined: bool) -> Self {
        Self {
            options,
            queue: VecDeque::new(),
            pool: Pool::default(),
            names: 0,
            sending: Sending::Nothing,
            refused: 0,
            refused_fields: Fields::default(),
            reply: None,
            pipelined: false,
            joined,
            missed: false,
            replies_missed: joined,
            losses: Losses::default(),
            switch: None,
        }
    }

    /// The connection has ended. `until_close`: and with it, properly, the response.
    pub(super) fn close(&mut self, until_close: bool, sink: &mut Sink<'_>) {
        if let Some(reply) = &mut self.reply
            && until_close
            && !reply.interim
        {
            reply.sent = Sent::Done;
        }
        self.settle(sink);
        if let Some(reply) = self.reply.take() {
            let aborted = reply.sent != Sent::Lost;
            self.tell(Some(reply), sink, |record| record.flags.aborted = aborted);
        }
        while !self.queue.is_empty() {
            self.tell(None, sink, |record| record.flags.aborted = true);
        }
        self.sending = Sending::Nothing;
        self.refused = 0;
    }

    /// Tells the exchange at hand if its end cannot be seen and nothing of it came since `since_ns`.
    pub(super) fn expire(&mut self, since_ns: u64, sink: &mut Sink<'_>) {
        let Some(reply) = &self.reply else { return };
        let request = self
            .queue
            .front()
            .filter(|_| reply.known)
            .and_then(|front| front.record.request);
        let last_ns = reply.transfer.last_ns.max(request.map_or(0, |request| request.last_ns));
        let ended = match reply.sent {
            Sent::Open => false,
            Sent::Lost => reply.status.is_some(),
            // The server answered without waiting for the request's end.
            Sent::Done => true,
        };
        if ended && last_ns <= since_ns {
            let reply = self.reply.take();
            self.tell(reply, sink, |record| record.flags.unfinished = true);
        }
    }

    /// Tells the exchange at hand if both of its messages have ended.
    fn settle(&mut self, sink: &mut Sink<'_>) {
        let ended = match &self.reply {
            Some(reply) if reply.sent == Sent::Done && !reply.interim => {
                !reply.known || self.queue.front().is_none_or(|front| front.sent != Sent::Open)
            }
            _ => false,
        };
        if ended {
            let reply = self.reply.take();
            self.tell(reply, sink, |_| ());
        }
    }

    /// Tells the exchange of `reply`, or of the first request if there is none.
    fn tell(&mut self, reply: Option<Reply>, sink: &mut Sink<'_>, mark: impl FnOnce(&mut Record)) {
        let mut record = if reply.as_ref().is_none_or(|reply| reply.known) {
            match self.queue.pop_front() {
                Some(front) => {
                    self.names -= front.names;
                    if self.queue.is_empty() && self.sending == Sending::Last {
                        self.sending = Sending::Nothing;
                    }
                    front.record
                }
                None => self.pool.take(),
            }
        } else {
            self.refused = self.refused.saturating_sub(1);
            self.pool.take()
        };
        // An interim response alone is none.
        if let Some(reply) = reply.filter(|reply| !reply.interim) {
            record.version = reply.version;
            record.status = reply.status;
            record.response = Some(reply.transfer);
            record.flags.bytes_missing |= reply.sent == Sent::Lost;
        }
        record.flags.joined |= self.joined;
        record.flags.bytes_missing |= self.missed;
        mark(&mut record);
        sink(&record.exchange());
        self.pool.put(record);
        if self.queue.is_empty() && self.refused == 0 {
            // What comes next is a pair again.
            self.joined = false;
            self.missed = false;
            self.pipelined = false;
        }
        if self.queue.is_empty() && self.queue.capacity() > 64 {
            self.queue = VecDeque::new();
        }
    }

    fn unattributed(&mut self, bytes: u64) {
        self.losses.unattributed_bytes = self.losses.unattributed_bytes.saturating_add(bytes);
    }

    fn count_loss(&mut self, why: Lost) {
        self.losses.resyncs += 1;
        self.losses.malformed += u64::from(why == Lost::Malformed);
    }
}

/// The request direction.
pub(super) struct Requests<'p, 's, 'k> {
    pub(super) pairing: &'p mut Pairing,
    pub(super) sink: &'s mut Sink<'k>,
}

impl Requests<'_, '_, '_> {
    fn last(&mut self) -> Option<&mut Pending> {
        match self.pairing.sending {
            Sending::Last => self.pairing.queue.back_mut(),
            _ => None,
        }
    }
}

impl Role for Requests<'_, '_, '_> {
    fn begins(&self, bytes: &[u8]) -> bool {
        classify(bytes) == Verdict::Http1Request
    }

    fn may_end(&self) -> bool {
        false
    }

    fn is_doubtful(&self) -> bool {
        false
    }

    fn start(&mut self, ts_ns: u64) {
        let pairing = &mut *self.pairing;
        let lost_reply = pairing
            .reply
            .as_ref()
            .is_some_and(|reply| reply.sent == Sent::Lost && reply.known);
        if lost_reply && !pairing.pipelined && pairing.queue.len() == 1 {
            // The client has the response, or it would not go on.
            let reply = pairing.reply.take();
            pairing.tell(reply, self.sink, |_| ());
        } else if !pairing.queue.is_empty() && !pairing.replies_missed {
            pairing.pipelined = true;
        }
        let full = pairing.queue.len() >= usize::from(pairing.options.max_pending) || pairing.names > NAMES_MAX;
        if full || pairing.refused > 0 {
            pairing.refused += 1;
            pairing.losses.refused += 1;
            pairing.refused_fields = Fields::default();
            pairing.sending = Sending::Refused;
            return;
        }
        let mut record = pairing.pool.take();
        add(&mut record.request, ts_ns, 0);
        if pairing.queue.capacity() == 0 {
            // Most connections have one request at a time.
            pairing.queue.reserve_exact(1);
        }
        pairing.queue.push_back(Pending {
            record,
            fields: Fields::default(),
            sent: Sent::Open,
            names: 0,
        });
        pairing.sending = Sending::Last;
    }

    fn first_line(&mut self, line: Line<'_>, whole: bool) -> Result<First, Malformed> {
        let options = self.pairing.options;
        let first = match self.last() {
            Some(last) => head::request_line(line, whole, &mut last.record, &options)?,
            // Read all the same: it says whether this is HTTP.
            None => {
                let mut record = self.pairing.pool.take();
                let first = head::request_line(line, whole, &mut record, &options);
                self.pairing.pool.put(record);
                first?
            }
        };
        if first == First::Stop {
            self.pairing.queue.pop_back();
            self.pairing.switch = Some(Switch::Preface);
        }
        Ok(first)
    }

    fn header(&mut self, line: &[u8]) -> Result<(), Malformed> {
        match self.last() {
            Some(last) => {
                if let Some(host) = last.fields.line(line)?
                    && !last.record.has_host()
                {
                    last.record.set_host(host);
                }
            }
            None => {
                self.pairing.refused_fields.line(line)?;
            }
        }
        Ok(())
    }

    fn says(&mut self, said: &Said) -> bool {
        let Said::Request(record, fields) = said else {
            return false;
        };
        match self.last() {
            Some(last) => {
                last.record.take_names(record);
                last.fields = *fields;
            }
            None => self.pairing.refused_fields = *fields,
        }
        true
    }

    fn tell(&self, said: &mut Said) {
        let last = match self.pairing.sending {
            Sending::Last => self.pairing.queue.back(),
            _ => None,
        };
        let Some(last) = last.filter(|last| last.record.has_common_method()) else {
            *said = Said::Nothing;
            return;
        };
        match said {
            Said::Request(record, fields) => {
                record.take_names(&last.record);
                *fields = last.fields;
            }
            _ => {
                let mut record = Record::default();
                record.take_names(&last.record);
                *said = Said::Request(record, last.fields);
            }
        }
    }

    fn head_done(&mut self) -> Result<Body, Malformed> {
        let Some(last) = self.last() else {
            return Ok(self.pairing.refused_fields.request_body());
        };
        last.names = last.record.names();
        let (names, body) = (last.names, last.fields.request_body());
        self.pairing.names += names;
        Ok(body)
    }

    fn count(&mut self, ts_ns: u64, bytes: u64) {
        match self.pairing.sending {
            Sending::Last => {
                if let Some(last) = self.pairing.queue.back_mut() {
                    add(&mut last.record.request, ts_ns, bytes);
                }
            }
            Sending::Nothing | Sending::Refused => self.pairing.unattributed(bytes),
        }
    }

    fn done(&mut self) {
        if let Some(last) = self.last() {
            last.sent = Sent::Done;
        }
        self.pairing.sending = Sending::Nothing;
        self.pairing.settle(self.sink);
    }

    fn lost(&mut self, why: Lost) {
        self.pairing.count_loss(why);
        if why == Lost::Uncaptured {
            self.pairing.missed = true;
        }
        if let Some(last) = self.last() {
            if why == Lost::Malformed && last.record.method().is_none() {
                // This was no request.
                if let Some(pending) = self.pairing.queue.pop_back() {
                    let bytes = pending.record.request.map_or(0, |request| request.bytes);
                    self.pairing.unattributed(bytes);
                    self.pairing.pool.put(pending.record);
                }
                self.pairing.sending = Sending::Nothing;
                return;
            }
            last.sent = Sent::Lost;
            last.record.flags.bytes_missing = true;
        }
        self.pairing.settle(self.sink);
    }
}

/// The response direction.
pub(super) struct Replies<'p, 's, 'k> {
    pub(super) pairing: &'p mut Pairing,
    pub(super) sink: &'s mut Sink<'k>,
}

impl Role for Replies<'_, '_, '_> {
    fn begins(&self, bytes: &[u8]) -> bool {
        classify(bytes) == Verdict::Http1Response
    }

    fn may_end(&self) -> bool {
        self.is_doubtful() || self.pairing.queue.len() > 1
    }

    /// The answer to a request that was not seen: if that was a HEAD, there is no body, whatever the headers say.
    fn is_doubtful(&self) -> bool {
        self.pairing.reply.as_ref().is_some_and(|reply| !reply.known)
    }

    fn start(&mut self, ts_ns: u64) {
        let pairing = &mut *self.pairing;
        if let Some(reply) = pairing.reply.as_mut().filter(|reply| reply.interim) {
            reply.interim = false;
            reply.status = None;
            reply.fields = Fields::default();
            reply.transfer.first_ns = ts_ns;
            reply.sent = Sent::Open;
            return;
        }
        if let Some(reply) = pairing.reply.take() {
            // The server goes on, so it is done with the one before.
            pairing.tell(Some(reply), self.sink, |_| ());
        }
        if std::mem::take(&mut pairing.replies_missed) && pairing.queue.len() > 1 {
            if pairing.pipelined {
                // Which of them this one answers is a guess.
                pairing.missed = true;
            } else {
                // Of one request at a time all but the last have their responses.
                while pairing.queue.len() > 1 {
                    pairing.tell(None, self.sink, |record| record.flags.bytes_missing = true);
                }
            }
        }
        pairing.reply = Some(Reply {
            transfer: Transfer {
                first_ns: ts_ns,
                last_ns: ts_ns,
                bytes: 0,
            },
            status: None,
            version: Version::default(),
            fields: Fields::default(),
            known: !pairing.queue.is_empty(),
            interim: false,
            sent: Sent::Open,
        });
    }

    fn first_line(&mut self, line: Line<'_>, whole: bool) -> Result<First, Malformed> {
        let (version, status) = head::status_line(line)?;
        // Of a cut line, the reason need not be there, but the whole status.
        if !whole && line.bytes.len() < 13 {
            return Err(Malformed);
        }
        if let Some(reply) = &mut self.pairing.reply {
            reply.version = version;
            reply.status = Some(status);
        }
        Ok(First::Message)
    }

    fn header(&mut self, line: &[u8]) -> Result<(), Malformed> {
        if let Some(reply) = &mut self.pairing.reply {
            reply.fields.line(line)?;
        }
        Ok(())
    }

    fn says(&mut self, said: &Said) -> bool {
        let (Said::Reply(version, status, fields), Some(reply)) = (said, &mut self.pairing.reply) else {
            return false;
        };
        reply.version = *version;
        reply.status = Some(*status);
        reply.fields = *fields;
        true
    }

    fn tell(&self, said: &mut Said) {
        let reply = self.pairing.reply.as_ref();
        *said = match reply.and_then(|reply| Some((reply.version, reply.status?, reply.fields))) {
            Some((version, status, fields)) => Said::Reply(version, status, fields),
            None => Said::Nothing,
        };
    }

    fn head_done(&mut self) -> Result<Body, Malformed> {
        let pairing = &mut *self.pairing;
        let Some(reply) = &mut pairing.reply else {
            return Err(Malformed);
        };
        let status = reply.status.ok_or(Malformed)?;
        let request = pairing.queue.front_mut().filter(|_| reply.known);
        let method = request.as_ref().and_then(|request| request.record.method());
        match status {
            101 => {
                let switch = match request {
                    Some(request) if request.fields.upgrade == Upgrade::H2c => {
                        let mut record = std::mem::take(&mut request.record);
                        pairing.names -= request.names;
                        add(&mut record.response, reply.transfer.first_ns, reply.transfer.bytes);
                        pairing.queue.pop_front();
                        pairing.sending = Sending::Nothing;
                        pairing.reply = None;
                        record.flags.joined |= pairing.joined;
                        record.flags.bytes_missing |= pairing.missed;
                        Switch::H2c(record)
                    }
                    _ => {
                        reply.sent = Sent::Done;
                        let reply = pairing.reply.take();
                        pairing.tell(reply, self.sink, |_| ());
                        Switch::Opaque
                    }
                };
                pairing.switch = Some(switch);
                Ok(Body::Stop)
            }
            100..=199 => {
                reply.interim = true;
                Ok(Body::Fixed(0))
            }
            200..=299 if method == Some("CONNECT") => {
                reply.sent = Sent::Done;
                let reply = pairing.reply.take();
                pairing.tell(reply, self.sink, |_| ());
                pairing.switch = Some(Switch::Opaque);
                Ok(Body::Stop)
            }
            204 | 304 => Ok(Body::Fixed(0)),
            _ if method == Some("HEAD") => Ok(Body::Fixed(0)),
            _ => Ok(reply.fields.response_body()),
        }
    }

    fn count(&mut self, ts_ns: u64, bytes: u64) {
        match &mut self.pairing.reply {
            Some(reply) if reply.sent != Sent::Done => {
                reply.transfer.last_ns = ts_ns;
                reply.transfer.bytes = reply.transfer.bytes.saturating_add(bytes);
            }
            _ => self.pairing.unattributed(bytes),
        }
    }

    fn done(&mut self) {
        if let Some(reply) = &mut self.pairing.reply
            && !reply.interim
        {
            if reply.sent == Sent::Open {
                reply.sent = Sent::Done;
                self.pairing.settle(self.sink);
            } else {
                let reply = self.pairing.reply.take();
                self.pairing.tell(reply, self.sink, |_| ());
            }
        }
    }

    fn lost(&mut self, why: Lost) {
        self.pairing.count_loss(why);
        self.pairing.replies_missed = true;
        match &mut self.pairing.reply {
            Some(reply) if reply.status.is_some() && !reply.interim => reply.sent = Sent::Lost,
            Some(reply) if !reply.interim => {
                // Nothing of it is known but that it began.
                let bytes = reply.transfer.bytes;
                self.pairing.unattributed(bytes);
                self.pairing.reply = None;
            }
            _ => {}
        }
    }
}
