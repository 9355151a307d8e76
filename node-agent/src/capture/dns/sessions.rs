//! From packets to look-ups: messages, the queries and answers that belong together, and what answers say. No I/O.

use ebpf_common::{
    dns::{UDP, flag},
    net::{Tuple, UdpKey, direction},
};
use records::dnsflow::Question;

use super::{
    events::Packet,
    streams::{StreamLosses, Streams},
};
use crate::{
    capture::{domains::DomainNames, ends::Ends},
    protocols::dns::{DnsError, DnsLosses, DnsOptions, DnsSession, Lookup, Message, Seen},
};

/// Between whom a look-up is, seen from the local end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Asked {
    /// The ends.
    pub(super) tuple: Tuple,
    /// UDP or TCP.
    pub(super) udp: bool,
    /// [`direction`] code: outgoing if the local end asks.
    pub(super) direction: u8,
    /// Cgroup of the local end, 0 if not known.
    pub(super) cgroup: u64,
}

/// A look-up that is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Told {
    /// Between whom.
    pub(super) asked: Asked,
    /// What was asked for, if that is to be reported.
    pub(super) question: Option<Question>,
    /// Response code, -1 without an answer.
    pub(super) rcode: i32,
    /// Time to the answer, nanoseconds.
    pub(super) latency_ns: Option<u64>,
    /// When the query passed first, monotonic nanoseconds.
    pub(super) query_ns: u64,
}

/// Messages, by what they were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Messages {
    pub(super) queries: u64,
    pub(super) retries: u64,
    pub(super) answers: u64,
    /// Answers that nobody waited for.
    pub(super) unmatched: u64,
    /// Too little of the message was seen.
    pub(super) cut: u64,
    /// No DNS.
    pub(super) malformed: u64,
    /// Queries without an answer, which may have been among packets that were lost.
    pub(super) unsure: u64,
}

/// All sockets' look-ups.
#[derive(Debug)]
pub(super) struct Sessions {
    streams: Streams,
    pairing: Pairing,
}

#[derive(Debug)]
struct Pairing {
    session: DnsSession<Asked>,
    domains: DomainNames,
    /// Questions are reported.
    questions: bool,
    told: Vec<Told>,
    messages: Messages,
    name: String,
}

/// A message with where it was seen.
struct Passed<'a> {
    tuple: Tuple,
    udp: bool,
    flags: u8,
    cgroup: u64,
    at_ns: u64,
    bytes: &'a [u8],
    true_len: u64,
}

impl Sessions {
    /// No look-up yet. Clients' answers are told to `domains`.
    pub(super) fn new(questions: bool, domains: DomainNames) -> Self {
        Self {
            streams: Streams::default(),
            pairing: Pairing {
                session: DnsSession::new(DnsOptions::default()),
                domains,
                questions,
                told: Vec::new(),
                messages: Messages::default(),
                name: String::new(),
            },
        }
    }

    /// Takes a packet; `ends` knows what was dialled where packets show something else.
    pub(super) fn packet(&mut self, packet: &Packet<'_>, ends: &Ends) {
        let head = packet.head;
        let mut passed = Passed {
            tuple: head.tuple,
            udp: head.protocol == UDP,
            flags: head.flags,
            cgroup: head.cgroup,
            at_ns: head.time_ns,
            bytes: packet.bytes,
            true_len: head.length.into(),
        };
        let pairing = &mut self.pairing;
        if passed.udp {
            pairing.message(&passed, ends);
            return;
        }
        self.streams.push(packet, &mut |message| {
            passed.bytes = &[];
            let of_stream = Passed {
                at_ns: message.last_ns,
                bytes: message.bytes,
                true_len: message.true_len,
                ..passed
            };
            pairing.message(&of_stream, ends);
        });
    }

    /// Gives up on queries that were not answered in time: all packets that passed before `now_ns` have been taken. They are
    /// told if it is `sure` that no packet was lost meanwhile.
    pub(super) fn expire(&mut self, now_ns: u64, sure: bool) {
        let Pairing {
            session,
            told,
            questions,
            messages,
            ..
        } = &mut self.pairing;
        session.expire(now_ns, &mut |lookup| {
            if sure {
                told.push(Told::new(lookup, *questions));
            } else {
                messages.unsure += 1;
            }
        });
        self.streams.expire(now_ns);
    }

    /// Look-ups that are over, since the last call.
    pub(super) fn take_told(&mut self) -> Vec<Told> {
        std::mem::take(&mut self.pairing.told)
    }

    /// Messages since the last call.
    pub(super) fn take_messages(&mut self) -> Messages {
        std::mem::take(&mut self.pairing.messages)
    }

