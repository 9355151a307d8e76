//! Lines typed into shells of pods, of two users on both nodes: each arrives once, with user and pod; of a namespace that is
//! switched off none does.

use std::{
    io::Write as _,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::Context as _;
use k8s_openapi::api::core::v1::Node;
use kube::{Api, ResourceExt as _, api::ListParams};
use serde_json::{Value, json};

use super::{
    api, workloads,
    world::{ALPHA, BETA, DELIVERY, INTERVAL, World},
};

/// Lines per shell.
const LINES: usize = 50;
/// Users of the image, see [`crate::images`].
const USERS: [(&str, u32); 2] = [("root", 0), ("worker", 1000)];

/// Runs it.
///
/// # Errors
/// A line is missing, twice, of another user or pod, or of what is switched off.
pub async fn run(world: &mut World) -> anyhow::Result<()> {
    let nodes = Api::<Node>::all(world.client.clone())
        .list(&ListParams::default())
        .await?;
    let mut shells = Vec::new();
    for (number, node) in nodes.items.iter().enumerate() {
        for namespace in [ALPHA, BETA] {
            for (user, uid) in USERS {
                let name = format!("shell-{user}-{number}");
                // Something that waits.
                let container = workloads::traffic(&name, "tcp-server --listen ::1 --port 7401");
                let mut spec = workloads::pod_spec(&[container], Some(&node.name_any()));
                if let Value::Object(fields) = &mut spec {
                    fields.insert("securityContext".to_owned(), json!({ "runAsUser": uid }));
                }
                shells.push((namespace, name.clone(), user, workloads::pod(namespace, &name, spec)));
            }
        }
    }
    let manifests: Vec<Value> = shells.iter().map(|(.., manifest)| manifest.clone()).collect();
    api::apply(&world.client, &manifests).await?;
    for namespace in [ALPHA, BETA] {
        api::wait_ready(&world.client, namespace, Duration::from_secs(60)).await?;
    }
    let rules = json!([{ "match": { "names": [BETA] }, "plugins": { "ebpf-bash": { "enabled": false } } }]);
    let plugins = json!({ "ebpf-net": {}, "ebpf-bash": {} });
    world
        .patch_object(&json!({ "spec": { "plugins": plugins, "namespaces": rules } }))
        .await?;
    tokio::time::sleep(Duration::from_secs(5) + INTERVAL).await;
    for (namespace, name, ..) in &shells {
        type_into(world, namespace, name)?;
    }
    tokio::time::sleep(INTERVAL * 2 + DELIVERY).await;
    world.stub.read().await?;
    let rows: Vec<_> = world.stub.rows.iter().filter(|row| row.name == "bash").collect();
    let mut wrong = Vec::new();
    for (namespace, name, user, _) in &shells {
        let of_pod = rows
            .iter()
            .filter(|row| row.tag("k8s_namespace") == *namespace && row.tag("k8s_pod_name") == name);
        let of_pod: Vec<_> = of_pod.collect();
        let expected: Vec<String> = match *namespace {
            ALPHA => lines(namespace, name),
            _ => Vec::new(),
        };
        let mut found: Vec<&str> = of_pod.iter().map(|row| row.text("cmd")).collect();
        found.sort_unstable();
        let users = of_pod.iter().filter(|row| row.text("user") == *user).count();
        println!(
            "    {namespace}/{name:<16} {} lines, {users} of user {user}",
            found.len()
        );
        if found != expected || users != expected.len() {
            wrong.push(format!(
                "{namespace}/{name}: {} lines of {}, {users} of them of user {user}",
                found.len(),
                expected.len()
            ));
        }
    }
    // None went out under another pod's name.
    let strays = rows
        .iter()
        .filter(|row| row.text("cmd").contains("line-of-e2e"))
        .count();
    let all = shells.len() / 2 * LINES;
    if strays != all {
        wrong.push(format!("{strays} lines in all, {all} were typed where it is on"));
    }
    world
        .patch_object(&json!({ "spec": { "plugins": Value::Null, "namespaces": Value::Null } }))
        .await?;
    api::delete(&world.client, &manifests, Some(0)).await?;
    anyhow::ensure!(wrong.is_empty(), "{}", wrong.join("; "));
    Ok(())
}

/// What is typed, in order.
fn lines(namespace: &str, pod: &str) -> Vec<String> {
    (0..LINES)
        .map(|number| format!(": line-of-e2e {number:03} {namespace}/{pod}"))
        .collect()
}

/// Types all lines into a new shell of a pod, with empty ones between, and waits until it ended.
fn type_into(world: &World, namespace: &str, pod: &str) -> anyhow::Result<()> {
    let mut child = Command::new(world.cluster.program("kubectl"))
        .args(["exec", "-i", "-n", namespace, pod, "--", "bash", "--norc", "-i"])
        .env("KUBECONFIG", world.cluster.kubeconfig()?)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("start kubectl")?;
    let typed: String = lines(namespace, pod).iter().map(|line| format!("{line}\n\n")).collect();
    let mut input = child.stdin.take().context("kubectl has no input")?;
    // Nobody types before the prompt is there.
    std::thread::sleep(Duration::from_millis(500));
    input.write_all(typed.as_bytes()).context("type into the shell")?;
    drop(input);
    let output = child.wait_with_output().context("wait for kubectl")?;
    anyhow::ensure!(
        output.status.success(),
        "kubectl exec in {namespace}/{pod}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
