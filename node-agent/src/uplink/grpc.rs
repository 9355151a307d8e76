//! Transport to an aggregator over gRPC: connect, say Hello, send in order, take acknowledgements, start over.

use std::{collections::VecDeque, error::Error, fs, path::Path, pin::pin, sync::Arc, time::Duration};

use proto::{
    PROTOCOL_VERSION, batch_field,
    convert::{Hello, Limits, StreamEncoder},
    v1::{self, ClientMessage, client_message, collector_client::CollectorClient, server_message},
};
use records::{Globals, Measurement};
use tokio::{
    sync::{mpsc, watch},
    time::{self, Instant},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{
    Status, Streaming,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};

use super::{
    LOG_LIMIT,
    config::{Backoff, ClientTls, GrpcConfig},
    report::NodeReport,
    window::Window,
};

/// Answers are small; anything larger is not our protocol.
const MAX_ANSWER_BYTES: usize = 256 << 10;

pub(super) struct Grpc {
    /// Its tags are those of the first stream.
    pub(super) hello: Hello,
    pub(super) config: GrpcConfig,
    pub(super) backoff: Backoff,
    pub(super) ack_timeout: Duration,
    pub(super) report: watch::Receiver<NodeReport>,
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum StreamError {
    #[error("can not read TLS {what} {path}: {source}")]
    File {
        what: &'static str,
        path: String,
        source: std::io::Error,
    },
    #[error("can not connect: {}", chain(.0))]
    Connect(tonic::transport::Error),
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    #[error("aggregator ended the stream: {:?}: {}", .0.code(), .0.message())]
    Status(Status),
    #[error("aggregator closed the stream")]
    Closed,
    #[error("aggregator broke the protocol: {0}")]
    Protocol(String),
    #[error("batch {seq} was not acknowledged within {limit:?}")]
    Stuck { seq: u64, limit: Duration },
    #[error("aggregator does not understand batch {seq}: {detail}")]
    Rejected { seq: u64, detail: String },
}

/// One open stream.
struct Session<'a> {
    window: &'a Window,
    /// Tags that the stream began with.
    globals: Arc<Globals>,
    encoder: StreamEncoder,
    limits: Limits,
    /// Kinds of records that the aggregator does not know.
    unknown: Vec<Measurement>,
    outbound: mpsc::Sender<ClientMessage>,
    inbound: Streaming<v1::ServerMessage>,
    backoff: Backoff,
    ack_timeout: Duration,
    /// Number and time of each batch sent and not acknowledged.
    in_flight: VecDeque<(u64, Instant)>,
    /// Last number sent on this stream.
    sent: u64,
    /// Not to send before.
    pause: Option<Instant>,
    /// Busy answers since the last acknowledgement.
    refusals: u32,
    /// Last time anything was sent.
    spoke: Instant,
    /// An acknowledgement came.
    progress: bool,
    /// `None` when the aggregator does not take reports.
    report: Option<watch::Receiver<NodeReport>>,
    /// Messages of the last report that are not sent yet.
    to_report: VecDeque<client_message::Kind>,
}

/// Counts an open stream.
struct Connected<'a>(&'a Window);

// === impl Connected ===

impl<'a> Connected<'a> {
    fn new(window: &'a Window) -> Self {
        window.metrics.connects.inc();
        window.metrics.connected.set(1);
        Self(window)
    }
}

impl Drop for Connected<'_> {
    fn drop(&mut self) {
        self.0.metrics.connected.set(0);
    }
}

// === impl Grpc ===

impl Grpc {
    /// Keeps a stream open until the window is finished or `stop` is cancelled.
    pub(super) async fn run(self, window: &Window, stop: &CancellationToken) {
        stop.run_until_cancelled(self.keep_open(window)).await;
    }

