//! The agent as a process: capture threads, uplink, admin server, and their orderly end.
//!
//! ```text
//! capture thread ▶ channel (4 batches) ▶ forwarder task (sampling) ▶ uplink window ▶ aggregator (remote, or in this process)
//! EbpfCollector object ▶ configuration ▶ captures, uplink's tags, log level: all while they run (option collector)
//! ```
//! Entry: [`run`].

mod captures;
mod identity;
mod live;
mod options;
mod sampling;
mod side;

use std::{sync::Arc, time::Duration};

use aggregator::{Aggregator, config::AggregatorConfig};
use anyhow::Context as _;
use api::{AgentConfig, ConfigBuilder, collector::EbpfCollectorSpec};
use follow::Followed;
use rand::SeedableRng as _;
use records::RecordBatch;
use telemetry::{Stage, Telemetry};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{mpsc, watch},
};
use tokio_util::sync::CancellationToken;

pub(crate) use self::options::{
    bash_config, capture_config, conntrack_config, dns_config, http_config, packet_config, tls_config,
};
use self::{
    captures::Captures,
    live::Live,
    options::{globals, grpc, host},
    sampling::Sampler,
};
use crate::{
    cli,
    ebpf::{privileges, sys::monotonic_ns},
    uplink::{Transport, Uplink, UplinkConfig},
};

/// Batches between the capture thread and the uplink: enough to hand over a flush while the last one is being sent.
const CHANNEL: usize = 4;
/// Time given to records on their way when stopping.
const DRAIN: Duration = Duration::from_secs(10);

/// Where records go.
#[derive(Debug)]
pub enum Mode {
    /// To the aggregator of option `aggregator`. With option `collector`, the object comes between these sources.
    Agent(Box<ConfigBuilder>),
    /// To an aggregator in this process.
    Standalone,
}

/// The cluster that the agent is a part of.
#[derive(Clone)]
pub struct Cluster {
    /// Its API server.
    pub client: kube::Client,
    /// The agent's node, by name.
    pub node: String,
    /// All options, as they change.
    pub config: watch::Receiver<Arc<AgentConfig>>,
    /// The object's spec, as it changes: which plugins run for which namespace.
    pub spec: watch::Receiver<Arc<EbpfCollectorSpec>>,
}

/// SIGTERM and SIGINT.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// What keeps the agent from starting; it says what to do.
pub fn run(config: AgentConfig, refuse: Vec<String>, mode: Mode) -> anyhow::Result<()> {
    let format = match config.log.format {
        api::LogFormat::Text => telemetry::logging::LogFormat::Text,
        api::LogFormat::Json => telemetry::logging::LogFormat::Json,
    };
    telemetry::logging::init(&telemetry::logging::LogConfig {
        level: config.log.level.clone(),
        format,
    })
    .map_err(|error| match error {
        telemetry::logging::LogError::Filter { level, reason } => {
            anyhow::Error::new(api::ConfigErrors(vec![api::ConfigError {
                option: "log_level".into(),
                value: Some(level),
                origin: None,
                problem: reason,
                accepted: Some("off, error, warn, info, debug, trace, or a list such as info,node_agent=debug".into()),
            }]))
        }
        error @ telemetry::logging::LogError::AlreadySet => error.into(),
    })?;
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?
        .block_on(serve(Arc::new(config), refuse, mode))
}

