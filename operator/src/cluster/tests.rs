//! Tests against an API server that keeps objects in memory and counts writes.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::{
    collections::BTreeMap,
    convert::Infallible,
    sync::{Arc, Mutex},
};

use http::{Method, Request, Response};
use kube::client::Body;
use serde_json::json;

use super::*;

/// Objects by path, and the requests that change them.
#[derive(Clone, Default)]
pub(crate) struct FakeServer {
    pub(crate) objects: Arc<Mutex<BTreeMap<String, Value>>>,
    pub(crate) writes: Arc<Mutex<Vec<String>>>,
    pub(crate) events: Arc<Mutex<Vec<String>>>,
}

impl FakeServer {
    pub(crate) fn client(&self) -> Client {
        let server = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let server = server.clone();
            async move { Ok::<_, Infallible>(server.answer(request).await) }
        });
        Client::new(service, "default")
    }

    pub(crate) fn writes(&self) -> Vec<String> {
        std::mem::take(&mut *self.writes.lock().unwrap())
    }

    /// Reasons of the Events so far.
    pub(crate) fn events(&self) -> Vec<String> {
        std::mem::take(&mut *self.events.lock().unwrap())
    }

    async fn answer(&self, request: Request<Body>) -> Response<Body> {
        let (head, body) = request.into_parts();
        let path = head.uri.path().to_owned();
        let body = body.collect_bytes().await.unwrap();
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        let mut objects = self.objects.lock().unwrap();
        // Beside the objects: their place is of no interest here.
        if path.contains("/events") {
            let reason = body["reason"].as_str().unwrap_or_default().to_owned();
            self.events.lock().unwrap().push(reason);
            let answer = Body::from(body.to_string().into_bytes());
            return Response::builder().status(201).body(answer).unwrap();
        }
        if head.method != Method::GET {
            self.writes.lock().unwrap().push(format!("{} {path}", head.method));
        }
        let (code, answer) = match head.method {
            Method::GET if head.uri.query().is_some_and(|query| query.contains("labelSelector")) => {
                let prefix = format!("{path}/");
                let items: Vec<&Value> = objects
                    .iter()
                    .filter(|(key, object)| {
                        key.starts_with(&prefix)
                            && object["metadata"]["labels"]["app.kubernetes.io/managed-by"] == names::FIELD_MANAGER
                    })
                    .map(|(_, object)| object)
                    .collect();
                (
                    200,
                    json!({ "apiVersion": "v1", "kind": "List", "metadata": {}, "items": items }),
                )
            }
            Method::GET => match objects.get(&path) {
                Some(object) => (200, object.clone()),
                None => missing(),
            },
            Method::DELETE => match objects.remove(&path) {
                Some(object) => (200, object),
                None => missing(),
            },
            Method::PATCH if path.ends_with("/status") => {
                let object = objects.entry(path.trim_end_matches("/status").to_owned()).or_default();
                object["status"] = body["status"].clone();
                (200, object.clone())
            }
            Method::PATCH => {
                assert!(
                    head.uri
                        .query()
                        .unwrap()
                        .contains("fieldManager=ebpfcollector-operator")
                );
                let mut object = body;
                object["metadata"]["uid"] = json!(path);
                if object["kind"] == "Service" {
                    object["spec"]["clusterIP"] = json!("10.96.0.7");
                }
                objects.insert(path, object.clone());
                (200, object)
            }
            Method::POST | Method::PUT => {
                let posted = head.method == Method::POST;
                let name = body["metadata"]["name"].as_str().unwrap();
                let key = if posted { format!("{path}/{name}") } else { path.clone() };
                let before = objects.get(&key).map(|it| it["metadata"]["resourceVersion"].clone());
                // As the API server: a new object must not exist, a replacement must know the latest version.
                let expected = (!posted).then(|| body["metadata"]["resourceVersion"].clone());
                if before == expected {
                    let mut object = body;
                    object["metadata"]["resourceVersion"] = json!(self.writes.lock().unwrap().len().to_string());
                    objects.insert(key, object.clone());
                    (200, object)
                } else {
                    failure(409, "Conflict")
                }
            }
            _ => failure(405, "MethodNotAllowed"),
        };
        Response::builder()
            .status(code)
            .body(Body::from(answer.to_string().into_bytes()))
            .unwrap()
    }
}

