//! `httpflow-tls`: what is inside TLS is what servers' access logs say, and what clients count. Servers and clients are those
//! that people run: nginx, curl, Python, Node, wget, openssl.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::Write as _,
    net::TcpStream,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use serde_json::Value;
use testkit::service::free_port;

use crate::{
    http_net::{Nginx, Sums, add, certificate, curl, number, rows, rows_at, sums_of, text, wait_for},
    process::{Agent, Rights, directory, finish},
    tls_net::{MAPPED, NODE, NODE_SERVER, OLDER, PROXY, PYTHON, PYTHON_ASYNC, PYTHON_SYNC, Script},
};

const ON: &str = "--l7net-enabled=httpflow,httpflow-tls";
const PORTS: &str = "--ephemeral-port=10001";

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

/// Without the bytes, which servers of HTTP/2 count in their own way.
fn counts(mut sums: Sums) -> Sums {
    for sum in sums.values_mut() {
        (sum.requests, sum.responses) = (0, 0);
    }
    sums
}

fn metrics(agent: &Agent) -> String {
    let all = agent.metrics();
    let lines = all
        .lines()
        .filter(|line| line.contains("httpflow_tls") && !line.starts_with('#'));
    lines.collect::<Vec<_>>().join("\n")
}

fn files(directory: &Path) {
    let www = directory.join("www");
    fs::create_dir_all(&www).unwrap();
    for (name, size) in [("small", 1024), ("empty", 0), ("page", 50_000), ("large", 3_000_000)] {
        File::create(www.join(name)).unwrap().set_len(size).unwrap();
    }
}

/// Those of a version of HTTP.
fn of_version<'a>(rows: &[&'a Value], version: &str) -> Vec<&'a Value> {
    let rows = rows.iter().filter(|row| text(row, "http_version") == version);
    rows.copied().collect()
}

