//! `dnsflow`: what comes out is what tshark saw between clients and servers that delay, drop, cut short and refuse.

use std::{
    collections::BTreeMap,
    fs,
    io::Read as _,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    path::Path,
    time::{Duration, Instant},
};

use records::Direction;
use serde_json::{Value, json};
use testkit::traffic::netns::Side;

use crate::{
    dns_net::{A, AAAA, DNSMASQ, DnsNet, Group, Outcome, PORT, SERVER, ask, ask_many, ask_tcp, serve, serve_here},
    live::{Api, Far, spec},
    nat_net::{BACKEND_PORT, NatNet, Place, service},
    process::{Agent, Rights, directory, doctor},
};

const PORTS: &str = "--dns-ports=53,5300";
/// Longest answer that is waited for, and the wait for one that does not come.
const LONG: Duration = Duration::from_secs(5);
const SHORT: Duration = Duration::from_millis(300);
/// What a look-up may last longer at the socket than on the link, on a busy machine, and less by the clocks' steps.
const LATER: f64 = 0.02;
const SOONER: f64 = 0.000_05;

/// Rows of `dnsflow`.
fn rows(directory: &Path) -> Vec<Value> {
    rows_of(directory, "dnsflow")
}

fn rows_of(directory: &Path, measurement: &str) -> Vec<Value> {
    let text = fs::read_to_string(directory.join("rows.jsonl")).unwrap_or_default();
    let whole = text.rfind('\n').map_or("", |end| &text[..=end]);
    let rows = whole.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    rows.filter(|row| row["measurement"] == measurement).collect()
}

fn text(row: &Value, key: &str) -> String {
    row[key].as_str().unwrap_or_else(|| panic!("{key} of {row}")).to_owned()
}

fn number(row: &Value, key: &str) -> i64 {
    row[key].as_i64().unwrap_or_else(|| panic!("{key} of {row}"))
}

fn kind(name: &str) -> u16 {
    match name {
        "A" => A,
        "AAAA" => AAAA,
        other => panic!("{other}"),
    }
}

/// The rows of the test's network by group: those of clients, or of servers.
fn groups(rows: &[Value], direction: &str) -> BTreeMap<Group, Outcome> {
    let mut groups: BTreeMap<Group, Outcome> = BTreeMap::new();
    let (server, client) = if direction == "outgoing" {
        ("dst", "src")
    } else {
        ("src", "dst")
    };
    for row in rows.iter().filter(|row| row["direction"] == direction) {
        let ip = |side: &str| -> IpAddr { text(row, &format!("{side}_ip")).parse().unwrap() };
        if !testkit::traffic::netns::is_test_address(ip(server)) {
            continue;
        }
        assert_eq!(text(row, &format!("{client}_port")), "*", "{row}");
        let end = SocketAddr::new(ip(server), text(row, &format!("{server}_port")).parse().unwrap());
        let family = if end.is_ipv4() { "IPv4" } else { "IPv6" };
        assert_eq!(text(row, "family"), family, "{row}");
        let rcode = i32::try_from(number(row, "rcode")).unwrap();
        let key = (
            text(row, "transport"),
            end,
            text(row, "query_name"),
            kind(&text(row, "query_type")),
            rcode,
        );
        let (count, mean, max) = (number(row, "count"), number(row, "latency"), number(row, "latency_max"));
        assert!(mean <= max && (rcode >= 0) == (max > 0), "{row}");
        let outcome = groups.entry(key).or_default();
        outcome.count += count.cast_unsigned();
        outcome.sum += count as f64 * mean as f64 / 1e9;
        outcome.max = outcome.max.max(max as f64 / 1e9);
    }
    groups
}

