//! Keeps the names like the cluster: one list and one watch per kind, and lookups that never wait for the API server.
//!
//! ```text
//! watcher per kind (paged list, bookmarks, backoff with jitter) ▶ RwLock<Store>, namespaces ◀ [`Names`]
//! cgroup file system, every few seconds ▶ RwLock<cgroup::Index> ◀──────────────────────────────┘
//! ```
//! While the API server is away the names are those last known. Entry: [`names`], whose future does the work.

use std::{
    collections::BTreeMap,
    fs,
    net::IpAddr,
    os::unix::fs::MetadataExt,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use futures::{Stream, StreamExt, future};
use kube::{
    Api, Client, Resource,
    runtime::{
        WatchStreamExt,
        watcher::{self, Event},
    },
};
use parking_lot::RwLock;
use records::{K8sEndpoint, Str, Transport};
use serde::de::DeserializeOwned;
use tokio::{sync::watch, time::MissedTickBehavior};

use super::{
    objects::{EndpointSlice, Job, Namespace, Node, Pod, ReplicaSet, Service},
    store::{Counts, Kind, Store, Unnamed, UnnamedCounts},
};
use crate::identity::{
    cgroup::{self, Uid},
    process::Proc,
};

/// How often cgroups are scanned and what ended long ago is forgotten.
const TICK: Duration = Duration::from_secs(5);

/// Where the names come from.
#[derive(Clone, Debug)]
pub struct Options {
    /// The agent's own node, by name.
    pub node: String,
    /// The host's root directory, with `proc` and `sys` below it.
    pub host_root: PathBuf,
    /// Objects per page of a list.
    pub page_size: u32,
}

/// What is known of a namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NamespaceMeta {
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
}

/// All namespaces by name.
pub type Namespaces = Arc<BTreeMap<String, NamespaceMeta>>;

/// How the watch of a kind fares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Health {
    /// How long ago the last event came. Bookmarks are no events: a quiet kind ages too.
    pub last_event: Option<Duration>,
    /// Failed requests and cut streams since the last event.
    pub errors_since_event: u64,
    /// Complete lists; before the first one names are missing.
    pub lists: u64,
}

/// The local end of a flow.
#[derive(Clone, Copy, Debug)]
pub struct Local {
    /// Id of the cgroup its socket was made in; 0 if not known.
    pub cgroup_id: u64,
    /// Its process; 0 if not known.
    pub pid: u32,
    /// Inode number of its network namespace; 0 if not known.
    pub netns: u64,
    /// Its address.
    pub ip: IpAddr,
    /// When it happened, nanoseconds since 1970.
    pub at: i64,
}

#[derive(Debug, Default)]
struct Progress {
    lists: AtomicU64,
    /// Nanoseconds since 1970; 0 before the first.
    last_event: AtomicI64,
    errors: AtomicU64,
}

#[derive(Debug)]
struct State {
    store: RwLock<Store>,
    cgroups: RwLock<cgroup::Index>,
    proc: Proc,
    host_netns: Option<u64>,
    namespaces: watch::Sender<Namespaces>,
    progress: [Progress; Kind::ALL.len()],
}

/// Names of the ends of flows. Clones share what is known.
#[derive(Clone, Debug)]
pub struct Names(Arc<State>);

/// The lookups, and the future that feeds them until it is dropped.
pub fn names(client: Client, options: &Options) -> (Names, impl Future<Output = ()> + Send + use<>) {
    let proc = Proc::new(options.host_root.join("proc"));
    let state = Arc::new(State {
        store: RwLock::new(Store::new(&options.node)),
        cgroups: RwLock::new(cgroup::Index::new(&options.host_root)),
        host_netns: fs::metadata(proc.path(1, "ns/net")).ok().map(|it| it.ino()),
        proc,
        namespaces: watch::Sender::new(Namespaces::default()),
        progress: std::array::from_fn(|_| Progress::default()),
    });
    let config = watcher::Config::default().page_size(options.page_size);
    let feed = feed(client, config, Arc::clone(&state));
    (Names(state), feed)
}

