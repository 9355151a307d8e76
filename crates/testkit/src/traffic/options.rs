//! Options of the roles. The same structs parse the command line and are built by the drivers.

use std::{net::IpAddr, path::PathBuf};

use clap::{Args, ValueEnum};

use super::rng::Sizes;

/// Options of every role.
#[derive(Args, Clone, Debug)]
pub struct Common {
    /// Process name, at most 15 bytes
    #[arg(long, default_value = "traffic")]
    pub name: String,
    /// File to append the report line to; `-` is standard output
    #[arg(long, default_value = "-")]
    pub report: PathBuf,
    /// Name shared by processes among which a connection may be counted for any
    #[arg(long, default_value = "")]
    pub group: String,
    /// Network namespace to run in: a path, or a process id
    #[arg(long)]
    pub netns: Option<String>,
    /// Seed of all sizes; both ends of a connection need the same
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Time limit of the role in seconds
    #[arg(long, default_value_t = 600)]
    pub max_seconds: u32,
}

/// What happens on one TCP connection. `up` are the client's bytes, `down` the server's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Pattern {
    /// Client sends and half-closes, server reads to the end, answers, closes
    Request,
    /// Client sends and closes at once, server reads to the end
    Oneway,
    /// Server sends and closes, client reads to the end
    Push,
    /// Server sends and half-closes, client reads to the end, sends, closes
    HalfServer,
    /// Client sends, server answers when it has all, client closes when it has all
    Exchange,
    /// Client sends, waits until all is acknowledged, resets
    Rst,
    /// Server reads half and closes with the rest unread, which resets
    Unread,
    /// Non-blocking connect to a port where nobody listens
    Refused,
    /// Client writes `up` bytes (or, when 0, until the duration ends) and closes, server reads to the end
    Bulk,
    /// As bulk, by sendfile
    Sendfile,
}

/// How the server spreads connections over processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// One process, one connection after the other
    Inline,
    /// Worker processes share the listener
    Prefork,
    /// A child process per connection
    Fork,
    /// A child process per connection that executes `traffic serve-fd`
    ForkExec,
    /// Accepted sockets go to another process by SCM_RIGHTS; long-lived connections
    Pass,
    /// One process, all connections at once; long-lived connections
    Event,
}

/// What both ends of a TCP connection have to agree on.
#[derive(Args, Clone, Debug)]
pub struct Exchange {
    /// What happens on one connection
    #[arg(long, value_enum, default_value = "request")]
    pub pattern: Pattern,
    /// Bytes from client to server: N or MIN-MAX
    #[arg(long, default_value = "0-20000")]
    pub up: Sizes,
    /// Bytes from server to client: N or MIN-MAX
    #[arg(long, default_value = "0-20000")]
    pub down: Sizes,
}

/// Options of `tcp-client`.
#[derive(Args, Clone, Debug)]
pub struct TcpClient {
    /// Options of every role
    #[command(flatten)]
    pub common: Common,
    /// Agreed with the server
    #[command(flatten)]
    pub exchange: Exchange,
    /// Server addresses, used in turn; `::ffff:a.b.c.d` makes a v4-mapped connection
    #[arg(long, value_delimiter = ',', required = true)]
    pub dst: Vec<IpAddr>,
    /// Server port
    #[arg(long)]
    pub port: u16,
    /// Own addresses, used in turn; none leaves the choice to the kernel
    #[arg(long, value_delimiter = ',')]
    pub src: Vec<IpAddr>,
    /// Number of connections; 0 means until the duration ends
    #[arg(long, default_value_t = 1)]
    pub connections: u64,
    /// Time limit of the exchange in milliseconds; 0 means none
    #[arg(long, default_value_t = 0)]
    pub duration_ms: u64,
    /// Connections per short-lived child process; 0 means all in this process
    #[arg(long, default_value_t = 0)]
    pub per_process: u64,
}

