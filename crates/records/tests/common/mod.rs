//! Shared by the encoder tests: rows, an independent statement of what a row must become, and independent decoders.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    missing_docs,
    unreachable_pub
)]

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use ec_records::{
    Bash, Direction, Dnsflow, Endpoint, Family, Flow, Globals, Httpflow, K8sEndpoint, Netflow, Port, Question,
    Transport, column::Output, netflow::COLUMNS,
};
use proptest::prelude::*;

/// A decoded point.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Point {
    pub name: String,
    pub time: i64,
    pub tags: BTreeMap<String, String>,
    pub fields: BTreeMap<String, i64>,
    /// Fields of other types than int.
    pub others: BTreeMap<String, Other>,
}

/// A value that is no int.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Other {
    Text(String),
    Bool(bool),
}

/// The DataWay schema, written down from its description, decoded by prost.
pub mod pb {
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Points {
        #[prost(message, repeated, tag = "1")]
        pub arr: Vec<Point>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Point {
        #[prost(string, tag = "1")]
        pub name: String,
        #[prost(message, repeated, tag = "2")]
        pub fields: Vec<Field>,
        #[prost(int64, tag = "3")]
        pub time: i64,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Field {
        #[prost(string, tag = "1")]
        pub key: String,
        #[prost(oneof = "Val", tags = "2, 3, 4, 5, 6, 11")]
        pub val: Option<Val>,
        #[prost(bool, tag = "8")]
        pub is_tag: bool,
        #[prost(int32, tag = "9")]
        pub metric_type: i32,
        #[prost(string, tag = "10")]
        pub unit: String,
    }
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Val {
        #[prost(int64, tag = "2")]
        I(i64),
        #[prost(uint64, tag = "3")]
        U(u64),
        #[prost(double, tag = "4")]
        F(f64),
        #[prost(bool, tag = "5")]
        B(bool),
        #[prost(bytes, tag = "6")]
        D(Vec<u8>),
        #[prost(string, tag = "11")]
        S(String),
    }
}

pub fn decode_protobuf(bytes: &[u8]) -> Vec<Point> {
    let points = <pb::Points as prost::Message>::decode(bytes).expect("not the schema");
    points
        .arr
        .into_iter()
        .map(|point| {
            let mut out = Point {
                name: point.name,
                time: point.time,
                ..Point::default()
            };
            for field in point.fields {
                let duplicate = match (field.val.expect("a value"), field.is_tag) {
                    (pb::Val::S(text), true) => out.tags.insert(field.key, text).is_some(),
                    (pb::Val::I(number), false) => out.fields.insert(field.key, number).is_some(),
                    (pb::Val::S(text), false) => out.others.insert(field.key, Other::Text(text)).is_some(),
                    (pb::Val::B(set), false) => out.others.insert(field.key, Other::Bool(set)).is_some(),
                    other => panic!("unexpected value {other:?} of {}", field.key),
                };
                assert!(!duplicate, "a key occurs twice");
            }
            out
        })
        .collect()
}

/// Parses one line per point; also demands that keys are sorted and unique.
pub fn decode_lines(text: &str) -> Vec<Point> {
    assert!(text.ends_with('\n'));
    text.lines()
        .map(|line| {
            let mut rest = line;
            let (name, mut end) = take(&mut rest, ", ");
            let mut point = Point {
                name,
                ..Point::default()
            };
            let mut keys: Vec<String> = Vec::new();
            while end == Some(',') {
                let (key, eq) = take(&mut rest, ",= ");
                assert_eq!(eq, Some('='), "tag without value in {line}");
                let (value, after) = take(&mut rest, ",= ");
                assert!(!value.is_empty(), "empty tag value in {line}");
                keys.push(key.clone());
                point.tags.insert(key, value);
                end = after;
            }
            assert!(keys.is_sorted_by(|a, b| a < b), "tags not sorted: {keys:?}");
            assert_eq!(end, Some(' '), "no fields in {line}");
            let (fields, time) = rest.rsplit_once(' ').expect("a time");
            for pair in fields.split(',') {
                let (key, value) = pair.split_once('=').expect("a field");
                let value = value.strip_suffix('i').expect("an integer").parse().expect("a number");
                assert!(point.fields.insert(key.to_owned(), value).is_none());
            }
            point.time = time.parse().expect("a time");
            point
        })
        .collect()
}

/// Reads an escaped word up to one of `ends`; returns it and the end character.
fn take(rest: &mut &str, ends: &str) -> (String, Option<char>) {
    let mut word = String::new();
    let mut chars = rest.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        match (c, chars.peek()) {
            ('\\', Some((_, next))) if ", =".contains(*next) => {
                word.push(*next);
                chars.next();
            }
            _ if ends.contains(c) => {
                *rest = &rest[at + c.len_utf8()..];
                return (word, Some(c));
            }
            _ => word.push(c),
        }
    }
    *rest = "";
    (word, None)
}

/// What a row must become, stated from the documentation, not from the encoder.
pub fn expected(row: &Netflow, globals: &[(&str, &str)]) -> Point {
    let mut tags = BTreeMap::new();
    let mut tag = |key: &str, value: &str| tags.insert(key.to_owned(), limited(value));
    tag("source", "netflow");
    tag(
        "direction",
        if row.direction == Direction::Incoming {
            "incoming"
        } else {
            "outgoing"
        },
    );
    tag("family", if row.family == Family::V4 { "IPv4" } else { "IPv6" });
    tag("transport", if row.transport == Transport::Tcp { "tcp" } else { "udp" });
    tag("pid", &row.pid.to_string());
    tag("process_name", &row.process_name);
    tag("dst_domain", &row.dst_domain);
    for (side, end) in [("src", &row.local), ("dst", &row.remote)] {
        tag(&format!("{side}_ip"), &end.ip.to_string());
        tag(&format!("{side}_port"), &port(end.port));
        tag(&format!("{side}_ip_type"), class(end.ip));
    }
    let nat = row.dst_nat.map(|(ip, port)| (ip.to_string(), port.to_string()));
    let (nat_ip, nat_port) = nat.unwrap_or_else(|| ("N/A".to_owned(), "N/A".to_owned()));
    tag("dst_nat_ip", &nat_ip);
    tag("dst_nat_port", &nat_port);
    let k8s = row.local_k8s.is_some() || row.remote_k8s.is_some();
    tag("sub_source", if k8s { "K8s" } else { "N/A" });
    if k8s {
        for (side, names) in [("src", &row.local_k8s), ("dst", &row.remote_k8s)] {
            let names = names.as_deref().cloned().unwrap_or_default();
            for (key, value) in [
                ("namespace", &names.namespace),
                ("pod_name", &names.pod),
                ("service_name", &names.service),
                ("deployment_name", &names.workload),
            ] {
                tag(
                    &format!("{side}_k8s_{key}"),
                    if value.is_empty() { "N/A" } else { value },
                );
            }
        }
    }
    let int = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    let mut fields = BTreeMap::from([
        ("bytes_read".to_owned(), int(row.bytes_read)),
        ("bytes_written".to_owned(), int(row.bytes_written)),
    ]);
    if row.transport == Transport::Tcp {
        fields.extend([
            ("retransmits".to_owned(), int(row.retransmits)),
            ("rtt".to_owned(), int(row.rtt_us)),
            ("rtt_var".to_owned(), int(row.rtt_var_us)),
            ("tcp_closed".to_owned(), int(row.tcp_closed)),
            ("tcp_established".to_owned(), int(row.tcp_established)),
        ]);
    }
    for (key, value) in globals {
        if !tags.contains_key(*key) && !fields.contains_key(*key) {
            tags.insert((*key).to_owned(), limited(value));
        }
    }
    // Labels of the local end: the first of a key counts, and none replaces another tag or any column. Keys are short here.
    for (key, value) in row.local_k8s.iter().flat_map(|names| names.labels.iter()) {
        let (key, value) = (limited(&key.replace('.', "_")), limited(value));
        let column = COLUMNS
            .iter()
            .any(|column| column.name == key && column.output != Output::Compat);
        if !key.is_empty() && !column && !tags.contains_key(&key) {
            tags.insert(key, value);
        }
    }
    Point {
        name: "netflow".to_owned(),
        time: row.time_unix_ns,
        tags,
        fields,
        others: BTreeMap::new(),
    }
}

/// Line protocol leaves out empty tags.
pub fn without_empty(mut point: Point) -> Point {
    point.tags.retain(|_, value| !value.is_empty());
    point
}

fn port(port: Port) -> String {
    match port {
        Port::Number(port) => port.to_string(),
        Port::Any => "*".to_owned(),
    }
}

fn class(ip: IpAddr) -> &'static str {
    let private = match ip {
        IpAddr::V4(v4) => {
            let [a, b, ..] = v4.octets();
            a == 10 || (a == 172 && (16..32).contains(&b)) || (a == 192 && b == 168)
        }
        IpAddr::V6(v6) => v6.octets()[0] & 0xfe == 0xfc,
    };
    match ip {
        _ if private => "private",
        _ if ip.is_loopback() => "loopback",
        _ if ip.is_multicast() => "multicast",
        _ => "other",
    }
}

