//! Where exchanges really go, and by what name: the NAT fields and the domain of `httpflow` rows. Backends write down who came,
//! dnsmasq answers the look-ups.

use std::{
    collections::{BTreeMap, HashMap},
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener},
    sync::Arc,
    thread,
    time::Duration,
};

use parking_lot::Mutex;
use testkit::traffic::netns::Side;

use crate::{
    dns_net::{A, AAAA, DNSMASQ, DnsNet, ask},
    http_net::{Client, Sums, number, rows, text},
    nat_net::{BACKEND_PORT, NatNet, Place, service},
    process::{Agent, Rights, directory},
};

/// By the client's end: the server's own end.
type Came = Arc<Mutex<HashMap<SocketAddr, SocketAddr>>>;

/// Answers every request on a thread per connection, and writes down who came.
fn serve(listener: TcpListener, came: Came) {
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            came.lock()
                .insert(stream.peer_addr().unwrap(), stream.local_addr().unwrap());
            thread::spawn(move || {
                let mut buffer = [0; 4096];
                // Clients wait, and their requests are short.
                while let Ok(1..) = stream.read(&mut buffer) {
                    if stream
                        .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                        .is_err()
                    {
                        return;
                    }
                }
            });
        }
    });
}

#[test]
#[ignore = "native: needs root"]
fn rows_tell_the_backend_of_each_exchange() {
    let net = NatNet::up("http-nat");
    let came = Came::default();
    for ip in ["10.78.2.2", "10.78.2.3", "fd78:2::2", "fd78:2::3"] {
        let address: SocketAddr = SocketAddr::new(ip.parse().unwrap(), BACKEND_PORT);
        serve(
            net.inside(Place::Back, || TcpListener::bind(address).unwrap()),
            Arc::clone(&came),
        );
    }
    let directory = directory();
    let proc = format!("--host-proc={}", net.proc(directory.path()).display());
    let connect = |place, to| net.inside(place, || Client::connect(to));
    let mut unused = Sums::new();
    // Older than the agent, whose exchanges count from its start on.
    let mut clients: Vec<(Client, u64)> = Vec::new();
    for v6 in [false, true] {
        for _ in 0..4 {
            let mut client = connect(Place::Pod, service(v6));
            client.exchange("GET", "/nat", &mut unused);
            clients.push((client, 0));
        }
    }
    let plugins = "--enabled-plugins=ebpf-net,ebpf-conntrack";
    let agent = Agent::start(Rights::Own, directory.path(), &[plugins, &proc]);
    agent.wait_until("connection tracking is followed", |agent| {
        let features = agent.features();
        features.iter().any(|(feature, _)| feature.name == "ebpf-conntrack")
    });
    for round in 0..12 {
        for v6 in [false, true] {
            let place = if round % 3 == 2 { Place::Node } else { Place::Pod };
            clients.push((connect(place, service(v6)), 0));
        }
    }
    for (n, (client, count)) in clients.iter_mut().enumerate() {
        for _ in 0..=n % 4 {
            client.exchange("GET", "/nat", &mut unused);
            *count += 1;
        }
    }
    // Nobody translates this one.
    let direct = SocketAddr::new("10.78.2.3".parse().unwrap(), BACKEND_PORT);
    connect(Place::Pod, direct).exchange("GET", "/direct", &mut unused);
    let mut wanted: BTreeMap<(IpAddr, SocketAddr), u64> = BTreeMap::new();
    for (client, count) in clients {
        let backend = came.lock()[&client.writer().local_addr().unwrap()];
        let dialled = service(backend.is_ipv6()).ip();
        *wanted.entry((dialled, backend)).or_default() += count;
    }
    assert_eq!(wanted.len(), 4, "both backends of both families: {wanted:?}");
    net.exec(Place::Node, "conntrack -F");
    thread::sleep(Duration::from_secs(2));
    agent.stop();
    let rows = rows(directory.path());
    let mut told: BTreeMap<(IpAddr, SocketAddr), u64> = BTreeMap::new();
    let own = std::process::id().to_string();
    let outgoing = |path: &str| {
        let rows = rows
            .iter()
            .filter(|row| text(row, "pid") == own && text(row, "direction") == "outgoing");
        rows.filter(|row| text(row, "path") == path).collect::<Vec<_>>()
    };
    for row in outgoing("/nat") {
        let ip = |key| -> IpAddr { text(row, key).parse().unwrap_or_else(|_| panic!("{row}")) };
        assert_eq!(text(row, "dst_port"), service(false).port().to_string(), "{row}");
        let backend = SocketAddr::new(ip("dst_nat_ip"), text(row, "dst_nat_port").parse().unwrap());
        *told.entry((ip("dst_ip"), backend)).or_default() += number(row, "count");
    }
    assert_eq!(told, wanted);
    let direct = outgoing("/direct");
    assert_eq!(direct.len(), 1);
    for (key, value) in [
        ("dst_nat_ip", "N/A"),
        ("dst_nat_port", "N/A"),
        ("dst_ip", "10.78.2.3"),
        ("dst_port", "8080"),
    ] {
        assert_eq!(text(direct[0], key), value);
    }
    // At the backend it is not to be told who else was dialled.
    let incoming = rows.iter().filter(|row| text(row, "direction") == "incoming");
    assert!(
        incoming
            .filter(|row| text(row, "path") == "/nat")
            .all(|row| text(row, "dst_nat_ip") == "N/A")
    );
}

