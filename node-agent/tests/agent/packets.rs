//! `bpf-netlog`: flows are what tshark saw of the same packets, and their sums what the interface counted.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use testkit::traffic::netns::inside;

use crate::process::{Agent, PATIENCE, Rights, directory};

/// Source, destination, protocol, ports or type and code of ICMP.
type Flow = (IpAddr, IpAddr, u8, u16, u16);

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Seen {
    bytes: u64,
    packets: u64,
    flags: u16,
    dscp: u8,
    macs: [String; 2],
}

/// Two namespaces joined by a pair of interfaces, all of names of their own.
struct Net {
    name: &'static str,
}

struct Tshark {
    child: Child,
    file: PathBuf,
}

impl Net {
    /// With frames as they are on a wire, and quiet.
    fn up(name: &'static str) -> Self {
        remove(name);
        let this = Self { name };
        for side in ["a", "b"] {
            run("ip", &format!("netns add {name}-{side}"));
        }
        run(
            "ip",
            &format!("-n {name}-a link add {name}a type veth peer name {name}b netns {name}-b"),
        );
        for (side, third) in [("a", 0), ("b", 128)] {
            let ip = |args: &str| run("ip", &format!("-n {name}-{side} {args}"));
            ip(&format!("link set {name}{side} gso_max_segs 1"));
            for last in 1..=2 {
                ip(&format!("addr add 10.79.{third}.{last}/16 dev {name}{side}"));
                ip(&format!("addr add fd79::{side}:{last}/64 dev {name}{side} nodad"));
            }
            ip(&format!("link set {name}{side} up"));
        }
        let (mut before, mut since) = (this.counters(), Instant::now());
        let deadline = Instant::now() + PATIENCE;
        while since.elapsed() < Duration::from_secs(4) {
            assert!(Instant::now() < deadline, "never quiet");
            thread::sleep(Duration::from_millis(200));
            let now = this.counters();
            if now != before {
                (before, since) = (now, Instant::now());
            }
        }
        this
    }

    fn inside<T: Send>(&self, side: &str, work: impl FnOnce() -> T + Send) -> T {
        let file = fs::File::open(format!("/run/netns/{}-{side}", self.name)).unwrap();
        inside(&file, || Ok(work())).unwrap()
    }

    /// Packets and bytes that the interface of side A sent and received.
    fn counters(&self) -> (u64, u64) {
        let text = run("ip", &format!("-n {0}-a -j -s link show dev {0}a", self.name));
        let links: Value = serde_json::from_str(&text).unwrap();
        let of = |what: &str| {
            ["rx", "tx"]
                .map(|way| links[0]["stats64"][way][what].as_u64().unwrap())
                .iter()
                .sum()
        };
        (of("packets"), of("bytes"))
    }

    fn tshark(&self, directory: &Path) -> Tshark {
        let (file, said) = (directory.join("packets.pcapng"), directory.join("tshark"));
        let child = Command::new("ip")
            .args([
                "netns",
                "exec",
                &format!("{}-a", self.name),
                "tshark",
                "-q",
                "-i",
                &format!("{}a", self.name),
                "-B",
                "64",
                "-w",
            ])
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&said).unwrap())
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

