//! `httpflow`: what comes out is what servers' access logs say, and what clients count.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener},
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};

use crate::{
    http_net::{Client, Nginx, Sum, Sums, add, curl, number, rows, rows_at, sums_of, text, wait_for},
    process::{Agent, Rights, directory, doctor},
};

const HTTPFLOW: &str = "ebpf-net/httpflow";

/// Fails with what differs.
#[track_caller]
fn same(what: &str, got: &Sums, expected: &Sums) {
    let keys: BTreeSet<_> = got.keys().chain(expected.keys()).collect();
    let differ: Vec<_> = keys
        .into_iter()
        .filter(|key| got.get(*key) != expected.get(*key))
        .map(|key| format!("{key:?}: {:?}, not {:?}", got.get(key), expected.get(key)))
        .collect();
    assert!(differ.is_empty(), "{what}:\n{}", differ.join("\n"));
}

fn total(sums: &Sums) -> u64 {
    sums.values().map(|sum| sum.count).sum()
}

/// What the agent says of itself.
fn metrics(agent: &Agent) -> String {
    let all = agent.metrics();
    let lines = all
        .lines()
        .filter(|line| line.contains("httpflow") && !line.starts_with('#'));
    lines.collect::<Vec<_>>().join("\n")
}

/// Files of these sizes below `www`.
fn files(directory: &std::path::Path, sizes: &[(&str, u64)]) {
    let www = directory.join("www");
    fs::create_dir_all(&www).unwrap();
    for (name, size) in sizes {
        File::create(www.join(name)).unwrap().set_len(*size).unwrap();
    }
}

/// What is sent ahead comes in one burst. What the agent cuts when it does not run meanwhile is another test's.
const ROOM: &str = "--ring-buffer-size=64MiB";

