//! Roles `tcp-client` (many short connections) and `tcp-hold` (long-lived connections).

use std::{
    io::{self, Write as _},
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use socket2::{Domain, SockAddr, Socket, Type};

use super::{
    exchange::{self, PATIENCE, Scratch},
    options::{Exchange, Pattern, TcpClient, TcpHold},
    report::{Direction, Recorder, RowId, RowKey, Transport},
    role, sys,
};

struct Target {
    address: SockAddr,
    ip: IpAddr,
    /// Row of this destination, known after the first connection; not used with several own addresses.
    row: Option<RowId>,
}

/// Runs the role `tcp-client`.
///
/// # Errors
/// Setup failed. Failing connections are counted, not returned.
pub fn run(options: &TcpClient) -> anyhow::Result<()> {
    role::start(&options.common)?;
    let mut scratch = Scratch::default();
    if options.exchange.pattern == Pattern::Sendfile {
        scratch = scratch.with_file().context("making the file for sendfile in TMPDIR")?;
    }
    if options.duration_ms > 0 {
        scratch.deadline = Some(Instant::now() + Duration::from_millis(options.duration_ms));
    }
    let mut recorder = Recorder::default();
    role::in_portions(options.connections, options.per_process, |portion| {
        let mut targets = targets(&options.dst, options.port);
        connect_many(options, portion, &mut targets, &mut scratch, &mut recorder);
        role::finish(&options.common, "tcp-client", &mut recorder)
    })
}

fn targets(dst: &[IpAddr], port: u16) -> Vec<Target> {
    dst.iter()
        .map(|ip| Target {
            address: SockAddr::from(SocketAddr::new(*ip, port)),
            ip: *ip,
            row: None,
        })
        .collect()
}

fn connect_many(
    options: &TcpClient,
    connections: u64,
    targets: &mut [Target],
    scratch: &mut Scratch,
    recorder: &mut Recorder,
) {
    let sources: Vec<SockAddr> = options
        .src
        .iter()
        .map(|ip| SockAddr::from(SocketAddr::new(*ip, 0)))
        .collect();
    let count = targets.len();
    let mut done: u64 = 0;
    while connections == 0 || done < connections {
        // The clock is read every 16 connections: precise enough, and no cost per connection.
        if sys::stopping() || (done.is_multiple_of(16) && scratch.deadline.is_some_and(|end| Instant::now() >= end)) {
            break;
        }
        let turn = usize::try_from(done).unwrap_or(0);
        let Some(target) = targets.get_mut(turn % count) else {
            break;
        };
        let source = if sources.is_empty() {
            None
        } else {
            sources.get((turn / count) % sources.len())
        };
        done += 1;
        if let Err((what, error)) = connect_one(options, target, source, scratch, recorder) {
            let key = key_of(target.ip, options.port, None);
            let row = target.row.unwrap_or_else(|| recorder.row(key));
            recorder.counts(row).failures += 1;
            if options.exchange.pattern != Pattern::Refused || error.kind() != io::ErrorKind::ConnectionRefused {
                recorder.error(what, &error);
            }
        }
    }
}

fn key_of(remote: IpAddr, port: u16, local: Option<IpAddr>) -> RowKey {
    RowKey {
        transport: Transport::Tcp,
        direction: Direction::Outgoing,
        local,
        remote,
        service_port: port,
    }
}

fn connect_one(
    options: &TcpClient,
    target: &mut Target,
    source: Option<&SockAddr>,
    scratch: &mut Scratch,
    recorder: &mut Recorder,
) -> Result<(), (&'static str, io::Error)> {
    let socket = Socket::new(target.address.domain(), Type::STREAM, None).map_err(|error| ("socket", error))?;
    if let Some(source) = source {
        // Leaves the choice of the port to connect(), so that one port serves several destinations.
        sys::set_int_option(&socket, libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1)
            .and_then(|()| socket.bind(source))
            .map_err(|error| ("bind", error))?;
    }
    if options.exchange.pattern == Pattern::Refused {
        socket.set_nonblocking(true).map_err(|error| ("nonblocking", error))?;
    }
    connect(&socket, &target.address).map_err(|error| ("connect", error))?;
    let fixed = options.exchange.is_fixed();
    let local = if target.row.is_none() || !fixed || options.src.len() > 1 {
        Some(socket.local_addr().map_err(|error| ("getsockname", error))?.as_socket())
    } else {
        None
    };
    let local = local.flatten();
    let row = match target.row {
        Some(row) if options.src.len() < 2 => row,
        _ => recorder.row(key_of(target.ip, options.port, local.map(|local| local.ip()))),
    };
    target.row = Some(row);
    let port = if fixed {
        0
    } else {
        local.map_or(0, |local| local.port())
    };
    let payload = options.exchange.payload(options.common.seed, port, 0);
    let counts = recorder.counts(row);
    counts.connections += 1;
    let result = exchange::client(options.exchange.pattern, &socket, payload, scratch, counts);
    drop(socket);
    counts.closed += 1;
    result.map_err(|error| ("exchange", error))
}

/// Connects, blocking or not, and returns the outcome.
fn connect(socket: &Socket, address: &SockAddr) -> io::Result<()> {
    match socket.connect(address) {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) || error.kind() == io::ErrorKind::Interrupted => {
            if sys::poll(sys::fd_of(socket), libc::POLLOUT, PATIENCE)? == 0 {
                return Err(io::ErrorKind::TimedOut.into());
            }
            socket.take_error()?.map_or(Ok(()), Err)
        }
        other => other,
    }
}

