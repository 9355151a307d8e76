//! What a step of the system clock does to the agent: nothing but the times in its records.
//!
//! ```text
//! traffic, DataWay down ▶ clock +1 h ▶ traffic ▶ clock -2 h ▶ traffic, DataWay up ▶ clock back ▶ what arrived?
//! ```
//! Bodies that wait for DataWay may become 30 minutes old: by the stepped clock they all are older. Sets the clock of the
//! machine, so it is for a virtual one. Entry: [`run`] (binary `clockstep`).

use std::{
    fs,
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use clap::Parser;

use crate::{
    dataway::{DatawayStub, Fault, Point, StubConfig, StubHandle, Value},
    service::{Launch, Service, free_port},
};

const HOUR: i64 = 3600;
/// First port of the phases: below the ephemeral ones, so that rows show it.
const PORT: u16 = 8000;
/// Longest wait for rows of an interval of 1 s; far less than a step.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longest wait until DataWay has everything: the pause between tries grows to 30 s.
const DELIVERY: Duration = Duration::from_secs(120);
/// A record's time may be this far from the clock at its traffic, seconds.
const SLACK: i64 = 300;

/// Steps the system clock by an hour forth and back under a running agent and checks that every byte is reported and
/// delivered once. Ends with 0 only if so. Needs root.
#[derive(Parser, Clone, Debug)]
#[command(name = "clockstep", version)]
pub struct Options {
    /// The `node-agent` program
    #[arg(long)]
    pub agent: PathBuf,
    /// One more argument for the agent; may be given several times
    #[arg(long, allow_hyphen_values = true)]
    pub agent_arg: Vec<String>,
    /// Yes, set this machine's clock
    #[arg(long)]
    pub allow: bool,
}

/// Traffic of one phase, counted by its maker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Truth {
    /// Connections opened, and closed, at both ends together.
    connections: u64,
    /// Payload bytes sent, and received, at both ends together.
    bytes: u64,
}

/// A phase: its port, its truth and the clock it happened at.
#[derive(Clone, Copy, Debug)]
struct Phase {
    port: u16,
    truth: Truth,
    clock: i64,
}

/// What a sink has of a phase.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Seen {
    opened: u64,
    closed: u64,
    sent: u64,
    received: u64,
}

/// One row, from the file or from DataWay.
#[derive(Clone, Debug)]
struct Row {
    port: u16,
    time: i64,
    seen: Seen,
}

/// The clock as an offset from what it would be without us.
struct Clock {
    offset: i64,
}

/// Runs the test and prints the outcome. `true` when nothing failed.
///
/// # Errors
/// The test could not be carried out.
pub fn run(options: &Options) -> anyhow::Result<bool> {
    anyhow::ensure!(
        options.allow,
        "this sets the clock of the machine; say --allow where that does no harm, in a virtual machine"
    );
    let directory = std::env::temp_dir().join(format!("clockstep-{}", std::process::id()));
    fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    let stub = runtime.block_on(DatawayStub::start(StubConfig::default()))?;
    let passed = carry_out(options, &directory, &stub);
    if matches!(passed, Ok(true)) {
        fs::remove_dir_all(&directory).with_context(|| format!("removing {}", directory.display()))?;
    }
    passed
}

