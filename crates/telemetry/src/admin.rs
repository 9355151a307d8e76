//! The admin server: what an operator or a probe asks a process.
//!
//! | path | answer |
//! |---|---|
//! | `/healthz` | 200 while the process should live on, else 503 |
//! | `/readyz` | JSON of all components with reasons; 200 when all do their job, else 503 |
//! | `/metrics` | OpenMetrics text |
//! | `/ledger` | JSON of all hand-offs |
//!
//! It has no access control: listen on loopback unless the network is trusted.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::Telemetry;

/// Where the admin server listens unless told otherwise.
pub const DEFAULT_LISTEN: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 6062));

/// Media type of the answer of `/metrics`.
pub const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The admin server could not listen.
#[derive(Debug, thiserror::Error)]
#[error("admin server cannot listen on {addr}: {source}; choose another address with admin_listen")]
pub struct AdminError {
    /// The address asked for.
    pub addr: SocketAddr,
    /// What the kernel said.
    #[source]
    pub source: io::Error,
}

/// Listens on `addr` (port 0: any free port), serves until `cancel`, and returns the address in use.
///
/// `extra` adds routes of the caller; its paths must differ from those of the module head.
///
/// # Errors
/// [`AdminError`] if the address cannot be bound.
pub async fn serve(
    addr: SocketAddr,
    telemetry: Telemetry,
    extra: Option<Router>,
    cancel: CancellationToken,
) -> Result<SocketAddr, AdminError> {
    let refuse = |source| AdminError { addr, source };
    let listener = TcpListener::bind(addr).await.map_err(refuse)?;
    let bound = listener.local_addr().map_err(refuse)?;
    if !bound.ip().is_loopback() {
        tracing::warn!(%bound, "admin server listens beyond loopback and has no access control");
    }
    let app = router(telemetry).merge(extra.unwrap_or_default());
    tokio::spawn(async move {
        let server = axum::serve(listener, app).with_graceful_shutdown(cancel.cancelled_owned());
        if let Err(error) = server.await {
            tracing::error!(%error, %bound, "admin server ended");
        }
    });
    Ok(bound)
}

/// The routes alone, for a process that has a server of its own.
pub fn router(telemetry: Telemetry) -> Router {
    Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/ledger", get(ledger))
        .with_state(telemetry)
}

async fn healthz(State(telemetry): State<Telemetry>) -> Response {
    if telemetry.health.is_alive() {
        (StatusCode::OK, "ok\n").into_response()
    } else {
        json(StatusCode::SERVICE_UNAVAILABLE, &telemetry.health.snapshot())
    }
}

async fn readyz(State(telemetry): State<Telemetry>) -> Response {
    let ready = telemetry.health.is_ready();
    let status = if ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    json(
        status,
        &serde_json::json!({ "ready": ready, "components": telemetry.health.snapshot() }),
    )
}

async fn metrics(State(telemetry): State<Telemetry>) -> Response {
    match telemetry.render_metrics() {
        Ok(text) => ([(header::CONTENT_TYPE, OPENMETRICS)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("metrics: {error}\n")).into_response(),
    }
}

async fn ledger(State(telemetry): State<Telemetry>) -> Response {
    json(StatusCode::OK, &telemetry.ledger.snapshot())
}

fn json(status: StatusCode, body: &impl serde::Serialize) -> Response {
    match serde_json::to_string_pretty(body) {
        Ok(text) => (status, [(header::CONTENT_TYPE, "application/json")], text + "\n").into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("json: {error}\n")).into_response(),
    }
}
