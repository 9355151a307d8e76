//! The sinks in use, and the change to others while records come in.
//!
//! ```text
//! configuration ▶ prepare (opens what is new; may be refused, nothing has changed) ▶ put_to_use:
//!     delivery tasks of changed sinks end ▶ committer changes over ▶ delivery tasks begin where those before ended
//! ```
//! A sink is known by its name: another address under the same name gets what its queue holds.

use std::{
    collections::HashMap,
    sync::{Arc, mpsc},
    time::Duration,
};

use parking_lot::{Mutex, RwLock};
use telemetry::{Health, Ledger, LogLimit};
use tokio::sync::oneshot;
use tokio_util::task::AbortOnDropHandle;

use super::StartError;
use crate::{
    config::{AggregatorConfig, SinkConfig, SinkKind},
    pipeline::committer::{Change, Command, Outlet, hand_over},
    queue::{QueueClock, Store, StoreError},
    route::Plan,
    sinks::{
        Sink, SinkStatus,
        dataway::Client,
        dataway::ClientError,
        dead_letter::DeadLetters,
        deliver::{Delivery, Destination, Ending, Progress},
        flow_metrics::FlowMetricsInUse,
        gate::Gate,
        kafka::KafkaClient,
        loki::LokiClient,
        metrics::{SinkMetrics, Statuses},
        text::{FileSink, Terminal},
    },
};

/// At most one log line about failed deliveries per sink in this time.
const FAILURE_LOG_PERIOD: Duration = Duration::from_secs(10);

/// All sinks.
pub(super) struct Sinks {
    /// Those ever in use, by name: their counters go on if they come back. Names are few.
    pub(super) known: HashMap<String, Arc<Sink>>,
    /// Delivery tasks.
    pub(super) tasks: HashMap<String, Task>,
    /// Where the delivery of sinks that are not in use ended.
    pub(super) ended: HashMap<String, Progress>,
    pub(super) states: Arc<States>,
    pub(super) commands: mpsc::SyncSender<Command>,
    pub(super) metrics: SinkMetrics,
    pub(super) flow_metrics: FlowMetricsInUse,
    pub(super) ledger: Ledger,
    pub(super) health: Health,
}

/// The delivery task of a sink.
pub(super) struct Task {
    ending: Ending,
    running: AbortOnDropHandle<Progress>,
}

/// Sinks in use and queue, for status and metrics.
pub(super) struct States {
    pub(super) sinks: RwLock<Vec<Arc<Sink>>>,
    pub(super) store: Arc<Store>,
    pub(super) clock: QueueClock,
}

/// What carries bodies to a destination, and how.
struct Carrier {
    destination: Box<dyn Destination>,
    in_flight: usize,
    retry_min: Duration,
    retry_max: Duration,
    dead_letter_max_bytes: u64,
}

/// One sink, ready to be put to use.
pub(super) struct Prepared {
    sink: Arc<Sink>,
    /// `None` to keep the one it has.
    outlet: Option<Outlet>,
    /// `None` to keep the delivery task it has, or for none.
    client: Option<Carrier>,
}

// === impl Sinks ===

impl Sinks {
    /// Opens what `config` needs and `before` has not. Nothing has changed yet.
    ///
    /// # Errors
    /// [`StartError`] names what cannot be used.
    pub(super) fn prepare(
        &mut self,
        config: &AggregatorConfig,
        before: Option<&AggregatorConfig>,
    ) -> Result<Vec<Prepared>, StartError> {
        let mut prepared = Vec::with_capacity(config.sinks.len());
        for sink in &config.sinks {
            let same = before.is_some_and(|before| before.sinks.contains(sink));
            let same_task = same && before.is_some_and(|before| before.queue_max_age == config.queue_max_age);
            prepared.push(self.prepare_one(config, sink, same, same_task)?);
        }
        Ok(prepared)
    }

    fn prepare_one(
        &mut self,
        config: &AggregatorConfig,
        wanted: &SinkConfig,
        same: bool,
        same_task: bool,
    ) -> Result<Prepared, StartError> {
        let store = Arc::clone(&self.states.store);
        let read_error = |error: StoreError| StartError::QueueRead {
            dir: store.path().map(|path| path.display().to_string()).unwrap_or_default(),
            why: error.to_string(),
        };
        let client = if same_task {
            None
        } else {
            carrier(&wanted.kind, &config.hostname).map_err(|source| StartError::Client {
                sink: wanted.name.clone(),
                source,
            })?
        };
        let sink = match self.known.get(&wanted.name) {
            Some(known) => Arc::clone(known),
            None => {
                let slot = if wanted.kind.is_queued() {
                    Some(store.slot(&wanted.name).map_err(read_error)?)
                } else {
                    None
                };
                let sink = Sink::new(wanted, slot, config.queue_max_bytes, &self.ledger, &self.health);
                if let Some(slot) = slot {
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
                }
                let sink = Arc::new(sink);
                self.known.insert(wanted.name.clone(), Arc::clone(&sink));
                sink
            }
        };
        let outlet = if same { None } else { Some(self.outlet(wanted, &sink)?) };
        Ok(Prepared { sink, outlet, client })
    }

    fn outlet(&self, config: &SinkConfig, sink: &Arc<Sink>) -> Result<Outlet, StartError> {
        outlet(config, sink, &self.flow_metrics)
    }

