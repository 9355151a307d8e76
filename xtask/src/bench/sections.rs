//! The measurements themselves.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use testkit::exactness::{
    agent::{Agent, AgentOptions},
    compare, flow,
    run::settled_ledger,
};

use super::{
    Effort, http,
    load::{Done, Loads, Place},
    table::{Document, Row, thousands},
};

/// Flush interval of the agent under load.
pub(super) const INTERVAL: Duration = Duration::from_secs(2);
/// Longest wait for the agent to start, to settle, or to end.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
/// Datagrams per second that the agent has to keep up with.
const UDP_RATE: u64 = 200_000;
/// What of `ebpf-net` the agent reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reads {
    /// `netflow` alone.
    Netflow,
    /// What it does by default: `httpflow` and `dnsflow` too.
    Default,
}

impl Reads {
    pub(super) fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Netflow => &["--l7net-disabled=httpflow,httpflow-tls", "--dns-ports="],
            Self::Default => &[],
        }
    }

    /// What rows add to their title.
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Netflow => "",
            Self::Default => ", agent with its default options",
        }
    }
}

/// Everything that the measurements share.
pub(super) struct Bench {
    effort: Effort,
    pub(super) loads: Loads,
    agent: PathBuf,
    agent_arguments: Vec<String>,
    // Removed when dropped, so it comes last.
    directory: tempfile::TempDir,
}

/// Outcome of interleaved runs with and without the agent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pair {
    /// Median rate without the agent.
    pub(super) without: f64,
    /// Median rate with the agent.
    pub(super) with: f64,
    /// Median of the pairs' ratios with/without.
    pub(super) ratio: f64,
    /// Lowest ratio.
    pub(super) lowest: f64,
    /// Highest ratio.
    pub(super) highest: f64,
}

/// A load and the rate that counts.
type Load<'a> = &'a dyn Fn(&Loads, Duration) -> Result<Done>;
type Rate = fn(&Done) -> f64;

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let at = |index: usize| sorted.get(index).copied().unwrap_or(f64::NAN);
    if sorted.len().is_multiple_of(2) {
        f64::midpoint(at(middle.wrapping_sub(1)), at(middle))
    } else {
        at(middle)
    }
}

impl Pair {
    pub(super) fn of(runs: &[(f64, f64)]) -> Self {
        let column = |pick: fn(&(f64, f64)) -> f64| runs.iter().map(pick).collect::<Vec<f64>>();
        let ratios = column(|(without, with)| with / without);
        Self {
            without: median(&column(|run| run.0)),
            with: median(&column(|run| run.1)),
            ratio: median(&ratios),
            lowest: ratios.iter().copied().fold(f64::INFINITY, f64::min),
            highest: ratios.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        }
    }
}

impl Bench {
    pub(super) fn new(effort: Effort, traffic: &Path, agent: &Path, agent_arguments: &[String]) -> Result<Self> {
        let directory = tempfile::tempdir().context("making a working directory")?;
        Ok(Self {
            effort,
            loads: Loads::new(directory.path().join("stage"), traffic)?,
            agent: agent.to_path_buf(),
            agent_arguments: agent_arguments.to_vec(),
            directory,
        })
    }

    /// A place for files.
    pub(super) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// How long and how often.
    pub(super) fn effort(&self) -> Effort {
        self.effort
    }

    /// With `netflow` alone.
    pub(super) fn start_agent(&self, place: Place) -> Result<Agent> {
        self.start_agent_with(place, Reads::Netflow.arguments())
    }

    pub(super) fn start_agent_with(&self, place: Place, arguments: &[&str]) -> Result<Agent> {
        let own = arguments.iter().map(|&argument| argument.to_owned());
        let options = AgentOptions {
            binary: self.agent.clone(),
            interval: INTERVAL,
            loopback: place == Place::Loopback,
            arguments: own.chain(self.agent_arguments.iter().cloned()).collect(),
            directory: self.directory.path().to_path_buf(),
        };
        Agent::start(&options, PATIENCE)
    }

