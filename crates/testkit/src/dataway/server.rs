//! The HTTP side: headers, token, body, fault modes, and the stub's own pages under `/_stub/`.

use std::{collections::HashMap, io::Read as _, sync::Arc, time::Duration};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{ConnectInfo, Path, Query, State},
    http::{HeaderMap, HeaderValue, Request, StatusCode, header},
    response::{IntoResponse as _, Response},
    routing::{get, post},
};
use parking_lot::Mutex;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::{
    Fault, Point, StubConfig, decode,
    measurements::{self, Rules},
    store::{Accepted, Store},
    stream::{Cut, CutListener},
};

const PROTOBUF: &str = "application/protobuf; proto=com.guance.Point";
const LINE_PROTOCOL: &str = "application/line-protocol";

/// State of one stub.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) config: StubConfig,
    pub(super) fault: Mutex<Fault>,
    pub(super) store: Mutex<Store>,
    /// Of the listener that serves now.
    pub(super) stop: Mutex<CancellationToken>,
}

/// A refused request.
#[derive(Debug)]
struct Refused {
    status: StatusCode,
    why: String,
}

// === impl Shared ===

impl Shared {
    pub(super) fn new(config: StubConfig, stop: CancellationToken) -> Self {
        let store = Mutex::new(Store::new(config.keep_points));
        Self {
            config,
            fault: Mutex::default(),
            store,
            stop: Mutex::new(stop),
        }
    }
}

/// Serves until `stop`.
pub(super) async fn serve(listener: tokio::net::TcpListener, shared: Arc<Shared>, stop: CancellationToken) {
    let router = Router::new()
        .route("/v1/write/{category}", post(write))
        .route("/_stub/fault", post(set_fault).get(get_fault))
        .route("/_stub/summary", get(summary))
        .route("/_stub/points", get(points))
        .route("/_stub/page", get(page))
        .route("/_stub/sums", get(sums))
        .with_state(shared)
        .into_make_service_with_connect_info::<Cut>();
    if let Err(error) = axum::serve(CutListener(listener), router)
        .with_graceful_shutdown(stop.cancelled_owned())
        .await
    {
        tracing::error!(%error, "Stub server failed");
    }
}

async fn write(
    State(shared): State<Arc<Shared>>,
    ConnectInfo(connection): ConnectInfo<Cut>,
    Path(category): Path<String>,
    Query(query): Query<HashMap<String, String>>,
    request: Request<Body>,
) -> Response {
    let (parts, body) = request.into_parts();
    // Compressed bodies are smaller than raw ones; a little over the limit is read so that the reason can be named.
    let body = axum::body::to_bytes(body, shared.config.max_raw_body + 4096).await;
    let fault = shared.fault.lock().clone();
    match &fault {
        Fault::None | Fault::DropAnswer => {}
        Fault::Status { status, retry_after } => {
            let mut response = (
                StatusCode::from_u16(*status).unwrap_or(StatusCode::SERVICE_UNAVAILABLE),
                "the stub was told to answer this\n",
            )
                .into_response();
            if let Some(seconds) = retry_after {
                response
                    .headers_mut()
                    .insert(header::RETRY_AFTER, HeaderValue::from(*seconds));
            }
            let mut store = shared.store.lock();
            store.faulted("status");
            store.answered(response.status().as_u16());
            return response;
        }
        Fault::Hang { seconds } => {
            shared.store.lock().faulted("hang");
            let stop = shared.stop.lock().clone();
            tokio::select! {
                () = tokio::time::sleep(Duration::from_secs_f64(*seconds)) => {}
                () = stop.cancelled() => {}
            }
            return no_answer(&shared, &connection);
        }
        Fault::Close => {
            shared.store.lock().faulted("close");
            return no_answer(&shared, &connection);
        }
    }
    let result = match body {
        Ok(body) => check(&shared.config, &category, &query, &parts.headers, &body),
        Err(error) => Err(Refused {
            status: StatusCode::PAYLOAD_TOO_LARGE,
            why: format!("body: {error}"),
        }),
    };
    if let (Fault::DropAnswer, Ok(_)) = (&fault, &result) {
        shared.store.lock().faulted("drop_answer");
    }
    let mut store = shared.store.lock();
    match result {
        Ok(accepted) => {
            store.accept(accepted);
            if fault == Fault::DropAnswer {
                drop(store);
                return no_answer(&shared, &connection);
            }
            store.answered(200);
            StatusCode::OK.into_response()
        }
        Err(Refused { status, why }) => {
            tracing::warn!(%status, why, "Refused a request");
            store.violation(format!("{status}: {why}"));
            store.answered(status.as_u16());
            (status, format!("{why}\n")).into_response()
        }
    }
}

/// Cuts the connection; the response is never written.
fn no_answer(shared: &Shared, connection: &Cut) -> Response {
    connection.cut();
    shared.store.lock().answered(0);
    StatusCode::INTERNAL_SERVER_ERROR.into_response()
}

