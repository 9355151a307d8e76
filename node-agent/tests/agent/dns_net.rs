//! Servers and clients of DNS in two namespaces, and what tshark saw between them.
//!
//! ```text
//!   clients 10.77.0.x, fd77::a:x ══ tshark ══ 10.77.128.1, fd77::b:1 port 5300: a server that does as it is told by the name
//!                                             10.77.128.2, fd77::b:2 port 53: dnsmasq
//! ```
//! tshark is the truth: it pairs the messages on its own.

use std::{
    collections::{BTreeMap, HashSet},
    fs::{self, File},
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use testkit::traffic::netns::{Side, TestNet, inside};

use crate::process::PATIENCE;

/// Port of the server that does as it is told.
pub const PORT: u16 = 5300;
/// It, and dnsmasq.
pub const SERVER: [&str; 2] = ["10.77.128.1", "fd77::b:1"];
pub const DNSMASQ: [&str; 2] = ["10.77.128.2", "fd77::b:2"];
pub const A: u16 = 1;
pub const AAAA: u16 = 28;

/// The network with its servers. All ends when it is dropped.
pub struct DnsNet {
    net: TestNet,
    dnsmasq: Child,
}

/// What makes a row: transport, server, name, type, response code.
pub type Group = (String, SocketAddr, String, u16, i32);

/// A query: transport, client, server, id, name, type.
type Query = (String, SocketAddr, SocketAddr, String, String, u16);

/// The look-ups of a group.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    pub count: u64,
    /// Sum and maximum of the times to the answers, seconds.
    pub sum: f64,
    pub max: f64,
}

/// A running capture.
pub struct Tshark {
    child: Child,
    file: PathBuf,
}

// === impl DnsNet ===

impl DnsNet {
    pub fn up(name: &str, directory: &Path) -> Self {
        let net = TestNet::up(name, 1500).unwrap();
        // Addresses of IPv6 are looked for on the link before they may be used.
        thread::sleep(Duration::from_secs(2));
        for address in SERVER {
            let address = SocketAddr::new(address.parse().unwrap(), PORT);
            in_side(&net, Side::B, || serve(address));
        }
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", &format!("{name}-b"), "dnsmasq", "--keep-in-foreground"])
            .args([
                "--conf-file=/dev/null",
                "--no-resolv",
                "--no-hosts",
                "--bind-interfaces",
                "--user=root",
            ])
            .args(DNSMASQ.map(|ip| format!("--listen-address={ip}")))
            .args(["--host-record=host.test,10.77.128.9,fd77::b:4", "--local=/nx.test/"])
            .arg(format!("--pid-file={}", directory.join("dnsmasq.pid").display()))
            .env("PATH", path());
        let dnsmasq = command.stdin(Stdio::null()).spawn().unwrap();
        let this = Self { net, dnsmasq };
        let deadline = Instant::now() + PATIENCE;
        for ip in DNSMASQ {
            let to = SocketAddr::new(ip.parse().unwrap(), 53);
            while this.inside(Side::A, || TcpStream::connect(to).is_err()) {
                assert!(Instant::now() < deadline, "dnsmasq does not listen on {ip}");
                thread::sleep(Duration::from_millis(50));
            }
        }
        this
    }

    /// Runs something on a thread in a namespace.
    pub fn inside<T: Send>(&self, side: Side, work: impl FnOnce() -> T + Send) -> T {
        in_side(&self.net, side, work)
    }

    /// Captures at the clients' end until it is asked.
    pub fn tshark(&self, directory: &Path) -> Tshark {
        let (file, said) = (directory.join("dns.pcapng"), directory.join("tshark"));
        let netns = self.net.path(Side::A);
        let child = Command::new("ip")
            .args([
                "netns",
                "exec",
                netns.file_name().unwrap().to_str().unwrap(),
                "tshark",
                "-q",
            ])
            .args(["-i", Side::A.interface(), "-f", "port 53 or port 5300", "-w"])
            .arg(&file)
            .env("PATH", path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&said).unwrap())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + PATIENCE;
        while !fs::read_to_string(&said).unwrap().contains("Capturing on") || !file.exists() {
            assert!(Instant::now() < deadline, "{}", fs::read_to_string(&said).unwrap());
            thread::sleep(Duration::from_millis(50));
        }
        thread::sleep(Duration::from_secs(1));
        Tshark { child, file }
    }
}

