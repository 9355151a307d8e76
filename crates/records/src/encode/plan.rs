//! Plans: the column table worked out for one row shape and one format.
//!
//! A [`Shape`] is all that decides which columns a row has and which of them are constant. A [`Plan`] is the ready
//! bytes between the values (keys, constant tags, global tags) and, in order, what to read where.

use std::{borrow::Cow, ops::Range};

use super::{EncodeOptions, Format, check, json, line, protobuf, row::Row};
use crate::{
    Direction, Family, Measurement, Str, Transport,
    column::{Cell, Column, Counter, K8sKey, Output, Part, Role, Side, TextOf, Type},
};

/// Text written where a value is not available.
pub(super) const NOT_AVAILABLE: &str = "N/A";

/// What decides the columns of a row, packed into 7 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape(u8);

/// Ready bytes and reads of one shape.
#[derive(Debug)]
pub(super) struct Plan {
    /// All ready bytes, followed by [`PADDING`] zeros so that a fixed-size copy from any key stays inside.
    pub(super) blob: Vec<u8>,
    /// Reads in output order.
    pub(super) ops: Vec<Op>,
    /// Bytes after the last read.
    pub(super) tail: Range<usize>,
    /// Room that a row of this plan needs, texts counted with [`INLINE_TEXT`] bytes each.
    pub(super) budget: usize,
}

/// Write `lead`, then `key` and the value; formats that leave out empty values leave out `key` with them.
#[derive(Debug)]
pub(super) struct Op {
    pub(super) lead: Range<usize>,
    pub(super) key: Range<usize>,
    pub(super) read: Read,
    pub(super) kind: Kind,
    /// First field after the tags.
    pub(super) first_field: bool,
}

/// Longest key a fixed-size copy takes; longer ones take the general way.
pub(super) const PADDING: usize = 32;
/// Text length that [`Plan::budget`] includes per read.
pub(super) const INLINE_TEXT: usize = 64;

/// What a value is written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Tag,
    Field(Type),
}

/// One end of the row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Local,
    Remote,
}

/// A value that differs from row to row within a shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Read {
    Time,
    Ip(End),
    IpType(End),
    Port(End),
    NatIp,
    NatPort,
    Domain,
    Pid,
    ProcessName,
    Netns,
    K8s(End, K8sKey),
    /// Value of a label of the local end, by its place.
    Label(usize),
    Counter(Counter),
    /// A text of this kind of record.
    Text(TextOf),
    Truncated,
}

/// A column within a shape.
enum Resolved {
    Absent,
    Constant(&'static str),
    Read(Read),
}

/// One key of the output with its value.
pub(super) struct Entry<'a> {
    pub(super) key: &'a str,
    pub(super) kind: Kind,
    pub(super) value: EntryValue<'a>,
}

/// Value of an [`Entry`].
pub(super) enum EntryValue<'a> {
    Constant(Cow<'a, str>),
    Read(Read),
}

/// Collects ready bytes and reads.
#[derive(Default)]
pub(super) struct PlanBuilder {
    blob: Vec<u8>,
    lead_from: usize,
    ops: Vec<Op>,
    fields: bool,
}

// === impl Shape ===

impl Shape {
    /// Number of different shapes.
    pub(super) const COUNT: usize = 128;

    const UDP: u8 = 1;
    const V6: u8 = 1 << 1;
    const INCOMING: u8 = 1 << 2;
    const LOCAL_K8S: u8 = 1 << 3;
    const REMOTE_K8S: u8 = 1 << 4;
    const NAT: u8 = 1 << 5;
    const OPTIONAL: u8 = 1 << 6;

    #[inline]
    pub(super) fn of(row: &impl Row) -> Self {
        let bit = |set: bool, mask: u8| if set { mask } else { 0 };
        Self(
            bit(row.transport() == Transport::Udp, Self::UDP)
                | bit(row.family() == Family::V6, Self::V6)
                | bit(row.direction() == Direction::Incoming, Self::INCOMING)
                | bit(row.k8s(End::Local).is_some(), Self::LOCAL_K8S)
                | bit(row.k8s(End::Remote).is_some(), Self::REMOTE_K8S)
                | bit(row.nat().is_some(), Self::NAT)
                | bit(row.has_optional(), Self::OPTIONAL),
        )
    }

