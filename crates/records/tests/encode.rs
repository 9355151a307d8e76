//! Encoders against independent decoders and an independent statement of the documented measurement.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, missing_docs)]

mod common;

use common::{Other, any_row, decode_lines, decode_protobuf, expected, globals, tcp_row, udp_row, without_empty};
use ec_records::{
    Measurement,
    encode::{BodyBuilder, EncodeOptions, Format, PointEncoder, Record, table_header},
};
use proptest::prelude::*;

const GLOBALS: &[(&str, &str)] = &[
    ("host", "node 1"),
    ("env", "prod,eu=1"),
    ("empty", ""),
    ("pid", "never"),
    ("dst_k8s_namespace", "only without kubernetes"),
    ("zone", "a\\b"),
];

fn encoder(format: Format) -> PointEncoder {
    PointEncoder::new(format, &globals(GLOBALS), EncodeOptions::default())
}

fn encode<R: Record>(encoder: &PointEncoder, rows: &[R]) -> Vec<u8> {
    let mut out = Vec::new();
    for row in rows {
        encoder.encode_into(row, &mut out).expect("fits");
    }
    out
}

proptest! {
    #[test]
    fn protobuf_holds_exactly_the_row(rows in prop::collection::vec(any_row(), 1..4)) {
        let bytes = encode(&encoder(Format::Protobuf), &rows);
        let want: Vec<_> = rows.iter().map(|row| expected(row, GLOBALS)).collect();
        prop_assert_eq!(decode_protobuf(&bytes), want);
        // Every length is in its shortest form: an independent writer produces the same bytes.
        let decoded = <common::pb::Points as prost::Message>::decode(&*bytes).unwrap();
        prop_assert_eq!(prost::Message::encode_to_vec(&decoded), bytes);
    }

    #[test]
    fn lines_hold_exactly_the_row(rows in prop::collection::vec(any_row(), 1..4)) {
        let bytes = encode(&encoder(Format::LineProtocol), &rows);
        let want: Vec<_> = rows.iter().map(|row| without_empty(expected(row, GLOBALS))).collect();
        prop_assert_eq!(decode_lines(std::str::from_utf8(&bytes).unwrap()), want);
    }

    #[test]
    fn json_holds_exactly_the_row(row in any_row()) {
        let bytes = encode(&encoder(Format::Json), std::slice::from_ref(&row));
        prop_assert_eq!(bytes.iter().filter(|byte| **byte == b'\n').count(), 1);
        let got: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&bytes).unwrap();
        let want = expected(&row, GLOBALS);
        let mut object = serde_json::Map::new();
        object.insert("measurement".to_owned(), want.name.into());
        object.insert("time".to_owned(), want.time.into());
        object.extend(want.tags.into_iter().map(|(key, value)| (key, value.into())));
        object.extend(want.fields.into_iter().map(|(key, value)| (key, value.into())));
        if row.transport == ec_records::Transport::Udp {
            let int = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
            object.insert("datagrams_read".to_owned(), int(row.datagrams_read).into());
            object.insert("datagrams_written".to_owned(), int(row.datagrams_written).into());
        }
        prop_assert_eq!(got, object);
    }

    #[test]
    fn table_rows_are_one_line(row in any_row()) {
        let text = String::from_utf8(encode(&encoder(Format::Table), &[row])).unwrap();
        prop_assert_eq!(text.matches('\n').count(), 1);
        prop_assert!(text.ends_with('\n'));
    }
}

#[test]
fn line_of_a_tcp_row() {
    let encoder = PointEncoder::new(
        Format::LineProtocol,
        &globals(&[("host", "web-1")]),
        EncodeOptions::default(),
    );
    assert_eq!(
        String::from_utf8(encode(&encoder, &[tcp_row()])).unwrap(),
        "netflow,direction=outgoing,dst_domain=example.com,dst_ip=93.184.216.34,dst_ip_type=other,dst_nat_ip=N/A,\
         dst_nat_port=N/A,dst_port=443,family=IPv4,host=web-1,pid=4711,process_name=curl,source=netflow,\
         src_ip=10.0.0.7,src_ip_type=private,src_port=*,sub_source=N/A,transport=tcp \
         bytes_read=1500i,bytes_written=300i,retransmits=1i,rtt=12345i,rtt_var=678i,tcp_closed=2i,tcp_established=3i \
         1790000000123456789\n"
    );
}

