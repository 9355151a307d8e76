//! The traffic roles against independent counts: sockets of the standard library, and the kernel's own (`ss`).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream, UdpSocket},
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use testkit::traffic::{
    launch::Stage,
    report::{Counts, Report},
};

const PATIENCE: Duration = Duration::from_secs(60);

fn stage(name: &str) -> Stage {
    let directory = std::env::temp_dir().join(format!("traffic-test-{name}-{}", std::process::id()));
    Stage::new(directory, Path::new(env!("CARGO_BIN_EXE_traffic"))).unwrap()
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

fn free_tcp_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn total(reports: &[Report]) -> Counts {
    let mut sum = Counts::default();
    reports.iter().for_each(|report| sum.add(&report.total()));
    sum
}

#[test]
fn a_client_counts_what_a_plain_server_saw() {
    let stage = stage("client");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = std::thread::spawn(move || {
        let (mut connections, mut received, mut sent) = (0_u64, 0_u64, 0_u64);
        for connection in listener.incoming().take(200) {
            let mut connection = connection.unwrap();
            let mut payload = Vec::new();
            connection.read_to_end(&mut payload).unwrap();
            let answer = vec![1_u8; payload.len() % 777];
            connection.write_all(&answer).unwrap();
            connections += 1;
            received += payload.len() as u64;
            sent += answer.len() as u64;
        }
        (connections, received, sent)
    });
    let text = format!("tcp-client --dst=127.0.0.1 --port={port} --connections=200 --pattern=request --per-process=50");
    stage.start("t-c", &words(&text)).unwrap().join(PATIENCE).unwrap();
    let reports = stage.reports().unwrap();
    assert_eq!(reports.len(), 4, "one report per short-lived process");
    let sum = total(&reports);
    let (connections, received, sent) = server.join().unwrap();
    assert_eq!(
        (sum.connections, sum.bytes_sent, sum.bytes_received),
        (connections, received, sent)
    );
    assert!(
        reports
            .iter()
            .all(|report| report.name == "t-c" && report.errors.is_empty()),
        "{reports:?}"
    );
}

#[test]
fn every_server_mode_counts_what_plain_clients_sent() {
    for mode in ["inline", "prefork", "fork", "fork-exec"] {
        let stage = stage(mode);
        stage.link("t-x").unwrap();
        let port = free_tcp_port();
        let text = format!(
            "tcp-server --listen=127.0.0.1 --port={port} --mode={mode} --second-name=t-x --pattern=request --down=10-90"
        );
        let mut server = stage.start("t-s", &words(&text)).unwrap();
        server.expect("ready").unwrap();
        let (mut sent, mut received) = (0, 0);
        for length in [0_usize, 1, 5000, 70_000] {
            let mut client = TcpStream::connect(("127.0.0.1", port)).unwrap();
            client.write_all(&vec![7; length]).unwrap();
            client.shutdown(std::net::Shutdown::Write).unwrap();
            let mut answer = Vec::new();
            client.read_to_end(&mut answer).unwrap();
            sent += length as u64;
            received += answer.len() as u64;
        }
        server.stop(PATIENCE).unwrap();
        let reports = stage.reports().unwrap();
        let sum = total(&reports);
        assert_eq!((sum.connections, sum.closed), (4, 4), "{mode}");
        assert_eq!((sum.bytes_received, sum.bytes_sent), (sent, received), "{mode}");
        assert_eq!(
            reports.iter().any(|report| report.name == "t-x"),
            mode == "fork-exec",
            "{mode}"
        );
    }
}

#[test]
fn udp_roles_count_what_plain_sockets_saw() {
    let stage = stage("udp");
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let port = socket.local_addr().unwrap().port();
    for mode in ["connected", "unconnected", "mmsg", "gso"] {
        stage.clear_reports().unwrap();
        let text = format!(
            "udp-client --dst=127.0.0.1 --port={port} --datagrams=333 --size=700 --mode={mode} --reply-every=10"
        );
        let client = stage.start("u-c", &words(&text)).unwrap();
        let (mut received, mut replies) = (0_u64, 0_u64);
        let mut buffer = [0_u8; 65_536];
        for _ in 0..333 {
            let (length, from) = socket.recv_from(&mut buffer).unwrap();
            received += length as u64;
            if length > 0 && buffer[0] == 1 {
                socket.send_to(b"abc", from).unwrap();
                replies += 1;
            }
        }
        client.join(PATIENCE).unwrap();
        let reports = stage.reports().unwrap();
        let sum = total(&reports);
        assert_eq!((sum.datagrams_sent, sum.bytes_sent), (333, received), "{mode}");
        assert_eq!(
            (sum.datagrams_received, sum.bytes_received),
            (replies, replies * 3),
            "{mode}"
        );
        assert!(replies > 0, "{mode} never asked for a reply");
    }
}

#[test]
fn held_connections_agree_with_the_kernels_own_counts() {
    let stage = stage("hold");
    let port = free_tcp_port();
    let text = format!("tcp-server --listen=127.0.0.1 --port={port} --mode=event --up=1-8000 --down=0-8000");
    let mut server = stage.start("h-s", &words(&text)).unwrap();
    server.expect("ready").unwrap();
    let text = format!("tcp-hold --dst=127.0.0.1 --port={port} --connections=20 --rounds=3 --pause-ms=1 --hold");
    let mut client = stage.start("h-c", &words(&text)).unwrap();
    client.expect("holding").unwrap();
    // What was written may wait for a moment, where the kernel paces.
    let deadline = Instant::now() + PATIENCE;
    let kernel = loop {
        let output = Command::new("ss")
            .args(["-tinOH", "state", "established", "dport", &format!("= {port}")])
            .output();
        let kernel = String::from_utf8(output.expect("ss (package iproute2) is needed").stdout).unwrap();
        let all_sent = kernel.lines().all(|line| line.split_whitespace().nth(1) == Some("0"));
        if all_sent || Instant::now() > deadline {
            break kernel;
        }
    };
    let sum_of = |key: &str| -> u64 {
        kernel
            .split_whitespace()
            .filter_map(|word| word.strip_prefix(key)?.parse::<u64>().ok())
            .sum()
    };
    client.stop(PATIENCE).unwrap();
    server.stop(PATIENCE).unwrap();
    let reports = stage.reports().unwrap();
    let own = reports.iter().find(|report| report.name == "h-c").unwrap().total();
    assert_eq!(own.connections, 20);
    assert_eq!(
        (own.bytes_sent, own.bytes_received),
        (sum_of("bytes_sent:"), sum_of("bytes_received:")),
        "{kernel}"
    );
    let other = reports.iter().find(|report| report.name == "h-s").unwrap().total();
    assert_eq!(
        (other.bytes_received, other.bytes_sent),
        (own.bytes_sent, own.bytes_received)
    );
}
