//! HTTP requests between pods of both nodes: `httpflow` rows add up to what clients counted, on both ends, and carry the names
//! that the API has; of a namespace whose httpflow is off there are none, while its `netflow` goes on.

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use anyhow::Context as _;
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use kube::{Api, ResourceExt, api::ListParams};
use serde_json::{Value, json};
use testkit::traffic::report::Report;

use super::{
    api,
    stub::{Field, Row},
    workloads,
    world::{ALPHA, BETA, DELIVERY, INTERVAL, World},
};

const PORT: u16 = 7501;
const SERVER: &str = "http-server";
/// What clients ask for, in turn.
const REQUESTS: &str = "GET:/s/200/512,GET:/s/404/64,POST:/s/201/0:300,HEAD:/s/200/100,GET:/s/500/20000";
/// Requests of each client on each of its connections.
const ROUNDS: u32 = 50;
/// How soon a change of the object has to be in force.
const SOON: Duration = Duration::from_secs(5);

/// Method, path and status.
type Kind = (String, String, i64);
/// Exchanges, bytes to the server, bytes to the client.
type Sum = (i64, i64, i64);

/// Runs it.
///
/// # Errors
/// A row is missing, too many, wrong in a name or a sum, or of what is switched off.
pub async fn run(world: &mut World) -> anyhow::Result<()> {
    let spec = workloads::pod_spec(
        &[workloads::traffic(
            SERVER,
            &format!("http-server --listen :: --port {PORT}"),
        )],
        None,
    );
    let servers = [
        workloads::workload("Deployment", ALPHA, SERVER, 1, &spec),
        workloads::service(ALPHA, SERVER, PORT, "TCP", &json!({})),
    ];
    api::apply(&world.client, &servers).await?;
    api::wait_ready(&world.client, ALPHA, Duration::from_secs(60)).await?;
    let targets = targets(world).await?;
    let nodes = Api::<Node>::all(world.client.clone())
        .list(&ListParams::default())
        .await?;
    let nodes: Vec<String> = nodes.items.iter().map(ResourceExt::name_any).collect();
    // Addresses are known by now to whoever watches.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let mut wrong = Vec::new();

    let first = round(world, &nodes, &targets, "on", &mut wrong).await?;
    let tally = world.judge("httpflow", INTERVAL, first.rows(world).into_iter());
    tally.print();
    if tally.ends() == 0 || tally.right != tally.ends() {
        wrong.push(format!(
            "{} of {} ends carry the right names",
            tally.right,
            tally.ends()
        ));
    }

    let rules = json!([{ "match": { "names": [BETA] }, "plugins": { "ebpf-net": { "l7": [] } } }]);
    world.patch_object(&json!({ "spec": { "namespaces": rules } })).await?;
    tokio::time::sleep(SOON + INTERVAL).await;
    let second = round(world, &nodes, &targets, "off", &mut wrong).await?;
    let netflow = second
        .of(world, "netflow")
        .iter()
        .filter(|row| row.tag("src_k8s_namespace") == BETA)
        .count();
    println!("    httpflow of {BETA} off: its clients have {netflow} netflow rows");
    if netflow == 0 {
        wrong.push(format!("{BETA} has no netflow rows while only its httpflow is off"));
    }
    world
        .patch_object(&json!({ "spec": { "namespaces": Value::Null } }))
        .await?;
    api::delete(&world.client, &servers, Some(0)).await?;
    for text in wrong.iter().take(20) {
        println!("      {text}");
    }
    anyhow::ensure!(wrong.is_empty(), "{} things are wrong", wrong.len());
    Ok(())
}

/// What one round of clients left.
struct Round {
    /// Rows at the stub before it.
    first: usize,
    clients: Vec<String>,
}

impl Round {
    fn of<'a>(&self, world: &'a World, measurement: &str) -> Vec<&'a Row> {
        let rows = world.stub.rows.get(self.first..).unwrap_or_default();
        let ours = |row: &&Row| {
            row.name == measurement
                && (row.tag("process_name") == SERVER || self.clients.iter().any(|it| it == row.tag("process_name")))
        };
        rows.iter().filter(ours).collect()
    }

    fn rows<'a>(&self, world: &'a World) -> Vec<&'a Row> {
        self.of(world, "httpflow")
    }
}