    /// Interleaved runs, the order within a pair turned each time. Returns the pair, what the agent lost in all, and
    /// how many of its counts differ from the processes' own.
    fn pairs(
        &self,
        what: &str,
        (place, reads): (Place, Reads),
        load: Load<'_>,
        rate: Rate,
    ) -> Result<(Pair, u64, u64)> {
        // The first run after a pause is slower or faster than all others.
        load(&self.loads, self.effort.run / 2)?;
        let (mut lost, mut differences) = (0, 0);
        let mut runs = Vec::new();
        for index in 0..self.effort.pairs {
            let mut without = None;
            if index.is_multiple_of(2) {
                without = Some(rate(&load(&self.loads, self.effort.run)?));
            }
            let agent = self.start_agent_with(place, reads.arguments())?;
            let done = load(&self.loads, self.effort.run)?;
            let with = rate(&done);
            std::thread::sleep(INTERVAL / 4);
            let ledger = settled_ledger(&agent, PATIENCE)?;
            lost += ledger.values().map(|stage| stage.lost()).sum::<u64>();
            let flows = flow::read_flows(&agent.stop(PATIENCE)?)?;
            let (checks, _) = compare::compare(&done.reports, &flows);
            // Rows of processes that are not the load's, on the same addresses, are somebody else's traffic.
            for check in checks
                .iter()
                .filter(|check| check.problem.is_some() && check.scenario != compare::WHOLE_TEST)
            {
                differences += 1;
                eprintln!("  difference: {check:?}");
            }
            let without = match without {
                Some(without) => without,
                None => rate(&load(&self.loads, self.effort.run)?),
            };
            eprintln!("  {what}: without {}, with {}", thousands(without), thousands(with));
            runs.push((without, with));
        }
        Ok((Pair::of(&runs), lost, differences))
    }

    pub(super) fn churn(&self, document: &mut Document) -> Result<()> {
        for (place, reads, name) in [
            (Place::Loopback, Reads::Netflow, "loopback"),
            (Place::Veth, Reads::Netflow, "veth"),
            (Place::Veth, Reads::Default, "veth"),
        ] {
            let what = format!("TCP churn, {name}{}", reads.title());
            let (pair, lost, differences) = self.pairs(
                &what,
                (place, reads),
                &|loads, duration| loads.churn(place, duration),
                |done| per(done.clients.connections, done.seconds),
            )?;
            document.pair(
                &format!("{what}: connections with/without agent"),
                "connections/s",
                &pair,
                0.985,
            );
            document.row(Row {
                what: format!("{what}: lost events"),
                measured: lost.to_string(),
                target: "0".to_owned(),
                met: lost == 0,
            });
            document.row(exact(&what, differences));
        }
        Ok(())
    }

    pub(super) fn bulk(&self, document: &mut Document) -> Result<()> {
        let (pair, _, differences) = self.pairs(
            "bulk",
            (Place::Veth, Reads::Netflow),
            &|loads, duration| loads.bulk(Place::Veth, duration),
            |done| per(done.clients.bytes_sent, done.seconds) / 1e6,
        )?;
        document.pair("Bulk transfer: throughput with/without agent", "MB/s", &pair, 0.995);
        document.row(exact("Bulk transfer", differences));
        Ok(())
    }

    pub(super) fn udp(&self, document: &mut Document) -> Result<()> {
        for (rate, name) in [
            (UDP_RATE, "UDP, 200,000 datagrams/s offered"),
            (0, "UDP, as fast as it goes"),
        ] {
            let (pair, lost, differences) = self.pairs(
                name,
                (Place::Veth, Reads::Netflow),
                &|loads, duration| loads.udp(Place::Veth, rate, duration),
                |done| per(done.clients.datagrams_sent, done.seconds),
            )?;
            document.pair(
                &format!("{name}: datagrams with/without agent"),
                "datagrams/s",
                &pair,
                0.95,
            );
            document.row(Row {
                what: format!("{name}: lost events"),
                measured: lost.to_string(),
                target: "0".to_owned(),
                met: lost == 0,
            });
            document.row(exact(name, differences));
        }
        Ok(())
    }

