//! `node-agent run --collector` takes over what changes in the object while it runs: within seconds, in the same process,
//! and without losing or doubling a byte that the test sent.

use std::{
    collections::HashSet,
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use aggregator::{
    ingest::{Ingest, IngestConfig},
    pipeline::{Accept, AcceptError, Accepted, BatchId, Delivery},
};
use parking_lot::Mutex;
use records::{Dnsflow, Netflow, Port};
use serde_json::{Value, json};
use telemetry::Ledger;
use testkit::{
    exactness::flow::Flow,
    kube::{ControlPlane, FakeApi},
    traffic::report::{Counts, Direction, Transport},
};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

use crate::{
    process::{Agent, directory},
    traffic::{Service, loopback, tcp_service},
};

/// What a change may take.
const SOON: Duration = Duration::from_secs(5);

/// An API server with the object `cluster`.
pub enum Api {
    Fake {
        server: Arc<FakeApi>,
        address: SocketAddr,
        serving: tokio::task::JoinHandle<std::io::Result<()>>,
    },
    Real(ControlPlane),
}

/// What an aggregator would store: what is about this process, each batch once. Others on the machine talk too.
#[derive(Default)]
struct Stored {
    batches: HashSet<BatchId>,
    rows: Vec<(Flow, Row)>,
    /// Of whomever.
    lookups: Vec<Dnsflow>,
}

/// What a row has beside its flow.
#[derive(Clone)]
struct Row {
    zone: String,
    /// Nanoseconds since 1970.
    time: i64,
}

struct Recorder(Arc<Mutex<Stored>>);

/// The aggregator's side, in a runtime of its own; the test itself blocks.
pub struct Far {
    stored: Arc<Mutex<Stored>>,
    pub address: SocketAddr,
    pub runtime: Runtime,
}

/// Traffic until it is told to stop: a connection that stays and many that do not.
struct Traffic {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<(Service, TcpListener)>,
}

// === impl Api ===

impl Api {
    pub fn fake(runtime: &Runtime, spec: &Value) -> Self {
        let server = FakeApi::new();
        server.store(1, spec);
        let any = (Ipv4Addr::LOCALHOST, 0).into();
        let (address, serving) = runtime.block_on(server.serve(any)).unwrap();
        Self::Fake {
            server,
            address,
            serving,
        }
    }

    fn real(spec: &Value) -> Self {
        let plane = ControlPlane::start().unwrap();
        let crds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crds/ebpfcollectors.yaml");
        plane.define(&crds).unwrap();
        let object = json!({
            "apiVersion": "ebpfcollector.io/v1alpha1", "kind": "EbpfCollector",
            "metadata": { "name": "cluster" }, "spec": spec,
        });
        plane
            .kubectl(&["create", "-f", "-"], Some(&object.to_string()))
            .unwrap();
        Self::Real(plane)
    }

    pub fn kubeconfig(&self, directory: &Path) -> PathBuf {
        match self {
            Self::Real(plane) => plane.kubeconfig(),
            Self::Fake { address, .. } => {
                let path = directory.join("kubeconfig");
                let config = json!({
                    "apiVersion": "v1", "kind": "Config", "current-context": "t",
                    "clusters": [{ "name": "t", "cluster": { "server": format!("http://{address}") } }],
                    "contexts": [{ "name": "t", "context": { "cluster": "t", "user": "t" } }],
                    "users": [{ "name": "t", "user": {} }],
                });
                fs::write(&path, config.to_string()).unwrap();
                path
            }
        }
    }

    /// The object's spec from now on.
    pub fn change(&self, generation: i64, spec: &Value) {
        match self {
            Self::Fake { server, .. } => server.change(generation, spec),
            Self::Real(plane) => plane.patch(spec).unwrap(),
        }
    }

    fn go_away(&mut self) {
        match self {
            Self::Fake { server, serving, .. } => {
                serving.abort();
                server.cut();
            }
            Self::Real(plane) => plane.kill_apiserver().unwrap(),
        }
    }

    fn come_back(&mut self, runtime: &Runtime) {
        match self {
            Self::Fake {
                server,
                address,
                serving,
            } => (_, *serving) = runtime.block_on(server.serve(*address)).unwrap(),
            Self::Real(plane) => plane.serve().unwrap(),
        }
    }
}

// === impl Recorder ===

#[async_trait::async_trait]
impl Accept for Recorder {
    async fn accept(&self, delivery: Delivery) -> Result<Accepted, AcceptError> {
        let mut stored = self.0.lock();
        if !stored.batches.insert(delivery.id) {
            return Ok(Accepted::Duplicate);
        }
        let zone = delivery.globals.tags.iter().find(|(key, _)| &**key == "zone");
        let zone = zone.map_or(String::new(), |(_, zone)| zone.to_string());
        let mine = delivery
            .batch
            .netflow
            .iter()
            .filter(|row| row.pid == std::process::id());
        stored.rows.extend(mine.map(|row| {
            let (zone, time) = (zone.clone(), row.time_unix_ns);
            (flow(row), Row { zone, time })
        }));
        stored.lookups.extend(delivery.batch.dnsflow);
        Ok(Accepted::Stored)
    }
}

fn flow(row: &Netflow) -> Flow {
    let port = |port| match port {
        Port::Number(number) => number.to_string(),
        Port::Any => "*".to_owned(),
    };
    Flow {
        transport: match row.transport {
            records::Transport::Tcp => Transport::Tcp,
            records::Transport::Udp => Transport::Udp,
        },
        family: String::new(),
        direction: match row.direction {
            records::Direction::Incoming => Direction::Incoming,
            records::Direction::Outgoing => Direction::Outgoing,
        },
        src_ip: row.local.ip,
        src_port: port(row.local.port),
        dst_ip: row.remote.ip,
        dst_port: port(row.remote.port),
        pid: row.pid,
        process_name: row.process_name.to_string(),
        counts: Counts {
            connections: row.tcp_established,
            closed: row.tcp_closed,
            bytes_sent: row.bytes_written,
            bytes_received: row.bytes_read,
            ..Counts::default()
        },
        retransmits: row.retransmits,
        rtt_us: row.rtt_us,
    }
}

// === impl Far ===

impl Far {
    pub fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let stored = Arc::<Mutex<Stored>>::default();
        let accept = Arc::new(Recorder(Arc::clone(&stored)));
        let address = runtime.block_on(async {
            let listen = IngestConfig::new((Ipv4Addr::LOCALHOST, 0).into());
            let ingest = Ingest::bind(listen).await.unwrap();
            let address = ingest.local_addr();
            tokio::spawn(ingest.serve(accept, Ledger::default(), CancellationToken::new()));
            address
        });
        Self {
            stored,
            address,
            runtime,
        }
    }

    /// Rows about this service, by now.
    fn rows(&self, service_port: u16) -> Vec<Row> {
        let port = service_port.to_string();
        let about = |flow: &Flow| flow.src_port == port || flow.dst_port == port;
        let stored = self.stored.lock();
        let rows = stored.rows.iter().filter(|(flow, _)| about(flow));
        rows.map(|(_, row)| row.clone()).collect()
    }

    /// Rows of `dnsflow`, by now.
    pub fn lookups(&self) -> Vec<Dnsflow> {
        self.stored.lock().lookups.clone()
    }

    fn reports(&self, service: &Service) -> bool {
        let rows: Vec<Flow> = self.stored.lock().rows.iter().map(|(flow, _)| flow.clone()).collect();
        service.reported(&rows) == service.truth
    }
}

