//! The DataWay stub: takes what the documentation promises, refuses everything else, fails as told.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, missing_docs)]

use std::{io::Write as _, net::SocketAddr, time::Duration};

use records::{
    Direction, Endpoint, Family, Globals, Netflow, Port, Transport,
    encode::{BodyBuilder, DEFAULT_BODY_LIMIT, EncodeOptions, Format, PointEncoder},
};
use testkit::dataway::{DatawayStub, Fault, StubConfig, StubHandle};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

const TOKEN: &str = "tkn_0123456789abcdef0123456789abcdef";

/// A request that a test can spoil before it is sent.
#[derive(Clone, Debug)]
struct Request {
    method: &'static str,
    target: String,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

// === impl Request ===

impl Request {
    fn write(format: Format, id: u32, body: &[u8], points: usize) -> Self {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        gzip.write_all(body).unwrap();
        Self {
            method: "POST",
            target: format!("/v1/write/network?token={TOKEN}"),
            headers: vec![
                ("X-Points", points.to_string()),
                ("Content-Type", format.content_type().to_owned()),
                ("Content-Encoding", "gzip".to_owned()),
                ("X-Pkg-Id", format!("dk_{id:020}")),
                ("User-Agent", "test-linux-amd64/1/host".to_owned()),
            ],
            body: gzip.finish().unwrap(),
        }
    }

    fn rows(format: Format, id: u32, rows: &[Netflow]) -> Self {
        let mut builder = BodyBuilder::new(format, DEFAULT_BODY_LIMIT);
        let encoder = encoder(format, false);
        for row in rows {
            assert_eq!(builder.push(&encoder, row), Ok(None));
        }
        Self::write(format, id, &builder.finish().unwrap().bytes, rows.len())
    }

    fn lines(lines: &str) -> Self {
        Self::write(Format::LineProtocol, 1, lines.as_bytes(), lines.lines().count())
    }

    fn header(mut self, name: &'static str, value: &str) -> Self {
        self.headers.retain(|(other, _)| *other != name);
        if !value.is_empty() {
            self.headers.push((name, value.to_owned()));
        }
        self
    }

