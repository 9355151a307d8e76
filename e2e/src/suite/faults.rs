//! The product's parts and the API server taken away in turn, while pods talk: what was accepted arrives once, and the status
//! tells the truth.

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, ResourceExt as _,
    api::{DeleteParams, ListParams},
};
use serde_json::Value;

use super::{
    api, toggle, workloads,
    world::{BETA, DELIVERY, INTERVAL, PRODUCT, World},
};

/// Between two exchanges on a connection of a client.
const PAUSE: Duration = Duration::from_millis(200);
/// Rows that are there twice and shown.
const SHOWN: usize = 5;
/// How long a part may take to be back.
const BACK: Duration = Duration::from_secs(60);

/// What has to be true of the rows of clients that talked meanwhile.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sum {
    /// They are what the clients counted.
    Exact,
    /// They are no more: an agent that is replaced does not see what happens between.
    AtMost,
}

/// Runs it. The API server is taken away for `outage`.
///
/// # Errors
/// Records were lost or came twice, or the status did not tell.
pub async fn run(world: &mut World, outage: Duration) -> anyhow::Result<()> {
    toggle::talkers(world).await?;
    let mut problems = Vec::new();
    for (number, (component, sum)) in [
        ("operator", Sum::Exact),
        ("aggregator", Sum::Exact),
        ("node-agent", Sum::AtMost),
    ]
    .into_iter()
    .enumerate()
    {
        println!("    {component} pods deleted, one after the other");
        if let Err(error) = replace(world, number, component, sum).await {
            println!("      FAILED: {error:#}");
            problems.push(format!("{component}: {error:#}"));
        }
    }
    println!("    API server away for {} s", outage.as_secs());
    if let Err(error) = without_api(world, outage).await {
        println!("      FAILED: {error:#}");
        problems.push(format!("API server: {error:#}"));
    }
    world.stub.read().await?;
    let mut seen = HashMap::new();
    let mut twice = 0;
    for row in &world.stub.rows {
        if let Some(fields) = seen.insert((row.time, &row.tags), &row.fields) {
            twice += 1;
            if twice <= SHOWN {
                println!(
                    "    twice: {} {:?}: {fields:?} and {:?}",
                    row.time, row.tags, row.fields
                );
            }
        }
    }
    let summary = world.stub.summary().await?;
    println!(
        "    {} rows, {twice} of them twice; {} were sent again and recognised; {} requests broke a rule",
        world.stub.rows.len(),
        summary.duplicate_points,
        summary.violations_total
    );
    anyhow::ensure!(problems.is_empty(), "{}", problems.join("; "));
    anyhow::ensure!(twice == 0, "{twice} rows are there twice");
    anyhow::ensure!(
        summary.violations_total == 0,
        "requests broke rules: {:?}",
        summary.violations
    );
    Ok(())
}

async fn replace(world: &mut World, number: usize, component: &str, sum: Sum) -> anyhow::Result<()> {
    let clients = start_clients(world, &format!("during-{number}"), Duration::from_secs(25)).await?;
    tokio::time::sleep(INTERVAL * 2).await;
    let pods = Api::<Pod>::namespaced(world.client.clone(), PRODUCT);
    for pod in world.pods(component).await? {
        let name = pod.name_any();
        pods.delete(&name, &DeleteParams::default())
            .await
            .with_context(|| format!("delete {name}"))?;
        watch_status(world, component, pod.uid().as_deref().unwrap_or_default()).await?;
    }
    sums(world, &clients, sum).await
}

