//! Services translate: rows show where a dialled service really goes, and name it, also on connections that were opened
//! before the plugin was switched on; switched off again, they do not.

use std::{net::IpAddr, time::Duration};

use anyhow::Context as _;
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use kube::{Api, ResourceExt, api::ListParams};
use serde_json::{Value, json};

use super::{
    api,
    stub::Row,
    truth::{NONE, now},
    workloads,
    world::{ALPHA, BETA, DELIVERY, INTERVAL, World},
};

/// Ports of the service and behind it.
const TCP: (u16, u16) = (7311, 7301);
const UDP: (u16, u16) = (7312, 7302);
const CONNECTIONS: u32 = 20;
/// How soon a change of the object has to be in force.
const SOON: Duration = Duration::from_secs(5);

/// The only pod behind the service: where everything has to go.
struct Backend {
    pod: String,
    ips: Vec<IpAddr>,
    /// Addresses of the services in front of it, of TCP and of UDP.
    tcp: Vec<IpAddr>,
    udp: Vec<IpAddr>,
}

/// Runs it.
///
/// # Errors
/// A row has no address behind the service or another one, or another name; or rows do not add up.
pub async fn run(world: &mut World) -> anyhow::Result<()> {
    let backend = backend(world).await?;
    let nodes = Api::<Node>::all(world.client.clone())
        .list(&ListParams::default())
        .await?;
    let nodes: Vec<String> = nodes.items.iter().map(ResourceExt::name_any).collect();
    let list = |ips: &[IpAddr]| ips.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    // Opened before anybody looks at translations.
    let talk = format!("--dst {} --port {} --up 300 --down 700", list(&backend.tcp), TCP.0);
    let holders: Vec<Value> = nodes
        .iter()
        .enumerate()
        .map(|(number, node)| {
            let hold = format!("tcp-hold {talk} --connections 4 --rounds 100000 --pause-ms 250 --hold");
            let name = format!("nat-hold-{number}");
            let spec = workloads::pod_spec(&[workloads::traffic(&name, &hold)], Some(node));
            workloads::pod(BETA, &name, spec)
        })
        .collect();
    api::apply(&world.client, &holders).await?;
    api::wait_ready(&world.client, BETA, Duration::from_secs(60)).await?;
    tokio::time::sleep(INTERVAL * 2).await;
    // What is listed is what runs.
    switch(world, &json!({ "ebpf-net": {}, "ebpf-conntrack": {} })).await?;
    let on = now() + nanoseconds(SOON + INTERVAL);
    tokio::time::sleep(SOON + INTERVAL).await;
    let clients: Vec<(String, Value)> = nodes
        .iter()
        .enumerate()
        .flat_map(|(number, node)| {
            let tcp = format!("tcp-client {talk} --pattern exchange --connections {CONNECTIONS}");
            let udp = format!(
                "udp-client --dst {} --port {} --datagrams 200 --size 100-900 --mode connected --pace-us 2000",
                list(&backend.udp),
                UDP.0
            );
            [(format!("nat-tcp-{number}"), tcp), (format!("nat-udp-{number}"), udp)].map(|(name, talk)| {
                let spec = workloads::pod_spec(&[workloads::traffic(&name, &talk)], Some(node));
                let manifest = workloads::pod(BETA, &name, spec);
                (name, manifest)
            })
        })
        .collect();
    let manifests: Vec<Value> = clients.iter().map(|(_, manifest)| manifest.clone()).collect();
    api::apply(&world.client, &manifests).await?;
    let mut wrong = Vec::new();
    let mut counted = Vec::new();
    for (name, _) in &clients {
        let text = api::wait_ended(&world.client, BETA, name, Duration::from_secs(120)).await?;
        let report = workloads::report(&text).with_context(|| format!("{name} wrote no report: {text}"))?;
        let sent: u64 = report.rows.iter().map(|row| row.counts.bytes_sent).sum();
        counted.push((name.clone(), i64::try_from(sent)?));
    }
    tokio::time::sleep(INTERVAL + DELIVERY).await;
    world.stub.read().await?;
    for (name, sent) in &counted {
        let rows: Vec<&Row> = of(world, name, 0).collect();
        let written: i64 = rows.iter().map(|row| row.field("bytes_written")).sum();
        println!(
            "      {name:<12} {:>3} rows, written {written}, counted {sent}",
            rows.len()
        );
        if written != *sent || *sent == 0 {
            wrong.push(format!("{name}: rows say {written} bytes, it sent {sent}"));
        }
        wrong.extend(rows.iter().filter_map(|row| backend.misses(row)));
    }
    for number in 0..nodes.len() {
        let name = format!("nat-hold-{number}");
        let rows: Vec<&Row> = of(world, &name, on).collect();
        println!(
            "      {name:<12} {:>3} rows, opened before the plugin was on",
            rows.len()
        );
        if rows.is_empty() {
            wrong.push(format!("{name}: no rows"));
        }
        wrong.extend(rows.iter().filter_map(|row| backend.misses(row)));
    }
    switch(world, &Value::Null).await?;
    let off = now() + nanoseconds(SOON + INTERVAL);
    tokio::time::sleep(SOON + INTERVAL * 3 + DELIVERY).await;
    world.stub.read().await?;
    let after: Vec<&Row> = of(world, "nat-hold-0", off).collect();
    let translated = after.iter().filter(|row| row.tag("dst_nat_ip") != NONE).count();
    println!(
        "    switched off: {} rows, {translated} of them translated",
        after.len()
    );
    if after.is_empty() || translated > 0 {
        wrong.push(format!(
            "switched off: {translated} of {} rows are translated",
            after.len()
        ));
    }
    let all: Vec<Value> = holders.into_iter().chain(manifests).collect();
    api::delete(&world.client, &all, Some(0)).await?;
    for text in wrong.iter().take(20) {
        println!("      {text}");
    }
    anyhow::ensure!(wrong.is_empty(), "{} rows or sums are wrong", wrong.len());
    Ok(())
}

