//! One DNS message, as far as it was captured.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::Name;

/// Type of an IPv4 address.
pub const TYPE_A: u16 = 1;
/// Type of an IPv6 address.
pub const TYPE_AAAA: u16 = 28;
const TYPE_CNAME: u16 = 5;
const TYPE_OPT: u16 = 41;
const CLASS_IN: u16 = 1;
const HEADER: usize = 12;
/// Aliases that are followed from a question to its addresses; resolvers give up at about as many.
const ALIASES_MAX: usize = 16;

/// Why bytes are no DNS message that says anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DnsError {
    /// The bytes end before the question does: because they were not all captured, or were never there.
    #[error("the message ends before its question does")]
    Cut,
    /// The bytes break the format.
    #[error("not a DNS message: {0}")]
    Malformed(&'static str),
}

/// A message: its header and first question. Records are read when asked for.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    bytes: &'a [u8],
    /// Where the records begin.
    records: usize,
    answers: u16,
    /// Transaction id.
    pub id: u16,
    /// True for an answer, false for a query.
    pub is_response: bool,
    /// 0 for a standard query.
    pub opcode: u8,
    /// The sender cut the message short: the same is going to be asked over TCP.
    pub truncated: bool,
    /// Response code, with the upper bits of EDNS.
    pub rcode: u16,
    /// False if the message was not captured to its end, or breaks the format after its question: `rcode` may lack the bits
    /// of EDNS, and answers may be missing.
    pub complete: bool,
    /// The first question; queries have one, answers nearly always repeat it.
    pub question: Option<Question<'a>>,
}

/// What is asked.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    /// The name in question.
    pub name: Name<'a>,
    /// Record type, as [`TYPE_A`].
    pub qtype: u16,
    /// 1 for the Internet.
    pub class: u16,
}

/// A resource record.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    /// Whose record it is.
    pub name: Name<'a>,
    /// How long it may be used, in seconds.
    pub ttl_s: u32,
    /// What it says.
    pub data: Data<'a>,
}

/// What a record says, as far as flows care.
#[derive(Clone, Copy, Debug)]
pub enum Data<'a> {
    /// An address.
    Address(IpAddr),
    /// The name is an alias of this one.
    Alias(Name<'a>),
    /// Another type.
    Other(u16),
}

/// An address that a question was answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The address.
    pub ip: IpAddr,
    /// How long the answer may be used, in seconds: the least of the address and the aliases on the way to it.
    pub ttl_s: u32,
}

impl<'a> Message<'a> {
    /// Reads a message of which `captured` was seen and which is `true_len` bytes long.
    ///
    /// # Errors
    /// [`DnsError`] if not even header and question can be read.
    pub fn parse(captured: &'a [u8], true_len: u64) -> Result<Self, DnsError> {
        let bytes = usize::try_from(true_len)
            .ok()
            .and_then(|len| captured.get(..len))
            .unwrap_or(captured);
        let header: &[u8; HEADER] = bytes.first_chunk().ok_or(DnsError::Cut)?;
        let [id0, id1, flags0, flags1, q0, q1, an0, an1, ns0, ns1, ar0, ar1] = *header;
        let questions = u16::from_be_bytes([q0, q1]);
        let answers = u16::from_be_bytes([an0, an1]);
        let others = u32::from(u16::from_be_bytes([ns0, ns1])) + u32::from(u16::from_be_bytes([ar0, ar1]));
        let mut message = Self {
            bytes,
            records: HEADER,
            answers,
            id: u16::from_be_bytes([id0, id1]),
            is_response: flags0 & 0x80 != 0,
            opcode: (flags0 >> 3) & 0xf,
            truncated: flags0 & 0x02 != 0,
            rcode: u16::from(flags1 & 0xf),
            complete: true,
            question: None,
        };
        for number in 0..questions {
            let (name, at) = Name::parse(bytes, message.records)?;
            let fixed: &[u8; 4] = bytes.get(at..).and_then(<[u8]>::first_chunk).ok_or(DnsError::Cut)?;
            let [t0, t1, c0, c1] = *fixed;
            message.records = at + fixed.len();
            if number == 0 {
                message.question = Some(Question {
                    name,
                    qtype: u16::from_be_bytes([t0, t1]),
                    class: u16::from_be_bytes([c0, c1]),
                });
            }
        }
        message.read_options(u32::from(answers) + others);
        message.complete &= bytes.len() as u64 == true_len;
        Ok(message)
    }

