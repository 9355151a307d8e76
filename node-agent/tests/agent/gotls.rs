//! `httpflow-tls` of Go programs: what is inside of `crypto/tls` is what both ends count.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    thread,
    time::Duration,
};

use crate::{
    http_net::{Nginx, Sum, Sums, add, curl, rows, rows_at, sums_of, text, wait_for},
    process::{Agent, Rights, directory, finish, prebuilt},
};

const ON: &str = "--l7net-enabled=httpflow-tls";
/// So that rows show the ports of clients, too, and none is taken for a server's.
const PORTS: &str = "--ephemeral-port=65535";
/// So that nothing is lost where the agent has to wait for the processor.
const ROOM: &str = "--ring-buffer-size=64MiB";

/// What is asked in most tests: heads alone, bodies both ways, in one piece and many.
const MIX: &str = "GET:/bytes/100:0 POST:/echo:70000 GET:/status/404:0 PUT:/bytes/0:300000 GET:/chunks/5000:0 \
                   GET:/bytes/200000:0 DELETE:/status/204:0 HEAD:/bytes/10:0";

/// Builds the programs. Built elsewhere, each is in a directory that is called as the arguments are.
fn build(directory: &Path, name: &str, args: &[&str]) -> PathBuf {
    if let Some(at) = prebuilt() {
        return at.join(args.join(" ")).join(name);
    }
    let to = directory.join(name);
    let built = Command::new("go")
        .args(["build", "-o"])
        .arg(&to)
        .args(args)
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/go/pair"))
        .output()
        .unwrap_or_else(|error| panic!("go: {error}"));
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    to
}

/// A Go program that reads lines, and writes some; killed when dropped.
struct Go {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Go {
    fn start(program: &Path, args: &[&str]) -> Self {
        let mut child = Command::new(program)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (input, output) = (child.stdin.take(), child.stdout.take().unwrap());
        Self {
            child,
            input,
            output: BufReader::new(output),
        }
    }

    /// A server, and the port it has.
    fn serve(program: &Path, args: &[&str]) -> (Self, u16) {
        let mut server = Self::start(program, &[&["serve"], args].concat());
        let mut line = String::new();
        server.output.read_line(&mut line).unwrap();
        let port = line.trim().strip_prefix("port ").unwrap().parse().unwrap();
        (server, port)
    }

    /// Asks, and waits until all is answered: what the client counted.
    fn ask(&mut self, what: &str) -> Sums {
        writeln!(self.input.as_mut().unwrap(), "{what}").unwrap();
        self.sums(Some("done"))
    }

    /// Ends its input: what it counted, all in all.
    fn end(mut self) -> Sums {
        self.input = None;
        self.sums(None)
    }

