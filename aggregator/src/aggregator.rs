//! Puts the parts together: queue file, committer thread, delivery tasks; and takes them apart again.

use std::{
    collections::HashSet,
    io,
    path::PathBuf,
    sync::{Arc, mpsc},
    thread::JoinHandle,
    time::Duration,
};

use parking_lot::Mutex;
use telemetry::{LogLimit, Telemetry};
use tokio::{task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    OpenError,
    config::{AggregatorConfig, ConfigError, DatawayConfig, SinkConfig, SinkKind},
    ingest::SinkReport,
    pipeline::{
        Accept, Pipeline,
        committer::{COMMANDS, Command, Committer, Outlet, Upkeep, hand_over},
        dedup::Dedup,
        encode::Encoders,
        metrics::PipelineMetrics,
    },
    queue::{PkgIds, QueueClock, Store, StoreError},
    route::Plan,
    sinks::{
        Sink, SinkStatus,
        dataway::{Client, ClientError},
        dead_letter::DeadLetters,
        deliver::Delivery,
        gate::Gate,
        metrics::{SinkMetrics, StatusCollector, Statuses},
        text::{FileSink, Terminal},
    },
};

/// How often [`Aggregator::drain`] looks whether all is delivered.
const DRAIN_POLL: Duration = Duration::from_millis(20);

/// At most one log line about failed deliveries per sink in this time.
const FAILURE_LOG_PERIOD: Duration = Duration::from_secs(10);

/// A running aggregator.
pub struct Aggregator {
    pipeline: Arc<Pipeline>,
    states: Arc<States>,
    commands: mpsc::SyncSender<Command>,
    committer: JoinHandle<()>,
    deliveries: JoinSet<()>,
    stop_accepting: CancellationToken,
    stop_delivering: CancellationToken,
}

/// What was left when the aggregator ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Drained {
    /// Points that stay in the disk queue, by sink.
    pub left: Vec<(String, u64)>,
}

/// The aggregator cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An option.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The disk queue.
    #[error(transparent)]
    Queue(#[from] OpenError),
    /// Reading what the queue holds.
    #[error("queue in `{dir}` cannot be read: {why}")]
    QueueRead {
        /// Its directory.
        dir: String,
        /// What failed.
        why: String,
    },
    /// A DataWay client.
    #[error("sink `{sink}`: {source}")]
    Client {
        /// Name of the sink.
        sink: String,
        /// What failed.
        source: ClientError,
    },
    /// An output file.
    #[error("sink `{sink}`: `{path}` cannot be written: {source}; name a file that this user can write", path = path.display())]
    File {
        /// Name of the sink.
        sink: String,
        /// The file.
        path: PathBuf,
        /// What failed.
        source: io::Error,
    },
    /// A thread.
    #[error("thread `{name}` cannot be started: {source}")]
    Thread {
        /// Its name.
        name: &'static str,
        /// What failed.
        source: io::Error,
    },
}

/// Sinks and queue, for status and metrics.
struct States {
    sinks: Vec<Arc<Sink>>,
    store: Arc<Store>,
    clock: QueueClock,
}

// === impl Aggregator ===

