//! HTTP at a fixed rate: what `httpflow` adds to latencies, whether every exchange is told, and the agent's memory with many
//! connections.
//!
//! A few threads send requests to nginx when a schedule says so, each on the connection that has waited the longest. What is
//! late is sent at once, and its latency counts from when it was due.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::Barrier,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use testkit::{exactness::run::settled_ledger, traffic::sys::raise_open_files};

use super::{
    http::{self, Nginx},
    load::Place,
    sections::{Bench, INTERVAL, PATIENCE, Pair, memory_mib},
    table::{Document, Row, thousands},
};

/// Threads that send.
const THREADS: u32 = 4;
/// Longest wait for an answer.
const ANSWER: Duration = Duration::from_secs(10);
const REQUEST: &[u8] = b"GET /small HTTP/1.1\r\nHost: bench\r\n\r\n";
/// What the agent reads: all that this machine's traffic has.
const ALL: [&str; 3] = [
    "--l7net-enabled=httpflow",
    "--ephemeral-port=10001",
    "--enabled-plugins=ebpf-net,ebpf-conntrack,ebpf-bash",
];

/// What clients saw.
struct Rated {
    asked: u64,
    answered: u64,
    /// 99th percentile of the latencies, microseconds.
    p99_us: f64,
    per_second: f64,
}

/// So many requests per second on so many connections.
#[derive(Clone, Copy)]
struct Load {
    rate: u32,
    connections: u32,
    run: Duration,
}

impl Load {
    /// Connects, and asks; calls `during` meanwhile. Connections end with it.
    fn ask(self, server: SocketAddr, during: impl FnOnce() -> Result<()>) -> Result<Rated> {
        let barrier = Barrier::new(THREADS as usize + 1);
        let began = Instant::now();
        let (per_thread, during) = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|_| scope.spawn(|| self.one_thread(server, &barrier)))
                .collect();
            barrier.wait();
            let during = during();
            let results: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
            (results, during)
        });
        during?;
        let (mut asked, mut latencies) = (0, Vec::new());
        for result in per_thread {
            let Ok(result) = result else { bail!("a client panicked") };
            let (sent, own) = result?;
            asked += sent;
            latencies.extend(own);
        }
        latencies.sort_unstable();
        let p99 = latencies.get(latencies.len() * 99 / 100).copied().unwrap_or_default();
        Ok(Rated {
            asked,
            answered: latencies.len() as u64,
            p99_us: p99.as_secs_f64() * 1e6,
            per_second: latencies.len() as f64 / began.elapsed().as_secs_f64(),
        })
    }

    fn one_thread(self, server: SocketAddr, barrier: &Barrier) -> Result<(u64, Vec<Duration>)> {
        // SAFETY: no pointers. Sleeps end when they are due.
        unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
        let connect = || -> Result<TcpStream> {
            let stream = TcpStream::connect_timeout(&server, ANSWER)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(ANSWER))?;
            Ok(stream)
        };
        let connections: Result<Vec<TcpStream>> = (0..self.connections / THREADS).map(|_| connect()).collect();
        barrier.wait();
        let mut connections = connections.context("connecting to nginx")?;
        let step = Duration::from_secs(1) * THREADS / self.rate;
        let (start, mut asked, mut latencies) = (Instant::now(), 0_u64, Vec::new());
        let mut length = None;
        let mut due = start;
        'all: loop {
            for stream in &mut connections {
                if due.duration_since(start) >= self.run {
                    break 'all;
                }
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
                asked += 1;
                if exchange(stream, &mut length).is_ok() {
                    latencies.push(due.elapsed());
                }
                due += step;
            }
        }
        Ok((asked, latencies))
    }
}

/// One request and its answer, all of it. All answers have the same length, which is found out with the first.
fn exchange(stream: &mut TcpStream, length: &mut Option<usize>) -> Result<()> {
    stream.write_all(REQUEST)?;
    let (mut buffer, mut filled) = ([0; 4096], 0);
    loop {
        let read = stream.read(buffer.get_mut(filled..).unwrap_or_default())?;
        anyhow::ensure!(read > 0, "nginx closed a connection");
        filled += read;
        let got = buffer.get(..filled).unwrap_or_default();
        if length.is_none() {
            let head = got.windows(4).position(|four| four == b"\r\n\r\n");
            *length = head.map(|head| head + 4 + http::FILE_BYTES);
        }
        if length.is_some_and(|length| filled >= length) {
            anyhow::ensure!(got.starts_with(b"HTTP/1.1 200"), "nginx does not answer well");
            return Ok(());
        }
    }
}

