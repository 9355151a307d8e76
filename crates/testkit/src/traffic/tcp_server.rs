//! Roles `tcp-server` and `serve-fd`: one connection after the other, in one process or spread over several.
//! Long-lived connections are in [`super::tcp_event`].

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd as _,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use socket2::{Domain, SockAddr, Socket, Type};

use super::{
    exchange::{self, PATIENCE, Scratch},
    options::{Exchange, Mode, ServeFd, TcpServer},
    report::{Direction, Recorder, RowId, RowKey, Transport},
    role, sys, tcp_event,
};

/// Quiet time after which a stopping server takes its accept queue for empty.
const QUIET: Duration = Duration::from_millis(300);
/// Children of mode fork that may run at once.
const MAX_CHILDREN: usize = 32;
/// Number that the socket has in a process of mode fork-exec.
const SERVED_FD: i32 = 3;

/// Runs the role `tcp-server` until SIGTERM, and then until the accept queue is empty.
///
/// # Errors
/// Setup failed. Failing connections are counted, not returned.
pub fn run(options: &TcpServer) -> anyhow::Result<()> {
    role::start(&options.common)?;
    let listener = listen(options.listen, options.port)
        .with_context(|| format!("listening on {} port {}", options.listen, options.port))?;
    match options.mode {
        Mode::Inline => {
            role::ready()?;
            serve_here(options, &listener)
        }
        Mode::Prefork => prefork(options, &listener),
        Mode::Fork | Mode::ForkExec => {
            role::ready()?;
            fork_each(options, &listener)
        }
        Mode::Event => {
            role::ready()?;
            tcp_event::serve(options, &listener)
        }
        Mode::Pass => tcp_event::serve_by_passing(options, &listener),
    }
}

/// Runs the role `serve-fd`: one connection that another process accepted.
///
/// # Errors
/// The descriptor is no connected socket, or the report cannot be written.
pub fn run_fd(options: &ServeFd) -> anyhow::Result<()> {
    role::start(&options.common)?;
    let socket = sys::inherited_socket(options.fd).with_context(|| format!("taking over descriptor {}", options.fd))?;
    let mut recorder = Recorder::default();
    let peer = peer_of(&socket).context("reading the peer of the inherited socket")?;
    let row = row_of(&socket, peer, &mut recorder).context("reading the address of the inherited socket")?;
    serve(
        &options.exchange,
        options.common.seed,
        &socket,
        peer.port(),
        row,
        &mut Scratch::default(),
        &mut recorder,
    );
    drop(socket);
    role::finish(&options.common, "serve-fd", &mut recorder)
}

fn listen(ip: IpAddr, port: u16) -> io::Result<Socket> {
    let address = SocketAddr::new(ip, port);
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    if ip.is_ipv6() {
        socket.set_only_v6(!ip.is_unspecified())?;
    }
    // Accepted sockets inherit the time-out: a lost peer becomes a counted error instead of a hang.
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.bind(&SockAddr::from(address))?;
    socket.listen(8192)?;
    Ok(socket)
}

