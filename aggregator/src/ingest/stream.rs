//! One agent's stream: messages in, acknowledgements out.

use std::{future::Future, net::SocketAddr, pin::Pin, sync::Arc, time::Duration};

use futures::{StreamExt as _, stream::FuturesOrdered};
use proto::{
    PROTOCOL_VERSION,
    codec::UNDECODABLE,
    convert::{Hello, StreamDecoder, features_from_wire},
    v1::{self, ClientMessage, ServerMessage, client_message, server_message},
};
use records::RecordBatch;
use telemetry::{LogLimit, Stage};
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc},
    time::{self, Instant},
};
use tonic::{Code, Status, Streaming};

use super::{
    nodes::Presence,
    service::{Claim, Shared},
};
use crate::pipeline::{AcceptError, Accepted, BatchId, Delivery};

/// Refusals for lack of room come from all agents at once.
static BUSY_LOG: LogLimit = LogLimit::new(Duration::from_secs(5));
static MALFORMED_LOG: LogLimit = LogLimit::new(Duration::from_secs(1));

/// One stream, not started.
pub(super) struct Stream {
    shared: Arc<Shared>,
    peer: Option<SocketAddr>,
    inbound: Streaming<ClientMessage>,
    out: mpsc::Sender<Result<ServerMessage, Status>>,
}

/// A stream after its Hello.
struct Session {
    stream: Stream,
    hello: Hello,
    decoder: StreamDecoder,
    /// Counts the times the stream had to go back; only what was taken since is answered.
    epoch: u64,
    presence: Presence,
    /// Last, so that it is given up after everything in flight is settled.
    claim: Claim,
}

/// Records on their way through [`Accept`](crate::pipeline::Accept). Whatever happens to it, the ledger closes.
struct InFlight {
    stage: Stage,
    seq: u64,
    /// [`Session::epoch`] when it was taken.
    epoch: u64,
    records: u64,
    settled: bool,
    _room: OwnedSemaphorePermit,
}

type Stored = Pin<Box<dyn Future<Output = (InFlight, Result<Accepted, AcceptError>)> + Send>>;

/// Why a stream ends.
enum End {
    /// The agent closed it or the connection broke.
    Closed,
    /// We end it.
    Status(Status),
}

impl From<Status> for End {
    fn from(status: Status) -> Self {
        Self::Status(status)
    }
}

// === impl Stream ===

impl Stream {
    pub(super) fn new(
        shared: Arc<Shared>,
        peer: Option<SocketAddr>,
        inbound: Streaming<ClientMessage>,
        out: mpsc::Sender<Result<ServerMessage, Status>>,
    ) -> Self {
        Self {
            shared,
            peer,
            inbound,
            out,
        }
    }

    pub(super) async fn run(self) {
        let (shared, out, peer) = (Arc::clone(&self.shared), self.out.clone(), self.peer);
        shared.metrics.streams.inc();
        let end = shared.over.run_until_cancelled(self.start()).await;
        shared.metrics.streams.dec();
        match end {
            Some(End::Closed) | None => tracing::debug!(?peer, "stream closed"),
            Some(End::Status(status)) => {
                tracing::debug!(?peer, %status, "stream ended");
                // The peer may be gone or deaf: then there is nobody to tell.
                drop(time::timeout(shared.config.first_message_timeout, out.send(Err(status))).await);
            }
        }
    }

    async fn start(mut self) -> End {
        let limit = self.shared.config.first_message_timeout;
        let hello = match time::timeout(limit, self.hello()).await {
            Ok(Ok(hello)) => hello,
            Ok(Err(end)) => return end,
            Err(_) => {
                self.shared.metrics.malformed("hello_timeout");
                return Status::deadline_exceeded(format!("no Hello within {limit:?}")).into();
            }
        };
        let claim = match time::timeout(limit, self.greet(&hello)).await {
            Ok(Ok(claim)) => claim,
            Ok(Err(end)) => return end,
            Err(_) => return Status::unavailable("an older stream of this agent start is still storing").into(),
        };
        tracing::info!(
            peer = ?self.peer, node = %hello.node, boot_id = hello.boot_id, agent_version = %hello.agent_version,
            "agent connected"
        );
        let decoder = StreamDecoder::new(self.shared.limits());
        let presence = self.shared.nodes.arrived(&hello);
        Session {
            stream: self,
            hello,
            decoder,
            epoch: 0,
            presence,
            claim,
        }
        .run()
        .await
    }