struct Held {
    socket: Socket,
    row: RowId,
    port: u16,
}

/// Runs the role `tcp-hold`.
///
/// # Errors
/// Setup failed, or a connection could not be opened: held connections have to be all there.
pub fn run_hold(options: &TcpHold) -> anyhow::Result<()> {
    anyhow::ensure!(
        options.up.min > 0,
        "--up {} of tcp-hold must start at 1 or more",
        options.up
    );
    role::start(&options.common)?;
    let wanted = u64::from(options.connections) + 64;
    let limit = sys::raise_open_files(wanted).context("raising the limit of open files")?;
    anyhow::ensure!(
        limit >= wanted,
        "{} connections need {wanted} open files, the limit is {limit}: use more processes",
        options.connections
    );
    let exchange = Exchange {
        pattern: Pattern::Exchange,
        up: options.up,
        down: options.down,
    };
    let mut recorder = Recorder::default();
    let mut scratch = Scratch::default();
    let mut held = Vec::with_capacity(options.connections as usize);
    for (index, ip) in (0..options.connections).zip(options.dst.iter().cycle()) {
        held.push(
            open(*ip, options.port, &mut recorder)
                .with_context(|| format!("connection {index} to {ip} port {}", options.port))?,
        );
    }
    say("open")?;
    for round in 0..options.rounds {
        for one in &held {
            let payload = exchange.payload(options.common.seed, one.port, round);
            let counts = recorder.counts(one.row);
            let result = exchange::send_all(&one.socket, payload.up, &scratch, counts)
                .and_then(|()| exchange::read_answer(&one.socket, payload.down, &mut scratch, counts));
            if let Err(error) = result {
                counts.failures += 1;
                recorder.error("exchange", &error);
            }
        }
        if sys::stopping() {
            break;
        }
        if round + 1 == options.pause_after {
            let before = sys::marks();
            say("paused")?;
            while sys::marks() == before && !sys::stopping() {
                std::thread::sleep(Duration::from_millis(10));
            }
            recorder.mark();
        }
        if round + 1 < options.rounds {
            std::thread::sleep(Duration::from_millis(options.pause_ms));
        }
    }
    if options.hold {
        say("holding")?;
        while !sys::stopping() {
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    for one in held {
        drop(one.socket);
        recorder.counts(one.row).closed += 1;
    }
    role::finish(&options.common, "tcp-hold", &mut recorder)
}

fn open(ip: IpAddr, port: u16, recorder: &mut Recorder) -> io::Result<Held> {
    let socket = Socket::new(Domain::for_address(SocketAddr::new(ip, port)), Type::STREAM, None)?;
    connect(&socket, &SockAddr::from(SocketAddr::new(ip, port)))?;
    let local = socket.local_addr()?.as_socket().ok_or(io::ErrorKind::InvalidData)?;
    let row = recorder.row(key_of(ip, port, Some(local.ip())));
    recorder.counts(row).connections += 1;
    Ok(Held {
        socket,
        row,
        port: local.port(),
    })
}

/// Tells the driver, which reads standard output, how far the role is.
fn say(word: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{word}")?;
    out.flush()
}