impl Aggregator {
    /// Opens the queue and starts the committer and the deliveries. Cancelling `stop` makes `accept` refuse; deliveries go
    /// on until [`Self::drain`]. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// [`StartError`] names what cannot be used and what to do.
    pub async fn start(
        config: AggregatorConfig,
        telemetry: &Telemetry,
        stop: CancellationToken,
    ) -> Result<Self, StartError> {
        config.validate()?;
        // Another part of the process may have chosen a provider already; either serves.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let clock = QueueClock::start();
        let sink_metrics = telemetry.register("sink", SinkMetrics::register);
        let metrics = telemetry.register("pipeline", PipelineMetrics::register);
        let (store, aside) = Store::open(config.queue_dir.as_deref())?;
        if aside.is_some() {
            metrics.damaged_files.inc();
        }
        let store = Arc::new(store);
        let queue_health = telemetry.health.component("queue");
        queue_health.set_ok();
        let read_error = |error: StoreError| StartError::QueueRead {
            dir: config
                .queue_dir
                .as_ref()
                .map(|dir| dir.display().to_string())
                .unwrap_or_default(),
            why: error.to_string(),
        };
        drop_orphans(&store, &config, clock).map_err(read_error)?;
        let dedup = Dedup::new(store.agents().map_err(read_error)?);

        let (commands, requests) = mpsc::sync_channel(COMMANDS);
        let (stop_accepting, stop_delivering) = (stop.child_token(), CancellationToken::new());
        let mut outlets = Vec::with_capacity(config.sinks.len());
        let mut deliveries = JoinSet::new();
        let mut clients = Vec::new();
        for (index, sink_config) in config.sinks.iter().enumerate() {
            let slot = match &sink_config.kind {
                SinkKind::Dataway(_) => Some(store.slot(&sink_config.name).map_err(read_error)?),
                SinkKind::Stdout(_) | SinkKind::File(_) => None,
            };
            let sink = Sink::new(
                sink_config,
                slot,
                config.queue_max_bytes,
                &telemetry.ledger,
                &telemetry.health,
            );
            let sink = Arc::new(sink);
            let outlet = outlet(sink_config, &sink, slot)?;
            if let (SinkKind::Dataway(dataway), Some(slot)) = (&sink_config.kind, slot) {
                let backlog = store.backlog(slot).map_err(read_error)?;
                if backlog.bodies > 0 {
                    tracing::info!(
                        sink = sink.name,
                        bodies = backlog.bodies,
                        points = backlog.points,
                        "The queue holds bodies of an earlier run"
                    );
                }
                sink.restore(backlog);
                let client = Client::new(dataway.clone(), &config.hostname).map_err(|source| StartError::Client {
                    sink: sink_config.name.clone(),
                    source,
                })?;
                clients.push((index, Arc::clone(&sink), dataway.clone(), client));
            }
            outlets.push((sink, outlet));
        }
        let sinks = outlets.iter().map(|(sink, _)| Arc::clone(sink)).collect();
        let states = Arc::new(States {
            sinks,
            store: Arc::clone(&store),
            clock,
        });
        let source: Arc<dyn Statuses> = states.clone();
        telemetry.register("sink", |registry| {
            registry.register_collector(Box::new(StatusCollector(Arc::downgrade(&source))));
        });
        let committer = Committer {
            commands: requests,
            store: Arc::clone(&store),
            sinks: outlets,
            plan: Plan::new(&config.sinks),
            dedup,
            encoders: Encoders::new(),
            clock,
            pkg_ids: PkgIds::new(),
            linger: config.commit_linger,
            min_free_disk: config.min_free_disk,
            accept: telemetry.ledger.stage("aggregator.accept"),
            metrics,
            health: queue_health,
            upkeep: Upkeep::default(),
        };
        let committer = std::thread::Builder::new()
            .name("committer".to_owned())
            .spawn(move || committer.run())
            .map_err(|source| StartError::Thread {
                name: "committer",
                source,
            })?;
        let dead_letter_dir = config.queue_dir.clone().unwrap_or_default().join("dead-letter");
        for (index, sink, dataway, client) in clients {
            let DatawayConfig {
                in_flight,
                retry_min,
                retry_max,
                dead_letter_max_bytes,
                ..
            } = dataway;
            let letters = DeadLetters::new(dead_letter_dir.clone(), &sink.name, dead_letter_max_bytes);
            let delivery = Delivery {
                index,
                sink,
                store: Arc::clone(&store),
                commands: commands.clone(),
                destination: client,
                dead_letters: Arc::new(Mutex::new(letters)),
                gate: Gate::new(retry_min, retry_max),
                in_flight,
                max_age: config.queue_max_age,
                clock,
                metrics: sink_metrics.clone(),
                failure_log: LogLimit::new(FAILURE_LOG_PERIOD),
            };
            deliveries.spawn(delivery.run(stop_delivering.clone()));
        }
        let pipeline = Pipeline::new(commands.clone(), config.max_pending_records, stop_accepting.clone());
        Ok(Self {
            pipeline: Arc::new(pipeline),
            states,
            commands,
            committer,
            deliveries,
            stop_accepting,
            stop_delivering,
        })
    }

