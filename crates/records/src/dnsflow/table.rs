//! The output table of `dnsflow`.

use crate::{
    column::{Cell, Column, Counter, Output, Part, TextOf, Unit},
    flow::TAGS,
    table::{concat, source},
};

/// All columns of `dnsflow`. Global tags (`host` and the user's) come on top of these.
pub const COLUMNS: &[Column] =
    &concat::<{ 1 + TAGS.len() + OWN.len() }>(&[&[source("dnsflow", "Fixed value: `dnsflow`.")], TAGS, OWN]);

const OWN: &[Column] = &[
    Column::tag(
        "query_name",
        Cell::Optional(Part::Text(TextOf::QueryName)),
        "Name that was looked up. Only while the names of look-ups are asked for.",
    )
    .only(Output::Addition),
    Column::tag(
        "query_type",
        Cell::Optional(Part::Text(TextOf::QueryType)),
        "Type of record that was looked up, as `AAAA`. Only while the names of look-ups are asked for.",
    )
    .only(Output::Addition),
    Column::field(
        "count",
        Unit::None,
        Cell::Counter(Counter::Count),
        "Look-ups in the interval.",
    ),
    Column::field(
        "latency",
        Unit::Nanoseconds,
        Cell::Counter(Counter::Latency),
        "Time to the answer, mean over the row's look-ups; 0 where none came.",
    ),
    Column::field(
        "latency_max",
        Unit::Nanoseconds,
        Cell::Counter(Counter::LatencyMax),
        "Longest time to the answer of the row's look-ups.",
    ),
    Column::field(
        "rcode",
        Unit::None,
        Cell::Counter(Counter::Rcode),
        "Response code: 0 `NoError`, 1 `FormErr`, 2 `ServFail`, 3 `NXDomain`, 4 `NotImp`, 5 `Refused`, ...; -1 when no answer came in time.",
    ),
];