impl Backend {
    /// What is wrong with a row of a client, if anything is.
    fn misses(&self, row: &Row) -> Option<String> {
        let dialled = row.address("dst");
        let behind: Option<IpAddr> = row.tag("dst_nat_ip").parse().ok();
        let (service, services, port) = match row.tag("transport") {
            "udp" => ("backend-udp", &self.udp, UDP),
            _ => ("backend-tcp", &self.tcp, TCP),
        };
        let same_family = self
            .ips
            .iter()
            .find(|ip| dialled.is_some_and(|dialled| dialled.is_ipv4() == ip.is_ipv4()));
        let right = dialled.is_some_and(|ip| services.contains(&ip))
            && row.tag("dst_port") == port.0.to_string()
            && behind.as_ref() == same_family
            && row.tag("dst_nat_port") == port.1.to_string()
            && row.tag("dst_k8s_namespace") == ALPHA
            && row.tag("dst_k8s_pod_name") == self.pod
            && row.tag("dst_k8s_service_name") == service
            && row.tag("dst_k8s_deployment_name") == "backend";
        (!right).then(|| {
            format!(
                "{} {}:{} is translated to {}:{}, which is {}/{} of service {} and {}; wanted {}/{} of {service} at {:?}",
                row.tag("process_name"),
                row.tag("dst_ip"),
                row.tag("dst_port"),
                row.tag("dst_nat_ip"),
                row.tag("dst_nat_port"),
                row.tag("dst_k8s_namespace"),
                row.tag("dst_k8s_pod_name"),
                row.tag("dst_k8s_service_name"),
                row.tag("dst_k8s_deployment_name"),
                ALPHA,
                self.pod,
                same_family
            )
        })
    }
}

/// What a client reported from its own end, in intervals that ended after `from`.
fn of<'a>(world: &'a World, process: &'a str, from: i64) -> impl Iterator<Item = &'a Row> {
    world.stub.rows.iter().filter(move |row| {
        row.name == "netflow"
            && row.tag("process_name") == process
            && row.tag("direction") == "outgoing"
            && row.time > from
    })
}

/// Says which plugins run.
async fn switch(world: &World, plugins: &Value) -> anyhow::Result<()> {
    world.patch_object(&json!({ "spec": { "plugins": plugins } })).await
}

async fn backend(world: &World) -> anyhow::Result<Backend> {
    let listen = format!(
        "tcp-server --listen :: --port {} --mode event --pattern exchange --up 300 --down 700",
        TCP.1
    );
    let containers = [
        workloads::traffic("backend-tcp", &listen),
        workloads::traffic("backend-udp", &format!("udp-server --listen :: --port {}", UDP.1)),
    ];
    let spec = workloads::pod_spec(&containers, None);
    let mut manifests = vec![workloads::workload("Deployment", ALPHA, "backend", 1, &spec)];
    for (name, ports, protocol) in [("backend-tcp", TCP, "TCP"), ("backend-udp", UDP, "UDP")] {
        let extra = json!({
            "selector": { "app": "backend" },
            "ports": [{ "port": ports.0, "targetPort": ports.1, "protocol": protocol }],
        });
        manifests.push(workloads::service(ALPHA, name, ports.0, protocol, &extra));
    }
    api::apply(&world.client, &manifests).await?;
    api::wait_ready(&world.client, ALPHA, Duration::from_secs(90)).await?;
    let pods = Api::<Pod>::namespaced(world.client.clone(), ALPHA)
        .list(&ListParams::default().labels("app=backend"))
        .await?;
    let pod = pods.items.first().context("the backend has no pod")?;
    let ips = pod.status.iter().flat_map(|status| status.pod_ips.iter().flatten());
    let services = Api::<Service>::namespaced(world.client.clone(), ALPHA);
    let addresses = async |name: &str| -> anyhow::Result<Vec<IpAddr>> {
        let ips = services.get(name).await?.spec.and_then(|spec| spec.cluster_ips);
        Ok(ips
            .unwrap_or_default()
            .iter()
            .filter_map(|ip| ip.parse().ok())
            .collect())
    };
    // Rules follow endpoints after a moment.
    tokio::time::sleep(Duration::from_secs(3)).await;
    Ok(Backend {
        pod: pod.name_any(),
        ips: ips.filter_map(|ip| ip.ip.parse().ok()).collect(),
        tcp: addresses("backend-tcp").await?,
        udp: addresses("backend-udp").await?,
    })
}

fn nanoseconds(time: Duration) -> i64 {
    i64::try_from(time.as_nanos()).unwrap_or(i64::MAX)
}