fn run(program: &str, args: &str) -> String {
    let path = std::env::var("PATH").unwrap_or_default();
    let output = Command::new(program)
        .args(args.split_ascii_whitespace())
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{program} {args}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn remove(name: &str) {
    for side in ["a", "b"] {
        let _ = Command::new("ip")
            .args(["netns", "delete", &format!("{name}-{side}")])
            .stderr(Stdio::null())
            .status();
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        remove(self.name);
    }
}

impl Drop for Tshark {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Tshark {
    /// What it saw, by flow; fragments are of the flow of their packet.
    fn flows(mut self) -> BTreeMap<Flow, Seen> {
        thread::sleep(Duration::from_secs(1));
        let pid = i32::try_from(self.child.id()).unwrap();
        // SAFETY: no pointers; the child is not reaped yet.
        assert_eq!(unsafe { libc::kill(pid, libc::SIGINT) }, 0);
        self.child.wait().unwrap();
        let fields = [
            "frame.len",
            "eth.src",
            "eth.dst",
            "vlan.id",
            "ip.src",
            "ip.dst",
            "ipv6.src",
            "ipv6.dst",
            "icmp.type",
            "icmp.code",
            "icmpv6.type",
            "icmpv6.code",
            "tcp.srcport",
            "tcp.dstport",
            "tcp.flags",
            "udp.srcport",
            "udp.dstport",
            "ip.dsfield.dscp",
            "ipv6.tclass.dscp",
            "ip.id",
            "ipv6.fraghdr.ident",
        ];
        let mut command = Command::new("tshark");
        command
            .arg("-r")
            .arg(&self.file)
            .args(["-T", "fields", "-E", "occurrence=f"]);
        for field in fields {
            command.args(["-e", field]);
        }
        let output = command.output().unwrap();
        assert!(output.status.success());
        let text = String::from_utf8(output.stdout).unwrap();
        let frames: Vec<Vec<&str>> = text.lines().map(|line| line.split('\t').collect()).collect();
        let field = |frame: &[&str], name: &str| -> String {
            let at = fields.iter().position(|field| *field == name).unwrap();
            frame[at].to_owned()
        };
        let number = |text: &str| -> u64 {
            text.strip_prefix("0x").map_or_else(
                || text.parse().unwrap_or(0),
                |hex| u64::from_str_radix(hex, 16).unwrap(),
            )
        };
        let either = |frame: &[&str], names: [&str; 2]| -> Option<String> {
            names
                .map(|name| field(frame, name))
                .into_iter()
                .find(|text| !text.is_empty())
        };
        let layer = |frame: &[&str]| -> Option<(u8, u16, u16)> {
            let small = |name: &str| u16::try_from(number(&field(frame, name))).unwrap();
            for (proto, [first, second]) in [
                (1, ["icmp.type", "icmp.code"]),
                (58, ["icmpv6.type", "icmpv6.code"]),
                (6, ["tcp.srcport", "tcp.dstport"]),
                (17, ["udp.srcport", "udp.dstport"]),
            ] {
                if !field(frame, first).is_empty() {
                    return Some((proto, small(first), small(second)));
                }
            }
            None
        };
        let ends = |frame: &[&str]| -> Option<(IpAddr, IpAddr)> {
            let src = either(frame, ["ip.src", "ipv6.src"])?;
            let dst = either(frame, ["ip.dst", "ipv6.dst"])?;
            Some((src.parse().unwrap(), dst.parse().unwrap()))
        };
        // Of a packet in fragments one frame alone shows what it is.
        let whole: BTreeMap<(IpAddr, IpAddr, String), (u8, u16, u16)> = frames
            .iter()
            .filter_map(|frame| {
                let (src, dst) = ends(frame)?;
                let id = either(frame, ["ipv6.fraghdr.ident", "ip.id"])?;
                Some(((src, dst, id), layer(frame)?))
            })
            .collect();
        let mut flows: BTreeMap<Flow, Seen> = BTreeMap::new();
        for frame in &frames {
            let Some((src, dst)) = ends(frame) else { continue };
            let id = either(frame, ["ipv6.fraghdr.ident", "ip.id"]).unwrap_or_default();
            let Some((proto, first, second)) = layer(frame).or_else(|| whole.get(&(src, dst, id)).copied()) else {
                panic!("{frame:?}");
            };
            let seen = flows.entry((src, dst, proto, first, second)).or_default();
            seen.bytes += number(&field(frame, "frame.len"));
            seen.packets += 1;
            if proto == 6 {
                let flags = u16::try_from(number(&field(frame, "tcp.flags"))).unwrap() & 0xff;
                let has = |all: u16| flags & all == all;
                seen.flags |=
                    flags | u16::from(has(0x12)) << 8 | u16::from(has(0x11)) << 9 | u16::from(has(0x14)) << 10;
            }
            let dscp = either(frame, ["ip.dsfield.dscp", "ipv6.tclass.dscp"]).unwrap();
            seen.dscp = u8::try_from(number(&dscp)).unwrap();
            seen.macs = [field(frame, "eth.src"), field(frame, "eth.dst")];
        }
        flows
    }
}

/// Flow records written so far.
fn records(directory: &Path) -> Vec<Value> {
    let text = fs::read_to_string(directory.join("rows.jsonl")).unwrap_or_default();
    let whole = text.rfind('\n').map_or("", |end| &text[..=end]);
    let rows = whole.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    rows.filter(|row| row.get("Bytes").is_some()).collect()
}

fn number(row: &Value, key: &str) -> u64 {
    row[key].as_u64().unwrap_or_else(|| panic!("{key} of {row}"))
}

/// Flows of the records.
fn flows(records: &[Value]) -> BTreeMap<Flow, Seen> {
    let mut flows: BTreeMap<Flow, Seen> = BTreeMap::new();
    const NAMES: [&str; 11] = [
        "FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR", "SYN_ACK", "FIN_ACK", "RST_ACK",
    ];
    for row in records {
        let text = |key: &str| row[key].as_str().unwrap_or_else(|| panic!("{key} of {row}")).to_owned();
        let proto = u8::try_from(number(row, "Proto")).unwrap();
        let names = if matches!(proto, 1 | 58) {
            ["IcmpType", "IcmpCode"]
        } else {
            ["SrcPort", "DstPort"]
        };
        let [first, second] = names.map(|name| u16::try_from(row[name].as_u64().unwrap_or(0)).unwrap());
        let key = (
            text("SrcAddr").parse().unwrap(),
            text("DstAddr").parse().unwrap(),
            proto,
            first,
            second,
        );
        let seen = flows.entry(key).or_default();
        seen.bytes += number(row, "Bytes");
        seen.packets += number(row, "Packets");
        seen.dscp = u8::try_from(number(row, "Dscp")).unwrap();
        seen.macs = [text("SrcMac"), text("DstMac")];
        for name in row["Flags"].as_array().into_iter().flatten() {
            let bit = NAMES.iter().position(|known| name == known).unwrap();
            seen.flags |= 1 << bit;
        }
    }
    flows
}

fn echo(socket: UdpSocket, count: usize) {
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut buffer = vec![0; 65_536];
    for _ in 0..count {
        let (length, from) = socket.recv_from(&mut buffer).unwrap();
        socket.send_to(&buffer[..length], from).unwrap();
    }
}

/// Frames with a VLAN tag, and with two: this kernel may have no such interfaces.
fn tagged(net: &Net) {
    let mac = |side: &str| -> Vec<u8> {
        let text = run("ip", &format!("-n {0}-{side} -j link show dev {0}{side}", net.name));
        let links: Value = serde_json::from_str(&text).unwrap();
        let address = links[0]["address"].as_str().unwrap().to_owned();
        address
            .split(':')
            .map(|byte| u8::from_str_radix(byte, 16).unwrap())
            .collect()
    };
    let payload = [9; 30];
    let udp = [
        &4000u16.to_be_bytes()[..],
        &4001u16.to_be_bytes(),
        &38u16.to_be_bytes(),
        &[0, 0],
        &payload,
    ]
    .concat();
    let mut ip = vec![
        0x45,
        46 << 2,
        0,
        58,
        0,
        1,
        0x40,
        0,
        64,
        17,
        0,
        0,
        10,
        77,
        0,
        3,
        10,
        77,
        128,
        3,
    ];
    let sum = ip
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum::<u32>();
    let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let macs = [mac("b"), mac("a")].concat();
    let frames = [
        [&macs[..], &[0x81, 0, 0, 5, 8, 0], &ip, &udp].concat(),
        [&macs[..], &[0x88, 0xa8, 0, 9, 0x81, 0, 0, 5, 8, 0], &ip, &udp].concat(),
    ];
    let interface = std::ffi::CString::new(format!("{}a", net.name)).unwrap();
    net.inside("a", || {
        // SAFETY: system calls with an address and buffers of the stated lengths; the descriptor is closed.
        unsafe {
            let socket = libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0);
            assert!(socket >= 0);
            let mut to: libc::sockaddr_ll = std::mem::zeroed();
            to.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
            to.sll_ifindex = i32::try_from(libc::if_nametoindex(interface.as_ptr())).unwrap();
            let length = libc::socklen_t::try_from(size_of_val(&to)).unwrap();
            for frame in &frames {
                let sent = libc::sendto(
                    socket,
                    frame.as_ptr().cast(),
                    frame.len(),
                    0,
                    (&raw const to).cast(),
                    length,
                );
                assert_eq!(usize::try_from(sent).unwrap(), frame.len());
            }
            libc::close(socket);
        }
    });
}

/// Everything that the test is about, over both families and in VLANs.
fn traffic(net: &Net) {
    tagged(net);
    let ends = [("10.79.0.1", "10.79.128.1"), ("fd79::a:1", "fd79::b:1")];
    for (client, server) in ends {
        let (client, server): (IpAddr, IpAddr) = (client.parse().unwrap(), server.parse().unwrap());
        let listener = net.inside("b", || TcpListener::bind((server, 0)).unwrap());
        let to = listener.local_addr().unwrap();
        let served = thread::spawn(move || {
            let (mut connection, _) = listener.accept().unwrap();
            let mut got = Vec::new();
            connection.read_to_end(&mut got).unwrap();
            connection.write_all(&got).unwrap();
            got.len()
        });
        net.inside("a", || {
            let mut connection = TcpStream::connect(to).unwrap();
            connection.write_all(&vec![7; 100_000]).unwrap();
            connection.shutdown(std::net::Shutdown::Write).unwrap();
            let mut got = Vec::new();
            connection.read_to_end(&mut got).unwrap();
            assert_eq!(got.len(), 100_000);
            // Nobody listens.
            assert!(TcpStream::connect(SocketAddr::new(server, 9)).is_err());
        });
        assert_eq!(served.join().unwrap(), 100_000);

        // Small ones, and some in fragments.
        let sizes = [10, 100, 1400, 4000, 9000];
        let socket = net.inside("b", || UdpSocket::bind((server, 0)).unwrap());
        let to = socket.local_addr().unwrap();
        let served = thread::spawn(move || echo(socket, sizes.len()));
        net.inside("a", || {
            let socket = UdpSocket::bind((client, 0)).unwrap();
            expedite(&socket, client.is_ipv6());
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut buffer = vec![0; 65_536];
            for size in sizes {
                socket.send_to(&vec![1; size], to).unwrap();
                assert_eq!(socket.recv(&mut buffer).unwrap(), size);
            }
            // Refused: ICMP comes back.
            socket.connect(SocketAddr::new(server, 9)).unwrap();
            socket.send(b"nobody").unwrap();
            assert!(socket.recv(&mut buffer).is_err());
        });
        served.join().unwrap();
    }
}

/// Marks what a socket sends as to be expedited: DSCP 46.
fn expedite(socket: &UdpSocket, v6: bool) {
    let class: libc::c_int = 46 << 2;
    let (level, option) = if v6 {
        (libc::IPPROTO_IPV6, libc::IPV6_TCLASS)
    } else {
        (libc::IPPROTO_IP, libc::IP_TOS)
    };
    // SAFETY: an option of the size of an `int`.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const class).cast(),
            libc::socklen_t::try_from(size_of_val(&class)).unwrap(),
        )
    };
    assert_eq!(set, 0);
}

