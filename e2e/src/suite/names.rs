//! Every way that pods talk: both ends of every row carry the names that the API has, and rows add up to what clients counted.

use std::{collections::BTreeMap, time::Duration};

use anyhow::Context as _;
use k8s_openapi::api::core::v1::{Pod, Service};
use kube::{Api, ResourceExt, api::ListParams};
use serde_json::{Value, json};

use super::{
    api,
    truth::now,
    workloads,
    world::{ALPHA, BETA, DELIVERY, INTERVAL, World},
};

const WEB_PORT: u16 = 7001;
const NODE_PORT: u16 = 30701;
const HOST_PORT: u16 = 7105;
const OUTSIDE_PORT: u16 = 7009;
const CONNECTIONS: u64 = 30;

/// Addresses that clients talk to.
struct Targets {
    /// Pods of `web` with their nodes.
    web: Vec<(String, Vec<String>)>,
    cluster_ips: Vec<String>,
    /// Nodes with their addresses.
    nodes: BTreeMap<String, String>,
}

/// Runs it.
///
/// # Errors
/// A name is wrong or missing, or a sum differs.
pub async fn run(world: &mut World) -> anyhow::Result<()> {
    let servers = servers();
    api::apply(&world.client, &servers).await?;
    api::wait_ready(&world.client, ALPHA, Duration::from_secs(90)).await?;
    let targets = targets(world).await?;
    let listen = format!("tcp-server --listen :: --port {OUTSIDE_PORT} --mode prefork --max-seconds 86400");
    let outside = world
        .cluster
        .outside(&world.dist, &listen.split_whitespace().collect::<Vec<_>>())?;
    // Everything of the servers is known by now to whoever watches.
    tokio::time::sleep(Duration::from_secs(3)).await;
    world.stub.read().await?;
    let (start, first) = (now(), world.stub.rows.len());
    let clients = clients(&targets, outside.as_ref().map(|outside| &outside.addresses));
    api::apply(
        &world.client,
        &clients.iter().map(|(_, manifest)| manifest.clone()).collect::<Vec<_>>(),
    )
    .await?;
    let mut reports = BTreeMap::new();
    for (name, manifest) in &clients {
        let namespace = manifest
            .pointer("/metadata/namespace")
            .and_then(Value::as_str)
            .unwrap_or_default();
        let pod = pod_of(world, namespace, name).await?;
        let text = api::wait_ended(&world.client, namespace, &pod, Duration::from_secs(120)).await?;
        reports.insert(
            name.clone(),
            workloads::report(&text).with_context(|| format!("{namespace}/{pod} wrote no report: {text}"))?,
        );
    }
    tokio::time::sleep(INTERVAL + DELIVERY).await;
    world.stub.read().await?;
    let settled = start + i64::try_from(INTERVAL.as_nanos())?;
    let rows = world.stub.rows.get(first..).unwrap_or_default();
    let tally = world.judge("netflow", INTERVAL, rows.iter().filter(|row| row.time > settled));
    tally.print();
    anyhow::ensure!(tally.ends() > 0, "no rows arrived");
    let mut wrong = Vec::new();
    for (name, report) in &reports {
        let said: (i64, i64, i64) = rows
            .iter()
            .filter(|row| row.tag("process_name") == name && row.tag("direction") == "outgoing")
            .fold((0, 0, 0), |(read, written, opened), row| {
                (
                    read + row.field("bytes_read"),
                    written + row.field("bytes_written"),
                    opened + row.field("tcp_established"),
                )
            });
        let sum = |count: fn(&testkit::traffic::report::Counts) -> u64| {
            i64::try_from(report.rows.iter().map(|row| count(&row.counts)).sum::<u64>()).unwrap_or(i64::MAX)
        };
        let counted = (
            sum(|it| it.bytes_received),
            sum(|it| it.bytes_sent),
            sum(|it| it.connections),
        );
        println!(
            "      {name:<15} read {:>9} written {:>9} connections {:>4}, counted {counted:?}",
            said.0, said.1, said.2
        );
        if said != counted || counted.2 == 0 {
            wrong.push(format!("{name}: rows say {said:?}, it counted {counted:?}"));
        }
    }
    api::delete(
        &world.client,
        &clients.into_iter().map(|(_, manifest)| manifest).collect::<Vec<_>>(),
        Some(0),
    )
    .await?;
    anyhow::ensure!(
        tally.right == tally.ends(),
        "{} of {} ends do not carry the names that the API has",
        tally.ends() - tally.right,
        tally.ends()
    );
    anyhow::ensure!(wrong.is_empty(), "rows do not add up: {}", wrong.join("; "));
    Ok(())
}

