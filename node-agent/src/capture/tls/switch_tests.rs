//! Namespaces for which `httpflow-tls` is switched off and on under real traffic, with the real kernel programs. Truth is
//! what the clients of the traffic count.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use api::collector::EbpfCollectorSpec;
use records::{Httpflow, Port, RecordBatch};
use serde_json::json;
use telemetry::Telemetry;
use tokio::sync::{mpsc, watch};

use super::TlsCapture;
use crate::{
    capture::{
        beside::{Beside as _, Surroundings},
        domains::DomainNames,
        ebpf_net::{End, InCluster, Orders},
        http::HttpConfig,
        test_pods::{Kubepods, namespace, pod, uid},
    },
    ebpf::http::LoadOptions,
    identity::{
        cgroup,
        k8s::{
            self, Kind, Options,
            fake_api::{Cluster, loopback, until},
        },
    },
};

/// A server, in no pod, and a client, in the pod's cgroup: requests over one connection, each told when it is answered.
const TALKER: &str = r#"
import http.client, os, socket, ssl, sys, threading, time
directory, cgroup = sys.argv[1:]
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(directory + '/cert.pem', directory + '/key.pem')
listener = socket.create_server(('127.0.0.1', 0))
port = listener.getsockname()[1]
if os.fork() == 0:
    connection = context.wrap_socket(listener.accept()[0], server_side=True)
    while connection.recv(4096):
        connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n')
    os._exit(0)
listener.close()
open(cgroup + '/cgroup.procs', 'w').write(str(os.getpid()))
print(port, flush=True)
context = ssl.create_default_context(cafile=directory + '/cert.pem')
context.check_hostname = False
connection = http.client.HTTPSConnection('127.0.0.1', port, context=context)
while True:
    connection.request('GET', '/pod')
    connection.getresponse().read()
    print('answered', flush=True)
    time.sleep(0.02)
"#;

struct Talker {
    cgroup: PathBuf,
    port: u16,
    answered: Arc<AtomicU64>,
    process: Child,
}

impl Talker {
    fn start(directory: &Path, kubepods: &Path, uid: &str) -> Self {
        let cgroup = kubepods.join(format!("pod{uid}"));
        fs::create_dir_all(&cgroup).unwrap();
        let mut process = Command::new("python3")
            .args(["-c", TALKER])
            .args([directory, &cgroup])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(process.stdout.take().unwrap());
        let mut port = String::new();
        said.read_line(&mut port).unwrap();
        let answered = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&answered);
        thread::spawn(move || {
            for _ in said.lines() {
                counter.fetch_add(1, Ordering::Relaxed);
            }
        });
        Self {
            cgroup,
            port: port.trim().parse().unwrap(),
            answered,
            process,
        }
    }

    fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }
}

