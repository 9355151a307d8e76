//! Follows one `EbpfCollector` object, so that a running program takes over what changes in it.
//!
//! ```text
//! API server ▶ watch of that one object (backoff with jitter) ▶ its spec ▶ the program's options ▶ [`Followed`]
//! ```
//! What cannot be read or used changes nothing: the last good configuration stays, and health says what is wrong. Neither
//! does an API server that is away, or an object that was deleted. Entry: [`follow`], with a client from [`connect`].

mod connect;
mod stored;

use std::{pin::Pin, sync::Arc, time::Duration};

use api::{
    AgentConfig, ConfigErrors,
    collector::{EbpfCollectorSpec, KIND},
};
use futures::{Stream, StreamExt};
use kube::{
    Api, Client,
    runtime::{WatchStreamExt, watcher},
};
use telemetry::{ComponentHandle, LogLimit};
use tokio::sync::watch;

pub use connect::{ConnectError, connect};

use stored::Stored;

/// An API server that is away is told about at this pace.
static LOG_LIMIT: LogLimit = LogLimit::new(Duration::from_secs(30));

/// What the object says; each part changes as soon as the object does.
#[derive(Clone, Debug)]
pub struct Followed {
    /// All options: the object's below environment and flags.
    pub config: watch::Receiver<Arc<AgentConfig>>,
    /// The object's spec, for what is no option: plugins by namespace.
    pub spec: watch::Receiver<Arc<EbpfCollectorSpec>>,
    /// `metadata.generation` of the object that the other two are of. Sent after them, with every change of either.
    pub generation: watch::Receiver<i64>,
}

/// Makes the options of a program from the object.
pub trait Build: Fn(&EbpfCollectorSpec) -> Result<AgentConfig, ConfigErrors> + Send + 'static {}

impl<F: Fn(&EbpfCollectorSpec) -> Result<AgentConfig, ConfigErrors> + Send + 'static> Build for F {}

type Events = Pin<Box<dyn Stream<Item = watcher::Result<Option<Stored>>> + Send>>;

struct Follower<B> {
    name: String,
    health: ComponentHandle,
    build: B,
    events: Events,
}

/// What is in force.
struct Published {
    config: watch::Sender<Arc<AgentConfig>>,
    spec: watch::Sender<Arc<EbpfCollectorSpec>>,
    generation: watch::Sender<i64>,
}

/// A version of the object that can be used.
struct Version {
    generation: i64,
    spec: EbpfCollectorSpec,
    config: AgentConfig,
}

/// Waits until the object named `name` is there and can be used, and follows it from then on, until every part of the
/// answer is dropped. `health` says what is waited for, and later what is wrong with the object.
pub async fn follow(client: Client, name: &str, health: ComponentHandle, build: impl Build) -> Followed {
    health.set_starting(format!("waits for {KIND} `{name}`"));
    let events = watcher::watch_object(Api::<Stored>::all(client), name).default_backoff();
    let mut follower = Follower {
        name: name.to_owned(),
        health,
        build,
        events: Box::pin(events),
    };
    let first = follower.first().await;
    tracing::info!(
        collector = name,
        generation = first.generation,
        "Runs with the options of the object"
    );
    let published = Published {
        config: watch::Sender::new(Arc::new(first.config)),
        spec: watch::Sender::new(Arc::new(first.spec)),
        generation: watch::Sender::new(first.generation),
    };
    let followed = Followed {
        config: published.config.subscribe(),
        spec: published.spec.subscribe(),
        generation: published.generation.subscribe(),
    };
    tokio::spawn(follower.run(published));
    followed
}

// === impl Follower ===

impl<B: Build> Follower<B> {
    async fn first(&mut self) -> Version {
        let name = self.name.clone();
        loop {
            let waits_for = match self.next().await {
                Ok(Some(stored)) => match self.read(stored) {
                    Ok(version) => {
                        self.health.set_ok();
                        return version;
                    }
                    Err(errors) => format!("waits for {KIND} `{name}` to be corrected: {}", one_line(&errors)),
                },
                Ok(None) => format!("waits for {KIND} `{name}`: there is no such object"),
                Err(error) => format!("waits for {KIND} `{name}`: the API server cannot be asked: {error}"),
            };
            self.health.set_starting(waits_for);
        }
    }

    async fn run(mut self, published: Published) {
        loop {
            let next = tokio::select! {
                next = self.next() => next,
                () = published.closed() => return,
            };
            match next {
                Ok(Some(stored)) => {
                    let generation = stored.metadata.generation.unwrap_or_default();
                    match self.read(stored) {
                        Ok(version) => {
                            self.health.set_ok();
                            self.publish(&published, version);
                        }
                        Err(errors) => {
                            let stays = *published.generation.borrow();
                            self.health.set_degraded(format!(
                                "generation {generation} of {KIND} `{}` cannot be used, {stays} stays in force: {}",
                                self.name,
                                one_line(&errors)
                            ));
                        }
                    }
                }
                Ok(None) => {
                    let stays = *published.generation.borrow();
                    self.health.set_degraded(format!(
                        "{KIND} `{}` is gone, its generation {stays} stays in force",
                        self.name
                    ));
                }
                Err(error) => {
                    if let Some(suppressed) = LOG_LIMIT.allow() {
                        tracing::warn!(
                            collector = self.name, %error, suppressed,
                            "Watch of the object failed: its last version stays in force, trying again"
                        );
                    }
                }
            }
        }
    }

    async fn next(&mut self) -> watcher::Result<Option<Stored>> {
        match self.events.next().await {
            Some(event) => event,
            // The watch never ends by itself.
            None => std::future::pending().await,
        }
    }

    fn read(&self, stored: Stored) -> Result<Version, ConfigErrors> {
        let spec = EbpfCollectorSpec::from_json(stored.spec)?;
        let config = (self.build)(&spec)?;
        Ok(Version {
            generation: stored.metadata.generation.unwrap_or_default(),
            spec,
            config,
        })
    }

    fn publish(&self, published: &Published, version: Version) {
        let Version {
            generation,
            spec,
            config,
        } = version;
        let config_changed = replace(&published.config, config);
        let spec_changed = replace(&published.spec, spec);
        let known = *published.generation.borrow();
        if config_changed || spec_changed || known != generation {
            published.generation.send_replace(generation);
            tracing::info!(
                collector = self.name,
                generation,
                options_changed = config_changed,
                "Object changed"
            );
        }
    }
}

// === impl Published ===

impl Published {
    /// Nobody listens any more.
    async fn closed(&self) {
        self.config.closed().await;
        self.spec.closed().await;
        self.generation.closed().await;
    }
}

/// True if `new` is something new.
fn replace<T: PartialEq>(sender: &watch::Sender<Arc<T>>, new: T) -> bool {
    sender.send_if_modified(|current| {
        let changed = **current != new;
        if changed {
            *current = Arc::new(new);
        }
        changed
    })
}

fn one_line(errors: &ConfigErrors) -> String {
    let errors: Vec<String> = errors.0.iter().map(ToString::to_string).collect();
    errors.join("; ")
}
