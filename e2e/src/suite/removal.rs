//! The object deleted: everything made of it is gone within a minute; the chart uninstalled: only the definition stays.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use k8s_openapi::api::core::v1::{Node, Pod};
use kube::{
    Api,
    api::{DeleteParams, ListParams},
};

use super::{
    api, workloads,
    world::{ALPHA, COLLECTOR, PRODUCT, World},
};

const LIMIT: Duration = Duration::from_secs(60);
/// How soon the cluster itself removes what a deleted owner leaves.
const PROMPT: Duration = Duration::from_secs(10);
/// How long it may take to do so again: its parts watch again up to a minute after the API server was away.
const SETTLES: Duration = Duration::from_secs(240);

/// Runs it. `without_object` is what there was after the chart, `without_chart` before it.
///
/// # Errors
/// Something stayed, or something went that was not ours.
pub async fn run(
    world: &World,
    without_object: &BTreeSet<String>,
    without_chart: &BTreeSet<String>,
) -> anyhow::Result<()> {
    cluster_removes(world).await?;
    let start = Instant::now();
    world.objects().delete(COLLECTOR, &DeleteParams::default()).await?;
    api::wait("everything of the object to be gone", LIMIT, async || {
        // The operator stays, in a pod that may be another than it was then.
        let operator = format!("Pod {PRODUCT}/ebpf-collector-operator-");
        let now = world.everything().await?;
        let left: Vec<&str> = now
            .difference(without_object)
            .map(String::as_str)
            .filter(|one| !one.starts_with(&operator))
            .collect();
        anyhow::ensure!(left.is_empty(), "left: {}", left.join(", "));
        Ok(Some(()))
    })
    .await?;
    println!(
        "    everything of the object was gone after {:.1} s",
        start.elapsed().as_secs_f64()
    );
    world.helm(&["uninstall", "ebpf-collector", "--namespace", PRODUCT, "--wait"])?;
    let crd = "CustomResourceDefinition /ebpfcollectors.ebpfcollector.io";
    // The API server registers a definition's group itself. The namespace was made by `--create-namespace`, the Secret with
    // the token by us.
    let ours = [
        crd.to_owned(),
        "APIService /v1alpha1.ebpfcollector.io".to_owned(),
        format!("Namespace /{PRODUCT}"),
        format!("Secret {PRODUCT}/dataway"),
    ];
    api::wait("everything of the chart to be gone", LIMIT, async || {
        let now = world.everything().await?;
        let left: Vec<&String> = now
            .difference(without_chart)
            .filter(|one| !ours.contains(one))
            .collect();
        anyhow::ensure!(left.is_empty(), "left: {left:?}");
        let gone: Vec<&String> = without_chart.difference(&now).collect();
        anyhow::ensure!(gone.is_empty(), "gone though not ours: {gone:?}");
        anyhow::ensure!(
            now.contains(crd),
            "the definition is gone, and with it every object of it"
        );
        Ok(Some(()))
    })
    .await?;
    println!("    after helm uninstall the definition is left and nothing else");
    Ok(())
}

/// Waits until the garbage collector and all kubelets remove a workload of ours promptly: what they do late says nothing
/// about the product.
async fn cluster_removes(world: &World) -> anyhow::Result<()> {
    let start = Instant::now();
    let sleep = workloads::traffic(
        "probe",
        "tcp-server --listen :: --port 7299 --mode event --pattern exchange",
    );
    let spec = workloads::pod_spec(&[sleep], None);
    let probe = workloads::workload("DaemonSet", ALPHA, "probe", 0, &spec);
    let pods = Api::<Pod>::namespaced(world.client.clone(), ALPHA);
    let labels = ListParams::default().labels("app=probe");
    let nodes = Api::<Node>::all(world.client.clone());
    let nodes = nodes.list(&ListParams::default()).await?.items.len();
    loop {
        api::apply(&world.client, std::slice::from_ref(&probe)).await?;
        api::wait("the probe to run", Duration::from_secs(60), async || {
            let found = pods.list(&labels).await?.items;
            let runs = |pod: &Pod| pod.status.as_ref().and_then(|it| it.phase.as_deref()) == Some("Running");
            Ok((found.len() == nodes && found.iter().all(runs)).then_some(()))
        })
        .await?;
        let deleted = Instant::now();
        api::delete(&world.client, std::slice::from_ref(&probe), None).await?;
        api::wait("the probe to be gone", SETTLES, async || {
            Ok(pods.list(&labels).await?.items.is_empty().then_some(()))
        })
        .await?;
        if deleted.elapsed() <= PROMPT {
            println!(
                "    the cluster removes a workload in {:.1} s; waited {:.1} s for that",
                deleted.elapsed().as_secs_f64(),
                start.elapsed().as_secs_f64()
            );
            return Ok(());
        }
        anyhow::ensure!(
            start.elapsed() < SETTLES,
            "the cluster took {:?} to remove a workload",
            deleted.elapsed()
        );
    }
}