/// 20,000 requests/s: the 99th percentile with and without, and whether all is told.
pub(super) fn fixed_rate(bench: &Bench, document: &mut Document) -> Result<()> {
    http::programs()?;
    let nginx = Nginx::start(bench.directory())?;
    let load = Load {
        rate: 20_000,
        connections: 64,
        run: bench.effort().run,
    };
    load.ask(nginx.address(), || Ok(()))?;
    let (mut latencies, mut lost, mut differences) = (Vec::new(), 0, 0);
    let mut reached = f64::INFINITY;
    for _ in 0..bench.effort().pairs {
        let agent = bench.start_agent(Place::Loopback)?;
        let without = load.ask(nginx.address(), || Ok(()))?;
        agent.stop(PATIENCE)?;
        let agent = bench.start_agent_with(Place::Loopback, &ALL)?;
        let with = load.ask(nginx.address(), || Ok(()))?;
        std::thread::sleep(INTERVAL * 2);
        let ledger = settled_ledger(&agent, PATIENCE)?;
        lost += http::lost(&ledger);
        let (asked, answered) = http::counted(&agent.stop(PATIENCE)?, nginx.port())?;
        differences += with.asked.abs_diff(asked) + with.asked.abs_diff(answered);
        for run in [&without, &with] {
            differences += run.asked - run.answered;
            reached = reached.min(run.per_second);
        }
        eprintln!(
            "  HTTP at a fixed rate: p99 {:.0} us without, {:.0} us with",
            without.p99_us, with.p99_us
        );
        latencies.push((without.p99_us, with.p99_us));
    }
    let what = format!("HTTP, {} requests/s", thousands(f64::from(load.rate)));
    let pair = Pair::of(&latencies);
    document.row(Row {
        what: format!("{what}: 99th percentile of the latency with/without httpflow"),
        measured: format!(
            "{:.3} ({:.3} to {:.3}); without {:.0} us, with {:.0} us; at least {} requests/s",
            pair.ratio,
            pair.lowest,
            pair.highest,
            pair.without,
            pair.with,
            thousands(reached)
        ),
        target: "<= 1.1".to_owned(),
        met: pair.ratio <= 1.1,
    });
    document.row(Row {
        what: format!("{what}: lost events, requests without an answer, differences of either end"),
        measured: format!("{lost}, {differences}"),
        target: "0".to_owned(),
        met: lost + differences == 0,
    });
    Ok(())
}

/// 10,000 connections at 10,000 requests/s: the agent's memory.
pub(super) fn open(bench: &Bench, document: &mut Document) -> Result<()> {
    http::programs()?;
    raise_open_files(65_536)?;
    let nginx = Nginx::start(bench.directory())?;
    let load = Load {
        rate: 10_000,
        connections: 10_000,
        run: bench.effort().run * 5,
    };
    let agent = bench.start_agent_with(Place::Loopback, &ALL)?;
    let started = memory_mib(agent.pid(), "VmHWM:")?;
    let mut resident = 0.0_f64;
    let seen = load.ask(nginx.address(), || {
        for _ in 0..5 {
            std::thread::sleep(bench.effort().run * 4 / 5);
            resident = resident.max(memory_mib(agent.pid(), "VmRSS:")?);
        }
        Ok(())
    })?;
    std::thread::sleep(INTERVAL * 2);
    let ledger = settled_ledger(&agent, PATIENCE)?;
    let lost = http::lost(&ledger);
    let peak = memory_mib(agent.pid(), "VmHWM:")?;
    let (asked, answered) = http::counted(&agent.stop(PATIENCE)?, nginx.port())?;
    let differences = seen.asked.abs_diff(asked) + seen.asked.abs_diff(answered) + (seen.asked - seen.answered);
    let what = "HTTP, 10,000 connections, 10,000 requests/s, both ends";
    document.row(Row {
        what: format!("{what}: resident memory of the agent, with ebpf-conntrack and ebpf-bash"),
        measured: format!("{resident:.1} MiB, at most {peak:.1} MiB"),
        target: "<= 120 MiB".to_owned(),
        met: resident <= 120.0,
    });
    document.row(Row {
        what: format!("{what}: peak memory at start, of what it has under the load"),
        measured: format!("{started:.1} MiB, {:.2}", started / resident),
        target: "<= 1.5".to_owned(),
        met: started / resident <= 1.5,
    });
    document.row(Row {
        what: format!("{what}: lost events, requests without an answer, differences of either end"),
        measured: format!("{lost}, {differences} of {}", thousands(seen.asked as f64)),
        target: "0".to_owned(),
        met: lost + differences == 0,
    });
    Ok(())
}
