//! Messages of ctnetlink, as the kernel sends them: framing, one tracked connection each. No I/O.
//!
//! ```text
//! datagram ▶ nlmsghdr ▶ nfgenmsg ▶ attributes: CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, CTA_ID
//! ```
//! Strict: a length that does not fit ends the datagram with [`Item::Malformed`]; what is neither TCP nor UDP is passed
//! over. Entry: [`items`]. Layouts: `include/uapi/linux/netlink.h`, `netfilter/nfnetlink.h`,
//! `netfilter/nfnetlink_conntrack.h`.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// `NLMSG_ERROR`
pub(super) const ERROR: u16 = 2;
/// `NLMSG_DONE`
const DONE: u16 = 3;
/// `NFNL_SUBSYS_CTNETLINK`
const SUBSYSTEM: u8 = 1;
/// `IPCTNL_MSG_CT_NEW`: new ones, changed ones, and the answers to a dump.
const MSG_NEW: u8 = 0;
/// `IPCTNL_MSG_CT_GET`
const MSG_GET: u8 = 1;
/// `IPCTNL_MSG_CT_DELETE`
const MSG_DELETE: u8 = 2;
/// `NLM_F_REQUEST`
const REQUEST: u16 = 0x001;
/// `NLM_F_ACK`
const ACKNOWLEDGE: u16 = 0x004;
/// `NLM_F_DUMP`
const DUMP: u16 = 0x300;

const HEADER: usize = 16;
const FAMILY_HEADER: usize = 4;
/// Without the flags for nested and network order.
const ATTRIBUTE_TYPE: u16 = 0x3fff;

/// Attributes of a connection.
mod cta {
    pub(super) const TUPLE_ORIG: u16 = 1;
    pub(super) const TUPLE_REPLY: u16 = 2;
    pub(super) const ID: u16 = 12;
    pub(super) const TUPLE_IP: u16 = 1;
    pub(super) const TUPLE_PROTO: u16 = 2;
    pub(super) const IP_V4_SRC: u16 = 1;
    pub(super) const IP_V4_DST: u16 = 2;
    pub(super) const IP_V6_SRC: u16 = 3;
    pub(super) const IP_V6_DST: u16 = 4;
    pub(super) const PROTO_NUM: u16 = 1;
    pub(super) const PROTO_SRC_PORT: u16 = 2;
    pub(super) const PROTO_DST_PORT: u16 = 3;
}

/// Transports that are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// An address with a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct End {
    /// Address; never a v4-mapped one.
    pub ip: IpAddr,
    /// Port.
    pub port: u16,
}

/// The two ends of packets of one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tuple {
    /// Transport.
    pub protocol: Protocol,
    /// Where the packets come from.
    pub from: End,
    /// Where they go.
    pub to: End,
}

/// One tracked connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Packets of who opened it, before any translation.
    pub(super) original: Tuple,
    /// Packets that come back, before they are translated back: so to where, and from whom, the connection really is.
    pub(super) reply: Tuple,
    /// The kernel's number of it, 0 if not told. Numbers are used again.
    pub(super) id: u32,
}

/// What one message says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Item {
    /// A connection that is there.
    There(Entry),
    /// A connection that ended.
    Gone(Entry),
    /// Something else: another transport, another subsystem.
    Other,
    /// The end of a dump.
    Done,
    /// The kernel's answer to a request: an error number, or 0.
    Answer(i32),
    /// What follows cannot be read.
    Malformed,
}

/// The messages of one datagram.
pub(super) struct Items<'a> {
    rest: &'a [u8],
}

/// What the messages of one datagram say.
#[must_use]
pub(super) const fn items(datagram: &[u8]) -> Items<'_> {
    Items { rest: datagram }
}

/// Asks for all connections of the socket's namespace.
#[must_use]
pub(super) fn dump_request() -> Vec<u8> {
    // Any address family, NFNETLINK_V0, no resource.
    let kind = u16::from_le_bytes([MSG_GET, SUBSYSTEM]);
    frame(kind, REQUEST | DUMP, &[0; FAMILY_HEADER])
}

/// A request; `acknowledged` where nothing but an error number comes back.
#[must_use]
pub(super) fn request(kind: u16, acknowledged: bool, body: &[u8]) -> Vec<u8> {
    frame(kind, REQUEST | if acknowledged { ACKNOWLEDGE } else { 0 }, body)
}

fn frame(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADER + body.len()).unwrap_or(u32::MAX);
    let mut message = Vec::with_capacity(HEADER + body.len());
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    // Sequence number, port: the socket is the sender's alone.
    message.extend([0; 8]);
    message.extend(body);
    message
}

/// One attribute, padded.
#[must_use]
pub(super) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// Calls `take` with kind and body of each message that is whole.
pub(super) fn for_each(mut datagram: &[u8], take: &mut dyn FnMut(u16, &[u8])) {
    while let Some((kind, body, rest)) = message(datagram) {
        take(kind, body);
        datagram = rest;
    }
}