fn carry_out(options: &Options, directory: &Path, stub: &StubHandle) -> anyhow::Result<bool> {
    let rows = directory.join("rows.jsonl");
    stub.set_fault(Fault::Status {
        status: 503,
        retry_after: None,
    });
    let mut arguments = vec![
        "standalone".to_owned(),
        "--interval=1s".to_owned(),
        "--loopback".to_owned(),
        "--queue-max-age=30m".to_owned(),
        format!("--dataway={}", stub.url()),
        format!("--queue-dir={}", directory.join("queue").display()),
        format!("--output-file={}", rows.display()),
    ];
    arguments.extend(options.agent_arg.iter().cloned());
    let launch = Launch {
        name: "agent",
        binary: options.agent.clone(),
        arguments,
        admin: free_port()?,
        log: directory.join("agent.log"),
    };
    // Its log is watched, not its admin server: the only connections are those of the phases.
    let agent = Service::spawn(&launch)?;
    wait(&agent, PATIENCE, "the agent is up", || {
        Ok(fs::read_to_string(&launch.log)?.contains("Agent is up"))
    })?;
    let mut clock = Clock { offset: 0 };
    let mut phases = Vec::new();
    for (port, step) in (PORT..).zip([0, HOUR, -2 * HOUR, HOUR]) {
        clock.step(step)?;
        println!("clock {:+} s", clock.offset);
        let phase = Phase {
            port,
            truth: traffic(port).context("making traffic")?,
            clock: unix_seconds(),
        };
        // An interval measured by the stepped clock would last an hour more, or end at once again and again.
        wait(&agent, PATIENCE, "the phase is in the file", || {
            Ok(complete(&phase, &file_rows(&rows)?))
        })?;
        phases.push(phase);
    }
    stub.set_fault(Fault::None);
    wait(&agent, DELIVERY, "DataWay has everything", || {
        let points: Vec<Row> = stub.points().iter().map(point_row).collect();
        Ok(phases.iter().all(|phase| complete(phase, &points)))
    })?;
    let ledger = agent.ledger()?;
    agent.stop(PATIENCE)?;

    let mut passed = true;
    let mut check = |what: &str, problem: Option<String>| {
        println!(
            "{} {what}{}",
            if problem.is_none() { "ok  " } else { "FAIL" },
            problem.as_deref().unwrap_or("")
        );
        passed &= problem.is_none();
    };
    let points: Vec<Row> = stub.points().iter().map(point_row).collect();
    for (sink, all) in [("file", file_rows(&rows)?), ("DataWay", points)] {
        for phase in &phases {
            let seen = sum(phase, &all);
            let wanted = wanted(phase);
            let problem = (seen != wanted).then(|| format!(": {seen:?} instead of {wanted:?}"));
            check(&format!("{sink}, clock {}: every byte once", phase.clock), problem);
            let far = of(phase, &all).find(|row| (row.time - phase.clock).abs() > SLACK);
            let problem = far.map(|row| format!(": a record of {}", row.time));
            check(
                &format!("{sink}, clock {}: times are the clock's", phase.clock),
                problem,
            );
        }
    }
    for (stage, counts) in &ledger {
        let problem = (counts.lost() > 0).then(|| format!(": {:?}", counts.lost));
        check(&format!("nothing lost in {stage}"), problem);
    }
    let duplicates = stub.summary().duplicates;
    check("no body twice", (duplicates > 0).then(|| format!(": {duplicates}")));
    println!("clockstep: {}", if passed { "passed" } else { "FAILED" });
    Ok(passed)
}

// === impl Clock ===