async fn serve(local: Arc<AgentConfig>, refuse: Vec<String>, mode: Mode) -> anyhow::Result<()> {
    let telemetry = Telemetry::new("node-agent", env!("CARGO_PKG_VERSION"));
    let mut signals = Signals::watch()?;
    let ready = telemetry.health.component("agent");
    let stop_admin = CancellationToken::new();

    // Everything that can be refused is checked before anything is attached.
    let (transport, aggregator) = match &mode {
        Mode::Agent(_) => (Transport::Grpc(grpc(&local)?), None),
        Mode::Standalone => {
            let settings = AggregatorConfig::from_options(&local)?;
            let aggregator = Aggregator::start(settings, &telemetry, CancellationToken::new()).await?;
            (Transport::Local(aggregator.accept()), Some(aggregator))
        }
    };
    let admin = telemetry::admin::serve(local.admin_listen, telemetry.clone(), None, stop_admin.clone()).await?;
    let followed = match (mode, &local.kubernetes.collector) {
        (Mode::Agent(sources), Some(name)) => {
            tokio::select! {
                followed = follow(&local, name, *sources, &telemetry) => Some(followed?),
                () = signals.any() => return Ok(()),
            }
        }
        _ => None,
    };
    let config = followed
        .as_ref()
        .map_or(local, |followed| Arc::clone(&followed.config.borrow()));
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    for plugin in config.plugins_not_built() {
        tracing::warn!(plugin, "Not in this build; the other plugins run");
    }

    let uplink = UplinkConfig::new(host(&config).into(), Arc::new(globals(&config)), transport);
    let uplink = Uplink::start(uplink, &telemetry.ledger, CancellationToken::new())?;
    telemetry.register("uplink", |registry| uplink.metrics().register(registry));
    let cluster = match &followed {
        Some(followed) => Some(Cluster {
            client: follow::connect(&config.kubernetes).await?,
            node: host(&config),
            config: followed.config.clone(),
            spec: followed.spec.clone(),
        }),
        None => None,
    };

    let stop_captures = CancellationToken::new();
    let (out, batches) = mpsc::channel(CHANNEL);
    let captures = Captures::start(&telemetry, refuse, out, uplink.clone(), Arc::clone(&config), cluster).await?;
    let options = followed.as_ref().map_or_else(
        || watch::channel(Arc::clone(&config)).1,
        |followed| followed.config.clone(),
    );
    let sampling = telemetry.ledger.stage("agent.sampling");
    let forwarder = tokio::spawn(forward(batches, uplink.clone(), options, sampling));
    if let Some(followed) = followed {
        tokio::spawn(Live::new(followed, config, uplink.clone(), &telemetry).run());
    }
    ready.set_ok();
    tracing::info!(%admin, version = env!("CARGO_PKG_VERSION"), "Agent is up");

    let collecting = captures.run(stop_captures.clone());
    tokio::pin!(collecting);
    let ended = tokio::select! {
        () = signals.any() => None,
        ended = &mut collecting => Some(ended),
    };
    tracing::info!("Stopping");
    ready.set_stopping();
    stop_captures.cancel();
    let ended = match ended {
        Some(ended) => ended,
        None => collecting.await,
    };
    // The captures dropped their sender: the forwarder ends when the channel is empty.
    let forwarded = tokio::time::timeout(DRAIN, forwarder).await;
    let unacked = uplink.drain(DRAIN).await;
    if forwarded.is_err() || unacked.records > 0 {
        tracing::warn!(
            records = unacked.records,
            "Records were not acknowledged in time and are lost"
        );
    }
    if let Some(aggregator) = aggregator {
        for (sink, points) in aggregator.drain(DRAIN).await.left {
            tracing::info!(sink, points, "Points stay in the queue; the next start delivers them");
        }
    }
    log_ledger(&telemetry);
    stop_admin.cancel();
    ended
}

/// Waits for the object, and follows it from then on.
async fn follow(
    local: &AgentConfig,
    name: &str,
    sources: ConfigBuilder,
    telemetry: &Telemetry,
) -> anyhow::Result<Followed> {
    let client = follow::connect(&local.kubernetes).await?;
    let build = move |spec: &EbpfCollectorSpec| {
        let config = sources.clone().object(spec.agent_options()).build()?;
        cli::check("run", &config)?;
        Ok(config)
    };
    Ok(follow::follow(client, name, telemetry.health.component("collector"), build).await)
}

// === impl Signals ===

impl Signals {
    fn watch() -> anyhow::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).context("cannot watch for SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("cannot watch for SIGINT")?,
        })
    }

    async fn any(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Adds what privileges are missing, if their lack can be the cause.
pub(crate) fn explain(error: anyhow::Error) -> anyhow::Error {
    let denied = error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<std::io::Error>())
        .any(|cause| cause.kind() == std::io::ErrorKind::PermissionDenied);
    let missing: Vec<String> = privileges::missing()
        .iter()
        .map(|p| format!("{} ({})", p.name, p.reason))
        .collect();
    if missing.is_empty() || !denied {
        return error;
    }
    error.context(format!(
        "cannot collect; this process lacks {}. Run it as root or give it these capabilities",
        missing.join(", ")
    ))
}

/// An error with its causes on one line; what a cause only repeats is left out.
#[must_use]
pub fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if line.contains(cause.as_str()) {
            continue;
        }
        if !line.is_empty() {
            line.push_str(": ");
        }
        line.push_str(&cause);
    }
    line
}

/// Hands records on to the uplink, those that sampling keeps.
async fn forward(
    mut batches: mpsc::Receiver<RecordBatch>,
    uplink: crate::uplink::UplinkHandle,
    config: watch::Receiver<Arc<AgentConfig>>,
    stage: Stage,
) {
    let mut sampler = Sampler::new(rand::rngs::SmallRng::from_os_rng());
    while let Some(mut batch) = batches.recv().await {
        let records = batch.len() as u64;
        let sampling = config.borrow().sampling.clone();
        let left_out = sampler.keep(&mut batch, &sampling, monotonic_ns());
        stage.entered(records);
        stage.skipped("sampled", left_out);
        if !batch.is_empty() {
            uplink.send(batch).await;
        }
        stage.emitted(records - left_out);
    }
}

/// The last word: what entered, left and was lost at each hand-off.
fn log_ledger(telemetry: &Telemetry) {
    for (stage, counts) in telemetry.ledger.snapshot() {
        tracing::info!(
            stage,
            entered = counts.entered,
            emitted = counts.emitted,
            skipped = ?counts.skipped,
            lost = ?counts.lost,
            pending = counts.pending(),
            "Ledger"
        );
    }
}