impl Drop for DnsNet {
    fn drop(&mut self) {
        let _ = self.dnsmasq.kill();
        let _ = self.dnsmasq.wait();
    }
}

fn in_side<T: Send>(net: &TestNet, side: Side, work: impl FnOnce() -> T + Send) -> T {
    inside(&File::open(net.path(side)).unwrap(), || Ok(work())).unwrap()
}

/// Programs of root's are found too.
fn path() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}

// === impl Tshark ===

impl Tshark {
    /// Ends the capture; the look-ups in it, by group.
    pub fn lookups(mut self) -> BTreeMap<Group, Outcome> {
        // What was captured last is on its way to the file.
        thread::sleep(Duration::from_secs(1));
        // SAFETY: no pointers; the child is not reaped yet.
        unsafe { libc::kill(i32::try_from(self.child.id()).unwrap(), libc::SIGINT) };
        self.child.wait().unwrap();
        let output = Command::new("tshark")
            .args(["-2", "-n", "-r"])
            .arg(&self.file)
            .args(["-d", "udp.port==5300,dns", "-d", "tcp.port==5300,dns", "-Y", "dns"])
            .args([
                "-T",
                "fields",
                "-E",
                "separator=|",
                "-E",
                "occurrence=a",
                "-E",
                "aggregator=,",
            ])
            .args(FIELDS.iter().flat_map(|field| ["-e", field]))
            .env("PATH", path())
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        groups(&String::from_utf8(output.stdout).unwrap())
    }
}

const FIELDS: [&str; 15] = [
    "frame.time_epoch",
    "ip.src",
    "ip.dst",
    "ipv6.src",
    "ipv6.dst",
    "udp.srcport",
    "udp.dstport",
    "tcp.srcport",
    "tcp.dstport",
    "dns.id",
    "dns.flags.response",
    "dns.flags.rcode",
    "dns.qry.name",
    "dns.qry.type",
    "dns.time",
];

/// A packet may hold several messages: then a field has several values.
fn groups(text: &str) -> BTreeMap<Group, Outcome> {
    // Queries by ends and id: when the first one of them passed, and whether one was answered.
    let mut asked: BTreeMap<Query, (f64, bool)> = BTreeMap::new();
    let mut groups: BTreeMap<Group, Outcome> = BTreeMap::new();
    for line in text.lines() {
        let fields: Vec<&str> = line.split('|').collect();
        let [
            time,
            s4,
            d4,
            s6,
            d6,
            us,
            ud,
            ts,
            td,
            ids,
            responses,
            rcodes,
            names,
            types,
            times,
        ] = fields.as_slice().try_into().expect(line);
        let first = |one: &'static str, other: &'static str| if one.is_empty() { other } else { one };
        // Lifetimes are of no interest here.
        let leak = |text: &str| -> &'static str { Box::leak(text.to_owned().into_boxed_str()) };
        let (transport, source, destination) = if us.is_empty() {
            ("tcp", ts, td)
        } else {
            ("udp", us, ud)
        };
        let end = |v4: &str, v6: &str, port: &str| -> SocketAddr {
            let ip: IpAddr = first(leak(v4), leak(v6)).parse().expect(line);
            SocketAddr::new(ip, port.parse().expect(line))
        };
        let (source, destination) = (end(s4, s6, source), end(d4, d6, destination));
        let time: f64 = time.parse().expect(line);
        let lists: [Vec<&str>; 6] = [ids, responses, rcodes, names, types, times].map(|list| list.split(',').collect());
        for (n, id) in lists[0].iter().enumerate() {
            let (name, kind) = (lists[3][n].to_owned(), lists[4][n].parse().expect(line));
            let response = matches!(lists[1][n], "1" | "True");
            let (client, server) = if response {
                (destination, source)
            } else {
                (source, destination)
            };
            let key = (
                transport.to_owned(),
                client,
                server,
                (*id).to_owned(),
                name.clone(),
                kind,
            );
            if !response {
                asked.entry(key).or_insert((time, false));
                continue;
            }
            let (asked_at, answered) = asked.get_mut(&key).expect(line);
            *answered = true;
            let rcode: i32 = lists[2][n].parse().expect(line);
            let outcome = groups
                .entry((transport.to_owned(), server, name, kind, rcode))
                .or_default();
            // tshark takes the last repetition of a query; a look-up begins with the first.
            let mut latency: f64 = lists[5][n].parse().expect(line);
            if time - *asked_at > latency + 0.1 {
                latency = time - *asked_at;
            }
            outcome.count += 1;
            outcome.sum += latency;
            outcome.max = outcome.max.max(latency);
        }
    }
    for ((transport, _, server, _, name, kind), (_, answered)) in asked {
        if !answered {
            groups.entry((transport, server, name, kind, -1)).or_default().count += 1;
        }
    }
    groups
}