fn missing() -> (u16, Value) {
    failure(404, "NotFound")
}

fn failure(code: u16, reason: &str) -> (u16, Value) {
    let status = json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "reason": reason,
        "message": reason, "code": code });
    (code, status)
}

pub(crate) fn metrics() -> Metrics {
    Metrics::new(&telemetry::Telemetry::new("operator", "0"))
}

fn manifests() -> Vec<Value> {
    let object = |version: &str, kind: &str, name: &str| {
        drift::with_hash(json!({
            "apiVersion": version, "kind": kind,
            "metadata": {
                "name": name, "labels": names::labels("cluster", names::Component::Agent),
                "ownerReferences": [{ "apiVersion": "ebpfcollector.io/v1alpha1", "kind": "EbpfCollector",
                    "name": "cluster", "uid": "9f1c" }],
            },
        }))
    };
    vec![
        object("v1", "ServiceAccount", "cluster-agent"),
        object("rbac.authorization.k8s.io/v1", "ClusterRole", "observe-cluster-agent"),
        object("apps/v1", "DaemonSet", "cluster-agent"),
    ]
}

const DAEMON_SET: &str = "/apis/apps/v1/namespaces/observe/daemonsets/cluster-agent";

#[tokio::test]
async fn what_is_as_wanted_is_not_written() {
    let server = FakeServer::default();
    let client = server.client();
    let first = apply(&client, "observe", &manifests(), &metrics()).await.unwrap();
    assert_eq!((first.written.len(), server.writes().len()), (3, 3));
    for _ in 0..100 {
        let again = apply(&client, "observe", &manifests(), &metrics()).await.unwrap();
        assert_eq!((again.written.len(), again.live.len()), (0, 3));
        assert!(
            prune(&client, "observe", "cluster", "9f1c", &manifests(), &metrics())
                .await
                .unwrap()
                .is_empty()
        );
    }
    assert_eq!(server.writes(), Vec::<String>::new());
}

#[tokio::test]
async fn drift_and_loss_are_repaired_with_one_write_each() {
    let server = FakeServer::default();
    let client = server.client();
    apply(&client, "observe", &manifests(), &metrics()).await.unwrap();
    server.writes();
    server.objects.lock().unwrap().get_mut(DAEMON_SET).unwrap()["metadata"]["labels"] = json!({});
    let again = apply(&client, "observe", &manifests(), &metrics()).await.unwrap();
    assert!(
        matches!(&again.written[0].why, Why::Drifted(path) if path.starts_with(".metadata.labels")),
        "{:?}",
        again.written
    );
    assert_eq!(server.writes(), [format!("PATCH {DAEMON_SET}")]);
    server.objects.lock().unwrap().remove(DAEMON_SET);
    let again = apply(&client, "observe", &manifests(), &metrics()).await.unwrap();
    assert_eq!(again.written[0].why, Why::Missing);
    let mut other = manifests();
    other[2]["spec"] = json!({ "minReadySeconds": 5 });
    other[2]["metadata"]["annotations"] = json!({});
    let other: Vec<Value> = other.into_iter().map(drift::with_hash).collect();
    let again = apply(&client, "observe", &other[2..], &metrics()).await.unwrap();
    assert_eq!(again.written[0].why, Why::Changed);
}

#[tokio::test]
async fn what_is_no_longer_wanted_goes_and_what_is_not_ours_stays() {
    let server = FakeServer::default();
    let client = server.client();
    let mut wanted = manifests();
    apply(&client, "observe", &wanted, &metrics()).await.unwrap();
    let mut foreign = wanted[0].clone();
    foreign["metadata"]["name"] = json!("copied");
    foreign["metadata"]["ownerReferences"] = json!([]);
    let path = "/api/v1/namespaces/observe/serviceaccounts/copied".to_owned();
    server.objects.lock().unwrap().insert(path.clone(), foreign);
    wanted.pop();
    server.writes();
    let removed = prune(&client, "observe", "cluster", "9f1c", &wanted, &metrics())
        .await
        .unwrap();
    assert_eq!(removed, ["DaemonSet cluster-agent"]);
    assert_eq!(server.writes(), [format!("DELETE {DAEMON_SET}")]);
    assert!(server.objects.lock().unwrap().contains_key(&path));
}
