//! Server for long-lived connections: one process, all connections at once, or a process that gets its connections
//! from another one by SCM_RIGHTS.

use std::{
    io::{self, Write as _},
    net::SocketAddr,
    os::fd::{AsFd as _, AsRawFd as _},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use socket2::{Domain, Socket, Type};

use super::{
    exchange::{self, Scratch},
    options::{Exchange, Pattern, TcpServer},
    report::{Recorder, RowId},
    role, sys, tcp_server,
};

/// Time that a stopping server gives its connections to end.
const FAREWELL: Duration = Duration::from_secs(5);
const LISTENER: u64 = u64::MAX;
const CHANNEL: u64 = u64::MAX - 1;

struct Connection {
    socket: Socket,
    row: RowId,
    client_port: u16,
    round: u32,
    missing: usize,
    down: usize,
    since: Instant,
}

struct Server<'a> {
    exchange: Exchange,
    options: &'a TcpServer,
    /// Indexed by descriptor number.
    connections: Vec<Option<Connection>>,
    open: usize,
    epoll: sys::Epoll,
    recorder: Recorder,
    scratch: Scratch,
    marks: u32,
}

/// Serves all connections of `listener` in this process until SIGTERM.
///
/// # Errors
/// Setup, `epoll` or `accept` failed.
pub fn serve(options: &TcpServer, listener: &Socket) -> anyhow::Result<()> {
    Server::new(options)?.run(Some(listener), None)?.finish("tcp-server")
}

/// Accepts here, and passes every accepted socket to a second process that does all the talking.
///
/// # Errors
/// Setup or `accept` failed, or the second process did.
pub fn serve_by_passing(options: &TcpServer, listener: &Socket) -> anyhow::Result<()> {
    let (here, there) = Socket::pair(Domain::UNIX, Type::SEQPACKET, None).context("making the channel")?;
    match sys::fork().context("forking the receiving process")? {
        sys::Fork::Child => {
            drop(here);
            let result = receive_all(options, there);
            sys::exit_now(i32::from(result.is_err()));
        }
        sys::Fork::Parent(pid) => {
            drop(there);
            role::ready()?;
            let mut recorder = Recorder::default();
            tcp_server::accept_all(listener, |socket, peer| {
                let row = tcp_server::row_of(&socket, peer, &mut recorder)?;
                recorder.counts(row).connections += 1;
                sys::send_fd(&here, socket.as_fd())
            })
            .context("accepting and passing connections")?;
            drop(here);
            sys::kill(pid, libc::SIGTERM);
            let status = sys::wait_any(true).map_or(-1, |(_, status)| status);
            role::finish(&options.common, "tcp-server", &mut recorder)?;
            anyhow::ensure!(status == 0, "the receiving process ended with status {status}");
            Ok(())
        }
    }
}

fn receive_all(options: &TcpServer, channel: Socket) -> anyhow::Result<()> {
    sys::die_with_parent()?;
    sys::set_name(&options.second_name)?;
    let mut options = options.clone();
    options.common.name.clone_from(&options.second_name);
    Server::new(&options)?.run(None, Some(&channel))?.finish("tcp-receiver")
}

impl<'a> Server<'a> {
    fn new(options: &'a TcpServer) -> anyhow::Result<Self> {
        Ok(Self {
            exchange: Exchange {
                pattern: Pattern::Exchange,
                ..options.exchange.clone()
            },
            options,
            connections: Vec::new(),
            open: 0,
            epoll: sys::Epoll::new().context("making the epoll set")?,
            recorder: Recorder::default(),
            scratch: Scratch::default(),
            marks: 0,
        })
    }

    fn run(mut self, listener: Option<&Socket>, channel: Option<&Socket>) -> anyhow::Result<Self> {
        sys::raise_open_files(120_000).context("raising the limit of open files")?;
        for (socket, token) in [(listener, LISTENER), (channel, CHANNEL)] {
            if let Some(socket) = socket {
                socket.set_nonblocking(true)?;
                self.epoll.add(socket.as_fd(), token)?;
            }
        }
        let mut stop_at = None;
        let mut ready = Vec::with_capacity(256);
        loop {
            if sys::stopping() {
                let end = *stop_at.get_or_insert_with(|| Instant::now() + FAREWELL);
                if self.open == 0 || Instant::now() >= end {
                    return Ok(self);
                }
            }
            self.take_mark()?;
            ready.clear();
            ready.extend(
                self.epoll
                    .wait(Duration::from_millis(50))
                    .context("waiting for connections")?,
            );
            for token in &ready {
                match *token {
                    LISTENER => self.accept(listener)?,
                    CHANNEL => self.take_passed(channel)?,
                    token => self.readable(usize::try_from(token).unwrap_or(usize::MAX)),
                }
            }
        }
    }

