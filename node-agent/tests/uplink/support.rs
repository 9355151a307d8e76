//! A recording aggregator, a server that can be killed, and records that can be told apart.

use std::{
    collections::{HashMap, HashSet},
    future::pending,
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use aggregator::{
    ingest::{Ingest, IngestConfig, IngestMetrics},
    pipeline::{Accept, AcceptError, Accepted, BatchId, Delivery},
};
use node_agent::uplink::{Backoff, GrpcConfig, Transport, UplinkConfig};
use parking_lot::Mutex;
use records::{Direction, Endpoint, Family, Globals, Netflow, Port, RecordBatch};
use telemetry::Ledger;
use tokio::{net::TcpListener, runtime::Runtime, sync::oneshot, time};
use tokio_util::sync::CancellationToken;

/// Far beyond what anything here needs; reached only when something is stuck.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What the recorder does with the next batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mood {
    /// Stores and says so.
    Willing,
    /// Stores, but the answer never comes: the moment before a crash.
    StoresAndHangs,
    /// Neither stores nor answers.
    Hangs,
    /// Refuses.
    Full,
    /// Refuses.
    Broken,
}

/// Stores batches once, like the real pipeline, and remembers every call.
#[derive(Debug)]
pub struct Recorder {
    state: Mutex<State>,
    /// Cancelled and replaced when the mood changes.
    changed: Mutex<CancellationToken>,
}

#[derive(Debug)]
struct State {
    mood: Mood,
    stored: HashSet<BatchId>,
    /// `bytes_read` of each record stored, with how often.
    records: HashMap<u64, u64>,
    order: Vec<u64>,
    calls: Vec<u64>,
    duplicates: u64,
    tells: bool,
    globals: Option<Arc<Globals>>,
    /// Value of the tag `zone` of each record stored.
    zones: HashMap<u64, String>,
}

impl Recorder {
    pub fn new(mood: Mood) -> Arc<Self> {
        let state = State {
            mood,
            stored: HashSet::new(),
            records: HashMap::new(),
            order: Vec::new(),
            calls: Vec::new(),
            duplicates: 0,
            tells: false,
            globals: None,
            zones: HashMap::new(),
        };
        Arc::new(Self {
            state: Mutex::new(state),
            changed: Mutex::default(),
        })
    }

    /// Hanging calls get the new mood too.
    pub fn set(&self, mood: Mood) {
        self.state.lock().mood = mood;
        std::mem::take(&mut *self.changed.lock()).cancel();
    }

    /// From now on answers `last_contiguous`, as the numbers stored are in order.
    pub fn tell_what_is_known(&self) {
        self.state.lock().tells = true;
    }

    /// Asserts that exactly the records `0..n` were stored, each once.
    pub fn assert_exactly(&self, n: u64) {
        let state = self.state.lock();
        let missing = (0..n).filter(|id| !state.records.contains_key(id)).count();
        let repeated = state.records.values().filter(|times| **times > 1).count();
        let foreign = state.records.keys().filter(|id| **id >= n).count();
        assert_eq!(
            (missing, repeated, foreign),
            (0, 0, 0),
            "missing, repeated, foreign of {n}"
        );
    }

    pub fn duplicates(&self) -> u64 {
        self.state.lock().duplicates
    }

    /// Sequence numbers in the order stored.
    pub fn order(&self) -> Vec<u64> {
        self.state.lock().order.clone()
    }

    /// Sequence numbers of all calls.
    pub fn calls(&self) -> Vec<u64> {
        self.state.lock().calls.clone()
    }

    pub fn globals(&self) -> Option<Arc<Globals>> {
        self.state.lock().globals.clone()
    }

    /// Asserts that all records `ids` carry this value of the tag `zone`.
    pub fn assert_zone(&self, ids: std::ops::Range<u64>, zone: &str) {
        let state = self.state.lock();
        let other = ids
            .clone()
            .find(|id| state.zones.get(id).map(String::as_str) != Some(zone));
        assert_eq!(other, None, "not {zone} in {ids:?}");
    }

    fn store(&self, delivery: Delivery) -> Accepted {
        let mut state = self.state.lock();
        let seq = delivery.id.seq;
        if !state.stored.insert(delivery.id) {
            state.duplicates += 1;
            return Accepted::Duplicate;
        }
        state.order.push(seq);
        let zone = delivery.globals.tags.iter().find(|(key, _)| &**key == "zone");
        for record in delivery.batch.netflow {
            *state.records.entry(record.bytes_read).or_default() += 1;
            if let Some((_, zone)) = zone {
                state.zones.insert(record.bytes_read, zone.to_string());
            }
        }
        state.globals = Some(delivery.globals);
        Accepted::Stored
    }
}