/// Servers in both nodes: behind a service with a node port, and in the nodes' own network.
pub fn servers() -> Vec<Value> {
    let server = |name: &str, port: u16| {
        workloads::traffic(
            name,
            &format!("tcp-server --listen :: --port {port} --mode prefork --workers 2"),
        )
    };
    let mut host = workloads::pod_spec(&[with_port(server("hostd", HOST_PORT), HOST_PORT)], None);
    if let Value::Object(fields) = &mut host {
        fields.insert("hostNetwork".to_owned(), json!(true));
    }
    vec![
        workloads::workload(
            "Deployment",
            ALPHA,
            "web",
            2,
            &workloads::spread(workloads::pod_spec(&[server("web", WEB_PORT)], None), "web"),
        ),
        workloads::service(
            ALPHA,
            "web",
            WEB_PORT,
            "TCP",
            &json!({ "type": "NodePort", "ports": [{ "port": WEB_PORT, "nodePort": NODE_PORT, "protocol": "TCP" }] }),
        ),
        workloads::workload("DaemonSet", ALPHA, "hostd", 1, &host),
    ]
}

fn with_port(mut container: Value, port: u16) -> Value {
    if let Value::Object(fields) = &mut container {
        fields.insert("ports".to_owned(), json!([{ "containerPort": port, "hostPort": port }]));
    }
    container
}

async fn targets(world: &World) -> anyhow::Result<Targets> {
    let pods = Api::<Pod>::namespaced(world.client.clone(), ALPHA);
    let web = pods.list(&ListParams::default().labels("app=web")).await?.items;
    let host = pods.list(&ListParams::default().labels("app=hostd")).await?.items;
    let node = |pod: &Pod| {
        pod.spec
            .as_ref()
            .and_then(|spec| spec.node_name.clone())
            .unwrap_or_default()
    };
    let ips = |pod: &Pod| -> Vec<String> {
        let all = pod.status.iter().flat_map(|status| status.pod_ips.iter().flatten());
        all.map(|ip| ip.ip.clone()).collect()
    };
    let service = Api::<Service>::namespaced(world.client.clone(), ALPHA)
        .get("web")
        .await?;
    Ok(Targets {
        web: web.iter().map(|pod| (node(pod), ips(pod))).collect(),
        cluster_ips: service.spec.and_then(|spec| spec.cluster_ips).unwrap_or_default(),
        nodes: host
            .iter()
            .filter_map(|pod| Some((node(pod), ips(pod).into_iter().next()?)))
            .collect(),
    })
}

/// Process name and manifest of every client. Each is in another kind of workload or on another way.
fn clients(targets: &Targets, outside: Option<&[String; 2]>) -> Vec<(String, Value)> {
    let client = |name: &str, destinations: &[String], port: u16| {
        let container = workloads::traffic(
            name,
            &format!(
                "tcp-client --dst {} --port {port} --connections {CONNECTIONS} --up 100-20000 --down 100-20000",
                destinations.join(",")
            ),
        );
        vec![container]
    };
    let mut all = Vec::new();
    // From each node to the pod on the other one and on the same, in a Job, over both families.
    for (number, (to, ips)) in targets.web.iter().enumerate() {
        for from in targets.nodes.keys() {
            let kind = if from == to { "near" } else { "far" };
            let name = format!("{kind}-pod-{number}");
            let spec = workloads::pod_spec(&client(&name, ips, WEB_PORT), Some(from));
            all.push((name.clone(), workloads::job(ALPHA, &name, spec)));
        }
    }
    for (number, (from, _)) in targets.nodes.iter().enumerate() {
        let name = format!("to-service-{number}");
        let spec = workloads::pod_spec(&client(&name, &targets.cluster_ips, WEB_PORT), Some(from));
        all.push((name.clone(), workloads::pod(BETA, &name, spec)));
        // The port is open on every node, whether or not it has such a pod.
        let nodes: Vec<String> = targets.nodes.values().cloned().collect();
        let name = format!("to-nodeport-{number}");
        let spec = workloads::pod_spec(&client(&name, &nodes, NODE_PORT), Some(from));
        all.push((name.clone(), workloads::pod(BETA, &name, spec)));
        let name = format!("to-hostd-{number}");
        let spec = workloads::pod_spec(&client(&name, &nodes, HOST_PORT), Some(from));
        all.push((name.clone(), workloads::pod(BETA, &name, spec)));
        let name = format!("from-host-{number}");
        let ips: Vec<String> = targets.web.iter().flat_map(|(_, ips)| ips.clone()).collect();
        let mut spec = workloads::pod_spec(&client(&name, &ips, WEB_PORT), Some(from));
        if let Value::Object(fields) = &mut spec {
            fields.insert("hostNetwork".to_owned(), json!(true));
        }
        all.push((name.clone(), workloads::pod(BETA, &name, spec)));
        if let Some(addresses) = outside {
            let name = format!("to-outside-{number}");
            let spec = workloads::pod_spec(&client(&name, addresses, OUTSIDE_PORT), Some(from));
            all.push((name.clone(), workloads::pod(BETA, &name, spec)));
        }
    }
    all
}

/// The pod of this `app`.
async fn pod_of(world: &World, namespace: &str, app: &str) -> anyhow::Result<String> {
    let pods = Api::<Pod>::namespaced(world.client.clone(), namespace);
    let labels = ListParams::default().labels(&format!("app={app}"));
    api::wait(&format!("a pod of {app}"), Duration::from_secs(30), async || {
        Ok(pods.list(&labels).await?.items.first().map(ResourceExt::name_any))
    })
    .await
}