fn start(directory: &Path, interfaces: &str) -> Agent {
    let interfaces = format!("--netlog-interfaces={interfaces}");
    Agent::start(
        Rights::Own,
        directory,
        &[
            "--enabled-plugins=bpf-netlog",
            "--netlog-cache-active-timeout=1s",
            "--netlog-cluster-name=lab",
            "--netlog-subnet-labels=wide=10.0.0.0/8,side a=10.79.0.0/24,side b=10.79.128.0/24,six=fd79::/16",
            &interfaces,
        ],
    )
}

fn is_test(flow: &Flow) -> bool {
    // Neighbours are discovered, and groups joined, at any time.
    let (_, _, proto, kind, _) = *flow;
    matches!(proto, 6 | 17) || proto == 1 || proto == 58 && kind == 1
}

#[test]
#[ignore = "native: loads programs, as root"]
fn flows_are_what_tshark_saw() {
    let net = Net::up("ecpk");
    let directory = directory();
    let mut agent = start(directory.path(), "ecpka,ecpkb");
    let tshark = net.tshark(directory.path());
    traffic(&net);
    let mut truth = tshark.flows();
    truth.retain(|flow, _| is_test(flow));
    assert!(truth.len() >= 17, "{truth:#?}");
    assert!(truth.keys().any(|flow| flow.2 == 1) && truth.keys().any(|flow| flow.2 == 58));
    assert!(agent.end(libc::SIGTERM).success(), "{}", agent.log());
    let records = records(directory.path());
    let mut told = flows(&records);
    told.retain(|flow, _| is_test(flow));
    assert_eq!(told.keys().collect::<Vec<_>>(), truth.keys().collect::<Vec<_>>());
    for (flow, seen) in &truth {
        assert_eq!(&told[flow], seen, "{flow:?}");
    }
    let route = Command::new("ip").args(["route", "get", "192.0.2.1"]).output().unwrap();
    let route = String::from_utf8(route.stdout).unwrap();
    let mut words = route.split_whitespace().skip_while(|word| *word != "src");
    let own = words.nth(1).unwrap().to_owned();
    // Each passed both ends of the pair, which are of this machine.
    for row in records.iter().filter(|row| row["Proto"] == 6) {
        let mut way: Vec<(&str, u64)> = row["Interfaces"]
            .as_array()
            .unwrap()
            .iter()
            .zip(row["IfDirections"].as_array().unwrap())
            .map(|(name, direction)| (name.as_str().unwrap(), direction.as_u64().unwrap()))
            .collect();
        way.sort_unstable();
        assert_eq!(way.len(), 2, "{row}");
        assert_eq!(
            (way[0].0, way[1].0, way[0].1 + way[1].1),
            ("ecpka", "ecpkb", 1),
            "{row}"
        );
        assert_eq!(row["FlowDirection"], 2, "{row}");
        for end in ["Src", "Dst"] {
            let wanted = match row[format!("{end}Addr")].as_str().unwrap() {
                ip if ip.starts_with("10.79.0.") => "side a",
                ip if ip.starts_with("10.79.128.") => "side b",
                _ => "six",
            };
            assert_eq!(row[format!("{end}SubnetLabel")], wanted, "{row}");
        }
        assert_eq!(row["K8S_ClusterName"], "lab", "{row}");
        assert_eq!(row["AgentIP"], own.as_str(), "{row}");
    }
}

