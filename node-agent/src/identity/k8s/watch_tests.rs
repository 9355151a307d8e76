//! Against a server on loopback that speaks the API's LIST and WATCH over HTTP.
#![allow(clippy::unwrap_used)]

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
};

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    sync::broadcast,
    task::JoinSet,
};

use super::*;

/// What the server has, and what it was asked.
#[derive(Debug)]
struct Cluster {
    /// By kind, then by name.
    objects: Mutex<BTreeMap<&'static str, BTreeMap<String, Value>>>,
    requests: Mutex<Vec<(String, HashMap<String, String>)>>,
    /// To the open watches of a kind: a line, or the end of the stream.
    lines: broadcast::Sender<(&'static str, Option<String>)>,
}

impl Cluster {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            objects: Mutex::default(),
            requests: Mutex::default(),
            lines: broadcast::Sender::new(64),
        })
    }

    fn put(&self, kind: &'static str, object: Value) {
        let name = object["metadata"]["name"].as_str().unwrap().to_owned();
        self.objects.lock().entry(kind).or_default().insert(name, object);
    }

    fn send(&self, kind: &'static str, event: &str, object: &Value) {
        let line = json!({"type": event, "object": object}).to_string();
        self.lines.send((kind, Some(line))).unwrap();
    }

    /// Requests for a kind, by whether they are watches.
    fn requests(&self, kind: &str, watch: bool) -> Vec<HashMap<String, String>> {
        let requests = self.requests.lock();
        let asked = requests
            .iter()
            .filter(|(of, query)| of == kind && query.contains_key("watch") == watch);
        asked.map(|(_, query)| query.clone()).collect()
    }

    /// Answers until it is dropped; then every connection ends.
    async fn serve(self: Arc<Self>, address: SocketAddr) -> (SocketAddr, JoinSet<()>) {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let cluster = Arc::clone(&self);
                // A client that hangs up is no failure.
                connections.spawn(async move { drop(cluster.answer(stream).await) });
            }
        });
        (address, serving)
    }

    async fn answer(&self, mut stream: TcpStream) -> std::io::Result<()> {
        let (read, mut write) = stream.split();
        let mut lines = BufReader::new(read).lines();
        let first = lines.next_line().await?.unwrap_or_default();
        while lines.next_line().await?.is_some_and(|line| !line.is_empty()) {}
        let target = first.split(' ').nth(1).unwrap_or_default();
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let kind = path.rsplit('/').next().unwrap_or_default().to_owned();
        let query: HashMap<String, String> = query
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect();
        let watch = query.contains_key("watch");
        let mut coming = self.lines.subscribe();
        self.requests.lock().push((kind.clone(), query.clone()));
        if !watch {
            let body = self.list(&kind, &query).to_string();
            let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length";
            return write
                .write_all(format!("{head}: {}\r\n\r\n{body}", body.len()).as_bytes())
                .await;
        }
        let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n";
        write
            .write_all(format!("{head}transfer-encoding: chunked\r\n\r\n").as_bytes())
            .await?;
        while let Ok((of, line)) = coming.recv().await {
            match line {
                _ if of != kind => {}
                Some(line) => {
                    write
                        .write_all(format!("{:x}\r\n{line}\n\r\n", line.len() + 1).as_bytes())
                        .await?
                }
                None => break,
            }
        }
        write.write_all(b"0\r\n\r\n").await
    }

    fn list(&self, kind: &str, query: &HashMap<String, String>) -> Value {
        let number = |key: &str| query.get(key).and_then(|it| it.parse::<usize>().ok());
        let (from, limit) = (number("continue").unwrap_or(0), number("limit").unwrap_or(usize::MAX));
        let objects = self.objects.lock();
        let all: Vec<&Value> = objects.get(kind).into_iter().flat_map(BTreeMap::values).collect();
        let page: Vec<_> = all.iter().skip(from).take(limit).collect();
        let next = from + page.len();
        let next = if next < all.len() {
            next.to_string()
        } else {
            String::new()
        };
        json!({"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": "100", "continue": next}, "items": page})
    }
}

fn uid(n: u32) -> String {
    format!("00000000-0000-4000-8000-{n:012x}")
}

fn pod(n: u32) -> Value {
    let ip = format!("10.0.0.{n}");
    json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": format!("p{n}"), "namespace": "shop", "uid": uid(n), "resourceVersion": format!("{}", 200 + n)},
        "spec": {"nodeName": "one", "containers": []},
        "status": {"phase": "Running", "startTime": "2020-01-01T00:00:00Z", "podIP": ip, "podIPs": [{"ip": ip}]}})
}

