//! What the documentation promises of each measurement, checked point by point.
//!
//! Written down from the documentation, not taken from the output tables of the product.

use std::net::IpAddr;

use super::{Point, decode::Value};

/// Extra allowances of the receiver.
#[derive(Clone, Debug, Default)]
pub(super) struct Rules {
    /// Names of user tags that points may carry beside the documented ones.
    pub(super) extra_tags: Vec<String>,
    /// Accept the undocumented keys of the existing collector.
    pub(super) compat_keys: bool,
    /// Empty tag values are left out of the body (line protocol).
    pub(super) empty_left_out: bool,
}

/// Categories of `/v1/write/<category>`.
pub(super) const CATEGORIES: &[&str] = &[
    "metrics",
    "metric",
    "network",
    "keyevent",
    "object",
    "object_change",
    "custom_object",
    "logging",
    "tracing",
    "rum",
    "security",
    "profiling",
];

const NETFLOW_TAGS: &[&str] = &[
    "direction",
    "dst_domain",
    "dst_ip",
    "dst_ip_type",
    "dst_nat_ip",
    "dst_nat_port",
    "dst_port",
    "family",
    "host",
    "pid",
    "process_name",
    "source",
    "src_ip",
    "src_ip_type",
    "src_port",
    "sub_source",
    "transport",
];
const NETFLOW_K8S_TAGS: &[&str] = &[
    "dst_k8s_deployment_name",
    "dst_k8s_namespace",
    "dst_k8s_pod_name",
    "dst_k8s_service_name",
    "src_k8s_deployment_name",
    "src_k8s_namespace",
    "src_k8s_pod_name",
    "src_k8s_service_name",
];
/// May be empty, and then be missing from line protocol.
const NETFLOW_MAY_BE_EMPTY: &[&str] = &["dst_domain", "process_name"];
const NETFLOW_FIELDS: &[&str] = &["bytes_read", "bytes_written"];
const NETFLOW_TCP_FIELDS: &[&str] = &["retransmits", "rtt", "rtt_var", "tcp_closed", "tcp_established"];

const COMPAT_TAGS: &[&str] = &[
    "service",
    "netns",
    "conn_side",
    "client_ip",
    "client_port",
    "client_ip_type",
    "server_ip",
    "server_port",
    "server_ip_type",
    "server_domain",
];
const COMPAT_FIELDS: &[&str] = &["client_sent", "server_sent"];

/// 2020-01-01 and 2100-01-01: a time outside is not in nanoseconds.
const TIMES: std::ops::Range<i64> = 1_577_836_800_000_000_000..4_102_444_800_000_000_000;

/// Checks one point that came in under `category`.
pub(super) fn check(category: &str, point: &Point, rules: &Rules) -> Result<(), String> {
    check_limits(point)?;
    match (category, point.name.as_str()) {
        ("network", "netflow") => check_netflow(point, rules),
        (_, "netflow") => Err(format!("belongs to category network, not {category}")),
        (_, name) => Err(format!("measurement `{name}` is not documented")),
    }
    .map_err(|why| format!("{}: {why}", point.name))
}

fn check_limits(point: &Point) -> Result<(), String> {
    let Point {
        name,
        time,
        tags,
        fields,
    } = point;
    if !TIMES.contains(time) {
        return Err(format!("time {time} is not in nanoseconds"));
    }
    if name.len() > 1024 || tags.len() > 256 || fields.len() > 1024 || fields.is_empty() {
        return Err(format!(
            "{} tags, {} fields, name of {} bytes",
            tags.len(),
            fields.len(),
            name.len()
        ));
    }
    for key in tags.keys().chain(fields.keys()) {
        if key.is_empty() || key.len() > 256 || key.contains(['\n', '.']) || key.ends_with('\\') {
            return Err(format!("key {key:?} breaks the rules"));
        }
    }
    for (key, value) in tags {
        if value.len() > 1024 || value.contains('\n') || value.ends_with('\\') {
            return Err(format!("tag {key:?} has the value {value:?}"));
        }
    }
    Ok(())
}