#[test]
#[ignore = "native: needs root"]
fn rows_are_what_the_access_log_says() {
    let directory = directory();
    let path = directory.path();
    files(
        path,
        &[("small", 1024), ("empty", 0), ("page", 50_000), ("big", 200_000_000)],
    );
    let nginx = Nginx::start(path);
    let agent = Agent::start(Rights::Own, path, &["--ephemeral-port=10001", ROOM]);
    let port = nginx.port;
    let (mut clients, mut sent) = (Sums::new(), Sums::new());
    let v6 = SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, port));
    for host in ["127.0.0.1", "[::1]"] {
        let url = |path: &str| format!("http://{host}:{port}{path}");
        for (method, path, status) in [
            ("GET", "/small", 200),
            ("GET", "/empty", 200),
            ("GET", "/page?secret=1", 200),
            ("GET", "/nothing/here", 404),
            ("GET", "/teapot", 418),
            ("DELETE", "/small", 405),
            ("GET", "/big", 200),
        ] {
            let curled = curl(&["-X", method, &url(path)]);
            let plain = path.split('?').next().unwrap();
            add(
                &mut clients,
                (method.to_owned(), plain.to_owned(), status),
                curled.request,
                curled.response,
            );
        }
        // A body in chunks, and one that is sent.
        curl(&["--compressed", &url("/zip/page")]);
        let upload = path.join("www/page").display().to_string();
        let curled = curl(&["-H", "Expect: 100-continue", "-T", &upload, &url("/put/waits")]);
        let asked = ("PUT".to_owned(), "/put/waits".to_owned(), 201);
        add(&mut sent, asked, curled.request, 0);
        for (method, size) in [("POST", 10), ("PUT", 70_000), ("PATCH", 300_000)] {
            let mut request = format!("{method} /put HTTP/1.1\r\nHost: test\r\nContent-Length: {size}\r\n\r\n");
            request.extend(std::iter::repeat_n('x', size));
            let mut client = Client::connect(if host == "[::1]" { v6 } else { nginx.address() });
            client.send(request.as_bytes());
            client.response(false);
            add(&mut sent, (method.to_owned(), "/put".to_owned(), 201), request.len(), 0);
        }
    }
    // One connection for many, of both families, and 1,000 requests ahead of their responses.
    for to in [nginx.address(), v6] {
        let mut client = Client::connect(to);
        for n in 0..300 {
            let path = ["/small", "/page", "/empty?x=1", "/no", "/teapot"][n % 5];
            client.exchange(if n % 7 == 0 { "HEAD" } else { "GET" }, path, &mut clients);
        }
        let mut all = Vec::new();
        for n in 0..1000 {
            let request = format!(
                "GET /{} HTTP/1.1\r\nHost: test\r\n\r\n",
                ["small", "empty", "gone"][n % 3]
            );
            all.extend_from_slice(request.as_bytes());
        }
        let mut writer = client.writer();
        let sender = thread::spawn(move || writer.write_all(&all).unwrap());
        for n in 0..1000 {
            let name = ["small", "empty", "gone"][n % 3];
            let (status, bytes) = client.response(false);
            let request = format!("GET /{name} HTTP/1.1\r\nHost: test\r\n\r\n").len();
            add(
                &mut clients,
                ("GET".to_owned(), format!("/{name}"), status),
                request,
                bytes,
            );
        }
        sender.join().unwrap();
    }
    let mut truth = nginx.truth();
    // nginx does not count bodies that it does not keep.
    for (asked, sum) in &sent {
        truth.get_mut(asked).unwrap().requests = sum.requests;
    }
    // What is idle is reported within an interval.
    wait_for("all exchanges are in rows", || {
        let rows = rows(path);
        let seen = |direction| total(&sums_of(&rows_at(&rows, direction, &[port])));
        seen("incoming") >= total(&truth) && seen("outgoing") >= total(&truth)
    });
    let metrics = metrics(&agent);
    agent.stop();
    let rows = rows(path);
    let (served, asked) = (rows_at(&rows, "incoming", &[port]), rows_at(&rows, "outgoing", &[port]));
    println!("{metrics}");
    same("servers", &sums_of(&served), &truth);
    same("clients", &sums_of(&asked), &truth);
    for (asked, sum) in &clients {
        // What curl and the test's client counted is in the log, too.
        let logged = truth.get(asked).unwrap_or_else(|| panic!("{asked:?} of {truth:?}"));
        assert!(
            logged.requests >= sum.requests && logged.responses >= sum.responses,
            "{asked:?}"
        );
    }
    let versions: BTreeSet<&str> = served.iter().map(|row| text(row, "http_version")).collect();
    assert_eq!(versions, BTreeSet::from(["1.1"]));
    assert!(
        served.iter().all(|row| text(row, "process_name") == "nginx"),
        "{served:?}"
    );
    assert!(asked.iter().all(|row| text(row, "pid") != "0"), "{asked:?}");
    let families: BTreeSet<&str> = served.iter().map(|row| text(row, "family")).collect();
    assert_eq!(families, BTreeSet::from(["IPv4", "IPv6"]));
    assert!(served.iter().all(|row| row["truncated"] == false));
}

#[test]
#[ignore = "native: needs root"]
fn connections_older_than_the_agent_are_followed() {
    let directory = directory();
    let path = directory.path();
    files(path, &[("small", 1024)]);
    let nginx = Nginx::start(path);
    let mut clients: Vec<Client> = (0..20).map(|_| Client::connect(nginx.address())).collect();
    let (mut before, mut after) = (Sums::new(), Sums::new());
    for client in &mut clients {
        client.exchange("GET", "/small", &mut before);
    }
    let agent = Agent::start(Rights::Own, path, &[]);
    for client in &mut clients {
        for _ in 0..3 {
            client.exchange("GET", "/small", &mut after);
        }
    }
    thread::sleep(Duration::from_secs(2));
    agent.stop();
    let rows = rows(path);
    for direction in ["incoming", "outgoing"] {
        same(direction, &sums_of(&rows_at(&rows, direction, &[nginx.port])), &after);
    }
}

/// A server that answers after a while, in pieces.
fn slow_server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            thread::spawn(move || {
                let mut buffer = [0; 4096];
                while stream.read(&mut buffer).unwrap_or(0) > 0 {
                    thread::sleep(Duration::from_millis(60));
                    // The head in three pieces, then chunks.
                    for piece in [
                        "HTT",
                        "P/1.1 203 Fine\r\nTransfer-Enc",
                        "oding: chunked\r\n\r",
                        "\n5\r\nhello\r\n",
                        "6\r\n world\r\n0\r\n\r\n",
                    ] {
                        stream.write_all(piece.as_bytes()).unwrap();
                        thread::sleep(Duration::from_millis(5));
                    }
                }
            });
        }
    });
    address
}

