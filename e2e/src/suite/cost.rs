//! What the product asks of the API server: nothing is written when nothing changed, and nothing is allowed that is not listed.

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::{Api, ResourceExt as _, api::ListParams};
use serde_json::{Value, json};

use super::world::{COLLECTOR, PRODUCT, World};

const ROUNDS: u32 = 100;
/// How often the operator asks the aggregator at most; what it answers may be a write of the status.
const ASKED_EVERY: Duration = Duration::from_secs(15);

/// Runs it.
///
/// # Errors
/// A reconciliation without a change wrote something.
pub async fn run(world: &World) -> anyhow::Result<()> {
    // Until then there is something to tell.
    world
        .wait_condition("FlowsArriving", "True", Duration::from_secs(60))
        .await?;
    let settle = Duration::from_secs(5);
    tokio::time::sleep(settle).await;
    let before = versions(world).await?;
    let start = audit(world)?.len();
    let since = Instant::now();
    for round in 0..ROUNDS {
        let annotations = json!({ "e2e.ebpfcollector.io/round": round.to_string() });
        world
            .patch_object(&json!({ "metadata": { "annotations": annotations } }))
            .await?;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    tokio::time::sleep(settle).await;
    let after = versions(world).await?;
    let changed: Vec<&String> = after
        .iter()
        .filter(|(key, version)| before.get(*key) != Some(version))
        .map(|(key, _)| key)
        .collect();
    println!(
        "    {ROUNDS} changes that mean nothing: {} of {} objects written",
        changed.len(),
        after.len()
    );
    if world.cluster.audit_log().is_some() {
        let lines = audit(world)?;
        let mut writes: BTreeMap<String, u32> = BTreeMap::new();
        for line in lines.get(start..).unwrap_or_default() {
            let text = |path: &str| line.pointer(path).and_then(Value::as_str).unwrap_or_default();
            let user = text("/user/username");
            let is_read = matches!(text("/verb"), "get" | "list" | "watch");
            let is_ours = user.starts_with(&format!("system:serviceaccount:{PRODUCT}:"));
            if is_ours && !is_read && text("/objectRef/resource") != "leases" {
                let subresource = text("/objectRef/subresource");
                *writes
                    .entry(format!(
                        "{} {} {} {subresource} by {user}",
                        text("/verb"),
                        text("/objectRef/resource"),
                        text("/objectRef/name")
                    ))
                    .or_default() += 1;
            }
        }
        for (pod, asked) in asked(&lines) {
            println!(
                "    {pod}: {} requests in its first 10 s, then {} in {:.1} minutes",
                asked.start,
                asked.later,
                asked.last.duration_since(asked.first).as_secs_f64() / 60.0
            );
        }
        println!(
            "    writes by the product in the audit log, leases apart: {}",
            writes.values().sum::<u32>()
        );
        for (what, times) in &writes {
            println!("      {times} x {what}");
        }
        let of_status = |what: &str| what.contains(" status ");
        let sum = |status: bool| -> u32 {
            let chosen = writes.iter().filter(|(what, _)| of_status(what) == status);
            chosen.map(|(_, times)| times).sum()
        };
        let (others, status) = (sum(false), sum(true));
        anyhow::ensure!(others == 0, "{others} writes though nothing changed");
        let looks = 2 + since.elapsed().as_secs() / ASKED_EVERY.as_secs();
        anyhow::ensure!(
            u64::from(status) <= looks,
            "{status} writes of a status, though the aggregator was asked {looks} times at most"
        );
    }
    anyhow::ensure!(changed.is_empty(), "written though nothing changed: {changed:?}");
    Ok(())
}

/// What one agent asked of the API server.
#[derive(Default)]
struct Asked {
    first: Timestamp,
    last: Timestamp,
    start: u32,
    later: u32,
}

/// By pod. A watch counts once.
fn asked(lines: &[Value]) -> BTreeMap<String, Asked> {
    let mut pods: BTreeMap<String, Asked> = BTreeMap::new();
    let mut seen = HashSet::new();
    for line in lines {
        let text = |path: &str| line.pointer(path).and_then(Value::as_str).unwrap_or_default();
        let pod = text("/user/extra/authentication.kubernetes.io~1pod-name/0");
        let Ok(at) = text("/requestReceivedTimestamp").parse::<Timestamp>() else {
            continue;
        };
        if !text("/user/username").ends_with(&format!(":{COLLECTOR}-agent")) || !seen.insert(text("/auditID")) {
            continue;
        }
        let asked = pods.entry(pod.to_owned()).or_insert_with(|| Asked {
            first: at,
            ..Asked::default()
        });
        asked.last = at;
        if at.duration_since(asked.first) < SignedDuration::from_secs(10) {
            asked.start += 1;
        } else {
            asked.later += 1;
        }
    }
    pods
}

/// Prints what each ServiceAccount of the product may do.
///
/// # Errors
/// The API server does not answer.
pub async fn rights(world: &World) -> anyhow::Result<()> {
    let accounts = Api::<ServiceAccount>::namespaced(world.client.clone(), PRODUCT);
    for account in accounts.list(&ListParams::default()).await?.items {
        let name = account.name_any();
        if name == "default" {
            continue;
        }
        let who = format!("--as=system:serviceaccount:{PRODUCT}:{name}");
        println!("    kubectl auth can-i --list {who} -n {PRODUCT}");
        let list = world.kubectl(&["auth", "can-i", "--list", &who, "-n", PRODUCT])?;
        for line in list.lines().filter(|line| !line.starts_with("  ")) {
            println!("      {line}");
        }
        for forbidden in [["create", "pods"], ["get", "secrets"]] {
            let [verb, resource] = forbidden;
            if !name.ends_with("-agent") && !name.ends_with("-aggregator") {
                continue;
            }
            // `can-i` answers no with an exit code.
            let answer = world.kubectl(&["auth", "can-i", verb, resource, &who, "-n", PRODUCT]);
            anyhow::ensure!(answer.is_err(), "{name} may {verb} {resource}");
        }
    }
    Ok(())
}

/// Versions of everything that the operator makes.
async fn versions(world: &World) -> anyhow::Result<BTreeMap<String, String>> {
    let kinds = "daemonsets,statefulsets,services,secrets,serviceaccounts,networkpolicies,poddisruptionbudgets";
    let label = "app.kubernetes.io/managed-by=ebpfcollector-operator";
    let text = world.kubectl(&["get", kinds, "-n", PRODUCT, "-l", label, "-o", "json"])?;
    let list: Value = serde_json::from_str(&text).context("understand kubectl's list")?;
    let items = list
        .get("items")
        .and_then(Value::as_array)
        .context("kubectl's list has no items")?;
    // Of a workload its own spec counts: its status changes with its pods.
    let entry = |item: &Value| {
        let text = |path: &str| item.pointer(path).map(|value| value.to_string()).unwrap_or_default();
        let workload =
            ["\"DaemonSet\"", "\"StatefulSet\"", "\"PodDisruptionBudget\""].contains(&text("/kind").as_str());
        let version = if workload {
            text("/metadata/generation")
        } else {
            text("/metadata/resourceVersion")
        };
        (format!("{} {}", text("/kind"), text("/metadata/name")), version)
    };
    anyhow::ensure!(
        items.len() >= 7,
        "only {} objects carry the operator's label",
        items.len()
    );
    Ok(items.iter().map(entry).collect())
}

fn audit(world: &World) -> anyhow::Result<Vec<Value>> {
    let Some(path) = world.cluster.audit_log() else {
        return Ok(Vec::new());
    };
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    Ok(text
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect())
}
