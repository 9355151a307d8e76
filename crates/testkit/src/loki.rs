//! A receiver of Loki's push protocol that takes nothing that Loki would not.
//!
//! It refuses, and says why: another path or method, a body that is no snappy-compressed push request, a stream without
//! labels, labels that do not parse or come twice or unsorted, more labels than 15 or longer than Loki's limits, an entry
//! without a line or time, one more than an hour older than the newest of its stream (`too far behind`), a wrong tenant or
//! authorization. As Loki does, it takes the rest of a request with refused entries, and drops an entry that it has
//! already (same stream, time and line).

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
    routing::post,
};
use parking_lot::Mutex;
use prost::Message;

/// How far behind the newest of its stream an entry may be, nanoseconds.
const BEHIND: i64 = 3_600_000_000_000;

/// What happens to requests before they are looked at.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum LokiFault {
    /// Nothing.
    #[default]
    None,
    /// This status, with `Retry-After` in seconds.
    Status(u16, Option<u64>),
    /// No answer for this long.
    Hang(Duration),
    /// Taken, but the answer is 500.
    LoseAnswer,
}

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LokiEntry {
    /// Labels of the stream.
    pub labels: BTreeMap<String, String>,
    /// Nanoseconds since the Unix epoch.
    pub time_ns: i64,
    /// The line.
    pub line: String,
}

/// What came.
#[derive(Clone, Debug, Default)]
pub struct LokiSeen {
    /// Entries in the order in which they were taken.
    pub entries: Vec<LokiEntry>,
    /// Requests.
    pub requests: u64,
    /// Requests that met a fault.
    pub faulted: u64,
    /// Entries that had come before.
    pub repeated: u64,
    /// What was refused, and why.
    pub refused: Vec<String>,
}

/// A running receiver; ends when dropped.
pub struct LokiStub {
    shared: Arc<Shared>,
    address: std::net::SocketAddr,
    serving: tokio::task::JoinHandle<()>,
}

#[derive(Default)]
struct Shared {
    tenant: Option<String>,
    authorization: Option<String>,
    fault: Mutex<LokiFault>,
    seen: Mutex<LokiSeen>,
    known: Mutex<HashSet<LokiEntry>>,
    newest: Mutex<HashMap<String, i64>>,
}

#[derive(Clone, PartialEq, Message)]
struct PushRequest {
    #[prost(message, repeated, tag = "1")]
    streams: Vec<StreamAdapter>,
}

#[derive(Clone, PartialEq, Message)]
struct StreamAdapter {
    #[prost(string, tag = "1")]
    labels: String,
    #[prost(message, repeated, tag = "2")]
    entries: Vec<EntryAdapter>,
    #[prost(uint64, tag = "3")]
    hash: u64,
}

#[derive(Clone, PartialEq, Message)]
struct EntryAdapter {
    #[prost(message, optional, tag = "1")]
    timestamp: Option<prost_types::Timestamp>,
    #[prost(string, tag = "2")]
    line: String,
}

// === impl LokiStub ===

impl LokiStub {
    /// Listens on a free port of loopback. With `tenant` or `authorization` the headers must be so.
    ///
    /// # Errors
    /// When no port can be had.
    pub async fn start(tenant: Option<&str>, authorization: Option<&str>) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            tenant: tenant.map(str::to_owned),
            authorization: authorization.map(str::to_owned),
            ..Shared::default()
        });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let router = Router::new()
            .route("/loki/api/v1/push", post(push))
            .layer(axum::extract::DefaultBodyLimit::max(64 << 20))
            .with_state(Arc::clone(&shared));
        let serving = tokio::spawn(async move {
            let _ = axum::serve(listener, router).await;
        });
        Ok(Self {
            shared,
            address,
            serving,
        })
    }

    /// Its address.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// From now on.
    pub fn set_fault(&self, fault: LokiFault) {
        *self.shared.fault.lock() = fault;
    }

    /// What came until now.
    #[must_use]
    pub fn seen(&self) -> LokiSeen {
        self.shared.seen.lock().clone()
    }
}