#[async_trait::async_trait]
impl Accept for Recorder {
    async fn accept(&self, delivery: Delivery) -> Result<Accepted, AcceptError> {
        self.state.lock().calls.push(delivery.id.seq);
        loop {
            let changed = self.changed.lock().clone();
            let mood = self.state.lock().mood;
            match mood {
                Mood::Willing => return Ok(self.store(delivery)),
                Mood::StoresAndHangs => {
                    self.store(delivery);
                    return pending().await;
                }
                Mood::Full => {
                    return Err(AcceptError::Full {
                        sink: "s".into(),
                        why: "test".into(),
                    });
                }
                Mood::Broken => return Err(AcceptError::Storage("test".into())),
                Mood::Hangs => changed.cancelled().await,
            }
        }
    }

    async fn last_contiguous(&self, _node: &str, _boot_id: u64) -> u64 {
        let state = self.state.lock();
        if state.tells {
            state.order.iter().max().copied().unwrap_or(0)
        } else {
            0
        }
    }
}

/// An ingest server in a runtime of its own, so that it can be killed with everything it has open.
pub struct Server {
    pub address: SocketAddr,
    pub ledger: Ledger,
    pub metrics: IngestMetrics,
    pub stop: CancellationToken,
    runtime: Option<Runtime>,
}

impl Server {
    pub async fn start(config: IngestConfig, accept: Arc<dyn Accept>) -> Self {
        let (stop, ledger) = (CancellationToken::new(), Ledger::default());
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let (told, hears) = oneshot::channel();
        let (its_stop, its_ledger) = (stop.clone(), ledger.clone());
        runtime.spawn(async move {
            // The port of a server just killed can be busy for a moment.
            let listener = loop {
                match TcpListener::bind(config.listen).await {
                    Ok(listener) => break listener,
                    Err(_) => time::sleep(Duration::from_millis(10)).await,
                }
            };
            let ingest = Ingest::with_listener(config, listener).unwrap();
            told.send((ingest.local_addr(), ingest.metrics().clone())).unwrap();
            ingest.serve(accept, its_ledger, its_stop).await.unwrap();
        });
        let (address, metrics) = time::timeout(PATIENCE, hears).await.unwrap().unwrap();
        Self {
            address,
            ledger,
            metrics,
            stop,
            runtime: Some(runtime),
        }
    }

    /// Ends it like kill -9 does: no farewell on any connection.
    pub fn kill(mut self) {
        self.runtime.take().unwrap().shutdown_background();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

pub fn loopback() -> IngestConfig {
    IngestConfig {
        retry_after: Duration::from_millis(5),
        ..IngestConfig::new("127.0.0.1:0".parse().unwrap())
    }
}

pub fn grpc(address: SocketAddr) -> Transport {
    Transport::Grpc(GrpcConfig::new(format!("http://{address}")))
}

pub fn zone(zone: &str) -> Arc<Globals> {
    Arc::new(Globals {
        tags: vec![("host".into(), "n1".into()), ("zone".into(), zone.into())],
    })
}

pub fn uplink(transport: Transport) -> UplinkConfig {
    UplinkConfig {
        backoff: Backoff {
            min: Duration::from_millis(1),
            max: Duration::from_millis(50),
        },
        ..UplinkConfig::new("n1".into(), zone("z"), transport)
    }
}

/// Records `ids`, told apart by `bytes_read`.
pub fn flows(ids: std::ops::Range<u64>) -> RecordBatch {
    let end = |port| Endpoint {
        ip: "10.0.0.1".parse().unwrap(),
        port,
    };
    let netflow = ids.map(|id| Netflow {
        time_unix_ns: 1,
        local: end(Port::Number(80)),
        remote: end(Port::Any),
        transport: records::Transport::Tcp,
        family: Family::V4,
        direction: Direction::Incoming,
        netns: 1,
        pid: 2,
        process_name: format!("p{}", id % 7).into(),
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

/// `(entered, emitted, skipped, lost)` of a stage, asserting that nothing is inside.
pub fn closed(ledger: &Ledger, stage: &'static str) -> (u64, u64, u64, u64) {
    let snapshot = ledger.stage(stage).snapshot();
    assert_eq!(snapshot.pending(), 0, "{stage}: {snapshot:?}");
    (
        snapshot.entered,
        snapshot.emitted,
        snapshot.skipped.values().sum(),
        snapshot.lost.values().sum(),
    )
}