fn check(
    config: &StubConfig,
    category: &str,
    query: &HashMap<String, String>,
    headers: &HeaderMap,
    body: &Bytes,
) -> Result<Accepted, Refused> {
    let refuse = |status, why: String| Err(Refused { status, why });
    let bad = |why: String| Refused {
        status: StatusCode::BAD_REQUEST,
        why,
    };
    if query.get("token") != Some(&config.token) {
        return refuse(StatusCode::FORBIDDEN, "token is missing or wrong".to_owned());
    }
    if !measurements::CATEGORIES.contains(&category) {
        return refuse(StatusCode::NOT_FOUND, format!("category {category:?} is not known"));
    }
    let text = |name: &str| {
        headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
    };
    if text("content-length") != body.len().to_string() {
        return refuse(
            StatusCode::LENGTH_REQUIRED,
            format!("Content-Length is {:?}", text("content-length")),
        );
    }
    if text("user-agent").is_empty() {
        return Err(bad("User-Agent is missing".to_owned()));
    }
    let id = text("x-pkg-id");
    let valid_id = id.strip_prefix("dk_").is_some_and(|xid| {
        xid.len() == 20
            && xid
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
    });
    if !valid_id {
        return Err(bad(format!(
            "X-Pkg-Id is {id:?}, expected dk_ and 20 lower-case letters or digits"
        )));
    }
    let promised: u64 = text("x-points")
        .parse()
        .map_err(|_| bad(format!("X-Points is {:?}", text("x-points"))))?;
    let gzip = match text("content-encoding") {
        "gzip" => true,
        "" => false,
        other => {
            return refuse(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                format!("Content-Encoding is {other:?}"),
            );
        }
    };
    let raw = if gzip {
        gunzip(body, config.max_raw_body).map_err(bad)?
    } else {
        body.to_vec()
    };
    if raw.len() > config.max_raw_body {
        let why = format!("the body has more than {} bytes", config.max_raw_body);
        return refuse(StatusCode::PAYLOAD_TOO_LARGE, why);
    }
    let line_protocol = match text("content-type") {
        PROTOBUF => false,
        LINE_PROTOCOL => true,
        other => return refuse(StatusCode::UNSUPPORTED_MEDIA_TYPE, format!("Content-Type is {other:?}")),
    };
    let points: Vec<Point> = if line_protocol {
        decode::lines(&raw)
    } else {
        decode::protobuf(&raw)
    }
    .map_err(bad)?;
    if points.is_empty() || points.len() as u64 != promised {
        return Err(bad(format!(
            "X-Points is {promised}, but the body holds {} points",
            points.len()
        )));
    }
    let rules = Rules {
        extra_tags: config.extra_tags.clone(),
        compat_keys: config.compat_keys,
        empty_left_out: line_protocol,
    };
    for (index, point) in points.iter().enumerate() {
        measurements::check(category, point, &rules).map_err(|why| bad(format!("point {index}: {why}")))?;
    }
    Ok(Accepted {
        id: id.to_owned(),
        points,
        gzip,
        raw: raw.len(),
        wire: body.len(),
    })
}

/// Decompresses at most one byte more than `limit`, so that the caller sees that it is too much.
fn gunzip(body: &[u8], limit: usize) -> Result<Vec<u8>, String> {
    let mut raw = Vec::new();
    let mut decoder = flate2::bufread::GzDecoder::new(body);
    decoder
        .by_ref()
        .take(limit as u64 + 1)
        .read_to_end(&mut raw)
        .map_err(|error| format!("gzip: {error}"))?;
    if raw.len() <= limit && !decoder.into_inner().is_empty() {
        return Err("gzip: bytes after the end of the stream".to_owned());
    }
    Ok(raw)
}

async fn set_fault(State(shared): State<Arc<Shared>>, body: Bytes) -> Response {
    match serde_json::from_slice::<Fault>(&body) {
        Ok(Fault::Status { status, .. }) if !(200..600).contains(&status) => (
            StatusCode::BAD_REQUEST,
            format!("status {status} is not within 200 to 599\n"),
        )
            .into_response(),
        Ok(Fault::Hang { seconds }) if Duration::try_from_secs_f64(seconds).is_err() => {
            (StatusCode::BAD_REQUEST, format!("{seconds} is no number of seconds\n")).into_response()
        }
        Ok(fault) => {
            *shared.fault.lock() = fault;
            StatusCode::NO_CONTENT.into_response()
        }
        Err(error) => (StatusCode::BAD_REQUEST, format!("fault: {error}\n")).into_response(),
    }
}

async fn get_fault(State(shared): State<Arc<Shared>>) -> Response {
    json(&*shared.fault.lock())
}

async fn summary(State(shared): State<Arc<Shared>>) -> Response {
    json(&shared.store.lock().summary())
}

async fn points(State(shared): State<Arc<Shared>>, Query(query): Query<HashMap<String, String>>) -> Response {
    let limit = query.get("limit").map_or(Ok(100), |limit| limit.parse());
    match limit {
        Ok(limit) => json(&shared.store.lock().points(limit)),
        Err(error) => (StatusCode::BAD_REQUEST, format!("limit: {error}\n")).into_response(),
    }
}

async fn page(State(shared): State<Arc<Shared>>, Query(query): Query<HashMap<String, u64>>) -> Response {
    let number = |key, default| query.get(key).copied().unwrap_or(default);
    let limit = usize::try_from(number("limit", 1000)).unwrap_or(usize::MAX);
    json(&shared.store.lock().page(number("from", 0), limit))
}

async fn sums(State(shared): State<Arc<Shared>>) -> Response {
    json(&shared.store.lock().sums())
}

fn json(value: &impl Serialize) -> Response {
    match serde_json::to_vec(value) {
        Ok(body) => ([(header::CONTENT_TYPE, "application/json")], body).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}
