//! Against a server on loopback that speaks the API's LIST and WATCH over HTTP.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs, unreachable_pub)]

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use api::{ConfigBuilder, Source, collector::EbpfCollectorSpec};
use ec_follow::{Followed, follow};
use kube::{Client, Config};
use serde_json::json;
use telemetry::{Health, health};
use testkit::kube::FakeApi;
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(20);

fn loopback() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 0).into()
}

struct Program {
    health: Health,
    following: tokio::task::JoinHandle<Followed>,
}

impl Program {
    /// Given `loopback` by a flag.
    fn start(address: SocketAddr) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::try_from(Config::new(format!("http://{address}").parse().unwrap())).unwrap();
        let health = Health::default();
        let component = health.component("collector");
        let build = |spec: &EbpfCollectorSpec| {
            let mut sources = ConfigBuilder::new();
            sources.set("loopback", Source::Flag, "true");
            sources.object(spec.agent_options()).build()
        };
        let following = tokio::spawn(async move { follow(client, "cluster", component, build).await });
        Self { health, following }
    }

    async fn followed(&mut self) -> Followed {
        timeout(PATIENCE, &mut self.following).await.unwrap().unwrap()
    }

    fn says(&self) -> (health::State, String) {
        let component = self.health.snapshot().remove("collector").unwrap();
        (component.state, component.reason.unwrap_or_default())
    }

    /// Waits until health is in this state and its reason holds these words.
    async fn until(&self, state: health::State, words: &[&str]) {
        until(|| {
            let (is, reason) = self.says();
            is == state && words.iter().all(|word| reason.contains(word))
        })
        .await
        .unwrap_or_else(|()| panic!("not {state} with {words:?}: {:?}", self.says()));
    }
}

async fn until(condition: impl Fn() -> bool) -> Result<(), ()> {
    let start = tokio::time::Instant::now();
    while !condition() {
        if start.elapsed() > PATIENCE {
            return Err(());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

fn interval(followed: &Followed) -> u64 {
    followed.config.borrow().interval.as_secs()
}

#[tokio::test]
async fn waits_for_the_server_then_for_the_object_then_follows_it() {
    let server = FakeApi::new();
    // Nobody listens at this port yet.
    let (address, serving) = server.serve(loopback()).await.unwrap();
    serving.abort();
    let _ = serving.await;
    let mut program = Program::start(address);
    program
        .until(
            health::State::Starting,
            &["`cluster`", "the API server cannot be asked"],
        )
        .await;
    assert!(!program.health.is_ready() && program.health.is_alive());

    let (_, _serving) = server.serve(address).await.unwrap();
    program
        .until(health::State::Starting, &["there is no such object"])
        .await;
    assert!(!program.following.is_finished());
    until(|| server.watches() == 1).await.unwrap();
    server.change(
        1,
        &json!({ "interval": "7m", "plugins": { "ebpf-net": { "loopback": false } } }),
    );
    let mut followed = program.followed().await;
    assert_eq!((interval(&followed), *followed.generation.borrow()), (420, 1));
    assert!(followed.config.borrow().net.loopback, "the object won over a flag");
    assert!(program.health.is_ready());
    for query in &*server.asked.lock() {
        assert_eq!(query["fieldSelector"], "metadata.name=cluster");
    }

    server.change(
        2,
        &json!({ "interval": "5s", "namespaces": [{ "match": { "names": ["a"] } }] }),
    );
    timeout(PATIENCE, followed.generation.changed()).await.unwrap().unwrap();
    assert_eq!((interval(&followed), *followed.generation.borrow()), (5, 2));
    assert_eq!(followed.spec.borrow().namespaces.as_ref().unwrap().len(), 1);
}

#[tokio::test]
async fn what_cannot_be_used_changes_nothing_and_is_named() {
    let server = FakeApi::new();
    server.store(1, &json!({ "interval": "soon" }));
    let (address, _serving) = server.serve(loopback()).await.unwrap();
    let mut program = Program::start(address);
    let named = [
        "to be corrected",
        "interval = \"soon\"",
        "spec.interval",
        "from 1s to 1h",
    ];
    program.until(health::State::Starting, &named).await;
    until(|| server.watches() == 1).await.unwrap();
    server.change(2, &json!({ "interval": "10s" }));
    let followed = program.followed().await;

    server.change(3, &json!({ "interval": "2h", "tags": { "host": "x" } }));
    let named = [
        "generation 3",
        "2 stays in force",
        "interval = \"2h\"",
        "tags = \"host=x\"",
    ];
    program.until(health::State::Degraded, &named).await;
    server.change(
        4,
        &json!({ "interval": 10, "dataway": { "urls": "https://h?token=tkn_secret" } }),
    );
    program
        .until(
            health::State::Degraded,
            &["generation 4", "2 stays in force", "cannot be read"],
        )
        .await;
    assert!(!program.says().1.contains("tkn_secret"), "{:?}", program.says());
    assert!(program.health.is_ready());
    assert_eq!((interval(&followed), *followed.generation.borrow()), (10, 2));

    server.change(5, &json!({ "interval": "11s" }));
    until(|| *followed.generation.borrow() == 5).await.unwrap();
    assert_eq!(interval(&followed), 11);
    assert_eq!(program.says(), (health::State::Ok, String::new()));
}

#[tokio::test]
async fn outages_expired_versions_and_deletion_change_nothing() {
    let server = FakeApi::new();
    server.store(1, &json!({ "interval": "10s" }));
    let (address, serving) = server.serve(loopback()).await.unwrap();
    let mut program = Program::start(address);
    let mut followed = program.followed().await;
    until(|| server.watches() == 1).await.unwrap();

    // The status changes often; nobody is told.
    let mut object = server.store(1, &json!({ "interval": "10s" }));
    object["status"] = json!({ "flowsPerSecond": 7 });
    server.tell("MODIFIED", &object);
    server.store(2, &json!({ "interval": "12s" }));
    let gone = json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": "too old resource version", "reason": "Expired", "code": 410 });
    server.tell("ERROR", &gone);
    timeout(PATIENCE, followed.generation.changed()).await.unwrap().unwrap();
    assert_eq!((interval(&followed), *followed.generation.borrow()), (12, 2));

    until(|| server.watches() == 2).await.unwrap();
    serving.abort();
    let _ = serving.await;
    server.cut();
    server.store(3, &json!({ "interval": "13s" }));
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(interval(&followed), 12);
    assert!(program.health.is_ready());
    let (_, _serving) = server.serve(address).await.unwrap();
    until(|| *followed.generation.borrow() == 3).await.unwrap();

    server.delete();
    program
        .until(health::State::Degraded, &["is gone", "generation 3 stays"])
        .await;
    assert_eq!(interval(&followed), 13);
    server.change(1, &json!({ "interval": "14s" }));
    until(|| *followed.generation.borrow() == 1).await.unwrap();
    assert_eq!((interval(&followed), program.says().0), (14, health::State::Ok));
}

#[tokio::test]
async fn ends_when_nobody_listens() {
    let server = FakeApi::new();
    server.store(1, &json!({}));
    let (address, _serving) = server.serve(loopback()).await.unwrap();
    let followed = Program::start(address).followed().await;
    until(|| server.watches() == 1).await.unwrap();
    assert_eq!(server.listeners(), 1);
    drop(followed);
    until(|| server.listeners() == 0).await.unwrap();
}
