//! The strict DataWay stub as a process: prints its address as a JSON line, serves until SIGINT or SIGTERM, then prints
//! its summary as a JSON line. Exit status 1 if a request broke a rule.

use std::{io::Write as _, net::SocketAddr, process::ExitCode};

use anyhow::Context as _;
use clap::Parser;
use testkit::dataway::{DatawayStub, StubConfig};
use tokio::signal::unix::{SignalKind, signal};

/// A strict DataWay that keeps what it decoded and can be told to fail (POST /_stub/fault).
#[derive(Debug, Parser)]
#[command(name = "dataway-stub", version)]
struct Args {
    /// Address to listen on; port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// The only token that is let in.
    #[arg(
        long,
        env = "DATAWAY_STUB_TOKEN",
        hide_env_values = true,
        default_value = "tkn_00000000000000000000000000000000"
    )]
    token: String,
    /// How many decoded points to keep; 0 keeps only sums.
    #[arg(long, default_value_t = 100_000)]
    keep_points: usize,
    /// Largest body after decompression, bytes.
    #[arg(long, default_value_t = 1 << 20)]
    max_raw_body: usize,
    /// A user tag that points may carry; may be given several times.
    #[arg(long = "extra-tag", value_name = "NAME")]
    extra_tags: Vec<String>,
    /// Accept the undocumented keys of the existing collector.
    #[arg(long)]
    compat_keys: bool,
}

fn main() -> anyhow::Result<ExitCode> {
    let Args {
        listen,
        token,
        keep_points,
        max_raw_body,
        extra_tags,
        compat_keys,
    } = Args::parse();
    let config = StubConfig {
        listen,
        token,
        max_raw_body,
        keep_points,
        extra_tags,
        compat_keys,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the runtime")?;
    runtime.block_on(run(config))
}

async fn run(config: StubConfig) -> anyhow::Result<ExitCode> {
    let mut interrupt = signal(SignalKind::interrupt()).context("watch for SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("watch for SIGTERM")?;
    let stub = DatawayStub::start(config).await?;
    print_line(&serde_json::json!({ "listening": stub.addr }))?;
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    let summary = stub.summary();
    stub.stop().await;
    print_line(&serde_json::to_value(&summary).context("write the summary")?)?;
    Ok(if summary.violations_total == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// One line at once, so that a reader of a pipe sees it now.
fn print_line(value: &serde_json::Value) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{value}")
        .and_then(|()| out.flush())
        .context("write to standard output")
}