    #[inline]
    pub(super) const fn index(self) -> usize {
        self.0 as usize
    }

    const fn has(self, mask: u8) -> bool {
        self.0 & mask != 0
    }

    const fn end(self, side: Side) -> End {
        match (side, self.has(Self::INCOMING)) {
            (Side::Local, _) | (Side::Client, false) | (Side::Server, true) => End::Local,
            (Side::Remote, _) | (Side::Client, true) | (Side::Server, false) => End::Remote,
        }
    }

    fn resolve(self, cell: Cell) -> Resolved {
        let pick = |mask, yes, no| Resolved::Constant(if self.has(mask) { yes } else { no });
        let any_k8s = self.has(Self::LOCAL_K8S | Self::REMOTE_K8S);
        let outgoing = !self.has(Self::INCOMING);
        Resolved::Read(match cell {
            Cell::Fixed(text) | Cell::Default(text) => return Resolved::Constant(text),
            Cell::Direction => return pick(Self::INCOMING, "incoming", "outgoing"),
            Cell::Family => return pick(Self::V6, "IPv6", "IPv4"),
            Cell::Transport => return pick(Self::UDP, "udp", "tcp"),
            Cell::ConnSide => return pick(Self::INCOMING, "server", "client"),
            Cell::SubSource => return pick(Self::LOCAL_K8S | Self::REMOTE_K8S, "K8s", NOT_AVAILABLE),
            Cell::Ip(side) => Read::Ip(self.end(side)),
            Cell::IpType(side) => Read::IpType(self.end(side)),
            Cell::Port(side) => Read::Port(self.end(side)),
            Cell::NatIp | Cell::NatPort if !self.has(Self::NAT) => return Resolved::Constant(NOT_AVAILABLE),
            Cell::NatIp => Read::NatIp,
            Cell::NatPort => Read::NatPort,
            Cell::Domain => Read::Domain,
            Cell::ServerDomain if outgoing => Read::Domain,
            Cell::ServerDomain => return Resolved::Constant(""),
            Cell::Pid => Read::Pid,
            Cell::ProcessName => Read::ProcessName,
            Cell::Netns => Read::Netns,
            Cell::K8s(..) if !any_k8s => return Resolved::Absent,
            Cell::K8s(side, key) => {
                let end = self.end(side);
                let mask = if end == End::Local {
                    Self::LOCAL_K8S
                } else {
                    Self::REMOTE_K8S
                };
                if !self.has(mask) {
                    return Resolved::Constant(NOT_AVAILABLE);
                }
                Read::K8s(end, key)
            }
            Cell::Counter(counter) => Read::Counter(counter),
            Cell::TcpCounter(_) if self.has(Self::UDP) => return Resolved::Absent,
            Cell::UdpCounter(_) if !self.has(Self::UDP) => return Resolved::Absent,
            Cell::TcpCounter(counter) | Cell::UdpCounter(counter) => Read::Counter(counter),
            Cell::Optional(_) if !self.has(Self::OPTIONAL) => return Resolved::Absent,
            Cell::Optional(Part::Text(text)) | Cell::Text(text) => Read::Text(text),
            Cell::Optional(Part::Counter(counter)) => Read::Counter(counter),
            Cell::Truncated => Read::Truncated,
            Cell::OwnK8s(_) if !self.has(Self::LOCAL_K8S) => return Resolved::Absent,
            Cell::OwnK8s(key) => Read::K8s(End::Local, key),
            Cell::ClientSent if outgoing => Read::Counter(Counter::BytesWritten),
            Cell::ServerSent if !outgoing => Read::Counter(Counter::BytesWritten),
            Cell::ClientSent | Cell::ServerSent => Read::Counter(Counter::BytesRead),
        })
    }
}

// === impl Plan ===

