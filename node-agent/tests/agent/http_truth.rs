//! `httpflow` against servers and clients in many languages, each of which writes down what it did: rows of both ends are that.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::TcpListener,
    process::Command,
    sync::Arc,
    thread,
    time::Duration,
};

use parking_lot::Mutex;
use serde_json::Value;
use testkit::traffic::{http_uring::serve, report::Recorder};

use crate::{
    http_net::{Nginx, number, rows, rows_at, text, wait_for},
    http_programs::{Hyper, Noted, PLAN, Server, asks, noted},
    process::{Agent, Rights, directory, prebuilt},
};

/// Client ports are shown, so that no row is of several clients.
const ARGS: [&str; 1] = ["--ephemeral-port=65535"];
const TIMES: usize = 3;
const CLIENTS: [&str; 4] = ["curl", "ask.go", "ask.py", "ask.mjs"];

/// Those there are: a machine of built programs has no languages.
fn clients() -> &'static [&'static str] {
    if prebuilt().is_some() { &CLIENTS[..2] } else { &CLIENTS }
}

/// By process, method, path and status.
type Key = (String, String, String, u64);

/// Bytes are `None` where a program does not know them.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Sum {
    count: u64,
    request: Option<u64>,
    response: Option<u64>,
    /// Sum of the times, nanoseconds.
    nanoseconds: u64,
}

const NOTHING: Sum = Sum {
    count: 0,
    request: Some(0),
    response: Some(0),
    nanoseconds: 0,
};

fn plus(a: Option<u64>, b: Option<u64>) -> Option<u64> {
    Some(a? + b?)
}

fn key(pid: &str, asked: (&str, &str, u64)) -> Key {
    (pid.to_owned(), asked.0.to_owned(), asked.1.to_owned(), asked.2)
}

/// What programs wrote down.
fn of_notes(notes: &[Noted]) -> BTreeMap<Key, Sum> {
    let mut sums: BTreeMap<Key, Sum> = BTreeMap::new();
    for note in notes {
        let (method, path, status) = &note.asked;
        let sum = sums.entry(key(&note.pid, (method, path, *status))).or_insert(NOTHING);
        sum.count += 1;
        sum.request = plus(sum.request, note.request);
        sum.response = plus(sum.response, note.response);
        sum.nanoseconds += note.nanoseconds;
    }
    sums
}

fn of_rows(rows: &[&Value]) -> BTreeMap<Key, Sum> {
    let mut sums: BTreeMap<Key, Sum> = BTreeMap::new();
    for row in rows {
        let asked = (text(row, "method"), text(row, "path"), number(row, "status_code"));
        let sum = sums.entry(key(text(row, "pid"), asked)).or_insert(NOTHING);
        let (read, written) = (number(row, "bytes_read"), number(row, "bytes_written"));
        let outgoing = text(row, "direction") == "outgoing";
        let (request, response) = if outgoing { (written, read) } else { (read, written) };
        let count = number(row, "count");
        sum.count += count;
        sum.request = plus(sum.request, Some(request));
        sum.response = plus(sum.response, Some(response));
        sum.nanoseconds += count * number(row, "latency");
    }
    sums
}

/// Fails with what differs.
#[track_caller]
fn same(what: &str, got: &BTreeMap<Key, Sum>, noted: &BTreeMap<Key, Sum>) {
    let is = |got: &Sum, noted: &Sum| {
        let bytes = |got: Option<u64>, noted: Option<u64>| noted.is_none() || got == noted;
        got.count == noted.count && bytes(got.request, noted.request) && bytes(got.response, noted.response)
    };
    let keys: BTreeSet<_> = got.keys().chain(noted.keys()).collect();
    let differ: Vec<_> = keys
        .into_iter()
        .map(|key| (key, got.get(key), noted.get(key)))
        .filter(|(_, got, noted)| !matches!((got, noted), (Some(got), Some(noted)) if is(got, noted)))
        .map(|(key, got, noted)| format!("{key:?}: {got:?}, noted {noted:?}"))
        .collect();
    assert!(differ.is_empty(), "{what}:\n{}", differ.join("\n"));
}

