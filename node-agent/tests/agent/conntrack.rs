//! Plugin `ebpf-conntrack`: rows say to which backend of a service a connection really went. The backends themselves tell
//! who came.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    time::{Duration, Instant},
};

use node_agent::{
    capture::conntrack::{Conntrack, ConntrackConfig, ConntrackMetrics, End, Nat, Protocol, Tuple},
    ebpf::{capability::State, privileges::WANTED, sys::monotonic_ns},
};

use crate::{
    nat_net::{BACKEND_PORT, Came, Client, NatNet, Place, service},
    process::{Agent, Rights, directory, doctor},
};

const PLUGINS: &str = "--enabled-plugins=ebpf-net,ebpf-conntrack";
const KINDS: [(&str, bool); 4] = [("tcp", false), ("tcp", true), ("udp", false), ("udp", true)];

/// Bytes sent and connections or datagrams, by transport, family and backend; `None` where no translation is told.
type Sums = BTreeMap<(String, String, Option<SocketAddr>), (u64, u64)>;

/// Everything that clients of the pod send, with the backend that it came to.
#[derive(Default)]
struct Truth {
    clients: Vec<(&'static str, Client, u64, u64)>,
    sums: Sums,
}

impl Truth {
    /// A new client in `place`; with `bytes`, it sends so many and gets them back.
    fn client(&mut self, net: &NatNet, place: Place, transport: &'static str, to: SocketAddr, bytes: usize) {
        let mut client = net.inside(place, || Client::new(transport, to));
        client.exchange(bytes);
        self.clients.push((transport, client, bytes as u64, 1));
    }

    /// What was sent so far is not to be told of.
    fn forget(&mut self) {
        for (_, _, bytes, count) in &mut self.clients {
            (*bytes, *count) = (0, 0);
        }
    }

    fn more(&mut self, bytes: usize) {
        for (transport, client, sum, count) in &mut self.clients {
            client.exchange(bytes);
            *sum += bytes as u64;
            *count += u64::from(*transport == "udp");
        }
    }

