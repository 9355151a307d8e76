//! Reconciliations against an API server in memory.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use api::collector::SinkStatus;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::*;
use crate::{
    cluster::tests::{FakeServer, metrics},
    inputs::Settings,
};

const OBJECT: &str = "/apis/ebpfcollector.io/v1alpha1/ebpfcollectors/cluster";
const SECRET: &str = "/api/v1/namespaces/observe/secrets/dataway";
const AGENTS: &str = "/apis/apps/v1/namespaces/observe/daemonsets/cluster-agent";

struct Cluster {
    server: FakeServer,
    context: Context,
}

impl Cluster {
    fn new(spec: Value) -> Self {
        let server = FakeServer::default();
        let object = json!({
            "apiVersion": "ebpfcollector.io/v1alpha1", "kind": "EbpfCollector",
            "metadata": { "name": "cluster", "uid": "9f1c", "generation": 1, "creationTimestamp": "2026-01-02T00:00:00Z" },
            "spec": spec,
        });
        server.objects.lock().unwrap().insert(OBJECT.to_owned(), object);
        let settings = Settings {
            namespace: "observe".to_owned(),
            image: "collector:1".to_owned(),
            image_pull_policy: None,
            image_pull_secrets: Vec::new(),
            selinux_type: None,
        };
        Self {
            context: Context::new(server.client(), settings, None, metrics()),
            server,
        }
    }

    fn get(&self, path: &str) -> Option<Value> {
        self.server.objects.lock().unwrap().get(path).cloned()
    }

    fn object(&self) -> EbpfCollector {
        serde_json::from_value(self.get(OBJECT).unwrap()).unwrap()
    }

    async fn reconcile(&self, all: &[Arc<EbpfCollector>]) -> Vec<String> {
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        reconcile(&self.object(), all, &self.context, now).await.unwrap();
        self.server.writes()
    }

    fn conditions(&self) -> Vec<String> {
        let conditions = self.object().status.unwrap().conditions;
        conditions
            .iter()
            .map(|it| format!("{}={} {}", it.type_, it.status, it.reason))
            .collect()
    }
}

#[tokio::test]
async fn one_object_becomes_pods_and_then_nothing_is_written() {
    let cluster = Cluster::new(json!({ "outputs": { "stdout": "json" } }));
    let writes = cluster.reconcile(&[]).await;
    assert!(writes.iter().any(|write| write.ends_with(AGENTS)), "{writes:?}");
    let arguments = &cluster.get(AGENTS).unwrap()["spec"]["template"]["spec"]["containers"][0]["args"];
    assert!(
        arguments.as_array().unwrap().contains(&json!("https://10.96.0.7:6063")),
        "{arguments}"
    );
    assert_eq!(cluster.server.events(), ["Created", "CertificatesIssued"]);
    for _ in 0..100 {
        assert_eq!(cluster.reconcile(&[]).await, Vec::<String>::new());
    }
    assert!(cluster.server.events().is_empty());
    cluster.server.objects.lock().unwrap().remove(AGENTS);
    let writes = cluster.reconcile(&[]).await;
    assert_eq!(writes, [format!("PATCH {AGENTS}")]);
}

#[tokio::test]
async fn a_missing_token_is_told_and_what_runs_stays() {
    let spec = json!({ "dataway": { "url": "https://openway.example", "tokenSecretRef": { "name": "dataway" } } });
    let cluster = Cluster::new(spec);
    cluster.reconcile(&[]).await;
    assert_eq!(cluster.conditions()[0], "Ready=False SecretMissing");
    assert!(cluster.get(AGENTS).is_none());
    let secret =
        json!({ "apiVersion": "v1", "kind": "Secret", "metadata": { "name": "dataway" }, "data": { "token": "dGtu" } });
    cluster.server.objects.lock().unwrap().insert(SECRET.to_owned(), secret);
    cluster.reconcile(&[]).await;
    let agents = cluster.get(AGENTS);
    assert!(agents.is_some());
    cluster.server.objects.lock().unwrap().remove(SECRET);
    cluster.server.events();
    let writes = cluster.reconcile(&[]).await;
    assert_eq!(writes, [format!("PATCH {OBJECT}/status")]);
    assert_eq!(
        (cluster.conditions()[2].as_str(), cluster.get(AGENTS)),
        ("Degraded=True SecretMissing", agents)
    );
    assert_eq!(cluster.server.events(), ["SecretMissing"]);
}

