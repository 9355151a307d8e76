//! Command line of the binary `traffic`.

use anyhow::Context as _;
use clap::{Parser, Subcommand, ValueEnum};

use super::{
    dns, http,
    netns::{Side, TestNet},
    options::{DnsClient, HttpClient, HttpServer, ServeFd, TcpClient, TcpHold, TcpServer, UdpClient, UdpServer},
    tcp_client, tcp_server, udp_client, udp_server,
};

/// Clients and servers that count what they do. Each process appends one JSON line to its report when it ends.
#[derive(Parser, Debug)]
#[command(name = "traffic", version)]
pub struct Cli {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Opens many short TCP connections
    TcpClient(TcpClient),
    /// Keeps TCP connections open over several rounds of traffic
    TcpHold(TcpHold),
    /// Serves TCP connections until SIGTERM
    TcpServer(TcpServer),
    /// Serves one inherited TCP connection
    ServeFd(ServeFd),
    /// Sends datagrams, and counts replies
    UdpClient(UdpClient),
    /// Receives datagrams, and replies when asked, until SIGTERM
    UdpServer(UdpServer),
    /// Serves HTTP/1.1 until SIGTERM
    HttpServer(HttpServer),
    /// Makes HTTP/1.1 requests on connections that it keeps
    HttpClient(HttpClient),
    /// Asks name servers
    DnsClient(DnsClient),
    /// Makes or removes the test network: two network namespaces joined by a veth pair
    Net {
        /// What to do with it
        action: NetAction,
        /// Name of the network
        #[arg(long, default_value = "traffic")]
        name: String,
        /// MTU of the veth pair
        #[arg(long, default_value_t = 1500)]
        mtu: u32,
    },
}

/// What to do with the test network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum NetAction {
    /// Make it
    Up,
    /// Remove it
    Down,
}

/// Runs one command.
///
/// # Errors
/// Setup failed; failures of single connections and datagrams are in the report.
pub fn run(cli: &Cli) -> anyhow::Result<()> {
    match &cli.command {
        Command::TcpClient(options) => tcp_client::run(options),
        Command::TcpHold(options) => tcp_client::run_hold(options),
        Command::TcpServer(options) => tcp_server::run(options),
        Command::ServeFd(options) => tcp_server::run_fd(options),
        Command::UdpClient(options) => udp_client::run(options),
        Command::UdpServer(options) => udp_server::run(options),
        Command::HttpServer(options) => http::run_server(options),
        Command::HttpClient(options) => http::run_client(options),
        Command::DnsClient(options) => dns::run(options),
        Command::Net {
            action: NetAction::Down,
            name,
            ..
        } => {
            TestNet::down(name);
            Ok(())
        }
        Command::Net {
            action: NetAction::Up,
            name,
            mtu,
        } => {
            let net = TestNet::up(name, *mtu).with_context(|| format!("making test network `{name}`"))?;
            println!("a {} b {}", net.path(Side::A).display(), net.path(Side::B).display());
            net.keep();
            Ok(())
        }
    }
}
