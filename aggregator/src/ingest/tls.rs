//! TLS with mandatory client certificates, read again when the files change.
//!
//! The whole configuration is swapped, authorities included, so that a rotated CA works too. Connections keep what they
//! were accepted with.

use std::{fs, path::Path, sync::Arc};

use parking_lot::RwLock;
use rustls::{
    RootCertStore, ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use super::{IngestError, IngestMetrics, ServerTls};

/// The certificates in use.
#[derive(Debug)]
pub(super) struct Certificates {
    tls: ServerTls,
    current: RwLock<Arc<ServerConfig>>,
}

/// The files as read; compared to see a change whatever became of their times.
#[derive(PartialEq, Eq)]
struct Files {
    cert: Vec<u8>,
    key: Vec<u8>,
    client_ca: Vec<u8>,
}

impl Certificates {
    /// Reads the files of `tls`.
    pub(super) fn load(tls: ServerTls) -> Result<Arc<Self>, IngestError> {
        let config = Files::read(&tls)?.config(&tls)?;
        Ok(Arc::new(Self {
            tls,
            current: RwLock::new(Arc::new(config)),
        }))
    }

    /// For the next connection.
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(Arc::clone(&self.current.read()))
    }

    /// Looks at the files until `stop`. Files that can not be used leave the last good ones in use.
    pub(super) async fn watch(&self, metrics: IngestMetrics, stop: CancellationToken) {
        let mut seen = None;
        while stop
            .run_until_cancelled(tokio::time::sleep(self.tls.reload_interval))
            .await
            .is_some()
        {
            let files = match Files::read(&self.tls) {
                Ok(files) => files,
                Err(error) => {
                    metrics.reload("failed");
                    tracing::warn!(%error, "certificate files can not be read again: the last good ones stay in use");
                    continue;
                }
            };
            if seen.as_ref() == Some(&files) {
                continue;
            }
            match files.config(&self.tls) {
                Ok(config) => {
                    *self.current.write() = Arc::new(config);
                    // The first look has nothing to compare with.
                    if seen.is_some() {
                        metrics.reload("ok");
                        tracing::info!(cert = %self.tls.cert.display(), "certificates read again");
                    }
                }
                Err(error) => {
                    metrics.reload("failed");
                    tracing::warn!(%error, "changed certificates can not be used: the last good ones stay in use");
                }
            }
            seen = Some(files);
        }
    }
}

impl Files {
    fn read(tls: &ServerTls) -> Result<Self, IngestError> {
        let read = |what, path: &Path| {
            fs::read(path).map_err(|err| IngestError::Tls {
                what,
                path: path.to_owned(),
                why: err.to_string(),
            })
        };
        Ok(Self {
            cert: read("certificate", &tls.cert)?,
            key: read("key", &tls.key)?,
            client_ca: read("client CA", &tls.client_ca)?,
        })
    }

    fn config(&self, tls: &ServerTls) -> Result<ServerConfig, IngestError> {
        let error = |what, path: &Path, why: String| IngestError::Tls {
            what,
            path: path.to_owned(),
            why,
        };
        let provider = Arc::new(ring::default_provider());
        let mut roots = RootCertStore::empty();
        for authority in certificates("client CA", &tls.client_ca, &self.client_ca)? {
            roots
                .add(authority)
                .map_err(|err| error("client CA", &tls.client_ca, err.to_string()))?;
        }
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .build()
            .map_err(|err| error("client CA", &tls.client_ca, err.to_string()))?;
        let chain = certificates("certificate", &tls.cert, &self.cert)?;
        let key = PrivateKeyDer::from_pem_slice(&self.key).map_err(|err| error("key", &tls.key, err.to_string()))?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|err| error("certificate", &tls.cert, err.to_string()))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(|err| error("certificate or key", &tls.cert, err.to_string()))?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    }
}

fn certificates(what: &'static str, path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, IngestError> {
    let error = |why: String| IngestError::Tls {
        what,
        path: path.to_owned(),
        why,
    };
    let all = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|err| error(format!("not PEM: {err}")))?;
    if all.is_empty() {
        return Err(error("holds no PEM certificate".to_owned()));
    }
    Ok(all)
}
