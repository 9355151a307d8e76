//! More load than the smallest maps and ring hold, and an agent that is not scheduled: what does not fit is counted as
//! lost, with a reason, to the last one; afterwards all is exact again.

use std::time::Duration;

use testkit::{
    service::{StageCounts, metric_sum},
    traffic::sys,
};

use crate::{
    process::{Agent, Rights, directory},
    traffic::{Service, far_loopback, tcp_service, udp_service},
};

/// The least that the options take.
const SMALLEST: [&str; 3] = [
    "--ring-buffer-size=64KiB",
    "--flow-map-entries=1024",
    "--tcp-connections-max=1024",
];
/// Flows beyond what map and ring hold together.
const FLOWS: usize = 12_000;
/// Connections open at one time, beyond what the connection map holds.
const OPEN: u32 = 2000;

/// More connections at one time than the map holds, each to another address.
fn connection_burst(service: &mut Service, listener: &std::net::TcpListener) {
    let mut open = Vec::new();
    for n in 0..OPEN {
        let mut pair = service.connect(listener, far_loopback(n, service.port));
        service.exchange(&mut pair, 200, 100);
        open.push(pair);
    }
    for pair in open {
        service.close(pair);
    }
}

/// Waits until all that entered has left, and gives the stage.
fn settled(agent: &Agent, name: &str, at_least: u64) -> StageCounts {
    let mut stage = StageCounts::default();
    agent.wait_until("the ledger closes", |agent| {
        stage = agent.ledger().remove(name).unwrap_or_default();
        stage.entered >= at_least && stage.pending() == 0
    });
    stage
}

#[test]
#[ignore = "native: needs root"]
fn what_does_not_fit_is_counted_as_lost() {
    sys::raise_open_files(3 * u64::from(OPEN)).unwrap();
    let directory = directory();
    let mut agent = Agent::start(Rights::Own, directory.path(), &SMALLEST);
    let (listener, mut tcp) = tcp_service();
    let (socket, mut udp) = udp_service();

    // Nobody reads the ring meanwhile.
    agent.signal(libc::SIGSTOP);
    udp.one_way(&socket, FLOWS);
    connection_burst(&mut tcp, &listener);
    agent.signal(libc::SIGCONT);

    let datagrams = settled(&agent, "capture.udp", 2 * FLOWS as u64);
    let ends = settled(&agent, "capture.tcp", 2 * u64::from(OPEN));
    println!("capture.udp {datagrams:?}\ncapture.tcp {ends:?}");
    for stage in [&datagrams, &ends] {
        assert!(stage.lost() > 0, "the burst fits: it proves nothing: {stage:?}");
        assert!(
            stage.lost.keys().all(|reason| reason == "ring_buffer_full"),
            "{stage:?}"
        );
    }
    let untracked = metric_sum(&agent.metrics(), "ebpfcollector_ebpf_net_connections_untracked_total").unwrap();
    assert!(untracked > 0.0, "the connection map held them all: it proves nothing");

    // Exact again, without a restart.
    let (first_udp, first_tcp) = (udp.truth, tcp.truth);
    let (listener_after, mut tcp_after) = tcp_service();
    let (socket_after, mut udp_after) = udp_service();
    tcp_after.connections(&listener_after, 100);
    udp_after.datagrams(&socket_after, 300);
    std::thread::sleep(Duration::from_millis(100));
    assert!(agent.is_running());
    let rows = agent.stop();
    assert_eq!(tcp_after.reported(&rows), tcp_after.truth);
    assert_eq!(udp_after.reported(&rows), udp_after.truth);

    // Of the burst, what is not in the rows is what the ledger calls lost. Others on this machine may have lost some too.
    let reported = udp.reported(&rows);
    let seen = reported.outgoing.datagrams_sent + reported.incoming.datagrams_received;
    let made = first_udp.outgoing.datagrams_sent + first_udp.incoming.datagrams_received;
    assert!(
        seen <= made && made - seen <= datagrams.lost(),
        "{seen} of {made}, {datagrams:?}"
    );
    let reported = tcp.reported(&rows);
    let seen = reported.outgoing.closed + reported.incoming.closed;
    let made = first_tcp.outgoing.closed + first_tcp.incoming.closed;
    assert!(seen <= made && made - seen <= ends.lost(), "{seen} of {made}, {ends:?}");
}

#[test]
#[ignore = "native: needs root"]
fn what_spills_over_the_maps_is_not_lost() {
    let directory = directory();
    let agent = Agent::start(Rights::Own, directory.path(), &["--flow-map-entries=1024"]);
    let (socket, mut udp) = udp_service();
    udp.one_way(&socket, FLOWS);
    let stage = settled(&agent, "capture.udp", 2 * FLOWS as u64);
    assert_eq!(stage.lost(), 0, "{stage:?}");
    let rows = agent.stop();
    assert_eq!(udp.reported(&rows), udp.truth);
}