impl Plan {
    /// `globals` have passed [`super::check::clean_globals`]; `labels` are those of the rows that it is for. Of several
    /// labels with one key the first counts, and none takes the place of a column or of a global tag.
    pub(super) fn new(
        format: Format,
        measurement: Measurement,
        shape: Shape,
        globals: &[(String, String)],
        labels: &[(Str, Str)],
        options: EncodeOptions,
    ) -> Self {
        let keys: Vec<_> = labels.iter().map(|(key, _)| check::clean_key(key)).collect();
        let mut entries = Vec::with_capacity(measurement.columns().len() + globals.len());
        for column in columns(measurement, format, options) {
            // A user's own tag goes before a mere default.
            let overridden = column.is_default() && globals.iter().any(|(key, _)| key == column.name);
            let value = match shape.resolve(column.cell) {
                Resolved::Absent => continue,
                Resolved::Constant(_) if overridden => continue,
                Resolved::Constant(text) => EntryValue::Constant(Cow::Borrowed(text)),
                Resolved::Read(read) => EntryValue::Read(read),
            };
            entries.push(Entry {
                key: column.name,
                kind: match column.role {
                    Role::Tag => Kind::Tag,
                    Role::Field => Kind::Field(column.ty),
                },
                value,
            });
        }
        for (key, value) in globals {
            if !entries.iter().any(|entry| entry.key == key) {
                let value = EntryValue::Constant(Cow::Borrowed(value.as_str()));
                entries.push(Entry {
                    key,
                    kind: Kind::Tag,
                    value,
                });
            }
        }
        for (index, key) in keys.iter().enumerate() {
            let column = columns(measurement, format, options)
                .any(|column| column.name == *key && !column.is_default())
                || (format == Format::Json && json::RESERVED.contains(&&**key));
            let taken = column || entries.iter().any(|entry| entry.key == *key);
            let tags = entries.iter().filter(|entry| entry.kind == Kind::Tag).count();
            if !key.is_empty() && !taken && tags < check::MAX_TAGS {
                entries.push(Entry {
                    key,
                    kind: Kind::Tag,
                    value: EntryValue::Read(Read::Label(index)),
                });
            }
        }
        match format {
            Format::Protobuf => protobuf::plan(measurement.name(), entries),
            Format::LineProtocol => line::plan(measurement.name(), entries),
            Format::Json | Format::Table => json::plan(measurement.name(), entries),
        }
    }
}

/// The columns that an encoder may write.
pub(super) fn columns(
    measurement: Measurement,
    format: Format,
    options: EncodeOptions,
) -> impl Iterator<Item = &'static Column> {
    measurement.columns().iter().filter(move |column| match column.output {
        Output::Documented | Output::Addition => true,
        Output::JsonOnly => format == Format::Json,
        Output::Compat => options.compat_keys,
    })
}

// === impl PlanBuilder ===

impl PlanBuilder {
    /// Adds ready bytes.
    pub(super) fn lead(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        write(&mut self.blob);
    }

    /// Adds a read with the bytes that belong to its value.
    pub(super) fn read(&mut self, read: Read, kind: Kind, key: impl FnOnce(&mut Vec<u8>)) {
        let lead = self.lead_from..self.blob.len();
        key(&mut self.blob);
        let key = lead.end..self.blob.len();
        self.lead_from = key.end;
        let first_field = !self.fields && matches!(kind, Kind::Field(_)) && read != Read::Time;
        self.fields |= first_field;
        self.ops.push(Op {
            lead,
            key,
            read,
            kind,
            first_field,
        });
    }

    pub(super) fn finish(mut self) -> Plan {
        let tail = self.lead_from..self.blob.len();
        // Per read: the fixed-size copy of the key, the value, and the lengths and flags around it.
        let budget = self.blob.len() + self.ops.len() * (PADDING + INLINE_TEXT + 16) + 64;
        self.blob.resize(self.blob.len() + PADDING, 0);
        Plan {
            blob: self.blob,
            ops: self.ops,
            tail,
            budget,
        }
    }
}
