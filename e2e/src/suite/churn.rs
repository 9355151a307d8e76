//! Two hundred pods that come, talk and go, so that addresses are used again at once: no row has another pod's name.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use k8s_openapi::api::core::v1::{Pod, Service};
use kube::{Api, ResourceExt as _, api::ListParams};
use serde_json::Value;

use super::{
    api, names,
    truth::now,
    workloads,
    world::{ALPHA, DELIVERY, INTERVAL, World},
};

const PODS: usize = 200;
const AT_ONCE: usize = 25;

/// Runs it.
///
/// # Errors
/// A name is wrong, or more than 1 % are missing.
pub async fn run(world: &mut World) -> anyhow::Result<()> {
    api::apply(&world.client, &names::servers()).await?;
    api::wait_ready(&world.client, ALPHA, Duration::from_secs(90)).await?;
    let service = Api::<Service>::namespaced(world.client.clone(), ALPHA)
        .get("web")
        .await?;
    let addresses = service
        .spec
        .and_then(|spec| spec.cluster_ips)
        .unwrap_or_default()
        .join(",");
    anyhow::ensure!(!addresses.is_empty(), "the service web has no address");
    world.stub.read().await?;
    let (begin, first, start) = (Instant::now(), world.stub.rows.len(), now());
    let pods = Api::<Pod>::namespaced(world.client.clone(), ALPHA);
    let mut held: BTreeMap<String, usize> = BTreeMap::new();
    for batch in 0..PODS / AT_ONCE {
        let manifests: Vec<Value> = (0..AT_ONCE)
            .map(|number| {
                let name = format!("churn-{}", batch * AT_ONCE + number);
                let talk = format!(
                    "tcp-client --dst {addresses} --port 7001 --connections 20 --up 1000-2000 --down 1000-2000"
                );
                let spec = workloads::pod_spec(&[workloads::traffic(&name, &talk)], None);
                let mut pod = workloads::pod(ALPHA, &name, spec);
                if let Some(labels) = pod.pointer_mut("/metadata/labels").and_then(Value::as_object_mut) {
                    labels.insert("churn".to_owned(), Value::String("yes".to_owned()));
                }
                pod
            })
            .collect();
        api::apply(&world.client, &manifests).await?;
        api::wait("a batch to have talked", Duration::from_secs(120), async || {
            let list = pods.list(&ListParams::default().labels("churn=yes")).await?.items;
            let phase = |pod: &Pod| {
                pod.status
                    .as_ref()
                    .and_then(|status| status.phase.clone())
                    .unwrap_or_default()
            };
            anyhow::ensure!(list.iter().all(|pod| phase(pod) != "Failed"), "a pod failed");
            Ok(list.iter().all(|pod| phase(pod) == "Succeeded").then_some(()))
        })
        .await?;
        for pod in pods.list(&ListParams::default().labels("churn=yes")).await?.items {
            if let Some(ip) = pod.status.as_ref().and_then(|status| status.pod_ip.clone()) {
                *held.entry(ip).or_default() += 1;
            } else {
                anyhow::bail!("{} ended without an address", pod.name_any());
            }
        }
        api::delete(&world.client, &manifests, Some(0)).await?;
        api::wait("a batch to be gone", Duration::from_secs(60), async || {
            Ok(pods
                .list(&ListParams::default().labels("churn=yes"))
                .await?
                .items
                .is_empty()
                .then_some(()))
        })
        .await?;
    }
    let again = held.values().filter(|times| **times > 1).count();
    println!(
        "    {PODS} pods in {:.0} s with {} addresses, {again} of them used again",
        begin.elapsed().as_secs_f64(),
        held.len()
    );
    tokio::time::sleep(INTERVAL + DELIVERY).await;
    world.stub.read().await?;
    let rows = world.stub.rows.get(first..).unwrap_or_default();
    let tally = world.judge("netflow", INTERVAL, rows.iter().filter(|row| row.time > start));
    tally.print();
    let talked = (0..PODS)
        .filter(|number| {
            let name = format!("churn-{number}");
            rows.iter().any(|row| row.tag("process_name") == name)
        })
        .count();
    println!("    {talked} of {PODS} pods have rows of their own");
    anyhow::ensure!(again > 0, "no address was used again: nothing was tested");
    anyhow::ensure!(tally.wrong == 0, "{} ends have a wrong name", tally.wrong);
    let missing = tally.unnamed + tally.lesser;
    anyhow::ensure!(
        missing * 100 <= tally.ends(),
        "{missing} of {} ends are not or not wholly named",
        tally.ends()
    );
    anyhow::ensure!(talked == PODS, "{} pods have no row", PODS - talked);
    Ok(())
}