/// Latencies are what servers were told to wait, and not longer than clients waited.
#[track_caller]
fn latencies(what: &str, got: &BTreeMap<Key, Sum>, noted: Option<&BTreeMap<Key, Sum>>) {
    for (key, sum) in got {
        let least = key
            .2
            .strip_prefix("/slow/")
            // Timers of some run in whole milliseconds, and up to one early.
            .map_or(0, |ms| (ms.parse::<u64>().unwrap() - 1) * 1_000_000);
        assert!(
            sum.nanoseconds >= least * sum.count && sum.nanoseconds > 0,
            "{what} {key:?}: {sum:?}"
        );
        let most = noted
            .and_then(|noted| noted.get(key))
            .map_or(u64::MAX, |noted| noted.nanoseconds);
        assert!(sum.nanoseconds <= most, "{what} {key:?}: {sum:?}, waited {most}");
    }
}

fn total(sums: &BTreeMap<Key, Sum>) -> u64 {
    sums.values().map(|sum| sum.count).sum()
}

/// Every client asks a server for everything, over both families: both ends' rows are what both wrote down.
fn table(name: &str, start: impl FnOnce(&std::path::Path) -> (Box<dyn Send>, std::path::PathBuf, u16)) {
    let directory = directory();
    let path = directory.path();
    let (server, log, port) = start(path);
    let agent = Agent::start(Rights::Own, path, &ARGS);
    let mut asked = Vec::new();
    for client in clients() {
        for host in ["127.0.0.1", "[::1]"] {
            asked.extend(asks(client, &format!("http://{host}:{port}"), TIMES, &PLAN, path));
        }
    }
    assert_eq!(asked.len(), clients().len() * 2 * TIMES * PLAN.len());
    let seen = |direction| of_rows(&rows_at(&rows(path), direction, &[port]));
    wait_for(&format!("{name}: all exchanges are in rows"), || {
        ["incoming", "outgoing"]
            .iter()
            .all(|direction| total(&seen(direction)) >= asked.len() as u64)
    });
    agent.stop();
    let served = noted(&log);
    let (at_client, at_server) = (of_notes(&asked), of_notes(&served));
    let (out, into) = (seen("outgoing"), seen("incoming"));
    same(&format!("clients of {name}"), &out, &at_client);
    same(&format!("servers of {name}"), &into, &at_server);
    latencies("client", &out, Some(&at_client));
    latencies("server", &into, None);
    let all = |sums: &BTreeMap<Key, Sum>| {
        sums.values().fold(NOTHING, |all, sum| Sum {
            count: all.count + sum.count,
            request: plus(all.request, sum.request),
            response: plus(all.response, sum.response),
            nanoseconds: 0,
        })
    };
    assert_eq!(all(&into), all(&out), "both ends of {name}");
    let rows = rows(path);
    let families: BTreeSet<&str> = rows_at(&rows, "incoming", &[port])
        .iter()
        .map(|row| text(row, "family"))
        .collect();
    assert_eq!(families, BTreeSet::from(["IPv4", "IPv6"]));
    println!("{name}: {:?}", all(&into));
    drop(server);
}

/// A table for one server of `programs`.
fn program(name: &'static str, args: &[&str]) {
    table(&format!("{name} {}", args.join(" ")), |directory| {
        let server = Server::start(name, args, directory);
        let (log, port) = (server.log.clone(), server.port);
        (Box::new(server), log, port)
    });
}

#[test]
#[ignore = "native: needs root"]
fn servers_in_go_are_as_they_say() {
    program("serve.go", &[]);
}

#[test]
#[ignore = "native: needs root"]
fn servers_in_node_are_as_they_say() {
    program("serve.mjs", &[]);
}

#[test]
#[ignore = "native: needs root"]
fn servers_in_java_are_as_they_say() {
    program("Serve.java", &[]);
}

#[test]
#[ignore = "native: needs root"]
fn servers_of_hyper_are_as_they_say() {
    table("hyper", |directory| {
        let server = Hyper::start(directory);
        let (log, port) = (server.log.clone(), server.port);
        (Box::new(server), log, port)
    });
}

/// A thread per connection, a few threads, asynchronous; several processes that accept, and one that serves what another accepted.
#[test]
#[ignore = "native: needs root"]
fn servers_in_python_are_as_they_say() {
    for kind in ["threads", "pool", "asyncio", "prefork", "passed"] {
        program("serve.py", &[kind]);
    }
}

