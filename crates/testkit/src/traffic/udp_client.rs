//! Role `udp-client`.
//!
//! Flow control is in band: the first byte of a datagram asks for a reply (`ASK`), or not. A client that asks with
//! every Nth datagram and waits for the reply never runs more than N datagrams ahead of its server.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use socket2::{Domain, SockAddr, Socket, Type};

use super::{
    mmsg::{MMSG, Mmsg},
    options::{SendMode, UdpClient},
    report::{Direction, Recorder, RowId, RowKey, Transport},
    rng::Rng,
    role, sys,
};

/// First byte of a datagram that asks for a reply.
pub const ASK: u8 = 1;
/// Longest wait for one reply; a lost datagram costs this once.
const REPLY_PATIENCE: Duration = Duration::from_secs(1);
/// Quiet time after which no more replies or requests are expected.
pub const QUIET: Duration = Duration::from_millis(300);
/// Largest datagram received.
pub const LARGEST: usize = 65_535;
/// Segments of one send in mode gso.
const SEGMENTS: usize = 16;

struct Target {
    address: SockAddr,
    ip: IpAddr,
    port: u16,
    /// Own socket of this destination, in the connected modes.
    socket: Option<Socket>,
    row: RowId,
}

struct Client<'a> {
    options: &'a UdpClient,
    /// Shared by all destinations, in the unconnected modes.
    socket: Option<Socket>,
    targets: Vec<Target>,
    rng: Rng,
    buffer: Box<[u8]>,
    messages: Option<Mmsg>,
    recorder: Recorder,
    /// Datagrams since the last one that asked for a reply.
    since_asked: u64,
    /// More replies may come than were waited for: one was late, or a group answers.
    expects_more: bool,
    gso: bool,
}

/// Runs the role `udp-client`.
///
/// # Errors
/// Setup failed. Failing sends are counted, not returned.
pub fn run(options: &UdpClient) -> anyhow::Result<()> {
    role::start(&options.common)?;
    role::in_portions(options.datagrams, options.per_process, |portion| {
        // Each short-lived process sends other sizes.
        let salt = if options.per_process > 0 {
            u64::from(std::process::id())
        } else {
            0
        };
        let mut client = Client::new(options, options.common.seed ^ salt)?;
        client.send_many(portion)?;
        client.drain()?;
        role::finish(&options.common, "udp-client", &mut client.recorder)
    })
}

fn socket_for(options: &UdpClient, ip: IpAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(SocketAddr::new(ip, 0)), Type::DGRAM, None)?;
    sys::set_receive_buffer(&socket, 8 << 20)?;
    match ip {
        IpAddr::V4(_) => {
            socket.set_broadcast(true)?;
            socket.set_multicast_loop_v4(true)?;
            socket.set_multicast_ttl_v4(2)?;
            if let Some(IpAddr::V4(source)) = options.src {
                socket.set_multicast_if_v4(&source)?;
            }
        }
        IpAddr::V6(_) => {
            socket.set_multicast_loop_v6(true)?;
            if let Some(interface) = &options.interface {
                socket.set_multicast_if_v6(sys::interface_index(interface)?)?;
            }
        }
    }
    if let Some(source) = options.src {
        let source = match (ip, source) {
            (IpAddr::V6(_), IpAddr::V4(v4)) => IpAddr::V6(v4.to_ipv6_mapped()),
            (_, source) => source,
        };
        socket.bind(&SockAddr::from(SocketAddr::new(source, 0)))?;
    }
    Ok(socket)
}

impl<'a> Client<'a> {
    fn new(options: &'a UdpClient, seed: u64) -> anyhow::Result<Self> {
        let mut recorder = Recorder::default();
        let connected = matches!(options.mode, SendMode::Connected | SendMode::Gso);
        let mut gso = options.mode == SendMode::Gso;
        let first = options
            .dst
            .first()
            .copied()
            .unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        let socket = if connected {
            None
        } else {
            Some(socket_for(options, first).context("opening the UDP socket")?)
        };
        let mut targets = Vec::new();
        for port in options.port..options.port.saturating_add(options.ports) {
            for ip in &options.dst {
                let address = SockAddr::from(SocketAddr::new(*ip, port));
                let mut local = options.src;
                let own = if connected {
                    let own = socket_for(options, *ip).context("opening a UDP socket")?;
                    own.connect(&address)
                        .with_context(|| format!("connecting UDP to {ip} port {port}"))?;
                    local = own.local_addr()?.as_socket().map(|local| local.ip());
                    if gso && !can_segment(&own, options.size.max)? {
                        recorder.unsupported("gso");
                        gso = false;
                    }
                    Some(own)
                } else {
                    None
                };
                let row = recorder.row(key(*ip, port, local));
                targets.push(Target {
                    address,
                    ip: *ip,
                    port,
                    socket: own,
                    row,
                });
            }
        }
        let largest = options.size.max as usize;
        Ok(Self {
            options,
            socket,
            targets,
            rng: Rng::new(seed),
            buffer: vec![0; LARGEST.max(largest)].into_boxed_slice(),
            messages: (options.mode == SendMode::Mmsg).then(|| Mmsg::new(largest)),
            recorder,
            since_asked: 0,
            expects_more: options.dst.iter().any(|ip| is_group(*ip)),
            gso,
        })
    }

