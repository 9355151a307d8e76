//! The vocabulary of output tables: what a column is called, what it means, where its value comes from.
//!
//! A measurement declares one `const` slice of [`Column`]s. Encoders and the generated documentation read that slice
//! and nothing else, so a name or unit exists once.

use std::fmt::Write as _;

/// One tag or field of a measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Column {
    /// Key on the wire.
    pub name: &'static str,
    /// Tag or field.
    pub role: Role,
    /// Type of the value; tags are text.
    pub ty: Type,
    /// Unit of a field.
    pub unit: Unit,
    /// One sentence for the documentation.
    pub doc: &'static str,
    /// Which outputs carry it.
    pub output: Output,
    /// Where the value comes from.
    pub(crate) cell: Cell,
}

/// Tags are strings that identify a row; fields are its values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Indexed string.
    Tag,
    /// Value.
    Field,
}

/// Type of a value, spelled as in the documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    /// `int`
    Int,
    /// `string`
    Text,
    /// `bool`
    Bool,
}

/// Unit of a field, spelled as in the documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Tags have none.
    None,
    /// `B`
    Bytes,
    /// `count`
    Count,
    /// `μs`
    Microseconds,
    /// `ns`
    Nanoseconds,
}

/// Which outputs carry a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// Part of the documented measurement: every output.
    Documented,
    /// Every output: our own addition to the documented measurement.
    Addition,
    /// Only JSON lines: our own addition that a DataWay would not know.
    JsonOnly,
    /// Every output, but only with [`crate::encode::EncodeOptions::compat_keys`].
    Compat,
}

/// An end of a flow as a column names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// `src_*`
    Local,
    /// `dst_*`
    Remote,
    /// The end that started the exchange.
    Client,
    /// The end that was asked.
    Server,
}

/// One Kubernetes name of an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum K8sKey {
    Namespace,
    Pod,
    Service,
    Workload,
    WorkloadType,
}

/// A counter or gauge of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Counter {
    BytesRead,
    BytesWritten,
    Retransmits,
    Rtt,
    RttVar,
    TcpClosed,
    TcpEstablished,
    DatagramsRead,
    DatagramsWritten,
    Count,
    Latency,
    LatencyMax,
    Rcode,
    StatusCode,
    GrpcStatus,
}

/// A text that only one kind of record has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TextOf {
    Method,
    Path,
    HttpVersion,
    QueryName,
    QueryType,
    User,
    Cmd,
    Message,
}

/// A value of a record's optional part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Text(TextOf),
    Counter(Counter),
}

/// Where the value of a column comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cell {
    /// Always this text.
    Fixed(&'static str),
    /// This text unless a global tag has the same key.
    Default(&'static str),
    Direction,
    Family,
    Transport,
    /// `K8s` when an end has Kubernetes names.
    SubSource,
    /// `client` or `server`: the role of the local end.
    ConnSide,
    Ip(Side),
    IpType(Side),
    Port(Side),
    NatIp,
    NatPort,
    /// Domain of the remote end.
    Domain,
    /// Domain of the server end: empty when the server is the local end, whose domain nobody asked for.
    ServerDomain,
    Pid,
    ProcessName,
    Netns,
    K8s(Side, K8sKey),
    /// Every row.
    Counter(Counter),
    /// Rows of TCP only.
    TcpCounter(Counter),
    /// Rows of UDP only.
    UdpCounter(Counter),
    /// Only where the record has its optional part: a query's name, a gRPC status.
    Optional(Part),
    /// Every row.
    Text(TextOf),
    /// Whether a text was cut.
    Truncated,
    /// Names of the local end where there are any, else no column.
    OwnK8s(K8sKey),
    /// Bytes that the client sent.
    ClientSent,
    /// Bytes that the server sent.
    ServerSent,
}

// === impl Column ===

impl Column {
    pub(crate) const fn tag(name: &'static str, cell: Cell, doc: &'static str) -> Self {
        Self {
            name,
            role: Role::Tag,
            ty: Type::Text,
            unit: Unit::None,
            doc,
            output: Output::Documented,
            cell,
        }
    }

    pub(crate) const fn field(name: &'static str, unit: Unit, cell: Cell, doc: &'static str) -> Self {
        Self {
            name,
            role: Role::Field,
            ty: Type::Int,
            unit,
            doc,
            output: Output::Documented,
            cell,
        }
    }

    /// A field of another type than int, which has no unit.
    pub(crate) const fn value(name: &'static str, ty: Type, cell: Cell, doc: &'static str) -> Self {
        Self {
            name,
            role: Role::Field,
            ty,
            unit: Unit::None,
            doc,
            output: Output::Documented,
            cell,
        }
    }

    pub(crate) const fn only(mut self, output: Output) -> Self {
        self.output = output;
        self
    }

    /// True when a global tag of the same key goes before this column.
    pub(crate) const fn is_default(&self) -> bool {
        matches!(self.cell, Cell::Default(_))
    }
}

// === impl Unit ===

impl Unit {
    /// Spelling in the documentation; empty for none.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "",
            Self::Bytes => "B",
            Self::Count => "count",
            Self::Microseconds => "μs",
            Self::Nanoseconds => "ns",
        }
    }
}

// === impl Type ===

impl Type {
    /// Spelling in the documentation.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Int => "int",
            Self::Text => "string",
            Self::Bool => "bool",
        }
    }
}

/// The documentation of a measurement as Markdown: its tags, its fields, and where they are written.
#[must_use]
pub fn markdown(measurement: &str, category: &str, columns: &[Column]) -> String {
    let mut out = format!("## `{measurement}`\n\nCategory `{category}`.\n");
    for (output, title) in [
        (Output::Documented, ""),
        (Output::Addition, " (additions, in every output)"),
        (Output::JsonOnly, " (JSON lines only)"),
        (Output::Compat, " (only with compatibility keys switched on)"),
    ] {
        let of = |role| columns.iter().filter(move |c| c.output == output && c.role == role);
        if of(Role::Tag).next().is_some() {
            let _ = write!(out, "\nTags{title}\n\n| Tag | Description |\n| --- | --- |\n");
            for column in of(Role::Tag) {
                let _ = writeln!(out, "| `{}` | {} |", column.name, column.doc);
            }
        }
        if of(Role::Field).next().is_some() {
            let _ = write!(
                out,
                "\nFields{title}\n\n| Field | Description | Type | Unit |\n| --- | --- | :---: | :---: |\n"
            );
            for column in of(Role::Field) {
                let _ = writeln!(
                    out,
                    "| `{}` | {} | {} | {} |",
                    column.name,
                    column.doc,
                    column.ty.as_str(),
                    column.unit.as_str()
                );
            }
        }
    }
    out
}
