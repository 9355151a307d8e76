//! Certificates of the cluster's programs: one authority, a certificate for each identity, and kubeconfigs with them.
//!
//! They are made anew for each cluster and live in its directory.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use anyhow::Context as _;
use base64::{Engine as _, prelude::BASE64_STANDARD};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use serde_json::json;

/// The cluster's authority.
pub(super) struct Authority {
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its key, PEM.
pub(super) struct Identity {
    certificate: String,
    key: String,
}

// === impl Authority ===

impl Authority {
    /// A new one.
    ///
    /// # Errors
    /// No key could be made.
    pub(super) fn new() -> anyhow::Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.distinguished_name.push(DnType::CommonName, "ec-e2e");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?.pem();
        Ok(Self {
            certificate,
            issuer: Issuer::new(params, key),
        })
    }

    /// A certificate for `user` of `group`, which serves under `names`.
    ///
    /// # Errors
    /// A name is none.
    pub(super) fn identity(&self, user: &str, group: Option<&str>, names: &[&str]) -> anyhow::Result<Identity> {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).with_context(|| format!("names of {user}"))?;
        params.distinguished_name.push(DnType::CommonName, user);
        if let Some(group) = group {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate()?;
        Ok(Identity {
            certificate: params.signed_by(&key, &self.issuer)?.pem(),
            key: key.serialize_pem(),
        })
    }

    /// Writes the authority's certificate, not its key.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(super) fn write(&self, path: &Path) -> anyhow::Result<()> {
        fs::write(path, &self.certificate).with_context(|| format!("write {}", path.display()))
    }

    /// Writes a kubeconfig that holds everything needed to be `identity` at `server`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(super) fn write_kubeconfig(&self, path: &Path, server: &str, identity: &Identity) -> anyhow::Result<()> {
        let encode = |text: &str| BASE64_STANDARD.encode(text);
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "e2e",
            "clusters": [{ "name": "e2e", "cluster": {
                "server": server, "certificate-authority-data": encode(&self.certificate) } }],
            "users": [{ "name": "e2e", "user": {
                "client-certificate-data": encode(&identity.certificate), "client-key-data": encode(&identity.key) } }],
            "contexts": [{ "name": "e2e", "context": { "cluster": "e2e", "user": "e2e" } }],
        });
        write_private(path, &config.to_string())
    }
}

// === impl Identity ===

impl Identity {
    /// Writes `NAME.crt` and `NAME.key` into a directory.
    ///
    /// # Errors
    /// A file cannot be written.
    pub(super) fn write(&self, directory: &Path, name: &str) -> anyhow::Result<()> {
        let certificate = directory.join(format!("{name}.crt"));
        fs::write(&certificate, &self.certificate).with_context(|| format!("write {}", certificate.display()))?;
        write_private(&directory.join(format!("{name}.key")), &self.key)
    }
}

fn write_private(path: &Path, text: &str) -> anyhow::Result<()> {
    fs::write(path, text)
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o600)))
        .with_context(|| format!("write {}", path.display()))
}
