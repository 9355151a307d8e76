//! From the listening socket to connections that speak HTTP/2.
//!
//! Each connection is taken through TLS (if any) and the HTTP/2 preface under a time limit before the server sees it: a
//! silent or foreign peer holds a slot for that long only, and is counted.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use telemetry::LogLimit;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time,
};
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

use super::{IngestMetrics, tls::Certificates};

/// Every HTTP/2 connection starts with these bytes (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Refusals can come at the speed of an attacker; the log has to stay readable.
static REFUSED_LOG: LogLimit = LogLimit::new(Duration::from_secs(1));

/// A connection that has said the preface.
#[derive(Debug)]
pub(super) struct Connection {
    io: Io,
    /// What is left of the preface, which was taken from `io` and is read again by the server.
    preface: &'static [u8],
    peer: SocketAddr,
    metrics: IngestMetrics,
    _slot: OwnedSemaphorePermit,
}

#[derive(Debug)]
enum Io {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// Who is at the other end; an extension of each request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peer {
    pub(super) address: SocketAddr,
}

/// Why a connection never reached the server.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("no TLS session: {0}")]
    Tls(io::Error),
    #[error("connection broke before the HTTP/2 preface: {0}")]
    Broken(io::Error),
    #[error("first bytes are not the HTTP/2 preface")]
    NotHttp2,
    #[error("silent for {0:?}")]
    Silent(Duration),
}

/// What the accept loop needs.
pub(super) struct Doorman {
    pub(super) certificates: Option<Arc<Certificates>>,
    pub(super) slots: Arc<Semaphore>,
    pub(super) timeout: Duration,
    pub(super) metrics: IngestMetrics,
}

// === impl Refusal ===

impl Refusal {
    fn reason(&self) -> &'static str {
        match self {
            Self::Tls(_) => "tls",
            Self::Broken(_) => "broken",
            Self::NotHttp2 => "not_http2",
            Self::Silent(_) => "silent",
        }
    }
}

// === impl Doorman ===

impl Doorman {
    /// Accepts until `stop`, or until nobody takes connections any more.
    pub(super) async fn run(
        self: Arc<Self>,
        listener: TcpListener,
        out: mpsc::Sender<io::Result<Connection>>,
        stop: CancellationToken,
    ) {
        loop {
            let accepted = match stop.run_until_cancelled(listener.accept()).await {
                None => return,
                Some(accepted) => accepted,
            };
            let (tcp, peer) = match accepted {
                Ok(pair) => pair,
                Err(error) => {
                    // Out of descriptors, mostly; accepting again at once would spin.
                    self.metrics.refused("accept");
                    if let Some(suppressed) = REFUSED_LOG.allow() {
                        tracing::warn!(%error, suppressed, "can not accept connections");
                    }
                    time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let Ok(slot) = Arc::clone(&self.slots).try_acquire_owned() else {
                self.metrics.refused("limit");
                if let Some(suppressed) = REFUSED_LOG.allow() {
                    tracing::warn!(%peer, suppressed, "connection refused: as many as allowed are open");
                }
                continue;
            };
            let (doorman, out, stop) = (Arc::clone(&self), out.clone(), stop.clone());
            tokio::spawn(async move {
                let welcomed = time::timeout(doorman.timeout, doorman.welcome(tcp, peer, slot));
                match stop.run_until_cancelled(welcomed).await {
                    None => {}
                    Some(Ok(Ok(connection))) => drop(out.send(Ok(connection)).await),
                    Some(Ok(Err(refusal))) => doorman.refuse(peer, &refusal),
                    Some(Err(_)) => doorman.refuse(peer, &Refusal::Silent(doorman.timeout)),
                }
            });
        }
    }

    fn refuse(&self, peer: SocketAddr, refusal: &Refusal) {
        self.metrics.refused(refusal.reason());
        if let Some(suppressed) = REFUSED_LOG.allow() {
            tracing::warn!(%peer, %refusal, suppressed, "connection refused");
        }
    }

    async fn welcome(
        &self,
        tcp: TcpStream,
        peer: SocketAddr,
        slot: OwnedSemaphorePermit,
    ) -> Result<Connection, Refusal> {
        // Acknowledgements are small and must not wait for more.
        tcp.set_nodelay(true).map_err(Refusal::Broken)?;
        let mut io = match &self.certificates {
            None => Io::Plain(tcp),
            Some(certificates) => Io::Tls(Box::new(
                certificates.acceptor().accept(tcp).await.map_err(Refusal::Tls)?,
            )),
        };
        let mut first = [0; PREFACE.len()];
        io.read_exact(&mut first).await.map_err(Refusal::Broken)?;
        if first != PREFACE {
            return Err(Refusal::NotHttp2);
        }
        self.metrics.connections.inc();
        Ok(Connection {
            io,
            preface: PREFACE,
            peer,
            metrics: self.metrics.clone(),
            _slot: slot,
        })
    }
}

// === impl Io ===

impl AsyncRead for Io {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(io) => Pin::new(io).poll_read(cx, buf),
            Self::Tls(io) => Pin::new(io).poll_read(cx, buf),
        }
    }
}

// === impl Connection ===

impl Drop for Connection {
    fn drop(&mut self) {
        self.metrics.connections.dec();
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        Peer { address: self.peer }
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.preface.is_empty() {
            return Pin::new(&mut this.io).poll_read(cx, buf);
        }
        let (now, later) = this.preface.split_at(this.preface.len().min(buf.remaining()));
        buf.put_slice(now);
        this.preface = later;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().io {
            Io::Plain(io) => Pin::new(io).poll_write(cx, buf),
            Io::Tls(io) => Pin::new(io).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().io {
            Io::Plain(io) => Pin::new(io).poll_flush(cx),
            Io::Tls(io) => Pin::new(io).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().io {
            Io::Plain(io) => Pin::new(io).poll_shutdown(cx),
            Io::Tls(io) => Pin::new(io).poll_shutdown(cx),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().io {
            Io::Plain(io) => Pin::new(io).poll_write_vectored(cx, bufs),
            Io::Tls(io) => Pin::new(io).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.io {
            Io::Plain(io) => io.is_write_vectored(),
            Io::Tls(io) => io.is_write_vectored(),
        }
    }
}