#[test]
#[ignore = "native: needs root"]
fn rows_are_what_the_access_log_says_inside_tls() {
    let directory = directory();
    let path = directory.path();
    files(path);
    let nginx = Nginx::start_tls(path);
    let port = nginx.port_tls;
    let number_of = port.to_string();
    let mut older = Script::start("python3", path, "older.py", OLDER, &[&number_of]);
    assert_eq!(older.line(), "ready");
    let before = nginx.truth();
    let agent = Agent::start(Rights::Own, path, &[ON, PORTS]);
    older.go_on();
    older.end();
    let ca = path.join("cert.pem").display().to_string();
    for name in ["/small", "/empty", "/page?secret=1", "/large", "/no"] {
        let url = format!("https://localhost:{port}{name}");
        for _ in 0..2 {
            curl(&["--cacert", &ca, "--http1.1", &url]);
        }
        curl(&["--cacert", &ca, "--http1.1", "-X", "DELETE", &url]);
    }
    Script::start("python3", path, "many.py", PYTHON, &[&number_of]).end();
    Script::start("node", path, "many.js", NODE, &[&number_of]).end();
    // GnuTLS.
    let got = Command::new("wget")
        .args(["-q", "-O", "/dev/null", "--ca-certificate", &ca])
        .arg(format!("https://localhost:{port}/page?wget"))
        .status()
        .expect("wget is installed");
    assert!(got.success());
    let mut client = Command::new("openssl")
        .args(["s_client", "-quiet", "-connect", &format!("localhost:{port}")])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut input = client.stdin.take().unwrap();
    input
        .write_all(b"GET /small?openssl HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        .unwrap();
    client.wait().unwrap();
    let mut truth = nginx.truth();
    for (asked, sum) in &before {
        let all = truth.get_mut(asked).unwrap();
        all.count -= sum.count;
        all.requests -= sum.requests;
        all.responses -= sum.responses;
    }
    truth.retain(|_, sum| sum.count > 0);
    // nginx does not count bodies that it does not keep.
    let put = ("PUT".to_owned(), "/put".to_owned(), 201);
    truth.get_mut(&put).unwrap().requests += 30 * 1000;
    wait_for("all exchanges are in rows", || {
        let rows = rows(path);
        let seen = |direction| total(&sums_of(&rows_at(&rows, direction, &[port])));
        seen("incoming") >= total(&truth) && seen("outgoing") >= total(&truth)
    });
    println!("{}", metrics(&agent));
    agent.stop();
    let rows = rows(path);
    let (served, asked) = (rows_at(&rows, "incoming", &[port]), rows_at(&rows, "outgoing", &[port]));
    same("servers", &sums_of(&served), &truth);
    same("clients", &sums_of(&asked), &truth);
    assert!(
        served.iter().all(|row| text(row, "process_name") == "nginx"),
        "{served:?}"
    );
    let clients: BTreeSet<&str> = asked.iter().map(|row| text(row, "process_name")).collect();
    assert!(
        clients.is_superset(&BTreeSet::from(["curl", "node", "openssl", "wget"])),
        "{clients:?}"
    );
    for row in served.iter().chain(&asked) {
        assert!(number(row, "latency") < 60_000_000_000, "{row}");
        assert_eq!(row["truncated"], false);
    }
}

#[test]
#[ignore = "native: needs root"]
fn http2_inside_tls_is_counted_as_the_access_log_says() {
    let directory = directory();
    let path = directory.path();
    files(path);
    let nginx = Nginx::start_tls(path);
    let port = nginx.port_tls;
    let agent = Agent::start(Rights::Own, path, &[ON, PORTS]);
    let ca = path.join("cert.pem").display().to_string();
    for host in ["127.0.0.1", "[::1]"] {
        let urls: Vec<String> = ["/small", "/page", "/no", "/large", "/small"]
            .iter()
            .map(|name| format!("https://{host}:{port}{name}"))
            .collect();
        let mut args = vec![
            "-s",
            "-k",
            "--http2",
            "--cacert",
            &ca,
            "--parallel",
            "--no-progress-meter",
        ];
        for url in &urls {
            args.extend(["-o", "/dev/null", url]);
        }
        for _ in 0..10 {
            assert!(Command::new("curl").args(&args).status().unwrap().success());
        }
    }
    let truth = counts(nginx.truth());
    assert_eq!(total(&truth), 100);
    wait_for("all exchanges are in rows", || {
        let rows = rows(path);
        let seen = |direction| total(&sums_of(&rows_at(&rows, direction, &[port])));
        seen("incoming") >= total(&truth) && seen("outgoing") >= total(&truth)
    });
    println!("{}", metrics(&agent));
    agent.stop();
    let rows = rows(path);
    for direction in ["incoming", "outgoing"] {
        let rows = rows_at(&rows, direction, &[port]);
        assert_eq!(of_version(&rows, "2.0").len(), rows.len());
        same(direction, &counts(sums_of(&rows)), &truth);
        let families: BTreeSet<&str> = rows.iter().map(|row| text(row, "family")).collect();
        assert_eq!(families, BTreeSet::from(["IPv4", "IPv6"]));
    }
}

/// Two connections of five requests each, counted by curl.
fn ask(ca: &str, port: u16) -> Sums {
    let mut sums = Sums::new();
    for round in 0..2 {
        for n in 0..5 {
            let name = format!("/{round}/{n}");
            let curled = curl(&["--cacert", ca, "--http1.1", &format!("https://localhost:{port}{name}")]);
            add(
                &mut sums,
                ("GET".to_owned(), name, 200),
                curled.request,
                curled.response,
            );
        }
    }
    sums
}

#[test]
#[ignore = "native: needs root"]
fn servers_that_keep_records_in_memory_are_seen() {
    let directory = directory();
    let path = directory.path();
    certificate(path);
    let ca = path.join("cert.pem").display().to_string();
    // One is there before the agent, the others start later.
    let ports: Vec<u16> = (0..3).map(|_| free_port().unwrap().port()).collect();
    let start = |program, name, script, port: u16| {
        let server = Script::start(program, path, name, script, &[&port.to_string()]);
        wait_for("the server listens", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        server
    };
    let node = start("node", "server.js", NODE_SERVER, ports[0]);
    let agent = Agent::start(Rights::Own, path, &[ON, "--ephemeral-port=65535"]);
    let _servers = [
        start("python3", "async.py", PYTHON_ASYNC, ports[1]),
        start("python3", "sync.py", PYTHON_SYNC, ports[2]),
    ];
    // A program that just started is looked at within a second.
    thread::sleep(Duration::from_secs(1));
    let truth: Vec<Sums> = ports.iter().map(|port| ask(&ca, *port)).collect();
    for (port, truth) in ports.iter().zip(&truth) {
        wait_for("all exchanges are in rows", || {
            let rows = rows(path);
            let seen = |direction| total(&sums_of(&rows_at(&rows, direction, &[*port])));
            seen("incoming") >= total(truth) && seen("outgoing") >= total(truth)
        });
    }
    println!("{}", metrics(&agent));
    // A process that is killed leaves nothing behind, and harms nobody.
    drop(node);
    wait_for("its connections are gone", || {
        agent.metrics().contains("ebpfcollector_httpflow_tls_connections 0")
    });
    agent.stop();
    let rows = rows(path);
    for (port, truth) in ports.iter().zip(&truth) {
        for direction in ["incoming", "outgoing"] {
            same(
                &format!("{direction} of {port}"),
                &sums_of(&rows_at(&rows, direction, &[*port])),
                truth,
            );
        }
    }
    let served = rows_at(&rows, "incoming", &ports);
    let names: BTreeSet<&str> = served.iter().map(|row| text(row, "process_name")).collect();
    assert!(names.contains("node") && names.len() == 2, "{names:?}");
}

#[test]
#[ignore = "native: needs root"]
fn a_library_of_its_own_that_was_removed_is_seen_with_latencies() {
    let directory = directory();
    let path = directory.path();
    certificate(path);
    let ca = path.join("cert.pem").display().to_string();
    let mut mapped = Script::start("python3", path, "mapped.py", MAPPED, &[]);
    // It stays to the end: a library that nobody uses has no probes when the first curl begins.
    let libraries = mapped.line();
    let own = path.join("lib");
    fs::create_dir(&own).unwrap();
    for library in libraries.split(' ') {
        fs::copy(library, own.join(Path::new(library).file_name().unwrap())).unwrap();
    }
    let port = free_port().unwrap().port();
    fs::write(path.join("sync.py"), PYTHON_SYNC).unwrap();
    let child = Command::new("python3")
        .args(["sync.py", &port.to_string()])
        .env("LD_LIBRARY_PATH", &own)
        .current_dir(path)
        .spawn()
        .unwrap();
    let server = Script { child, input: None };
    wait_for("the server listens", || TcpStream::connect(("127.0.0.1", port)).is_ok());
    fs::remove_dir_all(&own).unwrap();
    // The shim of a version manager may be in between.
    let maps = fs::read_to_string(format!("/proc/{}/maps", server.child.id())).unwrap();
    let removed = maps
        .lines()
        .any(|line| line.contains("/lib/libssl") && line.ends_with("(deleted)"));
    assert!(removed, "the server uses another library: {maps}");
    let agent = Agent::start(Rights::Own, path, &[ON, "--ephemeral-port=65535"]);
    let mut truth = Sums::new();
    let mut first_byte = Duration::ZERO;
    for name in ["/slow", "/fast"] {
        let curled = curl(&["--cacert", &ca, "--http1.1", &format!("https://localhost:{port}{name}")]);
        add(
            &mut truth,
            ("GET".to_owned(), name.to_owned(), 200),
            curled.request,
            curled.response,
        );
        first_byte = first_byte.max(curled.first_byte);
    }
    wait_for("both ends are in rows", || {
        let rows = rows(path);
        ["incoming", "outgoing"]
            .iter()
            .all(|direction| rows_at(&rows, direction, &[port]).len() >= 2)
    });
    agent.stop();
    let rows = rows(path);
    for direction in ["incoming", "outgoing"] {
        let rows = rows_at(&rows, direction, &[port]);
        same(direction, &sums_of(&rows), &truth);
        let slow = rows.iter().find(|row| text(row, "path") == "/slow").unwrap();
        let latency = Duration::from_nanos(number(slow, "latency"));
        assert!(
            latency >= Duration::from_millis(300) && latency <= first_byte,
            "{latency:?}, {first_byte:?}"
        );
        let fast = rows.iter().find(|row| text(row, "path") == "/fast").unwrap();
        assert!(number(fast, "latency") < 300_000_000, "{fast}");
    }
}

#[test]
#[ignore = "native: needs root"]
fn tls_inside_tls_is_followed() {
    let directory = directory();
    let path = directory.path();
    files(path);
    let nginx = Nginx::start_tls(path);
    let ports = [free_port().unwrap().port(), nginx.port_tls];
    let proxy = Script::start(
        "python3",
        path,
        "proxy.py",
        PROXY,
        &ports.map(|port| port.to_string()).each_ref().map(String::as_str),
    );
    wait_for("the proxy listens", || {
        TcpStream::connect(("127.0.0.1", ports[0])).is_ok()
    });
    // Starts of programs are not told: all are looked at each second.
    let agent = Agent::start(
        Rights::Own,
        path,
        &[ON, "--ephemeral-port=65535", "--refuse-program=tls_exec"],
    );
    let feature = |name: &str| {
        let features = agent.features();
        features
            .into_iter()
            .find(|(feature, _)| feature.name == name)
            .map(|(feature, _)| feature.state)
    };
    assert_eq!(feature("ebpf-net/httpflow-tls/starts").as_deref(), Some("degraded"));
    assert_eq!(feature("ebpf-net/httpflow-tls").as_deref(), Some("on"));
    let ca = path.join("cert.pem").display().to_string();
    let through = format!("https://localhost:{}", ports[0]);
    for _ in 0..3 {
        curl(&[
            "--proxy-cacert",
            &ca,
            "-x",
            &through,
            "--cacert",
            &ca,
            "--http1.1",
            &format!("https://localhost:{}/page", ports[1]),
        ]);
    }
    let truth = nginx.truth();
    assert_eq!(total(&truth), 3);
    wait_for("both ends are in rows", || {
        let rows = rows(path);
        let paged = |direction, port| {
            let sums = sums_of(&rows_at(&rows, direction, &[port]));
            sums.iter()
                .filter(|((_, path, _), _)| path == "/page")
                .map(|(_, sum)| sum.count)
                .sum::<u64>()
        };
        paged("outgoing", ports[0]) >= 3 && paged("incoming", ports[1]) >= 3
    });
    agent.stop();
    drop(proxy);
    let rows = rows(path);
    same("server", &sums_of(&rows_at(&rows, "incoming", &[ports[1]])), &truth);
    let mut asked = sums_of(&rows_at(&rows, "outgoing", &[ports[0]]));
    asked.retain(|(method, _, _), _| method != "CONNECT");
    same("clients of the proxy", &asked, &truth);
}

#[test]
#[ignore = "native: needs root"]
fn a_program_that_is_refused_takes_httpflow_tls_alone() {
    let directory = directory();
    let path = directory.path();
    files(path);
    let nginx = Nginx::start(path);
    let agent = Agent::start(Rights::Own, path, &[ON, PORTS, "--refuse-program=tls_read"]);
    curl(&[&format!("http://localhost:{}/small", nginx.port)]);
    wait_for("plain text is in rows", || {
        !rows_at(&rows(path), "incoming", &[nginx.port]).is_empty()
    });
    let features = agent.features();
    let (feature, _) = features
        .iter()
        .find(|(feature, _)| feature.name == "ebpf-net/httpflow-tls")
        .unwrap_or_else(|| panic!("{features:?}"));
    assert_eq!(feature.state, "off");
    assert!(feature.reason.contains("tls_read"), "{feature:?}");
}

#[test]
#[ignore = "native: needs root"]
fn nothing_inside_tls_is_read_while_it_is_off() {
    let directory = directory();
    let path = directory.path();
    files(path);
    let nginx = Nginx::start_tls(path);
    let agent = Agent::start(Rights::Own, path, &["--l7net-enabled=httpflow", PORTS]);
    let ca = path.join("cert.pem").display().to_string();
    curl(&["--cacert", &ca, &format!("https://localhost:{}/small", nginx.port_tls)]);
    curl(&[&format!("http://localhost:{}/small", nginx.port)]);
    wait_for("plain text is in rows", || {
        !rows_at(&rows(path), "incoming", &[nginx.port]).is_empty()
    });
    let features = agent.features();
    assert!(
        !features.iter().any(|(feature, _)| feature.name.contains("tls")),
        "{features:?}"
    );
    agent.stop();
    let rows = rows(path);
    assert!(rows_at(&rows, "incoming", &[nginx.port_tls]).is_empty());
}

#[test]
#[ignore = "native: needs root"]
fn doctor_names_who_cannot_be_seen() {
    let directory = directory();
    let path = directory.path();
    // A library by its name, without the functions.
    let library = path.join("libssl.so.9");
    let source = path.join("empty.c");
    fs::write(&source, "int nothing(void) { return 0; }\n").unwrap();
    let built = Command::new("cc")
        .args(["-shared", "-fPIC", "-o"])
        .args([&library, &source])
        .status()
        .expect("a C compiler is installed");
    assert!(built.success());
    // Besides one that is seen.
    let script =
        "import ctypes, ssl, sys\nctypes.CDLL('./libssl.so.9')\nprint('ready', flush=True)\nsys.stdin.readline()\n";
    let mut process = Script::start("python3", path, "blind.py", script, &[]);
    assert_eq!(process.line(), "ready");
    let mut command = crate::process::command(Rights::Own, &["doctor", "blind", "--json", ON]);
    command.current_dir(path);
    let said = finish(command).said;
    let start = said.find('[').unwrap_or_else(|| panic!("{said}"));
    let all: Vec<Value> = serde_json::from_str(&said[start..]).unwrap_or_else(|error| panic!("{error}: {said}"));
    let pid = u64::from(process.child.id());
    let found = all.iter().find(|line| line["pid"].as_u64() == Some(pid));
    assert_eq!(found.unwrap_or_else(|| panic!("{said}"))["reason"], "no_functions");
}
