//! What a role counted: one JSON line per process, written when it ends. These counts are the truth of every test.

use std::{
    collections::BTreeMap,
    fs::OpenOptions,
    io::{self, Write as _},
    net::{IpAddr, SocketAddr},
    path::Path,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

/// Counts of one process towards one remote address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Counts {
    /// TCP connections connected or accepted.
    pub connections: u64,
    /// TCP connections closed by this process.
    pub closed: u64,
    /// Payload bytes that `send` and its relatives accepted.
    pub bytes_sent: u64,
    /// Payload bytes that `recv` and its relatives returned.
    pub bytes_received: u64,
    /// UDP datagrams sent.
    pub datagrams_sent: u64,
    /// UDP datagrams that `recv` and its relatives returned.
    pub datagrams_received: u64,
    /// Connects and sends that failed.
    pub failures: u64,
}

/// Names of transports and families as the `netflow` tags spell them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Transport {
    /// `tcp`
    #[serde(rename = "tcp")]
    Tcp,
    /// `udp`
    #[serde(rename = "udp")]
    Udp,
}

/// Who starts the exchange, seen from the reporting process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// The reporting process serves.
    Incoming,
    /// The reporting process connects, or sends first.
    Outgoing,
}

/// One row of a report: what the process did with one remote address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// Transport.
    pub transport: Transport,
    /// `IPv4` or `IPv6`; a v4-mapped address counts as IPv4.
    pub family: String,
    /// Direction.
    pub direction: Direction,
    /// Own address; absent where the process cannot know it (a wildcard UDP socket).
    pub local: Option<IpAddr>,
    /// The other end's address.
    pub remote: IpAddr,
    /// The serving end's port: the remote one when outgoing, else the own one.
    pub service_port: u16,
    /// Counts.
    #[serde(flatten)]
    pub counts: Counts,
    /// Part of `counts` from before the mark (SIGUSR1), for connections older than the agent.
    #[serde(default)]
    pub before: Counts,
    /// Part of `counts` from after a connection had settled with a process that it was passed to.
    #[serde(default)]
    pub settled: Counts,
}

/// Exchanges of one kind that a process made with one remote address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExchangeRow {
    /// The other end's address.
    pub remote: IpAddr,
    /// The serving end's port.
    pub service_port: u16,
    /// Method of a request, or type of a question.
    pub method: String,
    /// Path of a request, or name of a question.
    pub path: String,
    /// Status of the response, or code of the answer.
    pub status: i32,
    /// Counts.
    #[serde(flatten)]
    pub counts: Exchanged,
}

/// Counts of exchanges of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exchanged {
    /// Exchanges.
    pub count: u64,
    /// Bytes that this process sent for them.
    pub bytes_sent: u64,
    /// Bytes that it received.
    pub bytes_received: u64,
    /// The shortest, nanoseconds as the process measured it.
    pub fastest_ns: u64,
    /// The longest.
    pub slowest_ns: u64,
}

/// The report of one process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Process id, in the pid namespace of the process.
    pub pid: u32,
    /// Process name, at most 15 bytes.
    pub name: String,
    /// Role, e.g. `tcp-client`.
    pub role: String,
    /// Name that several reports share when a connection may rightly be counted for any of them.
    #[serde(default)]
    pub group: String,
    /// Inode of the network namespace.
    pub netns: u64,
    /// Rows.
    pub rows: Vec<Row>,
    /// Exchanges of roles that speak a protocol.
    #[serde(default)]
    pub exchanges: Vec<ExchangeRow>,
    /// What failed and how often, e.g. `connect: Connection refused`.
    #[serde(default)]
    pub errors: BTreeMap<String, u64>,
    /// Things this kernel could not do, e.g. `gso`.
    #[serde(default)]
    pub unsupported: Vec<String>,
    /// Time from the first to the last exchange, nanoseconds.
    pub elapsed_ns: u64,
}

/// Identity of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowKey {
    /// Transport.
    pub transport: Transport,
    /// Direction.
    pub direction: Direction,
    /// Own address, if known.
    pub local: Option<IpAddr>,
    /// The other end's address.
    pub remote: IpAddr,
    /// The serving end's port.
    pub service_port: u16,
}

/// Collects counts while a role runs. Finding the row of an address costs no allocation and, for the address used
/// last, one comparison.
#[derive(Debug)]
pub struct Recorder {
    rows: Vec<(RowKey, Row)>,
    last: usize,
    exchanges: Vec<ExchangeRow>,
    errors: BTreeMap<String, u64>,
    unsupported: Vec<String>,
    started: Instant,
}

/// Index of a row in a [`Recorder`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowId(usize);