/// Prints what the status says until the part is back, and then until all is ready. `old` is the uid of the pod that went:
/// that of a stateful set comes back under its name.
async fn watch_status(world: &World, component: &str, old: &str) -> anyhow::Result<()> {
    let (start, mut last, mut not_ready) = (Instant::now(), String::new(), false);
    loop {
        let (status, reason, message) = world.condition("Ready").await?;
        let text = format!("Ready {status} {reason}: {message}");
        if text != last {
            println!("      {:>5.1} s {text}", start.elapsed().as_secs_f64());
            last = text;
        }
        not_ready |= status != "True";
        let pods = world.pods(component).await?;
        let ready = |pod: &Pod| {
            let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
            conditions
                .filter(|it| it.type_ == "Ready")
                .any(|it| it.status == "True")
        };
        let back = !pods.is_empty() && pods.iter().all(|pod| ready(pod) && pod.uid().as_deref() != Some(old));
        if back && status == "True" && start.elapsed() > Duration::from_secs(3) {
            break;
        }
        anyhow::ensure!(
            start.elapsed() < BACK,
            "{component} was not ready again within {BACK:?}: {last}"
        );
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    // Nobody writes a status while the operator itself is away.
    anyhow::ensure!(
        component == "operator" || not_ready,
        "the status said Ready all the time"
    );
    Ok(())
}

async fn without_api(world: &mut World, outage: Duration) -> anyhow::Result<()> {
    let clients = start_clients(world, "during-api", outage + Duration::from_secs(10)).await?;
    tokio::time::sleep(INTERVAL * 2).await;
    if !world.cluster.set_api_server(false)? {
        println!("      this cluster's API server cannot be stopped from here: not tested");
        return Ok(());
    }
    tokio::time::sleep(outage).await;
    world.cluster.set_api_server(true)?;
    let start = Instant::now();
    world.wait_condition("Ready", "True", BACK).await?;
    println!("      Ready {:.1} s after its return", start.elapsed().as_secs_f64());
    world.wait_condition("FlowsArriving", "True", BACK).await?;
    world.print_status("after the outage").await;
    sums(world, &clients, Sum::Exact).await
}

/// Clients in both nodes that talk for this long over held connections; names of pods, which are those of processes.
async fn start_clients(world: &World, prefix: &str, time: Duration) -> anyhow::Result<Vec<String>> {
    let pods = Api::<Pod>::all(world.client.clone())
        .list(&ListParams::default().labels("app=event-b"))
        .await?;
    let status = pods.items.into_iter().next().and_then(|pod| pod.status);
    let ip = status
        .and_then(|status| status.pod_ip)
        .context("event-b has no address")?;
    let rounds = time.as_millis() / PAUSE.as_millis();
    let talk = format!(
        "tcp-hold --dst {ip} --port 7201 --connections 3 --rounds {rounds} --pause-ms {} --up 500 --down 900",
        PAUSE.as_millis()
    );
    let mut names = Vec::new();
    let nodes: HashSet<String> = world
        .pods("node-agent")
        .await?
        .iter()
        .filter_map(|pod| pod.spec.clone()?.node_name)
        .collect();
    for (number, node) in nodes.iter().enumerate() {
        let name = format!("{prefix}-{number}");
        let spec = workloads::pod_spec(&[workloads::traffic(&name, &talk)], Some(node));
        api::apply(&world.client, &[workloads::pod(BETA, &name, spec)]).await?;
        names.push(name);
    }
    for name in &names {
        let pods = Api::<Pod>::namespaced(world.client.clone(), BETA);
        api::wait(&format!("{name} to run"), Duration::from_secs(30), async || {
            let phase = pods.get(name).await?.status.and_then(|status| status.phase);
            Ok((phase.as_deref() == Some("Running")).then_some(()))
        })
        .await?;
    }
    Ok(names)
}

/// Compares rows with what clients counted.
async fn sums(world: &mut World, clients: &[String], sum: Sum) -> anyhow::Result<()> {
    let mut counted = Vec::new();
    for name in clients {
        let text = api::wait_ended(&world.client, BETA, name, Duration::from_secs(300)).await?;
        let report = workloads::report(&text).with_context(|| format!("{name} wrote no report"))?;
        let bytes = |count: fn(&testkit::traffic::report::Counts) -> u64| -> u64 {
            report.rows.iter().map(|row| count(&row.counts)).sum()
        };
        counted.push((name, bytes(|it| it.bytes_received), bytes(|it| it.bytes_sent)));
    }
    tokio::time::sleep(INTERVAL + DELIVERY).await;
    world.stub.read().await?;
    let mut wrong = Vec::new();
    for (name, read, written) in counted {
        let rows = || world.stub.rows.iter().filter(|row| row.tag("process_name") == name);
        let said = |field: &str| u64::try_from(rows().map(|row| row.field(field)).sum::<i64>()).unwrap_or_default();
        let (said_read, said_written) = (said("bytes_read"), said("bytes_written"));
        println!("      {name}: read {said_read} of {read}, written {said_written} of {written}");
        let good = match sum {
            Sum::Exact => (said_read, said_written) == (read, written),
            Sum::AtMost => said_read <= read && said_written <= written && said_read > 0,
        };
        if !good {
            wrong.push(name.clone());
        }
    }
    let pods: Vec<Value> = clients
        .iter()
        .map(|name| workloads::pod(BETA, name, Value::Null))
        .collect();
    api::delete(&world.client, &pods, Some(0)).await?;
    anyhow::ensure!(
        wrong.is_empty(),
        "rows of {} are not what was counted",
        wrong.join(", ")
    );
    Ok(())
}