// === impl Traffic ===

impl Traffic {
    /// Begins with a connection that is there.
    fn start() -> (Self, u16) {
        let stop = Arc::new(AtomicBool::new(false));
        let (listener, mut service) = tcp_service();
        let port = service.port;
        let mut long = service.connect(&listener, loopback(port));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                service.exchange(&mut long, 1000, 300);
                service.connections(&listener, 3);
                thread::sleep(Duration::from_millis(10));
            }
            service.close(long);
            (service, listener)
        });
        (Self { stop, thread }, port)
    }

    /// The port stays taken while the listener is held.
    fn stop(self) -> (Service, TcpListener) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// Times of the flushes that rows of this zone came with, nanoseconds.
fn flushes(rows: &[Row], of: &str) -> Vec<i64> {
    let mut times: Vec<i64> = rows.iter().filter(|row| row.zone == of).map(|row| row.time).collect();
    times.sort_unstable();
    times.dedup_by(|later, earlier| *later - *earlier < 300_000_000);
    times
}

fn soon(agent: &Agent, what: &str, condition: impl Fn() -> bool) {
    let begun = Instant::now();
    agent.wait_until(what, |_| condition());
    let took = begun.elapsed();
    println!("{what}: after {took:?}");
    assert!(took < SOON, "{what}: after {took:?}");
}