/// The limits of a tag value: 1024 bytes cut between characters, no line break, no back-slash at the end.
fn limited(value: &str) -> String {
    let mut out = String::new();
    for c in value.chars() {
        if out.len() + c.len_utf8() > 1024 {
            break;
        }
        out.push(if c == '\n' { ' ' } else { c });
    }
    while out.ends_with('\\') {
        out.pop();
    }
    out
}

pub fn globals(tags: &[(&str, &str)]) -> Globals {
    Globals {
        tags: tags.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect(),
    }
}

/// A plain TCP row.
pub fn tcp_row() -> Netflow {
    Netflow {
        time_unix_ns: 1_790_000_000_123_456_789,
        local: Endpoint {
            ip: Ipv4Addr::new(10, 0, 0, 7).into(),
            port: Port::Any,
        },
        remote: Endpoint {
            ip: Ipv4Addr::new(93, 184, 216, 34).into(),
            port: Port::Number(443),
        },
        transport: Transport::Tcp,
        family: Family::V4,
        direction: Direction::Outgoing,
        netns: 4_026_531_840,
        pid: 4711,
        process_name: "curl".into(),
        dst_nat: None,
        dst_domain: "example.com".into(),
        local_k8s: None,
        remote_k8s: None,
        bytes_read: 1500,
        bytes_written: 300,
        retransmits: 1,
        rtt_us: 12_345,
        rtt_var_us: 678,
        tcp_closed: 2,
        tcp_established: 3,
        datagrams_read: 0,
        datagrams_written: 0,
    }
}