    /// Looks for the record of EDNS among all `records`.
    fn read_options(&mut self, records: u32) {
        let mut at = self.records;
        for _ in 0..records {
            let Ok((raw, next)) = Raw::parse(self.bytes, at) else {
                self.complete = false;
                return;
            };
            if raw.kind == TYPE_OPT {
                let [upper, ..] = raw.ttl_s.to_be_bytes();
                self.rcode |= u16::from(upper) << 4;
            }
            at = next;
        }
    }

    /// The records of the answer section, as far as they were captured.
    pub fn answers(&self) -> impl Iterator<Item = Record<'a>> {
        let (bytes, mut at) = (self.bytes, self.records);
        (0..self.answers).map_while(move |_| {
            let (raw, next) = Raw::parse(bytes, at).ok()?;
            at = next;
            Some(raw.record(bytes))
        })
    }

    /// The addresses that answer the question, directly or through aliases, whatever the order of the records.
    pub fn addresses(&self) -> impl Iterator<Item = Address> {
        let mut ttl_s = u32::MAX;
        let mut target = self.question.map(|question| question.name);
        for _ in 0..ALIASES_MAX {
            let alias = target.and_then(|name| {
                self.answers().find_map(|record| match record.data {
                    Data::Alias(alias) if record.name.is(name) => Some((alias, record.ttl_s)),
                    _ => None,
                })
            });
            let Some((alias, alias_ttl_s)) = alias else { break };
            ttl_s = ttl_s.min(alias_ttl_s);
            target = Some(alias);
        }
        self.answers().filter_map(move |record| match record.data {
            Data::Address(ip) if target.is_some_and(|name| record.name.is(name)) => Some(Address {
                ip,
                ttl_s: ttl_s.min(record.ttl_s),
            }),
            _ => None,
        })
    }
}

/// A record whose data is not looked into.
struct Raw<'a> {
    name: Name<'a>,
    kind: u16,
    class: u16,
    ttl_s: u32,
    data: &'a [u8],
    data_at: usize,
}

impl<'a> Raw<'a> {
    fn parse(bytes: &'a [u8], at: usize) -> Result<(Self, usize), DnsError> {
        let (name, at) = Name::parse(bytes, at)?;
        let fixed: &[u8; 10] = bytes.get(at..).and_then(<[u8]>::first_chunk).ok_or(DnsError::Cut)?;
        let [k0, k1, c0, c1, t0, t1, t2, t3, l0, l1] = *fixed;
        let data_at = at + fixed.len();
        let next = data_at + usize::from(u16::from_be_bytes([l0, l1]));
        let raw = Self {
            name,
            kind: u16::from_be_bytes([k0, k1]),
            class: u16::from_be_bytes([c0, c1]),
            ttl_s: u32::from_be_bytes([t0, t1, t2, t3]),
            data: bytes.get(data_at..next).ok_or(DnsError::Cut)?,
            data_at,
        };
        Ok((raw, next))
    }

    fn record(self, bytes: &'a [u8]) -> Record<'a> {
        let address = |ip: IpAddr| Data::Address(ip);
        let data = match (self.class, self.kind) {
            (CLASS_IN, TYPE_A) => <[u8; 4]>::try_from(self.data)
                .ok()
                .map(|ip| address(Ipv4Addr::from(ip).into())),
            (CLASS_IN, TYPE_AAAA) => <[u8; 16]>::try_from(self.data)
                .ok()
                .map(|ip| address(Ipv6Addr::from(ip).into())),
            (CLASS_IN, TYPE_CNAME) => Name::parse(bytes, self.data_at).ok().map(|(name, _)| Data::Alias(name)),
            _ => None,
        };
        Record {
            name: self.name,
            // RFC 2181: the upper half is to be read as zero.
            ttl_s: if self.ttl_s > i32::MAX as u32 { 0 } else { self.ttl_s },
            data: data.unwrap_or(Data::Other(self.kind)),
        }
    }
}
