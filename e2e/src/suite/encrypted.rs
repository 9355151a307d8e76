//! HTTP in TLS between pods of both nodes: `httpflow` rows of curl and nginx add up to what nginx wrote down, on both ends, and
//! carry the names that the API has; of a namespace whose httpflow-tls is off there are none, while the rest goes on.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use kube::{Api, ResourceExt, api::ListParams};
use serde_json::{Value, json};

use super::{
    api,
    stub::Row,
    workloads,
    world::{ALPHA, BETA, DELIVERY, INTERVAL, World},
};

/// As in the configuration of nginx, see `images`.
const PORT: u16 = 7601;
const SERVER: &str = "https-server";
/// What a client asks of each target and in each version, by one process with the words `TOGETHER` and by one for each.
const TOGETHER: [&str; 3] = ["GET /short 200", "GET /none 404", "GET /short 200"];
const EACH: [&str; 2] = ["GET /none 404", "HEAD /short 200"];
const VERSIONS: [&str; 2] = ["--http1.1", "--http2"];
/// What is asked for first, so that the libraries of a pod were seen once; not counted.
const WARM: &str = "/warm";
const FEATURE: &str = "ebpf-net/httpflow-tls";
/// How soon the status says that it is on: the operator asks once a minute, and two agents load its programs.
const ON: Duration = Duration::from_secs(120);
/// How soon a change of the object has to be in force.
const SOON: Duration = Duration::from_secs(5);

/// Method, path and status, and how often.
type Sums = BTreeMap<String, i64>;

/// Runs it.
///
/// # Errors
/// A row is missing, too many, wrong in a name or a sum, or of what is switched off.
pub async fn run(world: &mut World) -> anyhow::Result<()> {
    let plugins = json!({ "ebpf-net": { "l7": ["httpflow", "httpflow-tls"] } });
    world.patch_object(&json!({ "spec": { "plugins": plugins } })).await?;
    let container = workloads::program(SERVER, &["nginx", "-c", "/etc/nginx.conf"]);
    let servers = [
        workloads::workload("Deployment", ALPHA, SERVER, 1, &workloads::pod_spec(&[container], None)),
        workloads::service(ALPHA, SERVER, PORT, "TCP", &json!({})),
    ];
    api::apply(&world.client, &servers).await?;
    api::wait_ready(&world.client, ALPHA, Duration::from_secs(60)).await?;
    let (pod, targets) = targets(world).await?;
    let nodes = Api::<Node>::all(world.client.clone())
        .list(&ListParams::default())
        .await?;
    let nodes: Vec<String> = nodes.items.iter().map(ResourceExt::name_any).collect();
    let start = Instant::now();
    world.wait_feature(FEATURE, nodes.len(), ON).await?;
    println!(
        "    {FEATURE} is on, says the status, {:.1} s later",
        start.elapsed().as_secs_f32()
    );
    // Addresses, and the server's library, are known by now to whoever watches.
    tokio::time::sleep(SOON + INTERVAL).await;

    let mut wrong = Vec::new();
    let mut served = Sums::new();
    let first = round(world, &nodes, &targets, "on", &mut wrong).await?;
    let rows = rows(world, first);
    let tally = world.judge("httpflow", INTERVAL, rows.into_iter());
    tally.print();
    if tally.ends() == 0 || tally.right != tally.ends() {
        wrong.push(format!(
            "{} of {} ends carry the right names",
            tally.right,
            tally.ends()
        ));
    }
    check_server(world, first, &pod, &mut served, &mut wrong).await?;

    let rules = json!([{ "match": { "names": [BETA] }, "plugins": { "ebpf-net": { "l7": ["httpflow"] } } }]);
    world.patch_object(&json!({ "spec": { "namespaces": rules } })).await?;
    tokio::time::sleep(SOON + INTERVAL).await;
    let second = round(world, &nodes, &targets, "off", &mut wrong).await?;
    check_server(world, second, &pod, &mut served, &mut wrong).await?;
    let new = world.stub.rows.get(second..).unwrap_or_default();
    let netflow = new
        .iter()
        .filter(|row| {
            row.name == "netflow" && row.tag("src_k8s_namespace") == BETA && row.tag("process_name") == "curl"
        })
        .count();
    println!("    httpflow-tls of {BETA} off: its clients have {netflow} netflow rows");
    if netflow == 0 {
        wrong.push(format!("{BETA} has no netflow rows while only its httpflow-tls is off"));
    }
    world
        .patch_object(&json!({ "spec": { "plugins": Value::Null, "namespaces": Value::Null } }))
        .await?;
    api::delete(&world.client, &servers, Some(0)).await?;
    for text in wrong.iter().take(20) {
        println!("      {text}");
    }
    anyhow::ensure!(wrong.is_empty(), "{} things are wrong", wrong.len());
    Ok(())
}

/// Rows of the servers' port that came since, without what is not counted.
fn rows(world: &World, first: usize) -> Vec<&Row> {
    let port = PORT.to_string();
    let rows = world.stub.rows.get(first..).unwrap_or_default();
    let ours = |row: &&Row| {
        let server = if row.tag("direction") == "incoming" {
            "src_port"
        } else {
            "dst_port"
        };
        row.name == "httpflow" && row.tag(server) == port && row.text("path") != WARM
    };
    rows.iter().filter(ours).collect()
}

fn sums<'a>(rows: impl Iterator<Item = &'a Row>) -> Sums {
    let mut all = Sums::new();
    for row in rows {
        let kind = format!(
            "{} {} {}",
            row.text("method"),
            row.text("path"),
            row.field("status_code")
        );
        *all.entry(kind).or_default() += row.field("count");
    }
    all
}

