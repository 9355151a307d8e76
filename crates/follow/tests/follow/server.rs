//! A server on loopback that answers LIST and WATCH of the objects like the API server does.

use std::{
    collections::HashMap,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
};

use axum::{
    Router,
    body::Body,
    extract::{Query, State},
    response::IntoResponse,
    routing::get,
};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::broadcast, task::JoinHandle};
use tokio_stream::{StreamExt as _, wrappers::BroadcastStream};

/// What the server has, and what it was asked.
#[derive(Debug)]
pub struct Server {
    object: Mutex<Option<Value>>,
    /// Queries, lists and watches.
    pub asked: Mutex<Vec<HashMap<String, String>>>,
    /// Lines to the open watches; `None` ends them.
    lines: broadcast::Sender<Option<String>>,
}

impl Server {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            object: Mutex::default(),
            asked: Mutex::default(),
            lines: broadcast::Sender::new(64),
        })
    }

    /// Answers until the handle is aborted.
    pub async fn serve(self: &Arc<Self>, address: SocketAddr) -> (SocketAddr, JoinHandle<()>) {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let path = "/apis/ebpfcollector.io/v1alpha1/ebpfcollectors";
        let router = Router::new().route(path, get(answer)).with_state(Arc::clone(self));
        let serving = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        (address, serving)
    }

    /// Stores the object, without telling the watches.
    pub fn store(&self, generation: i64, spec: &Value) -> Value {
        let object = json!({
            "apiVersion": "ebpfcollector.io/v1alpha1", "kind": "EbpfCollector", "spec": spec,
            "metadata": {
                "name": "cluster", "uid": "u", "generation": generation,
                "resourceVersion": (100 + generation).to_string(),
            },
        });
        *self.object.lock() = Some(object.clone());
        object
    }

    /// Stores the object and tells the watches.
    pub fn change(&self, generation: i64, spec: &Value) {
        let object = self.store(generation, spec);
        self.tell("MODIFIED", &object);
    }

    pub fn delete(&self) {
        let object = self.object.lock().take().unwrap();
        self.tell("DELETED", &object);
    }

    pub fn tell(&self, event: &str, object: &Value) {
        let line = json!({ "type": event, "object": object }).to_string();
        self.lines.send(Some(line)).unwrap();
    }

    /// Ends every watch.
    pub fn cut(&self) {
        let _ = self.lines.send(None);
    }

    /// Watches that are open.
    pub fn listeners(&self) -> usize {
        self.lines.receiver_count()
    }

    pub fn watches(&self) -> usize {
        self.asked
            .lock()
            .iter()
            .filter(|query| query.contains_key("watch"))
            .count()
    }
}

pub fn loopback() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 0).into()
}

async fn answer(State(server): State<Arc<Server>>, Query(query): Query<HashMap<String, String>>) -> impl IntoResponse {
    let watch = query.contains_key("watch");
    // Before the list is read, so that nothing falls in between.
    let lines = BroadcastStream::new(server.lines.subscribe());
    server.asked.lock().push(query);
    if watch {
        let lines = lines
            .map_while(|line| line.ok().flatten())
            .map(|line| Ok::<_, std::convert::Infallible>(line + "\n"));
        return Body::from_stream(lines).into_response();
    }
    let items: Vec<Value> = server.object.lock().iter().cloned().collect();
    json!({
        "apiVersion": "ebpfcollector.io/v1alpha1", "kind": "EbpfCollectorList",
        "metadata": { "resourceVersion": "100" }, "items": items,
    })
    .to_string()
    .into_response()
}
