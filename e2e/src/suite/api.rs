//! What the tests ask of the API server: apply, delete, wait, logs. It goes by the kubeconfig of the cluster alone.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use k8s_openapi::api::{
    apps::v1::{DaemonSet, Deployment, StatefulSet},
    core::v1::{Namespace, Pod},
};
use kube::{
    Api, Client, Config,
    api::{DeleteParams, DynamicObject, ListParams, LogParams, Patch, PatchParams},
    config::{KubeConfigOptions, Kubeconfig},
    core::{GroupVersionKind, TypeMeta},
    discovery,
};
use serde_json::Value;

/// Whose fields these are in the cluster.
const MANAGER: &str = "ec-e2e";
const POLL: Duration = Duration::from_millis(300);

/// Connects as the kubeconfig says.
///
/// # Errors
/// The file cannot be used.
pub async fn connect(kubeconfig: &Path) -> anyhow::Result<Client> {
    // Another crate may bring a second provider into the build; this one is meant.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let read = Kubeconfig::read_from(kubeconfig).with_context(|| format!("read {}", kubeconfig.display()))?;
    let config = Config::from_custom_kubeconfig(read, &KubeConfigOptions::default())
        .await
        .with_context(|| format!("use {}", kubeconfig.display()))?;
    Client::try_from(config).context("make a client")
}

/// Applies manifests in their order.
///
/// # Errors
/// One is refused; it is named.
pub async fn apply(client: &Client, manifests: &[Value]) -> anyhow::Result<()> {
    for manifest in manifests {
        let (api, name) = place(client, manifest).await?;
        let parameters = PatchParams::apply(MANAGER).force();
        api.patch(&name, &parameters, &Patch::Apply(manifest))
            .await
            .with_context(|| format!("apply {} {name}", kind_of(manifest)))?;
    }
    Ok(())
}

/// Deletes what manifests made; what is gone already is no error.
///
/// # Errors
/// The API server refuses.
pub async fn delete(client: &Client, manifests: &[Value], grace: Option<u32>) -> anyhow::Result<()> {
    let parameters = DeleteParams {
        grace_period_seconds: grace,
        ..DeleteParams::background()
    };
    for manifest in manifests {
        let (api, name) = place(client, manifest).await?;
        match api.delete(&name, &parameters).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => return Err(error).with_context(|| format!("delete {} {name}", kind_of(manifest))),
        }
    }
    Ok(())
}

/// The object that a manifest made, as it is now.
///
/// # Errors
/// There is none.
pub async fn get(client: &Client, manifest: &Value) -> anyhow::Result<DynamicObject> {
    let (api, name) = place(client, manifest).await?;
    api.get(&name)
        .await
        .with_context(|| format!("read {} {name}", kind_of(manifest)))
}

fn kind_of(manifest: &Value) -> &str {
    manifest.get("kind").and_then(Value::as_str).unwrap_or_default()
}

async fn place(client: &Client, manifest: &Value) -> anyhow::Result<(Api<DynamicObject>, String)> {
    let types: TypeMeta = serde_json::from_value(manifest.clone()).context("a manifest without kind")?;
    let kind = GroupVersionKind::try_from(&types).with_context(|| format!("apiVersion {}", types.api_version))?;
    let (resource, capabilities) = discovery::pinned_kind(client, &kind)
        .await
        .with_context(|| format!("ask the API server about {}", types.kind))?;
    let text = |key: &str| {
        manifest
            .pointer(&format!("/metadata/{key}"))?
            .as_str()
            .map(str::to_owned)
    };
    let name = text("name").with_context(|| format!("a {} without a name", types.kind))?;
    let api = match (capabilities.scope, text("namespace")) {
        (discovery::Scope::Namespaced, Some(namespace)) => Api::namespaced_with(client.clone(), &namespace, &resource),
        (discovery::Scope::Namespaced, None) => anyhow::bail!("{} {name} has no namespace", types.kind),
        (discovery::Scope::Cluster, _) => Api::all_with(client.clone(), &resource),
    };
    Ok((api, name))
}

/// Asks until the answer is `Some`; what was missing last is in the error.
///
/// # Errors
/// The time is over.
pub async fn wait<T, F>(what: &str, limit: Duration, mut ask: impl FnMut() -> F) -> anyhow::Result<T>
where
    F: Future<Output = anyhow::Result<Option<T>>>,
{
    let start = Instant::now();
    loop {
        let problem = match ask().await {
            Ok(Some(answer)) => return Ok(answer),
            Ok(None) => "not yet".to_owned(),
            Err(error) => format!("{error:#}"),
        };
        anyhow::ensure!(start.elapsed() < limit, "waited {limit:?} for {what}: {problem}");
        tokio::time::sleep(POLL).await;
    }
}

