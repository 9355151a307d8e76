//! A child that is made to run another program holds copies of all descriptors until its execve closes them. Where it was
//! the last to hold a connection, the connection is still that of the process that used it.

use std::{
    io::{self, Read as _},
    os::{fd::AsRawFd as _, unix::process::CommandExt as _},
    process::{Child, Command},
    thread,
    time::Duration,
};

use crate::{
    process::{Agent, Rights, directory},
    traffic::{loopback, tcp_service},
};

/// How long a child is between its fork and its execve.
const BETWEEN: Duration = Duration::from_millis(30);

/// A child before its execve; it ends soon after.
fn child() -> thread::JoinHandle<Child> {
    let (mut forked, signal) = io::pipe().unwrap();
    let spawned = thread::spawn(move || {
        let mut command = Command::new("/bin/true");
        // SAFETY: write and nanosleep only, which a forked child of a program with threads may call.
        unsafe {
            command.pre_exec(move || {
                let written = libc::write(signal.as_raw_fd(), b"x".as_ptr().cast(), 1);
                thread::sleep(BETWEEN);
                if written == 1 {
                    Ok(())
                } else {
                    Err(io::Error::last_os_error())
                }
            });
        }
        command.spawn().unwrap()
    });
    assert_eq!(forked.read(&mut [0]).unwrap(), 1);
    spawned
}

#[test]
#[ignore = "native: needs root"]
fn what_the_execve_of_a_child_closes_is_its_forkers() {
    let directory = directory();
    let (listener, mut service) = tcp_service();
    let agent = Agent::start(Rights::Own, directory.path(), &[]);
    for i in 0..20 {
        let mut pair = service.connect(&listener, loopback(service.port));
        service.exchange(&mut pair, 1000 + i, 2000 + i);
        let spawned = child();
        let (client, server) = pair;
        // In either order, and with the peer's end first or not.
        if i % 2 == 0 {
            drop(client);
            drop(server);
        } else {
            drop(server);
            drop(client);
        }
        service.truth.outgoing.closed += 1;
        service.truth.incoming.closed += 1;
        assert!(spawned.join().unwrap().wait().unwrap().success());
    }
    let rows = agent.stop();
    assert_eq!(service.reported(&rows), service.truth);
}
