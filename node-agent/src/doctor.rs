//! `node-agent doctor`: what this kernel and these privileges let the agent see, feature by feature, and why not.
//!
//! Loads and attaches everything as the agent would, prints the capability vector, and takes it all away again.

use std::fmt::Write as _;

use anyhow::Context as _;
use api::{AgentConfig, L7Flow, Plugin};
use telemetry::Telemetry;
use tokio::sync::watch;

use crate::{
    agent::{
        bash_config, capture_config, conntrack_config, dns_config, http_config, one_line, packet_config, tls_config,
    },
    capture::{
        bash::{BASH, BashCapture},
        beside::{Beside, Surroundings},
        conntrack::{Conntrack, ConntrackMetrics},
        dns::DnsCapture,
        domains::DomainNames,
        ebpf_net::{Instruments, NetCapture},
        http::HttpCapture,
        packets::{NETLOG, PacketCapture},
        tls::{TlsCapture, unseen},
    },
    ebpf::{
        capability::{Capabilities, Feature, State},
        privileges::{self, WANTED},
        sys::ProgramStats,
    },
    identity::process::Proc,
};

/// Reason of features that a later version will have.
pub(crate) const NOT_IN_THIS_BUILD: &str = "NotInThisBuild";

#[derive(serde::Serialize)]
struct Report {
    kernel: String,
    machine: &'static str,
    btf: bool,
    privileges: Vec<PrivilegeLine>,
    features: Vec<Feature>,
    programs: Vec<ProgramLine>,
    error: Option<String>,
}

#[derive(serde::Serialize)]
struct PrivilegeLine {
    name: &'static str,
    held: bool,
    reason: &'static str,
}

#[derive(serde::Serialize)]
struct ProgramLine {
    name: String,
    verified_instructions: u32,
}

/// Prints the report; false if a feature of this build is off, or nothing can be collected.
///
/// # Errors
/// If the report cannot be written as JSON.
pub fn run(config: &AgentConfig, refuse: Vec<String>, json: bool) -> anyhow::Result<bool> {
    let telemetry = Telemetry::new("node-agent", env!("CARGO_PKG_VERSION"));
    let (_, no_nat) = watch::channel(None);
    let (bash, dns) = (bash_config(config, &refuse), dns_config(config, &refuse));
    let packets = packet_config(config, &refuse);
    let (http, tls) = (http_config(config, &refuse), tls_config(config, &refuse));
    let (mut capabilities, mut programs, error) = match NetCapture::start(
        capture_config(config, refuse),
        &Instruments::new(&telemetry),
        None,
        no_nat,
    ) {
        Ok(capture) => (capture.capabilities().clone(), capture.programs(), None),
        Err(error) => (Capabilities::default(), Vec::new(), Some(one_line(&error))),
    };
    if let Some(settings) = conntrack_config(config) {
        let found = Conntrack::probe(&settings, ConntrackMetrics::default());
        capabilities.features.extend(found.features);
    }
    if let Some(settings) = dns {
        match beside::<DnsCapture>(&settings, &telemetry, &mut capabilities) {
            Ok(capture) => programs.extend(capture.programs()),
            Err(error) => capabilities.off(DnsCapture::NAME, one_line(&error)),
        }
    }
    if let Some(settings) = http {
        match beside::<HttpCapture>(&settings, &telemetry, &mut capabilities) {
            Ok(capture) => programs.extend(capture.programs()),
            Err(error) => capabilities.off(HttpCapture::NAME, one_line(&error)),
        }
    }
    if let Some(settings) = tls {
        match beside::<TlsCapture>(&settings, &telemetry, &mut capabilities) {
            Ok(capture) => programs.extend(capture.programs()),
            Err(error) => capabilities.off(TlsCapture::NAME, one_line(&error)),
        }
    }
    if let Some(settings) = bash {
        match beside::<BashCapture>(&settings, &telemetry, &mut capabilities) {
            Ok(capture) => programs.extend(capture.programs()),
            Err(error) => capabilities.off(BASH, one_line(&error)),
        }
    }
    if let Some(settings) = packets {
        match beside::<PacketCapture>(&settings, &telemetry, &mut capabilities) {
            Ok(mut capture) => {
                programs.extend(capture.programs());
                capture.detach();
            }
            Err(error) => capabilities.off(NETLOG, one_line(&error)),
        }
    }
    let held = privileges::effective().unwrap_or(0);
    let report = Report {
        kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")
            .unwrap_or_default()
            .trim()
            .to_owned(),
        machine: std::env::consts::ARCH,
        btf: std::path::Path::new("/sys/kernel/btf/vmlinux").exists(),
        privileges: WANTED
            .iter()
            .map(|p| PrivilegeLine {
                name: p.name,
                held: held & (1 << p.bit) != 0,
                reason: p.reason,
            })
            .collect(),
        features: with_unbuilt(capabilities, config),
        programs: programs
            .into_iter()
            .map(|(name, ProgramStats { verified_insns, .. })| ProgramLine {
                name,
                verified_instructions: verified_insns,
            })
            .collect(),
        error,
    };
    let works = report.error.is_none()
        && report
            .features
            .iter()
            .all(|f| f.state != State::Off || f.reason == NOT_IN_THIS_BUILD);
    if json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", text(&report));
    }
    Ok(works)
}