    /// HTTP exchanges with `httpflow` on, beside `netflow` alone.
    pub(super) fn http(&self, document: &mut Document) -> Result<()> {
        http::programs()?;
        let nginx = http::Nginx::start(self.directory.path())?;
        nginx.load(self.effort.run / 2)?;
        let (mut rates, mut latencies) = (Vec::new(), Vec::new());
        let (mut lost, mut differences, mut ends) = (0, 0, 0);
        let (mut agent_seconds, mut ring_bytes) = (0.0, 0.0);
        for index in 0..self.effort.pairs {
            let without = || -> Result<http::Seen> {
                let agent = self.start_agent(Place::Loopback)?;
                let seen = nginx.load(self.effort.run)?;
                agent.stop(PATIENCE)?;
                Ok(seen)
            };
            let before = if index.is_multiple_of(2) {
                Some(without()?)
            } else {
                None
            };
            let agent =
                self.start_agent_with(Place::Loopback, &["--l7net-enabled=httpflow", "--ephemeral-port=10001"])?;
            let idle = cpu_seconds(agent.pid())?;
            let served = nginx.requests()?;
            let with = nginx.load(self.effort.run)?;
            let served = nginx.requests()? - served - 1;
            std::thread::sleep(INTERVAL * 2);
            agent_seconds += cpu_seconds(agent.pid())? - idle;
            ring_bytes += agent.metric("ebpfcollector_httpflow_ring_bytes_total")?.unwrap_or(0.0);
            let ledger = settled_ledger(&agent, PATIENCE)?;
            lost += http::lost(&ledger);
            let (asked, answered) = http::counted(&agent.stop(PATIENCE)?, nginx.port())?;
            ends += asked + answered;
            // What was under way when wrk stopped may have been answered to nobody.
            let under_way = with.requests..=with.requests + http::CONNECTIONS;
            differences += served.abs_diff(answered) + u64::from(!under_way.contains(&asked));
            let without = match before {
                Some(seen) => seen,
                None => without()?,
            };
            eprintln!(
                "  HTTP: without {}, with {}; served {served}, told {answered}; asked {}, told {asked}",
                thousands(without.per_second),
                thousands(with.per_second),
                with.requests
            );
            rates.push((without.per_second, with.per_second));
            latencies.push((without.p99_us, with.p99_us));
        }
        let what = format!("HTTP, nginx and wrk, {} connections", http::CONNECTIONS);
        let pair = Pair::of(&rates);
        document.pair(
            &format!("{what}: requests with/without httpflow"),
            "requests/s",
            &pair,
            0.80,
        );
        document.row(Row {
            what: format!("{what}: lost events"),
            measured: lost.to_string(),
            target: "0".to_owned(),
            met: lost == 0,
        });
        document.row(Row {
            what: format!("{what}: differences from what server and client count"),
            measured: differences.to_string(),
            target: "0".to_owned(),
            met: differences == 0,
        });
        let latency = Pair::of(&latencies);
        // No target is set for full speed, where a longer queue is all that it shows.
        document.text(
            &format!("{what}: 99th percentile of the latency at full speed"),
            &format!(
                "{:.0} us with httpflow, {:.0} us without",
                latency.with, latency.without
            ),
        );
        let ends = ends.max(1) as f64;
        let agent_us = agent_seconds * 1e6 / ends;
        document.row(Row {
            what: format!("{what}: CPU of the agent per exchange end"),
            measured: format!("{agent_us:.2} us"),
            target: "<= 4 us".to_owned(),
            met: agent_us <= 4.0,
        });
        let moved = ring_bytes / ends;
        document.row(Row {
            what: format!("{what}: bytes from kernel to agent per exchange end"),
            measured: format!("{moved:.0}"),
            target: "<= 512".to_owned(),
            met: moved <= 512.0,
        });
        Ok(())
    }

