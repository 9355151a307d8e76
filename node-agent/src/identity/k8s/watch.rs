//! Keeps the store like the cluster: one list and one watch per kind.
//!
//! ```text
//! watcher per kind (paged list, bookmarks, backoff with jitter) ▶ RwLock<Store>, namespaces ◀ [`Names`]
//! ```
//! While the API server is away the names are those last known. Entry: [`names`], whose future does the work.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{Stream, StreamExt, future};
use kube::{
    Api, Client, Resource,
    runtime::{
        WatchStreamExt,
        watcher::{self, Event},
    },
};
use serde::de::DeserializeOwned;

use super::{
    cgroups,
    names::{Names, State, now_ns},
    objects::{
        CronJob, DaemonSet, Deployment, EndpointSlice, Job, Namespace, Node, Pod, ReplicaSet, Service, StatefulSet,
    },
    store::{Kind, Store, pod_uid},
};

/// Where the names come from.
#[derive(Clone, Debug)]
pub struct Options {
    /// The agent's own node, by name.
    pub node: String,
    /// The host's root directory, with `sys` below it.
    pub host_root: PathBuf,
    /// `/proc` of the host's pid namespace.
    pub proc: PathBuf,
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

/// [`Health`] as it is kept.
#[derive(Debug, Default)]
pub(super) struct Progress {
    lists: AtomicU64,
    /// Nanoseconds since 1970; 0 before the first.
    last_event: AtomicI64,
    errors: AtomicU64,
}

impl Progress {
    pub(super) fn health(&self) -> Health {
        Health {
            last_event: Some(self.last_event.load(Ordering::Relaxed))
                .filter(|at| *at != 0)
                .map(|at| Duration::from_nanos(u64::try_from(now_ns() - at).unwrap_or(0))),
            errors_since_event: self.errors.load(Ordering::Relaxed),
            lists: self.lists.load(Ordering::Relaxed),
        }
    }
}

/// The lookups, and the future that feeds them until it is dropped.
pub fn names(client: Client, options: &Options) -> (Names, impl Future<Output = ()> + Send + use<>) {
    let state = Arc::new(State::new(options));
    let config = watcher::Config::default().page_size(options.page_size);
    let feed = feed(client, config, Arc::clone(&state));
    (Names::new(state), feed)
}

async fn feed(client: Client, config: watcher::Config, state: Arc<State>) {
    let objects = async {
        let mut labels = state.labels.subscribe();
        loop {
            let wanted = Arc::clone(&labels.borrow_and_update());
            state.store.write().want_labels(&wanted);
            tokio::select! {
                () = follow_all(&client, &config, &state, !wanted.is_empty()) => {}
                // Objects were trimmed to the labels wanted before.
                changed = labels.changed() => if changed.is_err() { return },
            }
        }
    };
    future::join(objects, cgroups::follow(&state)).await;
}

async fn follow_all(client: &Client, config: &watcher::Config, state: &State, labelled: bool) {
    let workloads = async {
        if labelled {
            future::join4(
                follow::<Deployment>(client, config, state),
                follow::<StatefulSet>(client, config, state),
                follow::<DaemonSet>(client, config, state),
                follow::<CronJob>(client, config, state),
            )
            .await;
        }
    };
    future::join3(
        future::join4(
            follow::<Pod>(client, config, state),
            follow::<Service>(client, config, state),
            follow::<EndpointSlice>(client, config, state),
            follow::<Node>(client, config, state),
        ),
        future::join3(
            follow::<ReplicaSet>(client, config, state),
            follow::<Job>(client, config, state),
            follow_namespaces(client, config, state),
        ),
        workloads,
    )
    .await;
}

/// A kind the store takes.
trait Watched: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static {
    const KIND: Kind;
    fn apply(&self, store: &mut Store, now: i64);
    fn delete(&self, store: &mut Store, now: i64);
    /// Whether what is switched on for a cgroup of this machine may depend on it.
    fn concerns(&self, _: &State) -> bool {
        false
    }
}

macro_rules! watched {
    ($($kind:ident: |$it:ident, $store:ident, $now:pat_param| $apply:expr, $delete:expr $(, $concerns:expr)?;)*) => {
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
            $(fn concerns(&self, state: &State) -> bool {
                $concerns(self, state)
            })?
        })*
    };
}

watched! {
    Pod: |it, store, now| store.apply_pod(it, now), store.delete_pod(it, now), on_this_machine;
    Service: |it, store, _| store.apply_service(it), store.delete_service(it);
    EndpointSlice: |it, store, now| store.apply_slice(it, now), store.delete_slice(it, now);
    Node: |it, store, _| store.apply_node(it), store.delete_node(it);
    ReplicaSet: |it, store, _| store.apply_replica_set(it), store.delete_owner(&it.metadata);
    Job: |it, store, _| store.apply_job(it), store.delete_owner(&it.metadata);
    Deployment: |it, store, _| store.apply_workload(Kind::Deployment, &it.metadata), store.delete_workload(&it.metadata);
    StatefulSet: |it, store, _| store.apply_workload(Kind::StatefulSet, &it.metadata), store.delete_workload(&it.metadata);
    DaemonSet: |it, store, _| store.apply_workload(Kind::DaemonSet, &it.metadata), store.delete_workload(&it.metadata);
    CronJob: |it, store, _| store.apply_workload(Kind::CronJob, &it.metadata), store.delete_workload(&it.metadata);
}

/// Pods of other nodes may share this kernel.
fn on_this_machine(pod: &Pod, state: &State) -> bool {
    pod.spec.node_name.as_deref() == Some(&*state.node)
        || pod_uid(&pod.metadata).is_some_and(|uid| state.cgroups.read().contains(uid))
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
        let concerns = match &event {
            Event::Init | Event::InitApply(_) => false,
            Event::Apply(it) | Event::Delete(it) => it.concerns(state),
            Event::InitDone => K::KIND == Kind::Pod,
        };
        {
            let mut store = state.store.write();
            match event {
                Event::Init => store.begin_list(K::KIND),
                Event::InitApply(it) | Event::Apply(it) => it.apply(&mut store, now),
                Event::Delete(it) => it.delete(&mut store, now),
                Event::InitDone => store.end_list(K::KIND, now),
            }
        }
        if concerns {
            state.changed();
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

#[cfg(test)]
#[path = "watch_tests.rs"]
mod tests;
