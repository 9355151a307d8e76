//! The output table of `netflow`.

use crate::{
    column::{Cell, Column, Counter, Output, Unit},
    flow::{PROCESS_TAGS, TAGS},
    table::{concat, source},
};

/// All columns of `netflow`. Global tags (`host` and the user's) come on top of these.
pub const COLUMNS: &[Column] = &concat::<{ 1 + TAGS.len() + PROCESS_TAGS.len() + FIELDS.len() }>(&[
    &[source("netflow", "Fixed value: `netflow`.")],
    TAGS,
    PROCESS_TAGS,
    FIELDS,
]);

const FIELDS: &[Column] = &[
    Column::field(
        "bytes_read",
        Unit::Bytes,
        Cell::Counter(Counter::BytesRead),
        "Payload bytes read in the interval.",
    ),
    Column::field(
        "bytes_written",
        Unit::Bytes,
        Cell::Counter(Counter::BytesWritten),
        "Payload bytes written in the interval.",
    ),
    Column::field(
        "retransmits",
        Unit::Count,
        Cell::TcpCounter(Counter::Retransmits),
        "Segments retransmitted in the interval. TCP only.",
    ),
    Column::field(
        "rtt",
        Unit::Microseconds,
        Cell::TcpCounter(Counter::Rtt),
        "Smoothed round-trip time, mean over the row's connections. TCP only.",
    ),
    Column::field(
        "rtt_var",
        Unit::Microseconds,
        Cell::TcpCounter(Counter::RttVar),
        "Mean deviation of the round-trip time, mean over the row's connections. TCP only.",
    ),
    Column::field(
        "tcp_closed",
        Unit::Count,
        Cell::TcpCounter(Counter::TcpClosed),
        "Connections closed in the interval. TCP only.",
    ),
    Column::field(
        "tcp_established",
        Unit::Count,
        Cell::TcpCounter(Counter::TcpEstablished),
        "Connections established in the interval. TCP only.",
    ),
    Column::field(
        "datagrams_read",
        Unit::Count,
        Cell::UdpCounter(Counter::DatagramsRead),
        "Datagrams received in the interval. UDP only.",
    )
    .only(Output::JsonOnly),
    Column::field(
        "datagrams_written",
        Unit::Count,
        Cell::UdpCounter(Counter::DatagramsWritten),
        "Datagrams sent in the interval. UDP only.",
    )
    .only(Output::JsonOnly),
    Column::field(
        "client_sent",
        Unit::Bytes,
        Cell::ClientSent,
        "Payload bytes the client sent in the interval.",
    )
    .only(Output::Compat),
    Column::field(
        "server_sent",
        Unit::Bytes,
        Cell::ServerSent,
        "Payload bytes the server sent in the interval.",
    )
    .only(Output::Compat),
];