#[test]
#[ignore = "native: needs root"]
fn rows_tell_the_name_that_the_client_looked_up() {
    let directory = directory();
    let net = DnsNet::up("httpnames", directory.path());
    let services = ["10.77.128.9", "fd77::b:4", "10.77.128.8"].map(|ip| SocketAddr::new(ip.parse().unwrap(), 8080));
    for service in services {
        serve(
            net.inside(Side::B, || TcpListener::bind(service).unwrap()),
            Came::default(),
        );
    }
    let mut unused = Sums::new();
    // It asks nobody, and not by name.
    let mut older = net.inside(Side::A, || Client::connect(services[0]));
    older.exchange("GET", "/before", &mut unused);
    let agent = Agent::start(Rights::Own, directory.path(), &[]);
    older.exchange("GET", "/older", &mut unused);
    for v6 in [0, 1] {
        let dnsmasq = SocketAddr::new(DNSMASQ[v6].parse().unwrap(), 53);
        net.inside(Side::A, || {
            ask(dnsmasq, true, 7, "host.test", [A, AAAA][v6], &[Duration::from_secs(5)]).unwrap();
        });
    }
    for (side, path) in [(Side::A, "/asked"), (Side::B, "/not-asked")] {
        for service in services {
            let mut client = net.inside(side, || Client::connect(service));
            client.exchange("GET", path, &mut unused);
        }
    }
    thread::sleep(Duration::from_secs(2));
    agent.stop();
    let rows = rows(directory.path());
    let mut told = BTreeMap::new();
    let outgoing = rows.iter().filter(|row| text(row, "direction") == "outgoing");
    for row in outgoing.filter(|row| text(row, "dst_port") == "8080") {
        told.insert((text(row, "path"), text(row, "dst_ip")), text(row, "dst_domain"));
    }
    let expected = BTreeMap::from([
        (("/older", "10.77.128.9"), ""),
        (("/asked", "10.77.128.9"), "host.test"),
        (("/asked", "fd77::b:4"), "host.test"),
        (("/asked", "10.77.128.8"), ""),
        (("/not-asked", "10.77.128.9"), ""),
        (("/not-asked", "fd77::b:4"), ""),
        (("/not-asked", "10.77.128.8"), ""),
    ]);
    assert_eq!(told, expected);
    let incoming = rows.iter().filter(|row| text(row, "direction") == "incoming");
    assert!(incoming.into_iter().all(|row| text(row, "dst_domain").is_empty()));
}