pub fn spec(zone: &str, interval: &str, more: &Value) -> Value {
    let mut spec = json!({
        "interval": interval, "tags": { "zone": zone },
        "plugins": { "ebpf-net": { "enabled": true, "loopback": true, "l7": [] } },
    });
    if let (Value::Object(spec), Value::Object(more)) = (&mut spec, more) {
        spec.extend(more.clone());
    }
    spec
}

fn takes_over_changes(far: &Far, mut api: Api, directory: &Path) {
    let aggregator = format!("--aggregator=http://{}", far.address);
    let mut agent = Agent::follow(directory, &api.kubeconfig(directory), &[&aggregator]);
    agent.wait_until("it is ready", |agent| {
        agent.page("/readyz").is_some_and(|(status, _)| status == 200)
    });
    let (traffic, port) = Traffic::start();
    agent.wait_until("records arrive", |_| !far.rows(port).is_empty());

    // Tags, then the interval, while the traffic goes on.
    let has = |of: &str| far.rows(port).iter().any(|row| row.zone == of);
    api.change(2, &spec("b", "1s", &json!({})));
    soon(&agent, "other tags", || has("b"));
    api.change(3, &spec("c", "3s", &json!({})));
    agent.wait_until("three flushes of the longer interval", |_| {
        flushes(&far.rows(port), "c").len() >= 3
    });
    let times = flushes(&far.rows(port), "c");
    let gap = Duration::from_nanos(u64::try_from(times[2] - times[1]).unwrap());
    assert!((2_500..4_000).contains(&gap.as_millis()), "{gap:?} between flushes");
    api.change(
        4,
        &spec("d", "1s", &json!({ "agent": { "log": { "level": "info,h2=debug" } } })),
    );
    soon(&agent, "the shorter interval again", || {
        flushes(&far.rows(port), "d").len() >= 3
    });
    agent.wait_until("debug lines", |agent| agent.log().contains("DEBUG"));

    // Without an API server everything goes on.
    api.go_away();
    thread::sleep(Duration::from_secs(2));
    assert_eq!(agent.page("/readyz").unwrap().0, 200);
    let before = far.rows(port).len();
    agent.wait_until("records arrive without an API server", |_| {
        far.rows(port).len() > before
    });
    api.come_back(&far.runtime);
    api.change(5, &spec("e", "1s", &json!({ "agent": { "log": { "level": "info" } } })));
    agent.wait_until("a change after the outage", |_| has("e"));

    let (service, _first) = traffic.stop();
    agent.wait_until("every byte is reported, and none twice", |_| far.reports(&service));
    let zones = ["a", "b", "c", "d", "e"];
    assert!(far.rows(port).iter().all(|row| zones.contains(&row.zone.as_str())));

    // The plugin off and on, and other kernel maps: in the same process.
    let off = json!({ "plugins": { "ebpf-net": { "enabled": false } } });
    api.change(6, &spec("f", "1s", &off));
    agent.wait_until("it is switched off", |agent| {
        agent.log().contains("Plugin ebpf-net is off")
    });
    let (traffic, port) = Traffic::start();
    thread::sleep(Duration::from_secs(3));
    let (unseen, _second) = traffic.stop();
    assert!(unseen.truth.outgoing.closed > 10);
    assert_eq!(far.rows(port).len(), 0, "records of a plugin that is off");
    assert_eq!(agent.page("/readyz").unwrap().0, 200);
    let larger = json!({ "agent": { "kernel": { "flowMapEntries": 4096 } } });
    let mut listeners = Vec::new();
    for (generation, more) in [(7, json!({})), (8, larger)] {
        let begins = agent.log().matches("Adopted sockets").count();
        api.change(generation, &spec("g", "1s", &more));
        soon(&agent, "it collects anew", || {
            agent.log().matches("Adopted sockets").count() > begins
        });
        agent.wait_until("it is ready", |agent| agent.page("/readyz").unwrap().0 == 200);
        thread::sleep(Duration::from_millis(500));
        let (traffic, port) = Traffic::start();
        thread::sleep(Duration::from_secs(2));
        let (service, listener) = traffic.stop();
        assert_eq!(port, service.port);
        listeners.push(listener);
        agent.wait_until("every byte is reported", |_| far.reports(&service));
    }

    if let Api::Fake { server, .. } = &api {
        // The API server itself refuses this one.
        server.change(9, &spec("h", "2h", &json!({})));
        agent.wait_until("it is named", |agent| {
            let (status, body) = agent.page("/readyz").unwrap();
            status == 200 && body.contains("interval") && body.contains("2h")
        });
    }
    let status = agent.end(libc::SIGTERM);
    assert!(status.success(), "{status}");
}