    /// The way in.
    #[must_use]
    pub fn accept(&self) -> Arc<dyn Accept> {
        Arc::clone(&self.pipeline) as Arc<dyn Accept>
    }

    /// The sinks' states now. Reads the head of each queue from disk.
    #[must_use]
    pub fn statuses(&self) -> Vec<SinkStatus> {
        self.states.statuses()
    }

    /// What [`Self::statuses`] tells, for the overview; nothing once this is gone.
    #[must_use]
    pub fn sink_report(&self) -> SinkReport {
        let states = Arc::downgrade(&self.states);
        Arc::new(move || states.upgrade().map(|states| states.statuses()).unwrap_or_default())
    }

    /// Refuses new batches, delivers what is queued until `deadline` has passed, then ends. What is left stays on disk and
    /// is delivered by the next run.
    pub async fn drain(mut self, deadline: Duration) -> Drained {
        let until = Instant::now() + deadline;
        self.stop_accepting.cancel();
        while self.states.sinks.iter().any(|sink| sink.backlog().bodies > 0) && Instant::now() < until {
            tokio::time::sleep(DRAIN_POLL).await;
        }
        self.stop_delivering.cancel();
        while self.deliveries.join_next().await.is_some() {}
        let _ = hand_over(&self.commands, Command::Stop).await;
        let committer = self.committer;
        let _ = tokio::task::spawn_blocking(move || committer.join()).await;
        let left = self
            .states
            .sinks
            .iter()
            .filter(|sink| sink.backlog().points > 0)
            .map(|sink| (sink.name.clone(), sink.backlog().points))
            .collect();
        Drained { left }
    }
}

// === impl States ===

impl Statuses for States {
    fn statuses(&self) -> Vec<SinkStatus> {
        let now = self.clock.unix_ms();
        let oldest = |sink: &Sink| {
            let (_, meta) = self.store.waiting(sink.slot?, 0, 1).ok()?.pop()?;
            Some(Duration::from_millis(now.saturating_sub(meta.created_ms)))
        };
        self.sinks.iter().map(|sink| sink.status(oldest(sink))).collect()
    }
}

fn outlet(config: &SinkConfig, sink: &Arc<Sink>, slot: Option<u32>) -> Result<Outlet, StartError> {
    match (&config.kind, slot) {
        (SinkKind::Dataway(_), slot) => Ok(Outlet::Queue(slot.unwrap_or_default())),
        (SinkKind::File(file), _) => match FileSink::open(file.clone()) {
            Ok(open) => Ok(Outlet::File(open)),
            Err(source) => Err(StartError::File {
                sink: config.name.clone(),
                path: file.path.clone(),
                source,
            }),
        },
        (SinkKind::Stdout(format), _) => Terminal::start(*format, Arc::clone(sink))
            .map(Outlet::Terminal)
            .map_err(|source| StartError::Thread { name: "stdout", source }),
    }
}

/// Bodies of sinks that are no longer configured: kept while they are young, in case the sink comes back.
fn drop_orphans(store: &Store, config: &AggregatorConfig, clock: QueueClock) -> Result<(), StoreError> {
    let configured: HashSet<&str> = config.sinks.iter().map(|sink| sink.name.as_str()).collect();
    for (name, slot) in store.sinks()? {
        if configured.contains(name.as_str()) {
            continue;
        }
        let backlog = store.backlog(slot)?;
        let newest = match backlog.next_id.checked_sub(1) {
            Some(last) => store
                .waiting(slot, last, 1)?
                .pop()
                .map_or(0, |(_, meta)| meta.created_ms),
            None => 0,
        };
        let age = Duration::from_millis(clock.unix_ms().saturating_sub(newest));
        if age > config.queue_max_age {
            let points = store.drop_sink(&name, slot)?;
            if points > 0 {
                tracing::warn!(
                    sink = name,
                    points,
                    "Dropped the expired queue of a sink that is no longer configured"
                );
            }
        } else {
            tracing::warn!(
                sink = name,
                points = backlog.points,
                "The queue holds points of a sink that is not configured; they wait until it is, or until they expire"
            );
        }
    }
    Ok(())
}