// --- the server

/// What the name asks the server to do, by its first label: `fast`, `slow-30`, `nx`, `fail`, `refused`, `drop`, `once` (it
/// drops the first query), `big` (it answers over TCP only), `badvers`.
fn answer(query: &[u8], tcp: bool, seen: &Mutex<HashSet<Vec<u8>>>) -> (Duration, Option<Vec<u8>>) {
    let label_length = usize::from(query[12]);
    let label = std::str::from_utf8(&query[13..13 + label_length]).unwrap();
    let (what, delay) = label.split_once('-').unwrap_or((label, "0"));
    let end = 12 + query[12..].iter().position(|byte| *byte == 0).unwrap() + 5;
    let (mut flags, mut answers, mut more): ([u8; 2], u16, &[u8]) = ([0x81, 0x80], 1, &[]);
    match what {
        "drop" => return (Duration::ZERO, None),
        "once" if seen.lock().insert(query[..end].to_vec()) => return (Duration::ZERO, None),
        "nx" => (flags[1], answers) = (0x83, 0),
        "fail" => (flags[1], answers) = (0x82, 0),
        "refused" => (flags[1], answers) = (0x85, 0),
        "big" if tcp => answers = 150,
        "big" => (flags[0], answers) = (0x83, 0),
        // Response code 16: its upper bits are in the record of EDNS.
        "badvers" => (answers, more) = (0, &[0, 0, 41, 4, 208, 1, 0, 0, 0, 0, 0]),
        _ => {}
    }
    let v6 = query[end - 3] == 28;
    let mut out = query[..2].to_vec();
    out.extend(flags);
    out.extend([
        0,
        1,
        (answers >> 8) as u8,
        answers as u8,
        0,
        0,
        0,
        u8::from(!more.is_empty()),
    ]);
    out.extend(&query[12..end]);
    for n in 0..answers {
        out.extend([0xc0, 12, 0, query[end - 3], 0, 1, 0, 0, 0, 60]);
        let ip: IpAddr = if v6 { SERVER[1] } else { SERVER[0] }.parse().unwrap();
        match ip {
            IpAddr::V4(v4) => out.extend([&[0, 4][..], &v4.octets()].concat()),
            IpAddr::V6(v6) => out.extend([&[0, 16][..], &v6.octets()].concat()),
        }
        // Others than the server's own.
        let last = out.len() - 1;
        out[last] = out[last].wrapping_add(n as u8);
    }
    out.extend(more);
    (Duration::from_millis(delay.parse().unwrap_or(0)), Some(out))
}

/// Serves both transports at an address of this thread's namespace.
pub fn serve(address: SocketAddr) {
    serve_udp(UdpSocket::bind(address).unwrap());
    serve_tcp(TcpListener::bind(address).unwrap());
}

/// The same server, over UDP, on a loopback address.
pub fn serve_here() -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    serve_udp(socket);
    address
}

fn serve_udp(socket: UdpSocket) {
    let (socket, seen) = (Arc::new(socket), Arc::new(Mutex::default()));
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            if let (delay, Some(out)) = answer(&buffer[..length], false, &seen) {
                if delay.is_zero() {
                    let _ = socket.send_to(&out, from);
                    continue;
                }
                let socket = Arc::clone(&socket);
                thread::spawn(move || {
                    thread::sleep(delay);
                    let _ = socket.send_to(&out, from);
                });
            }
        }
    });
}