/// A plain UDP row from a pod to an address outside the cluster.
pub fn udp_row() -> Netflow {
    Netflow {
        local: Endpoint {
            ip: "fd00::1".parse().unwrap(),
            port: Port::Number(53),
        },
        remote: Endpoint {
            ip: "2001:db8::5".parse().unwrap(),
            port: Port::Any,
        },
        transport: Transport::Udp,
        family: Family::V6,
        direction: Direction::Incoming,
        process_name: "my dns, v=1".into(),
        dst_domain: "".into(),
        local_k8s: Some(Arc::new(K8sEndpoint {
            namespace: "kube-system".into(),
            pod: "coredns-1".into(),
            service: "".into(),
            workload: "coredns".into(),
            workload_type: "deployment".into(),
            labels: [
                ("team", "dns, core"),
                ("app.kubernetes.io/name", "coredns"),
                ("host", "not me"),
            ]
            .map(|(key, value)| (key.into(), value.into()))
            .into(),
        })),
        retransmits: 0,
        rtt_us: 0,
        rtt_var_us: 0,
        tcp_closed: 0,
        tcp_established: 0,
        datagrams_read: 10,
        datagrams_written: 11,
        ..tcp_row()
    }
}

fn flow_of(row: Netflow) -> Flow {
    Flow {
        local: row.local,
        remote: row.remote,
        transport: row.transport,
        family: row.family,
        direction: row.direction,
        netns: row.netns,
        pid: row.pid,
        process_name: row.process_name,
        dst_nat: row.dst_nat,
        dst_domain: row.dst_domain,
        local_k8s: row.local_k8s,
        remote_k8s: row.remote_k8s,
    }
}

pub fn httpflow(row: Netflow, grpc_status: Option<u32>) -> Httpflow {
    Httpflow {
        time_unix_ns: row.time_unix_ns,
        flow: flow_of(row),
        method: "GET".into(),
        path: "/a \"b\" c\\d,e=f\n".into(),
        http_version: "1.1".into(),
        status_code: 404,
        grpc_status,
        truncated: true,
        count: 7,
        latency_ns: u64::MAX,
        bytes_read: 11,
        bytes_written: 12,
    }
}

pub fn dnsflow(row: Netflow, question: Option<(&str, &str)>) -> Dnsflow {
    Dnsflow {
        time_unix_ns: row.time_unix_ns,
        flow: flow_of(row),
        question: question.map(|(name, kind)| Question {
            name: name.into(),
            kind: kind.into(),
        }),
        rcode: -1,
        count: 3,
        latency_ns: 0,
        latency_max_ns: 0,
    }
}