    fn send_many(&mut self, datagrams: u64) -> anyhow::Result<()> {
        let deadline =
            (self.options.duration_ms > 0).then(|| Instant::now() + Duration::from_millis(self.options.duration_ms));
        let mut done = 0_u64;
        let mut turn = 0_usize;
        let mut until_clock = 0_u64;
        self.recorder.restart_clock();
        let started = Instant::now();
        while datagrams == 0 || done < datagrams {
            if sys::stopping() {
                break;
            }
            if let Some(deadline) = deadline
                && done >= until_clock
            {
                if Instant::now() >= deadline {
                    break;
                }
                until_clock = done + 64;
            }
            let left = if datagrams == 0 { u64::MAX } else { datagrams - done };
            done += match self.options.mode {
                SendMode::Mmsg => self.send_vector(left, &mut turn)?,
                SendMode::Gso if self.gso => self.send_segments(left, turn)?,
                _ => self.send_one(turn)?,
            };
            turn += 1;
            if self.options.rate > 0 {
                wait_for_turn(started, done, self.options.rate);
            }
            if self.options.pace_us > 0 {
                std::thread::sleep(Duration::from_micros(self.options.pace_us));
            }
        }
        Ok(())
    }

    /// Whether the datagram after `count` more has to ask for a reply.
    fn asks(&mut self, count: u64) -> bool {
        if self.options.reply_every == 0 {
            return false;
        }
        self.since_asked += count;
        if self.since_asked < self.options.reply_every {
            return false;
        }
        self.since_asked = 0;
        true
    }

    fn send_one(&mut self, turn: usize) -> anyhow::Result<u64> {
        let ask = self.asks(1);
        let size = self.options.size.pick(self.rng.next_u64()).max(usize::from(ask));
        if let Some(first) = self.buffer.first_mut() {
            *first = if ask { ASK } else { 0 };
        }
        let count = self.targets.len();
        let Some(target) = self.targets.get(turn % count) else {
            return Ok(1);
        };
        let payload = self.buffer.get(..size).unwrap_or_default();
        let row = target.row;
        let result = match (&target.socket, &self.socket) {
            (Some(own), _) => own.send(payload),
            (None, Some(shared)) => shared.send_to(payload, &target.address),
            (None, None) => Err(io::ErrorKind::NotConnected.into()),
        };
        self.count_sent(row, 1, result);
        if ask {
            self.await_reply(turn)?;
        }
        Ok(1)
    }

    fn count_sent(&mut self, row: RowId, datagrams: u64, result: io::Result<usize>) {
        let counts = self.recorder.counts(row);
        match result {
            Ok(sent) => {
                counts.datagrams_sent += datagrams;
                counts.bytes_sent += sent as u64;
            }
            Err(error) => {
                counts.failures += 1;
                self.recorder.error("send", &error);
            }
        }
    }

    fn send_vector(&mut self, left: u64, turn: &mut usize) -> anyhow::Result<u64> {
        let (Some(messages), Some(socket)) = (self.messages.as_mut(), &self.socket) else {
            return Ok(1);
        };
        let batch = usize::try_from(left).unwrap_or(usize::MAX).min(MMSG);
        let every = self.options.reply_every;
        let mut sizes = [0_usize; MMSG];
        let mut rows = [None; MMSG];
        let ask_last = every > 0 && self.since_asked + batch as u64 >= every;
        self.since_asked = if ask_last { 0 } else { self.since_asked + batch as u64 };
        for (index, (size, row)) in sizes.iter_mut().zip(rows.iter_mut()).take(batch).enumerate() {
            let ask = ask_last && index + 1 == batch;
            let count = self.targets.len();
            let Some(target) = self.targets.get(*turn % count) else {
                break;
            };
            *turn += 1;
            *size = self.options.size.pick(self.rng.next_u64()).max(usize::from(ask));
            *row = Some(target.row);
            messages.set(index, Some(&target.address), *size, if ask { ASK } else { 0 });
        }
        *turn -= 1;
        let result = messages.send(socket, batch);
        let sent = *result.as_ref().unwrap_or(&0);
        for (size, row) in sizes.iter().zip(rows).take(sent) {
            if let Some(row) = row {
                self.count_sent(row, 1, Ok(*size));
            }
        }
        if let Err(error) = result {
            self.recorder.error("sendmmsg", &error);
            return Ok(1);
        }
        if ask_last && sent == batch {
            self.await_reply(*turn)?;
        }
        Ok(sent as u64)
    }