/// An address without the v4-in-v6 mapping.
#[must_use]
pub fn plain(ip: IpAddr) -> IpAddr {
    ip.to_canonical()
}

/// A socket address without the v4-in-v6 mapping.
#[must_use]
pub fn plain_socket(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(plain(address.ip()), address.port())
}

// === impl Counts ===

impl Counts {
    /// Adds `other`.
    pub fn add(&mut self, other: &Self) {
        self.connections += other.connections;
        self.closed += other.closed;
        self.bytes_sent += other.bytes_sent;
        self.bytes_received += other.bytes_received;
        self.datagrams_sent += other.datagrams_sent;
        self.datagrams_received += other.datagrams_received;
        self.failures += other.failures;
    }

    /// `self` without `other`, which must be a part of it.
    #[must_use]
    pub fn without(&self, other: &Self) -> Self {
        Self {
            connections: self.connections.saturating_sub(other.connections),
            closed: self.closed.saturating_sub(other.closed),
            bytes_sent: self.bytes_sent.saturating_sub(other.bytes_sent),
            bytes_received: self.bytes_received.saturating_sub(other.bytes_received),
            datagrams_sent: self.datagrams_sent.saturating_sub(other.datagrams_sent),
            datagrams_received: self.datagrams_received.saturating_sub(other.datagrams_received),
            failures: self.failures.saturating_sub(other.failures),
        }
    }
}

// === impl Exchanged ===

impl Exchanged {
    /// One exchange that took this long.
    #[must_use]
    pub fn one(bytes_sent: u64, bytes_received: u64, took: Duration) -> Self {
        let took = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        Self {
            count: 1,
            bytes_sent,
            bytes_received,
            fastest_ns: took,
            slowest_ns: took,
        }
    }

    /// Adds `other`.
    pub fn add(&mut self, other: &Self) {
        self.count += other.count;
        self.bytes_sent += other.bytes_sent;
        self.bytes_received += other.bytes_received;
        self.fastest_ns = self.fastest_ns.min(other.fastest_ns);
        self.slowest_ns = self.slowest_ns.max(other.slowest_ns);
    }
}

// === impl Report ===

impl Report {
    /// The sum of all rows.
    #[must_use]
    pub fn total(&self) -> Counts {
        let mut total = Counts::default();
        for row in &self.rows {
            total.add(&row.counts);
        }
        total
    }

    /// Reads reports from JSON lines.
    ///
    /// # Errors
    /// `InvalidData` with the line's number when a line is no report.
    pub fn read_all(text: &str) -> io::Result<Vec<Self>> {
        text.lines()
            .enumerate()
            .filter(|(_, line)| !line.trim().is_empty())
            .map(|(number, line)| {
                serde_json::from_str(line).map_err(|error| {
                    io::Error::new(
                        io::ErrorKind::InvalidData,
                        format!("report line {}: {error}", number + 1),
                    )
                })
            })
            .collect()
    }

    /// Appends this report as one line, in one write, so that many processes can share the file.
    ///
    /// # Errors
    /// The failing open or write.
    pub fn append(&self, path: &Path) -> io::Result<()> {
        let mut line = serde_json::to_vec(self)?;
        line.push(b'\n');
        if path == Path::new("-") {
            return io::stdout().write_all(&line);
        }
        OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)?
            .write_all(&line)
    }
}

// === impl Recorder ===

impl Default for Recorder {
    fn default() -> Self {
        Self {
            rows: Vec::with_capacity(16),
            last: 0,
            exchanges: Vec::new(),
            errors: BTreeMap::new(),
            unsupported: Vec::new(),
            started: Instant::now(),
        }
    }
}

impl Recorder {
    /// The row of `key`, made on first use.
    pub fn row(&mut self, key: RowKey) -> RowId {
        if self.rows.get(self.last).is_some_and(|(known, _)| *known == key) {
            return RowId(self.last);
        }
        self.last = self
            .rows
            .iter()
            .position(|(known, _)| *known == key)
            .unwrap_or_else(|| {
                let remote = plain(key.remote);
                self.rows.push((
                    key,
                    Row {
                        transport: key.transport,
                        family: if remote.is_ipv4() { "IPv4" } else { "IPv6" }.to_owned(),
                        direction: key.direction,
                        local: key.local.map(plain),
                        remote,
                        service_port: key.service_port,
                        counts: Counts::default(),
                        before: Counts::default(),
                        settled: Counts::default(),
                    },
                ));
                self.rows.len() - 1
            });
        RowId(self.last)
    }