pub fn bash(k8s: bool) -> Bash {
    let cmd = format!("echo \"{}\" \\\n\t'ä'", "x".repeat(2000));
    let k8s = udp_row().local_k8s.filter(|_| k8s);
    Bash::new(
        1_790_000_000_123_456_789,
        17,
        "ann".into(),
        cmd.as_str().into(),
        false,
        k8s,
    )
}

/// Texts that try every rule: special characters, wide characters, too long.
///
/// Boxed, as the other parts of a row: value trees nested by value do not fit a test thread's stack.
fn text() -> BoxedStrategy<String> {
    prop_oneof![
        4 => "[a-z0-9-]{0,20}",
        3 => r#"[a-z\\,= \n"ä😀#{}\t]{0,40}"#,
        1 => any::<String>(),
        1 => r"[a😀\\\n,]{200,1500}",
        1 => (60_usize..140).prop_map(|len| "x".repeat(len)),
    ]
    .boxed()
}

fn ip() -> BoxedStrategy<IpAddr> {
    prop_oneof![
        any::<Ipv4Addr>().prop_map(IpAddr::V4),
        any::<Ipv6Addr>().prop_map(IpAddr::V6),
        // Runs of zero groups.
        prop::array::uniform8(prop_oneof![3 => Just(0_u16), 1 => any::<u16>(), 1 => 0_u16..32])
            .prop_map(|groups| IpAddr::V6(groups.into())),
        prop::sample::select(vec![
            "::ffff:1.2.3.4",
            "::",
            "::1",
            "127.0.0.1",
            "224.0.0.1",
            "ff02::1",
            "fc00::1"
        ])
        .prop_map(|ip| ip.parse().unwrap()),
    ]
    .boxed()
}

fn endpoint() -> impl Strategy<Value = Endpoint> {
    (ip(), prop_oneof![any::<u16>().prop_map(Port::Number), Just(Port::Any)])
        .prop_map(|(ip, port)| Endpoint { ip, port })
}

fn k8s() -> BoxedStrategy<Option<Arc<K8sEndpoint>>> {
    let key = prop_oneof![
        "[a-c./ ,=]{0,3}",
        Just("src_ip".to_owned()),
        Just("host".to_owned()),
        Just("rtt".to_owned()),
    ];
    let labels = prop::collection::vec((key, text()), 0..4);
    prop::option::of((text(), text(), text(), text(), text(), labels).prop_map(
        |(namespace, pod, service, workload, workload_type, labels)| {
            let labels = labels.into_iter().map(|(key, value)| (key.into(), value.into()));
            Arc::new(K8sEndpoint {
                labels: labels.collect(),
                namespace: namespace.into(),
                pod: pod.into(),
                service: service.into(),
                workload: workload.into(),
                workload_type: workload_type.into(),
            })
        },
    ))
    .boxed()
}

/// Any row. Its time is never 0, which protobuf writers may leave out.
pub fn any_row() -> BoxedStrategy<Netflow> {
    let ends = (endpoint(), endpoint(), prop::option::of((ip(), any::<u16>())));
    let kinds = (any::<bool>(), any::<bool>(), any::<bool>(), any::<u32>(), any::<u32>());
    let names = (text(), text(), k8s(), k8s());
    let number = || prop_oneof![Just(0), 0_u64..1000, any::<u64>()];
    let time = any::<i64>().prop_map(|time| time | 1);
    let counts = prop::array::uniform9(number());
    (ends, kinds, names, time, counts)
        .prop_map(
            |((local, remote, dst_nat), (udp, v6, incoming, netns, pid), names, time_unix_ns, counts)| {
                let (process_name, dst_domain, local_k8s, remote_k8s) = names;
                Netflow {
                    time_unix_ns,
                    local,
                    remote,
                    transport: if udp { Transport::Udp } else { Transport::Tcp },
                    family: if v6 { Family::V6 } else { Family::V4 },
                    direction: if incoming {
                        Direction::Incoming
                    } else {
                        Direction::Outgoing
                    },
                    netns,
                    pid,
                    process_name: process_name.into(),
                    dst_nat,
                    dst_domain: dst_domain.into(),
                    local_k8s,
                    remote_k8s,
                    bytes_read: counts[0],
                    bytes_written: counts[1],
                    retransmits: counts[2],
                    rtt_us: counts[3],
                    rtt_var_us: counts[4],
                    tcp_closed: counts[5],
                    tcp_established: counts[6],
                    datagrams_read: counts[7],
                    datagrams_written: counts[8],
                }
            },
        )
        .boxed()
}