    async fn hello(&mut self) -> Result<Hello, End> {
        match self.next().await? {
            client_message::Kind::Hello(hello) => {
                Hello::try_from(hello).map_err(|error| self.malformed(error.reason(), error.to_string()).into())
            }
            client_message::Kind::Batch(_)
            | client_message::Kind::Heartbeat(_)
            | client_message::Kind::Capabilities(_)
            | client_message::Kind::AgentStatus(_) => Err(self
                .malformed("hello_missing", "kind: the first message must be hello")
                .into()),
        }
    }

    async fn greet(&self, hello: &Hello) -> Result<Claim, End> {
        let claim = self.shared.claim(hello.node.clone(), hello.boot_id).await;
        let last_seq = self.shared.accept.last_contiguous(&hello.node, hello.boot_id).await;
        let limits = Some(self.shared.limits().into());
        let ack = v1::HelloAck {
            protocol_version: PROTOCOL_VERSION,
            last_seq,
            limits,
            takes_node_reports: true,
            takes_records: proto::takes_records(),
        };
        self.answer(server_message::Kind::HelloAck(ack)).await?;
        Ok(claim)
    }

    /// The next message. Cancel safe.
    async fn next(&mut self) -> Result<client_message::Kind, End> {
        match self.inbound.message().await {
            Ok(Some(ClientMessage { kind: Some(kind) })) => Ok(kind),
            Ok(Some(ClientMessage { kind: None })) => Err(self.malformed("kind", "kind: none that is known").into()),
            Ok(None) => Err(End::Closed),
            Err(status) => Err(self.blame(status)),
        }
    }

    /// Tells a message that can not be taken from a connection that broke.
    fn blame(&self, status: Status) -> End {
        match status.code() {
            Code::OutOfRange => {
                self.shared.metrics.malformed("oversized");
                let max = self.shared.config.max_message_bytes;
                let text = format!("message is larger than max_message_bytes = {max}: {}", status.message());
                self.log_malformed("oversized", &text);
                Status::resource_exhausted(text).into()
            }
            Code::InvalidArgument if status.message().starts_with(UNDECODABLE) => {
                self.malformed("undecodable", status.message()).into()
            }
            // tonic's words for a gRPC frame that is none, or is compressed in a way that was not agreed on.
            Code::Internal | Code::Unimplemented => self.malformed("framing", status.message()).into(),
            _ => End::Closed,
        }
    }

    fn malformed(&self, reason: &'static str, text: impl Into<String>) -> Status {
        let text = text.into();
        self.shared.metrics.malformed(reason);
        self.log_malformed(reason, &text);
        Status::invalid_argument(text)
    }

    fn log_malformed(&self, reason: &'static str, text: &str) {
        if let Some(suppressed) = MALFORMED_LOG.allow() {
            tracing::warn!(peer = ?self.peer, reason, text, suppressed, "malformed message: stream ended");
        }
    }

    /// Sends one message; a peer that reads nothing for the idle limit is given up.
    async fn answer(&self, kind: server_message::Kind) -> Result<(), End> {
        let message = Ok(ServerMessage { kind: Some(kind) });
        match time::timeout(self.shared.config.idle_timeout, self.out.send(message)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(End::Closed),
            Err(_) => Err(Status::deadline_exceeded("acknowledgements are not read").into()),
        }
    }
}

// === impl Session ===

