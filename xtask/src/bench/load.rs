//! The loads: which traffic roles run, and what rate they reached.

use std::{
    net::IpAddr,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use testkit::traffic::{
    launch::{Role, Stage},
    netns::{Side, TestNet},
    report::{Counts, Report},
};

/// Longest wait for a role beyond its own duration.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where the two ends are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Loopback addresses of the machine.
    Loopback,
    /// Two network namespaces joined by a veth pair.
    Veth,
}

/// Runs loads.
#[derive(Debug)]
pub(super) struct Loads {
    stage: Stage,
    net: TestNet,
}

/// What a load did.
#[derive(Debug)]
pub(super) struct Done {
    /// All reports.
    pub(super) reports: Vec<Report>,
    /// Sum over the clients.
    pub(super) clients: Counts,
    /// Time of the slowest client, seconds.
    pub(super) seconds: f64,
}

impl Loads {
    pub(super) fn new(directory: PathBuf, traffic: &std::path::Path) -> Result<Self> {
        let net = TestNet::up(&format!("bench{}", std::process::id()), 1500).context("making the test network")?;
        Ok(Self {
            stage: Stage::new(directory, traffic)?,
            net,
        })
    }

    fn start(&self, place: Place, side: Side, name: &str, text: &str) -> Result<Role> {
        let mut arguments: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
        if place == Place::Veth {
            arguments.push(format!("--netns={}", self.net.path(side).display()));
        }
        self.stage.start(name, &arguments)
    }

    fn addresses(place: Place) -> Vec<IpAddr> {
        match place {
            Place::Loopback => (1..=16).map(|last| IpAddr::from([127, 77, 0, last])).collect(),
            Place::Veth => Side::B.v4().into_iter().map(IpAddr::V4).collect(),
        }
    }

    /// Runs clients to their end, then stops the servers.
    fn run(&self, servers: Vec<Role>, clients: Vec<Role>, patience: Duration) -> Result<Done> {
        for client in clients {
            client.join(patience + PATIENCE)?;
        }
        for server in servers {
            server.stop(PATIENCE)?;
        }
        let reports = self.stage.reports()?;
        self.stage.clear_reports()?;
        let mut sum = Counts::default();
        let mut slowest = 0;
        for report in reports.iter().filter(|report| report.role.ends_with("-client")) {
            sum.add(&report.total());
            slowest = slowest.max(report.elapsed_ns);
        }
        anyhow::ensure!(sum.failures == 0, "{} failures in the load: {reports:?}", sum.failures);
        Ok(Done {
            reports,
            clients: sum,
            seconds: Duration::from_nanos(slowest).as_secs_f64(),
        })
    }

    /// Connect, 1 KiB each way, close, from two client processes to two server processes. One server address per
    /// client port range would run out of ports, so all sixteen are used in turn.
    pub(super) fn churn(&self, place: Place, duration: Duration) -> Result<Done> {
        let exchange = "--pattern=exchange --up=1024 --down=1024 --port=7001";
        let mut server = self.start(
            place,
            Side::B,
            "churn-s",
            &format!("tcp-server --listen=0.0.0.0 --mode=prefork --workers=2 {exchange}"),
        )?;
        server.expect("ready")?;
        let dst: Vec<String> = Self::addresses(place).iter().map(ToString::to_string).collect();
        let millis = duration.as_millis();
        let clients = (0..2)
            .map(|index| {
                let text = format!(
                    "tcp-client --connections=0 --duration-ms={millis} --dst={} {exchange}",
                    dst.join(",")
                );
                self.start(place, Side::A, &format!("churn-c{index}"), &text)
            })
            .collect::<Result<_>>()?;
        self.run(vec![server], clients, duration)
    }

    /// One connection, written as fast as it goes.
    pub(super) fn bulk(&self, place: Place, duration: Duration) -> Result<Done> {
        let address = Self::addresses(place).first().copied().context("no address")?;
        let exchange = "--pattern=bulk --up=0 --port=7002";
        let mut server = self.start(
            place,
            Side::B,
            "bulk-s",
            &format!("tcp-server --listen={address} {exchange}"),
        )?;
        server.expect("ready")?;
        let text = format!(
            "tcp-client --dst={address} --duration-ms={} {exchange}",
            duration.as_millis()
        );
        let client = self.start(place, Side::A, "bulk-c", &text)?;
        self.run(vec![server], vec![client], duration)
    }

    /// Datagrams of 64 bytes by sendmmsg, at `rate` per second, or with 0 as fast as the receiver takes them.
    pub(super) fn udp(&self, place: Place, rate: u64, duration: Duration) -> Result<Done> {
        let address = Self::addresses(place).first().copied().context("no address")?;
        let mut server = self.start(
            place,
            Side::B,
            "udp-s",
            &format!("udp-server --listen={address} --port=7003 --mmsg --reply=1"),
        )?;
        server.expect("ready")?;
        let text = format!(
            "udp-client --dst={address} --port=7003 --datagrams=0 --duration-ms={} --size=64 --mode=mmsg \
             --reply-every=1024 --rate={rate}",
            duration.as_millis()
        );
        let client = self.start(place, Side::A, "udp-c", &text)?;
        self.run(vec![server], vec![client], duration)
    }

    /// Opens `connections` connections, calls `work` while they are open, and closes them.
    pub(super) fn hold<T>(&self, connections: u32, work: impl FnOnce() -> Result<T>) -> Result<T> {
        // A process may not have more open files than the hard limit allows, so four share the work.
        const PARTS: u32 = 4;
        let address = Self::addresses(Place::Veth).first().copied().context("no address")?;
        let sizes = "--up=100 --down=100";
        let mut servers = Vec::new();
        let mut clients = Vec::new();
        for part in 0..PARTS {
            let port = 7010 + part;
            let text = format!("tcp-server --listen={address} --port={port} --mode=event {sizes}");
            let mut server = self.start(Place::Veth, Side::B, &format!("open-s{part}"), &text)?;
            server.expect("ready")?;
            servers.push(server);
            let text = format!(
                "tcp-hold --dst={address} --port={port} --connections={} --rounds=1 --hold {sizes}",
                connections / PARTS
            );
            clients.push(self.start(Place::Veth, Side::A, &format!("open-c{part}"), &text)?);
        }
        let start = Instant::now();
        for client in &mut clients {
            client.expect("holding")?;
        }
        eprintln!(
            "{connections} connections opened in {:.1} s",
            start.elapsed().as_secs_f64()
        );
        let result = work()?;
        for role in clients.into_iter().chain(servers) {
            role.stop(PATIENCE)?;
        }
        self.stage.clear_reports()?;
        Ok(result)
    }
}
