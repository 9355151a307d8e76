//! Connections that speak HTTP, each with a session that reads both of its ways. No I/O.
//!
//! Entry: [`Connections::take`], for each event in turn.

use ahash::RandomState;
use ebpf_common::http::{flag, role, way};
use hashbrown::{HashMap, HashSet};

use super::{
    early::Early,
    events::{Data, Event, Opened, What},
    rows::{Known, Origin, Rows},
    source::From,
    stream::{Part, Stream},
};
use crate::protocols::{Heads, HttpOptions, HttpSession, Losses, Piece, Start, State, Way, way_of_frames};

/// How long a segment waits for one that it has overtaken.
const PATIENCE_NS: u64 = 1_000_000_000;
/// A connection that says nothing for so long is forgotten.
const IDLE_NS: u64 = 3600 * 1_000_000_000;
/// Events within which a connection has to show that it speaks HTTP.
const TRIAL: u32 = 256;

/// All that are followed.
#[derive(Debug)]
pub(super) struct Connections {
    open: HashMap<u64, Connection, RandomState>,
    /// Those with segments that wait for others.
    waiting: HashSet<u64, RandomState>,
    options: HttpOptions,
    heads: Heads,
    max: usize,
    counts: Counts,
    /// Cookies of sockets that are not to be followed any longer.
    quit: Vec<u64>,
    from: From,
    early: Early,
}

/// What happened since it was last asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    /// Connections for which there was no room.
    pub(super) refused: u64,
    /// Connections that made no sense as HTTP.
    pub(super) not_http: u64,
    /// Connections whose socket was not found: what came of them is in no row.
    pub(super) no_socket: u64,
    /// Events of connections that are not followed.
    pub(super) strays: u64,
    /// Bytes that nobody saw.
    pub(super) missing_bytes: u64,
    pub(super) losses: Losses,
}

#[derive(Debug)]
struct Connection {
    origin: Origin,
    /// Which end sends requests is only guessed: nothing has said it yet.
    guessed: bool,
    known: Known,
    session: HttpSession,
    /// By `ebpf_common::http::way`.
    out: Stream,
    into: Stream,
    last_ns: u64,
    events: u32,
}

impl Connections {
    /// None yet; there will be at most `max`.
    pub(super) fn new(max: usize, options: HttpOptions, from: From) -> Self {
        Self {
            open: HashMap::default(),
            waiting: HashSet::default(),
            options,
            heads: Heads::default(),
            max,
            counts: Counts::default(),
            quit: Vec::new(),
            from,
            early: Early::default(),
        }
    }

    /// Takes over an event; exchanges that end with it go into the rows.
    pub(super) fn take(&mut self, event: &Event<'_>, rows: &mut Rows) {
        match &event.what {
            What::Open(opened) => self.opened(event, opened, rows),
            What::Owner(owner) => match self.open.get_mut(&event.cookie) {
                Some(connection) => {
                    connection.origin.owner = *owner;
                    connection.known = Known::default();
                }
                None => self.counts.strays += 1,
            },
            What::Data(data) => self.data(event, data, rows),
        }
    }

    fn opened(&mut self, event: &Event<'_>, opened: &Opened, rows: &mut Rows) {
        if let Some(connection) = self.open.get_mut(&event.cookie) {
            if opened.owner.pid != 0 {
                connection.origin.owner = opened.owner;
            }
            connection.known = Known::default();
            return;
        }
        if self.open.len() >= self.max {
            self.counts.refused += 1;
            self.quit.push(event.cookie);
            return;
        }
        let start = if opened.fresh { Start::Fresh } else { Start::Joined };
        let client = match opened.role {
            role::CLIENT => true,
            role::SERVER => false,
            // Servers mostly have the lower port.
            _ => opened.tuple.local_port > opened.tuple.remote_port,
        };
        self.open.insert(
            event.cookie,
            Connection {
                origin: Origin {
                    tuple: opened.tuple,
                    client,
                    owner: opened.owner,
                },
                guessed: !matches!(opened.role, role::CLIENT | role::SERVER),
                known: Known::default(),
                session: HttpSession::new(start, self.options),
                out: Stream::new(opened.next[0]),
                into: Stream::new(opened.next[1]),
                last_ns: event.time_ns,
                events: 0,
            },
        );
        for early in self.early.take(event.cookie) {
            let event = Event {
                time_ns: early.time_ns,
                what: What::Data(early.data()),
                ..*event
            };
            self.take(&event, rows);
        }
    }