impl Drop for LokiStub {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn push(State(shared): State<Arc<Shared>>, headers: HeaderMap, body: Bytes) -> Response {
    shared.seen.lock().requests += 1;
    let fault = shared.fault.lock().clone();
    if fault != LokiFault::None {
        shared.seen.lock().faulted += 1;
    }
    match fault {
        LokiFault::None | LokiFault::LoseAnswer => {}
        LokiFault::Status(status, after) => {
            let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            let after = after.map(|seconds| [("retry-after", seconds.to_string())]);
            return match after {
                Some(header) => (status, header, "as told").into_response(),
                None => (status, "as told").into_response(),
            };
        }
        LokiFault::Hang(time) => tokio::time::sleep(time).await,
    }
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    if shared.authorization.is_some() && header("authorization") != shared.authorization.as_deref() {
        return (StatusCode::UNAUTHORIZED, "no valid credentials").into_response();
    }
    if shared.tenant.is_some() && header("x-scope-orgid") != shared.tenant.as_deref() {
        return (StatusCode::UNAUTHORIZED, "no org id").into_response();
    }
    let refuse = |why: String| {
        shared.seen.lock().refused.push(why.clone());
        (StatusCode::BAD_REQUEST, why).into_response()
    };
    if header("content-type") != Some("application/x-protobuf") {
        return refuse(format!("content type {:?}", header("content-type")));
    }
    let raw = match snap::raw::Decoder::new().decompress_vec(&body) {
        Ok(raw) => raw,
        Err(error) => return refuse(format!("snappy: {error}")),
    };
    let request = match PushRequest::decode(raw.as_slice()) {
        Ok(request) => request,
        Err(error) => return refuse(format!("protobuf: {error}")),
    };
    match take(&shared, request) {
        Err(why) => refuse(why),
        Ok(()) if fault == LokiFault::LoseAnswer => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        Ok(()) => StatusCode::NO_CONTENT.into_response(),
    }
}

fn take(shared: &Shared, request: PushRequest) -> Result<(), String> {
    if request.streams.is_empty() {
        return Err("no streams".to_owned());
    }
    let mut behind = None;
    for stream in request.streams {
        let labels = labels(&stream.labels)?;
        let mut newest = shared.newest.lock();
        let newest = newest.entry(stream.labels.clone()).or_insert(i64::MIN);
        for entry in stream.entries {
            let time = entry.timestamp.ok_or("an entry without time")?;
            let time_ns = time.seconds * 1_000_000_000 + i64::from(time.nanos);
            if entry.line.is_empty() {
                return Err("an entry without line".to_owned());
            }
            if time_ns < newest.saturating_sub(BEHIND) {
                behind = Some(format!(
                    "entry for stream '{}' has timestamp too old: entry too far behind",
                    stream.labels
                ));
                continue;
            }
            *newest = time_ns.max(*newest);
            let entry = LokiEntry {
                labels: labels.clone(),
                time_ns,
                line: entry.line,
            };
            let mut seen = shared.seen.lock();
            if shared.known.lock().insert(entry.clone()) {
                seen.entries.push(entry);
            } else {
                seen.repeated += 1;
            }
        }
    }
    behind.map_or(Ok(()), Err)
}

/// Reads `{a="b", c="d"}`.
fn labels(text: &str) -> Result<BTreeMap<String, String>, String> {
    let wrong = |why: &str| format!("error parsing labels `{text}`: {why}");
    let mut rest = text
        .strip_prefix('{')
        .and_then(|text| text.strip_suffix('}'))
        .ok_or_else(|| wrong("no braces"))?;
    let mut labels = BTreeMap::new();
    let mut last = String::new();
    while !rest.is_empty() {
        let (name, after) = rest.split_once("=\"").ok_or_else(|| wrong("no value"))?;
        let mut value = String::new();
        let mut chars = after.char_indices();
        let end = loop {
            match chars.next().ok_or_else(|| wrong("open quotes"))? {
                (at, '"') => break at,
                (_, '\\') => match chars.next().map(|(_, c)| c) {
                    Some('n') => value.push('\n'),
                    Some(c @ ('"' | '\\')) => value.push(c),
                    _ => return Err(wrong("escape")),
                },
                (_, '\n') => return Err(wrong("line break")),
                (_, c) => value.push(c),
            }
        };
        let first = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
        if !first || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            return Err(wrong("name"));
        }
        if name <= last.as_str() && !last.is_empty() {
            return Err(wrong("not sorted, or twice"));
        }
        if name.len() > 1024 || value.len() > 2048 || value.is_empty() {
            return Err(wrong("length"));
        }
        last = name.to_owned();
        labels.insert(name.to_owned(), value);
        rest = after.get(end + 1..).unwrap_or_default();
        if !rest.is_empty() {
            rest = rest.strip_prefix(", ").ok_or_else(|| wrong("separator"))?;
        }
    }
    if labels.is_empty() || labels.len() > 15 {
        return Err(format!("{} labels in `{text}`: 1 to 15 are taken", labels.len()));
    }
    Ok(labels)
}
