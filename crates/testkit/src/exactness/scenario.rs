//! The catalogue: which roles run in which scenario. Process names are `TAG-…`, at most 15 bytes.

use std::{net::IpAddr, path::PathBuf, time::Duration};

use clap::ValueEnum;

use super::compare::{SHARED_ALL, SHARED_CONNECTIONS};
use crate::traffic::netns::{BROADCAST, GROUP_V4, GROUP_V6, Side};

/// Where the traffic runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Topology {
    /// Between two network namespaces joined by a veth pair
    Veth,
    /// On the loopback addresses of this machine
    Loopback,
}

/// When a scenario runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// In its turn.
    Turn,
    /// From the agent's start to the end, beside the others.
    Throughout,
    /// Its connections are opened before the agent starts.
    BeforeAgent,
}

/// One process.
#[derive(Clone, Debug)]
pub struct Process {
    /// Name.
    pub name: String,
    /// Role and its options.
    pub arguments: Vec<String>,
}

/// One scenario.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Short name.
    pub tag: &'static str,
    /// What it is about.
    pub what: &'static str,
    /// When it runs.
    pub when: When,
    /// What clients sent is what servers received.
    pub symmetric: bool,
    /// Processes that serve.
    pub servers: Vec<Process>,
    /// Processes that start the exchange.
    pub clients: Vec<Process>,
}

/// How large a run is.
#[derive(Clone, Debug)]
pub struct Plan {
    /// TCP connections of the scenarios with many short connections, in all.
    pub tcp: u64,
    /// Datagrams sent by UDP clients, in all; replies come on top.
    pub udp: u64,
    /// Seed of all sizes.
    pub seed: u64,
    /// Where.
    pub topology: Topology,
    /// Namespace files of the clients and of the servers; none on loopback.
    pub netns: Option<(PathBuf, PathBuf)>,
    /// The agent's interval.
    pub interval: Duration,
    /// First server port.
    pub first_port: u16,
}

struct Builder<'a> {
    plan: &'a Plan,
    scenarios: Vec<Scenario>,
    port: u16,
}

struct Tcp {
    tag: &'static str,
    what: &'static str,
    /// Part of all connections, percent.
    percent: u64,
    on: Server,
    clients: u64,
    client: &'static str,
    server: &'static str,
    both: &'static str,
    symmetric: bool,
}

struct Udp {
    tag: &'static str,
    what: &'static str,
    percent: u64,
    on: Server,
    clients: u64,
    client: &'static str,
    server: &'static str,
    symmetric: bool,
}

/// Which addresses the server has and the client uses.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Server {
    V4,
    V6,
    /// Server on `::`, client connects to `::ffff:a.b.c.d` from an IPv6 socket.
    Mapped,
    /// Server on `0.0.0.0`, clients use all its addresses in turn.
    Many,
}

/// All scenarios of a plan, in the order in which they run.
#[must_use]
pub fn scenarios(plan: &Plan) -> Vec<Scenario> {
    let mut builder = Builder {
        plan,
        scenarios: Vec::new(),
        port: plan.first_port,
    };
    builder.short_tcp();
    builder.udp();
    builder.long_lived();
    if plan.topology == Topology::Veth {
        builder.groups();
    }
    builder.scenarios
}

/// `total` split into `parts` that add up to it.
fn split(total: u64, parts: u64) -> impl Iterator<Item = u64> {
    (0..parts).map(move |index| total / parts + u64::from(index < total % parts))
}

fn words(text: &str) -> impl Iterator<Item = String> + '_ {
    text.split_whitespace().map(str::to_owned)
}

