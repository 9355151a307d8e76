//! The agent as a process: capture threads, uplink, admin server, and their orderly end.
//!
//! ```text
//! capture thread ▶ channel (4 batches) ▶ forwarder task ▶ uplink window ▶ aggregator (remote, or in this process)
//! ```
//! Entry: [`run`].

use std::{sync::Arc, time::Duration};

use aggregator::{Aggregator, config::AggregatorConfig};
use anyhow::{Context as _, bail};
use api::AgentConfig;
use proto::convert::FeatureState;
use records::{Globals, RecordBatch};
use telemetry::Telemetry;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};
use tokio_util::sync::CancellationToken;

use crate::{
    capture::ebpf_net::{NetCapture, NetCaptureConfig},
    doctor::with_unbuilt,
    ebpf::{
        capability::{Capabilities, Feature, State},
        net::LoadOptions,
        offsets::CgroupHierarchy,
        privileges,
    },
    uplink::{ClientTls, GrpcConfig, Transport, Uplink, UplinkConfig},
};

/// Batches between the capture thread and the uplink: enough to hand over a flush while the last one is being sent.
const CHANNEL: usize = 4;
/// Time given to records on their way when stopping.
const DRAIN: Duration = Duration::from_secs(10);
/// Rows kept at most; a flush is made early at half of them. About 250 bytes each.
const ROWS_MAX: usize = 100_000;

/// Where records go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// To the aggregator of option `aggregator`.
    Agent,
    /// To an aggregator in this process.
    Standalone,
}

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// What keeps the agent from starting; it says what to do.
pub fn run(config: &AgentConfig, refuse: Vec<String>, mode: Mode) -> anyhow::Result<()> {
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
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    for plugin in config.plugins_not_built() {
        tracing::warn!(plugin, "Not in this build; the other plugins run");
    }
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?
        .block_on(serve(config, refuse, mode))
}

async fn serve(config: &AgentConfig, refuse: Vec<String>, mode: Mode) -> anyhow::Result<()> {
    let telemetry = Telemetry::new("node-agent", env!("CARGO_PKG_VERSION"));
    let mut terminate = signal(SignalKind::terminate()).context("cannot watch for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot watch for SIGINT")?;
    let ready = telemetry.health.component("agent");
    let stop_admin = CancellationToken::new();

    // Everything that can be refused is checked before anything is attached.
    let (transport, local) = match mode {
        Mode::Agent => (Transport::Grpc(grpc(config)?), None),
        Mode::Standalone => {
            let settings = AggregatorConfig::from_options(config)?;
            let local = Aggregator::start(settings, &telemetry, CancellationToken::new()).await?;
            (Transport::Local(local.accept()), Some(local))
        }
    };
    let admin = telemetry::admin::serve(config.admin_listen, telemetry.clone(), None, stop_admin.clone()).await?;
    let uplink = UplinkConfig::new(host(config).into(), Arc::new(globals(config)), transport);
    let uplink = Uplink::start(uplink, &telemetry.ledger, CancellationToken::new())?;
    telemetry.register("uplink", |registry| uplink.metrics().register(registry));

    let stop_capture = CancellationToken::new();
    let (out, batches) = mpsc::channel(CHANNEL);
    let (capture, capabilities) = start_capture(config, refuse, &telemetry, out, stop_capture.clone()).await?;
    let features = reported(with_unbuilt(capabilities, config));
    uplink.report(|report| report.features = features);
    let forwarder = tokio::spawn(forward(batches, uplink.clone()));
    ready.set_ok();
    tracing::info!(%admin, version = env!("CARGO_PKG_VERSION"), "Agent is up");

    let mut capture_ended = tokio::task::spawn_blocking(move || capture.join());
    let ended = tokio::select! {
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        ended = &mut capture_ended => Some(ended),
    };
    tracing::info!("Stopping");
    ready.set_stopping();
    stop_capture.cancel();
    let ended = match ended {
        Some(ended) => ended,
        None => capture_ended.await,
    };
    // The capture dropped its sender: the forwarder ends when the channel is empty.
    let forwarded = tokio::time::timeout(DRAIN, forwarder).await;
    let unacked = uplink.drain(DRAIN).await;
    if forwarded.is_err() || unacked.records > 0 {
        tracing::warn!(
            records = unacked.records,
            "Records were not acknowledged in time and are lost"
        );
    }
    if let Some(local) = local {
        for (sink, points) in local.drain(DRAIN).await.left {
            tracing::info!(sink, points, "Points stay in the queue; the next start delivers them");
        }
    }
    log_ledger(&telemetry);
    stop_admin.cancel();
    match ended {
        Ok(Ok(())) => Ok(()),
        _ => bail!("the capture thread ended unexpectedly; see the log above"),
    }
}

