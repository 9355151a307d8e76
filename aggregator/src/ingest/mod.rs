//! The gRPC side: streams of agents in, batches to [`Accept`](crate::pipeline::Accept).
//!
//! ```text
//! listener ▶ listen (TLS, preface, limits) ▶ tonic ▶ service (one task per stream) ▶ Accept::accept ▶ Ack / Busy
//! ```
//! A stream reads the next batch only while fewer than `max_unacked_batches` wait to be stored, so a slow disk pushes
//! back through HTTP/2 flow control to the agent's window. Nothing is acknowledged before `accept` has returned.
//!
//! Beside the streams, `GetOverview` tells which nodes there are, what they can see, and how the sinks do.
//!
//! Ledger stage `ingest.stream`, in records. Entry: [`serve`], or [`Ingest::bind`] where the address is wanted.

mod config;
mod listen;
mod metrics;
mod nodes;
mod overview;
mod service;
mod stream;
mod tls;

use std::{fmt, net::SocketAddr, sync::Arc};

use proto::v1::{collector_server::CollectorServer, overview_service_server::OverviewServiceServer};
use telemetry::Ledger;
use tokio::{
    net::TcpListener,
    sync::{Semaphore, mpsc},
    time,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic_health::ServingStatus;

pub use config::{IngestConfig, IngestError, ServerTls};
pub use metrics::IngestMetrics;
pub use overview::SinkReport;

use crate::pipeline::Accept;
use listen::Doorman;
use nodes::{MAX_NODES, Nodes};
use overview::Overviewer;
use service::CollectorService;
use tls::Certificates;

/// HTTP/2 flow-control windows: one largest batch per stream, a few per connection.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;
/// An agent uses one stream and a health check, the operator one overview at a time; more is not asked for.
const STREAMS_PER_CONNECTION: u32 = 16;

/// A bound listener, ready to serve.
pub struct Ingest {
    config: IngestConfig,
    listener: TcpListener,
    address: SocketAddr,
    certificates: Option<Arc<Certificates>>,
    metrics: IngestMetrics,
    sinks: SinkReport,
}

/// Binds and serves until `stop` is cancelled and the streams are drained.
///
/// # Errors
/// [`IngestError`] when a setting, the address or a certificate can not be used, or the server fails.
pub async fn serve(
    config: IngestConfig,
    accept: Arc<dyn Accept>,
    ledger: Ledger,
    stop: CancellationToken,
) -> Result<(), IngestError> {
    Ingest::bind(config).await?.serve(accept, ledger, stop).await
}

// === impl Ingest ===

impl fmt::Debug for Ingest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ingest")
            .field("config", &self.config)
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl Ingest {
    /// Checks the settings, reads the certificates, binds the address.
    ///
    /// # Errors
    /// [`IngestError`] says which of these failed and why.
    pub async fn bind(config: IngestConfig) -> Result<Self, IngestError> {
        config.validate()?;
        let listen = config.listen;
        let listener = TcpListener::bind(listen)
            .await
            .map_err(|source| IngestError::Bind { listen, source })?;
        Self::with_listener(config, listener)
    }

    /// Like [`bind`](Self::bind) with a listener that is bound already; `config.listen` is replaced by its address.
    ///
    /// # Errors
    /// As [`bind`](Self::bind).
    pub fn with_listener(mut config: IngestConfig, listener: TcpListener) -> Result<Self, IngestError> {
        let address = listener.local_addr().map_err(|source| IngestError::Bind {
            listen: config.listen,
            source,
        })?;
        config.listen = address;
        config.validate()?;
        let certificates = config.tls.clone().map(Certificates::load).transpose()?;
        Ok(Self {
            config,
            listener,
            address,
            certificates,
            metrics: IngestMetrics::default(),
            sinks: Arc::new(Vec::new),
        })
    }

    /// The address listened on.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Has the overview show the sinks that `report` tells; without this it shows none.
    #[must_use]
    pub fn with_sinks(mut self, report: SinkReport) -> Self {
        self.sinks = report;
        self
    }

    /// The counters, to be registered.
    #[must_use]
    pub fn metrics(&self) -> &IngestMetrics {
        &self.metrics
    }

    /// Serves until `stop` is cancelled. Then: the health service says `NOT_SERVING`, no stream reads on, batches taken
    /// are stored and acknowledged, streams end with `UNAVAILABLE`; after `drain_timeout` the rest is cut off.
    ///
    /// # Errors
    /// [`IngestError::Server`] when the server ends by itself.
    pub async fn serve(
        self,
        accept: Arc<dyn Accept>,
        ledger: Ledger,
        stop: CancellationToken,
    ) -> Result<(), IngestError> {
        let Self {
            config,
            listener,
            address,
            certificates,
            metrics,
            sinks,
        } = self;
        tracing::info!(%address, tls = certificates.is_some(), "ingest listens");
        // Ends helpers when this function returns or is dropped.
        let over = CancellationToken::new();
        let _over = over.clone().drop_guard();
        let doors = stop.child_token();
        let _doors = doors.clone().drop_guard();

        if let Some(certificates) = &certificates {
            let (certificates, metrics, doors) = (Arc::clone(certificates), metrics.clone(), doors.clone());
            tokio::spawn(async move { certificates.watch(metrics, doors).await });
        }
        let (connections, incoming) = mpsc::channel(64);
        let doorman = Doorman {
            certificates,
            slots: Arc::new(Semaphore::new(config.max_connections)),
            timeout: config.first_message_timeout,
            metrics: metrics.clone(),
        };
        tokio::spawn(Arc::new(doorman).run(listener, connections, doors));

        let max_message_bytes = config.max_message_bytes;
        let (keepalive_interval, keepalive_timeout) = (config.keepalive_interval, config.keepalive_timeout);
        let drain_timeout = config.drain_timeout;
        let nodes = Nodes::new(MAX_NODES, metrics.clone());
        let overview = Overviewer {
            nodes: Arc::clone(&nodes),
            sinks,
            boot_id: rand::random_range(1..=u64::MAX),
        };
        let service = CollectorService::new(config, accept, &ledger, nodes, metrics, stop.clone(), over);
        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_serving::<CollectorServer<CollectorService>>().await;
        let server = Server::builder()
            .http2_keepalive_interval(Some(keepalive_interval))
            .http2_keepalive_timeout(Some(keepalive_timeout))
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_concurrent_streams(STREAMS_PER_CONNECTION)
            .add_service(health_service)
            .add_service(OverviewServiceServer::new(overview))
            .add_service(CollectorServer::new(service).max_decoding_message_size(max_message_bytes))
            .serve_with_incoming_shutdown(ReceiverStream::new(incoming), stop.clone().cancelled_owned());
        tokio::pin!(server);

        let ended = tokio::select! {
            ended = &mut server => Some(ended),
            () = stop.cancelled() => None,
        };
        health.set_not_serving::<CollectorServer<CollectorService>>().await;
        health.set_service_status("", ServingStatus::NotServing).await;
        let ended = match ended {
            Some(ended) => ended,
            None => match time::timeout(drain_timeout, server).await {
                Ok(ended) => ended,
                Err(_) => {
                    tracing::warn!(
                        ?drain_timeout,
                        "streams did not end in time: cut off, agents will send again"
                    );
                    Ok(())
                }
            },
        };
        match ended {
            Ok(()) if stop.is_cancelled() => Ok(()),
            Ok(()) => Err(IngestError::Server {
                listen: address,
                why: "it ended without being asked to".to_owned(),
            }),
            Err(error) => Err(IngestError::Server {
                listen: address,
                why: error.to_string(),
            }),
        }
    }
}
