//! What all tests share: the cluster, its API, the DataWay stub, and everything that was ever seen in the API.

use std::{
    collections::BTreeSet,
    fmt::Debug,
    path::PathBuf,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::{
    apps::v1::ReplicaSet,
    batch::v1::Job,
    core::v1::{Node, Pod, Service},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api, Client, Resource, ResourceExt as _,
    api::{ListParams, Patch, PatchParams},
    core::{ApiResource, DynamicObject, GroupVersionKind},
    discovery::{Discovery, Scope, verbs},
    runtime::{WatchStreamExt as _, watcher},
};
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::{
    api,
    stub::{Row, Stub, TOKEN},
    truth::{Judged, Truth, Verdict, now},
    workloads,
};
use crate::{cluster::Cluster, images};

/// Namespace of the product.
pub const PRODUCT: &str = "ebpf-collector";
/// Namespace of the DataWay stub.
pub const SINK: &str = "e2e-sink";
/// Namespaces of the workloads.
pub const ALPHA: &str = "e2e-alpha";
/// Namespaces of the workloads.
pub const BETA: &str = "e2e-beta";
/// The object's name.
pub const COLLECTOR: &str = "cluster";
/// The object's interval.
pub const INTERVAL: Duration = Duration::from_secs(2);
/// From the end of an interval until its rows can be expected at the stub.
pub const DELIVERY: Duration = Duration::from_secs(6);
/// Kinds that come and go by themselves or belong to nodes.
const NOT_KEPT: &[&str] = &[
    "Event",
    "Lease",
    "EndpointSlice",
    "Endpoints",
    // What the API server notes of a Service's addresses, and tidies up later when it was stopped meanwhile.
    "IPAddress",
    "ComponentStatus",
    "PodMetrics",
];

/// What all tests share.
pub struct World {
    /// The cluster.
    pub cluster: Cluster,
    /// Its API.
    pub client: Client,
    /// What arrived.
    pub stub: Stub,
    /// Static programs of this project.
    pub dist: PathBuf,
    truth: Arc<Mutex<Truth>>,
}

/// How many ends got which verdict, with the first of each that is not right.
#[derive(Debug, Default)]
pub struct Tally {
    /// Right.
    pub right: usize,
    /// Some names missing.
    pub lesser: usize,
    /// All names missing.
    pub unnamed: usize,
    /// A wrong name.
    pub wrong: usize,
    /// The first of them, as text.
    pub examples: Vec<String>,
}

// === impl Tally ===

impl Tally {
    fn add(&mut self, row: &Row, side: &str, judged: &Judged) {
        *match judged.verdict {
            Verdict::Right => &mut self.right,
            Verdict::Lesser => &mut self.lesser,
            Verdict::Unnamed => &mut self.unnamed,
            Verdict::Wrong => &mut self.wrong,
        } += 1;
        if judged.verdict != Verdict::Right && self.examples.len() < 40 {
            let expected: Vec<String> = judged.expected.iter().map(ToString::to_string).collect();
            self.examples.push(format!(
                "{:?}: {side} of {} {} {}:{} > {}:{} on {} says {}, the API {}",
                judged.verdict,
                row.tag("process_name"),
                row.tag("direction"),
                row.tag("src_ip"),
                row.tag("src_port"),
                row.tag("dst_ip"),
                row.tag("dst_port"),
                row.tag("host"),
                judged.said,
                expected.join(" or "),
            ));
        }
    }

    /// Ends in all.
    #[must_use]
    pub fn ends(&self) -> usize {
        self.right + self.lesser + self.unnamed + self.wrong
    }

    /// Prints the counts and the examples.
    pub fn print(&self) {
        println!(
            "    {} ends: {} right, {} in part, {} unnamed, {} wrong",
            self.ends(),
            self.right,
            self.lesser,
            self.unnamed,
            self.wrong
        );
        for example in &self.examples {
            println!("      {example}");
        }
    }
}

// === impl World ===

impl World {
    /// Connects, starts the stub, and follows what is in the cluster from now on.
    ///
    /// # Errors
    /// The cluster cannot be reached or the stub does not start.
    pub async fn new(cluster: Cluster, dist: PathBuf) -> anyhow::Result<Self> {
        let client = api::connect(&cluster.kubeconfig()?).await?;
        let truth = Arc::new(Mutex::new(Truth::default()));
        follow::<Node>(&client, &truth, |truth, node, _| truth.see_node(node));
        follow::<ReplicaSet>(&client, &truth, |truth, set, _| truth.see_owner(&set.metadata));
        follow::<Job>(&client, &truth, |truth, job, _| truth.see_owner(&job.metadata));
        follow::<Pod>(&client, &truth, Truth::see_pod);
        follow::<EndpointSlice>(&client, &truth, |truth, slice, gone| {
            truth.see_slice(slice, gone.is_some())
        });
        follow::<Service>(&client, &truth, |truth, service, _| truth.see_service(service));
        let mut manifests: Vec<Value> = [SINK, ALPHA, BETA].map(workloads::namespace).into();
        manifests.extend(workloads::dataway(SINK));
        api::apply(&client, &manifests).await?;
        api::wait_ready(&client, SINK, Duration::from_secs(60)).await?;
        let stub = Stub::new(client.clone(), SINK, "dataway");
        Ok(Self {
            cluster,
            client,
            stub,
            dist,
            truth,
        })
    }

    /// What the API said so far.
    pub fn truth(&self) -> parking_lot::MutexGuard<'_, Truth> {
        self.truth.lock()
    }

    /// Judges both ends of rows of a measurement, which tell of what happened up to `age` before their time.
    #[must_use]
    pub fn judge<'a>(&self, measurement: &str, age: Duration, rows: impl Iterator<Item = &'a Row>) -> Tally {
        let truth = self.truth();
        let age = i64::try_from(age.as_nanos()).unwrap_or(i64::MAX);
        let mut tally = Tally::default();
        for row in rows.filter(|row| row.name == measurement) {
            for (side, judged) in ["src", "dst"].into_iter().zip(truth.judge(row, age)) {
                tally.add(row, side, &judged);
            }
        }
        tally
    }

    /// Installs the chart and what the object needs, as a user does.
    ///
    /// # Errors
    /// helm fails; its message is in the error.
    pub async fn install(&self) -> anyhow::Result<()> {
        let (repository, tag) = images::PRODUCT.rsplit_once(':').context("the image has no tag")?;
        self.helm(&[
            "install",
            "ebpf-collector",
            "charts/ebpf-collector",
            "--namespace",
            PRODUCT,
            "--create-namespace",
            "--set",
            &format!("image.repository={repository},image.tag={tag},image.pullPolicy=IfNotPresent"),
            "--wait",
            "--timeout",
            "90s",
        ])?;
        let secret = json!({
            "apiVersion": "v1", "kind": "Secret",
            "metadata": { "name": "dataway", "namespace": PRODUCT }, "stringData": { "token": TOKEN },
        });
        api::apply(&self.client, &[secret]).await
    }

    /// The object, as short as a user would write it.
    #[must_use]
    pub fn object(&self) -> Value {
        json!({
            "apiVersion": "ebpfcollector.io/v1alpha1", "kind": "EbpfCollector", "metadata": { "name": COLLECTOR },
            "spec": {
                "interval": format!("{}s", INTERVAL.as_secs()),
                "dataway": {
                    "url": format!("http://dataway.{SINK}.svc.cluster.local:{}", super::stub::PORT),
                    "tokenSecretRef": { "name": "dataway", "key": "token" },
                },
            },
        })
    }

    /// Changes the object.
    ///
    /// # Errors
    /// The API server refuses.
    pub async fn patch_object(&self, patch: &Value) -> anyhow::Result<()> {
        let parameters = PatchParams::default();
        self.objects()
            .patch(COLLECTOR, &parameters, &Patch::Merge(patch))
            .await
            .context("change the object")?;
        Ok(())
    }

    /// The objects of our kind.
    #[must_use]
    pub fn objects(&self) -> Api<DynamicObject> {
        let kind = GroupVersionKind::gvk("ebpfcollector.io", "v1alpha1", "EbpfCollector");
        Api::all_with(
            self.client.clone(),
            &ApiResource::from_gvk_with_plural(&kind, "ebpfcollectors"),
        )
    }

    /// Status, reason and message of a condition of the object.
    ///
    /// # Errors
    /// There is no object, or no such condition.
    pub async fn condition(&self, kind: &str) -> anyhow::Result<(String, String, String)> {
        let object = self.objects().get(COLLECTOR).await.context("read the object")?;
        let conditions = object.data.pointer("/status/conditions").and_then(Value::as_array);
        let condition = conditions
            .into_iter()
            .flatten()
            .find(|condition| condition.get("type").and_then(Value::as_str) == Some(kind))
            .with_context(|| format!("the object has no condition {kind}"))?;
        let text = |key: &str| {
            condition
                .get(key)
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_owned()
        };
        Ok((text("status"), text("reason"), text("message")))
    }

    /// Waits until a condition of the object has this status.
    ///
    /// # Errors
    /// It takes too long; what the condition says last is in the error.
    pub async fn wait_condition(&self, kind: &str, status: &str, limit: Duration) -> anyhow::Result<()> {
        api::wait(&format!("condition {kind} to be {status}"), limit, async || {
            let (found, reason, message) = self.condition(kind).await?;
            anyhow::ensure!(found == status, "{kind} is {found}, {reason}: {message}");
            Ok(Some(()))
        })
        .await
    }

    /// Waits until the status says that this feature works on all of `nodes`, be it in part.
    ///
    /// # Errors
    /// It takes too long; what the status says last is in the error.
    pub async fn wait_feature(&self, name: &str, nodes: usize, limit: Duration) -> anyhow::Result<()> {
        api::wait(&format!("feature {name} on {nodes} nodes"), limit, async || {
            let object = self.objects().get(COLLECTOR).await.context("read the object")?;
            let features = object.data.pointer("/status/features").and_then(Value::as_array);
            let feature = features
                .into_iter()
                .flatten()
                .find(|feature| feature.get("name").and_then(Value::as_str) == Some(name))
                .with_context(|| format!("the status does not tell of {name}"))?;
            let on = |key: &str| feature.get(key).and_then(Value::as_u64).unwrap_or(0);
            let works = on("nodesOn") + on("nodesDegraded");
            anyhow::ensure!(works == nodes as u64, "the status says {feature}");
            Ok(Some(()))
        })
        .await
    }

    /// Prints what the status of the object says now.
    pub async fn print_status(&self, when: &str) {
        println!("    status {when}:");
        for kind in ["Ready", "Progressing", "Degraded", "FlowsArriving"] {
            match self.condition(kind).await {
                Ok((status, reason, message)) => println!("      {kind:<14} {status:<8} {reason}: {message}"),
                Err(error) => println!("      {kind:<14} {error:#}"),
            }
        }
    }

    /// Pods of the product with this component label.
    ///
    /// # Errors
    /// The API server does not answer.
    pub async fn pods(&self, component: &str) -> anyhow::Result<Vec<Pod>> {
        let labels = ListParams::default().labels(&format!("app.kubernetes.io/component={component}"));
        let list = Api::<Pod>::namespaced(self.client.clone(), PRODUCT)
            .list(&labels)
            .await?;
        Ok(list.items)
    }

    /// Names of pods with their restarts, to see that none was replaced.
    ///
    /// # Errors
    /// The API server does not answer.
    pub async fn restarts(&self) -> anyhow::Result<Vec<(String, i32)>> {
        let list = Api::<Pod>::namespaced(self.client.clone(), PRODUCT)
            .list(&ListParams::default())
            .await?;
        let restarts = |pod: &Pod| {
            let statuses = pod
                .status
                .iter()
                .flat_map(|status| status.container_statuses.iter().flatten());
            statuses.map(|status| status.restart_count).sum()
        };
        Ok(list.items.iter().map(|pod| (pod.name_any(), restarts(pod))).collect())
    }

    /// Runs helm, which has to succeed.
    ///
    /// # Errors
    /// It fails; its message is in the error.
    pub fn helm(&self, arguments: &[&str]) -> anyhow::Result<String> {
        self.tool("helm", arguments)
    }

    /// Runs kubectl, which has to succeed.
    ///
    /// # Errors
    /// It fails; its message is in the error.
    pub fn kubectl(&self, arguments: &[&str]) -> anyhow::Result<String> {
        self.tool("kubectl", arguments)
    }

    fn tool(&self, name: &str, arguments: &[&str]) -> anyhow::Result<String> {
        let output = Command::new(self.cluster.program(name))
            .args(arguments)
            .env("KUBECONFIG", self.cluster.kubeconfig()?)
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("start {name}"))?;
        anyhow::ensure!(
            output.status.success(),
            "{name} {} ended with {}: {}",
            arguments.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Every object of the cluster that somebody made on purpose, as text, without those in namespaces of the tests.
    ///
    /// # Errors
    /// The API server does not answer.
    pub async fn everything(&self) -> anyhow::Result<BTreeSet<String>> {
        let discovery = Discovery::new(self.client.clone())
            .run()
            .await
            .context("ask for all kinds")?;
        let mut all = BTreeSet::new();
        for group in discovery.groups() {
            for (resource, capabilities) in group.recommended_resources() {
                if !capabilities.supports_operation(verbs::LIST) || NOT_KEPT.contains(&resource.kind.as_str()) {
                    continue;
                }
                let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &resource);
                for object in api.list(&ListParams::default()).await?.items {
                    let namespace = object.namespace().unwrap_or_default();
                    let own = if capabilities.scope == Scope::Namespaced {
                        namespace
                    } else {
                        object.name_any()
                    };
                    // What the controller manager puts into every namespace goes with the namespace.
                    let given = ["kube-root-ca.crt", "default"].contains(&object.name_any().as_str());
                    if !own.starts_with("e2e-") && !given {
                        let place = object.namespace().unwrap_or_default();
                        all.insert(format!("{} {place}/{}", resource.kind, object.name_any()));
                    }
                }
            }
        }
        Ok(all)
    }
}

/// Puts every object of a kind into the truth, as long as the program runs.
fn follow<K>(client: &Client, truth: &Arc<Mutex<Truth>>, see: fn(&mut Truth, &K, Option<i64>))
where
    K: Resource<DynamicType = ()> + Clone + Debug + serde::de::DeserializeOwned + Send + 'static,
{
    let api = Api::<K>::all(client.clone());
    let truth = Arc::clone(truth);
    tokio::spawn(async move {
        let mut events = watcher(api, watcher::Config::default()).default_backoff().boxed();
        loop {
            match events.try_next().await {
                Ok(Some(watcher::Event::Apply(object) | watcher::Event::InitApply(object))) => {
                    see(&mut truth.lock(), &object, None);
                }
                Ok(Some(watcher::Event::Delete(object))) => see(&mut truth.lock(), &object, Some(now())),
                Ok(Some(_)) => {}
                Ok(None) => return,
                // The stream goes on by itself.
                Err(_) => {}
            }
        }
    });
}