/// The pod of an address now.
fn name(names: &Names, n: u32) -> Result<String, Unnamed> {
    let ip = format!("10.0.0.{n}").parse().unwrap();
    let found = names.remote(ip, 80, Transport::Tcp, now_ns())?;
    Ok(found.pod.to_string())
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "not within 20 s: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Names fed by a server at `address`.
fn start(address: SocketAddr, root: &std::path::Path) -> (Names, JoinSet<()>) {
    let config = kube::Config::new(format!("http://{address}").parse().unwrap());
    let options = Options {
        node: "one".to_owned(),
        host_root: root.to_owned(),
        page_size: 2,
    };
    let (names, feed) = names(Client::try_from(config).unwrap(), &options);
    let mut feeding = JoinSet::new();
    feeding.spawn(feed);
    (names, feeding)
}

fn loopback() -> SocketAddr {
    (std::net::Ipv4Addr::LOCALHOST, 0).into()
}

#[tokio::test]
async fn lists_in_pages_then_follows_and_resumes_at_a_bookmark() {
    let cluster = Cluster::new();
    (1..=5).for_each(|n| cluster.put("pods", pod(n)));
    let root = tempfile::tempdir().unwrap();
    let (address, _serving) = Arc::clone(&cluster).serve(loopback()).await;
    let (names, _feeding) = start(address, root.path());
    until("every kind is listed", || {
        Kind::ALL.iter().all(|kind| names.health(*kind).lists == 1)
    })
    .await;
    for n in 1..=5 {
        assert_eq!(name(&names, n).unwrap(), format!("p{n}"));
    }
    let lists = cluster.requests("pods", false);
    let pages: Vec<_> = lists
        .iter()
        .map(|query| query.get("continue").map(String::as_str))
        .collect();
    assert_eq!(pages, [None, Some("2"), Some("4")]);

    until("pods are watched", || cluster.requests("pods", true).len() == 1).await;
    let watch = cluster.requests("pods", true).remove(0);
    assert_eq!(watch.get("resourceVersion").map(String::as_str), Some("100"));
    assert_eq!(watch.get("allowWatchBookmarks").map(String::as_str), Some("true"));
    cluster.send("pods", "ADDED", &pod(6));
    cluster.send("pods", "DELETED", &pod(1));
    let mark = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"resourceVersion": "900"}});
    cluster.send("pods", "BOOKMARK", &mark);
    until("a new pod is named", || name(&names, 6) == Ok("p6".to_owned())).await;
    until("a pod ends", || names.counts().history == 1).await;
    assert_eq!(name(&names, 1).unwrap(), "p1");
    cluster.lines.send(("pods", None)).unwrap();
    until("pods are watched again", || cluster.requests("pods", true).len() == 2).await;
    let watch = cluster.requests("pods", true).remove(1);
    assert_eq!(watch.get("resourceVersion").map(String::as_str), Some("900"));
    assert_eq!(cluster.requests("pods", false).len(), 3, "a resumed watch lists again");
}

#[tokio::test]
async fn an_expired_version_lists_again_and_ends_what_is_gone() {
    let cluster = Cluster::new();
    (1..=3).for_each(|n| cluster.put("pods", pod(n)));
    let root = tempfile::tempdir().unwrap();
    let (address, _serving) = Arc::clone(&cluster).serve(loopback()).await;
    let (names, _feeding) = start(address, root.path());
    until("pods are watched", || cluster.requests("pods", true).len() == 1).await;
    cluster.objects.lock().get_mut("pods").unwrap().remove("p2");
    cluster.put("pods", pod(4));
    let gone = json!({"apiVersion": "v1", "kind": "Status", "metadata": {}, "status": "Failure",
        "message": "too old resource version", "reason": "Expired", "code": 410});
    cluster.send("pods", "ERROR", &gone);
    until("pods are listed again", || names.health(Kind::Pod).lists == 2).await;
    assert_eq!((names.counts().pods, names.counts().history), (3, 1));
    assert_eq!(name(&names, 4).unwrap(), "p4");
    assert_eq!(names.health(Kind::Service).lists, 1, "another kind listed again");
}