    /// What was lost since the last call.
    pub(super) fn take_losses(&mut self) -> (DnsLosses, StreamLosses) {
        (self.pairing.session.take_losses(), self.streams.take_losses())
    }

    /// Queries that wait, and connections that are followed.
    pub(super) fn waiting(&self) -> (usize, usize) {
        (self.pairing.session.pending(), self.streams.len())
    }
}

impl Pairing {
    fn message(&mut self, passed: &Passed<'_>, ends: &Ends) {
        let message = match Message::parse(passed.bytes, passed.true_len) {
            Ok(message) => message,
            Err(DnsError::Cut) => {
                self.messages.cut += 1;
                return;
            }
            Err(DnsError::Malformed(_)) => {
                self.messages.malformed += 1;
                return;
            }
        };
        let sent = passed.flags & flag::EGRESS != 0;
        let asks = sent != message.is_response;
        let mut asked = Asked {
            tuple: passed.tuple,
            udp: passed.udp,
            direction: if asks { direction::OUTGOING } else { direction::INCOMING },
            cgroup: passed.cgroup,
        };
        if asks && sent && passed.udp && passed.flags & flag::CONNECTED == 0 {
            asked.tuple = dialled(&passed.tuple, ends);
        }
        let (told, questions) = (&mut self.told, self.questions);
        let seen = self.session.message(asked, passed.at_ns, &message, &mut |lookup| {
            told.push(Told::new(lookup, questions));
        });
        match seen {
            Seen::Query => self.messages.queries += 1,
            Seen::Retry => self.messages.retries += 1,
            Seen::Answer => self.messages.answers += 1,
            Seen::Unmatched => self.messages.unmatched += 1,
        }
        if seen == Seen::Answer
            && asks
            && let Some(question) = message.question
        {
            question.name.write_to(&mut self.name);
            let addresses = message.addresses().map(|address| (address.ip, address.ttl_s));
            self.domains
                .learn(asked.tuple.netns, &self.name, addresses, passed.at_ns);
        }
    }
}

/// The ends as the socket has them, of a packet that was sent.
fn dialled(seen: &Tuple, ends: &Ends) -> Tuple {
    let key = UdpKey {
        cookie: 0,
        local: seen.local,
        remote: seen.remote,
        local_port: seen.local_port,
        remote_port: seen.remote_port,
        _pad: 0,
    };
    let key = ends.dialled(&key, seen.netns);
    Tuple {
        local: key.local,
        remote: key.remote,
        local_port: key.local_port,
        remote_port: key.remote_port,
        netns: seen.netns,
    }
}

impl Told {
    fn new(lookup: &Lookup<'_, Asked>, questions: bool) -> Self {
        Self {
            asked: lookup.ends,
            question: questions.then(|| Question {
                name: lookup.name.into(),
                kind: kind_of(lookup.qtype).into(),
            }),
            rcode: lookup.rcode,
            latency_ns: lookup.latency_ns,
            query_ns: lookup.query_ns,
        }
    }
}