/// Waits until every pod that Deployments, StatefulSets and DaemonSets of a namespace want is ready, and every pod of its
/// own runs or has ended well.
///
/// # Errors
/// It takes too long; what is missing is named.
pub async fn wait_ready(client: &Client, namespace: &str, limit: Duration) -> anyhow::Result<()> {
    wait(&format!("everything in {namespace} to be ready"), limit, async || {
        let missing = not_ready(client, namespace).await?;
        anyhow::ensure!(missing.is_empty(), "not ready: {}", missing.join(", "));
        Ok(Some(()))
    })
    .await
}

async fn not_ready(client: &Client, namespace: &str) -> anyhow::Result<Vec<String>> {
    let all = ListParams::default();
    let mut missing = Vec::new();
    let mut check = |name: Option<String>, current: bool, wanted: Option<i32>, ready: Option<i32>| {
        if !current || wanted.unwrap_or(1) != ready.unwrap_or(0) {
            missing.push(format!(
                "{} ({}/{})",
                name.unwrap_or_default(),
                ready.unwrap_or(0),
                wanted.unwrap_or(1)
            ));
        }
    };
    for one in Api::<Deployment>::namespaced(client.clone(), namespace)
        .list(&all)
        .await?
    {
        let status = one.status.unwrap_or_default();
        let current = status.observed_generation >= one.metadata.generation;
        check(
            one.metadata.name,
            current,
            one.spec.and_then(|spec| spec.replicas),
            status.ready_replicas,
        );
    }
    for one in Api::<StatefulSet>::namespaced(client.clone(), namespace)
        .list(&all)
        .await?
    {
        let status = one.status.unwrap_or_default();
        let current = status.observed_generation >= one.metadata.generation;
        check(
            one.metadata.name,
            current,
            one.spec.and_then(|spec| spec.replicas),
            status.ready_replicas,
        );
    }
    for one in Api::<DaemonSet>::namespaced(client.clone(), namespace)
        .list(&all)
        .await?
    {
        let status = one.status.unwrap_or_default();
        let current = status.observed_generation >= one.metadata.generation && status.desired_number_scheduled > 0;
        check(
            one.metadata.name,
            current,
            Some(status.desired_number_scheduled),
            Some(status.number_ready),
        );
    }
    for pod in Api::<Pod>::namespaced(client.clone(), namespace).list(&all).await? {
        let phase = pod.status.and_then(|status| status.phase).unwrap_or_default();
        if phase != "Running" && phase != "Succeeded" {
            missing.push(format!("pod {} is {phase}", pod.metadata.name.unwrap_or_default()));
        }
    }
    Ok(missing)
}

/// Waits until a pod has ended, and returns what it wrote.
///
/// # Errors
/// It takes too long, or the pod failed.
pub async fn wait_ended(client: &Client, namespace: &str, name: &str, limit: Duration) -> anyhow::Result<String> {
    let pods = Api::<Pod>::namespaced(client.clone(), namespace);
    let phase = wait(&format!("pod {namespace}/{name} to end"), limit, async || {
        let phase = pods
            .get(name)
            .await?
            .status
            .and_then(|status| status.phase)
            .unwrap_or_default();
        Ok(["Succeeded", "Failed"].contains(&phase.as_str()).then_some(phase))
    })
    .await?;
    let text = logs(client, namespace, name).await?;
    anyhow::ensure!(phase == "Succeeded", "pod {namespace}/{name} failed: {text}");
    Ok(text)
}

/// What a pod of one container wrote.
///
/// # Errors
/// The pod or its log is gone.
pub async fn logs(client: &Client, namespace: &str, name: &str) -> anyhow::Result<String> {
    let pods = Api::<Pod>::namespaced(client.clone(), namespace);
    pods.logs(name, &LogParams::default())
        .await
        .with_context(|| format!("read the log of {namespace}/{name}"))
}

/// Deletes a namespace and waits until it is gone.
///
/// # Errors
/// It takes too long.
pub async fn remove_namespace(client: &Client, name: &str, limit: Duration) -> anyhow::Result<()> {
    let namespaces = Api::<Namespace>::all(client.clone());
    match namespaces.delete(name, &DeleteParams::default()).await {
        Ok(_) => {}
        Err(kube::Error::Api(status)) if status.code == 404 => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("delete namespace {name}")),
    }
    wait(&format!("namespace {name} to be gone"), limit, async || {
        Ok(namespaces.get_opt(name).await?.is_none().then_some(()))
    })
    .await
}
