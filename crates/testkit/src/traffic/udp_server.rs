//! Role `udp-server`: counts what arrives, and replies to who asks.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use socket2::{Domain, SockAddr, Socket, Type};

use super::{
    mmsg::Mmsg,
    options::UdpServer,
    report::{Direction, Recorder, RowKey, Transport},
    rng::Rng,
    role, sys,
    udp_client::{ASK, LARGEST, QUIET},
};

/// Runs the role `udp-server` until SIGTERM, and then until its queue is empty.
///
/// # Errors
/// Setup failed, or receiving failed for good.
pub fn run(options: &UdpServer) -> anyhow::Result<()> {
    role::start(&options.common)?;
    let socket =
        server_socket(options).with_context(|| format!("binding UDP {} port {}", options.listen, options.port))?;
    let mut server = Server {
        options,
        local: Some(options.listen).filter(|ip| !ip.is_unspecified() && !ip.is_multicast()),
        rng: Rng::new(options.common.seed.wrapping_add(1)),
        reply: vec![0; options.reply.max as usize].into_boxed_slice(),
        recorder: Recorder::default(),
        socket,
    };
    role::ready()?;
    if options.mmsg {
        server.receive_vectors()
    } else {
        server.receive_singly()
    }
    .context("receiving")?;
    role::finish(&options.common, "udp-server", &mut server.recorder)
}

fn server_socket(options: &UdpServer) -> anyhow::Result<Socket> {
    let address = SocketAddr::new(options.listen, options.port);
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, None)?;
    socket.set_reuse_address(options.share)?;
    if options.listen.is_ipv6() {
        socket.set_only_v6(!options.listen.is_unspecified())?;
    }
    sys::set_receive_buffer(&socket, options.rcvbuf)?;
    // Wakes the loop so that it sees a stop that came between its check and its call.
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    socket.bind(&SockAddr::from(address))?;
    let index = match &options.interface {
        Some(name) => sys::interface_index(name).with_context(|| format!("finding interface `{name}`"))?,
        None => 0,
    };
    for group in &options.join {
        match group {
            IpAddr::V4(group) => socket.join_multicast_v4_n(group, &socket2::InterfaceIndexOrAddress::Index(index)),
            IpAddr::V6(group) => socket.join_multicast_v6(group, index),
        }
        .with_context(|| format!("joining group {group}"))?;
    }
    Ok(socket)
}

struct Server<'a> {
    options: &'a UdpServer,
    socket: Socket,
    local: Option<IpAddr>,
    rng: Rng,
    reply: Box<[u8]>,
    recorder: Recorder,
}

impl Server<'_> {
    fn receive_singly(&mut self) -> io::Result<()> {
        let mut buffer = vec![0_u8; LARGEST].into_boxed_slice();
        let mut last = Instant::now();
        loop {
            match sys::recv_from(&self.socket, &mut buffer) {
                Ok((length, from)) => {
                    let first = if length == 0 {
                        0
                    } else {
                        buffer.first().copied().unwrap_or(0)
                    };
                    self.received(length, first, &from);
                    if self.options.slow_us > 0 {
                        std::thread::sleep(Duration::from_micros(self.options.slow_us));
                    }
                    if sys::stopping() {
                        last = Instant::now();
                    }
                }
                Err(error) => {
                    if self.quiet(&error, last)? {
                        return Ok(());
                    }
                }
            }
        }
    }

    fn receive_vectors(&mut self) -> io::Result<()> {
        let mut messages = Mmsg::new(16 << 10);
        let mut last = Instant::now();
        loop {
            match messages.receive(&self.socket) {
                Ok(count) => {
                    for index in 0..count {
                        if let Some((length, first, from)) = messages.received(index) {
                            self.received(length, first, &from);
                        }
                    }
                    if sys::stopping() {
                        last = Instant::now();
                    }
                }
                Err(error) => {
                    if self.quiet(&error, last)? {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// True when the role stops and nothing came for a while; an error when receiving failed for good.
    fn quiet(&mut self, error: &io::Error, last: Instant) -> io::Result<bool> {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => {
                Ok(sys::timed_out() || (sys::stopping() && last.elapsed() >= QUIET))
            }
            // An ICMP answer to one of our replies: the short-lived sender is gone.
            io::ErrorKind::ConnectionRefused => Ok(false),
            kind => Err(kind.into()),
        }
    }

    fn received(&mut self, length: usize, first: u8, from: &SockAddr) {
        let Some(peer) = from.as_socket() else { return };
        let row = self.recorder.row(RowKey {
            transport: Transport::Udp,
            direction: Direction::Incoming,
            local: self.local,
            remote: peer.ip(),
            service_port: self.options.port,
        });
        let counts = self.recorder.counts(row);
        counts.datagrams_received += 1;
        counts.bytes_received += length as u64;
        if first != ASK {
            return;
        }
        let size = self.options.reply.pick(self.rng.next_u64());
        match self.socket.send_to(self.reply.get(..size).unwrap_or_default(), from) {
            Ok(sent) => {
                counts.datagrams_sent += 1;
                counts.bytes_sent += sent as u64;
            }
            Err(error) => {
                counts.failures += 1;
                self.recorder.error("reply", &error);
            }
        }
    }
}