/// No system call moves a byte of this server's.
#[test]
#[ignore = "native: needs root"]
fn a_server_by_io_uring_is_as_it_says() {
    let directory = directory();
    let path = directory.path();
    let listener = TcpListener::bind("[::]:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let recorder = Arc::new(Mutex::new(Recorder::default()));
    let served = Arc::clone(&recorder);
    thread::spawn(move || serve(&listener, &served).unwrap());
    let agent = Agent::start(Rights::Own, path, &ARGS);
    let plan: Vec<&str> = PLAN.into_iter().filter(|one| one.contains(":/s/")).collect();
    let mut asked = Vec::new();
    for client in clients() {
        for host in ["127.0.0.1", "[::1]"] {
            asked.extend(asks(client, &format!("http://{host}:{port}"), TIMES, &plan, path));
        }
    }
    let seen = |direction| of_rows(&rows_at(&rows(path), direction, &[port]));
    wait_for("all exchanges are in rows", || {
        ["incoming", "outgoing"]
            .iter()
            .all(|direction| total(&seen(direction)) >= asked.len() as u64)
    });
    agent.stop();
    same("clients of io_uring", &seen("outgoing"), &of_notes(&asked));
    let report = recorder.lock().report("uring", "http-server", "");
    assert!(report.errors.is_empty(), "{:?}", report.errors);
    let mut at_server: BTreeMap<Key, Sum> = BTreeMap::new();
    for row in report.exchanges {
        let what = (
            row.method.as_str(),
            row.path.as_str(),
            u64::try_from(row.status).unwrap(),
        );
        let sum = at_server
            .entry(key(&std::process::id().to_string(), what))
            .or_insert(NOTHING);
        sum.count += row.counts.count;
        sum.request = plus(sum.request, Some(row.counts.bytes_received));
        sum.response = plus(sum.response, Some(row.counts.bytes_sent));
    }
    same("the server by io_uring", &seen("incoming"), &at_server);
    println!("{} exchanges", total(&at_server));
}

/// wrk counts only what was answered in time; what was under way when it ended is at most one exchange of each connection.
#[test]
#[ignore = "native: needs root"]
fn what_wrk_asks_of_each_server_is_counted() {
    const CONNECTIONS: u64 = 8;
    let directory = directory();
    let path = directory.path();
    let nginx = Nginx::start(path);
    std::fs::write(path.join("www/1024"), [b'x'; 1024]).unwrap();
    // As fast as some of them are, a ring of the usual size may be too small for an agent that is built for debugging.
    let agent = Agent::start(Rights::Own, path, &["--ring-buffer-size=128MiB"]);
    let programs = [
        ("serve.go", None),
        ("serve.mjs", None),
        ("Serve.java", None),
        ("serve.py", Some("asyncio")),
    ];
    let servers: Vec<Server> = programs
        .iter()
        .map(|(name, kind)| Server::start(name, kind.as_slice(), path))
        .collect();
    let mut expected = Vec::new();
    for (port, target) in servers
        .iter()
        .map(|server| (server.port, "/s/200/1024"))
        .chain([(nginx.port, "/1024")])
    {
        let output = Command::new("wrk")
            .args([
                "-t1",
                &format!("-c{CONNECTIONS}"),
                "-d1s",
                &format!("http://127.0.0.1:{port}{target}"),
            ])
            .output()
            .unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        let line = said.lines().find(|line| line.contains(" requests in ")).expect(&said);
        let count: u64 = line.split_ascii_whitespace().next().unwrap().parse().unwrap();
        expected.push((port, target, count));
    }
    thread::sleep(Duration::from_secs(3));
    let lost = agent.ledger()["capture.http"].lost.values().sum::<u64>();
    agent.stop();
    assert_eq!(lost, 0);
    let logged = servers.iter().map(|server| noted(&server.log).len() as u64);
    let truth = nginx.truth();
    let logged = logged.chain([truth[&("GET".to_owned(), "/1024".to_owned(), 200)].count]);
    for ((port, target, wrk), logged) in expected.into_iter().zip(logged) {
        let all = rows(path);
        let counts = |direction| {
            let of = |status: &dyn Fn(u64) -> bool| -> u64 {
                let rows = rows_at(&all, direction, &[port]).into_iter();
                let rows = rows.filter(|row| text(row, "path") == target && status(number(row, "status_code")));
                rows.map(|row| number(row, "count")).sum()
            };
            (of(&|status| status == 200), of(&|status| status != 200))
        };
        let (into, out) = (counts("incoming"), counts("outgoing"));
        println!("port {port}: wrk {wrk}, the log {logged}; servers {into:?}, clients {out:?}");
        assert!((wrk..=logged).contains(&out.0) && out.1 <= CONNECTIONS, "{out:?}");
        assert!(
            logged - wrk <= CONNECTIONS,
            "all that was logged and not counted was under way"
        );
        assert!(into.0 <= logged && into.0 + CONNECTIONS >= logged, "{into:?}");
        assert!(into.0 + into.1 >= logged, "{into:?}");
    }
}
