//! Puts the parts together: queue file, committer thread, delivery tasks; and takes them apart again.

mod sinks;

use std::{
    collections::{HashMap, HashSet},
    io,
    path::PathBuf,
    sync::{Arc, mpsc},
    thread::JoinHandle,
    time::Duration,
};

use parking_lot::RwLock;
use telemetry::Telemetry;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::sinks::{Sinks, States};
use crate::{
    OpenError,
    config::{AggregatorConfig, ConfigError},
    ingest::SinkReport,
    pipeline::{
        Accept, Pipeline,
        committer::{COMMANDS, Command, Committer, Upkeep, hand_over},
        dedup::Dedup,
        encode::Encoders,
        metrics::PipelineMetrics,
    },
    queue::{PkgIds, QueueClock, Store, StoreError},
    route::Plan,
    sinks::{
        SinkStatus,
        dataway::ClientError,
        flow_metrics::FlowMetricsInUse,
        metrics::{SinkMetrics, StatusCollector, Statuses},
    },
};

/// How often [`Aggregator::drain`] looks whether all is delivered.
const DRAIN_POLL: Duration = Duration::from_millis(20);

/// A running aggregator.
pub struct Aggregator {
    config: AggregatorConfig,
    pipeline: Arc<Pipeline>,
    sinks: Sinks,
    commands: mpsc::SyncSender<Command>,
    committer: JoinHandle<()>,
    stop_accepting: CancellationToken,
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
        let stop_accepting = stop.child_token();
        let states = Arc::new(States {
            sinks: RwLock::default(),
            store: Arc::clone(&store),
            clock,
        });
        let source: Arc<dyn Statuses> = states.clone();
        telemetry.register("sink", |registry| {
            registry.register_collector(Box::new(StatusCollector(Arc::downgrade(&source))));
        });
        let flow_metrics = FlowMetricsInUse::default();
        // Under names of their own.
        telemetry
            .registry
            .lock()
            .register_collector(Box::new(flow_metrics.clone()));
        let mut sinks = Sinks {
            known: HashMap::new(),
            tasks: HashMap::new(),
            ended: HashMap::new(),
            states: Arc::clone(&states),
            commands: commands.clone(),
            metrics: sink_metrics,
            flow_metrics,
            ledger: telemetry.ledger.clone(),
            health: telemetry.health.clone(),
        };
        let prepared = sinks.prepare(&config, None)?;
        let committer = Committer {
            commands: requests,
            store,
            sinks: Vec::new(),
            retired: Vec::new(),
            plan: Plan::new(&[]),
            dedup,
            encoders: Encoders::new(),
            conversations: None,
            started: std::time::Instant::now(),
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
        sinks.put_to_use(&config, prepared).await;
        let pipeline = Pipeline::new(commands.clone(), config.max_pending_records, stop_accepting.clone());
        Ok(Self {
            config,
            pipeline: Arc::new(pipeline),
            sinks,
            commands,
            committer,
            stop_accepting,
        })
    }

    /// Takes over other outputs and bounds of the queue while it runs; true if anything changed. Records accepted before
    /// go to the outputs of before, or wait for them in the queue. On an error everything stays as it was.
    ///
    /// # Errors
    /// [`StartError`] names what cannot be used.
    pub async fn reconfigure(&mut self, mut config: AggregatorConfig) -> Result<bool, StartError> {
        // What belongs to the start of the process.
        config.queue_dir.clone_from(&self.config.queue_dir);
        config.hostname.clone_from(&self.config.hostname);
        config.min_free_disk = self.config.min_free_disk;
        config.commit_linger = self.config.commit_linger;
        config.max_pending_records = self.config.max_pending_records;
        if config == self.config {
            return Ok(false);
        }
        config.validate()?;
        let prepared = self.sinks.prepare(&config, Some(&self.config))?;
        self.sinks.put_to_use(&config, prepared).await;
        self.config = config;
        Ok(true)
    }

    /// The way in.
    #[must_use]
    pub fn accept(&self) -> Arc<dyn Accept> {
        Arc::clone(&self.pipeline) as Arc<dyn Accept>
    }

    /// The sinks' states now. Reads the head of each queue from disk.
    #[must_use]
    pub fn statuses(&self) -> Vec<SinkStatus> {
        self.sinks.states.statuses()
    }

    /// What [`Self::statuses`] tells, for the overview; nothing once this is gone.
    #[must_use]
    pub fn sink_report(&self) -> SinkReport {
        let states = Arc::downgrade(&self.sinks.states);
        Arc::new(move || states.upgrade().map(|states| states.statuses()).unwrap_or_default())
    }

    /// Refuses new batches, delivers what is queued until `deadline` has passed, then ends. What is left stays on disk and
    /// is delivered by the next run.
    pub async fn drain(self, deadline: Duration) -> Drained {
        let until = Instant::now() + deadline;
        self.stop_accepting.cancel();
        let sinks = self.sinks.states.sinks.read().clone();
        while sinks.iter().any(|sink| sink.backlog().bodies > 0) && Instant::now() < until {
            tokio::time::sleep(DRAIN_POLL).await;
        }
        self.sinks.stop().await;
        let _ = hand_over(&self.commands, Command::Stop).await;
        let committer = self.committer;
        let _ = tokio::task::spawn_blocking(move || committer.join()).await;
        let left = sinks
            .iter()
            .filter(|sink| sink.backlog().points > 0)
            .map(|sink| (sink.name.clone(), sink.backlog().points))
            .collect();
        Drained { left }
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