#[test]
#[ignore = "native: needs root"]
fn latency_is_within_what_the_client_measures() {
    let directory = directory();
    let server = slow_server();
    let agent = Agent::start(Rights::Own, directory.path(), &["--ephemeral-port=65535"]);
    let mut longest = Duration::ZERO;
    let rounds = 10;
    for n in 0..rounds {
        let started = Instant::now();
        let curled = curl(&[&format!("http://{server}/slow/{n}")]);
        assert_eq!(curled.body, 11);
        longest = longest.max(started.elapsed().min(curled.first_byte));
    }
    thread::sleep(Duration::from_secs(2));
    agent.stop();
    let rows = rows(directory.path());
    for direction in ["incoming", "outgoing"] {
        let rows = rows_at(&rows, direction, &[server.port()]);
        let mut latencies: Vec<u64> = rows.iter().map(|row| number(row, "latency")).collect();
        latencies.sort_unstable();
        assert_eq!(
            rows.iter().map(|row| number(row, "count")).sum::<u64>(),
            rounds,
            "{rows:?}"
        );
        assert!(latencies[0] >= 60_000_000, "{latencies:?}");
        assert!(
            u128::from(*latencies.last().unwrap()) <= longest.as_nanos(),
            "{latencies:?}"
        );
        assert!(rows.iter().all(|row| number(row, "status_code") == 203), "{rows:?}");
    }
}

#[test]
#[ignore = "native: needs root"]
fn options_bound_paths_and_series() {
    let directory = directory();
    let path = directory.path();
    let nginx = Nginx::start(path);
    let agent = Agent::start(
        Rights::Own,
        path,
        &["--http-keep-query", "--http-path-limit=32", "--http-series-max=100"],
    );
    let mut client = Client::connect(nginx.address());
    let mut sent = Sums::new();
    let long = format!("/{}", "x".repeat(50));
    for target in ["/a?b=c", &long, &long[..32], &long[..31]] {
        client.exchange("GET", target, &mut sent);
    }
    for n in 0..500 {
        client.exchange("GET", &format!("/{n}"), &mut sent);
    }
    agent.stop();
    let rows = rows(path);
    for direction in ["incoming", "outgoing"] {
        let mut rows = rows_at(&rows, direction, &[nginx.port]);
        rows.sort_by_key(|row| text(row, "path"));
        let named = |path: &str| rows.iter().filter(|row| text(row, "path") == path).count();
        assert_eq!(rows.iter().map(|row| number(row, "count")).sum::<u64>(), 504);
        assert_eq!(named("/a?b=c"), 1, "{rows:?}");
        let cut = || rows.iter().filter(|row| text(row, "path") == &long[..32]);
        assert_eq!(cut().map(|row| number(row, "count")).sum::<u64>(), 2);
        assert!(cut().all(|row| row["truncated"] == true));
        let whole = rows.iter().find(|row| text(row, "path") == &long[..31]).unwrap();
        assert_eq!(whole["truncated"], false);
        assert!(named("other") > 0);
    }
    // Of one flush.
    let mut flushes: BTreeMap<u64, usize> = BTreeMap::new();
    for row in &rows {
        *flushes.entry(number(row, "time") / 1_000_000).or_default() += 1;
    }
    assert!(flushes.values().all(|rows| *rows <= 110), "{flushes:?}");
}