    /// Status, headers as text, body; `None` when the connection was closed without an answer.
    async fn send(&self, addr: SocketAddr) -> Option<(u16, String, String)> {
        let Self {
            method,
            target,
            headers,
            body,
        } = self;
        let mut stream = TcpStream::connect(addr).await.unwrap();
        let mut head = format!("{method} {target} HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n");
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        head += &format!("Content-Length: {}\r\n\r\n", body.len());
        let mut answer = Vec::new();
        // The stub may close before it has read everything.
        let _ = stream.write_all(&[head.as_bytes(), body].concat()).await;
        let _ = stream.read_to_end(&mut answer).await;
        let answer = String::from_utf8(answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n")?;
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Some((status, head.to_lowercase(), body.to_owned()))
    }

    async fn status(&self, stub: &StubHandle) -> u16 {
        self.send(stub.addr).await.expect("an answer").0
    }
}

async fn stub() -> StubHandle {
    let config = StubConfig {
        token: TOKEN.to_owned(),
        extra_tags: vec!["env".to_owned()],
        ..StubConfig::default()
    };
    DatawayStub::start(config).await.unwrap()
}

fn encoder(format: Format, compat_keys: bool) -> PointEncoder {
    let tags = [("host", "web 1"), ("env", "prod=eu,1")].map(|(k, v)| (k.into(), v.into()));
    PointEncoder::new(format, &Globals { tags: tags.to_vec() }, EncodeOptions { compat_keys })
}

fn row(pid: u32) -> Netflow {
    Netflow {
        time_unix_ns: 1_790_000_000_123_456_789,
        local: Endpoint {
            ip: "10.0.0.7".parse().unwrap(),
            port: Port::Any,
        },
        remote: Endpoint {
            ip: "93.184.216.34".parse().unwrap(),
            port: Port::Number(443),
        },
        transport: Transport::Tcp,
        family: Family::V4,
        direction: Direction::Outgoing,
        netns: 1,
        pid,
        process_name: "curl".into(),
        dst_nat: None,
        dst_domain: "".into(),
        local_k8s: None,
        remote_k8s: None,
        bytes_read: 1500,
        bytes_written: u64::from(pid),
        retransmits: 0,
        rtt_us: 5,
        rtt_var_us: 1,
        tcp_closed: 1,
        tcp_established: 1,
        datagrams_read: 0,
        datagrams_written: 0,
    }
}

fn udp(pid: u32) -> Netflow {
    let udp = Transport::Udp;
    Netflow {
        transport: udp,
        retransmits: 0,
        rtt_us: 0,
        rtt_var_us: 0,
        tcp_closed: 0,
        tcp_established: 0,
        ..row(pid)
    }
}

/// The plain row as line protocol.
fn line() -> String {
    let mut out = Vec::new();
    encoder(Format::LineProtocol, false)
        .encode_into(&row(7), &mut out)
        .unwrap();
    String::from_utf8(out).unwrap()
}

#[tokio::test]
async fn takes_rows_of_both_formats_and_sums_them() {
    let stub = stub().await;
    for (id, format) in [(1, Format::Protobuf), (2, Format::LineProtocol)] {
        let request = Request::rows(format, id, &[row(7), row(7), udp(8)]);
        assert_eq!(request.status(&stub).await, 200, "{:?}", stub.summary().violations);
    }
    let summary = stub.summary();
    assert_eq!(
        (
            summary.points,
            summary.bodies,
            summary.gzip_bodies,
            summary.violations_total
        ),
        (6, 2, 2, 0)
    );
    assert_eq!(summary.points_by_measurement["netflow"], 6);
    assert!(summary.bytes_wire < summary.bytes_raw);
    let sums = stub.sums();
    assert_eq!(sums.len(), 2);
    assert_eq!(
        (sums[0].pid.as_str(), sums[0].transport.as_str(), sums[0].points),
        ("7", "tcp", 4)
    );
    assert_eq!(
        (sums[0].fields["bytes_read"], sums[0].fields["bytes_written"]),
        (6000, 28)
    );
    assert_eq!((sums[1].pid.as_str(), sums[1].fields["bytes_written"]), ("8", 16));
    assert!(!sums[1].fields.contains_key("rtt"));
    let points = stub.points();
    assert_eq!(points.len(), 6);
    assert_eq!(points[0].tags["host"], "web 1");
    assert_eq!(points[3].tags["env"], "prod=eu,1");
    assert_eq!(points[0].time, points[3].time);
    stub.stop().await;
}

#[tokio::test]
async fn a_repeated_body_is_answered_but_not_added() {
    let stub = stub().await;
    let request = Request::rows(Format::Protobuf, 1, &[row(7), row(8)]);
    assert_eq!(request.status(&stub).await, 200);
    assert_eq!(request.status(&stub).await, 200);
    let summary = stub.summary();
    assert_eq!(
        (summary.points, summary.duplicates, summary.duplicate_points),
        (2, 1, 2)
    );
    assert_eq!(stub.points().len(), 2);
}

#[tokio::test]
async fn refuses_requests_that_break_the_protocol() {
    let stub = stub().await;
    let good = Request::rows(Format::Protobuf, 1, &[row(7)]);
    let target = |target: &str| Request {
        target: target.to_owned(),
        ..good.clone()
    };
    let big = {
        let encoder = encoder(Format::Protobuf, false);
        let mut body = Vec::new();
        while body.len() <= DEFAULT_BODY_LIMIT {
            encoder.encode_into(&row(7), &mut body).unwrap();
        }
        Request::write(Format::Protobuf, 1, &body, 1)
    };
    let trailing = Request {
        body: [good.body.as_slice(), b"x"].concat(),
        ..good.clone()
    };
    let cut = Request {
        body: good.body[..good.body.len() - 9].to_vec(),
        ..good.clone()
    };
    let table = [
        (target("/v1/write/network"), 403),
        (target("/v1/write/network?token=tkn_wrong"), 403),
        (target(&format!("/v1/write/netwrok?token={TOKEN}")), 404),
        (target(&format!("/v1/write/logging?token={TOKEN}")), 400),
        (good.clone().header("X-Points", "2"), 400),
        (good.clone().header("X-Points", ""), 400),
        (good.clone().header("X-Pkg-Id", ""), 400),
        (good.clone().header("X-Pkg-Id", "dk_short"), 400),
        (good.clone().header("User-Agent", ""), 400),
        (good.clone().header("Content-Type", "application/protobuf"), 415),
        (good.clone().header("Content-Type", ""), 415),
        (
            good.clone().header("Content-Type", Format::LineProtocol.content_type()),
            400,
        ),
        (good.clone().header("Content-Encoding", ""), 400),
        (good.clone().header("Content-Encoding", "deflate"), 415),
        (trailing, 400),
        (cut, 400),
        (Request::write(Format::Protobuf, 1, b"", 0), 400),
        (big, 413),
    ];
    let count = table.len() as u64;
    for (index, (request, status)) in table.into_iter().enumerate() {
        assert_eq!(
            request.status(&stub).await,
            status,
            "row {index}: {:?}",
            stub.summary().violations.last()
        );
    }
    let summary = stub.summary();
    assert_eq!((summary.points, summary.violations_total), (0, count));
    assert!(
        !summary.violations.iter().any(|why| why.contains("tkn_")),
        "a token must not be written down"
    );
    // A refused id may still be used.
    assert_eq!(good.status(&stub).await, 200);
}

#[tokio::test]
async fn refuses_points_that_are_not_documented() {
    let stub = stub().await;
    let good = line();
    assert_eq!(Request::lines(&good).status(&stub).await, 200);
    let swaps = [
        ("netflow,direction", "netfolw,direction"),
        ("host=web\\ 1", "hostname=web\\ 1"),
        (",host=web\\ 1", ""),
        ("bytes_read=1500i", "bytes_read=1500"),
        ("bytes_read=1500i", "bytes_read=1500u"),
        ("bytes_read=1500i", "bytes_read=-1i"),
        ("bytes_read=1500i", "bytes_raed=1500i"),
        ("bytes_read=1500i", "bytes_read=1500i,bytes_read=1500i"),
        (",rtt=5i", ""),
        ("family=IPv4", "family=IPv6"),
        ("transport=tcp", "transport=udp"),
        ("transport=tcp", "transport=TCP"),
        ("direction=outgoing", "direction=unknown"),
        ("dst_port=443", "dst_port=0443"),
        ("dst_ip=93.184.216.34", "dst_ip=::ffff:93.184.216.34"),
        ("src_ip_type=private", "src_ip_type=other"),
        ("dst_nat_ip=N/A", "dst_nat_ip=1.2.3.4"),
        ("sub_source=N/A", "sub_source=K8s"),
        ("sub_source=N/A", "src_k8s_namespace=a,sub_source=K8s"),
        ("pid=7", "pid=seven"),
        ("1790000000123456789", "1790000000"),
        ("direction=outgoing", "cone=a,direction=outgoing"),
    ];
    for (from, to) in swaps {
        assert_eq!(good.matches(from).count(), 1, "{from} in {good}");
        let request = Request::lines(&good.replace(from, to));
        assert_eq!(request.status(&stub).await, 400, "{from} -> {to} was taken");
    }
    assert_eq!(stub.summary().points, 1);
}

#[tokio::test]
async fn compat_keys_are_refused_unless_allowed() {
    let strict = stub().await;
    let config = StubConfig {
        token: TOKEN.to_owned(),
        extra_tags: vec!["env".to_owned()],
        ..StubConfig::default()
    };
    let open = DatawayStub::start(StubConfig {
        compat_keys: true,
        ..config
    })
    .await
    .unwrap();
    let mut body = Vec::new();
    encoder(Format::Protobuf, true).encode_into(&row(7), &mut body).unwrap();
    let request = Request::write(Format::Protobuf, 1, &body, 1);
    assert_eq!(request.status(&strict).await, 400);
    assert_eq!(request.status(&open).await, 200, "{:?}", open.summary().violations);
}

#[tokio::test]
async fn faults_record_nothing() {
    let stub = stub().await;
    let request = Request::rows(Format::Protobuf, 1, &[row(7)]);
    stub.set_fault(Fault::Status {
        status: 429,
        retry_after: Some(3),
    });
    let (status, head, _) = request.send(stub.addr).await.unwrap();
    assert_eq!(status, 429);
    assert!(
        head.contains("retry-after: 3\r\n") || head.ends_with("retry-after: 3"),
        "{head}"
    );
    stub.set_fault(Fault::Close);
    assert_eq!(request.send(stub.addr).await, None);
    stub.set_fault(Fault::Hang { seconds: 0.05 });
    assert_eq!(request.send(stub.addr).await, None);
    assert_eq!(stub.summary().points, 0);
    assert_eq!(stub.summary().faulted.values().sum::<u64>(), 3);
    // Taken, but the sender is not told: it repeats, and the repetition is recognised.
    stub.set_fault(Fault::DropAnswer);
    assert_eq!(request.send(stub.addr).await, None);
    assert_eq!(stub.summary().points, 1);
    stub.set_fault(Fault::None);
    assert_eq!(request.status(&stub).await, 200);
    assert_eq!((stub.summary().points, stub.summary().duplicates), (1, 1));
}

#[tokio::test]
async fn a_hanging_stub_stops_at_once() {
    let stub = stub().await;
    stub.set_fault(Fault::Hang { seconds: 3600.0 });
    let addr = stub.addr;
    let request = Request::rows(Format::Protobuf, 1, &[row(7)]);
    let pending = tokio::spawn(async move { request.send(addr).await });
    while stub.summary().faulted.is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    tokio::time::timeout(Duration::from_secs(60), stub.stop())
        .await
        .expect("stops");
    assert_eq!(pending.await.unwrap(), None);
    // The port is free again: a gone DataWay can come back.
    let config = StubConfig {
        listen: addr,
        ..StubConfig::default()
    };
    DatawayStub::start(config).await.unwrap();
}

#[tokio::test]
async fn the_stub_is_driven_over_http() {
    let stub = stub().await;
    let page = |method, target: &str, body: &str| Request {
        method,
        target: target.to_owned(),
        headers: Vec::new(),
        body: body.as_bytes().to_vec(),
    };
    let fault = |body: &str| page("POST", "/_stub/fault", body);
    for bad in [
        r#"{"mode":"explode"}"#,
        r#"{"mode":"status","status":99}"#,
        r#"{"mode":"hang","seconds":-1}"#,
        "x",
    ] {
        assert_eq!(fault(bad).status(&stub).await, 400, "{bad}");
    }
    assert_eq!(
        fault(r#"{"mode":"status","status":503,"retry_after":1}"#)
            .status(&stub)
            .await,
        204
    );
    let request = Request::rows(Format::LineProtocol, 1, &[row(7), row(8)]);
    assert_eq!(request.status(&stub).await, 503);
    assert_eq!(fault(r#"{"mode":"none"}"#).status(&stub).await, 204);
    assert_eq!(request.status(&stub).await, 200);
    let get = async |target: &str| -> serde_json::Value {
        let (status, _, body) = page("GET", target, "").send(stub.addr).await.unwrap();
        assert_eq!(status, 200);
        serde_json::from_str(&body).unwrap()
    };
    let summary = get("/_stub/summary").await;
    assert_eq!(summary["points"], 2);
    assert_eq!(summary["requests"], serde_json::json!({ "200": 1, "503": 1 }));
    let points = get("/_stub/points?limit=1").await;
    assert_eq!(points.as_array().unwrap().len(), 1);
    assert_eq!(points[0]["tags"]["pid"], "8");
    assert_eq!(points[0]["fields"]["bytes_read"], 1500);
    assert_eq!(get("/_stub/sums").await.as_array().unwrap().len(), 2);
    assert_eq!(get("/_stub/fault").await["mode"], "none");
}

#[tokio::test]
async fn kept_points_are_bounded() {
    let config = StubConfig {
        token: TOKEN.to_owned(),
        extra_tags: vec!["env".to_owned()],
        ..StubConfig::default()
    };
    let stub = DatawayStub::start(StubConfig {
        keep_points: 3,
        ..config.clone()
    })
    .await
    .unwrap();
    let sums_only = DatawayStub::start(StubConfig {
        keep_points: 0,
        ..config
    })
    .await
    .unwrap();
    let rows: Vec<_> = (1..=5).map(row).collect();
    let request = Request::rows(Format::Protobuf, 1, &rows);
    assert_eq!(
        (request.status(&stub).await, request.status(&sums_only).await),
        (200, 200)
    );
    let pids: Vec<_> = stub
        .points()
        .into_iter()
        .map(|mut point| point.tags.remove("pid").unwrap())
        .collect();
    assert_eq!(pids, ["3", "4", "5"]);
    assert!(sums_only.points().is_empty());
    assert_eq!((sums_only.summary().points, sums_only.sums().len()), (5, 5));
}