#[tokio::test]
async fn certificates_are_renewed_while_the_object_is_held() {
    let cluster = Cluster::new(json!({}));
    cluster.reconcile(&[]).await;
    cluster.server.objects.lock().unwrap().get_mut(OBJECT).unwrap()["spec"] = json!({ "interval": "2h" });
    let months = 1_800_000_000 + 70 * 24 * 3600;
    let later = Timestamp::from_second(months).unwrap();
    cluster.server.writes();
    cluster.server.events();
    reconcile(&cluster.object(), &[], &cluster.context, later)
        .await
        .unwrap();
    let writes = cluster.server.writes();
    let secret = |name: &str| format!("PATCH /api/v1/namespaces/observe/secrets/cluster-{name}");
    let mut expected: Vec<String> = ["aggregator-tls", "agent-tls", "operator-tls"].map(secret).into();
    expected.push(format!("PATCH {OBJECT}/status"));
    assert_eq!(writes, expected);
    assert_eq!(
        cluster.server.events(),
        ["Updated", "CertificatesRotated", "InvalidSpec"]
    );
    assert_eq!(cluster.conditions()[0], "Ready=False InvalidSpec");
    // Agents and aggregator are as they were, and told of.
    assert!(cluster.get(AGENTS).is_some());
    assert_eq!(cluster.conditions().len(), 4);
}

#[tokio::test]
async fn an_object_that_was_never_served_gets_no_certificates() {
    let cluster = Cluster::new(json!({ "interval": "2h" }));
    assert_eq!(cluster.reconcile(&[]).await, [format!("PATCH {OBJECT}/status")]);
    assert_eq!(cluster.conditions().len(), 3);
}

#[tokio::test]
async fn of_two_objects_the_older_is_served() {
    let cluster = Cluster::new(json!({}));
    let mut older = cluster.object();
    older.metadata.name = Some("older".to_owned());
    older.metadata.creation_timestamp = serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap();
    let writes = cluster.reconcile(&[Arc::new(older)]).await;
    assert_eq!(cluster.server.events(), ["AnotherObject"]);
    assert_eq!(writes, [format!("PATCH {OBJECT}/status")]);
    assert_eq!(cluster.conditions()[0], "Ready=False AnotherObject");
}

#[tokio::test]
async fn a_wrong_option_is_told() {
    let cluster = Cluster::new(json!({ "interval": "2h" }));
    let writes = cluster.reconcile(&[]).await;
    assert_eq!(writes, [format!("PATCH {OBJECT}/status")]);
    assert_eq!(cluster.conditions()[0], "Ready=False InvalidSpec");
    let message = cluster.object().status.unwrap().conditions[0].message.clone();
    assert!(message.contains("spec.interval"), "{message}");
}

#[tokio::test]
async fn pauses_grow_by_object_up_to_the_limit() {
    let cluster = Cluster::new(json!({}));
    let error = ReconcileError::Cluster(failed("read", "Secret", "a")(
        kube::Error::LinesCodecMaxLineLengthExceeded,
    ));
    let pauses: Vec<u64> = (0..10).map(|_| cluster.context.pause("a", &error).as_secs()).collect();
    assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300]);
    assert_eq!(cluster.context.pause("b", &error).as_secs(), 1);
}

#[test]
fn a_status_differs_by_what_the_api_server_holds_of_it() {
    let delivered = |millisecond| {
        let sink = SinkStatus {
            last_delivery: Some(Time(Timestamp::from_millisecond(millisecond).unwrap())),
            ..SinkStatus::default()
        };
        EbpfCollectorStatus {
            sinks: vec![sink],
            flows_per_second: Some(0.1),
            ..EbpfCollectorStatus::default()
        }
    };
    let found = delivered(1_800_000_000_345);
    let held: EbpfCollectorStatus = serde_json::from_value(serde_json::to_value(&found).unwrap()).unwrap();
    assert_ne!(held, found, "the API server's copy has whole seconds");
    assert!(!differs(Some(&held), &found));
    assert!(differs(Some(&held), &delivered(1_800_000_001_345)));
    assert!(differs(None, &found));
}
