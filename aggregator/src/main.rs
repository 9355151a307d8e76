//! The aggregator as a process: agents in over gRPC, records out to the sinks, until SIGTERM or SIGINT.
//!
//! Outputs, queue, TLS, log and admin options are those of the agent's table ([`api::options`]): same names, environment
//! variables and defaults. What only this program has is in [`Args`]. Outputs, bounds of the queue and log level change
//! while it runs: with the object of option `collector`, and with the file that holds the token.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use aggregator::{
    config::{AggregatorConfig, ConfigError, SinkKind},
    ingest::{Ingest, IngestConfig, ServerTls},
    live::{Live, Options},
};
use anyhow::Context as _;
use api::{AgentConfig, ConfigBuilder, Group, Kind, Source, collector::EbpfCollectorSpec};
use clap::{Arg, ArgAction, ArgMatches, Args as _, Command, FromArgMatches as _, parser::ValueSource};
use telemetry::{Telemetry, logging};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
};
use tokio_util::sync::CancellationToken;

/// Options of the agent's table outside the groups "Outputs" and "Disk queue" that mean the same here.
const SHARED: [&str; 11] = [
    "collector",
    "kubernetes_url",
    "bearer_token",
    "bearer_token_string",
    "tls_ca",
    "tls_cert",
    "tls_key",
    "allow_plaintext",
    "log_level",
    "log_format",
    "admin_listen",
];

/// Not the table's default: an agent on the same machine has that, and 6063 is where agents connect.
const ADMIN_LISTEN: &str = "127.0.0.1:6064";

/// Options that only the aggregator has.
#[derive(Debug, clap::Args)]
struct Args {
    /// Address that agents connect to
    #[arg(
        long,
        env = "EBPF_AGGREGATOR_LISTEN",
        default_value = "127.0.0.1:6063",
        value_name = "ADDRESS"
    )]
    listen: SocketAddr,
    /// Requests under way at once, per DataWay
    #[arg(
        long,
        env = "EBPF_AGGREGATOR_DATAWAY_IN_FLIGHT",
        default_value_t = 4,
        value_name = "N"
    )]
    dataway_in_flight: usize,
    /// gzip level 1 to 9 for DataWay bodies
    #[arg(long, env = "EBPF_AGGREGATOR_DATAWAY_GZIP_LEVEL", value_name = "LEVEL")]
    dataway_gzip_level: Option<u32>,
    /// Limit of one DataWay request
    #[arg(
        long,
        env = "EBPF_AGGREGATOR_DATAWAY_TIMEOUT",
        default_value = "30s",
        value_name = "DURATION"
    )]
    dataway_timeout: humantime::Duration,
    /// Longest wait between tries when the server names none
    #[arg(
        long,
        env = "EBPF_AGGREGATOR_DATAWAY_RETRY_MAX",
        default_value = "30s",
        value_name = "DURATION"
    )]
    dataway_retry_max: humantime::Duration,
    /// PEM file with further certificate authorities for DataWay
    #[arg(long, env = "EBPF_AGGREGATOR_DATAWAY_CA", value_name = "FILE")]
    dataway_ca: Option<PathBuf>,
    /// Accept any certificate of DataWay
    #[arg(long, env = "EBPF_AGGREGATOR_DATAWAY_INSECURE_TLS")]
    dataway_insecure_tls: bool,
    /// Proxy for DataWay; otherwise HTTP_PROXY, HTTPS_PROXY and NO_PROXY count
    #[arg(
        long,
        env = "EBPF_AGGREGATOR_DATAWAY_PROXY",
        hide_env_values = true,
        value_name = "URL"
    )]
    dataway_proxy: Option<String>,
    /// Bytes that the queue leaves free on its file system
    #[arg(long, env = "EBPF_AGGREGATOR_MIN_FREE_DISK", value_name = "BYTES")]
    min_free_disk: Option<u64>,
    /// Time given to queued records when stopping; what is left stays on disk
    #[arg(
        long,
        env = "EBPF_AGGREGATOR_DRAIN_TIMEOUT",
        default_value = "5s",
        value_name = "DURATION"
    )]
    drain_timeout: humantime::Duration,
}