/// Packets come to the programs from the hooks of UDP, at hooks of their own if one of those is missing, or, on a port of
/// DNS, behind the programs of `dnsflow`.
#[test]
#[ignore = "native: needs root"]
fn each_way_to_the_programs_is_whole() {
    let directory = directory();
    let nginx = Nginx::start(directory.path());
    let of_dns = format!("--dns-ports={}", nginx.port);
    for args in [
        &[][..],
        &["--refuse-program=udp_egress"],
        &["--refuse-program=udp_ingress"],
        &[&of_dns],
        &[&of_dns, "--refuse-program=udp_egress"],
    ] {
        let own = self::directory();
        let agent = Agent::start(Rights::Own, own.path(), args);
        let mut client = Client::connect(nginx.address());
        let mut sent = Sums::new();
        for n in 0..20 {
            client.exchange("GET", &format!("/{n}"), &mut sent);
        }
        agent.stop();
        let rows = rows(own.path());
        for direction in ["incoming", "outgoing"] {
            let told = rows_at(&rows, direction, &[nginx.port]);
            let count = told.iter().map(|row| number(row, "count")).sum::<u64>();
            assert_eq!(count, 20, "{direction} with {args:?}: {told:?}");
        }
    }
}

#[test]
#[ignore = "native: needs root"]
fn patterns_stand_for_the_paths_that_match_them() {
    let directory = directory();
    let path = directory.path();
    let nginx = Nginx::start(path);
    let agent = Agent::start(
        Rights::Own,
        path,
        &[
            "--http-routes=/users/{id},/users/{id}/orders/*",
            "--http-path-limit=32",
            "--http-keep-query",
        ],
    );
    let mut client = Client::connect(nginx.address());
    let mut unused = Sums::new();
    for n in 0..20 {
        for target in [
            format!("/users/{n}?page=2"),
            format!("/users/{n}/orders/{}", "x".repeat(n * 2)),
            format!("/other/{n}"),
        ] {
            client.exchange("GET", &target, &mut unused);
        }
    }
    agent.stop();
    let rows = rows(path);
    for direction in ["incoming", "outgoing"] {
        let mut told: BTreeMap<(&str, bool), u64> = BTreeMap::new();
        for row in rows_at(&rows, direction, &[nginx.port]) {
            *told.entry((text(row, "path"), row["truncated"] == true)).or_default() += number(row, "count");
        }
        assert_eq!(told.remove(&("/users/{id}", false)), Some(20), "{told:?}");
        // The first has no segment behind the slash.
        assert_eq!(told.remove(&("/users/{id}/orders/*", false)), Some(19), "{told:?}");
        assert_eq!(told.remove(&("/users/0/orders/", false)), Some(1), "{told:?}");
        assert_eq!(told.len(), 20, "{told:?}");
        assert!(told.keys().all(|(path, _)| path.starts_with("/other/")), "{told:?}");
    }
}

#[test]
#[ignore = "native: needs root"]
fn refusing_its_programs_costs_no_other_feature() {
    let all = doctor(&[]).0;
    for program in ["http_egress", "http_ingress"] {
        let (doctor, code) = doctor(&[&format!("--refuse-program={program}")]);
        assert_eq!(code, Some(2));
        let off: Vec<&str> = doctor
            .features
            .iter()
            .filter(|feature| !all.features.contains(feature))
            .map(|feature| feature.name.as_str())
            .collect();
        assert_eq!(off, [HTTPFLOW]);
    }
}

#[test]
#[ignore = "native: needs root"]
fn all_exchanges_at_full_speed_are_counted() {
    const CLIENTS: usize = 4;
    const EACH: usize = 10_000;
    let directory = directory();
    let path = directory.path();
    files(path, &[("small", 1024)]);
    let nginx = Nginx::start(path);
    // Room for all of it, so that it does not matter how fast this build of the agent is.
    let agent = Agent::start(Rights::Own, path, &["--ring-buffer-size=128MiB"]);
    let started = Instant::now();
    let threads: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let address = nginx.address();
            thread::spawn(move || {
                let (mut client, mut sums) = (Client::connect(address), Sums::new());
                for _ in 0..EACH {
                    client.exchange("GET", "/small", &mut sums);
                }
                sums
            })
        })
        .collect();
    let mut sent = Sums::new();
    for thread in threads {
        for (asked, sum) in thread.join().unwrap() {
            let all: &mut Sum = sent.entry(asked).or_default();
            all.count += sum.count;
            all.requests += sum.requests;
            all.responses += sum.responses;
        }
    }
    let took = started.elapsed();
    println!("{:.0} exchanges/s", (CLIENTS * EACH) as f64 / took.as_secs_f64());
    thread::sleep(Duration::from_secs(2));
    println!("{}", metrics(&agent));
    agent.stop();
    let rows = rows(path);
    for direction in ["incoming", "outgoing"] {
        same(direction, &sums_of(&rows_at(&rows, direction, &[nginx.port])), &sent);
    }
}