fn serve_tcp(listener: TcpListener) {
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            thread::spawn(move || {
                let (writer, seen) = (Arc::new(Mutex::new(stream.try_clone().unwrap())), Mutex::default());
                while let Some(query) = read_message(&mut stream) {
                    if let (delay, Some(out)) = answer(&query, true, &seen) {
                        let writer = Arc::clone(&writer);
                        thread::spawn(move || {
                            thread::sleep(delay);
                            write_in_parts(&mut writer.lock(), &framed(&out));
                        });
                    }
                }
            });
        }
    });
}

fn framed(message: &[u8]) -> Vec<u8> {
    let length = u16::try_from(message.len()).unwrap();
    [&length.to_be_bytes()[..], message].concat()
}

fn read_message(stream: &mut TcpStream) -> Option<Vec<u8>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length).ok()?;
    let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut message).ok()?;
    Some(message)
}

/// In three segments, if it is long.
fn write_in_parts(stream: &mut TcpStream, bytes: &[u8]) {
    stream.set_nodelay(true).unwrap();
    let part = if bytes.len() > 1000 {
        bytes.len().div_ceil(3)
    } else {
        bytes.len()
    };
    for part in bytes.chunks(part) {
        let _ = stream.write_all(part);
        if part.len() < bytes.len() {
            thread::sleep(Duration::from_millis(10));
        }
    }
}

// --- clients

/// A query with this id; with EDNS, whose record is empty.
pub fn query(id: u16, name: &str, kind: u16) -> Vec<u8> {
    let mut bytes = id.to_be_bytes().to_vec();
    bytes.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 1]);
    for label in name.split('.') {
        bytes.push(u8::try_from(label.len()).unwrap());
        bytes.extend(label.as_bytes());
    }
    bytes.push(0);
    bytes.extend(kind.to_be_bytes());
    bytes.extend([0, 1, 0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0]);
    bytes
}

/// Sends a query from a new socket, and again after each wait that ends without an answer. The last wait is for an answer
/// that is not asked for again.
pub fn ask(to: SocketAddr, connected: bool, id: u16, name: &str, kind: u16, waits: &[Duration]) -> Option<Vec<u8>> {
    let any: IpAddr = if to.is_ipv4() { "0.0.0.0" } else { "::" }.parse().unwrap();
    let socket = UdpSocket::bind((any, 0)).unwrap();
    if connected {
        socket.connect(to).unwrap();
    }
    let mut buffer = [0; 4096];
    for wait in waits {
        let bytes = query(id, name, kind);
        let sent = if connected {
            socket.send(&bytes)
        } else {
            socket.send_to(&bytes, to)
        };
        assert_eq!(sent.unwrap(), bytes.len());
        socket.set_read_timeout(Some(*wait)).unwrap();
        if let Ok((length, _)) = socket.recv_from(&mut buffer) {
            return Some(buffer[..length].to_vec());
        }
    }
    None
}

/// Asks so many questions from one socket, each a while after the answer to the last one.
pub fn ask_many(to: SocketAddr, count: u16, pause: Duration) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.connect(to).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut buffer = [0; 512];
    for id in 0..count {
        socket.send(&query(id, "now.example", A)).unwrap();
        socket.recv(&mut buffer).unwrap();
        if !pause.is_zero() {
            thread::sleep(pause);
        }
    }
}

/// Asks all of it on one connection, written in two parts that cut a message, and waits for as many answers.
pub fn ask_tcp(to: SocketAddr, questions: &[(u16, &str, u16)], answers: usize) {
    let mut stream = TcpStream::connect(to).unwrap();
    stream.set_nodelay(true).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let bytes: Vec<u8> = questions
        .iter()
        .flat_map(|(id, name, kind)| framed(&query(*id, name, *kind)))
        .collect();
    let (one, other) = bytes.split_at(bytes.len() - 20);
    stream.write_all(one).unwrap();
    thread::sleep(Duration::from_millis(15));
    stream.write_all(other).unwrap();
    for _ in 0..answers {
        read_message(&mut stream).expect("an answer");
    }
}