fn main() -> ExitCode {
    let matches = match command().try_get_matches() {
        Ok(matches) => matches,
        Err(error) => return refuse(&error),
    };
    let sources = sources(&matches);
    let options = match sources.build() {
        Ok(options) => options,
        Err(errors) => {
            eprintln!("{errors}");
            return ExitCode::from(api::EXIT_USAGE);
        }
    };
    let args = match Args::from_arg_matches(&matches) {
        Ok(args) => args,
        Err(error) => return refuse(&error),
    };
    match run(args, options, sources) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The whole chain in one line; nothing in it holds a secret.
            eprintln!("aggregator: {error:#}");
            let usage = error
                .chain()
                .any(|cause| cause.is::<ConfigError>() || cause.is::<api::ConfigErrors>());
            if usage {
                ExitCode::from(api::EXIT_USAGE)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}

/// Prints what is wrong with the words of the command line, or the help or version they ask for.
fn refuse(error: &clap::Error) -> ExitCode {
    let _ = error.print();
    if error.use_stderr() {
        ExitCode::from(api::EXIT_USAGE)
    } else {
        ExitCode::SUCCESS
    }
}

fn command() -> Command {
    // After `augment_args`: that takes the text above `Args` for the program's.
    let mut command = Args::augment_args(Command::new("aggregator").version(env!("CARGO_PKG_VERSION")))
        .about("Takes records from node agents, keeps them on disk, delivers them to DataWay and files");
    for spec in shared_options() {
        let Some(flag) = spec.flag else { continue };
        let variable = spec.env.map(|env| format!(" [env: {env}]")).unwrap_or_default();
        let default = match spec.key {
            "admin_listen" => Some(ADMIN_LISTEN),
            _ => spec.default.filter(|text| !text.is_empty()),
        };
        let default = default.map(|text| format!(" [default: {text}]"));
        let help = format!(
            "{} Accepts {}{}{variable}",
            spec.doc,
            spec.accepts,
            default.unwrap_or_default()
        );
        let arg = Arg::new(spec.key).long(flag).help(help).action(ArgAction::Append);
        command = command.arg(match spec.kind {
            Kind::Switch => arg
                .num_args(0..=1)
                .require_equals(true)
                .default_missing_value("true")
                .value_name("BOOL"),
            Kind::Value | Kind::List | Kind::Map => arg.value_name("VALUE"),
        });
    }
    command
}

fn shared_options() -> impl Iterator<Item = &'static api::OptionSpec> {
    api::options()
        .iter()
        .filter(|spec| matches!(spec.group, Group::Outputs | Group::Queue) || SHARED.contains(&spec.key))
}

fn sources(matches: &ArgMatches) -> ConfigBuilder {
    let mut builder = ConfigBuilder::new();
    builder.set("admin_listen", Source::Default, ADMIN_LISTEN);
    builder.process_env();
    for spec in shared_options() {
        if spec.flag.is_some() && matches.value_source(spec.key) == Some(ValueSource::CommandLine) {
            for value in matches.get_many::<String>(spec.key).into_iter().flatten() {
                builder.set(spec.key, Source::Flag, value);
            }
        }
    }
    builder
}

fn run(args: Args, options: AgentConfig, sources: ConfigBuilder) -> anyhow::Result<()> {
    let format = match options.log.format {
        api::LogFormat::Text => logging::LogFormat::Text,
        api::LogFormat::Json => logging::LogFormat::Json,
    };
    logging::init(&logging::LogConfig {
        level: options.log.level.clone(),
        format,
    })?;
    for warning in &options.warnings {
        tracing::warn!("{warning}");
    }
    if options.kubernetes.collector.is_none() {
        // Refused before anything is opened.
        aggregator_config(&args, &options)?;
    }
    let ingest = ingest_config(&args, &options)?;
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the runtime")?
        .block_on(serve(args, Arc::new(options), sources, ingest))
}

fn aggregator_config(args: &Args, options: &AgentConfig) -> anyhow::Result<AggregatorConfig> {
    let mut config = AggregatorConfig::from_options(options)?;
    if options.kubernetes.collector.is_some() {
        // A DataWay may come with a change.
        config.queue_dir = Some(options.queue.dir.clone());
    }
    config.min_free_disk = args.min_free_disk.unwrap_or(config.min_free_disk);
    for sink in &mut config.sinks {
        if let SinkKind::Dataway(dataway) = &mut sink.kind {
            dataway.in_flight = args.dataway_in_flight;
            if options.outputs.dataway_gzip {
                dataway.gzip_level = args.dataway_gzip_level.unwrap_or(dataway.gzip_level);
            }
            dataway.timeout = args.dataway_timeout.into();
            dataway.retry_max = args.dataway_retry_max.into();
            dataway.retry_min = dataway.retry_min.min(dataway.retry_max);
            dataway.ca_file.clone_from(&args.dataway_ca);
            dataway.insecure_tls = args.dataway_insecure_tls;
            dataway.proxy.clone_from(&args.dataway_proxy);
        }
    }
    config.validate()?;
    Ok(config)
}