#[test]
fn line_of_a_udp_row_of_a_pod() {
    let encoder = PointEncoder::new(
        Format::LineProtocol,
        &globals(&[("host", "node 1")]),
        EncodeOptions::default(),
    );
    assert_eq!(
        String::from_utf8(encode(&encoder, &[udp_row()])).unwrap(),
        "netflow,app_kubernetes_io/name=coredns,direction=incoming,dst_ip=2001:db8::5,dst_ip_type=other,\
         dst_k8s_deployment_name=N/A,\
         dst_k8s_namespace=N/A,dst_k8s_pod_name=N/A,dst_k8s_service_name=N/A,dst_nat_ip=N/A,dst_nat_port=N/A,\
         dst_port=*,family=IPv6,host=node\\ 1,pid=4711,process_name=my\\ dns\\,\\ v\\=1,source=netflow,src_ip=fd00::1,\
         src_ip_type=private,src_k8s_deployment_name=coredns,src_k8s_namespace=kube-system,\
         src_k8s_pod_name=coredns-1,src_k8s_service_name=N/A,src_port=53,sub_source=K8s,\
         team=dns\\,\\ core,transport=udp \
         bytes_read=1500i,bytes_written=300i 1790000000123456789\n"
    );
}

#[test]
fn json_of_a_udp_row() {
    let encoder = PointEncoder::new(
        Format::Json,
        &globals(&[("host", "h"), ("time", "no")]),
        EncodeOptions::default(),
    );
    let text = String::from_utf8(encode(&encoder, &[udp_row()])).unwrap();
    assert!(
        text.starts_with(r#"{"measurement":"netflow","time":1790000000123456789,"source":"netflow","#),
        "{text}"
    );
    assert!(
        text.ends_with(
            "\"bytes_read\":1500,\"bytes_written\":300,\"datagrams_read\":10,\"datagrams_written\":11,\"host\":\"h\",\
             \"team\":\"dns, core\",\"app_kubernetes_io/name\":\"coredns\"}\n"
        ),
        "{text}"
    );
}

#[test]
fn protobuf_bytes_of_the_first_tag() {
    let bytes = encode(&encoder(Format::Protobuf), &[tcp_row()]);
    // arr = 1 with a two-byte length, name = 1, then field 2 { key = 1, s = 11, is_tag = 8 }.
    assert_eq!(bytes[0], 0x0a);
    let mut want = b"\x0a\x07netflow\x12\x13\x0a\x06source\x5a\x07netflow\x40\x01".to_vec();
    want[10] = (want.len() - 11) as u8;
    assert_eq!(&bytes[3..3 + want.len()], want);
}

#[test]
fn table_columns_line_up_under_their_heads() {
    let text = String::from_utf8(encode(&encoder(Format::Table), &[tcp_row()])).unwrap();
    let head = table_header(Measurement::Netflow);
    assert_eq!(text.len(), head.len(), "\n{head}{text}");
    for (title, value) in [
        ("LOCAL ", "10.0.0.7:* "),
        ("REMOTE ", "93.184.216.34:443 "),
        ("PROCESS ", "curl "),
    ] {
        assert_eq!(head.find(title), text.find(value), "{title}\n{head}{text}");
    }
    for (title, value) in [
        (" READ ", " 1500 "),
        (" WRITTEN ", " 300 "),
        (" RTT_US ", " 12345 "),
        (" PID ", " 4711 "),
    ] {
        let end = |text: &str, word: &str| text.find(word).map(|at| at + word.len());
        assert_eq!(end(head, title), end(&text, value), "{title}\n{head}{text}");
    }
}

#[test]
fn compat_keys_follow_the_client_and_the_server() {
    let options = EncodeOptions { compat_keys: true };
    let encoder = PointEncoder::new(Format::Protobuf, &globals(&[("host", "h")]), options);
    let points = decode_protobuf(&encode(&encoder, &[tcp_row(), udp_row()]));
    let tags = |index: usize, wanted: &[(&str, &str)]| {
        for (key, value) in wanted {
            assert_eq!(points[index].tags.get(*key).map(String::as_str), Some(*value), "{key}");
        }
    };
    tags(
        0,
        &[
            ("conn_side", "client"),
            ("client_ip", "10.0.0.7"),
            ("client_ip_type", "private"),
            ("client_port", "*"),
        ],
    );
    tags(
        0,
        &[
            ("server_ip", "93.184.216.34"),
            ("server_ip_type", "other"),
            ("server_port", "443"),
        ],
    );
    tags(
        0,
        &[
            ("server_domain", "example.com"),
            ("netns", "4026531840"),
            ("service", "ebpf"),
        ],
    );
    assert_eq!(
        (points[0].fields["client_sent"], points[0].fields["server_sent"]),
        (300, 1500)
    );
    assert!(!points[0].tags.keys().any(|key| key.contains("k8s")));
    // Incoming: the server is this end, and its class is its own.
    tags(
        1,
        &[
            ("conn_side", "server"),
            ("server_ip", "fd00::1"),
            ("server_ip_type", "private"),
            ("server_domain", ""),
        ],
    );
    tags(
        1,
        &[
            ("client_ip", "2001:db8::5"),
            ("client_ip_type", "other"),
            ("client_k8s_namespace", "N/A"),
        ],
    );
    tags(
        1,
        &[
            ("server_k8s_workload_name", "coredns"),
            ("server_k8s_workload_type", "deployment"),
        ],
    );
    tags(
        1,
        &[("src_k8s_workload_name", "coredns"), ("dst_k8s_workload_type", "N/A")],
    );
    assert_eq!(
        (points[1].fields["client_sent"], points[1].fields["server_sent"]),
        (1500, 300)
    );

    let own = PointEncoder::new(Format::Protobuf, &globals(&[("service", "shop")]), options);
    assert!(own.adjustments().is_empty());
    assert_eq!(decode_protobuf(&encode(&own, &[tcp_row()]))[0].tags["service"], "shop");
}

#[test]
fn fields_of_every_type_arrive_in_protobuf() {
    let encoder = PointEncoder::new(Format::Protobuf, &globals(&[("host", "h")]), EncodeOptions::default());
    let rows = [common::httpflow(udp_row(), None), common::httpflow(tcp_row(), Some(14))];
    let bytes = encode(&encoder, &rows);
    let points = decode_protobuf(&bytes);
    for (point, row) in points.iter().zip(&rows) {
        let base = if row.grpc_status.is_some() {
            tcp_row()
        } else {
            udp_row()
        };
        let mut tags = expected(&base, &[("host", "h")]).tags;
        tags.insert("source".to_owned(), "httpflow".to_owned());
        assert_eq!((point.name.as_str(), &point.tags), ("httpflow", &tags));
        let mut fields = std::collections::BTreeMap::from([
            ("bytes_read", 11),
            ("bytes_written", 12),
            ("count", 7),
            ("latency", i64::MAX),
            ("status_code", 404),
        ]);
        fields.extend(row.grpc_status.map(|status| ("grpc_status", status.into())));
        let got = point.fields.iter().map(|(key, value)| (key.as_str(), *value));
        assert!(got.eq(fields), "{:?}", point.fields);
        let text = |text: &str| Other::Text(text.to_owned());
        let others = [
            ("http_version", text("1.1")),
            ("method", text("GET")),
            ("path", text("/a \"b\" c\\d,e=f\n")),
            ("truncated", Other::Bool(true)),
        ];
        let got = point.others.iter().map(|(key, value)| (key.as_str(), value.clone()));
        assert!(got.eq(others), "{:?}", point.others);
    }
    let bash = encode(&encoder, &[common::bash(true), common::bash(false)]);
    for (decoded, bytes) in [(&bytes, &bytes), (&bash, &bash)] {
        let points = <common::pb::Points as prost::Message>::decode(&**decoded).unwrap();
        assert_eq!(&prost::Message::encode_to_vec(&points), bytes, "shortest form");
    }
    let points = decode_protobuf(&bash);
    assert_eq!(
        points[0].others["cmd"],
        Other::Text(common::bash(true).cmd.to_string()),
        "texts are not cut"
    );
    assert_eq!(points[0].others["pid"], Other::Text("17".to_owned()));
    assert_eq!(points[0].tags["k8s_pod_name"], "coredns-1");
    assert_eq!(points[1].tags.keys().collect::<Vec<_>>(), ["host"]);
}

#[test]
fn lines_of_the_other_measurements() {
    let encoder = PointEncoder::new(
        Format::LineProtocol,
        &globals(&[("host", "h")]),
        EncodeOptions::default(),
    );
    let line = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let http = line(encode(&encoder, &[common::httpflow(tcp_row(), None)]));
    assert!(
        http.ends_with(
            " bytes_read=11i,bytes_written=12i,count=7i,http_version=\"1.1\",latency=9223372036854775807i,method=\"GET\",\
             path=\"/a \\\"b\\\" c\\\\d,e=f\n\",status_code=404i,truncated=true 1790000000123456789\n"
        ),
        "{http}"
    );
    let dns = line(encode(
        &encoder,
        &[
            common::dnsflow(tcp_row(), Some(("a b.example", "AAAA"))),
            common::dnsflow(tcp_row(), None),
        ],
    ));
    assert!(dns.starts_with("dnsflow,direction=outgoing,"), "{dns}");
    assert!(!dns.contains("pid=") && !dns.contains("dst_nat"), "{dns}");
    assert!(
        dns.contains(",host=h,query_name=a\\ b.example,query_type=AAAA,source=dnsflow,"),
        "{dns}"
    );
    assert_eq!(dns.matches("query_name").count(), 1, "only where it is reported");
    assert!(
        dns.ends_with(" count=3i,latency=0i,latency_max=0i,rcode=-1i 1790000000123456789\n"),
        "{dns}"
    );
    let bash = line(encode(&encoder, &[common::bash(false)]));
    assert!(bash.starts_with("bash,host=h cmd=\"echo \\\"xxx"), "{bash}");
    assert!(
        bash.contains("\",message=\"2026-09-21T14:13:20Z pid:`17` user:`ann` cmd:`echo \\\"x"),
        "{bash}"
    );
    assert!(
        bash.ends_with(",pid=\"17\",status=\"info\",truncated=false,user=\"ann\" 1790000000123456789\n"),
        "{bash}"
    );
}

#[test]
fn json_has_numbers_texts_and_truths() {
    let encoder = PointEncoder::new(Format::Json, &globals(&[("host", "h")]), EncodeOptions::default());
    let object = |bytes: Vec<u8>| serde_json::from_slice::<serde_json::Value>(&bytes).unwrap();
    let http = object(encode(&encoder, &[common::httpflow(tcp_row(), Some(0))]));
    assert_eq!(http["measurement"], "httpflow");
    assert_eq!(http["path"], "/a \"b\" c\\d,e=f\n");
    assert_eq!((&http["truncated"], &http["grpc_status"]), (&true.into(), &0.into()));
    let row = common::bash(true);
    let bash = object(encode(&encoder, std::slice::from_ref(&row)));
    assert_eq!((&bash["cmd"], &bash["pid"]), (&(*row.cmd).into(), &"17".into()));
    assert_eq!(bash["status"], "info");
}

#[test]
fn tables_have_a_head_for_each_kind() {
    let encoder = encoder(Format::Table);
    let mut body = BodyBuilder::new(Format::Table, 1 << 20);
    for _ in 0..2 {
        body.push(&encoder, &tcp_row()).unwrap();
    }
    body.push(&encoder, &common::httpflow(tcp_row(), None)).unwrap();
    body.push(&encoder, &common::dnsflow(tcp_row(), Some(("a\nb", "A"))))
        .unwrap();
    body.push(&encoder, &common::bash(false)).unwrap();
    let body = body.finish().unwrap();
    assert_eq!(body.points, 5);
    let text = String::from_utf8(body.bytes).unwrap();
    assert_eq!(text.lines().count(), 9, "{text}");
    for kind in Measurement::POINTS {
        assert_eq!(text.matches(table_header(kind)).count(), 1, "{text}");
    }
    assert!(text.contains(" A a b\n"), "{text}");
}
