//! A server on loopback that answers LIST and WATCH of the one object like the API server does.

use std::{collections::HashMap, io, net::SocketAddr, sync::Arc};

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

/// Version of a store without an object; an object adds its generation.
const FIRST_VERSION: u64 = 100;

/// The server, its object `cluster`, and what it was asked.
#[derive(Debug)]
pub struct FakeApi {
    object: Mutex<Option<Value>>,
    /// Queries, lists and watches.
    pub asked: Mutex<Vec<HashMap<String, String>>>,
    /// Lines to the open watches; `None` ends them.
    lines: broadcast::Sender<Option<String>>,
}

impl FakeApi {
    /// Without an object.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            object: Mutex::default(),
            asked: Mutex::default(),
            lines: broadcast::Sender::new(64),
        })
    }

    /// Answers at `address`, with port 0 at any, until the handle is aborted.
    ///
    /// # Errors
    /// The address cannot be listened on.
    pub async fn serve(self: &Arc<Self>, address: SocketAddr) -> io::Result<(SocketAddr, JoinHandle<io::Result<()>>)> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let path = "/apis/ebpfcollector.io/v1alpha1/ebpfcollectors";
        let router = Router::new().route(path, get(answer)).with_state(Arc::clone(self));
        let serving = tokio::spawn(async move { axum::serve(listener, router).await });
        Ok((address, serving))
    }

    /// Stores the object, without telling the watches.
    pub fn store(&self, generation: i64, spec: &Value) -> Value {
        let object = json!({
            "apiVersion": "ebpfcollector.io/v1alpha1", "kind": "EbpfCollector", "spec": spec,
            "metadata": {
                "name": "cluster", "uid": "u", "generation": generation,
                "resourceVersion": FIRST_VERSION.saturating_add_signed(generation).to_string(),
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

    /// Deletes the object and tells the watches.
    pub fn delete(&self) {
        let object = self.object.lock().take();
        if let Some(object) = object {
            self.tell("DELETED", &object);
        }
    }

    /// Sends an event to the open watches, if there are any.
    pub fn tell(&self, event: &str, object: &Value) {
        let line = json!({ "type": event, "object": object }).to_string();
        let _ = self.lines.send(Some(line));
    }

    /// Ends every watch.
    pub fn cut(&self) {
        let _ = self.lines.send(None);
    }

    /// Watches that are open.
    #[must_use]
    pub fn listeners(&self) -> usize {
        self.lines.receiver_count()
    }

    /// Watches so far.
    #[must_use]
    pub fn watches(&self) -> usize {
        self.asked
            .lock()
            .iter()
            .filter(|query| query.contains_key("watch"))
            .count()
    }
}

async fn answer(State(server): State<Arc<FakeApi>>, Query(query): Query<HashMap<String, String>>) -> impl IntoResponse {
    let watch = query.contains_key("watch");
    let known = query.get("resourceVersion").and_then(|known| known.parse().ok());
    // Before the list is read, so that nothing falls in between.
    let lines = BroadcastStream::new(server.lines.subscribe());
    server.asked.lock().push(query);
    let stored = server.object.lock().clone();
    if watch {
        // What changed since the version that the watch goes on from.
        let missed = stored.filter(|object| version(object) > known.unwrap_or(u64::MAX));
        let missed = missed.map(|object| json!({ "type": "MODIFIED", "object": object }).to_string());
        let lines = tokio_stream::iter(missed)
            .chain(lines.map_while(|line| line.ok().flatten()))
            .map(|line| Ok::<_, std::convert::Infallible>(line + "\n"));
        return Body::from_stream(lines).into_response();
    }
    let at = stored.as_ref().map_or(FIRST_VERSION, version);
    let items: Vec<Value> = stored.into_iter().collect();
    json!({
        "apiVersion": "ebpfcollector.io/v1alpha1", "kind": "EbpfCollectorList",
        "metadata": { "resourceVersion": at.to_string() }, "items": items,
    })
    .to_string()
    .into_response()
}

fn version(object: &Value) -> u64 {
    let version = object.pointer("/metadata/resourceVersion").and_then(Value::as_str);
    version.and_then(|version| version.parse().ok()).unwrap_or_default()
}