    fn sums(&mut self, until: Option<&str>) -> Sums {
        let mut sums = Sums::new();
        loop {
            let mut line = String::new();
            let size = self.output.read_line(&mut line).unwrap();
            if size == 0 || Some(line.trim()) == until {
                assert_eq!(size == 0, until.is_none(), "the program ended");
                return sums;
            }
            let words: Vec<&str> = line.split_whitespace().collect();
            let number = |at: usize| words.get(at).map_or(0, |word: &&str| word.parse().unwrap());
            let sum = Sum {
                count: number(3),
                requests: number(4),
                responses: number(5),
            };
            sums.insert((words[0].to_owned(), words[1].to_owned(), number(2)), sum);
        }
    }
}

impl Drop for Go {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn plus(sums: &mut Sums, more: &Sums) {
    for (asked, more) in more {
        let sum = sums.entry(asked.clone()).or_default();
        sum.count += more.count;
        sum.requests += more.requests;
        sum.responses += more.responses;
    }
}

fn counts(sums: &Sums) -> BTreeMap<String, u64> {
    sums.iter()
        .map(|(asked, sum)| (format!("{asked:?}"), sum.count))
        .collect()
}

fn total(sums: &Sums) -> u64 {
    sums.values().map(|sum| sum.count).sum()
}

/// Waits until both ends have reported so many exchanges, or for a while; then ends the agent: sums by direction.
fn reported(agent: Agent, directory: &Path, port: u16, count: u64) -> BTreeMap<&'static str, Sums> {
    let sums = |direction| sums_of(&rows_at(&rows(directory), direction, &[port]));
    for _ in 0..40 {
        if ["incoming", "outgoing"]
            .iter()
            .all(|direction| total(&sums(direction)) >= count)
        {
            break;
        }
        thread::sleep(Duration::from_millis(100));
    }
    let metrics = agent.metrics();
    let wanted = ["httpflow_tls", "ledger_lost"];
    for line in metrics
        .lines()
        .filter(|line| wanted.iter().any(|word| line.contains(word)) && !line.starts_with('#'))
    {
        println!("{line}");
    }
    agent.stop();
    ["incoming", "outgoing"]
        .map(|direction| (direction, sums(direction)))
        .into()
}

/// Both ends in Go, and what they did is what is reported.
fn ends_agree(args: &[&str], wrap: &[&str]) {
    let place = directory();
    let program = build(place.path(), "pair", args);
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let directory = directory();
        let path = directory.path();
        let (server, port) = Go::serve(&program, &[&[address], wrap].concat());
        let to = address.replace(":0", &format!(":{port}"));
        let mut client = Go::start(&program, &["ask", &to]);
        let agent = Agent::start(Rights::Own, path, &[ON, PORTS, ROOM]);
        let mut asked = client.ask(&format!("1 3 5 {MIX}"));
        plus(&mut asked, &client.ask(&format!("1 3 5 {MIX}")));
        let by_two = client.ask(&format!("2 3 5 {MIX} POST:/pkg.Service/0:1000 POST:/pkg.Service/5:20"));
        let count = total(&asked) + total(&by_two);
        let reported = reported(agent, path, port, count);
        drop(client);
        let mut all = asked.clone();
        plus(&mut all, &by_two);
        assert_eq!(counts(&server.end()), counts(&all), "the programs agree");
        let rows = rows(path);
        for (direction, sums) in reported {
            assert_eq!(counts(&sums), counts(&all), "{direction}, {address}");
            let with = |version: &str| {
                let rows = rows_at(&rows, direction, &[port]);
                sums_of(&Vec::from_iter(
                    rows.into_iter().filter(|row| text(row, "http_version") == version),
                ))
            };
            assert_eq!(with("1.1"), asked, "bytes of {direction}, {address}");
            assert_eq!(counts(&with("2.0")), counts(&by_two), "{direction}, {address}");
            for (asked, sum) in with("2.0") {
                // Bodies, and what frames and heads take.
                let (sent, read) = body(&asked);
                let near = |bytes: u64, body: u64| (body..body + 1000 + body / 100).contains(&(bytes / sum.count));
                assert!(
                    near(sum.requests, sent) && near(sum.responses, read),
                    "{asked:?}: {sum:?}"
                );
            }
        }
        let grpc: Vec<_> = rows
            .iter()
            .filter(|row| text(row, "path").starts_with("/pkg"))
            .collect();
        assert!(grpc.iter().all(|row| {
            let status = text(row, "path").rsplit('/').next().unwrap().parse::<u64>().unwrap();
            row["grpc_status"].as_u64() == Some(status)
        }));
        let of_pair = |row: &&serde_json::Value| text(row, "process_name") == "pair";
        assert!(rows_at(&rows, "incoming", &[port]).iter().all(of_pair));
        assert!(rows_at(&rows, "outgoing", &[port]).iter().all(of_pair));
    }
}

/// Bytes of the bodies of an exchange, by what was asked in the tests.
fn body((method, path, _): &(String, String, u64)) -> (u64, u64) {
    let words = [MIX, "POST:/pkg.Service/0:1000 POST:/pkg.Service/5:20"].join(" ");
    let word = words
        .split_whitespace()
        .find(|word| word.starts_with(&format!("{method}:{path}:")))
        .unwrap();
    let sent: u64 = word.rsplit(':').next().unwrap().parse().unwrap();
    let size: u64 = path.rsplit('/').next().unwrap().parse().unwrap_or(0);
    let read = match path.split('/').nth(1).unwrap() {
        "bytes" | "chunks" if method != "HEAD" => size,
        "echo" | "pkg.Service" => sent,
        _ => 0,
    };
    (sent, read)
}

#[test]
#[ignore = "native: needs root"]
fn both_ends_of_go_programs_are_reported() {
    ends_agree(&[], &[]);
}

#[test]
#[ignore = "native: needs root"]
fn go_programs_without_symbols_are_reported() {
    ends_agree(&["-ldflags=-s -w", "-buildmode=pie"], &[]);
}

#[test]
#[ignore = "native: needs root"]
fn a_connection_inside_of_another_type_is_found() {
    ends_agree(&[], &["wrap"]);
}

