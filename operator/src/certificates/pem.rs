//! Making and reading single certificates.

use std::time::Duration;

use jiff::Timestamp;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PublicKeyData as _,
};
use x509_parser::{certificate::X509Certificate, extensions::GeneralName, prelude::FromDer as _};

use super::{IssueError, KeyedCertificate, Role};

/// Certificates begin to be valid this much before they are made: clocks of nodes differ.
const BACKDATED: Duration = Duration::from_secs(300);

/// What a certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inspected {
    /// Common name.
    pub name: String,
    /// DNS names it is for.
    pub dns_names: Vec<String>,
    /// Whether it may sign others.
    pub is_ca: bool,
    /// Begin of its life.
    pub not_before: Timestamp,
    /// End of its life.
    pub not_after: Timestamp,
}

// === impl Inspected ===

impl Inspected {
    /// Life left at `now`; none before it begins.
    #[must_use]
    pub fn left(&self, now: Timestamp) -> Duration {
        if now < self.not_before {
            return Duration::ZERO;
        }
        Duration::try_from(self.not_after.duration_since(now)).unwrap_or_default()
    }
}

/// Reads a PEM certificate; none if it is not one.
#[must_use]
pub fn inspect(certificate: &str) -> Option<Inspected> {
    let (_, pem) = x509_parser::pem::parse_x509_pem(certificate.as_bytes()).ok()?;
    let (_, parsed) = X509Certificate::from_der(&pem.contents).ok()?;
    let name = parsed.subject().iter_common_name().next()?.as_str().ok()?.to_owned();
    let alternatives = parsed.subject_alternative_name().ok().flatten();
    let dns_names = alternatives
        .iter()
        .flat_map(|extension| &extension.value.general_names)
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => Some((*name).to_owned()),
            _ => None,
        })
        .collect();
    Some(Inspected {
        name,
        dns_names,
        is_ca: parsed.is_ca(),
        not_before: Timestamp::from_second(parsed.validity().not_before.timestamp()).ok()?,
        not_after: Timestamp::from_second(parsed.validity().not_after.timestamp()).ok()?,
    })
}

/// Whether the key belongs to the certificate.
pub(super) fn matches_key(pair: &KeyedCertificate) -> bool {
    let Ok(key) = KeyPair::from_pem(&pair.key) else {
        return false;
    };
    let Ok((_, pem)) = x509_parser::pem::parse_x509_pem(pair.certificate.as_bytes()) else {
        return false;
    };
    X509Certificate::from_der(&pem.contents)
        .is_ok_and(|(_, parsed)| parsed.public_key().raw == key.subject_public_key_info().as_slice())
}

/// Whether `authority` signed `certificate`.
pub(super) fn is_signed_by(certificate: &str, authority: &str) -> bool {
    let parse = |text: &str| x509_parser::pem::parse_x509_pem(text.as_bytes()).map(|(_, pem)| pem.contents);
    let (Ok(certificate), Ok(authority)) = (parse(certificate), parse(authority)) else {
        return false;
    };
    let (Ok((_, certificate)), Ok((_, authority))) = (
        X509Certificate::from_der(&certificate),
        X509Certificate::from_der(&authority),
    ) else {
        return false;
    };
    certificate.issuer() == authority.subject() && certificate.verify_signature(Some(authority.public_key())).is_ok()
}

/// A new authority.
pub(super) fn authority(now: Timestamp, life: Duration) -> Result<KeyedCertificate, IssueError> {
    let mut params = params(now, life, "authority", &[])?;
    // Two authorities of one object must not share a name: verifiers choose by it.
    let name = format!("ebpf-collector authority {}", now.as_second());
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate().map_err(|source| failed("authority", source))?;
    let certificate = params.self_signed(&key).map_err(|source| failed("authority", source))?;
    Ok(keyed(&certificate, &key))
}

/// A new leaf, signed by `authority`. It does not outlive it.
pub(super) fn leaf(
    role: Role,
    names: &[String],
    authority: &KeyedCertificate,
    now: Timestamp,
    life: Duration,
) -> Result<KeyedCertificate, IssueError> {
    let failed = |source| failed(role.name(), source);
    let left = inspect(&authority.certificate).map_or(life, |it| it.left(now));
    let mut params = params(now, life.min(left), role.name(), names)?;
    params.distinguished_name.push(DnType::CommonName, role.name());
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![match role {
        Role::Aggregator => ExtendedKeyUsagePurpose::ServerAuth,
        Role::Agent | Role::Operator => ExtendedKeyUsagePurpose::ClientAuth,
    }];
    params.use_authority_key_identifier_extension = true;
    let signer = KeyPair::from_pem(&authority.key).map_err(failed)?;
    let issuer = Issuer::from_ca_cert_pem(&authority.certificate, signer).map_err(failed)?;
    let key = KeyPair::generate().map_err(failed)?;
    let certificate = params.signed_by(&key, &issuer).map_err(failed)?;
    Ok(keyed(&certificate, &key))
}

fn params(
    now: Timestamp,
    life: Duration,
    what: &'static str,
    names: &[String],
) -> Result<CertificateParams, IssueError> {
    let mut params = CertificateParams::new(names).map_err(|source| failed(what, source))?;
    // Certificates know seconds from 1970 on; the clock is never before.
    let now = Duration::from_secs(u64::try_from(now.as_second()).unwrap_or_default());
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + now.saturating_sub(BACKDATED);
    params.not_after = epoch + (now + life);
    params.distinguished_name = rcgen::DistinguishedName::new();
    Ok(params)
}

fn keyed(certificate: &rcgen::Certificate, key: &KeyPair) -> KeyedCertificate {
    KeyedCertificate {
        certificate: certificate.pem(),
        key: key.serialize_pem(),
    }
}

const fn failed(what: &'static str, source: rcgen::Error) -> IssueError {
    IssueError { what, source }
}