/// What the body of an answer says.
///
/// # Errors
/// The kernel's error.
pub(super) fn status(body: &[u8]) -> io::Result<()> {
    match number(body).map(i32::from_ne_bytes) {
        Some(0) => Ok(()),
        Some(error) => Err(io::Error::from_raw_os_error(error.saturating_neg())),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

// === impl Entry ===

impl Entry {
    /// The packets of who opened it, after all translation.
    #[must_use]
    pub(super) const fn translated(&self) -> Tuple {
        Tuple {
            protocol: self.original.protocol,
            from: self.reply.to,
            to: self.reply.from,
        }
    }
}

// === impl Items ===

impl Iterator for Items<'_> {
    type Item = Item;

    fn next(&mut self) -> Option<Item> {
        if self.rest.is_empty() {
            return None;
        }
        let Some((kind, body, rest)) = message(self.rest) else {
            self.rest = &[];
            return Some(Item::Malformed);
        };
        self.rest = rest;
        Some(match kind {
            DONE => match number::<4>(body) {
                Some(status) if i32::from_ne_bytes(status) < 0 => Item::Answer(-i32::from_ne_bytes(status)),
                _ => Item::Done,
            },
            ERROR => number::<4>(body).map_or(Item::Malformed, |status| {
                Item::Answer(i32::from_ne_bytes(status).saturating_neg())
            }),
            _ => {
                let [message, subsystem] = kind.to_le_bytes();
                match (subsystem, message) {
                    (SUBSYSTEM, MSG_NEW) => {
                        entry(body).map_or(Item::Malformed, |it| it.map_or(Item::Other, Item::There))
                    }
                    (SUBSYSTEM, MSG_DELETE) => {
                        entry(body).map_or(Item::Malformed, |it| it.map_or(Item::Other, Item::Gone))
                    }
                    _ => Item::Other,
                }
            }
        })
    }
}

/// Kind, body and what follows of the first message.
fn message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = usize::try_from(u32::from_ne_bytes(number(bytes)?)).ok()?;
    let kind = u16::from_ne_bytes(number(bytes.get(4..)?)?);
    let body = bytes.get(HEADER..length)?;
    let next = length.checked_add(3)? & !3;
    Some((kind, body, bytes.get(next..).unwrap_or_default()))
}

/// The first `N` bytes.
fn number<const N: usize>(bytes: &[u8]) -> Option<[u8; N]> {
    bytes.first_chunk().copied()
}

/// Calls `take` with each attribute's type and value; `None` if a length does not fit, or if `take` says so.
pub(super) fn attributes<'a>(mut bytes: &'a [u8], mut take: impl FnMut(u16, &'a [u8]) -> Option<()>) -> Option<()> {
    const HEAD: usize = 4;
    while bytes.len() >= HEAD {
        let length = usize::from(u16::from_ne_bytes(number(bytes)?));
        let kind = u16::from_ne_bytes(number(bytes.get(2..)?)?) & ATTRIBUTE_TYPE;
        take(kind, bytes.get(HEAD..length)?)?;
        bytes = bytes.get((length + 3) & !3..).unwrap_or_default();
    }
    bytes.is_empty().then_some(())
}

/// The connection of a message; the inner `None` if its transport is not looked at.
#[allow(clippy::option_option, reason = "malformed and passed over are two things")]
fn entry(body: &[u8]) -> Option<Option<Entry>> {
    let (mut original, mut reply, mut id) = (None, None, 0);
    attributes(body.get(FAMILY_HEADER..)?, |kind, value| {
        match kind {
            cta::TUPLE_ORIG => original = Some(tuple(value)?),
            cta::TUPLE_REPLY => reply = Some(tuple(value)?),
            cta::ID => id = u32::from_be_bytes(number(value)?),
            _ => {}
        }
        Some(())
    })?;
    let (original, reply) = (original?, reply?);
    let (Some(original), Some(reply)) = (original, reply) else {
        return Some(None);
    };
    (original.protocol == reply.protocol).then_some(Some(Entry { original, reply, id }))
}

/// The inner `None` if the transport is not looked at.
#[allow(clippy::option_option, reason = "as above")]
fn tuple(value: &[u8]) -> Option<Option<Tuple>> {
    let (mut from, mut to) = (None, None);
    let (mut protocol, mut from_port, mut to_port) = (None, None, None);
    attributes(value, |kind, value| match kind {
        cta::TUPLE_IP => attributes(value, |kind, value| {
            match kind {
                cta::IP_V4_SRC => from = Some(v4(value)?),
                cta::IP_V4_DST => to = Some(v4(value)?),
                cta::IP_V6_SRC => from = Some(v6(value)?),
                cta::IP_V6_DST => to = Some(v6(value)?),
                _ => {}
            }
            Some(())
        }),
        cta::TUPLE_PROTO => attributes(value, |kind, value| {
            match kind {
                cta::PROTO_NUM => protocol = Some(*value.first()?),
                cta::PROTO_SRC_PORT => from_port = Some(u16::from_be_bytes(number(value)?)),
                cta::PROTO_DST_PORT => to_port = Some(u16::from_be_bytes(number(value)?)),
                _ => {}
            }
            Some(())
        }),
        _ => Some(()),
    })?;
    let protocol = match i32::from(protocol?) {
        libc::IPPROTO_TCP => Protocol::Tcp,
        libc::IPPROTO_UDP => Protocol::Udp,
        _ => return Some(None),
    };
    Some(Some(Tuple {
        protocol,
        from: End {
            ip: from?,
            port: from_port?,
        },
        to: End {
            ip: to?,
            port: to_port?,
        },
    }))
}

fn v4(value: &[u8]) -> Option<IpAddr> {
    number::<4>(value).map(|octets| Ipv4Addr::from(octets).into())
}

fn v6(value: &[u8]) -> Option<IpAddr> {
    number::<16>(value).map(|octets| IpAddr::from(Ipv6Addr::from(octets)).to_canonical())
}

#[cfg(test)]
#[path = "message_tests.rs"]
mod tests;