impl Clock {
    fn step(&mut self, seconds: i64) -> io::Result<()> {
        if seconds == 0 {
            return Ok(());
        }
        let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `now` is writable and then read only.
        let result = unsafe {
            libc::clock_gettime(libc::CLOCK_REALTIME, &raw mut now);
            now.tv_sec += seconds;
            libc::clock_settime(libc::CLOCK_REALTIME, &raw const now)
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        self.offset += seconds;
        Ok(())
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        if let Err(error) = self.step(-self.offset) {
            eprintln!("clockstep: the clock stays {:+} s off: {error}", self.offset);
        }
    }
}

fn unix_seconds() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

/// Connections and datagrams on loopback, both ends here.
fn traffic(port: u16) -> io::Result<Truth> {
    let mut truth = Truth::default();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
    let mut buffer = [3; 2000];
    for n in 0..20_usize {
        let (there, back) = (100 + 50 * n, 1 + 11 * n);
        let mut client = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        let (mut server, _) = listener.accept()?;
        client.write_all(buffer.get(..there).unwrap_or_default())?;
        server.read_exact(buffer.get_mut(..there).unwrap_or_default())?;
        server.write_all(buffer.get(..back).unwrap_or_default())?;
        client.read_exact(buffer.get_mut(..back).unwrap_or_default())?;
        drop(client);
        if server.read(&mut [0])? != 0 {
            return Err(io::Error::other("the client sent more than it was told to"));
        }
        truth.connections += 2;
        truth.bytes += (there + back) as u64;
    }
    let (server, client) = (
        UdpSocket::bind((Ipv4Addr::LOCALHOST, port))?,
        UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?,
    );
    for n in 1..=50_usize {
        client.send_to(buffer.get(..n).unwrap_or_default(), (Ipv4Addr::LOCALHOST, port))?;
        let (read, from) = server.recv_from(&mut buffer)?;
        server.send_to(buffer.get(..2 * n).unwrap_or_default(), from)?;
        truth.bytes += (read + client.recv(&mut buffer)?) as u64;
    }
    Ok(truth)
}

fn wanted(phase: &Phase) -> Seen {
    Seen {
        opened: phase.truth.connections,
        closed: phase.truth.connections,
        sent: phase.truth.bytes,
        received: phase.truth.bytes,
    }
}

fn of<'a>(phase: &Phase, rows: &'a [Row]) -> impl Iterator<Item = &'a Row> + use<'a> {
    let port = phase.port;
    rows.iter().filter(move |row| row.port == port)
}

fn sum(phase: &Phase, rows: &[Row]) -> Seen {
    of(phase, rows).fold(Seen::default(), |sum, row| Seen {
        opened: sum.opened + row.seen.opened,
        closed: sum.closed + row.seen.closed,
        sent: sum.sent + row.seen.sent,
        received: sum.received + row.seen.received,
    })
}

fn complete(phase: &Phase, rows: &[Row]) -> bool {
    sum(phase, rows) == wanted(phase)
}

/// The rows that the agent wrote; a line that it is writing is left out.
fn file_rows(path: &Path) -> anyhow::Result<Vec<Row>> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let whole = text.rfind('\n').map_or("", |end| text.get(..end).unwrap_or_default());
    whole
        .lines()
        .map(|line| {
            let row: serde_json::Value = serde_json::from_str(line).with_context(|| format!("reading `{line}`"))?;
            let text = |key: &str| {
                row.get(key)
                    .and_then(serde_json::Value::as_str)
                    .unwrap_or_default()
                    .to_owned()
            };
            let number = |key: &str| row.get(key).and_then(serde_json::Value::as_u64).unwrap_or(0);
            let nanoseconds = row.get("time").and_then(serde_json::Value::as_i64).unwrap_or(0);
            Ok(make_row(text, number, nanoseconds))
        })
        .collect()
}

fn point_row(point: &Point) -> Row {
    let text = |key: &str| point.tags.get(key).cloned().unwrap_or_default();
    let number = |key: &str| match point.fields.get(key) {
        Some(Value::Int(number)) => u64::try_from(*number).unwrap_or(0),
        Some(Value::Uint(number)) => *number,
        _ => 0,
    };
    make_row(text, number, point.time)
}

/// Both ends' rows have the phase's port, one as its own and one as the other's; ephemeral ones are not told apart.
fn make_row(text: impl Fn(&str) -> String, number: impl Fn(&str) -> u64, nanoseconds: i64) -> Row {
    let ports = [text("src_port"), text("dst_port")];
    Row {
        port: ports.iter().filter_map(|port| port.parse().ok()).next().unwrap_or(0),
        time: nanoseconds / 1_000_000_000,
        seen: Seen {
            opened: number("tcp_established"),
            closed: number("tcp_closed"),
            sent: number("bytes_written"),
            received: number("bytes_read"),
        },
    }
}

/// Waits by the monotonic clock.
fn wait(
    agent: &Service,
    patience: Duration,
    what: &str,
    mut done: impl FnMut() -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + patience;
    while !done()? {
        anyhow::ensure!(
            Instant::now() < deadline,
            "waited {patience:?} in vain: {what}\n{}",
            agent.log_tail()
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}
