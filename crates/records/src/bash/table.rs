//! The output table of `bash`. DataWay's category of logs has no tag `source`: the measurement is the source.

use crate::column::{Cell, Column, K8sKey, Output, TextOf, Type};

/// All columns of `bash`. Global tags (`host` and the user's) come on top of these.
pub const COLUMNS: &[Column] = &[
    Column::value(
        "pid",
        Type::Text,
        Cell::Pid,
        "Process id of the shell, in the host's numbering.",
    ),
    Column::value(
        "user",
        Type::Text,
        Cell::Text(TextOf::User),
        "Who entered the line, by the users of the shell's own file system; the number where it has no name.",
    ),
    Column::value("cmd", Type::Text, Cell::Text(TextOf::Cmd), "The line that was entered."),
    Column::value(
        "message",
        Type::Text,
        Cell::Text(TextOf::Message),
        "Time (RFC 3339, UTC), process, user and line as one text.",
    ),
    Column::value("status", Type::Text, Cell::Fixed("info"), "Fixed value: `info`.").only(Output::Addition),
    Column::value(
        "truncated",
        Type::Bool,
        Cell::Truncated,
        "Whether the line was longer than what is kept, and was cut there.",
    )
    .only(Output::Addition),
    Column::tag(
        "k8s_namespace",
        Cell::OwnK8s(K8sKey::Namespace),
        "Namespace of the pod that the shell runs in; no such tag outside pods. The same holds for the tags below.",
    )
    .only(Output::Addition),
    Column::tag("k8s_pod_name", Cell::OwnK8s(K8sKey::Pod), "That pod.").only(Output::Addition),
    Column::tag(
        "k8s_deployment_name",
        Cell::OwnK8s(K8sKey::Workload),
        "What runs that pod.",
    )
    .only(Output::Addition),
    Column::tag(
        "service",
        Cell::Default("ebpf"),
        "`ebpf`, or the global tag of that name.",
    )
    .only(Output::Compat),
];
