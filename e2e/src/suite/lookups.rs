//! DNS between pods and the cluster's name server: `dnsflow` rows add up to what clients counted, on both ends, over UDP and
//! TCP, and carry the names that the API has; questions that nobody answers are told; of a namespace that is off there are none.

use std::{collections::BTreeMap, time::Duration};

use anyhow::Context as _;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::{Api, ResourceExt, api::ListParams};
use serde_json::{Value, json};
use testkit::traffic::report::Report;

use super::{
    api,
    stub::Row,
    workloads,
    world::{ALPHA, BETA, DELIVERY, INTERVAL, World},
};

/// The name server's service.
const SERVER: (&str, &str) = ("kube-system", "kube-dns");
const QUESTIONS: &str = "kubernetes.default.svc.cluster.local,nothing.e2e-alpha.svc.cluster.local";
const ROUNDS: u32 = 10;
/// A pod that takes questions and answers none.
const SILENT: &str = "silent";
/// How long an answer may take before a question counts as not answered, with what may pass until that is noticed.
const TIMEOUT: Duration = Duration::from_secs(20);
/// How soon a change of the object has to be in force.
const SOON: Duration = Duration::from_secs(5);

/// Runs it.
///
/// # Errors
/// A row is missing, too many, wrong in a name or a sum, or of what is switched off.
pub async fn run(world: &mut World) -> anyhow::Result<()> {
    let listen = "udp-server --listen :: --port 53";
    let silent = workloads::pod(
        ALPHA,
        SILENT,
        workloads::pod_spec(&[workloads::traffic(SILENT, listen)], None),
    );
    api::apply(&world.client, std::slice::from_ref(&silent)).await?;
    api::wait_ready(&world.client, ALPHA, Duration::from_secs(60)).await?;
    let deaf = Api::<Pod>::namespaced(world.client.clone(), ALPHA).get(SILENT).await?;
    let deaf = deaf
        .status
        .and_then(|status| status.pod_ip)
        .context("silent has no address")?;
    let server = world.kubectl(&[
        "get",
        "service",
        "-n",
        SERVER.0,
        SERVER.1,
        "-o",
        "jsonpath={.spec.clusterIP}",
    ])?;
    let rules = json!([{ "match": { "names": [BETA] }, "plugins": { "ebpf-net": { "enabled": false } } }]);
    world.patch_object(&json!({ "spec": { "namespaces": rules } })).await?;
    tokio::time::sleep(SOON + INTERVAL).await;
    let nodes = Api::<Node>::all(world.client.clone())
        .list(&ListParams::default())
        .await?;
    let ask = format!("dns-client --server {server} --question {QUESTIONS} --rounds {ROUNDS} --pause-ms 20");
    let mut clients = Vec::new();
    for (number, node) in nodes.items.iter().map(ResourceExt::name_any).enumerate() {
        let deaf = format!("dns-client --server {deaf} --question a.example --rounds 3 --patience-ms 300");
        for (namespace, name, talk) in [
            (ALPHA, format!("dns-udp-{number}"), ask.clone()),
            (ALPHA, format!("dns-tcp-{number}"), format!("{ask} --tcp")),
            (ALPHA, format!("dns-deaf-{number}"), deaf),
            (BETA, format!("dns-off-{number}"), ask.clone()),
        ] {
            let spec = workloads::pod_spec(&[workloads::traffic(&name, &talk)], Some(&node));
            clients.push((namespace, name.clone(), workloads::pod(namespace, &name, spec)));
        }
    }
    world.stub.read().await?;
    let first = world.stub.rows.len();
    let manifests: Vec<Value> = clients.iter().map(|(.., manifest)| manifest.clone()).collect();
    api::apply(&world.client, &manifests).await?;
    let mut reports = Vec::new();
    for (namespace, name, _) in &clients {
        let text = api::wait_ended(&world.client, namespace, name, Duration::from_secs(120)).await?;
        let report = workloads::report(&text).with_context(|| format!("{name} wrote no report: {text}"))?;
        anyhow::ensure!(report.errors.is_empty(), "{name} failed: {:?}", report.errors);
        reports.push((*namespace, name, report));
    }
    tokio::time::sleep(TIMEOUT + INTERVAL + DELIVERY).await;
    world.stub.read().await?;
    let rows = world.stub.rows.get(first..).unwrap_or_default();
    let rows: Vec<&Row> = rows.iter().filter(|row| row.name == "dnsflow").collect();
    let mut wrong = Vec::new();
    let mut ours: Vec<&Row> = Vec::new();
    for (namespace, name, report) in &reports {
        let expected = if *namespace == BETA {
            BTreeMap::new()
        } else {
            counted(report)
        };
        let end = |side: &'static str, direction: &'static str| {
            let (rows, namespace) = (rows.iter(), *namespace);
            rows.filter(move |row| {
                row.tag("direction") == direction
                    && row.tag(&format!("{side}_k8s_namespace")) == namespace
                    && row.tag(&format!("{side}_k8s_pod_name")) == name.as_str()
            })
            .copied()
            .collect::<Vec<_>>()
        };
        let (asked, answered) = (end("src", "outgoing"), end("dst", "incoming"));
        println!(
            "      {name:<12} {:>3} rows, by code {:?}; {:>3} rows of the server, {:?}; counted {expected:?}",
            asked.len(),
            said(&asked),
            answered.len(),
            said(&answered)
        );
        if said(&asked) != expected {
            wrong.push(format!("{name}: rows say {:?}, it counted {expected:?}", said(&asked)));
        }
        // The server's end is its own namespace's.
        let served = counted(report);
        if said(&answered) != served {
            wrong.push(format!(
                "server of {name}: rows say {:?}, the client counted {served:?}",
                said(&answered)
            ));
        }
        let slowest = report
            .exchanges
            .iter()
            .map(|it| it.counts.slowest_ns)
            .max()
            .unwrap_or(0);
        for row in &asked {
            let (mean, longest) = (row.field("latency"), row.field("latency_max"));
            let right = match row.field("rcode") {
                -1 => (mean, longest) == (0, 0),
                _ => 0 < mean && mean <= longest && u64::try_from(longest).is_ok_and(|longest| longest <= slowest),
            };
            if !right {
                wrong.push(format!("{name}: slowest answer after {slowest} ns, row {row:?}"));
            }
        }
        ours.extend(asked);
        ours.extend(answered);
    }
    // What nobody answered is told later, of pods that may be gone by then.
    let tally = world.judge("dnsflow", INTERVAL + TIMEOUT, ours.into_iter());
    tally.print();
    if tally.ends() == 0 || tally.right != tally.ends() {
        wrong.push(format!(
            "{} of {} ends carry the right names",
            tally.right,
            tally.ends()
        ));
    }
    world
        .patch_object(&json!({ "spec": { "namespaces": Value::Null } }))
        .await?;
    let all: Vec<Value> = manifests.into_iter().chain([silent]).collect();
    api::delete(&world.client, &all, Some(0)).await?;
    for text in wrong.iter().take(20) {
        println!("      {text}");
    }
    anyhow::ensure!(wrong.is_empty(), "{} things are wrong", wrong.len());
    Ok(())
}

/// Questions by response code, as a client counted them.
fn counted(report: &Report) -> BTreeMap<i64, i64> {
    let mut all = BTreeMap::new();
    for row in &report.exchanges {
        *all.entry(i64::from(row.status)).or_default() += i64::try_from(row.counts.count).unwrap_or(i64::MAX);
    }
    all
}

/// The same as rows say.
fn said(rows: &[&Row]) -> BTreeMap<i64, i64> {
    let mut all = BTreeMap::new();
    for row in rows {
        *all.entry(row.field("rcode")).or_default() += row.field("count");
    }
    all
}