/// Options of `tcp-hold`: long-lived connections, for servers with mode `event` or `pass`.
#[derive(Args, Clone, Debug)]
pub struct TcpHold {
    /// Options of every role
    #[command(flatten)]
    pub common: Common,
    /// Bytes from client to server per round, at least 1
    #[arg(long, default_value = "1-8000")]
    pub up: Sizes,
    /// Bytes from server to client per round
    #[arg(long, default_value = "0-8000")]
    pub down: Sizes,
    /// Server addresses, used in turn
    #[arg(long, value_delimiter = ',', required = true)]
    pub dst: Vec<IpAddr>,
    /// Server port
    #[arg(long)]
    pub port: u16,
    /// Connections open at once
    #[arg(long, default_value_t = 1)]
    pub connections: u32,
    /// Exchanges on each connection
    #[arg(long, default_value_t = 3)]
    pub rounds: u32,
    /// Pause between rounds in milliseconds
    #[arg(long, default_value_t = 1000)]
    pub pause_ms: u64,
    /// After this round print `paused` and wait for SIGUSR1, which marks the counts; 0 means never
    #[arg(long, default_value_t = 0)]
    pub pause_after: u32,
    /// After the last round print `holding` and keep all open until SIGTERM
    #[arg(long)]
    pub hold: bool,
}

/// Options of `tcp-server`.
#[derive(Args, Clone, Debug)]
pub struct TcpServer {
    /// Options of every role
    #[command(flatten)]
    pub common: Common,
    /// Agreed with the clients
    #[command(flatten)]
    pub exchange: Exchange,
    /// Address to listen on; `::` serves IPv4 too
    #[arg(long)]
    pub listen: IpAddr,
    /// Port to listen on
    #[arg(long)]
    pub port: u16,
    /// How connections are spread over processes
    #[arg(long, value_enum, default_value = "inline")]
    pub mode: Mode,
    /// Processes of mode prefork
    #[arg(long, default_value_t = 4)]
    pub workers: u32,
    /// Name of the second process of modes fork-exec and pass; for fork-exec a file (or link) of that name next to
    /// this executable's `argv[0]` is executed
    #[arg(long, default_value = "traffic")]
    pub second_name: String,
    /// Mode pass: what a connection does this long after it was passed is reported as settled, milliseconds
    #[arg(long, default_value_t = 0)]
    pub settle_ms: u64,
}

/// Options of `serve-fd`.
#[derive(Args, Clone, Debug)]
pub struct ServeFd {
    /// Options of every role
    #[command(flatten)]
    pub common: Common,
    /// Agreed with the client
    #[command(flatten)]
    pub exchange: Exchange,
    /// Number of the inherited, connected socket
    pub fd: i32,
}

/// How datagrams are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SendMode {
    /// `connect` and `send`; a socket per destination
    Connected,
    /// `sendto`, one socket for all destinations
    Unconnected,
    /// `sendmmsg`, one socket for all destinations
    Mmsg,
    /// `send` of several segments at once (UDP_SEGMENT), a socket per destination
    Gso,
}

/// Options of `udp-client`.
#[derive(Args, Clone, Debug)]
pub struct UdpClient {
    /// Options of every role
    #[command(flatten)]
    pub common: Common,
    /// Destination addresses, used in turn; may be multicast or broadcast
    #[arg(long, value_delimiter = ',', required = true)]
    pub dst: Vec<IpAddr>,
    /// Destination port
    #[arg(long)]
    pub port: u16,
    /// Number of destination ports, from `--port` upwards, used in turn
    #[arg(long, default_value_t = 1)]
    pub ports: u16,
    /// Own address
    #[arg(long)]
    pub src: Option<IpAddr>,
    /// Number of datagrams; 0 means until the duration ends
    #[arg(long, default_value_t = 1)]
    pub datagrams: u64,
    /// Time limit of the exchange in milliseconds; 0 means none
    #[arg(long, default_value_t = 0)]
    pub duration_ms: u64,
    /// Payload bytes: N or MIN-MAX
    #[arg(long, default_value = "0-9000")]
    pub size: Sizes,
    /// How datagrams are sent
    #[arg(long, value_enum, default_value = "unconnected")]
    pub mode: SendMode,
    /// Ask for a reply with every Nth datagram and wait for it: flow control; 0 means never
    #[arg(long, default_value_t = 32)]
    pub reply_every: u64,
    /// Datagrams per second, sent in bursts of about a millisecond; 0 means as fast as it goes
    #[arg(long, default_value_t = 0)]
    pub rate: u64,
    /// Sleep after each send, microseconds
    #[arg(long, default_value_t = 0)]
    pub pace_us: u64,
    /// Datagrams per short-lived child process; 0 means all in this process
    #[arg(long, default_value_t = 0)]
    pub per_process: u64,
    /// Interface of multicast destinations
    #[arg(long)]
    pub interface: Option<String>,
}