async fn feed(client: Client, config: watcher::Config, state: Arc<State>) {
    future::join(
        future::join4(
            follow::<Pod>(&client, &config, &state),
            follow::<Service>(&client, &config, &state),
            follow::<EndpointSlice>(&client, &config, &state),
            follow::<Node>(&client, &config, &state),
        ),
        future::join4(
            follow::<ReplicaSet>(&client, &config, &state),
            follow::<Job>(&client, &config, &state),
            follow_namespaces(&client, &config, &state),
            tidy(&state),
        ),
    )
    .await;
}

/// A kind the store takes.
trait Watched: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static {
    const KIND: Kind;
    fn apply(&self, store: &mut Store, now: i64);
    fn delete(&self, store: &mut Store, now: i64);
}

macro_rules! watched {
    ($($kind:ident: |$it:ident, $store:ident, $now:pat_param| $apply:expr, $delete:expr;)*) => {
        $(impl Watched for $kind {
            const KIND: Kind = Kind::$kind;
            fn apply(&self, $store: &mut Store, $now: i64) {
                let $it = self;
                $apply;
            }
            fn delete(&self, $store: &mut Store, $now: i64) {
                let $it = self;
                $delete;
            }
        })*
    };
}

watched! {
    Pod: |it, store, now| store.apply_pod(it, now), store.delete_pod(it, now);
    Service: |it, store, _| store.apply_service(it), store.delete_service(it);
    EndpointSlice: |it, store, now| store.apply_slice(it, now), store.delete_slice(it, now);
    Node: |it, store, _| store.apply_node(it), store.delete_node(it);
    ReplicaSet: |it, store, _| store.apply_replica_set(it), store.delete_owner(&it.metadata);
    Job: |it, store, _| store.apply_job(it), store.delete_owner(&it.metadata);
}

/// Events of a kind, errors taken out and waited after.
fn events<K>(
    client: &Client,
    config: &watcher::Config,
    state: &State,
    kind: Kind,
) -> impl Stream<Item = Event<K>> + Unpin
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
{
    let events = watcher::watcher(Api::<K>::all(client.clone()), config.clone()).default_backoff();
    Box::pin(events.filter_map(move |event| {
        let progress = state.progress.get(kind as usize);
        future::ready(match event {
            Ok(event) => {
                if let Some(progress) = progress
                    && !matches!(event, Event::Init)
                {
                    progress.last_event.store(now_ns(), Ordering::Relaxed);
                    progress.errors.store(0, Ordering::Relaxed);
                    if matches!(event, Event::InitDone) {
                        progress.lists.fetch_add(1, Ordering::Relaxed);
                    }
                }
                Some(event)
            }
            Err(error) => {
                let before = progress.map_or(0, |it| it.errors.fetch_add(1, Ordering::Relaxed));
                if before == 0 {
                    tracing::warn!(kind = %K::plural(&()), %error, "watch of the Kubernetes API failed; names stay those last known, trying again");
                }
                None
            }
        })
    }))
}

async fn follow<K: Watched>(client: &Client, config: &watcher::Config, state: &State) {
    let mut events = events::<K>(client, config, state, K::KIND);
    while let Some(event) = events.next().await {
        let now = now_ns();
        let mut store = state.store.write();
        match event {
            Event::Init => store.begin_list(K::KIND),
            Event::InitApply(it) | Event::Apply(it) => it.apply(&mut store, now),
            Event::Delete(it) => it.delete(&mut store, now),
            Event::InitDone => store.end_list(K::KIND, now),
        }
    }
}

async fn follow_namespaces(client: &Client, config: &watcher::Config, state: &State) {
    let mut events = events::<Namespace>(client, config, state, Kind::Namespace);
    let mut listing = BTreeMap::new();
    while let Some(event) = events.next().await {
        match event {
            Event::Init => listing.clear(),
            Event::InitApply(it) => listing.extend(named(it)),
            Event::InitDone => {
                state.namespaces.send_replace(Arc::new(std::mem::take(&mut listing)));
            }
            Event::Apply(it) => state.namespaces.send_modify(|all| Arc::make_mut(all).extend(named(it))),
            Event::Delete(it) => state.namespaces.send_modify(|all| {
                if let Some((name, _)) = named(it) {
                    Arc::make_mut(all).remove(&name);
                }
            }),
        }
    }
}

