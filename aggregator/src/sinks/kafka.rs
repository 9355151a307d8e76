//! The Kafka destination: each flow log one message, keyed by its pair of addresses.
//!
//! A body is taken apart by partition, and each part is one batch that all replicas in sync must have (acks = all). What
//! one attempt got through is remembered, so that the next sends the rest alone; an answer that was lost, or a restart in
//! between, sends a part twice. Messages carry the header `pkg_id` (`X-Pkg-Id` of DataWay, and the place in the body), by
//! which a reader tells such a repeat. The partition is chosen as the clients of Kafka itself do (murmur2).

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use chrono::DateTime;
use futures::future::join_all;
use parking_lot::Mutex;
use rskafka::{
    BackoffConfig,
    client::{
        Client, ClientBuilder, Credentials, SaslConfig,
        error::{Error, ProtocolError},
        partition::{Compression, PartitionClient, UnknownTopicHandling},
    },
    record::Record,
};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use tokio::sync::RwLock;

use super::{
    dataway::ClientError,
    deliver::{Destination, QueuedBody, Verdict},
};
use crate::{
    config::{KafkaCompression, KafkaConfig, SaslMechanism, TlsFiles},
    pipeline::flows::frames,
};

/// Status of a dead letter: Kafka has numbers of its own kind, the log's and the letter's are those of HTTP.
const REFUSED: u16 = 400;
/// Bodies whose progress is remembered.
const REMEMBERED: usize = 256;

/// One topic.
pub(crate) struct KafkaClient {
    config: KafkaConfig,
    tls: Option<Arc<rustls::ClientConfig>>,
    topic: RwLock<Option<Arc<Topic>>>,
    /// Partitions that have their part of a body, by its number.
    done: Mutex<HashMap<u64, HashSet<i32>>>,
}

/// A connection to the topic's partitions, in the order of their numbers.
struct Topic {
    partitions: Vec<Arc<PartitionClient>>,
}

/// What went wrong.
struct Failure {
    kind: &'static str,
    text: String,
    slowly: bool,
    /// The broker will never take it.
    final_: bool,
}

// === impl KafkaClient ===

impl KafkaClient {
    /// Reads certificates; connects to nothing.
    pub(crate) fn new(config: KafkaConfig) -> Result<Self, ClientError> {
        let tls = config.tls.as_ref().map(tls_config).transpose()?;
        Ok(Self {
            config,
            tls,
            topic: RwLock::default(),
            done: Mutex::default(),
        })
    }

    async fn connect(&self) -> Result<Arc<Topic>, Failure> {
        let mut connected = self.topic.write().await;
        if let Some(topic) = &*connected {
            return Ok(Arc::clone(topic));
        }
        let mut builder = ClientBuilder::new(self.config.brokers.clone())
            .client_id("ebpf-collector")
            .max_message_size(32 << 20)
            .backoff_config(BackoffConfig {
                init_backoff: Duration::from_millis(50),
                max_backoff: Duration::from_millis(200),
                base: 2.0,
                // The queue tries again; this is for what settles at once. It bounds the pauses, not the attempts between,
                // and must end before the timeout, or what was wrong would not be told.
                deadline: Some((self.config.timeout / 20).min(Duration::from_secs(1))),
            });
        if let Some(tls) = &self.tls {
            builder = builder.tls_config(Arc::clone(tls));
        }
        if let Some(sasl) = &self.config.sasl {
            let credentials = Credentials::new(sasl.user.clone(), sasl.password.expose().to_owned());
            builder = builder.sasl_config(match sasl.mechanism {
                SaslMechanism::Plain => SaslConfig::Plain(credentials),
                SaslMechanism::ScramSha256 => SaslConfig::ScramSha256(credentials),
                SaslMechanism::ScramSha512 => SaslConfig::ScramSha512(credentials),
            });
        }
        let client = builder.build().await.map_err(|error| self.failure(&error))?;
        let topic = Arc::new(self.partitions(&client).await?);
        *connected = Some(Arc::clone(&topic));
        Ok(topic)
    }

    async fn partitions(&self, client: &Client) -> Result<Topic, Failure> {
        let mut numbers = self.listed(client).await?;
        if numbers.is_empty() {
            // Who names a topic in a request makes it, if the brokers are set so. Only then is known how many partitions it
            // has, and with that where a key belongs.
            let topic = self.config.topic.clone();
            client
                .partition_client(topic, 0, UnknownTopicHandling::Retry)
                .await
                .map_err(|error| self.failure(&error))?;
            numbers = self.listed(client).await?;
        }
        if numbers.is_empty() {
            return Err(Failure {
                kind: "no_topic",
                text: format!("the brokers have no topic `{}`, and do not make it", self.config.topic),
                slowly: false,
                final_: false,
            });
        }
        let open = numbers
            .into_iter()
            .map(|number| client.partition_client(self.config.topic.clone(), number, UnknownTopicHandling::Retry));
        let mut partitions = Vec::new();
        for client in join_all(open).await {
            partitions.push(Arc::new(client.map_err(|error| self.failure(&error))?));
        }
        Ok(Topic { partitions })
    }

