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

/// Tags of every measurement of flows.
const FLOW_TAGS: &[&str] = &[
    "direction",
    "dst_domain",
    "dst_ip",
    "dst_ip_type",
    "dst_port",
    "family",
    "host",
    "source",
    "src_ip",
    "src_ip_type",
    "src_port",
    "sub_source",
    "transport",
];
/// Tags of those that name the process.
const PROCESS_TAGS: &[&str] = &["dst_nat_ip", "dst_nat_port", "pid", "process_name"];
const K8S_TAGS: &[&str] = &[
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
const MAY_BE_EMPTY: &[&str] = &["dst_domain", "process_name"];

/// Type of a field, and what it may be.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Count,
    /// -1 for a time-out, else a code.
    Rcode,
    Text,
    Bool,
}

/// A measurement of flows.
struct Flows {
    name: &'static str,
    /// Names the process and its translation.
    process: bool,
    fields: &'static [(&'static str, Kind)],
    /// Only on rows of TCP.
    tcp_fields: &'static [(&'static str, Kind)],
    /// Our own additions: tags and fields that may be there.
    extra_tags: &'static [&'static str],
    extra_fields: &'static [(&'static str, Kind)],
    /// Of the existing collector.
    compat_fields: &'static [(&'static str, Kind)],
}

const COMPAT_FIELDS: &[(&str, Kind)] = &[("client_sent", Kind::Count), ("server_sent", Kind::Count)];

const FLOWS: &[Flows] = &[
    Flows {
        name: "netflow",
        process: true,
        fields: &[("bytes_read", Kind::Count), ("bytes_written", Kind::Count)],
        tcp_fields: &[
            ("retransmits", Kind::Count),
            ("rtt", Kind::Count),
            ("rtt_var", Kind::Count),
            ("tcp_closed", Kind::Count),
            ("tcp_established", Kind::Count),
        ],
        extra_tags: &[],
        extra_fields: &[],
        compat_fields: COMPAT_FIELDS,
    },
    Flows {
        name: "httpflow",
        process: true,
        fields: &[
            ("bytes_read", Kind::Count),
            ("bytes_written", Kind::Count),
            ("count", Kind::Count),
            ("http_version", Kind::Text),
            ("latency", Kind::Count),
            ("method", Kind::Text),
            ("path", Kind::Text),
            ("status_code", Kind::Count),
            ("truncated", Kind::Bool),
        ],
        tcp_fields: &[],
        extra_tags: &[],
        extra_fields: &[("grpc_status", Kind::Count)],
        compat_fields: COMPAT_FIELDS,
    },
    Flows {
        name: "dnsflow",
        process: false,
        fields: &[
            ("count", Kind::Count),
            ("latency", Kind::Count),
            ("latency_max", Kind::Count),
            ("rcode", Kind::Rcode),
        ],
        tcp_fields: &[],
        extra_tags: &["query_name", "query_type"],
        extra_fields: &[],
        compat_fields: &[],
    },
];

const BASH_FIELDS: &[(&str, Kind)] = &[
    ("cmd", Kind::Text),
    ("message", Kind::Text),
    ("pid", Kind::Text),
    ("user", Kind::Text),
];
/// Our own additions, and what the category asks for.
const BASH_EXTRA_FIELDS: &[(&str, Kind)] = &[("status", Kind::Text), ("truncated", Kind::Bool)];
const BASH_EXTRA_TAGS: &[&str] = &["k8s_namespace", "k8s_pod_name", "k8s_deployment_name"];

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

/// 2020-01-01 and 2100-01-01: a time outside is not in nanoseconds.
const TIMES: std::ops::Range<i64> = 1_577_836_800_000_000_000..4_102_444_800_000_000_000;