#[test]
#[ignore = "native: needs root"]
fn a_running_agent_takes_over_what_changes_in_the_object() {
    let directory = directory();
    let far = Far::start();
    let api = Api::fake(&far.runtime, &spec("a", "1s", &json!({})));
    takes_over_changes(&far, api, directory.path());
}

#[test]
#[ignore = "native: needs root"]
fn a_running_agent_takes_over_what_changes_at_a_real_api_server() {
    if !ControlPlane::is_built() {
        println!("NOT RUN: the programs of a control plane are not built; `scripts/e2e.sh programs` builds them");
        return;
    }
    let directory = directory();
    let far = Far::start();
    let api = Api::real(&spec("a", "1s", &json!({})));
    takes_over_changes(&far, api, directory.path());
}

#[test]
#[ignore = "native: needs root"]
fn connection_tracking_comes_and_goes_while_the_capture_runs() {
    let directory = directory();
    let far = Far::start();
    let api = Api::fake(&far.runtime, &spec("a", "1s", &json!({})));
    let aggregator = format!("--aggregator=http://{}", far.address);
    let agent = Agent::follow(directory.path(), &api.kubeconfig(directory.path()), &[&aggregator]);
    agent.wait_until("it is ready", |agent| {
        agent.page("/readyz").is_some_and(|(status, _)| status == 200)
    });
    let follows = |agent: &Agent| {
        let features = agent.features();
        features
            .iter()
            .any(|(it, state)| it.name == "ebpf-conntrack" && *state == 2)
    };
    let threads = |agent: &Agent| {
        let tasks = fs::read_dir(format!("/proc/{}/task", agent.pid())).unwrap();
        tasks
            .filter(|task| {
                let comm = fs::read_to_string(task.as_ref().unwrap().path().join("comm"));
                comm.is_ok_and(|comm| comm.trim() == "ebpf-conntrack")
            })
            .count()
    };
    assert!(!follows(&agent) && threads(&agent) == 0);
    let on = json!({ "plugins": {
        "ebpf-net": { "enabled": true, "loopback": true, "l7": [] }, "ebpf-conntrack": { "enabled": true },
    } });
    for generation in [2, 4] {
        api.change(generation, &spec("a", "1s", &on));
        soon(&agent, "it is on", || follows(&agent) && threads(&agent) == 1);
        api.change(generation + 1, &spec("a", "1s", &json!({})));
        soon(&agent, "it is off", || !follows(&agent) && threads(&agent) == 0);
    }
    let log = agent.log();
    assert_eq!(log.matches("Adopted sockets").count(), 1, "the capture went on: {log}");
    assert_eq!(agent.page("/readyz").unwrap().0, 200);
}