/// Clients in both namespaces on both nodes, to pod and service; sums of rows against their own.
async fn round(
    world: &mut World,
    nodes: &[String],
    targets: &[IpAddr],
    phase: &str,
    wrong: &mut Vec<String>,
) -> anyhow::Result<Round> {
    let list: Vec<String> = targets.iter().map(ToString::to_string).collect();
    let talk = format!(
        "http-client --dst {} --port {PORT} --connections {} --requests {ROUNDS} --pause-ms 20 --request {REQUESTS}",
        list.join(","),
        targets.len()
    );
    let mut clients = Vec::new();
    for (namespace, letter) in [(ALPHA, "a"), (BETA, "b")] {
        for (number, node) in nodes.iter().enumerate() {
            let name = format!("http-{phase}-{letter}{number}");
            let spec = workloads::pod_spec(&[workloads::traffic(&name, &talk)], Some(node));
            clients.push((namespace, name.clone(), workloads::pod(namespace, &name, spec)));
        }
    }
    world.stub.read().await?;
    let round = Round {
        first: world.stub.rows.len(),
        clients: clients.iter().map(|(_, name, _)| name.clone()).collect(),
    };
    let manifests: Vec<Value> = clients.iter().map(|(.., manifest)| manifest.clone()).collect();
    api::apply(&world.client, &manifests).await?;
    let mut reports = Vec::new();
    for (namespace, name, _) in &clients {
        let text = api::wait_ended(&world.client, namespace, name, Duration::from_secs(120)).await?;
        let report = workloads::report(&text).with_context(|| format!("{name} wrote no report: {text}"))?;
        anyhow::ensure!(report.errors.is_empty(), "{name} failed: {:?}", report.errors);
        reports.push((*namespace, name, report));
    }
    tokio::time::sleep(INTERVAL * 2 + DELIVERY).await;
    world.stub.read().await?;
    let rows = round.rows(world);
    let mut all: BTreeMap<Kind, Sum> = BTreeMap::new();
    for (namespace, name, report) in &reports {
        let counted = counted(report);
        for (kind, sum) in &counted {
            add(&mut all, kind, *sum);
        }
        let expected = if phase == "off" && *namespace == BETA {
            BTreeMap::new()
        } else {
            counted
        };
        let own = rows
            .iter()
            .filter(|row| row.tag("process_name") == *name && row.tag("direction") == "outgoing");
        let own: Vec<&Row> = own.copied().collect();
        let said = said(&own, false);
        println!(
            "      {name:<12} {:>3} rows, {:>4} exchanges, counted {:>4}",
            own.len(),
            said.values().map(|sum| sum.0).sum::<i64>(),
            expected.values().map(|sum| sum.0).sum::<i64>()
        );
        compare(name, &said, &expected, wrong);
        wrong.extend(own.iter().filter_map(|row| latency(row, report)));
    }
    let served: Vec<&Row> = rows
        .iter()
        .filter(|row| row.tag("process_name") == SERVER && row.tag("direction") == "incoming")
        .copied()
        .collect();
    println!(
        "      {SERVER:<12} {:>3} rows, {:>4} exchanges, counted {:>4}",
        served.len(),
        served.iter().map(|row| row.field("count")).sum::<i64>(),
        all.values().map(|sum| sum.0).sum::<i64>()
    );
    compare(SERVER, &said(&served, true), &all, wrong);
    api::delete(&world.client, &manifests, Some(0)).await?;
    Ok(round)
}

/// What a client says that it did.
fn counted(report: &Report) -> BTreeMap<Kind, Sum> {
    let mut all = BTreeMap::new();
    let number = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
    for row in &report.exchanges {
        let kind = (row.method.clone(), row.path.clone(), i64::from(row.status));
        let sum = (
            number(row.counts.count),
            number(row.counts.bytes_sent),
            number(row.counts.bytes_received),
        );
        add(&mut all, &kind, sum);
    }
    all
}

/// What rows say; those of the server the other way round.
fn said(rows: &[&Row], serves: bool) -> BTreeMap<Kind, Sum> {
    let mut all = BTreeMap::new();
    for row in rows {
        let kind = (
            row.text("method").to_owned(),
            row.text("path").to_owned(),
            row.field("status_code"),
        );
        let (read, written) = (row.field("bytes_read"), row.field("bytes_written"));
        let (up, down) = if serves { (read, written) } else { (written, read) };
        add(&mut all, &kind, (row.field("count"), up, down));
    }
    all
}

fn add(all: &mut BTreeMap<Kind, Sum>, kind: &Kind, sum: Sum) {
    let known = all.entry(kind.clone()).or_default();
    *known = (known.0 + sum.0, known.1 + sum.1, known.2 + sum.2);
}

fn compare(name: &str, said: &BTreeMap<Kind, Sum>, counted: &BTreeMap<Kind, Sum>, wrong: &mut Vec<String>) {
    for kind in said
        .keys()
        .chain(counted.keys().filter(|kind| !said.contains_key(*kind)))
    {
        let (said, counted) = (said.get(kind), counted.get(kind));
        if said != counted {
            wrong.push(format!(
                "{name}: {kind:?}: rows say {said:?}, clients counted {counted:?}"
            ));
        }
    }
}

/// What is wrong with the rest of a client's row: its latency is within what the client measured, nothing is cut.
fn latency(row: &Row, report: &Report) -> Option<String> {
    let slowest = report
        .exchanges
        .iter()
        .map(|it| it.counts.slowest_ns)
        .max()
        .unwrap_or(0);
    let latency = row.field("latency");
    let right = latency > 0
        && u64::try_from(latency).is_ok_and(|latency| latency <= slowest)
        && row.text("http_version") == "1.1"
        && matches!(row.fields.get("truncated"), Some(Field::Flag(false)));
    (!right).then(|| format!("{}: slowest exchange {slowest} ns, row {row:?}", report.name))
}

/// Addresses of the server's pod and of its service.
async fn targets(world: &World) -> anyhow::Result<Vec<IpAddr>> {
    let pods = Api::<Pod>::namespaced(world.client.clone(), ALPHA)
        .list(&ListParams::default().labels(&format!("app={SERVER}")))
        .await?;
    let pod = pods.items.first().context("the server has no pod")?;
    let ips = pod.status.iter().flat_map(|status| status.pod_ips.iter().flatten());
    let mut all: Vec<IpAddr> = ips.filter_map(|ip| ip.ip.parse().ok()).collect();
    let service = Api::<Service>::namespaced(world.client.clone(), ALPHA)
        .get(SERVER)
        .await?;
    let ips = service.spec.and_then(|spec| spec.cluster_ips).unwrap_or_default();
    all.extend(ips.iter().filter_map(|ip| ip.parse::<IpAddr>().ok()));
    Ok(all)
}
