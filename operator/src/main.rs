//! The operator as a process: flags, leadership, the loop, probes and metrics.
//!
//! Data flow: arguments ▶ connection to the API server ▶ Lease; while it is ours, [`operator::controller::run`]. A process
//! that loses the Lease ends, so that no two ever write. SIGTERM and SIGINT end the loop after the reconciliation that
//! runs, and give the Lease back.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context as _;
use clap::{Parser, ValueEnum};
use kube::Client;
use operator::{
    controller::{self, Context},
    definition,
    inputs::Settings,
    leader::Leadership,
    lease,
    metrics::Metrics,
};
use telemetry::{
    Telemetry, admin,
    logging::{self, LogConfig},
};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// How long the reconciliation that runs may take to end: less than the Lease holds, which is not renewed meanwhile.
const DRAIN: Duration = Duration::from_secs(5);

/// Turns one EbpfCollector object into node agents and an aggregator.
#[derive(Debug, Parser)]
#[command(name = "operator", version)]
struct Args {
    /// Image of the agents and the aggregator.
    #[arg(long, env = "EBPF_COLLECTOR_IMAGE", value_name = "IMAGE")]
    image: String,
    /// When the image is pulled, unless the object says otherwise; the cluster's default if not given.
    #[arg(long, env = "EBPF_COLLECTOR_IMAGE_PULL_POLICY", value_name = "POLICY",
          value_parser = ["Always", "IfNotPresent", "Never"])]
    image_pull_policy: Option<String>,
    /// Names of Secrets to pull the image with, unless the object says otherwise.
    #[arg(
        long,
        env = "EBPF_COLLECTOR_IMAGE_PULL_SECRETS",
        value_name = "NAMES",
        value_delimiter = ','
    )]
    image_pull_secrets: Vec<String>,
    /// SELinux type of the agents, unless the object says otherwise.
    #[arg(long, env = "EBPF_COLLECTOR_SELINUX_TYPE", value_name = "TYPE")]
    selinux_type: Option<String>,
    /// Bring the definition of EbpfCollector in the cluster to this version's at start.
    #[arg(long, env = "EBPF_OPERATOR_APPLY_DEFINITION")]
    apply_definition: bool,
    /// Namespace of everything that the operator makes: its own.
    #[arg(long, env = "POD_NAMESPACE", value_name = "NAMESPACE")]
    namespace: String,
    /// Name among several operators, of which one works at a time; unique.
    #[arg(long, env = "POD_NAME", value_name = "NAME")]
    pod_name: String,
    /// Address of /metrics, /healthz and /readyz; otherwise port 6062 of every address.
    #[arg(long, env = "EBPF_OPERATOR_ADMIN_LISTEN", value_name = "ADDRESS")]
    admin_listen: Option<SocketAddr>,
    /// off, error, warn, info, debug, trace, or a filter such as info,operator=debug.
    #[arg(long, env = "EBPF_OPERATOR_LOG_LEVEL", value_name = "LEVEL", default_value = "info")]
    log_level: String,
    /// Shape of a log line.
    #[arg(
        long,
        env = "EBPF_OPERATOR_LOG_FORMAT",
        value_name = "FORMAT",
        default_value = "json"
    )]
    log_format: Format,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("operator: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> anyhow::Result<()> {
    let format = match args.log_format {
        Format::Text => logging::LogFormat::Text,
        Format::Json => logging::LogFormat::Json,
    };
    logging::init(&LogConfig {
        level: args.log_level.clone(),
        format,
    })?;
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the runtime")?
        .block_on(serve(args))
}

async fn serve(args: Args) -> anyhow::Result<()> {
    // Another crate may bring a second provider into the build; this one is meant. Being set already is no harm.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let stop = CancellationToken::new();
    let telemetry = Telemetry::new("operator", env!("CARGO_PKG_VERSION"));
    let health = telemetry.health.component("leadership");
    let metrics = Metrics::new(&telemetry);
    listen(args.admin_listen, telemetry, &stop).await?;
    let _stop_admin = stop.drop_guard();
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let client = Client::try_default()
        .await
        .context("find the API server: neither a pod's service account nor a kubeconfig gives one")?;
    let pod_name = args.pod_name;
    let mut leadership = Leadership::new(client.clone(), &args.namespace, &pod_name);
    let settings = Settings {
        namespace: args.namespace,
        image: args.image,
        image_pull_policy: args.image_pull_policy,
        image_pull_secrets: args.image_pull_secrets,
        selinux_type: args.selinux_type,
    };
    let ended = CancellationToken::new();
    let mut worker = None;
    let outcome = loop {
        // A request that hangs must not keep us from seeing that the Lease has run out.
        let pause = match tokio::time::timeout(lease::RENEW, leadership.round()).await {
            Ok(Ok(pause)) => {
                health.set_ok();
                pause
            }
            Ok(Err(error)) => {
                tracing::warn!(%error, "the Lease is not renewed, it is tried again");
                health.set_degraded(error.to_string());
                Duration::from_secs(1)
            }
            Err(_) => {
                tracing::warn!(timeout = ?lease::RENEW, "the API server does not answer about the Lease, it is asked again");
                health.set_degraded("the API server does not answer");
                Duration::ZERO
            }
        };
        match (leadership.is_leader(), &worker) {
            (true, None) => {
                tracing::info!(name = pod_name, "this operator works from now on");
                let instance = Some(pod_name.clone());
                let context = Context::new(client.clone(), settings.clone(), instance, metrics.clone());
                metrics.leads(true);
                let (client, ended) = (client.clone(), ended.clone());
                worker = Some(tokio::spawn(async move {
                    let define = async {
                        if args.apply_definition {
                            definition::keep(client, ended.clone()).await;
                        }
                    };
                    tokio::join!(define, controller::run(context, ended.clone()));
                }));
            }
            (false, Some(_)) => break Err(anyhow::anyhow!("the Lease is lost; another operator may work now")),
            _ => {}
        }
        if worker.as_ref().is_some_and(tokio::task::JoinHandle::is_finished) {
            break Err(anyhow::anyhow!("the loop over EbpfCollector objects ended by itself"));
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = term.recv() => break Ok(()),
            _ = int.recv() => break Ok(()),
        }
    };
    health.set_stopping();
    metrics.leads(false);
    ended.cancel();
    if let Some(worker) = worker {
        let abort = worker.abort_handle();
        // Without the Lease not even the reconciliation that runs may go on.
        if outcome.is_err() || tokio::time::timeout(DRAIN, worker).await.is_err() {
            abort.abort();
        }
    }
    if let Err(error) = leadership.release().await {
        tracing::warn!(%error, "the Lease is not given back and runs out by itself");
    }
    outcome
}

/// Serves the admin routes at `address`, otherwise at every address of either family that this machine has.
async fn listen(
    address: Option<SocketAddr>,
    telemetry: Telemetry,
    stop: &CancellationToken,
) -> Result<SocketAddr, admin::AdminError> {
    if let Some(address) = address {
        return admin::serve(address, telemetry, None, stop.clone()).await;
    }
    let port = admin::DEFAULT_LISTEN.port();
    let (both, old) = (Ipv6Addr::UNSPECIFIED, Ipv4Addr::UNSPECIFIED);
    match admin::serve((both, port).into(), telemetry.clone(), None, stop.clone()).await {
        // A port in use is no better with the other family.
        Err(error) if error.source.kind() != io::ErrorKind::AddrInUse => {
            admin::serve((old, port).into(), telemetry, None, stop.clone()).await
        }
        served => served,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_do_not_contradict_each_other() {
        <Args as clap::CommandFactory>::command().debug_assert();
    }
}