    async fn keep_open(&self, window: &Window) {
        let mut attempt = 0;
        while !window.is_finished() {
            let mut progress = false;
            let Err(error) = self.stream(window, &mut progress).await else {
                continue;
            };
            window.metrics.connect_failures.inc();
            if progress {
                attempt = 0;
            }
            let wait = self.backoff.delay(attempt);
            attempt = attempt.saturating_add(1);
            if let Some(suppressed) = LOG_LIMIT.allow() {
                let (endpoint, held) = (&self.config.endpoint, window.unacked());
                tracing::warn!(
                    endpoint, %error, retry_in = ?wait, held_batches = held.batches, held_records = held.records,
                    suppressed, "uplink is down: batches are kept"
                );
            }
            window.pause(wait).await;
        }
    }

    async fn stream(&self, window: &Window, progress: &mut bool) -> Result<(), StreamError> {
        let limit = self.config.connect_timeout;
        let globals = window.first_globals();
        let opened = time::timeout(limit, self.open(Arc::clone(&globals)))
            .await
            .map_err(|_| StreamError::Timeout(limit))??;
        let (outbound, inbound, ack) = opened;
        let limits = ack
            .limits
            .ok_or_else(|| StreamError::Protocol("hello_ack.limits is missing".to_owned()))?;
        let limits = Limits::try_from(limits).map_err(|error| StreamError::Protocol(error.to_string()))?;
        if ack.last_seq > window.sent_seq() {
            let text = format!(
                "hello_ack.last_seq is {}, last ever sent is {}",
                ack.last_seq,
                window.sent_seq()
            );
            return Err(StreamError::Protocol(text));
        }
        let _connected = Connected::new(window);
        tracing::info!(endpoint = self.config.endpoint, last_seq = ack.last_seq, "uplink is up");
        window.ack(ack.last_seq);
        let mut session = Session {
            window,
            globals,
            encoder: StreamEncoder::new(limits),
            limits,
            unknown: Measurement::ALL
                .into_iter()
                .filter(|kind| *kind != Measurement::Netflow && !ack.takes_records.contains(&batch_field(*kind)))
                .collect(),
            outbound,
            inbound,
            backoff: self.backoff,
            ack_timeout: self.ack_timeout,
            in_flight: VecDeque::new(),
            sent: ack.last_seq,
            pause: None,
            refusals: 0,
            spoke: Instant::now(),
            progress: false,
            report: None,
            to_report: VecDeque::new(),
        };
        if ack.takes_node_reports {
            let mut report = self.report.clone();
            session.to_report = report.borrow_and_update().messages().into();
            session.report = Some(report);
        }
        let ended = session.run().await;
        *progress = session.progress;
        ended
    }

    async fn open(
        &self,
        globals: Arc<Globals>,
    ) -> Result<(mpsc::Sender<ClientMessage>, Streaming<v1::ServerMessage>, v1::HelloAck), StreamError> {
        let channel = self.endpoint()?.connect().await.map_err(StreamError::Connect)?;
        // One message waits while one is written: what is not in HTTP/2's hands stays in the window.
        let (outbound, messages) = mpsc::channel(1);
        let hello = Hello {
            globals,
            ..self.hello.clone()
        };
        let hello = client_message::Kind::Hello(v1::Hello::from(&hello));
        outbound
            .send(ClientMessage { kind: Some(hello) })
            .await
            .map_err(|_| StreamError::Closed)?;
        let mut client = CollectorClient::<Channel>::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES);
        let answer = client
            .stream(ReceiverStream::new(messages))
            .await
            .map_err(StreamError::Status)?;
        let mut inbound = answer.into_inner();
        let first = inbound
            .message()
            .await
            .map_err(StreamError::Status)?
            .ok_or(StreamError::Closed)?;
        match first.kind {
            Some(server_message::Kind::HelloAck(ack)) if ack.protocol_version == PROTOCOL_VERSION => {
                Ok((outbound, inbound, ack))
            }
            Some(server_message::Kind::HelloAck(ack)) => Err(StreamError::Protocol(format!(
                "hello_ack.protocol_version is {}, this agent speaks {PROTOCOL_VERSION}",
                ack.protocol_version
            ))),
            _ => Err(StreamError::Protocol("the first message is not hello_ack".to_owned())),
        }
    }

    fn endpoint(&self) -> Result<Endpoint, StreamError> {
        let GrpcConfig {
            endpoint,
            tls,
            allow_plaintext: _,
            connect_timeout,
            keepalive_interval,
            keepalive_timeout,
        } = &self.config;
        let endpoint = Endpoint::from_shared(endpoint.clone())
            .map_err(StreamError::Connect)?
            .connect_timeout(*connect_timeout)
            .http2_keep_alive_interval(*keepalive_interval)
            .keep_alive_timeout(*keepalive_timeout)
            .keep_alive_while_idle(true)
            .tcp_nodelay(true);
        let Some(ClientTls {
            cert,
            key,
            ca,
            server_name,
        }) = tls
        else {
            return Ok(endpoint);
        };
        let mut config = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(read("CA", ca)?))
            .identity(Identity::from_pem(read("certificate", cert)?, read("key", key)?));
        if let Some(name) = server_name {
            config = config.domain_name(name);
        }
        endpoint.tls_config(config).map_err(StreamError::Connect)
    }
}

