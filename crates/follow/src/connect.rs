//! The way to the API server: a kubeconfig or the pod's service account, and the options that say otherwise.

use api::KubernetesConfig;
use kube::{Client, Config};

/// There is no way to the API server.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Neither a kubeconfig nor a service account, and no `kubernetes_url`.
    #[error("no API server is known: {0}; run in a pod, set KUBECONFIG, or set kubernetes_url")]
    Unknown(#[from] kube::config::InferConfigError),
    /// The address is none.
    #[error("kubernetes_url = {url:?} cannot be used: {why}")]
    Url {
        /// The value.
        url: String,
        /// What is wrong.
        #[source]
        why: http::uri::InvalidUri,
    },
    /// Certificates or token cannot be used.
    #[error("the API server cannot be asked: {0}")]
    Client(#[from] kube::Error),
}

/// A client of the API server. Its token is read again by itself when the file changes.
///
/// # Errors
/// When no API server is known, or what is known of it cannot be used. It is not asked yet.
pub async fn connect(options: &KubernetesConfig) -> Result<Client, ConnectError> {
    // Another part of the process may have chosen a provider already; either serves.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut config = match &options.url {
        None => Config::infer().await?,
        Some(url) => {
            let url = url.to_string();
            let uri: http::Uri = url.parse().map_err(|why| ConnectError::Url { url, why })?;
            // The authorities that a pod trusts serve for any name of its API server.
            match Config::infer().await {
                Ok(mut config) => {
                    config.cluster_url = uri;
                    config
                }
                Err(_) => Config::new(uri),
            }
        }
    };
    if let Some(file) = &options.bearer_token_file {
        config.auth_info.token = None;
        config.auth_info.token_file = Some(file.display().to_string());
    }
    if let Some(token) = &options.bearer_token {
        config.auth_info.token = Some(token.expose().to_owned().into());
    }
    Ok(Client::try_from(config)?)
}
