//! Namespaces switched off and on under real traffic, with the real kernel programs and a server that speaks the
//! Kubernetes API. Truth is what the servers of the traffic received.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::{
    fs,
    io::Read as _,
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
use records::{Port, RecordBatch};
use serde_json::json;
use telemetry::Telemetry;
use tokio::sync::{mpsc, watch};

use crate::{
    capture::{
        ebpf_net::{End, InCluster, Instruments, NetCapture, NetCaptureConfig, Orders},
        test_pods::{Kubepods, namespace, pod, uid},
    },
    ebpf::{net::LoadOptions, offsets::CgroupHierarchy},
    identity::{
        cgroup,
        k8s::{
            self, Kind, Options,
            fake_api::{Cluster, loopback, until},
        },
    },
};

/// Bytes per message.
const MESSAGE: u64 = 100;
/// What a process in a pod does, given the pod's cgroup and a port: one connection stays open, others come and go. Ends
/// with the server.
const TALKER: &str = r#"
    echo $$ > "$1/cgroup.procs" && exec 3<>"/dev/tcp/127.0.0.1/$2" || exit
    while printf %0100d 0 >&3; do
        exec 4<>"/dev/tcp/127.0.0.1/$2" && printf %0100d 0 >&4 && exec 4>&- || exit
        sleep 0.05
    done
"#;

/// A listener that counts what it is sent.
struct Sink {
    port: u16,
    received: Arc<AtomicU64>,
}

impl Sink {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let received = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&received);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (counter, mut stream) = (Arc::clone(&counter), stream);
                thread::spawn(move || {
                    let mut buffer = [0; 4096];
                    while let Ok(n @ 1..) = stream.read(&mut buffer) {
                        counter.fetch_add(n as u64, Ordering::Relaxed);
                    }
                });
            }
        });
        Self { port, received }
    }

    fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }
}

/// A pod: its cgroup, its process, and where that talks to.
struct Pod {
    cgroup: PathBuf,
    sink: Sink,
    talker: Option<Child>,
}

impl Pod {
    /// Makes the cgroup; nothing runs in it yet.
    fn new(kubepods: &Path, uid: &str) -> Self {
        let cgroup = kubepods.join(format!("pod{uid}"));
        fs::create_dir_all(&cgroup).unwrap();
        Self {
            cgroup,
            sink: Sink::start(),
            talker: None,
        }
    }

    fn talk(&mut self) {
        let talker = Command::new("bash")
            .args(["-c", TALKER, "talker"])
            .arg(&self.cgroup)
            .arg(self.sink.port.to_string())
            .stderr(Stdio::null())
            .spawn();
        self.talker = Some(talker.unwrap());
    }

    /// Ends the process; what it sent and the server has.
    fn stop(&mut self) -> u64 {
        if let Some(mut talker) = self.talker.take() {
            talker.kill().unwrap();
            talker.wait().unwrap();
        }
        // The last bytes are on their way to the server's threads.
        thread::sleep(Duration::from_millis(300));
        self.sink.received()
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        self.stop();
        let deadline = Instant::now() + Duration::from_secs(5);
        while fs::remove_dir(&self.cgroup).is_err() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// What was reported of one pod's traffic.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    written: u64,
    rows: u64,
    last: Option<Instant>,
}

/// Rows as they come, of the clients' ends.
struct Rows {
    batches: mpsc::Receiver<RecordBatch>,
    wrong: Vec<String>,
    pods: Vec<(u16, &'static str, Seen)>,
}

impl Rows {
    fn of(&self, port: u16) -> Seen {
        self.pods.iter().find(|(of, ..)| *of == port).unwrap().2
    }

