//! A server on loopback that speaks the API's LIST and WATCH over HTTP, for tests.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use kube::Client;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    sync::broadcast,
    task::JoinSet,
};

use super::{Names, Options, names};

/// What the server has, and what it was asked.
#[derive(Debug)]
pub(crate) struct Cluster {
    /// By kind, then by name.
    pub(crate) objects: Mutex<BTreeMap<&'static str, BTreeMap<String, Value>>>,
    requests: Mutex<Vec<(String, HashMap<String, String>)>>,
    /// To the open watches of a kind: a line, or the end of the stream.
    pub(crate) lines: broadcast::Sender<(&'static str, Option<String>)>,
}

impl Cluster {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            objects: Mutex::default(),
            requests: Mutex::default(),
            lines: broadcast::Sender::new(64),
        })
    }

    pub(crate) fn put(&self, kind: &'static str, object: Value) {
        let name = object["metadata"]["name"].as_str().unwrap().to_owned();
        self.objects.lock().entry(kind).or_default().insert(name, object);
    }

    pub(crate) fn send(&self, kind: &'static str, event: &str, object: &Value) {
        let line = json!({"type": event, "object": object}).to_string();
        self.lines.send((kind, Some(line))).unwrap();
    }

    /// Requests for a kind, by whether they are watches.
    pub(crate) fn requests(&self, kind: &str, watch: bool) -> Vec<HashMap<String, String>> {
        let requests = self.requests.lock();
        let asked = requests
            .iter()
            .filter(|(of, query)| of == kind && query.contains_key("watch") == watch);
        asked.map(|(_, query)| query.clone()).collect()
    }

    /// Answers until it is dropped; then every connection ends.
    pub(crate) async fn serve(self: Arc<Self>, address: SocketAddr) -> (SocketAddr, JoinSet<()>) {
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

pub(crate) fn uid(n: u32) -> String {
    format!("00000000-0000-4000-8000-{n:012x}")
}

pub(crate) fn pod(n: u32) -> Value {
    let ip = format!("10.0.0.{n}");
    json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": format!("p{n}"), "namespace": "shop", "uid": uid(n), "resourceVersion": format!("{}", 200 + n)},
        "spec": {"nodeName": "one", "containers": []},
        "status": {"phase": "Running", "startTime": "2020-01-01T00:00:00Z", "podIP": ip, "podIPs": [{"ip": ip}]}})
}

pub(crate) async fn until(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "not within 20 s: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Names fed by a server at `address`.
pub(crate) fn start(address: SocketAddr, root: &std::path::Path) -> (Names, JoinSet<()>) {
    let config = kube::Config::new(format!("http://{address}").parse().unwrap());
    let options = Options {
        node: "one".to_owned(),
        host_root: root.to_owned(),
        proc: root.join("proc"),
        page_size: 2,
    };
    let (names, feed) = names(Client::try_from(config).unwrap(), &options);
    let mut feeding = JoinSet::new();
    feeding.spawn(feed);
    (names, feeding)
}

pub(crate) fn loopback() -> SocketAddr {
    (std::net::Ipv4Addr::LOCALHOST, 0).into()
}