/// Options of `udp-server`.
#[derive(Args, Clone, Debug)]
pub struct UdpServer {
    /// Options of every role
    #[command(flatten)]
    pub common: Common,
    /// Address to bind; `::` serves IPv4 too
    #[arg(long)]
    pub listen: IpAddr,
    /// Port to bind
    #[arg(long)]
    pub port: u16,
    /// Multicast groups to join
    #[arg(long, value_delimiter = ',')]
    pub join: Vec<IpAddr>,
    /// Interface of the groups
    #[arg(long)]
    pub interface: Option<String>,
    /// Share the port with other processes (SO_REUSEADDR), for multicast and broadcast
    #[arg(long)]
    pub share: bool,
    /// Receive by recvmmsg; replies still go one by one
    #[arg(long)]
    pub mmsg: bool,
    /// Receive buffer, bytes
    #[arg(long, default_value_t = 8 << 20)]
    pub rcvbuf: i32,
    /// Sleep after each datagram, microseconds: a reader too slow for its senders
    #[arg(long, default_value_t = 0)]
    pub slow_us: u64,
    /// Payload bytes of replies: N or MIN-MAX
    #[arg(long, default_value = "0-2000")]
    pub reply: Sizes,
}

/// How an HTTP server reads and writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum HttpBy {
    /// A thread per connection, with system calls
    Threads,
    /// One thread, by io_uring
    IoUring,
}

/// Options of `http-server`.
#[derive(Args, Clone, Debug)]
pub struct HttpServer {
    /// Options of every role
    #[command(flatten)]
    pub common: Common,
    /// Address to listen on; `::` serves IPv4 too
    #[arg(long)]
    pub listen: IpAddr,
    /// Port to listen on
    #[arg(long)]
    pub port: u16,
    /// How it reads and writes
    #[arg(long, value_enum, default_value = "threads")]
    pub by: HttpBy,
}

/// Options of `http-client`.
#[derive(Args, Clone, Debug)]
pub struct HttpClient {
    /// Options of every role
    #[command(flatten)]
    pub common: Common,
    /// Server addresses, used in turn
    #[arg(long, value_delimiter = ',', required = true)]
    pub dst: Vec<IpAddr>,
    /// Server port
    #[arg(long)]
    pub port: u16,
    /// Connections, all kept to the end
    #[arg(long, default_value_t = 1)]
    pub connections: usize,
    /// Requests on each connection
    #[arg(long, default_value_t = 1)]
    pub requests: usize,
    /// What is asked for, in turn: METHOD:/s/STATUS/LENGTH, or with a body METHOD:/s/STATUS/LENGTH:BYTES
    #[arg(long, value_delimiter = ',', required = true)]
    pub request: Vec<String>,
    /// Pause after a request on each connection, milliseconds
    #[arg(long, default_value_t = 0)]
    pub pause_ms: u64,
}

/// Options of `dns-client`.
#[derive(Args, Clone, Debug)]
pub struct DnsClient {
    /// Options of every role
    #[command(flatten)]
    pub common: Common,
    /// Name servers; each gets every question
    #[arg(long, value_delimiter = ',', required = true)]
    pub server: Vec<IpAddr>,
    /// Names to ask for, for A and AAAA each
    #[arg(long, value_delimiter = ',', required = true)]
    pub question: Vec<String>,
    /// How often all is asked
    #[arg(long, default_value_t = 1)]
    pub rounds: u64,
    /// Ask over TCP, one connection per question
    #[arg(long)]
    pub tcp: bool,
    /// How long an answer is waited for, milliseconds
    #[arg(long, default_value_t = 2000)]
    pub patience_ms: u64,
    /// Pause after each question, milliseconds
    #[arg(long, default_value_t = 0)]
    pub pause_ms: u64,
}
