//! Secrets of the operator's namespace as values: certificates that exist, and whether there is a DataWay token.
//!
//! Data flow: API server ▶ [`existing`] ▶ `certificates::Material::plan`; [`has_token`] ▶ condition. A Secret that
//! cannot be read is an error, not an absent one: else a failing connection would found a new authority.

use k8s_openapi::api::core::v1::Secret;
use kube::{Api, Client};

use crate::{
    certificates::{Authority, Existing, KeyedCertificate},
    cluster::{ClusterError, failed},
};

/// The certificates that were issued for the object `instance`.
///
/// # Errors
/// [`ClusterError`] when a Secret cannot be read.
pub async fn existing(client: &Client, namespace: &str, instance: &str) -> Result<Existing, ClusterError> {
    let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let read = async |suffix: &str| {
        let name = format!("{instance}-{suffix}");
        api.get_opt(&name).await.map_err(failed("read", "Secret", &name))
    };
    Ok(Existing {
        authority: read("authority").await?.as_ref().and_then(authority),
        aggregator: read("aggregator-tls").await?.as_ref().and_then(|it| keyed(it, "tls")),
        agent: read("agent-tls").await?.as_ref().and_then(|it| keyed(it, "tls")),
        operator: read("operator-tls").await?.as_ref().and_then(|it| keyed(it, "tls")),
    })
}

/// Whether there is something at `key` of the Secret `name`.
///
/// # Errors
/// [`ClusterError`] when the Secret cannot be read.
pub async fn has_token(client: &Client, namespace: &str, name: &str, key: &str) -> Result<bool, ClusterError> {
    let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let secret = api.get_opt(name).await.map_err(failed("read", "Secret", name))?;
    let token = secret.as_ref().and_then(|secret| text(secret, key));
    Ok(token.is_some_and(|token| !token.trim().is_empty()))
}

fn text(secret: &Secret, key: &str) -> Option<String> {
    String::from_utf8(secret.data.as_ref()?.get(key)?.0.clone()).ok()
}

fn keyed(secret: &Secret, part: &str) -> Option<KeyedCertificate> {
    Some(KeyedCertificate {
        certificate: text(secret, &format!("{part}.crt"))?,
        key: text(secret, &format!("{part}.key"))?,
    })
}

fn authority(secret: &Secret) -> Option<Authority> {
    Some(Authority {
        current: keyed(secret, "tls")?,
        next: keyed(secret, "next"),
        previous: text(secret, "previous.crt"),
        stepped: text(secret, "stepped")?.parse().ok()?,
    })
}