/// The name of a record type; `TYPE` and its number for a rare one, as RFC 3597 has it.
fn kind_of(qtype: u16) -> std::borrow::Cow<'static, str> {
    let name = match qtype {
        1 => "A",
        2 => "NS",
        5 => "CNAME",
        6 => "SOA",
        12 => "PTR",
        13 => "HINFO",
        15 => "MX",
        16 => "TXT",
        28 => "AAAA",
        29 => "LOC",
        33 => "SRV",
        35 => "NAPTR",
        39 => "DNAME",
        43 => "DS",
        46 => "RRSIG",
        47 => "NSEC",
        48 => "DNSKEY",
        50 => "NSEC3",
        52 => "TLSA",
        64 => "SVCB",
        65 => "HTTPS",
        99 => "SPF",
        251 => "IXFR",
        252 => "AXFR",
        255 => "ANY",
        257 => "CAA",
        other => return format!("TYPE{other}").into(),
    };
    name.into()
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use ebpf_common::dns::{PacketHead, TCP};

    use super::*;

    /// A question for `a.b`, type A, with this id.
    fn question(id: u8, response: bool) -> Vec<u8> {
        let flags = if response { 0x81 } else { 0x01 };
        let answers = u8::from(response);
        let mut bytes = vec![0, id, flags, 0, 0, 1, 0, answers, 0, 0, 0, 0];
        bytes.extend(b"\x01a\x01B\0\0\x01\0\x01");
        if response {
            bytes.extend(b"\xc0\x0c\0\x01\0\x01\0\0\0\x3c\0\x04\x0a\0\0\x09");
        }
        bytes
    }

    fn head(flags: u8, time_ns: u64, length: usize) -> PacketHead {
        PacketHead {
            protocol: UDP,
            flags,
            time_ns,
            cgroup: 4,
            length: u32::try_from(length).unwrap_or(u32::MAX),
            tuple: Tuple {
                local_port: 40_000,
                remote_port: 53,
                netns: 7,
                ..Tuple::default()
            },
            ..PacketHead::default()
        }
    }

    fn give(sessions: &mut Sessions, flags: u8, time_ns: u64, bytes: &[u8]) {
        let head = head(flags, time_ns, bytes.len());
        sessions.packet(&Packet { head, bytes }, &Ends::default());
    }

    #[test]
    fn both_roles_and_what_clients_learn() {
        let domains = DomainNames::default();
        let mut sessions = Sessions::new(true, domains.clone());
        give(&mut sessions, flag::EGRESS, 10, &question(1, false));
        give(&mut sessions, 0, 15, &question(1, true));
        // Somebody asks a server here.
        give(&mut sessions, 0, 20, &question(2, false));
        give(&mut sessions, flag::EGRESS, 23, &question(2, true));
        let told = sessions.take_told();
        let seen: Vec<_> = told
            .iter()
            .map(|told| (told.asked.direction, told.rcode, told.latency_ns, told.query_ns))
            .collect();
        assert_eq!(
            seen,
            [
                (direction::OUTGOING, 0, Some(5), 10),
                (direction::INCOMING, 0, Some(3), 20)
            ]
        );
        for told in &told {
            let question = told.question.as_ref().map(|it| (&*it.name, &*it.kind));
            assert_eq!((question, told.asked.cgroup), (Some(("a.b", "A")), 4));
        }
        let ip = IpAddr::from([10, 0, 0, 9]);
        assert_eq!(domains.name(7, ip, 15).as_deref(), Some("a.b"));
        assert_eq!(domains.name(8, ip, 15), None);
        let messages = sessions.take_messages();
        assert_eq!((messages.queries, messages.answers, messages.unmatched), (2, 2, 0));
    }

    #[test]
    fn what_is_not_answered_is_told_once_and_no_name_is_kept() {
        let mut sessions = Sessions::new(false, DomainNames::default());
        give(&mut sessions, flag::EGRESS, 10, &question(1, false));
        give(&mut sessions, flag::EGRESS, 20, &question(1, false));
        give(&mut sessions, 0, 30, b"no DNS");
        sessions.expire(5_000_000_000, true);
        assert_eq!(sessions.take_told(), []);
        sessions.expire(6_000_000_020, true);
        let told = sessions.take_told();
        assert_eq!(told.len(), 1);
        assert!(told.iter().all(|told| told.rcode == -1 && told.latency_ns.is_none()));
        assert!(told.iter().all(|told| told.question.is_none() && told.query_ns == 10));
        sessions.expire(u64::MAX, true);
        assert_eq!((sessions.take_told(), sessions.waiting()), (vec![], (0, 0)));
        // Its answer may have been lost.
        give(&mut sessions, flag::EGRESS, 40, &question(2, false));
        sessions.expire(u64::MAX, false);
        assert_eq!(sessions.take_told(), []);
        let messages = sessions.take_messages();
        assert_eq!(
            (messages.queries, messages.retries, messages.cut, messages.unsure),
            (2, 1, 1, 1)
        );
    }

    #[test]
    fn queries_of_one_connection() {
        let mut sessions = Sessions::new(true, DomainNames::default());
        let framed = |message: Vec<u8>| {
            let mut bytes = vec![0, u8::try_from(message.len()).unwrap_or(0)];
            bytes.extend(message);
            bytes
        };
        let asked: Vec<u8> = (0..3).flat_map(|id| framed(question(id, false))).collect();
        let answered: Vec<u8> = (0..3).rev().flat_map(|id| framed(question(id, true))).collect();
        for (flags, time_ns, bytes) in [(flag::EGRESS, 10, &asked), (0, 50, &answered)] {
            let head = PacketHead {
                protocol: TCP,
                ..head(flags, time_ns, bytes.len())
            };
            sessions.packet(&Packet { head, bytes }, &Ends::default());
        }
        let told = sessions.take_told();
        assert_eq!(told.len(), 3);
        assert!(told.iter().all(|told| told.latency_ns == Some(40) && !told.asked.udp));
    }

    #[test]
    fn rare_types_have_their_number() {
        assert_eq!((&*kind_of(28), &*kind_of(61_000)), ("AAAA", "TYPE61000"));
    }
}