    /// The counts of a row.
    pub fn counts(&mut self, RowId(index): RowId) -> &mut Counts {
        // A RowId only comes from `row`, and rows are never removed.
        #[allow(clippy::indexing_slicing)]
        &mut self.rows[index].1.counts
    }

    /// The counts of a row since its connections had settled.
    pub fn settled(&mut self, RowId(index): RowId) -> &mut Counts {
        // As in `counts`.
        #[allow(clippy::indexing_slicing)]
        &mut self.rows[index].1.settled
    }

    /// Counts exchanges with `remote` under what was asked for (method, path) and how it was answered.
    pub fn exchanged(&mut self, remote: IpAddr, service_port: u16, what: (&str, &str, i32), counts: &Exchanged) {
        let (remote, (method, path, status)) = (plain(remote), what);
        let known = self.exchanges.iter_mut().find(|row| {
            row.remote == remote
                && row.service_port == service_port
                && (row.method.as_str(), row.path.as_str(), row.status) == (method, path, status)
        });
        match known {
            Some(row) => row.counts.add(counts),
            None => self.exchanges.push(ExchangeRow {
                remote,
                service_port,
                method: method.to_owned(),
                path: path.to_owned(),
                status,
                counts: *counts,
            }),
        }
    }

    /// Counts a failure of `what` under its error text.
    pub fn error(&mut self, what: &str, error: &io::Error) {
        let text = match error.raw_os_error() {
            Some(code) => io::Error::from_raw_os_error(code).to_string(),
            None => error.to_string(),
        };
        *self.errors.entry(format!("{what}: {text}")).or_default() += 1;
    }

    /// Notes that this kernel cannot do `what`.
    pub fn unsupported(&mut self, what: &str) {
        if !self.unsupported.iter().any(|known| known == what) {
            self.unsupported.push(what.to_owned());
        }
    }

    /// Everything counted so far becomes the part "before the mark".
    pub fn mark(&mut self) {
        for (_, row) in &mut self.rows {
            row.before = row.counts;
        }
    }

    /// Forgets all counts: what a forked child does first, since the parent reports its own.
    pub fn clear(&mut self) {
        self.rows.clear();
        self.exchanges.clear();
        self.errors.clear();
        self.started = Instant::now();
    }

    /// Restarts the clock of `elapsed_ns`.
    pub fn restart_clock(&mut self) {
        self.started = Instant::now();
    }

    /// The report of this process.
    #[must_use]
    pub fn report(&self, name: &str, role: &str, group: &str) -> Report {
        use std::os::unix::fs::MetadataExt as _;
        Report {
            pid: std::process::id(),
            name: name.chars().take(15).collect(),
            role: role.to_owned(),
            group: group.to_owned(),
            netns: std::fs::metadata("/proc/self/ns/net")
                .map(|meta| meta.ino())
                .unwrap_or_default(),
            rows: self.rows.iter().map(|(_, row)| row.clone()).collect(),
            exchanges: self.exchanges.clone(),
            errors: self.errors.clone(),
            unsupported: self.unsupported.clone(),
            elapsed_ns: u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn key(port: u16) -> RowKey {
        RowKey {
            transport: Transport::Tcp,
            direction: Direction::Outgoing,
            local: None,
            remote: "::ffff:10.0.0.1".parse().unwrap(),
            service_port: port,
        }
    }

    #[test]
    fn rows_are_kept_apart_by_key_and_mapped_addresses_are_plain() {
        let mut recorder = Recorder::default();
        for port in [1, 2, 1, 1] {
            let row = recorder.row(key(port));
            recorder.counts(row).bytes_sent += 10;
        }
        let report = recorder.report("a-name-that-is-too-long", "r", "");
        assert_eq!(report.name, "a-name-that-is-");
        assert_eq!(
            report.rows.iter().map(|row| row.counts.bytes_sent).collect::<Vec<_>>(),
            [30, 10]
        );
        assert!(
            report
                .rows
                .iter()
                .all(|row| row.family == "IPv4" && row.remote.is_ipv4())
        );
    }

    #[test]
    fn a_report_survives_its_json_line() {
        let mut recorder = Recorder::default();
        let row = recorder.row(key(1));
        recorder.counts(row).connections = 3;
        recorder.mark();
        recorder.error("connect", &io::Error::from_raw_os_error(libc::ECONNREFUSED));
        let report = recorder.report("n", "tcp-client", "g");
        let line = serde_json::to_string(&report).unwrap();
        assert_eq!(
            Report::read_all(&format!("{line}\n\n{line}\n")).unwrap(),
            [report.clone(), report]
        );
        assert!(Report::read_all("{\n").unwrap_err().to_string().contains("line 1"));
    }
}