/// Calls `each` with every accepted connection until the role stops and the queue is empty.
///
/// # Errors
/// `accept` failed for good, or `each` did.
pub fn accept_all(listener: &Socket, mut each: impl FnMut(Socket, SocketAddr) -> io::Result<()>) -> io::Result<()> {
    let mut draining = None;
    loop {
        if sys::stopping() && draining.is_none() {
            listener.set_nonblocking(true)?;
            draining = Some(Instant::now());
        }
        match listener.accept4(libc::SOCK_CLOEXEC) {
            Ok((socket, peer)) => {
                each(socket, peer.as_socket().ok_or(io::ErrorKind::InvalidData)?)?;
                if draining.is_some() {
                    draining = Some(Instant::now());
                }
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {
                if draining.is_some_and(|since| since.elapsed() >= QUIET) || sys::timed_out() {
                    return Ok(());
                }
                if draining.is_some() {
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
            // The peer reset before accept; Linux reports it here for some protocols' pending errors.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => return Err(error),
        }
    }
}

fn serve_here(options: &TcpServer, listener: &Socket) -> anyhow::Result<()> {
    let mut recorder = Recorder::default();
    let mut scratch = Scratch::default();
    accept_all(listener, |socket, peer| {
        let row = row_of(&socket, peer, &mut recorder)?;
        recorder.counts(row).connections += 1;
        let seed = options.common.seed;
        serve(
            &options.exchange,
            seed,
            &socket,
            peer.port(),
            row,
            &mut scratch,
            &mut recorder,
        );
        drop(socket);
        recorder.counts(row).closed += 1;
        Ok(())
    })
    .context("accepting connections")?;
    role::finish(&options.common, "tcp-server", &mut recorder)
}

/// The row of an accepted socket. Its peer is the one that `accept` told: after a reset the socket has none any more.
///
/// # Errors
/// The socket has no IP address.
pub fn row_of(socket: &Socket, peer: SocketAddr, recorder: &mut Recorder) -> io::Result<RowId> {
    let local = socket.local_addr()?.as_socket().ok_or(io::ErrorKind::InvalidData)?;
    Ok(recorder.row(RowKey {
        transport: Transport::Tcp,
        direction: Direction::Incoming,
        local: Some(local.ip()),
        remote: peer.ip(),
        service_port: local.port(),
    }))
}

/// The peer of a connected socket that another process accepted.
///
/// # Errors
/// The socket is not connected (any more).
pub fn peer_of(socket: &Socket) -> io::Result<SocketAddr> {
    socket
        .peer_addr()?
        .as_socket()
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn serve(
    exchange: &Exchange,
    seed: u64,
    socket: &Socket,
    client_port: u16,
    row: RowId,
    scratch: &mut Scratch,
    recorder: &mut Recorder,
) {
    let payload = exchange.payload(seed, if exchange.is_fixed() { 0 } else { client_port }, 0);
    let counts = recorder.counts(row);
    if let Err(error) = exchange::server(exchange.pattern, socket, payload, scratch, counts) {
        counts.failures += 1;
        recorder.error("exchange", &error);
    }
}

fn prefork(options: &TcpServer, listener: &Socket) -> anyhow::Result<()> {
    let mut workers = Vec::new();
    for _ in 0..options.workers {
        match sys::fork().context("forking a worker")? {
            sys::Fork::Child => {
                let result = sys::die_with_parent()
                    .map_err(Into::into)
                    .and_then(|()| serve_here(options, listener));
                sys::exit_now(i32::from(result.is_err()));
            }
            sys::Fork::Parent(pid) => workers.push(pid),
        }
    }
    role::ready()?;
    let mut failed = 0;
    while !workers.is_empty() {
        if sys::stopping() {
            // Again and again: a signal between a worker's check and its accept would be missed.
            workers.iter().for_each(|pid| sys::kill(*pid, libc::SIGTERM));
        }
        while let Some((pid, status)) = sys::wait_any(false) {
            workers.retain(|known| *known != pid);
            failed += i32::from(status != 0);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    anyhow::ensure!(failed == 0, "{failed} workers failed");
    Ok(())
}

fn fork_each(options: &TcpServer, listener: &Socket) -> anyhow::Result<()> {
    let mut recorder = Recorder::default();
    let mut children = 0_usize;
    let mut failed = 0_u32;
    let mut reaped = |block: bool, children: &mut usize| {
        if let Some((_, status)) = sys::wait_any(block) {
            *children -= 1;
            failed += u32::from(status != 0);
            return true;
        }
        false
    };
    accept_all(listener, |socket, peer| {
        let row = row_of(&socket, peer, &mut recorder)?;
        match sys::fork()? {
            sys::Fork::Child => sys::exit_now(i32::from(child(options, socket, peer, &mut recorder).is_err())),
            sys::Fork::Parent(_) => {
                children += 1;
                let counts = recorder.counts(row);
                counts.connections += 1;
                counts.closed += 1;
            }
        }
        drop(socket);
        while reaped(children >= MAX_CHILDREN, &mut children) {}
        Ok(())
    })
    .context("accepting connections")?;
    while reaped(true, &mut children) {}
    anyhow::ensure!(failed == 0, "{failed} children failed");
    role::finish(&options.common, "tcp-server", &mut recorder)
}

/// The child of one connection. Its parent counts the connection, it counts the bytes.
fn child(options: &TcpServer, socket: Socket, peer: SocketAddr, recorder: &mut Recorder) -> anyhow::Result<()> {
    if options.mode == Mode::ForkExec {
        let own = std::env::args_os().next().context("no argv[0]")?;
        let path = std::path::Path::new(&own).with_file_name(&options.second_name);
        sys::dup_onto(socket.as_fd(), SERVED_FD).context("handing over the socket")?;
        let error = sys::exec(&path, &serve_fd_arguments(options));
        return Err(anyhow::Error::new(error).context(format!("executing {}", path.display())));
    }
    recorder.clear();
    let row = row_of(&socket, peer, recorder)?;
    let seed = options.common.seed;
    serve(
        &options.exchange,
        seed,
        &socket,
        peer.port(),
        row,
        &mut Scratch::default(),
        recorder,
    );
    drop(socket);
    role::finish(&options.common, "tcp-server-child", recorder)
}

fn serve_fd_arguments(options: &TcpServer) -> Vec<String> {
    use clap::ValueEnum as _;
    let pattern = options
        .exchange
        .pattern
        .to_possible_value()
        .map(|value| value.get_name().to_owned());
    [
        "serve-fd".to_owned(),
        SERVED_FD.to_string(),
        format!("--name={}", options.second_name),
        format!("--report={}", options.common.report.display()),
        format!("--group={}", options.common.group),
        format!("--seed={}", options.common.seed),
        format!("--pattern={}", pattern.unwrap_or_default()),
        format!("--up={}", options.exchange.up),
        format!("--down={}", options.exchange.down),
    ]
    .into()
}