/// An HTTP/2 server: echoes lengths, and answers gRPC calls with the status that their path ends with.
async fn serve(listener: tokio::net::TcpListener) {
    while let Ok((stream, _)) = listener.accept().await {
        tokio::spawn(async move {
            let mut connection = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                tokio::spawn(async move {
                    let path = request.uri().path().to_owned();
                    let mut body = request.into_body();
                    while let Some(Ok(data)) = body.data().await {
                        let _ = body.flow_control().release_capacity(data.len());
                    }
                    let grpc: Option<u32> = path.rsplit('/').next().unwrap().parse().ok();
                    let mut response = Response::builder().status(200);
                    if grpc.is_some() {
                        response = response.header("content-type", "application/grpc");
                    }
                    let mut stream = respond.send_response(response.body(()).unwrap(), false).unwrap();
                    stream.send_data(Bytes::from(vec![b'x'; 100]), grpc.is_none()).unwrap();
                    if let Some(status) = grpc {
                        let mut trailers = HeaderMap::new();
                        trailers.insert("grpc-status", status.into());
                        stream.send_trailers(trailers).unwrap();
                    }
                });
            }
        });
    }
}

#[test]
#[ignore = "native: needs root"]
fn http2_and_grpc_are_read() {
    let directory = directory();
    let path = directory.path();
    files(path, &[("small", 1024), ("page", 50_000)]);
    let nginx = Nginx::start(path);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap();
    runtime.spawn(serve(listener));
    let agent = Agent::start(Rights::Own, path, &["--ephemeral-port=65535"]);
    let mut expected: BTreeMap<(String, Option<u64>), u64> = BTreeMap::new();
    runtime.block_on(async {
        let stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let (mut client, connection) = h2::client::handshake(stream).await.unwrap();
        tokio::spawn(connection);
        for n in 0..60u64 {
            let grpc = (n % 3 != 0).then_some(n % 5);
            let path = grpc.map_or_else(|| "/plain".to_owned(), |status| format!("/pkg.Service/{status}"));
            let request = Request::post(format!("http://{address}{path}")).body(()).unwrap();
            client = client.ready().await.unwrap();
            let (response, mut stream) = client.send_request(request, false).unwrap();
            stream.send_data(Bytes::from(vec![b'y'; 1000]), true).unwrap();
            let mut body = response.await.unwrap().into_body();
            while let Some(Ok(data)) = body.data().await {
                body.flow_control().release_capacity(data.len()).unwrap();
            }
            let _ = body.trailers().await;
            *expected.entry((path, grpc)).or_default() += 1;
        }
    });
    for host in ["127.0.0.1", "[::1]"] {
        for file in ["small", "page", "gone"] {
            for _ in 0..3 {
                curl(&[
                    "--http2-prior-knowledge",
                    &format!("http://{host}:{}/{file}", nginx.port2),
                ]);
            }
        }
    }
    thread::sleep(Duration::from_secs(2));
    agent.stop();
    let truth = nginx.truth();
    let rows = rows(path);
    for direction in ["incoming", "outgoing"] {
        let calls = rows_at(&rows, direction, &[address.port()]);
        let mut got: BTreeMap<(String, Option<u64>), u64> = BTreeMap::new();
        for row in &calls {
            assert_eq!(
                (text(row, "method"), text(row, "http_version")),
                ("POST", "2.0"),
                "{row}"
            );
            *got.entry((text(row, "path").to_owned(), row["grpc_status"].as_u64()))
                .or_default() += number(row, "count");
        }
        assert_eq!(got, expected, "{direction}");
        // nginx counts HPACK and frames in its own way: not bytes, but exchanges.
        let counts = |sums: &Sums| -> Vec<_> { sums.iter().map(|(asked, sum)| (asked.clone(), sum.count)).collect() };
        let served = sums_of(&rows_at(&rows, direction, &[nginx.port2]));
        assert_eq!(counts(&served), counts(&truth), "{direction}");
    }
}