fn named(namespace: Namespace) -> Option<(String, NamespaceMeta)> {
    let meta = namespace.metadata;
    let known = NamespaceMeta {
        labels: meta.labels.unwrap_or_default(),
        annotations: meta.annotations.unwrap_or_default(),
    };
    Some((meta.name?, known))
}

async fn tidy(state: &Arc<State>) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let state = Arc::clone(state);
        // The scan reads directories; it ends by itself if this future is dropped.
        let done = tokio::task::spawn_blocking(move || {
            state.cgroups.write().scan(Instant::now());
            state.store.write().expire(now_ns());
        });
        if let Err(error) = done.await {
            tracing::error!(%error, "scan of the cgroups failed; the next one tries again");
        }
    }
}

fn now_ns() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_nanos()).unwrap_or(i64::MAX)
}

impl Names {
    /// The local end: by the cgroup of its socket, else by its process, else by its address. In the host's network
    /// what is no pod is the node.
    ///
    /// # Errors
    /// Why there is no name.
    pub fn local(&self, end: &Local) -> Result<K8sEndpoint, Unnamed> {
        let state = &*self.0;
        let by_process = || {
            (end.pid != 0)
                .then(|| cgroup::pod_of_process(&state.proc, end.pid))
                .flatten()
        };
        let uid = self.pod_of_cgroup(end.cgroup_id).or_else(by_process);
        let store = state.store.read();
        if let Some(uid) = uid.filter(|uid| store.placement(*uid).is_some()) {
            return store.pod(uid, end.at);
        }
        if uid.is_none()
            && state.host_netns == Some(end.netns)
            && let Some(node) = store.own_node()
        {
            return Ok(node);
        }
        store.by_address(end.ip, None, Transport::Tcp, end.at)
    }

    /// The remote end, by its address and port.
    ///
    /// # Errors
    /// Why there is no name.
    pub fn remote(&self, ip: IpAddr, port: u16, transport: Transport, at: i64) -> Result<K8sEndpoint, Unnamed> {
        self.0.store.read().by_address(ip, Some(port), transport, at)
    }

    /// The pod of a cgroup.
    #[must_use]
    pub fn pod_of_cgroup(&self, cgroup_id: u64) -> Option<Uid> {
        self.0.cgroups.read().pod(cgroup_id)
    }

    /// Whether a pod is on the agent's own node; `None` if the pod is not known.
    #[must_use]
    pub fn is_local(&self, pod: Uid) -> Option<bool> {
        self.0.store.read().placement(pod).map(|(_, own)| own)
    }

    /// The namespace of a pod.
    #[must_use]
    pub fn namespace_of(&self, pod: Uid) -> Option<Str> {
        self.0.store.read().placement(pod).map(|(namespace, _)| namespace)
    }

    /// All namespaces, and word of their changes.
    #[must_use]
    pub fn namespaces(&self) -> watch::Receiver<Namespaces> {
        self.0.namespaces.subscribe()
    }

    /// How the watch of a kind fares.
    #[must_use]
    pub fn health(&self, kind: Kind) -> Health {
        let of = |it: &Progress| Health {
            last_event: Some(it.last_event.load(Ordering::Relaxed))
                .filter(|at| *at != 0)
                .map(|at| Duration::from_nanos(u64::try_from(now_ns() - at).unwrap_or(0))),
            errors_since_event: it.errors.load(Ordering::Relaxed),
            lists: it.lists.load(Ordering::Relaxed),
        };
        of(self.0.progress.get(kind as usize).unwrap_or(&Progress::default()))
    }

    /// Sizes and losses.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.0.store.read().counts()
    }

    /// Lookups so far that gave no name or a lesser one.
    #[must_use]
    pub fn unnamed(&self) -> UnnamedCounts {
        self.0.store.read().unnamed()
    }
}

#[cfg(test)]
#[path = "watch_tests.rs"]
mod tests;