    fn send_segments(&mut self, left: u64, turn: usize) -> anyhow::Result<u64> {
        let segment = self.options.size.max as usize;
        let wanted = usize::try_from(left)
            .unwrap_or(usize::MAX)
            .min(SEGMENTS)
            .min(LARGEST / segment.max(1))
            .max(1);
        // The last segment may be shorter: that is part of what is to be counted.
        let last = self.options.size.pick(self.rng.next_u64()).max(1);
        let total = (wanted - 1) * segment + last;
        let ask = self.asks(wanted as u64);
        if let Some(first) = self.buffer.first_mut() {
            *first = if ask { ASK } else { 0 };
        }
        let count = self.targets.len();
        let Some(target) = self.targets.get(turn % count) else {
            return Ok(1);
        };
        let row = target.row;
        let payload = self.buffer.get(..total).unwrap_or_default();
        let result = target
            .socket
            .as_ref()
            .map_or_else(|| Err(io::ErrorKind::NotConnected.into()), |own| own.send(payload));
        let failed = result.is_err();
        self.count_sent(row, wanted as u64, result);
        if failed {
            // A device without the needed offloads refuses; the plain way still counts.
            self.recorder.unsupported("gso");
            self.gso = false;
            for target in &self.targets {
                if let Some(own) = &target.socket {
                    sys::set_int_option(own, libc::SOL_UDP, libc::UDP_SEGMENT, 0)?;
                }
            }
        } else if ask {
            self.await_reply(turn)?;
        }
        Ok(wanted as u64)
    }

    /// Waits for one reply on the socket of `turn`, and takes whatever else is there.
    fn await_reply(&mut self, turn: usize) -> anyhow::Result<()> {
        let count = self.targets.len();
        let index = turn % count;
        let deadline = Instant::now() + REPLY_PATIENCE;
        loop {
            let Some(target) = self.targets.get(index) else {
                return Ok(());
            };
            let Some(socket) = target.socket.as_ref().or(self.socket.as_ref()) else {
                return Ok(());
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || sys::stopping() {
                self.expects_more = true;
                return Ok(());
            }
            if sys::poll(sys::fd_of(socket), libc::POLLIN, left)? == 0 {
                continue;
            }
            match receive(socket, target, &mut self.buffer, &mut self.recorder, self.options) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    self.recorder.error("recv", &error);
                    return Ok(());
                }
            }
        }
    }

    /// Takes the replies that were not waited for.
    fn drain(&mut self) -> anyhow::Result<()> {
        if !self.expects_more || self.options.reply_every == 0 {
            return Ok(());
        }
        for index in 0..if self.socket.is_some() { 1 } else { self.targets.len() } {
            // Replies of all destinations arrive in parallel, so only the first socket is worth the full wait.
            let patience = if index == 0 { QUIET } else { Duration::from_millis(1) };
            while let Some(target) = self.targets.get(index) {
                let Some(socket) = target.socket.as_ref().or(self.socket.as_ref()) else {
                    break;
                };
                if sys::poll(sys::fd_of(socket), libc::POLLIN, patience)? == 0 {
                    break;
                }
                if let Err(error) = receive(socket, target, &mut self.buffer, &mut self.recorder, self.options) {
                    self.recorder.error("recv", &error);
                    break;
                }
            }
        }
        Ok(())
    }
}

/// Sleeps while `done` datagrams since `started` are more than a millisecond ahead of `rate` per second.
fn wait_for_turn(started: Instant, done: u64, rate: u64) {
    let due = Duration::from_nanos(done.saturating_mul(1_000_000_000) / rate);
    let ahead = due.saturating_sub(started.elapsed());
    if ahead > Duration::from_millis(1) {
        std::thread::sleep(ahead);
    }
}

/// True for addresses that several receivers may answer.
fn is_group(ip: IpAddr) -> bool {
    ip.is_multicast() || matches!(ip, IpAddr::V4(v4) if v4.is_broadcast() || v4 == super::netns::BROADCAST)
}

fn key(remote: IpAddr, port: u16, local: Option<IpAddr>) -> RowKey {
    RowKey {
        transport: Transport::Udp,
        direction: Direction::Outgoing,
        local,
        remote,
        service_port: port,
    }
}

/// Asks for UDP_SEGMENT; `false` when this kernel has none (before 4.18).
fn can_segment(socket: &Socket, segment: u32) -> io::Result<bool> {
    match sys::set_int_option(
        socket,
        libc::SOL_UDP,
        libc::UDP_SEGMENT,
        i32::try_from(segment).unwrap_or(0),
    ) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOPROTOOPT | libc::EINVAL)) => Ok(false),
        Err(error) => Err(error),
    }
}

fn receive(
    socket: &Socket,
    target: &Target,
    buffer: &mut [u8],
    recorder: &mut Recorder,
    options: &UdpClient,
) -> io::Result<()> {
    let (length, row) = if target.socket.is_some() {
        (sys::recv(socket, buffer)?, target.row)
    } else {
        let (length, from) = sys::recv_from(socket, buffer)?;
        let from = from.as_socket().unwrap_or(SocketAddr::new(target.ip, target.port));
        (length, recorder.row(key(from.ip(), from.port(), options.src)))
    };
    let counts = recorder.counts(row);
    counts.datagrams_received += 1;
    counts.bytes_received += length as u64;
    Ok(())
}