impl Session {
    async fn run(mut self) -> End {
        let mut storing = FuturesOrdered::new();
        let end = self.exchange(&mut storing).await;
        // What was taken is finished, so that the next stream finds it stored or refused, not in between.
        while let Some((inflight, result)) = storing.next().await {
            if let Some(kind) = self.settle(inflight, result) {
                drop(self.stream.answer(kind).await);
            }
        }
        tracing::info!(node = %self.hello.node, boot_id = self.hello.boot_id, "agent disconnected");
        end
    }

    async fn exchange(&mut self, storing: &mut FuturesOrdered<Stored>) -> End {
        let shared = Arc::clone(&self.stream.shared);
        let window = shared.config.max_unacked_batches;
        let superseded = self.claim.superseded.clone();
        let mut heard = Instant::now();
        // A batch read that waits for room among all streams' batches.
        let mut held: Option<(u64, RecordBatch)> = None;
        let mut last_seq = 0;
        // Set while batches are skipped until the refused one comes again.
        let mut refused: Option<u64> = None;
        loop {
            tokio::select! {
                biased;
                () = superseded.cancelled() => {
                    return Status::aborted("a newer stream of the same agent start took over").into();
                }
                () = shared.stop.cancelled() => return Status::unavailable("the aggregator is stopping").into(),
                Some((inflight, result)) = storing.next(), if !storing.is_empty() => {
                    let stopping = matches!(result, Err(AcceptError::Stopping));
                    let answer = self.settle(inflight, result);
                    if stopping {
                        return Status::unavailable("the aggregator is stopping").into();
                    }
                    if let Some(server_message::Kind::Busy(busy)) = &answer {
                        // Everything after it is sent again too.
                        (refused, held) = (Some(busy.seq), None);
                    }
                    if let Some(kind) = answer && let Err(end) = self.stream.answer(kind).await {
                        return end;
                    }
                }
                room = Arc::clone(&shared.inflight).acquire_owned(), if held.is_some() => {
                    let (Ok(room), Some((seq, batch))) = (room, held.take()) else {
                        return Status::unavailable("the aggregator is stopping").into();
                    };
                    storing.push_back(self.store(seq, batch, room));
                }
                kind = self.stream.next(), if held.is_none() && storing.len() < window => {
                    heard = Instant::now();
                    self.presence.heard();
                    let batch = match kind {
                        Ok(client_message::Kind::Batch(batch)) => batch,
                        Ok(client_message::Kind::Heartbeat(_)) => continue,
                        Ok(client_message::Kind::Capabilities(capabilities)) => match features_from_wire(capabilities) {
                            Ok(features) => {
                                self.presence.capabilities(features);
                                continue;
                            }
                            Err(error) => return self.stream.malformed("capabilities", error.to_string()).into(),
                        },
                        Ok(client_message::Kind::AgentStatus(status)) => {
                            self.presence.generation(status.configuration_generation);
                            continue;
                        }
                        Ok(client_message::Kind::Hello(_)) => {
                            return self.stream.malformed("hello_again", "kind: hello comes once").into();
                        }
                        Err(end) => return end,
                    };
                    if let Some(awaited) = refused {
                        if batch.seq > awaited {
                            match self.decoder.skip(batch) {
                                Ok(_) => continue,
                                Err(error) => return self.stream.malformed(error.reason(), error.to_string()).into(),
                            }
                        }
                        refused = None;
                        last_seq = 0;
                    }
                    match self.take(batch, last_seq).await {
                        Ok((seq, batch)) => {
                            last_seq = seq;
                            held = Some((seq, batch));
                        }
                        Err(end) => return end,
                    }
                }
                () = time::sleep_until(heard + shared.config.idle_timeout), if held.is_none() && storing.is_empty() => {
                    return Status::deadline_exceeded(format!("nothing heard for {:?}", shared.config.idle_timeout)).into();
                }
            }
        }
    }