/// A process whose TLS cannot be read.
#[derive(serde::Serialize)]
struct BlindLine {
    pid: u32,
    process: String,
    /// It holds TCP sockets.
    sockets: bool,
    reason: &'static str,
    text: String,
}

/// Lists the processes whose TLS cannot be read, whether the plugin is on or not; false if there are any.
///
/// # Errors
/// If nobody's can be read, or the list cannot be written as JSON.
pub fn blind(config: &AgentConfig, refuse: &[String], json: bool) -> anyhow::Result<bool> {
    let mut config = config.clone();
    config.plugins.insert(Plugin::EbpfNet);
    config.net.l7.insert(L7Flow::HttpTls);
    let settings = tls_config(&config, refuse).context("httpflow-tls is off")?;
    let telemetry = Telemetry::new("node-agent", env!("CARGO_PKG_VERSION"));
    let capture = beside::<TlsCapture>(&settings, &telemetry, &mut Capabilities::default())?;
    let proc = Proc::new(&settings.proc);
    let mut lines: Vec<BlindLine> = unseen(capture.source(), &proc)
        .into_iter()
        .map(|(pid, sockets, reason)| BlindLine {
            pid,
            process: proc
                .comm(pid)
                .map_or_else(String::new, |comm| proc.name(pid, &comm).to_string()),
            sockets,
            reason: reason.label(),
            text: reason.to_string(),
        })
        .collect();
    lines.sort_by_key(|line| (line.reason, line.pid));
    if json {
        println!("{}", serde_json::to_string_pretty(&lines)?);
    } else if lines.is_empty() {
        println!("No process is known whose TLS could not be read.");
    } else {
        for line in &lines {
            let sockets = if line.sockets { "TCP" } else { "-" };
            println!(
                "{:>8} {:<16} {sockets:<4} {:<14} {}",
                line.pid, line.process, line.reason, line.text
            );
        }
    }
    Ok(lines.is_empty())
}

/// Starts a capture beside `ebpf-net`, and adds what it can see.
fn beside<C: Beside>(
    settings: &C::Config,
    telemetry: &Telemetry,
    capabilities: &mut Capabilities,
) -> anyhow::Result<C> {
    let (_, nat) = watch::channel(None);
    let with = Surroundings {
        metrics: C::metrics(telemetry),
        telemetry: telemetry.clone(),
        cluster: None,
        nat,
        domains: DomainNames::default(),
        entry: crate::ebpf::entry::Entry::default(),
    };
    let capture = C::start(settings, with)?;
    let told = capture.capabilities();
    capabilities.features.extend(told.borrow().features.iter().cloned());
    Ok(capture)
}

/// All features, those of plugins that are not built among them.
fn with_unbuilt(capabilities: Capabilities, config: &AgentConfig) -> Vec<Feature> {
    let mut features = capabilities.features;
    features.extend(config.plugins_not_built().into_iter().map(|name| Feature {
        name: Box::leak(name.into_boxed_str()),
        state: State::Off,
        hook: String::new(),
        reason: NOT_IN_THIS_BUILD.into(),
    }));
    features
}

fn text(report: &Report) -> String {
    let mut out = String::new();
    let Report {
        kernel,
        machine,
        btf,
        privileges,
        features,
        programs,
        error,
    } = report;
    let types = if *btf {
        "has BTF"
    } else {
        "has no BTF: needs CONFIG_DEBUG_INFO_BTF=y"
    };
    let _ = writeln!(out, "kernel {kernel} on {machine}, {types}\n");
    for privilege in privileges {
        let mark = if privilege.held { "held" } else { "MISSING" };
        let _ = writeln!(out, "{:<22} {mark:<8} {}", privilege.name, privilege.reason);
    }
    out.push('\n');
    for feature in features {
        let hook = if feature.hook.is_empty() { "-" } else { &feature.hook };
        let _ = writeln!(out, "{:<22} {:<8} {hook}", feature.name, feature.state.to_string());
        if !feature.reason.is_empty() {
            let _ = writeln!(out, "{:<31} because {}", "", feature.reason);
        }
    }
    if !programs.is_empty() {
        out.push('\n');
        for program in programs {
            let count = match program.verified_instructions {
                // Kernels before 5.16 keep it to themselves.
                0 => "unknown".to_owned(),
                count => count.to_string(),
            };
            let _ = writeln!(
                out,
                "{:<22} {count:>7} instructions verified (limit 1000000)",
                program.name
            );
        }
    }
    if let Some(error) = error {
        let _ = writeln!(out, "Nothing can be collected here: {error}");
    }
    out
}