    fn take_mark(&mut self) -> io::Result<()> {
        if sys::marks() == self.marks {
            return Ok(());
        }
        self.marks = sys::marks();
        self.recorder.mark();
        let mut out = io::stdout().lock();
        writeln!(out, "marked")?;
        out.flush()
    }

    fn accept(&mut self, listener: Option<&Socket>) -> anyhow::Result<()> {
        let Some(listener) = listener else { return Ok(()) };
        loop {
            match listener.accept4(libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK) {
                Ok((socket, peer)) => {
                    self.add(socket, peer.as_socket().context("a peer without an IP address")?, true)?;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("accepting a connection"),
            }
        }
    }

    fn take_passed(&mut self, channel: Option<&Socket>) -> anyhow::Result<()> {
        let Some(channel) = channel else { return Ok(()) };
        loop {
            match sys::receive_fd(channel) {
                Ok(Some(socket)) => {
                    socket.set_nonblocking(true)?;
                    let peer = tcp_server::peer_of(&socket).context("a passed socket")?;
                    self.add(socket, peer, false)?;
                }
                // The accepting process is done; SIGTERM follows, and level triggering must not spin until then.
                Ok(None) => {
                    std::thread::sleep(Duration::from_millis(1));
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error).context("receiving a passed socket"),
            }
        }
    }

    fn add(&mut self, socket: Socket, peer: SocketAddr, accepted: bool) -> anyhow::Result<()> {
        let row = tcp_server::row_of(&socket, peer, &mut self.recorder)?;
        if accepted {
            self.recorder.counts(row).connections += 1;
        }
        let index = usize::try_from(socket.as_raw_fd()).context("negative descriptor")?;
        self.epoll.add(socket.as_fd(), index as u64)?;
        if self.connections.len() <= index {
            self.connections.resize_with(index + 1, || None);
        }
        let mut connection = Connection {
            socket,
            row,
            client_port: peer.port(),
            round: 0,
            missing: 0,
            down: 0,
            since: Instant::now(),
        };
        self.begin_round(&mut connection);
        if let Some(slot) = self.connections.get_mut(index) {
            *slot = Some(connection);
            self.open += 1;
        }
        Ok(())
    }

    fn begin_round(&self, connection: &mut Connection) {
        let port = if self.exchange.is_fixed() {
            0
        } else {
            connection.client_port
        };
        let payload = self.exchange.payload(self.options.common.seed, port, connection.round);
        connection.missing = payload.up;
        connection.down = payload.down;
    }

    fn readable(&mut self, index: usize) {
        let Some(mut connection) = self.connections.get_mut(index).and_then(Option::take) else {
            return;
        };
        match self.exchange_some(&mut connection) {
            Ok(true) => {
                if let Some(slot) = self.connections.get_mut(index) {
                    *slot = Some(connection);
                }
                return;
            }
            Ok(false) => {}
            Err(error) => {
                self.recorder.counts(connection.row).failures += 1;
                self.recorder.error("exchange", &error);
            }
        }
        self.recorder.counts(connection.row).closed += 1;
        self.open -= 1;
    }

    /// Reads what is there and answers when a round is complete. `false` when the client closed.
    fn exchange_some(&mut self, connection: &mut Connection) -> io::Result<bool> {
        let before = *self.recorder.counts(connection.row);
        let received = match sys::recv(&connection.socket, &mut self.scratch.buffer) {
            Ok(0) => return Ok(false),
            Ok(received) => received,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return Ok(true);
            }
            Err(error) => return Err(error),
        };
        let counts = self.recorder.counts(connection.row);
        counts.bytes_received += received as u64;
        connection.missing = connection.missing.saturating_sub(received);
        if connection.missing == 0 {
            exchange::send_all(&connection.socket, connection.down, &self.scratch, counts)?;
            connection.round += 1;
            self.begin_round(connection);
        }
        if self.options.settle_ms > 0 && connection.since.elapsed() >= Duration::from_millis(self.options.settle_ms) {
            let change = self.recorder.counts(connection.row).without(&before);
            self.recorder.settled(connection.row).add(&change);
        }
        Ok(true)
    }

    fn finish(mut self, role: &str) -> anyhow::Result<()> {
        for connection in self.connections.into_iter().flatten() {
            self.recorder.counts(connection.row).closed += 1;
        }
        role::finish(&self.options.common, role, &mut self.recorder)
    }
}