/// Everything that servers do, over all ways to ask.
fn traffic(net: &DnsNet) {
    for v6 in [0, 1] {
        let server = SocketAddr::new(SERVER[v6].parse().unwrap(), PORT);
        net.inside(Side::A, || {
            for connected in [true, false] {
                let id = |n: u16| n + 1000 * u16::from(connected);
                let asks = |n: u16, name: &str, kind: u16| ask(server, connected, id(n), name, kind, &[LONG]).unwrap();
                for n in 0..5 {
                    asks(n, "fast.example", if n % 2 == 0 { A } else { AAAA });
                }
                for n in 10..13 {
                    asks(n, "slow-30.example", A);
                }
                asks(20, "slow-150.example", AAAA);
                asks(30, "nx.example", A);
                asks(31, "nx.example", A);
                asks(32, "fail.example", A);
                asks(33, "refused.example", AAAA);
                assert!(ask(server, connected, id(40), "drop.example", A, &[SHORT]).is_none());
                assert!(ask(server, connected, id(41), "drop.example", A, &[SHORT, SHORT]).is_none());
                assert!(ask(server, connected, id(42), "once.example", A, &[SHORT, LONG]).is_some());
                // Cut short, so it is asked again over TCP.
                asks(43, "big.example", A);
                ask_tcp(server, &[(id(43), "big.example", A)], 1);
            }
            // Answered in another order than asked.
            let questions = [
                (1, "slow-120.example", A),
                (2, "fast.example", AAAA),
                (3, "nx.example", A),
                (4, "slow-40.example", A),
                (5, "drop.example", A),
                (6, "fast.example", A),
            ];
            ask_tcp(server, &questions, 5);
            let dnsmasq = SocketAddr::new(DNSMASQ[v6].parse().unwrap(), 53);
            for (id, name, kind) in [
                (1, "host.test", A),
                (2, "host.test", AAAA),
                (3, "a.nx.test", A),
                (4, "elsewhere.example", A),
            ] {
                assert!(ask(dnsmasq, true, id, name, kind, &[LONG]).is_some(), "{name}");
                ask_tcp(dnsmasq, &[(id, name, kind)], 1);
            }
        });
    }
    // A socket of IPv6 that speaks IPv4.
    let mapped = SocketAddr::new(format!("::ffff:{}", SERVER[0]).parse().unwrap(), PORT);
    net.inside(Side::A, || {
        for connected in [true, false] {
            ask(mapped, connected, 7, "fast.example", A, &[LONG]).unwrap();
        }
    });
}

#[test]
#[ignore = "native: needs root"]
fn rows_are_what_tshark_saw() {
    let directory = directory();
    let net = DnsNet::up("dnsflow", directory.path());
    let agent = Agent::start(Rights::Own, directory.path(), &[PORTS, "--dns-names"]);
    let tshark = net.tshark(directory.path());
    traffic(&net);
    // Queries without an answer are given up after six seconds.
    std::thread::sleep(Duration::from_secs(7));
    let truth = tshark.lookups();
    let asked: u64 = truth.values().map(|outcome| outcome.count).sum();
    let unanswered = |groups: &BTreeMap<Group, Outcome>| -> u64 {
        let without = groups.iter().filter(|((.., rcode), _)| *rcode == -1);
        without.map(|(_, outcome)| outcome.count).sum()
    };
    println!("{asked} look-ups, {} without an answer", unanswered(&truth));
    assert!(asked > 100 && unanswered(&truth) == 10, "{truth:#?}");
    agent.wait_until("all look-ups are told", |_| {
        let told = groups(&rows(directory.path()), "outgoing");
        told.values().map(|outcome| outcome.count).sum::<u64>() >= asked
    });
    let counts = agent.ledger()["capture.dns"].clone();
    agent.stop();
    let rows = rows(directory.path());
    let only_counts = |groups: &BTreeMap<Group, Outcome>| -> BTreeMap<Group, u64> {
        groups
            .iter()
            .map(|(key, outcome)| (key.clone(), outcome.count))
            .collect()
    };
    let clients = groups(&rows, "outgoing");
    assert_eq!(only_counts(&clients), only_counts(&truth));
    assert_eq!(only_counts(&groups(&rows, "incoming")), only_counts(&truth));
    let mut most: f64 = 0.0;
    for (key, outcome) in &truth {
        let own = &clients[key];
        let (mean, own_mean) = (outcome.sum / outcome.count as f64, own.sum / own.count as f64);
        for (link, socket) in [(outcome.max, own.max), (mean, own_mean)] {
            assert!(
                socket >= link - SOONER && socket <= link + LATER,
                "{key:?}: {link} s on the link, {socket} s at the socket"
            );
            most = most.max(socket - link);
        }
    }
    println!("latencies: at most {:.1} us more than on the link", most * 1e6);
    assert_eq!(counts.lost.values().sum::<u64>(), 0, "{counts:?}");
}