    fn data(&mut self, event: &Event<'_>, data: &Data<'_>, rows: &mut Rows) {
        let Some(connection) = self.open.get_mut(&event.cookie) else {
            // Ends come after the end. Of anything else the kernel side has not heard, or no longer knows.
            if self.from == From::Calls {
                return self.wait_for_socket(event, data);
            }
            if data.len > 0 {
                self.counts.strays += 1;
                self.quit.push(event.cookie);
            }
            return;
        };
        connection.last_ns = event.time_ns;
        connection.events = connection.events.saturating_add(1);
        let egress = data.way == way::EGRESS;
        if data.flags & flag::DROPPED != 0 {
            return self.remove(event.cookie);
        }
        if connection.guessed
            && let Some(way) = way_of_frames(data.captured)
        {
            connection.guessed = false;
            let client = (way == Way::ToServer) == egress;
            if client != connection.origin.client {
                connection.origin.client = client;
                connection.known = Known::default();
                // What it was given so far went the other way.
                self.counts.losses.add(connection.session.take_losses());
                connection.session = HttpSession::new(Start::Joined, self.options);
            }
        }
        if data.len > 0 {
            let in_order = egress || self.from == From::Calls;
            self.counts.missing_bytes += connection.push(egress, in_order, event.time_ns, data, &mut self.heads, rows);
        }
        if data.flags & flag::FIN != 0 {
            let stream = if egress {
                &mut connection.out
            } else {
                &mut connection.into
            };
            stream.ends_at(data.seq);
        }
        let waits = connection.into.waits_since().is_some();
        let fate = connection.fate(data.flags & flag::RESET != 0);
        if waits {
            self.waiting.insert(event.cookie);
        }
        self.settle(event.cookie, fate, rows);
    }

    /// Keeps what came before its socket was known.
    fn wait_for_socket(&mut self, event: &Event<'_>, data: &Data<'_>) {
        if data.flags != 0 {
            // It is over, or switched off, and there never was a socket.
            if !self.early.take(event.cookie).is_empty() && data.flags & flag::DROPPED == 0 {
                self.counts.no_socket += 1;
            }
        } else if !self.early.keep(event.cookie, event.time_ns, data) {
            self.counts.strays += 1;
        }
    }

    /// Ends all connections of processes that have ended.
    pub(super) fn end_of(&mut self, pids: &[u32], rows: &mut Rows) {
        let over =
            |(cookie, connection): (&u64, &Connection)| pids.contains(&connection.origin.owner.pid).then_some(*cookie);
        let over: Vec<u64> = self.open.iter().filter_map(over).collect();
        for cookie in over {
            self.settle(cookie, Fate::Over, rows);
        }
    }

    /// Ends what is over.
    fn settle(&mut self, cookie: u64, fate: Fate, rows: &mut Rows) {
        match fate {
            Fate::GoesOn => {}
            Fate::Over => {
                if let Some(connection) = self.open.get_mut(&cookie) {
                    self.counts.missing_bytes += connection.close(&mut self.heads, rows);
                }
                self.remove(cookie);
            }
            Fate::NotFollowed(why) => {
                self.counts.not_http += u64::from(why == State::NotHttp);
                self.quit.push(cookie);
                self.remove(cookie);
            }
        }
    }

    fn remove(&mut self, cookie: u64) {
        self.waiting.remove(&cookie);
        if let Some(mut connection) = self.open.remove(&cookie) {
            self.counts.losses.add(connection.session.take_losses());
        }
    }

    /// Waits no longer for segments that should have come by now.
    pub(super) fn look_at_waiting(&mut self, now_ns: u64, rows: &mut Rows) {
        let waiting: Vec<u64> = self.waiting.iter().copied().collect();
        for cookie in waiting {
            let Some(connection) = self.open.get_mut(&cookie) else {
                self.waiting.remove(&cookie);
                continue;
            };
            match connection.into.waits_since() {
                None => drop(self.waiting.remove(&cookie)),
                Some(since) if now_ns.saturating_sub(since) < PATIENCE_NS => {}
                Some(_) => {
                    self.counts.missing_bytes += connection.give_up(&mut self.heads, rows);
                    self.waiting.remove(&cookie);
                    let fate = connection.fate(false);
                    self.settle(cookie, fate, rows);
                }
            }
        }
    }