    /// Memory and drain time. Both ends of each connection are on the machine, so the agent tracks two per connection.
    pub(super) fn open_connections(&self, document: &mut Document) -> Result<()> {
        for connections in [25_000_u32, 50_000] {
            let agent = self.start_agent(Place::Veth)?;
            let (rss, seconds, kernel, drained) = self.loads.hold(connections, || {
                std::thread::sleep(INTERVAL * 3);
                let gauge = |name: &str| -> Result<f64> {
                    agent.metric(name)?.with_context(|| format!("/metrics has no `{name}`"))
                };
                let seconds = gauge("ebpfcollector_ebpf_net_sample_cpu_seconds")?;
                Ok((
                    memory_mib(agent.pid(), "VmRSS:")?,
                    seconds,
                    gauge("ebpfcollector_ebpf_net_sample_kernel_cpu_seconds")?,
                    gauge("ebpfcollector_ebpf_net_sample_connections")?,
                ))
            })?;
            agent.stop(PATIENCE)?;
            let title = format!("{} open connections, both ends", thousands(f64::from(connections)));
            document.row(Row {
                what: format!("{title}: resident memory of the agent"),
                measured: format!("{rss:.1} MiB"),
                target: "<= 64 MiB".to_owned(),
                met: rss <= 64.0,
            });
            let user = (seconds - kernel) * 1e9 / drained.max(1.0);
            let inside = kernel * 1e9 / drained.max(1.0);
            document.row(Row {
                what: format!("{title}: drain per connection in user space"),
                measured: format!(
                    "{user:.0} ns, and {inside:.0} ns in the kernel ({} drained in {:.2} ms of CPU)",
                    thousands(drained),
                    seconds * 1e3
                ),
                target: "<= 150 ns".to_owned(),
                met: user <= 150.0 && drained >= f64::from(connections),
            });
        }
        Ok(())
    }
}

fn exact(what: &str, differences: u64) -> Row {
    Row {
        what: format!("{what}: differences from the processes' own counts"),
        measured: differences.to_string(),
        target: "0".to_owned(),
        met: differences == 0,
    }
}

fn per(count: u64, seconds: f64) -> f64 {
    count as f64 / seconds
}

/// User and system time of a process, seconds.
pub(super) fn cpu_seconds(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    // The name in parentheses may hold anything; fields 14 and 15 are the 12th and 13th after it.
    let fields: Vec<&str> = text
        .rsplit_once(')')
        .map_or("", |(_, rest)| rest)
        .split_whitespace()
        .collect();
    let ticks = |index: usize| {
        fields
            .get(index)
            .and_then(|field| field.parse::<f64>().ok())
            .unwrap_or(0.0)
    };
    // SAFETY: no pointers involved.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64;
    Ok((ticks(11) + ticks(12)) / per_second)
}

/// Memory of a process by a line of its status, MiB: `VmRSS:`, resident now, or `VmHWM:`, resident at most.
pub(super) fn memory_mib(pid: u32, which: &str) -> Result<f64> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix(which)?.split_whitespace().next()?.parse::<f64>().ok())
        .with_context(|| format!("{path} has no {which}"))?;
    Ok(kib / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_is_the_median_of_its_runs() {
        let pair = Pair::of(&[(100.0, 99.0), (200.0, 190.0), (50.0, 50.0)]);
        assert!((pair.ratio - 0.99).abs() < 1e-9);
        assert!((pair.lowest - 0.95).abs() < 1e-9 && (pair.highest - 1.0).abs() < 1e-9);
        assert!((pair.without - 100.0).abs() < 1e-9 && (pair.with - 99.0).abs() < 1e-9);
    }

    #[test]
    fn own_figures_are_readable() {
        assert!(cpu_seconds(std::process::id()).is_ok());
        assert!(memory_mib(std::process::id(), "VmRSS:").is_ok_and(|mib| mib > 0.5));
    }
}