/// What machines with other kernels run too: nginx with a C library, and Go, both under one agent.
#[test]
#[ignore = "native: needs root"]
fn nginx_and_go_under_one_agent_are_as_they_say() {
    let place = directory();
    let path = place.path();
    fs::create_dir_all(path.join("www")).unwrap();
    for (name, size) in [("small", 1024), ("large", 300_000)] {
        File::create(path.join("www").join(name))
            .unwrap()
            .set_len(size)
            .unwrap();
    }
    let nginx = Nginx::start_tls(path);
    let program = build(path, "pair", &["-ldflags=-s -w"]);
    let (server, port) = Go::serve(&program, &["127.0.0.1:0"]);
    let mut client = Go::start(&program, &["ask", &format!("127.0.0.1:{port}")]);
    let agent = Agent::start(Rights::Own, path, &[ON, PORTS, ROOM]);
    let ca = path.join("cert.pem").display().to_string();
    let (mut by_curl, at) = (Sums::new(), format!("https://localhost:{}", nginx.port_tls));
    for (method, name, status) in [
        ("GET", "/small", 200),
        ("GET", "/large", 200),
        ("DELETE", "/small", 405),
    ] {
        let curled = curl(&["--cacert", &ca, "--http1.1", "-X", method, &format!("{at}{name}")]);
        let asked = (method.to_owned(), name.to_owned(), status);
        add(&mut by_curl, asked, curled.request, curled.response);
    }
    for name in ["/large", "/no"] {
        curl(&["--cacert", &ca, "--http2", &format!("{at}{name}")]);
    }
    let asked = client.ask(&format!("1 3 3 {MIX}"));
    let by_two = client.ask(&format!("2 3 3 {MIX} POST:/pkg.Service/0:1000 POST:/pkg.Service/5:20"));
    let log = nginx.truth();
    assert_eq!(total(&log), total(&by_curl) + 2);
    wait_for("what nginx served is in rows", || {
        let rows = rows(path);
        let seen = |direction| total(&sums_of(&rows_at(&rows, direction, &[nginx.port_tls])));
        seen("incoming") >= total(&log) && seen("outgoing") >= total(&log)
    });
    let reported = reported(agent, path, port, total(&asked) + total(&by_two));
    drop(client);
    let mut all = asked.clone();
    plus(&mut all, &by_two);
    assert_eq!(counts(&server.end()), counts(&all), "the programs agree");
    let rows = rows(path);
    for (direction, sums) in reported {
        assert_eq!(counts(&sums), counts(&all), "{direction}");
        let with = |port: u16, version: &str| {
            let rows = rows_at(&rows, direction, &[port]).into_iter();
            sums_of(
                &rows
                    .filter(|row| text(row, "http_version") == version)
                    .collect::<Vec<_>>(),
            )
        };
        assert_eq!(with(port, "1.1"), asked, "bytes of {direction}");
        assert_eq!(with(nginx.port_tls, "1.1"), by_curl, "bytes of {direction}, nginx");
        let served = sums_of(&rows_at(&rows, direction, &[nginx.port_tls]));
        assert_eq!(counts(&served), counts(&log), "{direction}, nginx");
    }
}

#[test]
#[ignore = "native: needs root"]
fn none_of_many_concurrent_requests_is_missed() {
    let place = directory();
    let program = build(place.path(), "pair", &[]);
    let (server, port) = Go::serve(&program, &["127.0.0.1:0"]);
    let mut client = Go::start(&program, &["ask", &format!("127.0.0.1:{port}")]);
    let agent = Agent::start(Rights::Own, place.path(), &[ON, PORTS, ROOM]);
    let one = client.ask("1 100 50 GET:/bytes/100:0 POST:/echo:3000 GET:/status/404:0");
    let two = client.ask("2 100 50 GET:/bytes/200:0 POST:/echo:300");
    let mut all = one.clone();
    plus(&mut all, &two);
    let reported = reported(agent, place.path(), port, total(&all));
    drop(client);
    assert_eq!(counts(&server.end()), counts(&all));
    assert_eq!(total(&all), 100 * 50 * 5);
    for (direction, sums) in &reported {
        assert_eq!(counts(sums), counts(&all), "{direction}");
        for (asked, sum) in one.iter().filter(|(asked, _)| asked.1 != "/echo") {
            assert_eq!(sums.get(asked), Some(sum), "{direction}");
        }
    }
}