    /// Changes over to `prepared`, made from `config`.
    pub(super) async fn put_to_use(&mut self, config: &AggregatorConfig, prepared: Vec<Prepared>) {
        let in_use = |name: &str| prepared.iter().find(|one| one.sink.name == name);
        let ending: Vec<String> = self
            .tasks
            .keys()
            .filter(|name| in_use(name).is_none_or(|one| one.client.is_some()))
            .cloned()
            .collect();
        self.retire(ending).await;
        for sink in self
            .states
            .sinks
            .read()
            .iter()
            .filter(|sink| in_use(&sink.name).is_none())
        {
            sink.well();
            let points = sink.backlog().points;
            tracing::info!(
                sink = sink.name,
                points,
                "Sink is no longer in use; what its queue holds waits until it is again, or until it expires"
            );
        }
        for (one, wanted) in prepared.iter().zip(&config.sinks) {
            one.sink.set(wanted, config.queue_max_bytes);
        }
        *self.states.sinks.write() = prepared.iter().map(|one| Arc::clone(&one.sink)).collect();
        let (done, answer) = oneshot::channel();
        let mut deliveries = Vec::new();
        let mut sinks = Vec::new();
        for Prepared { sink, outlet, client } in prepared {
            deliveries.extend(client.map(|client| (Arc::clone(&sink), client)));
            sinks.push((sink, outlet));
        }
        let change = Change {
            sinks,
            plan: Plan::new(&config.sinks),
            conversations: config.conversations,
            done,
        };
        // Without a committer the process is ending, and nothing is delivered any more.
        if hand_over(&self.commands, Command::Change(change)).await.is_err() || answer.await.is_err() {
            return;
        }
        for (sink, carrier) in deliveries {
            self.deliver(config, sink, carrier);
        }
    }

    fn deliver(&mut self, config: &AggregatorConfig, sink: Arc<Sink>, carrier: Carrier) {
        let Carrier {
            destination,
            in_flight,
            retry_min,
            retry_max,
            dead_letter_max_bytes,
        } = carrier;
        let name = sink.name.clone();
        let dead_letter_dir = config.queue_dir.clone().unwrap_or_default().join("dead-letter");
        let letters = DeadLetters::new(dead_letter_dir, &name, dead_letter_max_bytes);
        let delivery = Delivery {
            sink,
            store: Arc::clone(&self.states.store),
            commands: self.commands.clone(),
            destination,
            dead_letters: Arc::new(Mutex::new(letters)),
            gate: Gate::new(retry_min, retry_max),
            in_flight,
            max_age: config.queue_max_age,
            clock: self.states.clock,
            metrics: self.metrics.clone(),
            failure_log: LogLimit::new(FAILURE_LOG_PERIOD),
        };
        let ending = Ending::default();
        let progress = self.ended.remove(&name).unwrap_or_default();
        let running = AbortOnDropHandle::new(tokio::spawn(delivery.run(progress, ending.clone())));
        self.tasks.insert(name, Task { ending, running });
    }

    /// Ends delivery tasks, to go on later where they were.
    async fn retire(&mut self, names: Vec<String>) {
        let tasks: Vec<(String, Task)> = names
            .into_iter()
            .filter_map(|name| self.tasks.remove_entry(&name))
            .collect();
        for (_, task) in &tasks {
            task.ending.retire.cancel();
        }
        for (name, task) in tasks {
            // A task that failed has delivered what it has: the next one looks at the whole queue again.
            self.ended.insert(name, task.running.await.unwrap_or_default());
        }
    }

    /// Ends all delivery tasks at once; bodies under way stay in the queue.
    pub(super) async fn stop(self) {
        for task in self.tasks.values() {
            task.ending.stop.cancel();
        }
        for task in self.tasks.into_values() {
            let _ = task.running.await;
        }
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
        let sinks = self.sinks.read().clone();
        sinks.iter().map(|sink| sink.status(oldest(sink))).collect()
    }
}

fn carrier(kind: &SinkKind, hostname: &str) -> Result<Option<Carrier>, ClientError> {
    Ok(Some(match kind {
        SinkKind::Dataway(dataway) => Carrier {
            destination: Box::new(Client::new(dataway.clone(), hostname)?),
            in_flight: dataway.in_flight,
            retry_min: dataway.retry_min,
            retry_max: dataway.retry_max,
            dead_letter_max_bytes: dataway.dead_letter_max_bytes,
        },
        SinkKind::Kafka(kafka) => Carrier {
            destination: Box::new(KafkaClient::new(kafka.clone())?),
            in_flight: kafka.in_flight,
            retry_min: kafka.retry_min,
            retry_max: kafka.retry_max,
            dead_letter_max_bytes: kafka.dead_letter_max_bytes,
        },
        SinkKind::Loki(loki) => Carrier {
            destination: Box::new(LokiClient::new(loki.clone(), hostname)?),
            // One at a time: entries of a stream arrive in the order in which they were stored.
            in_flight: 1,
            retry_min: loki.retry_min,
            retry_max: loki.retry_max,
            dead_letter_max_bytes: loki.dead_letter_max_bytes,
        },
        SinkKind::Stdout(_) | SinkKind::File(_) | SinkKind::Prometheus(_) => return Ok(None),
    }))
}

fn outlet(config: &SinkConfig, sink: &Arc<Sink>, metrics: &FlowMetricsInUse) -> Result<Outlet, StartError> {
    match &config.kind {
        SinkKind::Dataway(_) | SinkKind::Kafka(_) | SinkKind::Loki(_) => {
            Ok(Outlet::Queue(sink.slot.unwrap_or_default()))
        }
        SinkKind::Prometheus(config) => Ok(Outlet::Metrics(metrics.put_to_use(&config.metrics, config.limits()))),
        SinkKind::File(file) => match FileSink::open(file.clone()) {
            Ok(open) => Ok(Outlet::File(open)),
            Err(source) => Err(StartError::File {
                sink: config.name.clone(),
                path: file.path.clone(),
                source,
            }),
        },
        SinkKind::Stdout(_) => Terminal::start(Arc::clone(sink))
            .map(Outlet::Terminal)
            .map_err(|source| StartError::Thread { name: "stdout", source }),
    }
}