/// Clients in both namespaces on both nodes, to pod and service. Gives the number of rows that were there before.
async fn round(
    world: &mut World,
    nodes: &[String],
    targets: &[String],
    phase: &str,
    wrong: &mut Vec<String>,
) -> anyhow::Result<usize> {
    let mut clients = Vec::new();
    for (namespace, letter) in [(ALPHA, "a"), (BETA, "b")] {
        for (number, node) in nodes.iter().enumerate() {
            let name = format!("https-{phase}-{letter}{number}");
            let container = workloads::program(&name, &["bash", "-c", &script(targets)]);
            let spec = workloads::pod_spec(&[container], Some(node));
            clients.push((namespace, name.clone(), workloads::pod(namespace, &name, spec)));
        }
    }
    world.stub.read().await?;
    let first = world.stub.rows.len();
    let manifests: Vec<Value> = clients.iter().map(|(.., manifest)| manifest.clone()).collect();
    api::apply(&world.client, &manifests).await?;
    let mut answers = Vec::new();
    for (namespace, name, _) in &clients {
        answers.push(api::wait_ended(&world.client, namespace, name, Duration::from_secs(120)).await?);
    }
    tokio::time::sleep(INTERVAL * 2 + DELIVERY).await;
    world.stub.read().await?;
    let rows = rows(world, first);
    for ((namespace, name, _), answers) in clients.iter().zip(&answers) {
        // What curl says: a line for each answer.
        let mut counted = Sums::new();
        for line in answers.lines().filter(|line| !line.is_empty()) {
            *counted.entry(without_host(line)).or_default() += 1;
        }
        let asked = (TOGETHER.len() + EACH.len()) * VERSIONS.len() * targets.len();
        if counted.values().sum::<i64>() != i64::try_from(asked)? {
            wrong.push(format!("{name}: {asked} asked for, curl says {counted:?}"));
        }
        if phase == "off" && *namespace == BETA {
            counted.clear();
        }
        let own = rows
            .iter()
            .filter(|row| row.tag("src_k8s_pod_name") == *name && row.tag("direction") == "outgoing");
        let said = sums(own.copied());
        println!(
            "      {name:<14} {:>3} exchanges, counted {:>3}",
            said.values().sum::<i64>(),
            counted.values().sum::<i64>()
        );
        if said != counted {
            wrong.push(format!("{name}: rows say {said:?}, counted {counted:?}"));
        }
    }
    api::delete(&world.client, &manifests, Some(0)).await?;
    Ok(first)
}

/// What the server's rows since `first` say against what nginx wrote down, of which `before` was checked already.
async fn check_server(
    world: &World,
    first: usize,
    pod: &str,
    before: &mut Sums,
    wrong: &mut Vec<String>,
) -> anyhow::Result<()> {
    let text = api::logs(&world.client, ALPHA, pod).await?;
    let mut written = Sums::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let [method, path, status, _, version] = words.as_slice()
            && version.starts_with("HTTP/")
            && *path != WARM
        {
            *written.entry(format!("{method} {path} {status}")).or_default() += 1;
        }
    }
    let mut counted = written.clone();
    for (kind, count) in before.iter() {
        *counted.entry(kind.clone()).or_default() -= count;
    }
    *before = written;
    let incoming = rows(world, first).into_iter();
    let said = sums(incoming.filter(|row| row.tag("direction") == "incoming"));
    println!(
        "      {SERVER:<14} {:>3} exchanges, counted {:>3}",
        said.values().sum::<i64>(),
        counted.values().sum::<i64>()
    );
    if said != counted {
        wrong.push(format!("{SERVER}: rows say {said:?}, nginx wrote down {counted:?}"));
    }
    Ok(())
}

/// `GET https://host/path 200` as `GET /path 200`.
fn without_host(line: &str) -> String {
    let Some((method, rest)) = line.split_once(" https://") else {
        return line.to_owned();
    };
    let path = rest.find('/').and_then(|at| rest.get(at..)).unwrap_or_default();
    format!("{method} {path}")
}

/// What a client's bash does. A line for each answer that counts: method, path, status.
fn script(targets: &[String]) -> String {
    let curl = "curl --silent --show-error --insecure --globoff";
    let said = "--write-out '%{method} %{url} %{http_code}\\n'";
    let mut lines = vec!["set -e".to_owned()];
    for target in targets.iter().take(1) {
        lines.push(format!("{curl} --output /dev/null https://{target}{WARM}"));
    }
    // The image has no sleep.
    lines.push("read -rt 3 _ <> <(:) || true".to_owned());
    let word = |text: &str, target: &str| -> String {
        let mut words = text.split_whitespace();
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let head = if method == "HEAD" { "--head " } else { "" };
        format!("{head}--output /dev/null https://{target}{path}")
    };
    for target in targets {
        for version in VERSIONS {
            for each in EACH {
                lines.push(format!("{curl} {version} {said} {}", word(each, target)));
            }
            let together = TOGETHER.map(|text| word(text, target));
            lines.push(format!("{curl} {version} {said} {}", together.join(" ")));
        }
    }
    lines.join("\n")
}

/// The server's pod, and addresses with port of it and of its service.
async fn targets(world: &World) -> anyhow::Result<(String, Vec<String>)> {
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
    let written = all.into_iter().map(|ip| match ip {
        IpAddr::V4(ip) => format!("{ip}:{PORT}"),
        IpAddr::V6(ip) => format!("[{ip}]:{PORT}"),
    });
    Ok((pod.name_any(), written.collect()))
}
