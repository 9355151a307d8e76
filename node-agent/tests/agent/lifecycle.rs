//! Ends and beginnings: nothing stays in the kernel, the next agent counts right, two at once do not disturb each other.

use std::{collections::BTreeSet, fs};

use aya::programs::loaded_programs;

use crate::{
    process::{Agent, Rights, directory},
    traffic::{loopback, tcp_service, udp_service},
};

/// Ids of the kernel programs that a process has descriptors of.
fn programs_of(pid: u32) -> BTreeSet<u32> {
    fs::read_dir(format!("/proc/{pid}/fdinfo"))
        .unwrap()
        .filter_map(|entry| fs::read_to_string(entry.unwrap().path()).ok())
        .filter_map(|info| {
            info.lines()
                .find_map(|line| line.strip_prefix("prog_id:")?.trim().parse().ok())
        })
        .collect()
}

fn in_kernel() -> BTreeSet<u32> {
    loaded_programs()
        .filter_map(Result::ok)
        .map(|program| program.id())
        .collect()
}

#[test]
#[ignore = "native: needs root"]
fn an_end_of_any_kind_leaves_nothing_in_the_kernel_and_the_next_start_counts_right() {
    let directory = directory();
    let (listener, mut tcp) = tcp_service();
    let (socket, mut udp) = udp_service();
    // Lives through all of it.
    let mut lasting = tcp.connect(&listener, loopback(tcp.port));
    for signal in [libc::SIGTERM, libc::SIGKILL, libc::SIGINT] {
        let mut agent = Agent::start(Rights::Own, directory.path(), &[]);
        let programs = programs_of(agent.pid());
        assert!(programs.len() > 10, "{programs:?}");
        assert!(programs.is_subset(&in_kernel()));
        // A kill may take away what was not flushed yet; the row itself is checked with the agents that end in order.
        let (rows_before, before) = (agent.rows(), (tcp.truth, udp.truth));
        tcp.connections(&listener, 10);
        tcp.exchange(&mut lasting, 1000, 2000);
        udp.datagrams(&socket, 20);
        let status = agent.end(signal);
        assert_eq!(status.success(), signal != libc::SIGKILL);
        // The kernel frees programs after a grace period.
        agent.wait_until("its programs are gone", |_| programs.is_disjoint(&in_kernel()));
        if signal != libc::SIGKILL {
            let rows = &agent.rows()[rows_before.len()..];
            assert_eq!(tcp.reported(rows), tcp.truth.since(&before.0));
            assert_eq!(udp.reported(rows), udp.truth.since(&before.1));
        }
        // Not seen by anybody.
        tcp.exchange(&mut lasting, 300, 400);
        tcp.connections(&listener, 3);
        udp.datagrams(&socket, 3);
    }
}

#[test]
#[ignore = "native: needs root"]
fn two_agents_at_once_both_count_everything() {
    let directories = [directory(), directory()];
    let (listener, mut tcp) = tcp_service();
    let (socket, mut udp) = udp_service();
    let first = Agent::start(Rights::Own, directories[0].path(), &[]);
    tcp.connections(&listener, 20);
    udp.datagrams(&socket, 20);
    let before = (tcp.truth, udp.truth);
    let second = Agent::start(Rights::Own, directories[1].path(), &[]);
    tcp.connections(&listener, 40);
    udp.datagrams(&socket, 40);
    let rows = second.stop();
    assert_eq!(tcp.reported(&rows), tcp.truth.since(&before.0));
    assert_eq!(udp.reported(&rows), udp.truth.since(&before.1));
    // The end of one takes nothing from the other.
    tcp.connections(&listener, 10);
    udp.datagrams(&socket, 10);
    let rows = first.stop();
    assert_eq!(tcp.reported(&rows), tcp.truth);
    assert_eq!(udp.reported(&rows), udp.truth);
}
