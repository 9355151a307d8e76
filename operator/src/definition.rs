//! The definition of `EbpfCollector` in the cluster, brought to this version's.
//!
//! Data flow: the object's types ▶ [`wanted`] ▶ [`drift::is_current`] ▶ apply. Helm installs a definition once and never
//! touches it again, so after an upgrade fields of the new version would be lost at `kubectl apply`. Entry: [`keep`].

use std::time::Duration;

use api::collector::EbpfCollector;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{
    Api, Client, CustomResourceExt as _,
    api::{Patch, PatchParams},
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::{
    cluster::{ClusterError, failed},
    drift, names,
};

/// Pause after a failure.
const AGAIN: Duration = Duration::from_secs(10);

/// The definition as it is applied, with its hash.
#[must_use]
pub fn wanted() -> Value {
    drift::with_hash(json!(EbpfCollector::crd()))
}

/// Applies the definition if the cluster's is another. Whether it was written.
///
/// # Errors
/// [`ClusterError`] of the request that failed.
pub async fn apply(client: &Client) -> Result<bool, ClusterError> {
    const KIND: &str = "CustomResourceDefinition";
    let (wanted, name) = (wanted(), EbpfCollector::crd_name());
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    let live = api.get_opt(name).await.map_err(failed("read", KIND, name))?;
    // The hash alone decides: the API server writes numbers of a schema in its own way.
    if live.is_some_and(|live| drift::applied_hash(&json!(live)) == drift::applied_hash(&wanted)) {
        return Ok(false);
    }
    let parameters = PatchParams::apply(names::FIELD_MANAGER).force();
    api.patch(name, &parameters, &Patch::Apply(&wanted))
        .await
        .map_err(failed("apply", KIND, name))?;
    Ok(true)
}

/// Applies the definition once, trying again while the API server does not answer, until `cancel`.
pub async fn keep(client: Client, cancel: CancellationToken) {
    loop {
        match apply(&client).await {
            Ok(true) => return tracing::info!("the definition of EbpfCollector is brought to this version's"),
            Ok(false) => return tracing::debug!("the definition of EbpfCollector is this version's"),
            Err(error) if error.is_refused() => {
                return tracing::error!(
                    %error,
                    "the definition of EbpfCollector stays as it is; apply crds/ebpfcollectors.yaml of this version by hand, \
                     or grant get and patch on this one customresourcedefinition"
                );
            }
            Err(error) => tracing::warn!(%error, "the definition of EbpfCollector is not applied, it is tried again"),
        }
        tokio::select! {
            () = tokio::time::sleep(AGAIN) => {}
            () = cancel.cancelled() => return,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]
    use super::*;
    use crate::cluster::tests::FakeServer;

    const PATH: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/ebpfcollectors.ebpfcollector.io";

    #[tokio::test]
    async fn another_definition_is_replaced_once() {
        let server = FakeServer::default();
        let mut old = json!(EbpfCollector::crd());
        old["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"] = json!({});
        server.objects.lock().unwrap().insert(PATH.to_owned(), old);
        assert!(apply(&server.client()).await.unwrap());
        assert_eq!(server.writes(), [format!("PATCH {PATH}")]);
        let now = server.objects.lock().unwrap()[PATH].clone();
        let fields = &now["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"];
        assert!(fields["dataway"].is_object());
        assert!(!apply(&server.client()).await.unwrap());
        assert!(server.writes().is_empty());
    }
}
