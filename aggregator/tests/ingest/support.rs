//! An aggregator whose mood can be set, and a client that says exactly what it is told.

use std::{sync::Arc, time::Duration};

use aggregator::{
    ingest::{Ingest, IngestConfig, IngestError, IngestMetrics},
    pipeline::{Accept, AcceptError, Accepted, BatchId, Delivery},
};
use parking_lot::Mutex;
use proto::{
    convert::{Limits, StreamEncoder},
    v1::{self, ClientMessage, client_message::Kind, collector_client::CollectorClient, server_message},
};
use records::{Direction, Endpoint, Family, Netflow, Port, RecordBatch};
use telemetry::Ledger;
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming, transport::Channel};

/// Far beyond what anything here needs; reached only when something is stuck.
pub const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mood {
    Willing,
    /// Waits for another mood.
    Hangs,
    Full,
}

#[derive(Debug)]
pub struct Fake {
    pub mood: watch::Sender<Mood>,
    pub calls: Mutex<Vec<BatchId>>,
    pub stored: Mutex<Vec<BatchId>>,
}

impl Fake {
    pub fn new(mood: Mood) -> Arc<Self> {
        Arc::new(Self {
            mood: watch::Sender::new(mood),
            calls: Mutex::default(),
            stored: Mutex::default(),
        })
    }

    pub fn calls(&self) -> Vec<u64> {
        self.calls.lock().iter().map(|id| id.seq).collect()
    }

    pub fn stored(&self) -> Vec<u64> {
        self.stored.lock().iter().map(|id| id.seq).collect()
    }
}

#[async_trait::async_trait]
impl Accept for Fake {
    async fn accept(&self, delivery: Delivery) -> Result<Accepted, AcceptError> {
        self.calls.lock().push(delivery.id.clone());
        let mood = *self
            .mood
            .subscribe()
            .wait_for(|mood| *mood != Mood::Hangs)
            .await
            .unwrap();
        if mood == Mood::Full {
            return Err(AcceptError::Full {
                sink: "dataway".into(),
                why: "2 GiB of 2 GiB".into(),
            });
        }
        let mut stored = self.stored.lock();
        if stored.contains(&delivery.id) {
            return Ok(Accepted::Duplicate);
        }
        stored.push(delivery.id);
        Ok(Accepted::Stored)
    }
}

pub struct Server {
    pub address: std::net::SocketAddr,
    pub ledger: Ledger,
    pub metrics: IngestMetrics,
    pub stop: CancellationToken,
    pub task: JoinHandle<Result<(), IngestError>>,
}

impl Server {
    pub async fn start(config: IngestConfig, accept: Arc<dyn Accept>) -> Self {
        let ingest = Ingest::bind(config).await.unwrap();
        let (address, metrics) = (ingest.local_addr(), ingest.metrics().clone());
        let (ledger, stop) = (Ledger::default(), CancellationToken::new());
        let task = tokio::spawn(ingest.serve(accept, ledger.clone(), stop.clone()));
        Self {
            address,
            ledger,
            metrics,
            stop,
            task,
        }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// `(entered, emitted, skipped, lost)`, asserting that nothing is inside.
    pub fn closed(&self) -> (u64, u64, u64, u64) {
        let snapshot = self.ledger.stage("ingest.stream").snapshot();
        assert_eq!(snapshot.pending(), 0, "{snapshot:?}");
        (
            snapshot.entered,
            snapshot.emitted,
            snapshot.skipped.values().sum(),
            snapshot.lost.values().sum(),
        )
    }
}

pub fn loopback() -> IngestConfig {
    IngestConfig::new("127.0.0.1:0".parse().unwrap())
}

/// A stream spoken by hand.
pub struct Client {
    out: mpsc::Sender<ClientMessage>,
    inbound: Streaming<v1::ServerMessage>,
    encoder: StreamEncoder,
}

impl Client {
    pub async fn connect(url: String) -> Self {
        let channel = Channel::from_shared(url).unwrap().connect().await.unwrap();
        Self::over(channel).await
    }

    pub async fn over(channel: Channel) -> Self {
        let (out, messages) = mpsc::channel(64);
        let inbound = CollectorClient::new(channel)
            .stream(ReceiverStream::new(messages))
            .await
            .unwrap()
            .into_inner();
        Self {
            out,
            inbound,
            encoder: StreamEncoder::new(Limits::default()),
        }
    }

    /// Connected and greeted as node `n1`, boot 7.
    pub async fn greeted(url: String) -> Self {
        let mut client = Self::connect(url).await;
        client.say(Kind::Hello(hello())).await;
        let answer = client.hear().await.unwrap();
        assert!(matches!(answer, server_message::Kind::HelloAck(_)), "{answer:?}");
        client
    }

    pub async fn say(&self, kind: Kind) {
        self.message(ClientMessage { kind: Some(kind) }).await;
    }

    pub async fn message(&self, message: ClientMessage) {
        self.out.send(message).await.unwrap();
    }

    pub async fn batch(&mut self, seq: u64) {
        let batch = self.encode(seq);
        self.say(Kind::Batch(batch)).await;
    }

    pub fn encode(&mut self, seq: u64) -> v1::Batch {
        self.encoder.encode(seq, &flows(3)).unwrap()
    }

    pub async fn hear(&mut self) -> Result<server_message::Kind, Status> {
        let message = time::timeout(PATIENCE, self.inbound.message())
            .await
            .expect("no answer")?;
        Ok(message.ok_or_else(|| Status::ok("closed"))?.kind.unwrap())
    }

    /// The status that ends the stream, now.
    pub async fn end(&mut self) -> Status {
        match self.hear().await {
            Err(status) => status,
            Ok(kind) => panic!("stream goes on with {kind:?}"),
        }
    }

    pub async fn expect_ack(&mut self, seq: u64) {
        assert_eq!(self.hear().await.unwrap(), server_message::Kind::Ack(v1::Ack { seq }));
    }
}

pub fn hello() -> v1::Hello {
    v1::Hello {
        protocol_version: 1,
        node: "n1".to_owned(),
        boot_id: 7,
        agent_version: "0.1.0".to_owned(),
        tags: vec![v1::Tag {
            key: "host".to_owned(),
            value: "n1".to_owned(),
        }],
    }
}

pub fn flows(n: u64) -> RecordBatch {
    let end = Endpoint {
        ip: "10.0.0.1".parse().unwrap(),
        port: Port::Number(80),
    };
    let netflow = (0..n).map(|id| Netflow {
        time_unix_ns: 1,
        local: end,
        remote: end,
        transport: records::Transport::Tcp,
        family: Family::V4,
        direction: Direction::Incoming,
        netns: 1,
        pid: 2,
        process_name: "nginx".into(),
        dst_nat: None,
        dst_domain: "".into(),
        local_k8s: None,
        remote_k8s: None,
        bytes_read: id,
        bytes_written: 4,
        retransmits: 0,
        rtt_us: 0,
        rtt_var_us: 0,
        tcp_closed: 0,
        tcp_established: 0,
        datagrams_read: 0,
        datagrams_written: 0,
    });
    RecordBatch {
        netflow: netflow.collect(),
        ..RecordBatch::default()
    }
}

/// Waits until `what` holds.
pub async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = time::Instant::now() + PATIENCE;
    while !holds() {
        assert!(time::Instant::now() < deadline, "never came true: {what}");
        time::sleep(Duration::from_millis(2)).await;
    }
}
