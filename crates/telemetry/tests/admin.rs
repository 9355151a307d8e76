//! The admin server over a real socket, and the document of the metrics it shows.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use axum::{Router, routing::get};
use ec_telemetry::{Telemetry, admin};
use prometheus_client::metrics::counter::Counter;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_util::sync::CancellationToken;

const ANY_PORT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

/// Status, headers and body of a GET.
async fn ask(addr: SocketAddr, path: &str) -> (u16, String, String) {
    let mut stream = TcpStream::connect(addr).await.unwrap();
    stream
        .write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes())
        .await
        .unwrap();
    let mut answer = String::new();
    tokio::time::timeout(Duration::from_secs(30), stream.read_to_string(&mut answer))
        .await
        .unwrap()
        .unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head.to_ascii_lowercase(), body.to_owned())
}

async fn start(telemetry: &Telemetry) -> (SocketAddr, CancellationToken) {
    let cancel = CancellationToken::new();
    let addr = admin::serve(ANY_PORT, telemetry.clone(), None, cancel.clone())
        .await
        .unwrap();
    (addr, cancel)
}

#[tokio::test]
async fn probes_follow_the_components() {
    let telemetry = Telemetry::new("test", "1.2.3");
    let (addr, _cancel) = start(&telemetry).await;
    assert_eq!(ask(addr, "/healthz").await.0, 200);
    assert_eq!(ask(addr, "/readyz").await.0, 503, "nothing has reported yet");

    let capture = telemetry.health.component("capture");
    let queue = telemetry.health.fatal_component("queue");
    capture.set_degraded("rtt: no BTF member");
    queue.set_ok();
    let (status, head, body) = ask(addr, "/readyz").await;
    assert_eq!(status, 200);
    assert!(head.contains("application/json"), "{head}");
    let json: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(json["ready"], true);
    assert_eq!(json["components"]["capture"]["state"], "degraded");
    assert_eq!(json["components"]["capture"]["reason"], "rtt: no BTF member");
    assert_eq!(json["components"]["queue"]["state"], "ok");
    assert!(json["components"]["queue"].get("reason").is_none());

    queue.set_failed("directory is gone");
    assert_eq!(ask(addr, "/readyz").await.0, 503);
    let (status, _, body) = ask(addr, "/healthz").await;
    assert_eq!(status, 503);
    assert!(body.contains("directory is gone"), "{body}");
}

#[tokio::test]
async fn ledger_is_shown_as_json_and_metrics() {
    let telemetry = Telemetry::new("test", "1.2.3");
    let stage = telemetry.ledger.stage("uplink.send");
    stage.entered(10);
    stage.emitted(4);
    stage.skipped("loopback", 2);
    stage.lost("window_full", 1);
    let requests = telemetry.register("test", |registry| {
        let counter: Counter = Counter::default();
        registry.register("requests", "Requests", counter.clone());
        counter
    });
    requests.inc_by(7);
    let (addr, _cancel) = start(&telemetry).await;

    let json: serde_json::Value = serde_json::from_str(&ask(addr, "/ledger").await.2).unwrap();
    assert_eq!(
        json["uplink.send"],
        serde_json::json!({"entered": 10, "emitted": 4, "skipped": {"loopback": 2}, "lost": {"window_full": 1}})
    );

    let (status, head, body) = ask(addr, "/metrics").await;
    assert_eq!(status, 200);
    assert!(
        head.contains("content-type: application/openmetrics-text; version=1.0.0"),
        "{head}"
    );
    for line in [
        r#"ebpfcollector_ledger_entered_total{stage="uplink.send"} 10"#,
        r#"ebpfcollector_ledger_emitted_total{stage="uplink.send"} 4"#,
        r#"ebpfcollector_ledger_skipped_total{stage="uplink.send",reason="loopback"} 2"#,
        r#"ebpfcollector_ledger_lost_total{stage="uplink.send",reason="window_full"} 1"#,
        r#"ebpfcollector_ledger_pending{stage="uplink.send"} 3"#,
        r#"ebpfcollector_build_info{component="test",version="1.2.3"} 1"#,
        "ebpfcollector_test_requests_total 7",
    ] {
        assert!(body.lines().any(|found| found == line), "no {line} in:\n{body}");
    }
    assert!(body.ends_with("# EOF\n"));
    let value = |name: &str| -> f64 {
        let line = body
            .lines()
            .find(|line| line.starts_with(&format!("{name} ")))
            .unwrap_or_else(|| panic!("{name}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    assert!(value("process_resident_memory_bytes") > 1e6);
    assert!(value("process_open_fds") >= 3.0);
    assert!(value("process_start_time_seconds") > 1.7e9);
    assert!(value("process_cpu_seconds_total") >= 0.0 && value("process_threads") >= 1.0);
}

#[tokio::test]
async fn extra_routes_unknown_paths_and_shutdown() {
    let telemetry = Telemetry::new("test", "0");
    let cancel = CancellationToken::new();
    let extra = Router::new().route("/capabilities", get(|| async { "all" }));
    let addr = admin::serve(ANY_PORT, telemetry, Some(extra), cancel.clone())
        .await
        .unwrap();
    assert_eq!(ask(addr, "/capabilities").await.2, "all");
    assert_eq!(ask(addr, "/nothing").await.0, 404);
    cancel.cancel();
    tokio::time::timeout(Duration::from_secs(30), async {
        while TcpStream::connect(addr).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("the server stops listening when it is told to end");
}

#[tokio::test]
async fn address_in_use_is_said_with_the_option() {
    let taken = TcpListener::bind(ANY_PORT).await.unwrap();
    let addr = taken.local_addr().unwrap();
    let error = admin::serve(addr, Telemetry::new("test", "0"), None, CancellationToken::new())
        .await
        .unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains(&addr.to_string()) && text.contains("admin_listen"),
        "{text}"
    );
    assert!(admin::DEFAULT_LISTEN.ip().is_loopback());
}

/// Every metric of this room is documented, and the document names none of them that does not exist.
#[test]
fn metrics_document_is_complete() {
    let telemetry = Telemetry::new("test", "0");
    telemetry.health.component("x").set_ok();
    let text = telemetry.render_metrics().unwrap();
    let shown: BTreeSet<String> = text
        .lines()
        .filter_map(|line| {
            let mut words = line.strip_prefix("# TYPE ")?.split(' ');
            let name = words.next()?;
            Some(match words.next()? {
                "counter" => format!("{name}_total"),
                "info" => format!("{name}_info"),
                _ => name.to_owned(),
            })
        })
        .collect();
    assert!(shown.len() >= 12, "{shown:?}");

    let document = include_str!("../../../docs/METRICS.md");
    let start = document.find("## Every process").expect("the section of this room");
    let section = document.get(start..).unwrap();
    let section = section
        .get(3..)
        .and_then(|rest| rest.find("\n## "))
        .map_or(section, |end| section.get(..end + 3).unwrap());
    let documented: BTreeSet<String> = section
        .lines()
        .filter_map(|line| Some(line.strip_prefix("| `")?.split(['`', '{']).next()?.to_owned()))
        .collect();
    assert_eq!(shown, documented);
}