async fn start_capture(
    config: &AgentConfig,
    refuse: Vec<String>,
    telemetry: &Telemetry,
    out: mpsc::Sender<RecordBatch>,
    stop: CancellationToken,
) -> anyhow::Result<(std::thread::JoinHandle<()>, Capabilities)> {
    let settings = capture_config(config, refuse);
    let telemetry = telemetry.clone();
    // Loading takes a while and blocks.
    let capture = tokio::task::spawn_blocking(move || NetCapture::start(settings, &telemetry))
        .await?
        .map_err(explain)?;
    for feature in &capture.capabilities().features {
        if feature.reason.is_empty() {
            tracing::info!(feature = feature.name, hook = feature.hook, "Feature is on");
        } else {
            tracing::warn!(feature = feature.name, state = %feature.state, reason = feature.reason, "Feature is limited");
        }
    }
    let capabilities = capture.capabilities().clone();
    let thread = std::thread::Builder::new()
        .name("ebpf-net".into())
        .spawn(move || capture.run(&out, &stop))
        .context("cannot start the capture thread")?;
    Ok((thread, capabilities))
}

/// The features in the words of the agents' protocol.
fn reported(features: Vec<Feature>) -> Vec<proto::convert::Feature> {
    let feature = |feature: Feature| proto::convert::Feature {
        name: feature.name.into(),
        state: match feature.state {
            State::On => FeatureState::On,
            State::Degraded => FeatureState::Degraded,
            State::Off => FeatureState::Off,
        },
        reason: feature.reason.into(),
    };
    features.into_iter().map(feature).collect()
}

/// The capture's settings out of the options.
pub(crate) fn capture_config(config: &AgentConfig, refuse: Vec<String>) -> NetCaptureConfig {
    NetCaptureConfig {
        interval: config.interval,
        loopback: config.net.loopback,
        ipv6_disabled: config.net.ipv6_disabled,
        ephemeral_port: config.net.ephemeral_port,
        proc: config.identity.proc_dir(),
        rows_max: ROWS_MAX,
        load: LoadOptions {
            tcp_connections_max: config.kernel.tcp_connections_max,
            flow_map_entries: config.kernel.flow_map_entries,
            ring_buffer_size: u32::try_from(config.kernel.ring_buffer_size.0).unwrap_or(u32::MAX),
            cgroups: CgroupHierarchy::default(),
            refuse,
        },
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

async fn forward(mut batches: mpsc::Receiver<RecordBatch>, uplink: crate::uplink::UplinkHandle) {
    while let Some(batch) = batches.recv().await {
        uplink.send(batch).await;
    }
}

fn grpc(config: &AgentConfig) -> anyhow::Result<GrpcConfig> {
    let Some(aggregator) = &config.uplink.aggregator else {
        bail!("option aggregator is not set: give the aggregator's URL, or run `node-agent standalone`");
    };
    let mut grpc = GrpcConfig::new(aggregator.to_string());
    let tls = &config.uplink.tls;
    grpc.allow_plaintext = config.uplink.allow_plaintext;
    grpc.tls = match (&tls.cert, &tls.key, &tls.ca) {
        (Some(cert), Some(key), Some(ca)) => Some(ClientTls {
            cert: cert.clone(),
            key: key.clone(),
            ca: ca.clone(),
            server_name: tls.server_name.clone(),
        }),
        (None, None, None) => None,
        _ => bail!("tls_ca, tls_cert and tls_key belong together: the aggregator wants a certificate from the agent"),
    };
    Ok(grpc)
}

fn host(config: &AgentConfig) -> String {
    config
        .identity
        .hostname
        .clone()
        .unwrap_or_else(aggregator::config::hostname)
}

/// Tags of every record: `host`, `service` if set, then the user's.
fn globals(config: &AgentConfig) -> Globals {
    let mut tags = vec![("host".into(), host(config).into())];
    if let Some(service) = &config.identity.service {
        tags.push(("service".into(), service.as_str().into()));
    }
    tags.extend(
        config
            .tags
            .iter()
            .map(|(key, value)| (key.as_str().into(), value.as_str().into())),
    );
    Globals { tags }
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