#[test]
#[ignore = "native: needs root"]
fn connections_of_go_older_than_the_agent_are_followed() {
    let place = directory();
    let program = build(place.path(), "pair", &["-ldflags=-s -w"]);
    let (_server, port) = Go::serve(&program, &["127.0.0.1:0"]);
    let mut client = Go::start(&program, &["ask", &format!("127.0.0.1:{port}")]);
    client.ask("1 20 2 GET:/bytes/100:0");
    client.ask("2 1 2 GET:/bytes/300:0");
    let agent = Agent::start(Rights::Own, place.path(), &[ON, PORTS, ROOM]);
    // The first on each connection, too: both ends wait for it in calls that began before.
    let one = client.ask("1 20 3 GET:/bytes/100:0 POST:/echo:3000");
    // What HPACK refers to was told before.
    let two = client.ask("2 1 20 GET:/bytes/300:0");
    let reported = reported(agent, place.path(), port, total(&one) + total(&two));
    for (direction, sums) in reported {
        let by_one: Sums = sums
            .iter()
            .filter(|(asked, _)| one.contains_key(*asked))
            .map(|(a, s)| (a.clone(), *s))
            .collect();
        assert_eq!(by_one, one, "{direction}");
        assert_eq!(total(&sums) - total(&by_one), total(&two), "{direction}: {sums:?}");
    }
}

#[test]
#[ignore = "native: needs root"]
fn curl_and_a_go_server_agree() {
    let place = directory();
    let program = build(place.path(), "pair", &[]);
    // The server comes after the agent.
    let path = place.path();
    let agent = Agent::start(Rights::Own, path, &[ON, PORTS, ROOM]);
    let (server, port) = Go::serve(&program, &["127.0.0.1:0"]);
    let curl = |version: &str, asked: &str| {
        let mut curl = Command::new("curl");
        curl.args(["-s", "-k", "-o", "/dev/null", version]);
        curl.arg(format!("https://127.0.0.1:{port}{asked}"));
        assert!(curl.status().unwrap().success());
    };
    wait_for("it has probes", || {
        curl("--http1.1", "/status/299");
        rows_at(&rows(path), "incoming", &[port]).len() + rows_at(&rows(path), "outgoing", &[port]).len() > 1
    });
    for version in ["--http1.1", "--http2"] {
        for asked in ["/bytes/1000", "/chunks/3000", "/status/404", "/bytes/100000"] {
            curl(version, asked);
        }
    }
    let probing = |(asked, _): &(&(String, String, u64), &Sum)| asked.2 != 299;
    let whole = |sums: &Sums| Sums::from_iter(sums.iter().filter(probing).map(|(asked, sum)| (asked.clone(), *sum)));
    thread::sleep(Duration::from_secs(2));
    let reported = reported(agent, path, port, 8);
    let truth = whole(&server.end());
    assert_eq!(total(&truth), 8);
    for (direction, sums) in reported {
        assert_eq!(counts(&whole(&sums)), counts(&truth), "{direction}");
    }
}

/// Its `Write` is made of other code than that of any Go known.
#[test]
#[ignore = "native: needs root"]
fn a_go_program_that_cannot_be_read_is_told_with_its_reason() {
    let place = directory();
    let program = build(place.path(), "pair", &[]);
    let symbols = Command::new("go").args(["tool", "nm"]).arg(&program).output().unwrap();
    let symbols = String::from_utf8(symbols.stdout).unwrap();
    let line = symbols
        .lines()
        .find(|line| line.ends_with("T crypto/tls.(*Conn).Write"))
        .unwrap();
    let address = usize::from_str_radix(line.split_whitespace().next().unwrap(), 16).unwrap();
    let mut bytes = fs::read(&program).unwrap();
    // The file begins at this address. What goes is the check of the stack: `lea`, `cmp`, `jbe`.
    let check = &mut bytes[address - 0x40_0000..][..15];
    assert_eq!((&check[..3], &check[9..11]), (&b"\x4c\x8d\x64"[..], &b"\x0f\x86"[..]));
    check.fill(0x90);
    let odd = place.path().join("odd");
    fs::write(&odd, &bytes).unwrap();
    fs::set_permissions(&odd, fs::metadata(&program).unwrap().permissions()).unwrap();
    let (server, _) = Go::serve(&odd, &["127.0.0.1:0"]);
    let mut doctor = Command::new(crate::process::binary());
    doctor.args(["doctor", "blind"]);
    let said = finish(doctor).said;
    let pid = server.child.id().to_string();
    let line = said
        .lines()
        .find(|line| line.split_whitespace().any(|word| word == pid));
    assert!(line.is_some_and(|line| line.contains("odd")), "{said}");
    assert!(said.contains("Go program whose crypto/tls"), "{said}");
}