    /// All clients end; connections with a reset.
    fn end(&mut self, came: &Came) {
        let came = came.lock();
        for (transport, client, bytes, count) in self.clients.drain(..) {
            let backend = came[&(transport, client.local())];
            let family = if backend.is_ipv4() { "IPv4" } else { "IPv6" };
            let sum = self
                .sums
                .entry((transport.to_owned(), family.to_owned(), Some(backend)))
                .or_default();
            (sum.0, sum.1) = (sum.0 + bytes, sum.1 + count);
            client.abort();
        }
    }
}

/// What the rows say about this process's flows to the service.
fn reported(rows: &str) -> Sums {
    let mut sums = Sums::new();
    for row in rows
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
    {
        let text = |key: &str| match &row[key] {
            serde_json::Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        let number = |key: &str| text(key).parse::<u64>().unwrap_or(0);
        let ours = text("pid") == std::process::id().to_string() && text("direction") == "outgoing";
        let to_service = [false, true]
            .iter()
            .any(|v6| service(*v6).ip().to_string() == text("dst_ip"));
        if !ours || !to_service {
            continue;
        }
        assert_eq!(text("dst_port"), service(false).port().to_string(), "{row}");
        let nat = text("dst_nat_ip").parse().ok();
        let backend = nat.map(|ip| SocketAddr::new(ip, text("dst_nat_port").parse().unwrap()));
        assert_eq!(backend.is_none(), text("dst_nat_port") == "N/A", "{row}");
        let sum = sums.entry((text("transport"), text("family"), backend)).or_default();
        sum.0 += number("bytes_written");
        assert_eq!(number("bytes_written"), number("bytes_read"), "all came back: {row}");
        sum.1 += number("tcp_established") + number("datagrams_written");
    }
    sums.retain(|_, sum| *sum != (0, 0));
    sums
}

/// The rows that were written.
fn rows(directory: &std::path::Path) -> String {
    fs::read_to_string(directory.join("rows.jsonl")).unwrap()
}

#[test]
#[ignore = "native: needs root"]
fn rows_tell_the_backend_of_each_connection() {
    let net = NatNet::up("ct-rows");
    let came = net.serve();
    let directory = directory();
    let proc = format!("--host-proc={}", net.proc(directory.path()).display());

    // Older than the agent: only what is sent from its start on counts.
    let mut truth = Truth::default();
    for (transport, v6) in KINDS {
        for _ in 0..3 {
            truth.client(&net, Place::Pod, transport, service(v6), 1000);
        }
    }
    truth.forget();
    // Neither root nor CAP_SYS_ADMIN: namespaces are not entered.
    let needed = WANTED.iter().filter(|it| it.name != "CAP_SYS_RESOURCE");
    let rights = Rights::Nobody(needed.fold(0, |set, it| set | 1 << it.bit));
    let agent = Agent::start(rights, directory.path(), &[PLUGINS, &proc]);
    let found = |agent: &Agent| {
        let features = agent.features();
        features.iter().any(|(feature, _)| feature.name == "ebpf-conntrack")
    };
    agent.wait_until("connection tracking is followed", found);
    let features = agent.features();
    let (feature, value) = features.iter().find(|(it, _)| it.name == "ebpf-conntrack").unwrap();
    assert_eq!((*value, feature.reason.as_str()), (2, ""), "{feature:?}");

    truth.more(300);
    for round in 0..10 {
        for (transport, v6) in KINDS {
            // The node's own processes too: their datagrams are seen translated.
            let place = if round % 3 == 2 { Place::Node } else { Place::Pod };
            truth.client(&net, place, transport, service(v6), 10 + round);
        }
    }
    // Not translated.
    for ip in ["10.78.2.2", "fd78:2::3"] {
        let to = SocketAddr::new(ip.parse().unwrap(), BACKEND_PORT);
        net.inside(Place::Pod, || Client::new("tcp", to)).exchange(10);
    }
    truth.more(20);
    truth.end(&came);
    // The kernel forgets them before the agent drains what it counted of them.
    net.exec(Place::Node, "conntrack -F");
    let wanted = truth.sums;
    assert_eq!(
        wanted.len(),
        8,
        "both backends of both families by both transports: {wanted:?}"
    );
    agent.stop();
    let rows = rows(directory.path());
    assert_eq!(reported(&rows), wanted);
    let direct = rows
        .lines()
        .filter(|row| row.contains("\"10.78.2.2\"") || row.contains("\"fd78:2::3\""));
    let untranslated = direct.filter(|row| row.contains("\"dst_nat_ip\":\"N/A\"") && row.contains("outgoing"));
    assert!(untranslated.count() >= 2, "{rows}");
}

#[test]
#[ignore = "native: needs root"]
fn switched_off_and_without_rights_rows_stay_without() {
    let net = NatNet::up("ct-off");
    let _came = net.serve();
    let directory = directory();
    let proc = format!("--host-proc={}", net.proc(directory.path()).display());
    for (args, without) in [(vec![proc.as_str()], ""), (vec![PLUGINS, &proc], "CAP_NET_BROADCAST")] {
        let here = directory.path().join(if without.is_empty() { "off" } else { "deaf" });
        fs::create_dir(&here).unwrap();
        fs::set_permissions(&here, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        let held = WANTED
            .iter()
            .filter(|it| it.name != "CAP_SYS_RESOURCE" && it.name != without);
        let agent = Agent::start(Rights::Nobody(held.fold(0, |set, it| set | 1 << it.bit)), &here, &args);
        let told = |agent: &Agent| agent.features().into_iter().find(|(it, _)| it.name == "ebpf-conntrack");
        if without.is_empty() {
            assert_eq!(told(&agent), None);
        } else {
            agent.wait_until("it tells its limits", |agent| told(agent).is_some());
            let (feature, value) = told(&agent).unwrap();
            assert!(value == 1 && feature.reason.contains(without), "{feature:?}");
        }
        for (transport, v6) in KINDS {
            net.inside(Place::Pod, || Client::new(transport, service(v6)).exchange(10));
        }
        agent.stop();
        let sums = reported(&rows(&here));
        let all: Vec<_> = sums
            .keys()
            .map(|(transport, family, nat)| (transport.as_str(), family.as_str(), *nat))
            .collect();
        let wanted = [
            ("tcp", "IPv4", None),
            ("tcp", "IPv6", None),
            ("udp", "IPv4", None),
            ("udp", "IPv6", None),
        ];
        assert_eq!(all, wanted, "the pod's own namespace translates nothing");
    }
}

/// What is asked for about a client.
fn dialled(transport: &str, client: &Client, to: SocketAddr) -> Tuple {
    let end = |address: SocketAddr| End {
        ip: address.ip(),
        port: address.port(),
    };
    Tuple {
        protocol: if transport == "tcp" {
            Protocol::Tcp
        } else {
            Protocol::Udp
        },
        from: end(client.local()),
        to: end(to),
    }
}

fn start(net: &NatNet, proc: &std::path::Path, place: Place) -> Conntrack {
    let config = ConntrackConfig { proc: proc.to_owned() };
    // The thread is in the namespace of who starts it.
    let conntrack = net.inside(place, || {
        Conntrack::start(&config, ConntrackMetrics::default()).unwrap()
    });
    let deadline = Instant::now() + Duration::from_secs(10);
    while conntrack.capabilities().borrow().features.is_empty() {
        assert!(Instant::now() < deadline, "it does not start");
        std::thread::sleep(Duration::from_millis(10));
    }
    let capabilities = conntrack.capabilities().borrow().clone();
    assert_eq!(capabilities.state("ebpf-conntrack"), State::On, "{capabilities:?}");
    conntrack
}

/// Where a connection went, by the agent and by the backend.
fn compare(nat: &Nat, netns: u32, transport: &'static str, client: &Client, to: SocketAddr, came: &Came, at: u64) {
    let found = nat.destination(netns, &dialled(transport, client, to), at);
    let backend = came.lock().get(&(transport, client.local())).copied();
    assert_eq!(
        found.map(|end| SocketAddr::new(end.ip, end.port)),
        Some(backend.expect("it came")),
        "{transport} {:?} to {to}",
        client.local()
    );
}

/// Everything at once that has an answer only after all messages before it are read: 400 connections that are gone again.
#[test]
#[ignore = "native: needs root"]
fn short_connections_are_known_after_their_end() {
    let net = NatNet::up("ct-short");
    let came = net.serve();
    let directory = directory();
    let proc = net.proc(directory.path());
    let conntrack = start(&net, &proc, Place::Node);
    let nat = conntrack.nat();
    let pod = net.netns(Place::Pod);
    for round in 0..100 {
        for (transport, v6) in KINDS {
            let to = service(v6);
            let mut client = net.inside(Place::Pod, || Client::new(transport, to));
            client.exchange(1);
            let asked = dialled(transport, &client, to);
            let backend = came.lock()[&(transport, client.local())];
            client.abort();
            let at = monotonic_ns();
            if round % 10 == 0 {
                net.exec(Place::Node, "conntrack -F");
            }
            nat.catch_up();
            let found = nat
                .destination(pod, &asked, at)
                .map(|end| SocketAddr::new(end.ip, end.port));
            assert_eq!(found, Some(backend), "{transport} round {round}");
        }
    }
}

/// The pod's own namespace changes the source and, of some, the destination; the node's goes on from there.
#[test]
#[ignore = "native: needs root"]
fn translations_of_pod_and_node_follow_each_other() {
    let net = NatNet::up("ct-chain");
    let came = net.serve();
    let directory = directory();
    let proc = net.proc(directory.path());
    // Another address of the pod, that all its connections seem to come from; and another name of the service.
    for (iptables, own, alias, service) in [
        ("iptables", "10.78.1.9", "10.97.0.1", service(false)),
        ("ip6tables", "fd78:1::9", "fd97::1", service(true)),
    ] {
        // Not to be chosen by itself.
        let options = if service.is_ipv4() { "" } else { "nodad preferred_lft 0" };
        let bits = if service.is_ipv4() { 24 } else { 64 };
        net.exec(Place::Pod, &format!("ip addr add {own}/{bits} dev eth0 {options}"));
        for protocol in ["tcp", "udp"] {
            net.exec(
                Place::Pod,
                &format!(
                    "{iptables} -t nat -A OUTPUT -p {protocol} -d {alias} --dport 81 -j DNAT --to-destination {service}"
                ),
            );
        }
        net.exec(
            Place::Pod,
            &format!("{iptables} -t nat -A POSTROUTING -o eth0 -j SNAT --to-source {own}"),
        );
    }
    let older: Vec<_> = KINDS
        .iter()
        .map(|(transport, v6)| {
            let mut client = net.inside(Place::Pod, || Client::new(transport, service(*v6)));
            client.exchange(1);
            (*transport, client, service(*v6))
        })
        .collect();
    // The kernel's own list, before anything of ours asks.
    let listed = net.exec(Place::Node, "conntrack -L");
    assert!(listed.contains("src=10.78.1.9"), "{listed}");
    let conntrack = start(&net, &proc, Place::Node);
    let nat = conntrack.nat();
    let alias = |v6: bool| SocketAddr::new(if v6 { "fd97::1" } else { "10.97.0.1" }.parse().unwrap(), 81);
    let young: Vec<_> = KINDS
        .iter()
        .flat_map(|(transport, v6)| [(*transport, service(*v6)), (*transport, alias(*v6))])
        .map(|(transport, to)| {
            let mut client = net.inside(Place::Pod, || Client::new(transport, to));
            client.exchange(1);
            (transport, client, to)
        })
        .collect();
    nat.catch_up();
    let pod = net.netns(Place::Pod);
    for (transport, client, to) in older.iter().chain(&young) {
        // The backends see the other address, with the port that was left: by that they are compared.
        let found = nat.destination(pod, &dialled(transport, client, *to), monotonic_ns());
        let seen = came.lock();
        let own: std::net::IpAddr = if to.is_ipv4() { "10.78.1.9" } else { "fd78:1::9" }.parse().unwrap();
        let backend = seen[&(*transport, SocketAddr::new(own, client.local().port()))];
        assert_eq!(
            found.map(|end| SocketAddr::new(end.ip, end.port)),
            Some(backend),
            "{transport} to {to}"
        );
    }
    // Datagrams leave the pod translated: by those the socket's own ends are found.
    for (transport, client, to) in young.iter().filter(|(transport, ..)| *transport == "udp") {
        let asked = dialled(transport, client, *to);
        let own = if to.is_ipv4() { "10.78.1.9" } else { "fd78:1::9" }.parse().unwrap();
        let mut packets = dialled(transport, client, service(to.is_ipv6()));
        packets.from.ip = own;
        assert_eq!(nat.dialled(pod, &packets), Some(asked));
    }
}

#[test]
#[ignore = "native: needs root"]
fn what_is_there_is_known_by_events_and_by_dumps() {
    let net = NatNet::up("ct-many");
    let came = net.serve();
    let directory = directory();
    let proc = net.proc(directory.path());
    let conntrack = start(&net, &proc, Place::Node);
    let nat = conntrack.nat();
    let mut clients = Vec::new();
    for _ in 0..60 {
        for (transport, v6) in KINDS {
            let to = service(v6);
            let mut client = net.inside(Place::Pod, || Client::new(transport, to));
            client.exchange(1);
            clients.push((transport, client, to));
        }
    }
    nat.catch_up();
    let pod = net.netns(Place::Pod);
    for (transport, client, to) in &clients {
        compare(&nat, pod, transport, client, *to, &came, monotonic_ns());
    }
    // Another one that starts now finds the same by asking.
    drop(conntrack);
    let conntrack = start(&net, &proc, Place::Node);
    let nat = conntrack.nat();
    for (transport, client, to) in &clients {
        compare(&nat, pod, transport, client, *to, &came, monotonic_ns());
    }
    // And one that is in another namespace than the node.
    let conntrack = start(&net, &proc, Place::Back);
    let nat = conntrack.nat();
    for (transport, client, to) in &clients {
        compare(&nat, pod, transport, client, *to, &came, monotonic_ns());
    }
    let listed = net.exec(Place::Node, "conntrack -L -p tcp");
    let to_service = format!("dst={} ", service(false).ip());
    assert_eq!(
        listed.lines().filter(|line| line.contains(&to_service)).count(),
        60,
        "{listed}"
    );
}

/// The agent stands still while more happens than the kernel keeps for it.
#[test]
#[ignore = "native: needs root"]
fn lost_events_are_counted_and_made_good() {
    let net = NatNet::up("ct-lost");
    let came = net.serve();
    let directory = directory();
    let proc = format!("--host-proc={}", net.proc(directory.path()).display());
    let agent = Agent::start(Rights::Own, directory.path(), &[PLUGINS, &proc]);
    let metric = |agent: &Agent, name: &str| {
        let metrics = agent.metrics();
        let line = metrics
            .lines()
            .find_map(|line| line.strip_prefix(&format!("ebpfcollector_conntrack_{name} ")));
        line.map_or(0, |value| value.parse::<u64>().unwrap())
    };
    agent.wait_until("it follows", |agent| {
        agent.features().iter().any(|(it, _)| it.name == "ebpf-conntrack")
    });
    let before = metric(&agent, "dumps_total{result=\"done\"}");
    assert_eq!((before > 0, metric(&agent, "overruns_total")), (true, 0));
    agent.signal(libc::SIGSTOP);
    net.inside(Place::Pod, || {
        for _ in 0..25_000 {
            let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.send_to(&[1], service(false)).unwrap();
        }
    });
    // The last of all: the kernel has no room to tell of them.
    let mut truth = Truth::default();
    for v6 in [false, true] {
        for _ in 0..10 {
            truth.client(&net, Place::Pod, "tcp", service(v6), 0);
        }
    }
    agent.signal(libc::SIGCONT);
    agent.wait_until("the loss is counted", |agent| metric(agent, "overruns_total") > 0);
    agent.wait_until("all is asked for again", |agent| {
        metric(agent, "dumps_total{result=\"done\"}") >= before + 4
    });
    truth.more(500);
    truth.end(&came);
    agent.stop();
    let bytes = |sums: Sums| {
        sums.into_iter()
            .map(|(key, (bytes, _))| (key, bytes))
            .filter(|(_, bytes)| *bytes > 0)
    };
    let rows = rows(directory.path());
    let tcp: Vec<&str> = rows
        .lines()
        .filter(|row| row.contains("\"transport\":\"tcp\""))
        .collect();
    let told: BTreeMap<_, _> = bytes(reported(&tcp.join("\n"))).collect();
    assert_eq!(told, bytes(truth.sums).collect());
}

#[test]
#[ignore = "native: needs root"]
fn doctor_says_what_works() {
    let (report, code) = doctor(&[PLUGINS]);
    let feature = report.features.iter().find(|it| it.name == "ebpf-conntrack").unwrap();
    assert_eq!((feature.state.as_str(), code), ("on", Some(0)), "{feature:?}");
    // A machine that tracks no connections.
    let directory = directory();
    for file in ["1", "self", "stat"] {
        std::os::unix::fs::symlink(format!("/proc/{file}"), directory.path().join(file)).unwrap();
    }
    let proc = format!("--host-proc={}", directory.path().display());
    let (report, code) = doctor(&[PLUGINS, &proc]);
    let feature = report.features.iter().find(|it| it.name == "ebpf-conntrack").unwrap();
    assert_eq!((feature.state.as_str(), code), ("off", Some(2)), "{feature:?}");
    assert!(feature.reason.contains("nf_conntrack is not loaded"), "{feature:?}");
    assert!(
        report
            .features
            .iter()
            .any(|it| it.name == "ebpf-net/tcp" && it.state == "on")
    );
}
