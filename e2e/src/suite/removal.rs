//! The object deleted: everything made of it is gone within a minute; the chart uninstalled: only the definition stays.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use kube::api::DeleteParams;

use super::{
    api,
    world::{COLLECTOR, PRODUCT, World},
};

const LIMIT: Duration = Duration::from_secs(60);

/// Runs it. `without_object` is what there was after the chart, `without_chart` before it.
///
/// # Errors
/// Something stayed, or something went that was not ours.
pub async fn run(
    world: &World,
    without_object: &BTreeSet<String>,
    without_chart: &BTreeSet<String>,
) -> anyhow::Result<()> {
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
    // The namespace was made by `--create-namespace`, the Secret with the token by us.
    let ours = [
        crd.to_owned(),
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