#[test]
#[ignore = "native: needs root"]
fn a_response_code_of_edns_is_whole() {
    let directory = directory();
    let net = DnsNet::up("dnsedns", directory.path());
    let server = SocketAddr::new(SERVER[0].parse().unwrap(), PORT);
    // Handed on to the programs, and seen by them at hooks of their own.
    for args in [
        &[PORTS, "--dns-names"][..],
        &[PORTS, "--dns-names", "--refuse-program=udp_ingress"],
    ] {
        let own = self::directory();
        let agent = Agent::start(Rights::Own, own.path(), args);
        net.inside(Side::A, || {
            ask(server, true, 1, "badvers.example", A, &[LONG]).unwrap();
            ask_tcp(server, &[(2, "badvers.example", A)], 1);
        });
        let count = || {
            let told = groups(&rows(own.path()), "outgoing");
            assert!(told.keys().all(|(.., rcode)| *rcode == 16), "{told:?}");
            rows(own.path())
                .iter()
                .filter(|row| text(row, "direction") == "outgoing" && text(row, "dst_ip") == SERVER[0])
                .map(|row| number(row, "count"))
                .sum::<i64>()
        };
        agent.wait_until("both are told", |_| count() >= 2);
        agent.stop();
        assert_eq!(count(), 2, "{args:?}");
    }
}

#[test]
#[ignore = "native: needs root"]
fn connections_have_the_name_that_was_looked_up() {
    let directory = directory();
    let net = DnsNet::up("dnsnames", directory.path());
    // Names of look-ups are not told unless asked for; those of connections are.
    let agent = Agent::start(Rights::Own, directory.path(), &[PORTS]);
    let dns = SocketAddr::new(SERVER[0].parse().unwrap(), PORT);
    let services = ["10.77.128.1", "10.77.128.5", "fd77::b:1"].map(|ip| SocketAddr::new(ip.parse().unwrap(), 8080));
    let listeners = net.inside(Side::B, || services.map(|service| TcpListener::bind(service).unwrap()));
    let connect = |side| {
        net.inside(side, || {
            for (service, listener) in services.iter().zip(&listeners) {
                let client = TcpStream::connect(service).unwrap();
                let (mut server, _) = listener.accept().unwrap();
                drop(client);
                server.read_to_end(&mut Vec::new()).unwrap();
            }
        });
    };
    net.inside(Side::A, || {
        ask(dns, true, 1, "fast.Shop.example", A, &[LONG]).unwrap();
        ask(dns, true, 2, "fast.Shop.example", AAAA, &[LONG]).unwrap();
    });
    connect(Side::A);
    // Who did not ask does not know.
    connect(Side::B);
    let rows = || -> Vec<Value> {
        let rows = rows_of(directory.path(), "netflow").into_iter();
        rows.filter(|row| row["dst_port"] == "8080" && row["direction"] == "outgoing")
            .collect()
    };
    agent.wait_until("all connections are told", |_| rows().len() >= 6);
    agent.stop();
    for row in rows() {
        let client: IpAddr = text(&row, "src_ip").parse().unwrap();
        let asked = !["10.77.128.", "fd77::b:"]
            .iter()
            .any(|net| client.to_string().starts_with(net));
        let resolved = text(&row, "dst_ip") != "10.77.128.5";
        let expected = if asked && resolved { "fast.shop.example" } else { "" };
        assert_eq!(text(&row, "dst_domain"), expected, "{row}");
    }
    let told = rows_of(directory.path(), "dnsflow");
    assert!(!told.is_empty() && told.iter().all(|row| row.get("query_name").is_none()));
}