#[tokio::test]
async fn answers_while_the_server_is_away() {
    let cluster = Cluster::new();
    cluster.put("pods", pod(1));
    let shop = |team: &str| {
        json!({"apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": "shop", "uid": uid(90), "resourceVersion": "150", "labels": {"team": team}}})
    };
    cluster.put("namespaces", shop("a"));
    let root = tempfile::tempdir().unwrap();
    let (address, mut serving) = Arc::clone(&cluster).serve(loopback()).await;
    let (names, _feeding) = start(address, root.path());
    let namespaces = names.namespaces();
    let team = || {
        namespaces
            .borrow()
            .get("shop")
            .and_then(|it| it.labels.get("team").cloned())
    };
    until("both kinds are watched", || {
        ["pods", "namespaces"]
            .iter()
            .all(|kind| cluster.requests(kind, true).len() == 1)
    })
    .await;
    assert_eq!(team().as_deref(), Some("a"));
    cluster.send("namespaces", "MODIFIED", &shop("b"));
    until("a label changes", || team().as_deref() == Some("b")).await;

    serving.shutdown().await;
    until("errors are counted", || names.health(Kind::Pod).errors_since_event > 0).await;
    assert_eq!(name(&names, 1).unwrap(), "p1");
    assert_eq!(team().as_deref(), Some("b"));
    let before = cluster.requests("pods", true).len();
    let (_, _serving) = Arc::clone(&cluster).serve(address).await;
    until("pods are watched again", || {
        cluster.requests("pods", true).len() > before
    })
    .await;
    cluster.send("pods", "ADDED", &pod(2));
    until("a new pod is named", || name(&names, 2) == Ok("p2".to_owned())).await;
    assert_eq!(names.health(Kind::Pod).errors_since_event, 0);
    assert!(
        names
            .health(Kind::Pod)
            .last_event
            .is_some_and(|age| age < Duration::from_secs(20))
    );
}

#[tokio::test]
async fn local_ends_by_cgroup_process_and_address() {
    let cluster = Cluster::new();
    (1..=3).for_each(|n| cluster.put("pods", pod(n)));
    let node = json!({"metadata": {"name": "one", "uid": uid(50), "resourceVersion": "9"},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.168.0.1"}]}});
    cluster.put("nodes", node);
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    let dir = |n: u32| format!("kubepods.slice/kubepods-pod{}.slice", uid(n).replace('-', "_"));
    let cgroup = root.join("sys/fs/cgroup").join(dir(1));
    fs::create_dir_all(&cgroup).unwrap();
    fs::write(root.join("sys/fs/cgroup/cgroup.controllers"), "").unwrap();
    fs::create_dir_all(root.join("proc/7")).unwrap();
    fs::write(root.join("proc/7/cgroup"), format!("0::/{}/c\n", dir(2))).unwrap();
    fs::create_dir_all(root.join("proc/1/ns")).unwrap();
    fs::write(root.join("proc/1/ns/net"), "").unwrap();
    let host = fs::metadata(root.join("proc/1/ns/net")).unwrap().ino();
    let id = fs::metadata(&cgroup).unwrap().ino();
    let (address, _serving) = Arc::clone(&cluster).serve(loopback()).await;
    let (names, _feeding) = start(address, root);
    until("names are there", || {
        [Kind::Pod, Kind::Node]
            .iter()
            .all(|kind| names.health(*kind).lists == 1)
            && names.pod_of_cgroup(id).is_some()
    })
    .await;
    let local = |cgroup_id, pid, netns, ip: &str| {
        let ip = ip.parse().unwrap();
        let end = Local {
            cgroup_id,
            pid,
            netns,
            ip,
            at: now_ns(),
        };
        names
            .local(&end)
            .map(|it| format!("{}/{}", it.workload_type, it.workload))
    };
    // All on the node's address: pods in its network are told apart by cgroup, then by process.
    assert_eq!(local(id, 7, host, "192.168.0.1").unwrap(), "pod/p1");
    assert_eq!(local(0, 7, host, "192.168.0.1").unwrap(), "pod/p2");
    assert_eq!(local(0, 0, host, "127.0.0.1").unwrap(), "node/one");
    assert_eq!(local(0, 0, host + 1, "10.0.0.3").unwrap(), "pod/p3");
    assert_eq!(local(0, 0, host + 1, "127.0.0.1"), Err(Unnamed::Unknown));
    assert_eq!(names.is_local(names.pod_of_cgroup(id).unwrap()), Some(true));
}
