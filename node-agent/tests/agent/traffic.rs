//! Loopback traffic made by the test, with its own counts: what the agent has to report for this process.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
};

use testkit::{
    exactness::flow::Flow,
    traffic::report::{Counts, Direction, Transport},
};

/// Below the first ephemeral port, so that rows show it; not what the tests of `testkit` use.
const PORTS: std::ops::Range<u16> = 8100..8999;

/// Both ends of the traffic, as the agent should report them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ends {
    /// The client's, or first sender's.
    pub outgoing: Counts,
    /// The server's.
    pub incoming: Counts,
}

/// One transport's traffic on one service port.
pub struct Service {
    pub transport: Transport,
    pub port: u16,
    pub truth: Ends,
}

pub fn tcp_service() -> (TcpListener, Service) {
    let listener = PORTS
        .filter_map(|port| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).ok())
        .next()
        .expect("a free port");
    let port = listener.local_addr().unwrap().port();
    (listener, Service::new(Transport::Tcp, port))
}

pub fn udp_service() -> (UdpSocket, Service) {
    let socket = PORTS
        .filter_map(|port| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).ok())
        .next()
        .expect("a free port");
    let port = socket.local_addr().unwrap().port();
    (socket, Service::new(Transport::Udp, port))
}

pub fn loopback(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// The `n`th address of 127.0.0.0/8 beyond 127.1.0.0.
pub fn far_loopback(n: u32, port: u16) -> SocketAddr {
    let base = u32::from(Ipv4Addr::new(127, 1, 0, 0));
    SocketAddrV4::new(Ipv4Addr::from(base + n), port).into()
}

// === impl Service ===

impl Service {
    fn new(transport: Transport, port: u16) -> Self {
        Self {
            transport,
            port,
            truth: Ends::default(),
        }
    }

    /// A connection to `to`, open on both ends.
    pub fn connect(&mut self, listener: &TcpListener, to: SocketAddr) -> (TcpStream, TcpStream) {
        let client = TcpStream::connect(to).unwrap();
        let (server, _) = listener.accept().unwrap();
        self.truth.outgoing.connections += 1;
        self.truth.incoming.connections += 1;
        (client, server)
    }

    /// `there` bytes from client to server, `back` bytes back.
    pub fn exchange(&mut self, (client, server): &mut (TcpStream, TcpStream), there: usize, back: usize) {
        pass(client, server, there);
        pass(server, client, back);
        let (there, back) = (there as u64, back as u64);
        self.truth.outgoing.bytes_sent += there;
        self.truth.outgoing.bytes_received += back;
        self.truth.incoming.bytes_sent += back;
        self.truth.incoming.bytes_received += there;
    }

    /// Ends a connection, the client first.
    pub fn close(&mut self, (client, mut server): (TcpStream, TcpStream)) {
        drop(client);
        assert_eq!(
            server.read(&mut [0]).unwrap(),
            0,
            "the client sends nothing after its end"
        );
        self.truth.outgoing.closed += 1;
        self.truth.incoming.closed += 1;
    }

    /// `n` connections, one after another, with sizes that differ.
    pub fn connections(&mut self, listener: &TcpListener, n: usize) {
        for i in 0..n {
            let mut pair = self.connect(listener, loopback(self.port));
            self.exchange(&mut pair, 100 + i * 37, 1 + i * 11);
            self.close(pair);
        }
    }

    /// `n` datagrams from one new socket to the service, each answered.
    pub fn datagrams(&mut self, server: &UdpSocket, n: usize) {
        let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        self.datagrams_from(&client, server, n);
    }

    /// As [`Self::datagrams`], from a socket that exists.
    pub fn datagrams_from(&mut self, client: &UdpSocket, server: &UdpSocket, n: usize) {
        let (question, answer) = ([7; 1400], [9; 700]);
        let mut buffer = [0; 2048];
        for i in 0..n {
            let (there, back) = (1 + i % question.len(), 1 + i % answer.len());
            client.send_to(&question[..there], loopback(self.port)).unwrap();
            let (read, from) = server.recv_from(&mut buffer).unwrap();
            assert_eq!(read, there);
            server.send_to(&answer[..back], from).unwrap();
            assert_eq!(client.recv(&mut buffer).unwrap(), back);
            self.truth.outgoing.add(&datagram(there, back));
            self.truth.incoming.add(&datagram(back, there));
        }
    }

    /// `n` datagrams from one new socket to the service, not answered.
    pub fn one_way(&mut self, server: &UdpSocket, n: usize) {
        let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        for i in 0..n {
            let to = far_loopback(u32::try_from(i).unwrap(), self.port);
            client.send_to(&[1; 100], to).unwrap();
            assert_eq!(server.recv(&mut [0; 256]).unwrap(), 100);
            self.truth.outgoing.add(&Counts {
                datagrams_sent: 1,
                bytes_sent: 100,
                ..Counts::default()
            });
            self.truth.incoming.add(&Counts {
                datagrams_received: 1,
                bytes_received: 100,
                ..Counts::default()
            });
        }
    }

    /// The sum over both ends, whichever direction the rows have.
    pub fn reported_in_all(&self, rows: &[Flow]) -> Counts {
        let port = self.port.to_string();
        let mut sum = Counts::default();
        rows.iter()
            .filter(|row| row.pid == std::process::id() && row.transport == self.transport)
            .filter(|row| row.src_port == port || row.dst_port == port)
            .for_each(|row| sum.add(&row.counts));
        sum
    }

    /// What the rows say of this process on this port.
    pub fn reported(&self, rows: &[Flow]) -> Ends {
        let port = self.port.to_string();
        let sum = |direction: Direction| {
            let mut sum = Counts::default();
            rows.iter()
                .filter(|row| row.pid == std::process::id() && row.transport == self.transport)
                .filter(|row| row.direction == direction)
                .filter(|row| match direction {
                    Direction::Outgoing => row.dst_port == port,
                    Direction::Incoming => row.src_port == port,
                })
                .for_each(|row| sum.add(&row.counts));
            sum
        };
        Ends {
            outgoing: sum(Direction::Outgoing),
            incoming: sum(Direction::Incoming),
        }
    }
}

// === impl Ends ===

impl Ends {
    /// The sum over both ends.
    pub fn sum(&self) -> Counts {
        let mut sum = self.outgoing;
        sum.add(&self.incoming);
        sum
    }

    /// What was counted since `before`.
    pub fn since(&self, before: &Self) -> Self {
        Self {
            outgoing: self.outgoing.without(&before.outgoing),
            incoming: self.incoming.without(&before.incoming),
        }
    }
}

fn datagram(sent: usize, received: usize) -> Counts {
    Counts {
        datagrams_sent: 1,
        datagrams_received: 1,
        bytes_sent: sent as u64,
        bytes_received: received as u64,
        ..Counts::default()
    }
}

/// Sends and reads `bytes` bytes, less at a time than any socket buffer takes.
fn pass(from: &mut TcpStream, to: &mut TcpStream, bytes: usize) {
    let mut buffer = [5; 4096];
    let mut left = bytes;
    while left > 0 {
        let part = left.min(buffer.len());
        from.write_all(&buffer[..part]).unwrap();
        to.read_exact(&mut buffer[..part]).unwrap();
        left -= part;
    }
}