// === impl Session ===

impl Session<'_> {
    /// Ends without error when the window is finished, or when the next batch needs a stream with other tags.
    async fn run(&mut self) -> Result<(), StreamError> {
        // A third of the idle limit leaves room for a slow network; without a limit once a day does no harm.
        let heartbeat = match self.limits.idle_ms {
            0 => Duration::from_secs(86_400),
            idle_ms => Duration::from_millis(u64::from(idle_ms / 3).max(1)),
        };
        let window = self.window;
        // A slot borrows its sender, and `self` is needed beside it.
        let outbound = self.outbound.clone();
        loop {
            if window.is_finished() {
                return Ok(());
            }
            // Made before looking, so that a batch pushed in between is not missed.
            let mut work = pin!(window.work.notified());
            work.as_mut().enable();
            let paused = self.pause.is_some_and(|until| until > Instant::now());
            let next = window.globals_after(self.sent);
            let waiting = next.as_ref().is_some_and(|globals| same(globals, &self.globals));
            if next.is_some() && !waiting && self.in_flight.is_empty() {
                return Ok(());
            }
            let may_send = !paused && self.in_flight.len() < self.limits.max_unacked_batches;
            let timer = self.timer(heartbeat, paused);
            tokio::select! {
                biased;
                answer = self.inbound.message() => {
                    let answer = answer.map_err(StreamError::Status)?.ok_or(StreamError::Closed)?;
                    self.take(answer)?;
                }
                Some(messages) = changed(&mut self.report) => self.to_report = messages.into(),
                slot = outbound.reserve(), if !self.to_report.is_empty() => {
                    let slot = slot.map_err(|_| StreamError::Closed)?;
                    slot.send(ClientMessage { kind: self.to_report.pop_front() });
                    self.spoke = Instant::now();
                }
                slot = outbound.reserve(), if may_send && waiting => {
                    let slot = slot.map_err(|_| StreamError::Closed)?;
                    let Some((seq, batch)) = window.after(self.sent) else { continue };
                    let batch = if self.unknown.is_empty() {
                        batch
                    } else {
                        drop(batch);
                        window.leave_out(seq, &self.unknown).unwrap_or_default()
                    };
                    self.sent = seq;
                    match self.encoder.encode(seq, &batch) {
                        Ok(batch) => {
                            slot.send(ClientMessage { kind: Some(client_message::Kind::Batch(batch)) });
                            self.spoke = Instant::now();
                            self.in_flight.push_back((seq, self.spoke));
                        }
                        Err(error) => {
                            tracing::error!(seq, %error, records = batch.len(), "batch can not be sent: given up");
                            window.unsendable(seq);
                        }
                    }
                }
                () = &mut work => {}
                () = time::sleep_until(timer) => self.on_timer(heartbeat)?,
            }
        }
    }

    /// The next time something is due.
    fn timer(&self, heartbeat: Duration, paused: bool) -> Instant {
        let acks = self.in_flight.front().map(|(_, at)| *at + self.ack_timeout);
        let pause = self.pause.filter(|_| paused);
        [acks, pause]
            .into_iter()
            .flatten()
            .fold(self.spoke + heartbeat, Instant::min)
    }

    fn on_timer(&mut self, heartbeat: Duration) -> Result<(), StreamError> {
        let now = Instant::now();
        if let Some((seq, at)) = self.in_flight.front()
            && now >= *at + self.ack_timeout
        {
            return Err(StreamError::Stuck {
                seq: *seq,
                limit: self.ack_timeout,
            });
        }
        if now >= self.spoke + heartbeat {
            self.spoke = now;
            // A full channel means that something is being sent.
            let kind = Some(client_message::Kind::Heartbeat(v1::Heartbeat {}));
            if let Err(mpsc::error::TrySendError::Closed(_)) = self.outbound.try_send(ClientMessage { kind }) {
                return Err(StreamError::Closed);
            }
        }
        Ok(())
    }

    fn take(&mut self, answer: v1::ServerMessage) -> Result<(), StreamError> {
        let unexpected = |what: &str| Err(StreamError::Protocol(what.to_owned()));
        match answer.kind {
            Some(server_message::Kind::Ack(v1::Ack { seq })) => {
                if seq > self.sent {
                    return Err(StreamError::Protocol(format!(
                        "ack.seq is {seq}, last sent is {}",
                        self.sent
                    )));
                }
                while let Some((_, at)) = self.in_flight.pop_front_if(|(sent, _)| *sent <= seq) {
                    self.window.metrics.ack_seconds.observe(at.elapsed().as_secs_f64());
                }
                (self.progress, self.refusals) = (true, 0);
                self.window.ack(seq);
                Ok(())
            }
            Some(server_message::Kind::Busy(v1::Busy {
                seq,
                reason: _,
                retry_after_ms,
                detail,
            })) => {
                if seq == 0 || seq > self.sent {
                    return Err(StreamError::Protocol(format!(
                        "busy.seq is {seq}, last sent is {}",
                        self.sent
                    )));
                }
                // All before it are acknowledged; it and all after it go again.
                self.window.ack(seq - 1);
                self.in_flight.clear();
                self.sent = seq - 1;
                let asked = Duration::from_millis(retry_after_ms.into()).min(self.backoff.max);
                let wait = asked.max(self.backoff.delay(self.refusals));
                self.refusals = self.refusals.saturating_add(1);
                self.pause = Some(Instant::now() + wait);
                self.window.metrics.busy.inc();
                if let Some(suppressed) = LOG_LIMIT.allow() {
                    tracing::warn!(seq, detail, retry_in = ?wait, suppressed, "aggregator is busy: batches are kept");
                }
                Ok(())
            }
            Some(server_message::Kind::Nack(v1::Nack { seq, detail })) => {
                if self.window.reject(seq) {
                    tracing::error!(seq, detail, "batch rejected twice: given up");
                }
                Err(StreamError::Rejected { seq, detail })
            }
            Some(server_message::Kind::HelloAck(_)) => unexpected("hello_ack comes once"),
            None => unexpected("a message of no known kind"),
        }
    }
}

fn same(one: &Arc<Globals>, other: &Arc<Globals>) -> bool {
    Arc::ptr_eq(one, other) || one == other
}

/// Waits for the next report; for ever, or `None`, when none will come. Cancel safe.
async fn changed(report: &mut Option<watch::Receiver<NodeReport>>) -> Option<Vec<client_message::Kind>> {
    match report {
        Some(report) => {
            report.changed().await.ok()?;
            Some(report.borrow_and_update().messages())
        }
        None => std::future::pending().await,
    }
}

fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, StreamError> {
    fs::read(path).map_err(|source| StreamError::File {
        what,
        path: path.display().to_string(),
        source,
    })
}

/// tonic's errors say `transport error` and keep the cause inside.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}