    /// Tells exchanges whose end cannot be seen, of which nothing came since `since_ns`. To be called once per interval.
    pub(super) fn end_interval(&mut self, now_ns: u64, since_ns: u64, rows: &mut Rows) {
        let mut idle = Vec::new();
        for (cookie, connection) in &mut self.open {
            let Connection {
                origin, known, session, ..
            } = connection;
            session.expire(since_ns, &mut |exchange| rows.add(origin, known, exchange));
            self.counts.losses.add(session.take_losses());
            if now_ns.saturating_sub(connection.last_ns) > IDLE_NS {
                idle.push(*cookie);
            }
        }
        for cookie in idle {
            self.settle(cookie, Fate::Over, rows);
        }
        self.counts.no_socket += self.early.expire(now_ns).len() as u64;
        if self.open.capacity() > 4 * self.open.len() + 1024 {
            self.open.shrink_to_fit();
        }
    }

    /// Sockets that are not to be followed any longer, since the last call.
    pub(super) fn take_quit(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.quit)
    }

    /// What happened since the last call.
    pub(super) fn take_counts(&mut self) -> Counts {
        std::mem::take(&mut self.counts)
    }

    /// Number of connections.
    pub(super) fn len(&self) -> usize {
        self.open.len()
    }
}

/// What becomes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    GoesOn,
    Over,
    NotFollowed(State),
}

impl Connection {
    /// Reads bytes; gives how many were not seen.
    fn push(
        &mut self,
        egress: bool,
        in_order: bool,
        time_ns: u64,
        data: &Data<'_>,
        heads: &mut Heads,
        rows: &mut Rows,
    ) -> u64 {
        let Self {
            origin,
            known,
            session,
            out,
            into,
            ..
        } = self;
        let way = way_of(egress, origin.client);
        let mut give = |part: Part<'_>| read((session, heads), way, part, (origin, known), rows);
        let stream = if egress { out } else { into };
        stream.push(time_ns, data, in_order, &mut give)
    }

    /// Waits for no segment any longer; gives how many bytes were not seen.
    fn give_up(&mut self, heads: &mut Heads, rows: &mut Rows) -> u64 {
        let Self {
            origin,
            known,
            session,
            into,
            ..
        } = self;
        let way = way_of(false, origin.client);
        into.give_up(&mut |part| read((session, heads), way, part, (origin, known), rows))
    }

    /// Tells what was under way.
    fn close(&mut self, heads: &mut Heads, rows: &mut Rows) -> u64 {
        let missing = self.give_up(heads, rows);
        let Self {
            origin, known, session, ..
        } = self;
        session.close(&mut |exchange| rows.add(origin, known, exchange));
        missing
    }

    fn fate(&self, reset: bool) -> Fate {
        match self.session.state() {
            State::Active => {}
            other => return Fate::NotFollowed(other),
        }
        if self.events > TRIAL && !self.session.is_proved() {
            return Fate::NotFollowed(State::NotHttp);
        }
        let answers = if self.origin.client { &self.into } else { &self.out };
        if reset || answers.is_over() {
            Fate::Over
        } else {
            Fate::GoesOn
        }
    }
}

fn way_of(egress: bool, client: bool) -> Way {
    if egress == client { Way::ToServer } else { Way::ToClient }
}

fn read(
    (session, heads): (&mut HttpSession, &mut Heads),
    way: Way,
    part: Part<'_>,
    (origin, known): (&Origin, &mut Known),
    rows: &mut Rows,
) {
    let piece = Piece {
        way,
        ts_ns: part.time_ns,
        captured: part.captured,
        true_len: part.len,
    };
    session.push_with(&piece, heads, &mut |exchange| rows.add(origin, known, exchange));
}

#[cfg(test)]
#[path = "connections_tests.rs"]
mod tests;
