//! Certificates for both ends of the link, and strangers who knock at the aggregator's door without the right ones.

use std::{
    fs,
    io::{self, ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
};

/// HTTP/2's first words and an empty SETTINGS frame: a server that lets the peer in answers with its own SETTINGS.
const HELLO: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(15);

/// A directory with `ca.pem`, and certificate and key of `aggregator`, `agent` (signed by it) and `stranger` (not).
#[derive(Clone, Debug)]
pub struct Certificates(PathBuf);

/// Who knocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// With the agent's certificate.
    Agent,
    /// With no certificate.
    Nobody,
    /// With a certificate of another authority.
    Stranger,
    /// Without TLS.
    Plaintext,
}

/// What the door did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Spoke HTTP/2.
    Served,
    /// Closed, with these words.
    Refused(String),
}

// === impl Certificates ===

impl Certificates {
    /// Makes them in `directory`, valid for `address`.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn make(directory: &Path, address: SocketAddr) -> anyhow::Result<Self> {
        fs::create_dir_all(directory).with_context(|| format!("making {}", directory.display()))?;
        let made = Self(directory.to_owned());
        let host = address.ip().to_string();
        let (ca, issuer) = authority()?;
        made.write("ca.pem", &ca)?;
        let (_, other) = authority()?;
        for (name, issuer) in [("aggregator", &issuer), ("agent", &issuer), ("stranger", &other)] {
            let key = KeyPair::generate().context("making a key")?;
            let cert = CertificateParams::new(vec![host.clone()])
                .and_then(|params| params.signed_by(&key, issuer))
                .with_context(|| format!("making the certificate of {name}"))?;
            made.write(&format!("{name}.pem"), &cert.pem())?;
            made.write(&format!("{name}.key"), &key.serialize_pem())?;
        }
        Ok(made)
    }

    /// Path of a file.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn write(&self, name: &str, text: &str) -> anyhow::Result<()> {
        let path = self.path(name);
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
    }

    /// Knocks at `door` as `peer`.
    ///
    /// # Errors
    /// Nobody listens there, the certificates cannot be read, or there is no answer in time.
    pub fn knock(&self, door: SocketAddr, peer: Peer) -> anyhow::Result<Answer> {
        let mut tcp = TcpStream::connect_timeout(&door, PATIENCE).with_context(|| format!("connecting to {door}"))?;
        tcp.set_read_timeout(Some(PATIENCE))?;
        let answer = if peer == Peer::Plaintext {
            speak(&mut tcp)
        } else {
            let client = ClientConnection::new(self.client(peer)?, ServerName::from(door.ip()))
                .context("making the TLS client")?;
            speak(&mut StreamOwned::new(client, tcp))
        };
        answer.with_context(|| format!("{door} said nothing to {peer:?} within {PATIENCE:?}"))
    }

    fn client(&self, peer: Peer) -> anyhow::Result<Arc<ClientConfig>> {
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&self.path("ca.pem"))? {
            roots.add(certificate).context("trusting the authority")?;
        }
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .context("choosing TLS versions")?
            .with_root_certificates(roots);
        let name = match peer {
            Peer::Agent => Some("agent"),
            Peer::Stranger => Some("stranger"),
            Peer::Nobody | Peer::Plaintext => None,
        };
        let mut config = match name {
            None => builder.with_no_client_auth(),
            Some(name) => {
                let path = self.path(&format!("{name}.key"));
                let key = PrivateKeyDer::from_pem_file(&path).with_context(|| format!("reading {}", path.display()))?;
                builder
                    .with_client_auth_cert(certificates(&self.path(&format!("{name}.pem")))?, key)
                    .with_context(|| format!("using the certificate of {name}"))?
            }
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }
}

fn authority() -> anyhow::Result<(String, Issuer<'static, KeyPair>)> {
    let mut params = CertificateParams::new(Vec::new()).context("making an authority")?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().context("making the authority's key")?;
    let pem = params.self_signed(&key).context("signing the authority")?.pem();
    Ok((pem, Issuer::new(params, key)))
}

fn certificates(path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .with_context(|| format!("reading {}", path.display()))
}

/// Says hello and listens. Any end of the connection is a refusal; only silence is an error.
fn speak(stream: &mut (impl Read + Write)) -> io::Result<Answer> {
    let mut first = [0];
    let answered = stream
        .write_all(HELLO)
        .and_then(|()| stream.flush())
        .and_then(|()| stream.read(&mut first));
    match answered {
        Ok(0) => Ok(Answer::Refused("closed".to_owned())),
        // A TLS server that is spoken to in plaintext answers with an alert, never with a SETTINGS frame.
        Ok(_) if first == [0] => Ok(Answer::Served),
        Ok(_) => Ok(Answer::Refused("answered in another protocol".to_owned())),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Err(error),
        Err(error) => Ok(Answer::Refused(error.to_string())),
    }
}