    /// Numbers of the topic's partitions; none if there is no such topic.
    async fn listed(&self, client: &Client) -> Result<BTreeSet<i32>, Failure> {
        let topics = client.list_topics().await.map_err(|error| self.failure(&error))?;
        let topic = topics.into_iter().find(|topic| topic.name == self.config.topic);
        Ok(topic.map(|topic| topic.partitions).unwrap_or_default())
    }

    async fn produce(&self, body: &QueuedBody) -> Result<(), Failure> {
        let topic = self.connect().await?;
        let raw = snap::raw::Decoder::new()
            .decompress_vec(&body.bytes)
            .map_err(|error| Failure {
                kind: "damaged",
                text: format!("the stored body cannot be read: {error}"),
                slowly: false,
                final_: true,
            })?;
        let done = self.done.lock().get(&body.id).cloned().unwrap_or_default();
        let count = u32::try_from(topic.partitions.len()).unwrap_or(u32::MAX).max(1);
        let mut parts: BTreeMap<usize, Vec<Record>> = BTreeMap::new();
        for (at, frame) in frames(&raw).enumerate() {
            let part = (murmur2(frame.key) & 0x7fff_ffff) % count;
            let id = format!("{}/{at}", body.meta.pkg).into_bytes();
            parts.entry(part as usize).or_default().push(Record {
                key: Some(frame.key.to_vec()),
                value: Some(frame.object.to_vec()),
                headers: [("pkg_id".to_owned(), id)].into(),
                timestamp: DateTime::from_timestamp_millis(frame.unix_ms).unwrap_or_default(),
            });
        }
        let compression = match self.config.compression {
            KafkaCompression::None => Compression::NoCompression,
            KafkaCompression::Gzip => Compression::Gzip,
            KafkaCompression::Snappy => Compression::Snappy,
        };
        let sends = parts.into_iter().filter_map(|(at, records)| {
            let partition = Arc::clone(topic.partitions.get(at)?);
            if done.contains(&partition.partition()) {
                return None;
            }
            Some(async move {
                let result = partition.produce(records, compression).await;
                if result.is_ok() {
                    self.remember(body.id, partition.partition());
                }
                result
            })
        });
        for result in join_all(sends).await {
            result.map_err(|error| self.failure(&error))?;
        }
        Ok(())
    }

    fn remember(&self, body: u64, partition: i32) {
        let mut done = self.done.lock();
        if done.len() >= REMEMBERED && !done.contains_key(&body) {
            done.clear();
        }
        done.entry(body).or_default().insert(partition);
    }

    fn failure(&self, error: &Error) -> Failure {
        let mut text = super::dataway::chain(error);
        if let Some(sasl) = &self.config.sasl
            && !sasl.password.expose().is_empty()
        {
            text = text.replace(sasl.password.expose(), "***");
        }
        let of = |kind| Failure {
            kind,
            text: text.clone(),
            slowly: false,
            final_: false,
        };
        if let Error::ServerError { protocol_error, .. } = error {
            return match protocol_error {
                ProtocolError::TopicAuthorizationFailed
                | ProtocolError::ClusterAuthorizationFailed
                | ProtocolError::SaslAuthenticationFailed => Failure {
                    slowly: true,
                    ..of("unauthorized")
                },
                ProtocolError::UnknownTopicOrPartition => of("no_topic"),
                ProtocolError::MessageTooLarge
                | ProtocolError::RecordListTooLarge
                | ProtocolError::InvalidRecord
                | ProtocolError::InvalidTimestamp => Failure {
                    final_: true,
                    ..of("refused")
                },
                _ => of("broker"),
            };
        }
        let lower = text.to_ascii_lowercase();
        if ["sasl", "authentication", "scram"]
            .iter()
            .any(|word| lower.contains(word))
        {
            return Failure {
                slowly: true,
                ..of("unauthorized")
            };
        }
        match error {
            Error::Connection(_) => of("connect"),
            Error::Timeout => of("timeout"),
            Error::RetryFailed(_) if lower.contains("unknowntopic") => of("no_topic"),
            Error::RetryFailed(_) if lower.contains("connection refused") || lower.contains("io error") => {
                of("connect")
            }
            Error::RetryFailed(_) => of("broker"),
            _ => of("transport"),
        }
    }
}