#[test]
#[ignore = "native: loads programs, as root"]
fn sums_are_what_the_interface_counted() {
    const THREADS: usize = 4;
    const DATAGRAMS: usize = 40_000;
    let net = Net::up("ecpc");
    let directory = directory();
    let before = net.counters();
    let mut agent = start(directory.path(), "ecpca");
    traffic(&net);
    // While tables are drained.
    net.inside("a", || {
        let netns = fs::File::open("/proc/thread-self/ns/net").unwrap();
        thread::scope(|scope| {
            for number in 0..THREADS {
                let netns = &netns;
                scope.spawn(move || {
                    inside(netns, || {
                        let socket = UdpSocket::bind("10.79.0.2:0")?;
                        for datagram in 0..DATAGRAMS {
                            let port = 20_000 + u16::try_from((datagram + number) % 50)?;
                            // What is refused says so at the next one.
                            let _ = socket.send_to(&[0; 64], ("10.79.128.2", port));
                        }
                        Ok(())
                    })
                    .unwrap();
                });
            }
        });
    });
    let told = |agent: &Agent| {
        let records = records(directory.path());
        let sum = |key| records.iter().map(|row| number(row, key)).sum::<u64>();
        let metrics = agent.metrics();
        let metric = |name: &str| -> u64 {
            let line = metrics
                .lines()
                .find(|line| line.contains(name) && !line.starts_with('#'));
            line.map_or(0, |line| line.rsplit(' ').next().unwrap().parse().unwrap())
        };
        (
            sum("Packets") + metric("netlog_not_ip_packets"),
            sum("Bytes") + metric("netlog_not_ip_bytes"),
        )
    };
    let counted = || {
        let now = net.counters();
        (now.0 - before.0, now.1 - before.1)
    };
    let deadline = Instant::now() + Duration::from_secs(15);
    while told(&agent) != counted() {
        assert!(
            Instant::now() < deadline,
            "told {:?}, counted {:?}",
            told(&agent),
            counted()
        );
        thread::sleep(Duration::from_millis(500));
    }
    assert!(counted().0 > u64::try_from(THREADS * DATAGRAMS).unwrap());
    let ledger = agent.ledger();
    println!("{ledger:?}");
    assert!(agent.end(libc::SIGTERM).success(), "{}", agent.log());
}
