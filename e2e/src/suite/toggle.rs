//! A namespace switched off and on again: its rows stop and come back within 5 s, others go on, and no pod is touched.

use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Pod;
use kube::{Api, api::ListParams};
use serde_json::{Value, json};

use super::{
    api,
    truth::now,
    workloads,
    world::{ALPHA, BETA, DELIVERY, INTERVAL, World},
};

const PORT: u16 = 7201;
/// How soon a change has to be in force.
const SOON: Duration = Duration::from_secs(5);
const WATCHED: Duration = Duration::from_secs(12);

/// Steady talkers in both namespaces: one server, and one client with some long-lived connections.
///
/// # Errors
/// They do not start.
pub async fn talkers(world: &World) -> anyhow::Result<()> {
    for (namespace, letter) in [(ALPHA, "a"), (BETA, "b")] {
        let server = format!("event-{letter}");
        let listen =
            format!("tcp-server --listen :: --port {PORT} --mode event --pattern exchange --up 500 --down 900");
        let spec = workloads::pod_spec(&[workloads::traffic(&server, &listen)], None);
        api::apply(
            &world.client,
            &[workloads::workload("Deployment", namespace, &server, 1, &spec)],
        )
        .await?;
        let pods = Api::<Pod>::namespaced(world.client.clone(), namespace);
        let labels = ListParams::default().labels(&format!("app={server}"));
        let ip = api::wait(
            &format!("the address of {server}"),
            Duration::from_secs(60),
            async || {
                let pod = pods.list(&labels).await?.items.into_iter().next();
                Ok(pod.and_then(|pod| pod.status).and_then(|status| status.pod_ip))
            },
        )
        .await?;
        let talk = format!(
            "tcp-hold --dst {ip} --port {PORT} --connections 4 --rounds 100000 --pause-ms 250 --up 500 --down 900 --hold"
        );
        let client = format!("hold-{letter}");
        let spec = workloads::pod_spec(&[workloads::traffic(&client, &talk)], None);
        api::apply(
            &world.client,
            &[workloads::workload("Deployment", namespace, &client, 1, &spec)],
        )
        .await?;
    }
    for namespace in [ALPHA, BETA] {
        api::wait_ready(&world.client, namespace, Duration::from_secs(60)).await?;
    }
    Ok(())
}

/// Runs it.
///
/// # Errors
/// A row came too late, or was missing, or a pod was replaced.
pub async fn run(world: &mut World) -> anyhow::Result<()> {
    talkers(world).await?;
    wait_rows(world, ALPHA, Duration::from_secs(30)).await?;
    wait_rows(world, BETA, Duration::from_secs(30)).await?;
    let before = world.restarts().await?;
    let start = now();
    let rules = json!([{ "match": { "names": [ALPHA] }, "plugins": { "ebpf-net": { "enabled": false } } }]);
    world.patch_object(&json!({ "spec": { "namespaces": rules } })).await?;
    let off = now();
    tokio::time::sleep(WATCHED + DELIVERY).await;
    world.stub.read().await?;
    let last = last_row(world, ALPHA).unwrap_or(start);
    println!(
        "    switched off: the last row of {ALPHA} is of {:+.1} s",
        seconds(last - off)
    );
    anyhow::ensure!(
        last - off <= i64::try_from(SOON.as_nanos())?,
        "{ALPHA} has rows {:.1} s later",
        seconds(last - off)
    );
    world
        .patch_object(&json!({ "spec": { "namespaces": Value::Null } }))
        .await?;
    let on = now();
    let took = wait_rows(world, ALPHA, Duration::from_secs(30)).await?;
    let first = times(world, ALPHA).find(|time| *time > on).unwrap_or(on);
    println!(
        "    switched on: the first row of {ALPHA} is of {:+.1} s, seen after {:.1} s",
        seconds(first - on),
        took.as_secs_f64()
    );
    let allowed = i64::try_from((SOON + INTERVAL).as_nanos())?;
    anyhow::ensure!(
        first - on <= allowed,
        "{ALPHA} has its first row {:.1} s later",
        seconds(first - on)
    );
    tokio::time::sleep(DELIVERY).await;
    world.stub.read().await?;
    let gap = largest_gap(times(world, BETA).filter(|time| *time >= start), start);
    println!("    {BETA}: at most {:.1} s between two rows", seconds(gap));
    let interval = i64::try_from(INTERVAL.as_nanos())?;
    anyhow::ensure!(gap <= 2 * interval, "{BETA} had no row for {:.1} s", seconds(gap));
    let after = world.restarts().await?;
    anyhow::ensure!(
        before == after,
        "pods were replaced or restarted: {before:?} became {after:?}"
    );
    Ok(())
}

/// Times of rows whose local end is a workload of this namespace.
fn times<'a>(world: &'a World, namespace: &'a str) -> impl Iterator<Item = i64> + 'a {
    let truth = world.truth().clone();
    let of = move |row: &&super::stub::Row| truth.namespace_of(row) == Some(namespace);
    world.stub.rows.iter().filter(of).map(|row| row.time)
}

fn last_row(world: &World, namespace: &str) -> Option<i64> {
    times(world, namespace).max()
}

/// Waits until a row of the namespace is newer than now; tells how long it took.
async fn wait_rows(world: &mut World, namespace: &str, limit: Duration) -> anyhow::Result<Duration> {
    let (begin, start) = (Instant::now(), now());
    loop {
        world.stub.read().await?;
        if times(world, namespace).any(|time| time > start) {
            return Ok(begin.elapsed());
        }
        anyhow::ensure!(begin.elapsed() < limit, "no row of {namespace} within {limit:?}");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

fn largest_gap(times: impl Iterator<Item = i64>, start: i64) -> i64 {
    let mut all: Vec<i64> = times.collect();
    all.push(start);
    all.sort_unstable();
    all.iter()
        .zip(all.iter().skip(1))
        .map(|(one, next)| next - one)
        .max()
        .unwrap_or(i64::MAX)
}

#[expect(clippy::cast_precision_loss, reason = "shown to people")]
fn seconds(nanoseconds: i64) -> f64 {
    nanoseconds as f64 / 1e9
}