#[test]
#[ignore = "native: needs root"]
fn without_ports_or_programs_there_is_no_dnsflow() {
    let feature = |args: &[&str]| {
        let (report, code) = doctor(args);
        let features: Vec<_> = report
            .features
            .into_iter()
            .filter(|it| it.name == "ebpf-net/dnsflow")
            .collect();
        (features, code)
    };
    let (on, _) = feature(&[]);
    assert_eq!((on.len(), on[0].state.as_str()), (1, "on"), "{on:?}");
    for program in ["dns_egress", "dns_ingress"] {
        let (off, code) = feature(&[&format!("--refuse-program={program}")]);
        assert_eq!((off.len(), off[0].state.as_str(), code), (1, "off", Some(2)));
        assert_eq!(off[0].reason.matches(program).count(), 1, "{off:?}");
    }
    let file = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
    fs::write(file.path(), "[[inputs.ebpf]]\ndns_ports = []\n").unwrap();
    let (none, _) = feature(&[&format!("--config={}", file.path().display())]);
    assert!(none.is_empty(), "{none:?}");
}

/// Look-ups on the loopback interface, while the object switches what is in no pod off and on.
#[test]
#[ignore = "native: needs root"]
fn what_is_switched_off_is_not_reported() {
    let directory = directory();
    let server = serve_here();
    let on = |enabled: bool| {
        let net = json!({ "enabled": enabled, "loopback": true, "l7": [], "dnsPorts": [server.port()] });
        // Somewhere it is always on, so that the agent goes on running it.
        let elsewhere =
            json!([{ "match": { "names": ["elsewhere"] }, "plugins": { "ebpf-net": { "enabled": true } } }]);
        spec(
            "a",
            "1s",
            &json!({ "plugins": { "ebpf-net": net }, "namespaces": elsewhere }),
        )
    };
    let far = Far::start();
    let api = Api::fake(&far.runtime, &on(true));
    let aggregator = format!("--aggregator=http://{}", far.address);
    let agent = Agent::follow(directory.path(), &api.kubeconfig(directory.path()), &[&aggregator]);
    agent.wait_until("it is ready", |agent| {
        agent.page("/readyz").is_some_and(|(status, _)| status == 200)
    });
    let asks = |count: u16| {
        for id in 0..count {
            ask(server, true, id, "fast.example", A, &[LONG]).unwrap();
        }
    };
    let told = |direction| -> u64 {
        let rows = far.lookups().into_iter().filter(|row| row.flow.direction == direction);
        rows.map(|row| row.count).sum()
    };
    let both = || (told(Direction::Outgoing), told(Direction::Incoming));
    let skipped = |agent: &Agent| {
        let ledger = agent.ledger();
        let counts = ledger.get("capture.dns").map(|counts| counts.skipped.clone());
        counts.unwrap_or_default().get("switched_off").copied().unwrap_or(0)
    };
    asks(20);
    agent.wait_until("look-ups are told", |_| both() == (20, 20));
    api.change(2, &on(false));
    agent.wait_until("they are not any more", |agent| {
        asks(1);
        std::thread::sleep(Duration::from_millis(500));
        skipped(agent) > 0
    });
    std::thread::sleep(Duration::from_secs(2));
    let (before, already) = (both(), skipped(&agent));
    asks(20);
    // Queries and answers, at both ends.
    agent.wait_until("all of them are left out", |agent| skipped(agent) >= already + 80);
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!((both(), skipped(&agent)), (before, already + 80));
    api.change(3, &on(true));
    agent.wait_until("they are told again", |_| {
        asks(1);
        std::thread::sleep(Duration::from_millis(500));
        both().0 > before.0
    });
    assert_eq!(
        agent.log().matches("dnsflow is on").count(),
        1,
        "it went on: {}",
        agent.log()
    );
}