impl Drop for Talker {
    fn drop(&mut self) {
        // The server ends with its connection.
        let _ = self.process.kill();
        let _ = self.process.wait();
        let deadline = Instant::now() + Duration::from_secs(5);
        while fs::remove_dir(&self.cgroup).is_err() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Rows as they come.
struct Clients {
    batches: mpsc::Receiver<RecordBatch>,
    rows: Vec<Httpflow>,
}

impl Clients {
    async fn collect(&mut self, time: Duration) {
        let deadline = tokio::time::Instant::now() + time;
        while let Ok(Some(batch)) = tokio::time::timeout_at(deadline, self.batches.recv()).await {
            self.rows.extend(batch.httpflow);
        }
    }

    /// Answered requests of clients of a port.
    fn count(&self, port: u16) -> u64 {
        let rows = self.rows.iter();
        rows.filter(|row| row.flow.remote.port == Port::Number(port) && row.status_code == 200)
            .map(|row| row.count)
            .sum()
    }
}

fn spec(l7: &[&str]) -> Arc<EbpfCollectorSpec> {
    let spec = json!({"plugins": {"ebpf-net": {"l7": ["httpflow", "httpflow-tls"]}},
        "namespaces": [{"match": {"names": ["bank"]}, "plugins": {"ebpf-net": {"l7": l7}}}]});
    Arc::new(serde_json::from_value(spec).unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "native: needs root"]
async fn httpflow_tls_is_switched_by_namespace() {
    let directory = tempfile::tempdir().unwrap();
    let made = Command::new("openssl")
        .args([
            "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=x",
        ])
        .args(["-keyout", "key.pem", "-out", "cert.pem"])
        .current_dir(&directory)
        .stderr(Stdio::null())
        .status();
    assert!(made.unwrap().success());
    let (hierarchy, root) = cgroup::find_hierarchy(&[Path::new("/sys/fs/cgroup")], "");
    let kubepods = Kubepods::new(&root);
    let shop = Talker::start(directory.path(), &kubepods.0, &uid(21));
    let bank = Talker::start(directory.path(), &kubepods.0, &uid(22));
    let cluster = Cluster::new();
    cluster.put("pods", pod("shop-1", "shop", 21));
    cluster.put("pods", pod("bank-1", "bank", 22));
    cluster.put("namespaces", namespace("bank", None));
    let (address, _serving) = Arc::clone(&cluster).serve(loopback()).await;
    let client = kube::Client::try_from(kube::Config::new(format!("http://{address}").parse().unwrap())).unwrap();
    let options = Options {
        node: "one".to_owned(),
        host_root: "/".into(),
        proc: "/proc".into(),
        page_size: 100,
    };
    let (names, feed) = k8s::names(client, &options);
    let feeding = tokio::spawn(feed);
    until("names are there", || {
        Kind::NAMED.iter().all(|kind| names.health(*kind).lists > 0) && names.cgroups().0 >= 2
    })
    .await;

    let telemetry = Telemetry::new("test", "0");
    // The bank has the rest of the plugin.
    let (object, told) = watch::channel(spec(&["httpflow"]));
    let config = HttpConfig {
        interval: Duration::from_secs(1),
        loopback: true,
        ipv6_disabled: false,
        ephemeral_port: u16::MAX,
        keep_query: false,
        path_limit: 512,
        series_max: 1000,
        routes: Vec::new(),
        proc: "/proc".into(),
        own_node_only: false,
        load: LoadOptions {
            ring_buffer_size: 1 << 20,
            cgroups: hierarchy,
            refuse: Vec::new(),
        },
    };
    let with = Surroundings {
        metrics: TlsCapture::metrics(&telemetry),
        telemetry,
        cluster: Some(InCluster { names, spec: told }),
        nat: watch::channel(None).1,
        domains: DomainNames::default(),
        entry: crate::ebpf::entry::Entry::default(),
    };
    let capture = tokio::task::spawn_blocking(move || TlsCapture::start(&config, with)).await;
    let capture = capture.unwrap().unwrap();
    let interval = Duration::from_secs(1);
    let (orders, ordered) = watch::channel(Orders::Collect { interval });
    let (out, batches) = mpsc::channel(64);
    let running = thread::spawn(move || capture.run(&out, &ordered));
    let mut clients = Clients {
        batches,
        rows: Vec::new(),
    };

    let started = shop.answered();
    clients.collect(Duration::from_secs(4)).await;
    assert!(bank.answered() > 20 && clients.count(bank.port) == 0);
    assert!(clients.count(shop.port) > 20);
    // On: the open connection is picked up.
    let before = bank.answered();
    object.send_replace(spec(&["httpflow-tls"]));
    clients.collect(Duration::from_secs(4)).await;
    let counted = clients.count(bank.port);
    assert!(counted > 20 && counted <= bank.answered() - before, "{counted}");
    // Off again, and the other goes on.
    object.send_replace(spec(&["httpflow"]));
    clients.collect(Duration::from_secs(2)).await;
    let (of_bank, of_shop) = (clients.count(bank.port), clients.count(shop.port));
    clients.collect(Duration::from_secs(3)).await;
    assert_eq!(clients.count(bank.port), of_bank);
    assert!(clients.count(shop.port) > of_shop + 20);
    orders.send_replace(Orders::Finish(End::Stop));
    clients.collect(Duration::from_secs(3)).await;
    let answered = shop.answered() - started;
    running.join().unwrap();
    feeding.abort();
    let counted = clients.count(shop.port);
    assert!(counted <= answered && counted > 200, "{counted} of {answered}");
    for (port, name) in [(shop.port, "shop-1"), (bank.port, "bank-1")] {
        let of = |row: &&Httpflow| row.flow.remote.port == Port::Number(port);
        for row in clients.rows.iter().filter(of) {
            assert_eq!(row.flow.local_k8s.as_ref().map(|it| &*it.pod), Some(name));
        }
    }
}