fn check_netflow(point: &Point, rules: &Rules) -> Result<(), String> {
    let tag = |key: &str| point.tags.get(key).map(String::as_str);
    let k8s = NETFLOW_K8S_TAGS.iter().any(|key| point.tags.contains_key(*key));
    for key in NETFLOW_TAGS {
        let may_be_empty = NETFLOW_MAY_BE_EMPTY.contains(key);
        match tag(key) {
            None if may_be_empty && rules.empty_left_out => {}
            None => return Err(format!("tag `{key}` is missing")),
            Some("") if !may_be_empty => return Err(format!("tag `{key}` is empty")),
            Some(_) => {}
        }
    }
    if k8s && let Some(key) = NETFLOW_K8S_TAGS.iter().find(|key| tag(key).is_none_or(str::is_empty)) {
        return Err(format!(
            "tag `{key}` is missing or empty though other K8s tags are there"
        ));
    }
    let compat_tag = |key: &str| {
        COMPAT_TAGS.contains(&key)
            || ["src_k8s_", "dst_k8s_", "client_k8s_", "server_k8s_"]
                .iter()
                .any(|prefix| {
                    key.strip_prefix(prefix).is_some_and(|name| {
                        [
                            "namespace",
                            "pod_name",
                            "service_name",
                            "deployment_name",
                            "workload_name",
                            "workload_type",
                        ]
                        .contains(&name)
                    })
                })
    };
    for key in point.tags.keys() {
        let known = NETFLOW_TAGS.contains(&key.as_str())
            || NETFLOW_K8S_TAGS.contains(&key.as_str())
            || rules.extra_tags.contains(key)
            || (rules.compat_keys && compat_tag(key));
        if !known {
            return Err(format!("tag `{key}` is not documented"));
        }
    }
    let udp = match tag("transport") {
        Some("tcp") => false,
        Some("udp") => true,
        other => return Err(format!("transport is {other:?}")),
    };
    check_fields(point, udp, rules)?;
    one_of("direction", tag("direction"), &["incoming", "outgoing"])?;
    one_of("source", tag("source"), &["netflow"])?;
    one_of("sub_source", tag("sub_source"), &[if k8s { "K8s" } else { "N/A" }])?;
    let pid = tag("pid").unwrap_or_default();
    pid.parse::<u32>().map_err(|_| format!("pid is {pid:?}"))?;
    for side in ["src", "dst"] {
        let ip = tag(&format!("{side}_ip")).unwrap_or_default();
        let ip: IpAddr = canonical_ip(ip)?;
        one_of("family", tag("family"), &[if ip.is_ipv4() { "IPv4" } else { "IPv6" }])?;
        one_of(
            &format!("{side}_ip_type"),
            tag(&format!("{side}_ip_type")),
            &[class(ip)],
        )?;
        check_port(tag(&format!("{side}_port")).unwrap_or_default(), true)?;
    }
    match (tag("dst_nat_ip"), tag("dst_nat_port")) {
        (Some("N/A"), Some("N/A")) => Ok(()),
        (Some(ip), Some(port)) => canonical_ip(ip).and_then(|_| check_port(port, false)),
        other => Err(format!("dst_nat_ip and dst_nat_port are {other:?}")),
    }
}

fn check_fields(point: &Point, udp: bool, rules: &Rules) -> Result<(), String> {
    let tcp: &[&str] = if udp { &[] } else { NETFLOW_TCP_FIELDS };
    let compat: &[&str] = if rules.compat_keys { COMPAT_FIELDS } else { &[] };
    for (key, value) in &point.fields {
        if ![NETFLOW_FIELDS, tcp, compat]
            .iter()
            .any(|names| names.contains(&key.as_str()))
        {
            return Err(format!(
                "field `{key}` is not documented{}",
                if udp { " for udp" } else { "" }
            ));
        }
        match value {
            Value::Int(number) if *number >= 0 => {}
            other => return Err(format!("field `{key}` is no count of type int but {other:?}")),
        }
    }
    for key in NETFLOW_FIELDS.iter().chain(tcp) {
        if !point.fields.contains_key(*key) {
            return Err(format!("field `{key}` is missing"));
        }
    }
    Ok(())
}

fn one_of(key: &str, value: Option<&str>, allowed: &[&str]) -> Result<(), String> {
    if value.is_some_and(|value| allowed.contains(&value)) {
        return Ok(());
    }
    Err(format!("tag `{key}` is {value:?}, expected one of {allowed:?}"))
}

/// Parses an address that must be in its shortest form and not be v4-mapped.
fn canonical_ip(text: &str) -> Result<IpAddr, String> {
    let ip: IpAddr = text.parse().map_err(|_| format!("{text:?} is no address"))?;
    if ip.to_string() != text || ip.to_canonical() != ip {
        return Err(format!("address {text:?} should be written as {}", ip.to_canonical()));
    }
    Ok(ip)
}

fn check_port(text: &str, may_be_folded: bool) -> Result<(), String> {
    let number = text
        .parse::<u16>()
        .is_ok_and(|port| port > 0 && port.to_string() == text);
    if number || (may_be_folded && text == "*") {
        return Ok(());
    }
    Err(format!("{text:?} is no port"))
}

fn class(ip: IpAddr) -> &'static str {
    let private = match ip {
        IpAddr::V4(v4) => v4.is_private(),
        IpAddr::V6(v6) => v6.segments().first().is_some_and(|group| group & 0xfe00 == 0xfc00),
    };
    match ip {
        _ if private => "private",
        _ if ip.is_loopback() => "loopback",
        _ if ip.is_multicast() => "multicast",
        _ => "other",
    }
}