/// Look-ups that leave their own namespace translated: the answer comes from the end that was dialled, the query goes to another.
#[test]
#[ignore = "native: needs root"]
fn look_ups_of_a_translated_server_find_their_answers() {
    let net = NatNet::up("dns-nat");
    for (ip, v6) in [
        ("10.78.2.2", false),
        ("10.78.2.3", false),
        ("fd78:2::2", true),
        ("fd78:2::3", true),
    ] {
        let address = SocketAddr::new(ip.parse().unwrap(), BACKEND_PORT);
        assert_eq!(address.is_ipv6(), v6);
        net.inside(Place::Back, || serve(address));
    }
    let directory = directory();
    let proc = format!("--host-proc={}", net.proc(directory.path()).display());
    let ports = format!("--dns-ports={},{BACKEND_PORT}", service(false).port());
    let plugins = "--enabled-plugins=ebpf-net,ebpf-conntrack";
    let agent = Agent::start(Rights::Own, directory.path(), &[plugins, &proc, &ports]);
    agent.wait_until("connection tracking is followed", |agent| {
        agent
            .features()
            .iter()
            .any(|(feature, _)| feature.name == "ebpf-conntrack")
    });
    for place in [Place::Pod, Place::Node] {
        for v6 in [false, true] {
            net.inside(place, || {
                for id in 0..6 {
                    for connected in [true, false] {
                        let name = if id == 5 { "nx.example" } else { "slow-20.example" };
                        ask(service(v6), connected, id, name, A, &[LONG]).unwrap();
                    }
                    ask_tcp(service(v6), &[(id, "fast.example", A)], 1);
                }
            });
        }
    }
    // Long enough for one that found no answer to be given up.
    std::thread::sleep(Duration::from_secs(8));
    agent.stop();
    let mut sums: BTreeMap<(String, IpAddr, i64), i64> = BTreeMap::new();
    for row in rows(directory.path())
        .iter()
        .filter(|row| row["direction"] == "outgoing")
    {
        let server: IpAddr = text(row, "dst_ip").parse().unwrap();
        assert_eq!(text(row, "dst_port"), service(false).port().to_string(), "{row}");
        *sums
            .entry((text(row, "transport"), server, number(row, "rcode")))
            .or_default() += number(row, "count");
    }
    let expected = [false, true].iter().flat_map(|v6| {
        let ip = service(*v6).ip();
        [("tcp", 0, 12), ("udp", 0, 20), ("udp", 3, 4)]
            .map(|(transport, rcode, count)| ((transport.to_owned(), ip, rcode), count))
    });
    assert_eq!(sums, expected.collect());
}

#[test]
#[ignore = "native: needs root"]
fn a_busy_server_loses_nothing_and_a_flood_nothing_uncounted() {
    const CLIENTS: u16 = 4;
    const EACH: u16 = 2_000;
    let directory = directory();
    let server = serve_here();
    let ports = format!("--dns-ports={}", server.port());
    let agent = Agent::start(Rights::Own, directory.path(), &[&ports]);
    let asks = |pause: Duration| {
        let begun = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..CLIENTS {
                scope.spawn(move || ask_many(server, EACH, pause));
            }
        });
        begun.elapsed()
    };
    let expected = u64::from(CLIENTS) * u64::from(EACH);
    let told = |direction: &str| -> u64 {
        let rows = rows(directory.path());
        let rows = rows
            .iter()
            .filter(|row| row["direction"] == direction && row["rcode"] == 0);
        rows.map(|row| number(row, "count").cast_unsigned()).sum()
    };
    let took = asks(Duration::from_micros(300));
    agent.wait_until("all of them are told", |_| told("outgoing") >= expected);
    let ledger = agent.ledger();
    println!("{expected} look-ups in {took:?}: {:?}", ledger["capture.dns"]);
    assert_eq!((told("outgoing"), told("incoming")), (expected, expected));
    for stage in ["capture.dns", "agent.dnsflow"] {
        assert_eq!(ledger[stage].lost.values().sum::<u64>(), 0, "{:?}", ledger[stage]);
    }
    // As fast as they can, which may be more than an agent built for debugging reads.
    let took = asks(Duration::ZERO);
    agent.wait_until("all packets are counted", |agent| {
        agent.ledger()["capture.dns"].entered >= 2 * 4 * expected
    });
    let counts = agent.ledger()["capture.dns"].clone();
    println!("{expected} look-ups in {took:?}: {counts:?}");
    let lost: u64 = counts.lost.values().sum();
    assert_eq!((counts.entered, counts.emitted + lost), (8 * expected, 8 * expected));
    // All were answered: nobody waited in vain, whatever was lost.
    std::thread::sleep(Duration::from_secs(9));
    agent.stop();
    assert!(rows(directory.path()).iter().all(|row| row["rcode"] == 0));
}