fn ingest_config(args: &Args, options: &AgentConfig) -> anyhow::Result<IngestConfig> {
    let mut ingest = IngestConfig::new(args.listen);
    let tls = &options.uplink.tls;
    ingest.allow_plaintext = options.uplink.allow_plaintext;
    ingest.tls = match (&tls.cert, &tls.key, &tls.ca) {
        (Some(cert), Some(key), Some(client_ca)) => Some(ServerTls {
            cert: cert.clone(),
            key: key.clone(),
            client_ca: client_ca.clone(),
            reload_interval: Duration::from_secs(30),
        }),
        (None, None, None) => None,
        _ => anyhow::bail!(
            "tls_ca, tls_cert and tls_key belong together: agents are let in by a certificate that tls_ca signed"
        ),
    };
    ingest.validate()?;
    Ok(ingest)
}

async fn serve(
    args: Args,
    local: Arc<AgentConfig>,
    sources: ConfigBuilder,
    ingest: IngestConfig,
) -> anyhow::Result<()> {
    let telemetry = Telemetry::new("aggregator", env!("CARGO_PKG_VERSION"));
    // Signals from here on are seen, also while the queue is being opened.
    let mut signals = Signals::watch()?;
    let (stop, stop_admin) = (CancellationToken::new(), CancellationToken::new());
    let state = telemetry.health.fatal_component("ingest");
    let admin = telemetry::admin::serve(local.admin_listen, telemetry.clone(), None, stop_admin.clone()).await?;
    let starting = async {
        let mut options = options(&local, sources, &telemetry).await?;
        let build = |options: &AgentConfig| aggregator_config(&args, options);
        let live = Live::start(build, &mut options, &telemetry).await?;
        anyhow::Ok((live, options))
    };
    let (mut live, mut options) = tokio::select! {
        started = starting => started?,
        () = signals.any() => return Ok(()),
    };
    let ingest = Ingest::bind(ingest).await?.with_sinks(live.aggregator.sink_report());
    telemetry.register("ingest", |registry| ingest.metrics().register(registry));
    let address = ingest.local_addr();
    tracing::info!(%address, %admin, version = env!("CARGO_PKG_VERSION"), "Aggregator is up");
    state.set_ok();

    // A task of its own: agents are served while outputs change.
    let mut serving = tokio::spawn(ingest.serve(live.aggregator.accept(), telemetry.ledger.clone(), stop.clone()));
    let ended = tokio::select! {
        ended = &mut serving => ended,
        () = live.run(&mut options) => shut(&stop, &mut serving).await,
        () = signals.any() => shut(&stop, &mut serving).await,
    };
    let drained = live.aggregator.drain(args.drain_timeout.into()).await;
    for (sink, points) in &drained.left {
        tracing::warn!(sink, points, "Points stay in the queue; the next start delivers them");
    }
    stop_admin.cancel();
    ended.context("serve agents")?.context("serve agents")
}

/// The options as they change: fixed, or with those of the object.
async fn options(local: &Arc<AgentConfig>, sources: ConfigBuilder, telemetry: &Telemetry) -> anyhow::Result<Options> {
    let Some(name) = &local.kubernetes.collector else {
        return Ok(watch::channel(Arc::clone(local)).1);
    };
    let client = follow::connect(&local.kubernetes).await?;
    let build = move |spec: &EbpfCollectorSpec| sources.clone().object(spec.aggregator_options()).build();
    let health = telemetry.health.component("collector");
    Ok(follow::follow(client, name, health, build).await.config)
}

async fn shut<F: Future<Output = T> + Unpin, T>(stop: &CancellationToken, serving: &mut F) -> T {
    tracing::info!("Stopping");
    stop.cancel();
    serving.await
}

/// SIGTERM and SIGINT.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

// === impl Signals ===

impl Signals {
    fn watch() -> anyhow::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).context("watch for SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("watch for SIGINT")?,
        })
    }

    async fn any(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