#[async_trait::async_trait]
impl Destination for KafkaClient {
    async fn attempt(&self, body: &QueuedBody) -> Verdict {
        let result = tokio::time::timeout(self.config.timeout, self.produce(body)).await;
        let failure = match result {
            Ok(Ok(())) => {
                self.done.lock().remove(&body.id);
                return Verdict::Delivered;
            }
            Ok(Err(failure)) => failure,
            Err(_) => Failure {
                kind: "timeout",
                text: format!("no answer within {}", humantime::format_duration(self.config.timeout)),
                slowly: false,
                final_: false,
            },
        };
        if failure.final_ {
            self.done.lock().remove(&body.id);
            return Verdict::Refused {
                status: REFUSED,
                answer: failure.text,
            };
        }
        // The next try begins with the topic's partitions as they are then.
        *self.topic.write().await = None;
        let at_least = failure.slowly.then_some(self.config.auth_retry);
        let hint = if failure.slowly {
            "; check user, password and rights, nothing is dropped meanwhile"
        } else {
            ""
        };
        Verdict::Retry {
            kind: failure.kind,
            text: format!("{}{hint}", failure.text),
            at_least,
        }
    }
}

fn tls_config(files: &TlsFiles) -> Result<Arc<rustls::ClientConfig>, ClientError> {
    let builder = rustls::ClientConfig::builder();
    let builder = if files.insecure {
        builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyCertificate(
                rustls::crypto::ring::default_provider().signature_verification_algorithms,
            )))
    } else {
        let mut roots = RootCertStore::empty();
        match &files.ca {
            Some(path) => {
                let refused = |why: String| ClientError::CaFile {
                    path: path.display().to_string(),
                    why,
                };
                for certificate in CertificateDer::pem_file_iter(path).map_err(|error| refused(error.to_string()))? {
                    let certificate = certificate.map_err(|error| refused(error.to_string()))?;
                    roots.add(certificate).map_err(|error| refused(error.to_string()))?;
                }
                if roots.is_empty() {
                    return Err(refused("no certificate inside".to_owned()));
                }
            }
            None => {
                roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            }
        }
        builder.with_root_certificates(roots)
    };
    let config = match (&files.cert, &files.key) {
        (Some(cert), Some(key)) => {
            let refused = |why: String| ClientError::Identity {
                path: cert.display().to_string(),
                why,
            };
            let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_file_iter(cert)
                .and_then(Iterator::collect)
                .map_err(|error| refused(error.to_string()))?;
            let key =
                PrivateKeyDer::from_pem_file(key).map_err(|error| refused(format!("{}: {error}", key.display())))?;
            builder
                .with_client_auth_cert(chain, key)
                .map_err(|error| refused(error.to_string()))?
        }
        _ => builder.with_no_client_auth(),
    };
    Ok(Arc::new(config))
}

/// Takes any certificate, as the option for it says; signatures are checked all the same.
#[derive(Debug)]
struct AnyCertificate(rustls::crypto::WebPkiSupportedAlgorithms);

impl rustls::client::danger::ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &rustls::pki_types::ServerName<'_>,
        _ocsp_response: &[u8],
        _now: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.supported_schemes()
    }
}

/// The hash by which Kafka's own clients choose a partition.
fn murmur2(data: &[u8]) -> u32 {
    const M: u32 = 0x5bd1_e995;
    let mut hash = 0x9747_b28c ^ u32::try_from(data.len()).unwrap_or(u32::MAX);
    let (words, rest) = data.as_chunks();
    for word in words {
        let mut k = u32::from_le_bytes(*word).wrapping_mul(M);
        k ^= k >> 24;
        hash = hash.wrapping_mul(M) ^ k.wrapping_mul(M);
    }
    if !rest.is_empty() {
        for (at, byte) in rest.iter().enumerate() {
            hash ^= u32::from(*byte) << (8 * at);
        }
        hash = hash.wrapping_mul(M);
    }
    hash ^= hash >> 13;
    hash = hash.wrapping_mul(M);
    hash ^ hash >> 15
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_that_of_kafka() {
        // From the tests of Kafka's own clients.
        let known: [(&str, i32); 6] = [
            ("21", -973_932_308),
            ("foobar", -790_332_482),
            ("a-little-bit-long-string", -985_981_536),
            ("a-little-bit-longer-string", -1_486_304_829),
            ("lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58_897_971),
            ("abc", 479_470_107),
        ];
        for (text, hash) in known {
            assert_eq!(murmur2(text.as_bytes()) as i32, hash, "{text}");
        }
    }
}