    /// Decodes a batch; one that can not be is answered with a Nack before the stream ends.
    async fn take(&mut self, batch: v1::Batch, last_seq: u64) -> Result<(u64, RecordBatch), End> {
        let (seq, records) = (batch.seq, u64::try_from(batch.records()).unwrap_or(u64::MAX));
        let (reason, text) = if seq != 0 && seq <= last_seq {
            (
                "seq_order",
                format!("batch.seq is {seq} after {last_seq}: numbers must grow"),
            )
        } else {
            match self.decoder.decode(batch) {
                Ok(decoded) => return Ok(decoded),
                Err(error) => (error.reason(), error.to_string()),
            }
        };
        self.stream.shared.stage.entered(records);
        self.stream.shared.stage.lost("malformed", records);
        let status = self.stream.malformed(reason, text.clone());
        self.stream
            .answer(server_message::Kind::Nack(v1::Nack { seq, detail: text }))
            .await?;
        Err(status.into())
    }

    fn store(&self, seq: u64, batch: RecordBatch, room: OwnedSemaphorePermit) -> Stored {
        let shared = &self.stream.shared;
        let records = u64::try_from(batch.len()).unwrap_or(u64::MAX);
        shared.stage.entered(records);
        let inflight = InFlight {
            stage: shared.stage.clone(),
            seq,
            epoch: self.epoch,
            records,
            settled: false,
            _room: room,
        };
        let id = BatchId {
            node: self.hello.node.clone(),
            boot_id: self.hello.boot_id,
            seq,
        };
        let delivery = Delivery {
            id,
            globals: Arc::clone(&self.hello.globals),
            batch,
        };
        let accept = Arc::clone(&shared.accept);
        Box::pin(async move {
            let result = accept.accept(delivery).await;
            (inflight, result)
        })
    }

    /// Counts a result and says what to answer: nothing if the stream has gone back since the batch was taken, because
    /// an acknowledgement speaks for all numbers below too.
    fn settle(
        &mut self,
        mut inflight: InFlight,
        result: Result<Accepted, AcceptError>,
    ) -> Option<server_message::Kind> {
        let shared = &self.stream.shared;
        let (seq, records) = (inflight.seq, inflight.records);
        inflight.settled = true;
        let current = inflight.epoch == self.epoch;
        let (label, error) = match result {
            Ok(accepted) => {
                match accepted {
                    Accepted::Stored => {
                        shared.metrics.batch("stored");
                        shared.stage.emitted(records);
                        self.presence.stored(records);
                    }
                    Accepted::Duplicate => {
                        shared.metrics.batch("duplicate");
                        shared.stage.skipped("duplicate", records);
                    }
                }
                return current.then_some(server_message::Kind::Ack(v1::Ack { seq }));
            }
            Err(error) => match error {
                AcceptError::Full { .. } => ("refused_full", error),
                AcceptError::Storage(_) => ("refused_storage", error),
                AcceptError::Stopping => ("refused_stopping", error),
            },
        };
        shared.metrics.batch(label);
        shared.stage.skipped(label, records);
        if current {
            self.epoch += 1;
        }
        let reason = match &error {
            AcceptError::Full { .. } => v1::BusyReason::Full,
            AcceptError::Storage(_) => v1::BusyReason::Storage,
            AcceptError::Stopping => return None,
        };
        if let Some(suppressed) = BUSY_LOG.allow() {
            tracing::warn!(node = %self.hello.node, seq, %error, suppressed, "batch refused: the agent keeps it");
        }
        current.then(|| {
            server_message::Kind::Busy(v1::Busy {
                seq,
                reason: reason.into(),
                retry_after_ms: u32::try_from(shared.config.retry_after.as_millis()).unwrap_or(u32::MAX),
                detail: error.to_string(),
            })
        })
    }
}

// === impl InFlight ===

impl Drop for InFlight {
    fn drop(&mut self) {
        if !self.settled {
            self.stage.skipped("cut_off", self.records);
        }
    }
}