    /// Takes in what comes for so long.
    async fn collect(&mut self, time: Duration) {
        let deadline = tokio::time::Instant::now() + time;
        while let Ok(Some(batch)) = tokio::time::timeout_at(deadline, self.batches.recv()).await {
            for row in batch.netflow {
                let Port::Number(port) = row.remote.port else { continue };
                let Some((_, name, seen)) = self.pods.iter_mut().find(|(of, ..)| *of == port) else {
                    continue;
                };
                let pod = row.local_k8s.as_ref().map(|it| it.pod.to_string());
                if pod.as_deref() != Some(*name) {
                    self.wrong.push(format!("{name} is named {pod:?}"));
                }
                seen.written += row.bytes_written;
                seen.rows += 1;
                seen.last = Some(Instant::now());
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "native: needs root"]
async fn namespaces_are_switched_under_traffic() {
    let (_, root) = cgroup::find_hierarchy(&[Path::new("/sys/fs/cgroup")], "");
    let kubepods = Kubepods::new(&root);
    let (hierarchy, found) = cgroup::find_hierarchy(&[Path::new("/sys/fs/cgroup")], "");
    assert_eq!(root, found);
    let mut shop = Pod::new(&kubepods.0, &uid(1));
    let mut bank = Pod::new(&kubepods.0, &uid(2));
    let cluster = Cluster::new();
    cluster.put("pods", pod("shop-1", "shop", 1));
    cluster.put("pods", pod("bank-1", "bank", 2));
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
    // Older than the capture.
    bank.talk();

    let telemetry = Telemetry::new("test", "0");
    let instruments = Instruments::new(&telemetry);
    let spec: EbpfCollectorSpec = serde_json::from_value(json!({"allowNamespaceAnnotation": true})).unwrap();
    let (_spec, spec) = watch::channel(Arc::new(spec));
    let config = NetCaptureConfig {
        interval: Duration::from_secs(1),
        loopback: true,
        ipv6_disabled: false,
        ephemeral_port: 10_001,
        proc: "/proc".into(),
        own_node_only: false,
        rows_max: 10_000,
        load: LoadOptions {
            tcp_connections_max: 10_000,
            flow_map_entries: 4096,
            ring_buffer_size: 1 << 20,
            cgroups: hierarchy.clone(),
            refuse: Vec::new(),
        },
    };
    assert!(matches!(hierarchy, CgroupHierarchy::V2 | CgroupHierarchy::V1(_)));
    let in_cluster = InCluster { names, spec };
    let mut capture = tokio::task::spawn_blocking(move || {
        NetCapture::start(config, &instruments, Some(in_cluster), watch::channel(None).1)
    })
    .await
    .unwrap()
    .unwrap();
    let keeping = tokio::spawn(capture.take_keeper().unwrap().run());
    let bank_adopted = bank.sink.received();
    let (orders, told) = watch::channel(Orders::Collect {
        interval: Duration::from_secs(1),
    });
    let (out, batches) = mpsc::channel(64);
    let running = thread::spawn(move || capture.run(&out, &told));
    shop.talk();
    let mut rows = Rows {
        batches,
        wrong: Vec::new(),
        pods: vec![
            (shop.sink.port, "shop-1", Seen::default()),
            (bank.sink.port, "bank-1", Seen::default()),
        ],
    };

    rows.collect(Duration::from_secs(4)).await;
    let (before, shop_before) = (rows.of(bank.sink.port), rows.of(shop.sink.port));
    assert!(
        before.written > 0 && shop_before.written > 0,
        "{before:?} {shop_before:?}"
    );

    // Off: what was until then comes at once, then nothing, and the others go on.
    let sent_before = bank.sink.received();
    let off = Instant::now();
    cluster.send("namespaces", "MODIFIED", &namespace("bank", Some("none")));
    rows.collect(Duration::from_secs(2)).await;
    let at_end = rows.of(bank.sink.port);
    assert!(
        at_end.last.is_some_and(|last| last < off + Duration::from_millis(1500)),
        "late: {at_end:?}"
    );
    let sent = sent_before - bank_adopted;
    assert!(
        at_end.written + 20 * MESSAGE > sent,
        "the last rows are missing: {at_end:?}, {sent} sent"
    );
    // A pod that is made while its namespace is off is never seen.
    let mut late = Pod::new(&kubepods.0, &uid(3));
    rows.pods.push((late.sink.port, "bank-2", Seen::default()));
    cluster.send("pods", "ADDED", &pod("bank-2", "bank", 3));
    thread::sleep(Duration::from_millis(100));
    late.talk();
    let shop_at = rows.of(shop.sink.port);
    rows.collect(Duration::from_secs(4)).await;
    assert_eq!(rows.of(bank.sink.port).rows, at_end.rows, "rows of what is off");
    assert!(late.sink.received() > 0, "the new pod does not talk");
    assert_eq!(
        rows.of(late.sink.port).rows,
        0,
        "rows of a pod that was off from the start"
    );
    let shop_now = rows.of(shop.sink.port);
    assert!(shop_now.rows >= shop_at.rows + 3 && shop_now.written > shop_at.written);

    // On again: the open connection is picked up, and what it did meanwhile is not counted.
    let sent_meanwhile = bank.sink.received();
    assert!(sent_meanwhile > at_end.written + 10 * MESSAGE, "the bank went silent");
    cluster.send("namespaces", "MODIFIED", &namespace("bank", None));
    rows.collect(Duration::from_secs(4)).await;
    let again = rows.of(bank.sink.port);
    let (counted, sent) = (again.written - at_end.written, bank.sink.received() - sent_meanwhile);
    assert!(
        counted > 10 * MESSAGE && counted <= sent,
        "{counted} counted, {sent} sent"
    );
    let of_shop = shop.stop();
    let of_bank = bank.stop();
    late.stop();
    orders.send_replace(Orders::Finish(End::Stop));
    rows.collect(Duration::from_secs(3)).await;
    thread::spawn(move || running.join()).join().unwrap().unwrap();
    keeping.abort();
    feeding.abort();
    // Half of what is sent goes over the connection that was open all the time.
    let counted = rows.of(bank.sink.port).written - at_end.written;
    let sent = of_bank - sent_meanwhile;
    assert!(
        counted <= sent && counted > sent * 3 / 4,
        "the open connection is missing: {counted} of {sent}"
    );
    let seen = rows.of(shop.sink.port);
    assert_eq!(seen.written, of_shop, "every byte of what was on all the time");
    assert_eq!(rows.wrong, Vec::<String>::new());
    // In the first two minutes the kernel side takes a close without an entry for one that is older than the agent.
    let skipped = &telemetry.ledger.snapshot()["capture.tcp"].skipped;
    let left_out: u64 = ["switched_off", "predates_agent"]
        .iter()
        .filter_map(|why| skipped.get(*why))
        .sum();
    assert!(left_out > 20, "{skipped:?}");
}
