//! Namespaces for which `httpflow` is switched off and on under real traffic, with the real kernel programs. Truth is what the
//! servers of the traffic answered.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpListener,
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

use super::*;
use crate::{
    capture::{
        ebpf_net::InCluster,
        test_pods::{Kubepods, namespace, pod, uid},
    },
    identity::{
        cgroup,
        k8s::{
            self, Kind, Options,
            fake_api::{Cluster, loopback, until},
        },
    },
};

/// What a process in a pod does, given the pod's cgroup and a port: requests over one connection, until the server ends.
const TALKER: &str = r#"
    echo $$ > "$1/cgroup.procs" && exec 3<>"/dev/tcp/127.0.0.1/$2" || exit
    while printf 'GET /pod HTTP/1.1\r\nHost: x\r\n\r\n' >&3; do
        for line in 1 2 3; do read -r -u 3 || exit; done
        sleep 0.02
    done
"#;
const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";

/// A pod that asks, and the server that it asks.
struct Talker {
    cgroup: PathBuf,
    port: u16,
    answered: Arc<AtomicU64>,
    process: Child,
}

impl Talker {
    fn start(kubepods: &Path, uid: &str) -> Self {
        let cgroup = kubepods.join(format!("pod{uid}"));
        fs::create_dir_all(&cgroup).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let answered = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&answered);
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut buffer = [0; 4096];
            while matches!(stream.read(&mut buffer), Ok(1..)) && stream.write_all(ANSWER).is_ok() {
                counter.fetch_add(1, Ordering::Relaxed);
            }
        });
        let process = Command::new("bash")
            .args(["-c", TALKER, "talker"])
            .arg(&cgroup)
            .arg(port.to_string())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self {
            cgroup,
            port,
            answered,
            process,
        }
    }

    fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// Ends the process; how often it was answered.
    fn stop(&mut self) -> u64 {
        let _ = self.process.kill();
        let _ = self.process.wait();
        thread::sleep(Duration::from_millis(200));
        self.answered()
    }
}

impl Drop for Talker {
    fn drop(&mut self) {
        self.stop();
        let deadline = Instant::now() + Duration::from_secs(5);
        while fs::remove_dir(&self.cgroup).is_err() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Rows of clients, as they come.
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

    /// Answered requests to a port.
    fn count(&self, port: u16) -> u64 {
        let rows = self.rows.iter();
        rows.filter(|row| row.flow.remote.port == Port::Number(port) && row.status_code == 200)
            .map(|row| row.count)
            .sum()
    }
}

fn spec(l7: &[&str]) -> Arc<EbpfCollectorSpec> {
    let spec = json!({"plugins": {"ebpf-net": {}},
        "namespaces": [{"match": {"names": ["bank"]}, "plugins": {"ebpf-net": {"l7": l7}}}]});
    Arc::new(serde_json::from_value(spec).unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "native: needs root"]
async fn httpflow_is_switched_by_namespace() {
    let (hierarchy, root) = cgroup::find_hierarchy(&[Path::new("/sys/fs/cgroup")], "");
    let kubepods = Kubepods::new(&root);
    let mut shop = Talker::start(&kubepods.0, &uid(11));
    let mut bank = Talker::start(&kubepods.0, &uid(12));
    let cluster = Cluster::new();
    cluster.put("pods", pod("shop-1", "shop", 11));
    cluster.put("pods", pod("bank-1", "bank", 12));
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
    let (object, told) = watch::channel(spec(&[]));
    let config = HttpConfig {
        interval: Duration::from_secs(1),
        loopback: true,
        ipv6_disabled: false,
        // Test servers have ports like clients.
        ephemeral_port: u16::MAX,
        keep_query: false,
        path_limit: 512,
        routes: Vec::new(),
        series_max: 1000,
        proc: "/proc".into(),
        own_node_only: false,
        load: LoadOptions {
            ring_buffer_size: 1 << 20,
            cgroups: hierarchy,
            refuse: Vec::new(),
        },
    };
    let with = Surroundings {
        metrics: HttpCapture::metrics(&telemetry),
        telemetry,
        cluster: Some(InCluster { names, spec: told }),
        nat: watch::channel(None).1,
        domains: DomainNames::default(),
        entry: crate::ebpf::entry::Entry::default(),
    };
    let capture = tokio::task::spawn_blocking(move || HttpCapture::start(&config, with)).await;
    let capture = capture.unwrap().unwrap();
    let interval = Duration::from_secs(1);
    let (orders, ordered) = watch::channel(Orders::Collect { interval });
    let (out, batches) = mpsc::channel(64);
    let running = thread::spawn(move || capture.run(&out, &ordered));
    let mut clients = Clients {
        batches,
        rows: Vec::new(),
    };

    // Off for the bank, though ebpf-net is on.
    clients.collect(Duration::from_secs(4)).await;
    assert!(bank.answered() > 20 && clients.count(bank.port) == 0);
    assert!(clients.count(shop.port) > 20);
    // On: the open connection is picked up.
    let before = bank.answered();
    object.send_replace(spec(&["httpflow"]));
    clients.collect(Duration::from_secs(4)).await;
    let counted = clients.count(bank.port);
    assert!(counted > 20 && counted <= bank.answered() - before, "{counted}");
    // Off again, and the other goes on.
    object.send_replace(spec(&[]));
    clients.collect(Duration::from_secs(2)).await;
    let (of_bank, of_shop) = (clients.count(bank.port), clients.count(shop.port));
    clients.collect(Duration::from_secs(3)).await;
    assert_eq!(clients.count(bank.port), of_bank);
    assert!(clients.count(shop.port) > of_shop + 20);
    bank.stop();
    let answered = shop.stop();
    orders.send_replace(Orders::Finish(End::Stop));
    clients.collect(Duration::from_secs(3)).await;
    running.join().unwrap();
    feeding.abort();
    // The first ones were asked before anybody looked.
    let counted = clients.count(shop.port);
    assert!(
        counted <= answered && counted + 100 > answered,
        "{counted} of {answered}"
    );
    for (port, name) in [(shop.port, "shop-1"), (bank.port, "bank-1")] {
        let of = |row: &&Httpflow| row.flow.remote.port == Port::Number(port);
        for row in clients.rows.iter().filter(of) {
            assert_eq!(row.flow.local_k8s.as_ref().map(|it| &*it.pod), Some(name));
        }
    }
}
