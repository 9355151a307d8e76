//! A strict DataWay stub: takes `POST /v1/write/<category>?token=...`, checks every rule of the protocol and every name
//! and type of the documentation, keeps what it decoded (or only sums of it), and can be told to fail.
//!
//! Entry: [`DatawayStub::start`] in tests, the binary `dataway-stub` in scripts. Data flow: `server` takes requests and
//! checks headers, `decode` makes points of bodies without any code of the product, `measurements` checks points,
//! `store` counts them and recognises repeated bodies.

mod decode;
mod measurements;
mod server;
mod store;
mod stream;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context as _;
pub use decode::{Point, Value};
use serde::{Deserialize, Serialize};
pub use store::{SumRow, Summary};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// How long [`StubHandle::stop`] waits for open requests.
const STOP_GRACE: Duration = Duration::from_secs(2);

/// Settings of one stub.
#[derive(Clone, Debug)]
pub struct StubConfig {
    /// Address to listen on; port 0 takes a free one.
    pub listen: SocketAddr,
    /// The only token that is let in.
    pub token: String,
    /// Largest body after decompression, bytes.
    pub max_raw_body: usize,
    /// How many decoded points to keep, the newest; 0 keeps only sums.
    pub keep_points: usize,
    /// Names of user tags that points may carry beside the documented ones.
    pub extra_tags: Vec<String>,
    /// Accept the undocumented keys of the existing collector.
    pub compat_keys: bool,
}

/// What the stub does to write requests instead of taking them. A faulted request records nothing, except in
/// [`Fault::DropAnswer`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "mode", rename_all = "snake_case", deny_unknown_fields)]
pub enum Fault {
    /// Works.
    #[default]
    None,
    /// Answers this status.
    Status {
        /// HTTP status, 200 to 599.
        status: u16,
        /// `Retry-After` header, seconds.
        #[serde(default)]
        retry_after: Option<u64>,
    },
    /// Says nothing for a time, then closes the connection.
    Hang {
        /// Seconds.
        seconds: f64,
    },
    /// Closes the connection with no answer.
    Close,
    /// Takes the request, then closes the connection with no answer: the sender must repeat what has arrived.
    DropAnswer,
}

/// The stub; see [`DatawayStub::start`].
#[derive(Debug)]
pub struct DatawayStub;

/// A running stub. Dropping it stops it.
#[derive(Debug)]
pub struct StubHandle {
    /// Address it listens on.
    pub addr: SocketAddr,
    shared: Arc<server::Shared>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

// === impl StubConfig ===

impl Default for StubConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            token: "tkn_00000000000000000000000000000000".to_owned(),
            max_raw_body: 1 << 20,
            keep_points: 100_000,
            extra_tags: Vec::new(),
            compat_keys: false,
        }
    }
}

// === impl DatawayStub ===

impl DatawayStub {
    /// Listens and serves in a task of the current runtime.
    ///
    /// # Errors
    /// The address cannot be listened on.
    pub async fn start(config: StubConfig) -> anyhow::Result<StubHandle> {
        let listener = tokio::net::TcpListener::bind(config.listen)
            .await
            .with_context(|| format!("listen on {} (choose another address or port 0)", config.listen))?;
        let addr = listener
            .local_addr()
            .context("read the address of the listening socket")?;
        let stop = CancellationToken::new();
        let shared = Arc::new(server::Shared::new(config, stop.clone()));
        let task = tokio::spawn(server::serve(listener, Arc::clone(&shared), stop.clone()));
        Ok(StubHandle {
            addr,
            shared,
            stop,
            task,
        })
    }
}

// === impl StubHandle ===

impl StubHandle {
    /// URL for the configuration of a sender, with the token.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}/?token={}", self.addr, self.shared.config.token)
    }

    /// Counters so far.
    #[must_use]
    pub fn summary(&self) -> Summary {
        self.shared.store.lock().summary()
    }

    /// The kept points, oldest first.
    #[must_use]
    pub fn points(&self) -> Vec<Point> {
        self.shared.store.lock().points(usize::MAX)
    }

    /// Sums of all `netflow` points by process, transport and direction.
    #[must_use]
    pub fn sums(&self) -> Vec<SumRow> {
        self.shared.store.lock().sums()
    }

    /// Changes what happens to the requests from now on.
    pub fn set_fault(&self, fault: Fault) {
        *self.shared.fault.lock() = fault;
    }

    /// Stops listening, lets open requests end for a moment, and waits for it. Connecting is refused until
    /// [`Self::reopen`]; what has arrived is kept.
    pub async fn close(&mut self) {
        self.stop.cancel();
        if tokio::time::timeout(STOP_GRACE, &mut self.task).await.is_err() {
            self.task.abort();
        }
    }

    /// Listens again on the same address after [`Self::close`].
    ///
    /// # Errors
    /// The address cannot be listened on any more.
    pub async fn reopen(&mut self) -> anyhow::Result<()> {
        let listener = tokio::net::TcpListener::bind(self.addr)
            .await
            .with_context(|| format!("listen on {} again", self.addr))?;
        self.stop = CancellationToken::new();
        *self.shared.stop.lock() = self.stop.clone();
        self.task = tokio::spawn(server::serve(listener, Arc::clone(&self.shared), self.stop.clone()));
        Ok(())
    }

    /// Stops listening, lets open requests end for a moment, and waits for it.
    pub async fn stop(mut self) {
        self.close().await;
    }
}

impl Drop for StubHandle {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
