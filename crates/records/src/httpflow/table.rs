//! The output table of `httpflow`.

use crate::{
    column::{Cell, Column, Counter, Output, Part, TextOf, Type, Unit},
    flow::{PROCESS_TAGS, TAGS},
    table::{concat, source},
};

/// All columns of `httpflow`. Global tags (`host` and the user's) come on top of these.
pub const COLUMNS: &[Column] = &concat::<{ 1 + TAGS.len() + PROCESS_TAGS.len() + FIELDS.len() }>(&[
    &[source("httpflow", "Fixed value: `httpflow`.")],
    TAGS,
    PROCESS_TAGS,
    FIELDS,
]);

const FIELDS: &[Column] = &[
    Column::value(
        "method",
        Type::Text,
        Cell::Text(TextOf::Method),
        "Method of the request, as `GET`.",
    ),
    Column::value(
        "path",
        Type::Text,
        Cell::Text(TextOf::Path),
        "Path of the request, without its query string unless that is asked for.",
    ),
    Column::value(
        "http_version",
        Type::Text,
        Cell::Text(TextOf::HttpVersion),
        "Version of HTTP, as `1.1`.",
    ),
    Column::field(
        "status_code",
        Unit::None,
        Cell::Counter(Counter::StatusCode),
        "Status of the response.",
    ),
    Column::value(
        "truncated",
        Type::Bool,
        Cell::Truncated,
        "Whether the path reached the limit of what is kept, and was cut there.",
    ),
    Column::field(
        "count",
        Unit::None,
        Cell::Counter(Counter::Count),
        "Exchanges in the interval.",
    ),
    Column::field(
        "latency",
        Unit::Nanoseconds,
        Cell::Counter(Counter::Latency),
        "Time to the first byte of the response, mean over the row's exchanges.",
    ),
    Column::field(
        "bytes_read",
        Unit::Bytes,
        Cell::Counter(Counter::BytesRead),
        "Bytes of these exchanges that the local process read.",
    ),
    Column::field(
        "bytes_written",
        Unit::Bytes,
        Cell::Counter(Counter::BytesWritten),
        "Bytes of these exchanges that the local process wrote.",
    ),
    Column::field(
        "grpc_status",
        Unit::None,
        Cell::Optional(Part::Counter(Counter::GrpcStatus)),
        "Status of a gRPC call; other exchanges have no such field.",
    )
    .only(Output::Addition),
    Column::field("client_sent", Unit::Bytes, Cell::ClientSent, "Bytes the client sent.").only(Output::Compat),
    Column::field("server_sent", Unit::Bytes, Cell::ServerSent, "Bytes the server sent.").only(Output::Compat),
];