/// Checks one point that came in under `category`.
pub(super) fn check(category: &str, point: &Point, rules: &Rules) -> Result<(), String> {
    check_limits(point)?;
    let flows = FLOWS.iter().find(|flows| flows.name == point.name);
    match (category, flows, point.name.as_str()) {
        ("network", Some(flows), _) => check_flow(point, flows, rules),
        (_, Some(_), _) => Err(format!("belongs to category network, not {category}")),
        ("logging", None, "bash") => check_bash(point, rules),
        (_, None, "bash") => Err(format!("belongs to category logging, not {category}")),
        (_, None, name) => Err(format!("measurement `{name}` is not documented")),
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

fn check_flow(point: &Point, flows: &Flows, rules: &Rules) -> Result<(), String> {
    let process: &[&str] = if flows.process { PROCESS_TAGS } else { &[] };
    let documented = || FLOW_TAGS.iter().chain(process);
    let tag = |key: &str| point.tags.get(key).map(String::as_str);
    let k8s = K8S_TAGS.iter().any(|key| point.tags.contains_key(*key));
    for key in documented() {
        let may_be_empty = MAY_BE_EMPTY.contains(key);
        match tag(key) {
            None if may_be_empty && rules.empty_left_out => {}
            None => return Err(format!("tag `{key}` is missing")),
            Some("") if !may_be_empty => return Err(format!("tag `{key}` is empty")),
            Some(_) => {}
        }
    }
    if k8s && let Some(key) = K8S_TAGS.iter().find(|key| tag(key).is_none_or(str::is_empty)) {
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
        let known = documented().any(|tag| tag == key)
            || flows.extra_tags.contains(&key.as_str())
            || K8S_TAGS.contains(&key.as_str())
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
    let tcp = if udp { &[] } else { flows.tcp_fields };
    let compat = if rules.compat_keys { flows.compat_fields } else { &[] };
    check_fields(point, &[flows.fields, tcp], &[flows.extra_fields, compat])?;
    one_of("direction", tag("direction"), &["incoming", "outgoing"])?;
    one_of("source", tag("source"), &[flows.name])?;
    one_of("sub_source", tag("sub_source"), &[if k8s { "K8s" } else { "N/A" }])?;
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
    if !flows.process {
        return Ok(());
    }
    check_pid(tag("pid").unwrap_or_default())?;
    match (tag("dst_nat_ip"), tag("dst_nat_port")) {
        (Some("N/A"), Some("N/A")) => Ok(()),
        (Some(ip), Some(port)) => canonical_ip(ip).and_then(|_| check_port(port, false)),
        other => Err(format!("dst_nat_ip and dst_nat_port are {other:?}")),
    }
}

fn check_bash(point: &Point, rules: &Rules) -> Result<(), String> {
    let tag = |key: &str| point.tags.get(key).map(String::as_str);
    if tag("host").is_none_or(str::is_empty) {
        return Err("tag `host` is missing or empty".to_owned());
    }
    for (key, value) in &point.tags {
        let own = BASH_EXTRA_TAGS.contains(&key.as_str());
        if value.is_empty() && own {
            return Err(format!("tag `{key}` is empty"));
        }
        let compat = rules.compat_keys && key == "service";
        if !(key == "host" || own || compat || rules.extra_tags.contains(key)) {
            return Err(format!("tag `{key}` is not documented"));
        }
    }
    check_fields(point, &[BASH_FIELDS], &[BASH_EXTRA_FIELDS])?;
    let text = |key: &str| match point.fields.get(key) {
        Some(Value::Text(text)) => text.as_str(),
        _ => "",
    };
    check_pid(text("pid"))?;
    let (time, rest) = text("message").split_once(' ').unwrap_or_default();
    let want = format!("pid:`{}` user:`{}` cmd:`{}`", text("pid"), text("user"), text("cmd"));
    if rest != want || !time.ends_with('Z') || time.len() != "2020-01-01T00:00:00Z".len() {
        return Err(format!("message is {:?}", text("message")));
    }
    Ok(())
}

fn check_pid(pid: &str) -> Result<(), String> {
    pid.parse::<u32>().map(drop).map_err(|_| format!("pid is {pid:?}"))
}

/// Fields that must be there, and others that may.
fn check_fields(
    point: &Point,
    needed: &[&'static [(&str, Kind)]],
    allowed: &[&'static [(&str, Kind)]],
) -> Result<(), String> {
    for (key, value) in &point.fields {
        let kind = needed
            .iter()
            .chain(allowed)
            .flat_map(|fields| fields.iter())
            .find(|(name, _)| name == key);
        match (kind, value) {
            (Some((_, Kind::Count)), Value::Int(0..)) => {}
            (Some((_, Kind::Rcode)), Value::Int(-1..=0xfff)) => {}
            (Some((_, Kind::Text)), Value::Text(_)) => {}
            (Some((_, Kind::Bool)), Value::Bool(_)) => {}
            (Some((_, kind)), other) => return Err(format!("field `{key}` is no {kind:?} but {other:?}")),
            (None, _) => {
                let transport = point.tags.get("transport").map(String::as_str).unwrap_or_default();
                return Err(format!("field `{key}` is not documented for {transport}"));
            }
        }
    }
    for (key, _) in needed.iter().flat_map(|fields| fields.iter()) {
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
