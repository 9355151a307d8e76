//! The smallest set of capabilities, held by user `nobody`, is enough for everything.

use node_agent::ebpf::privileges::WANTED;

use crate::{
    process::{Agent, NOBODY, PATIENCE, Rights, directory, doctor},
    traffic::{loopback, tcp_service, udp_service},
};

/// Needed by kernels before 5.11 only, and this test's kernel is newer.
const OLD_KERNELS_ONLY: &str = "CAP_SYS_RESOURCE";

fn smallest() -> impl Iterator<Item = (&'static str, u64)> {
    let needed = WANTED.iter().filter(|privilege| privilege.name != OLD_KERNELS_ONLY);
    needed.map(|privilege| (privilege.name, 1 << privilege.bit))
}

#[test]
#[ignore = "native: needs root"]
fn nobody_with_the_documented_capabilities_counts_exactly() {
    let directory = directory();
    let all = smallest().fold(0, |set, (_, bit)| set | bit);

    // Older than the agent: only what happens from its start on counts.
    let (listener, mut tcp) = tcp_service();
    let (socket, mut udp) = udp_service();
    let mut older = tcp.connect(&listener, loopback(tcp.port));
    tcp.exchange(&mut older, 5000, 3000);
    let client = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    udp.datagrams_from(&client, &socket, 10);
    let (tcp_before, udp_before) = (tcp.truth, udp.truth);

    let agent = Agent::start(Rights::Nobody(all), directory.path(), &[]);
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap();
    for line in [
        format!("Uid:\t{NOBODY}\t{NOBODY}\t{NOBODY}\t{NOBODY}"),
        format!("CapEff:\t{all:016x}"),
        format!("CapPrm:\t{all:016x}"),
        format!("CapBnd:\t{all:016x}"),
    ] {
        assert!(status.contains(&line), "{line} is not in {status}");
    }
    tcp.exchange(&mut older, 700, 11);
    tcp.close(older);
    tcp.connections(&listener, 50);
    udp.datagrams_from(&client, &socket, 30);
    udp.datagrams(&socket, 100);

    // Nothing that root would see is missing.
    let (as_root, _) = doctor(&[]);
    for (feature, _) in agent.features() {
        let root = as_root.features.iter().find(|f| f.name == feature.name).unwrap();
        assert_eq!(feature.state, root.state, "{feature:?}");
    }
    let rows = agent.stop();
    assert_eq!(tcp.reported(&rows), tcp.truth.since(&tcp_before));
    assert_eq!(udp.reported(&rows), udp.truth.since(&udp_before));
}

#[test]
#[ignore = "native: needs root"]
fn each_missing_capability_is_named_and_costs_what_is_documented() {
    let all = smallest().fold(0, |set, (_, bit)| set | bit);
    for (name, bit) in smallest() {
        let directory = directory();
        let plugins = "--enabled-plugins=ebpf-net,ebpf-conntrack";
        let args = [plugins, "--output-stdout=json"];
        let mut agent = Agent::spawn(Rights::Nobody(all & !bit), directory.path(), &args);
        let deadline = std::time::Instant::now() + PATIENCE;
        let up = |agent: &Agent| agent.log().contains("Agent is up");
        while agent.is_running() && !up(&agent) {
            assert!(std::time::Instant::now() < deadline, "{}", agent.log());
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        let log = agent.log();
        println!(
            "without {name}: {}",
            log.lines()
                .filter(|line| line.contains("limited") || line.contains("lacks"))
                .collect::<Vec<_>>()
                .join("\n")
        );
        match name {
            // Nothing can be collected.
            "CAP_BPF" => {
                assert!(!up(&agent), "{log}");
                assert!(log.contains("lacks CAP_BPF"), "{log}");
            }
            _ => {
                assert!(up(&agent), "{name}: {log}");
                let states: Vec<(String, String)> =
                    agent.features().into_iter().map(|(f, _)| (f.name, f.state)).collect();
                let state = |name: &str| states.iter().find(|(n, _)| n == name).map(|(_, s)| s.as_str()).unwrap();
                match name {
                    "CAP_NET_BROADCAST" => {
                        // Only of this feature, which is told of a moment later.
                        let limited = |agent: &Agent| {
                            let features = agent.features();
                            features
                                .iter()
                                .any(|(it, state)| it.name == "ebpf-conntrack" && *state == 1)
                        };
                        agent.wait_until("connection tracking tells its limits", limited);
                        assert_eq!(state("ebpf-net/tcp"), "on");
                        assert_eq!(state("ebpf-net/udp-sent"), "on");
                    }
                    "CAP_PERFMON" => assert_eq!(state("ebpf-net/tcp"), "off"),
                    "CAP_NET_ADMIN" => {
                        assert_eq!(state("ebpf-net/udp-sent"), "off");
                        assert_eq!(state("ebpf-net/tcp"), "on");
                    }
                    _ => {
                        assert_eq!(state("ebpf-net/tcp"), "on");
                        assert_eq!(state("ebpf-net/udp-sent"), "on");
                        assert_eq!(state("ebpf-net/tcp-older"), "degraded", "{name}");
                    }
                }
            }
        }
    }
}

#[test]
#[ignore = "native: needs root"]
fn a_receiver_older_than_the_agent_is_named_from_its_first_datagram() {
    let directory = directory();
    let (socket, mut udp) = udp_service();
    let agent = Agent::start(Rights::Own, directory.path(), &[]);
    // It never sends: no datagram of its own tells whose it is.
    udp.one_way(&socket, 50);
    let rows = agent.stop();
    assert_eq!(udp.reported(&rows), udp.truth);
}