impl Builder<'_> {
    fn next_port(&mut self) -> u16 {
        self.port += 1;
        self.port
    }

    fn netns(&self, side: Side) -> Option<String> {
        self.plan.netns.as_ref().map(|(a, b)| {
            let path = if side == Side::A { a } else { b };
            format!("--netns={}", path.display())
        })
    }

    fn process(&self, name: &str, side: Side, role: &str, parts: impl IntoIterator<Item = String>) -> Process {
        let mut arguments = vec![role.to_owned(), format!("--seed={}", self.plan.seed)];
        arguments.extend(self.netns(side));
        arguments.extend(parts);
        Process {
            name: name.to_owned(),
            arguments,
        }
    }

    fn v4(&self) -> Vec<IpAddr> {
        match self.plan.topology {
            Topology::Veth => Side::B.v4().into_iter().map(IpAddr::V4).collect(),
            Topology::Loopback => (1..=16).map(|last| IpAddr::from([127, 77, 0, last])).collect(),
        }
    }

    fn v6(&self) -> IpAddr {
        match self.plan.topology {
            Topology::Veth => Side::B.v6().first().copied().map_or(IpAddr::from([0; 16]), IpAddr::V6),
            Topology::Loopback => IpAddr::V6(std::net::Ipv6Addr::LOCALHOST),
        }
    }

    /// Address to listen on, and addresses to use.
    fn addresses(&self, server: Server) -> (IpAddr, Vec<IpAddr>) {
        let v4 = self.v4();
        let first = v4.first().copied().unwrap_or(IpAddr::from([127, 0, 0, 1]));
        match (server, first) {
            (Server::V4, _) => (first, vec![first]),
            (Server::V6, _) => (self.v6(), vec![self.v6()]),
            (Server::Mapped, IpAddr::V4(v4)) => (IpAddr::from([0_u8; 16]), vec![IpAddr::V6(v4.to_ipv6_mapped())]),
            (Server::Mapped, v6) => (v6, vec![v6]),
            (Server::Many, _) => (IpAddr::from([0_u8; 4]), v4),
        }
    }

    fn add_tcp(&mut self, tcp: &Tcp) {
        let port = self.next_port();
        let (listen, dst) = self.addresses(tcp.on);
        let dst: Vec<String> = dst.iter().map(ToString::to_string).collect();
        let common = format!("--port={port} {}", tcp.both);
        let group = if tcp.server.contains("fork") && !tcp.server.contains("prefork") {
            format!("--group={SHARED_CONNECTIONS}{}-s", tcp.tag)
        } else {
            "--group=".to_owned()
        };
        let serves = !tcp.both.contains("refused");
        let server = format!(
            "--listen={listen} --second-name={}-x {common} {} {group}",
            tcp.tag, tcp.server
        );
        let servers = serves
            .then(|| self.process(&format!("{}-s", tcp.tag), Side::B, "tcp-server", words(&server)))
            .into_iter()
            .collect();
        let total = (self.plan.tcp * tcp.percent / 100).max(tcp.clients);
        let clients = split(total, tcp.clients)
            .enumerate()
            .map(|(index, connections)| {
                let text = format!(
                    "--dst={} --connections={connections} {common} {}",
                    dst.join(","),
                    tcp.client
                );
                self.process(&format!("{}-c{index}", tcp.tag), Side::A, "tcp-client", words(&text))
            })
            .collect();
        self.scenarios.push(Scenario {
            tag: tcp.tag,
            what: tcp.what,
            when: When::Turn,
            symmetric: tcp.symmetric,
            servers,
            clients,
        });
    }

    fn short_tcp(&mut self) {
        let base = Tcp {
            tag: "",
            what: "",
            percent: 0,
            on: Server::V4,
            clients: 3,
            client: "",
            server: "",
            both: "",
            symmetric: true,
        };
        let (v4, v6) = (Server::V4, Server::V6);
        // One scenario per entry; rustfmt would spread it over a page.
        #[rustfmt::skip]
        let table = [
            Tcp { tag: "req4", what: "request, half-close, answer; 3 clients", percent: 20,
                  both: "--pattern=request --up=0-20000 --down=0-60000", ..base },
            Tcp { tag: "one4", what: "open, send, close at once; 4 prefork workers", percent: 20,
                  both: "--pattern=oneway --up=0-3000",
                  server: "--mode=prefork", ..base },
            Tcp { tag: "push6", what: "server sends and closes", percent: 8, on: v6, clients: 2,
                  both: "--pattern=push --down=0-30000", ..base },
            Tcp { tag: "half6", what: "server half-closes first", percent: 7, on: v6, clients: 2,
                  both: "--pattern=half-server", ..base },
            Tcp { tag: "map", what: "v4-mapped sockets", percent: 10, on: Server::Mapped, clients: 2,
                  both: "--pattern=request", ..base },
            Tcp { tag: "many", what: "16 server addresses, prefork", percent: 10, on: Server::Many, clients: 2,
                  both: "--pattern=exchange",
                  server: "--mode=prefork", ..base },
            Tcp { tag: "short", what: "short-lived client processes", percent: 8, on: v4, clients: 2,
                  both: "--pattern=request --up=0-4000 --down=0-4000",
                  client: "--per-process=4", ..base },
            Tcp { tag: "fork", what: "a child process per connection", percent: 4, clients: 2,
                  both: "--pattern=request",
                  server: "--mode=fork", ..base },
            Tcp { tag: "exec", what: "a child process per connection that executes", percent: 2, clients: 2,
                  both: "--pattern=exchange",
                  server: "--mode=fork-exec", ..base },
            Tcp { tag: "rst", what: "client resets", percent: 5, clients: 2,
                  both: "--pattern=rst", ..base },
            Tcp { tag: "unread", what: "server closes with unread data", percent: 5, clients: 2,
                  both: "--pattern=unread --up=0-20000", symmetric: false, ..base },
            Tcp { tag: "ref", what: "non-blocking connects, refused", percent: 1, clients: 1,
                  both: "--pattern=refused", ..base },
        ];
        for tcp in table {
            self.add_tcp(&tcp);
        }
        // Few connections, many bytes: their number is the same in every plan.
        for (tag, what, both) in [
            ("bulk", "bulk transfer by write", "--pattern=bulk --up=33554432"),
            ("file", "bulk transfer by sendfile", "--pattern=sendfile --up=33554432"),
        ] {
            self.add_tcp(&Tcp {
                tag,
                what,
                both,
                clients: 1,
                percent: 0,
                ..base
            });
        }
    }

    fn add_udp(&mut self, udp: &Udp) {
        let port = self.next_port();
        let (listen, dst) = self.addresses(udp.on);
        let dst: Vec<String> = dst.iter().map(ToString::to_string).collect();
        let server = format!("--listen={listen} --port={port} {}", udp.server);
        let servers = vec![self.process(&format!("{}-s", udp.tag), Side::B, "udp-server", words(&server))];
        let clients = split((self.plan.udp * udp.percent / 100).max(udp.clients), udp.clients)
            .enumerate()
            .map(|(index, datagrams)| {
                let text = format!(
                    "--dst={} --port={port} --datagrams={datagrams} {}",
                    dst.join(","),
                    udp.client
                );
                self.process(&format!("{}-c{index}", udp.tag), Side::A, "udp-client", words(&text))
            })
            .collect();
        self.scenarios.push(Scenario {
            tag: udp.tag,
            what: udp.what,
            when: When::Turn,
            symmetric: udp.symmetric,
            servers,
            clients,
        });
    }

    fn udp(&mut self) {
        let base = Udp {
            tag: "",
            what: "",
            percent: 0,
            on: Server::V4,
            clients: 2,
            client: "",
            server: "",
            symmetric: true,
        };
        // One scenario per entry; rustfmt would spread it over a page.
        #[rustfmt::skip]
        let table = [
            Udp { tag: "ucon", what: "connected UDP, a reply each", percent: 10,
                  client: "--mode=connected --reply-every=1", ..base },
            Udp { tag: "uman", what: "one unconnected socket, 16 peers", percent: 25, on: Server::Many,
                  client: "--mode=unconnected", ..base },
            Udp { tag: "umm6", what: "sendmmsg and recvmmsg", percent: 25, on: Server::V6,
                  client: "--mode=mmsg",
                  server: "--mmsg", ..base },
            Udp { tag: "ugso", what: "segmentation offload", percent: 15,
                  client: "--mode=gso --size=1200", ..base },
            Udp { tag: "ushort", what: "short-lived senders", percent: 8,
                  client: "--per-process=16 --reply-every=8", ..base },
            Udp { tag: "umap", what: "v4-mapped sockets", percent: 9, on: Server::Mapped,
                  client: "--mode=unconnected", ..base },
            Udp { tag: "uover", what: "receiver too slow: queue overflows", percent: 2, clients: 1,
                  client: "--reply-every=0 --mode=connected --size=0-2000 --pace-us=50",
                  server: "--rcvbuf=9000 --slow-us=500", symmetric: false, ..base },
        ];
        for udp in table {
            self.add_udp(&udp);
        }
    }

    /// Multicast and broadcast: one sender, receivers on both sides.
    fn groups(&mut self) {
        let percent = 2;
        let source = |v6: bool| -> Option<IpAddr> {
            if v6 {
                Side::A.v6().first().copied().map(IpAddr::V6)
            } else {
                Side::A.v4().first().copied().map(IpAddr::V4)
            }
        };
        for (tag, what, dst, v6, both_sides) in [
            (
                "mc4",
                "IPv4 multicast, looped to the sender's side too",
                IpAddr::V4(GROUP_V4),
                false,
                true,
            ),
            (
                "mc6",
                "IPv6 multicast, looped to the sender's side too",
                IpAddr::V6(GROUP_V6),
                true,
                true,
            ),
            ("bc4", "IPv4 broadcast", IpAddr::V4(BROADCAST), false, false),
        ] {
            let port = self.next_port();
            let listen = if v6 { "::" } else { "0.0.0.0" };
            let sides: &[(Side, &str)] = if both_sides {
                &[(Side::B, "s"), (Side::A, "s2")]
            } else {
                &[(Side::B, "s")]
            };
            let servers = sides
                .iter()
                .map(|(side, suffix)| {
                    let join = if dst.is_multicast() {
                        format!("--join={dst} --interface={}", side.interface())
                    } else {
                        String::new()
                    };
                    let text = format!("--listen={listen} --port={port} --reply=0-500 {join}");
                    self.process(&format!("{tag}-{suffix}"), *side, "udp-server", words(&text))
                })
                .collect();
            let text = format!(
                "--dst={dst} --port={port} --src={} --datagrams={} --size=0-4000 --interface={}",
                source(v6).unwrap_or(dst),
                (self.plan.udp * percent / 100).max(1),
                Side::A.interface()
            );
            let clients = vec![self.process(&format!("{tag}-c"), Side::A, "udp-client", words(&text))];
            self.scenarios.push(Scenario {
                tag,
                what,
                when: When::Turn,
                symmetric: !both_sides,
                servers,
                clients,
            });
        }
    }

    fn long_lived(&mut self) {
        let pause = (self.plan.interval * 3 / 5).as_millis();
        let settle = (self.plan.interval * 2).as_millis() + 500;
        let (v4, _) = self.addresses(Server::V4);
        for (tag, what, when, address, server, client) in [
            (
                "hold4",
                "long-lived connections, traffic in every interval",
                When::Throughout,
                v4,
                "--mode=event".to_owned(),
                "--connections=40 --rounds=8",
            ),
            (
                "hold6",
                "long-lived connections, IPv6",
                When::Throughout,
                self.v6(),
                "--mode=event".to_owned(),
                "--connections=20 --rounds=8",
            ),
            (
                "pass",
                "accepted sockets passed to another process",
                When::Throughout,
                v4,
                format!("--mode=pass --second-name=pass-x --settle-ms={settle} --group={SHARED_ALL}pass-s"),
                "--connections=20 --rounds=10",
            ),
            (
                "old",
                "connections and a listener older than the agent",
                When::BeforeAgent,
                v4,
                "--mode=event".to_owned(),
                "--connections=20 --rounds=5 --pause-after=2",
            ),
        ] {
            let port = self.next_port();
            let sizes = "--up=1-9000 --down=0-9000";
            let server = format!("--listen={address} --port={port} {sizes} {server}");
            let client = format!("--dst={address} --port={port} --pause-ms={pause} {sizes} {client}");
            let servers = vec![self.process(&format!("{tag}-s"), Side::B, "tcp-server", words(&server))];
            let mut clients = vec![self.process(&format!("{tag}-c"), Side::A, "tcp-hold", words(&client))];
            if when == When::BeforeAgent {
                // Comes after the agent, to a listener that the agent has never seen accept.
                let late = client
                    .replace("--pause-after=2", "")
                    .replace("--connections=20", "--connections=5");
                clients.push(self.process(&format!("{tag}-c2"), Side::A, "tcp-hold", words(&late)));
            }
            self.scenarios.push(Scenario {
                tag,
                what,
                when,
                symmetric: true,
                servers,
                clients,
            });
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::traffic::cli::{Cli, Command};

    fn plan(topology: Topology) -> Plan {
        Plan {
            tcp: 10_000,
            udp: 100_000,
            seed: 1,
            topology,
            netns: (topology == Topology::Veth).then(|| ("/run/netns/a".into(), "/run/netns/b".into())),
            interval: Duration::from_secs(2),
            first_port: 7000,
        }
    }

    #[test]
    fn every_process_has_valid_arguments_and_a_short_name_of_its_own() {
        for topology in [Topology::Veth, Topology::Loopback] {
            let mut names = std::collections::BTreeSet::new();
            for process in scenarios(&plan(topology))
                .iter()
                .flat_map(|one| one.servers.iter().chain(&one.clients))
            {
                assert!(process.name.len() <= 15, "{}", process.name);
                assert!(names.insert(process.name.clone()), "{} appears twice", process.name);
                Cli::try_parse_from(std::iter::once(&"traffic".to_owned()).chain(&process.arguments)).unwrap();
            }
        }
    }

    #[test]
    fn the_plan_makes_as_many_connections_and_datagrams_as_asked() {
        let (mut connections, mut datagrams) = (0, 0);
        for process in scenarios(&plan(Topology::Veth)).iter().flat_map(|one| &one.clients) {
            let cli = Cli::try_parse_from(std::iter::once(&"traffic".to_owned()).chain(&process.arguments)).unwrap();
            match cli.command {
                Command::TcpClient(options) => connections += options.connections,
                Command::UdpClient(options) => datagrams += options.datagrams,
                _ => {}
            }
        }
        assert!(connections >= 10_000, "{connections}");
        assert!(datagrams >= 100_000, "{datagrams}");
    }
}
