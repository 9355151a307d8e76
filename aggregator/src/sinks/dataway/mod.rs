//! The DataWay destination: `POST /v1/write/<category>?token=…`.
//!
//! What each answer means: 2xx is delivered. 429, 3xx, 5xx, transport errors and timeouts are tried again with growing
//! pauses, not before `Retry-After`. 401 and 403 are tried again too, slowly: a mistyped or expired token is corrected
//! later, and giving up the records meanwhile would lose them all. Other 4xx mean that this body will never be taken.

pub mod endpoint;

use std::{path::Path, time::Duration};

use records::Category;
use reqwest::{
    StatusCode,
    header::{CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, RETRY_AFTER},
};

use super::deliver::{Destination, QueuedBody, Verdict};
use crate::config::DatawayConfig;

/// Bytes of an answer that are read and kept.
const ANSWER_LIMIT: usize = 2048;

/// The HTTP client of one DataWay cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The file of further certificate authorities.
    #[error("{path}: cannot be used as certificate authorities ({why}); give a PEM file")]
    CaFile {
        /// The file.
        path: String,
        /// What failed.
        why: String,
    },
    /// The proxy URL.
    #[error("proxy `{proxy}` cannot be used ({why}); give http://[USER:PASSWORD@]HOST:PORT")]
    Proxy {
        /// The URL without secrets.
        proxy: String,
        /// What failed.
        why: String,
    },
    /// The own certificate.
    #[error("{path}: cannot be used as certificate and key ({why}); give PEM files")]
    Identity {
        /// The file.
        path: String,
        /// What failed.
        why: String,
    },
    /// The rest.
    #[error("HTTP client: {0}")]
    Build(String),
}

/// One DataWay.
#[derive(Debug)]
pub(crate) struct Client {
    http: reqwest::Client,
    config: DatawayConfig,
    network: reqwest::Url,
    logging: reqwest::Url,
}

// === impl Client ===

impl Client {
    /// Prepares the connection pool; connects to nothing.
    pub(crate) fn new(config: DatawayConfig, hostname: &str) -> Result<Self, ClientError> {
        let mut builder = reqwest::Client::builder()
            .user_agent(user_agent(hostname))
            .timeout(config.timeout)
            .connect_timeout(config.timeout)
            .redirect(reqwest::redirect::Policy::none())
            .pool_max_idle_per_host(config.in_flight)
            .pool_idle_timeout(Duration::from_secs(90))
            .tcp_nodelay(true)
            .danger_accept_invalid_certs(config.insecure_tls);
        if let Some(path) = &config.ca_file {
            for certificate in authorities(path)? {
                builder = builder.add_root_certificate(certificate);
            }
        }
        if let Some(proxy) = &config.proxy {
            let refused = |error: reqwest::Error| ClientError::Proxy {
                proxy: telemetry::redact_url(proxy),
                why: telemetry::redact_url(&error.without_url().to_string()),
            };
            builder = builder.proxy(reqwest::Proxy::all(proxy).map_err(refused)?);
        }
        let http = builder
            .build()
            .map_err(|error| ClientError::Build(chain(&error.without_url())))?;
        let [network, logging] = Category::ALL.map(|category| config.endpoint.write_url(category.as_str()));
        Ok(Self {
            http,
            config,
            network,
            logging,
        })
    }

    fn retry_after(&self, headers: &HeaderMap) -> Option<Duration> {
        let text = headers.get(RETRY_AFTER)?.to_str().ok()?;
        let wait = parse_retry_after(text, jiff::Timestamp::now())?;
        Some(wait.min(self.config.retry_after_max))
    }
}

#[async_trait::async_trait]
impl Destination for Client {
    async fn attempt(&self, body: &QueuedBody) -> Verdict {
        let url = match body.meta.category {
            Category::Network => &self.network,
            Category::Logging => &self.logging,
        };
        let mut request = self
            .http
            .post(url.clone())
            .header(CONTENT_TYPE, body.meta.format.content_type())
            .header("X-Points", body.meta.points)
            .header("X-Pkg-Id", body.meta.pkg.to_string());
        if body.meta.gzip {
            request = request.header(CONTENT_ENCODING, "gzip");
        }
        let response = match request.body(body.bytes.clone()).send().await {
            Ok(response) => response,
            Err(error) => {
                let error = error.without_url();
                let kind = if error.is_timeout() {
                    "timeout"
                } else if error.is_connect() {
                    "connect"
                } else {
                    "transport"
                };
                return Verdict::Retry {
                    kind,
                    text: self.config.endpoint.redact(&chain(&error)),
                    at_least: None,
                };
            }
        };
        let status = response.status();
        let after = self.retry_after(response.headers());
        // The answer is read to its end (bounded) in any case: only then can the connection be used again.
        let answer = self.config.endpoint.redact(&read_answer(response).await);
        let retry = |kind, at_least| Verdict::Retry {
            kind,
            text: format!("status {status}: {answer}"),
            at_least,
        };
        match status {
            status if status.is_success() => Verdict::Delivered,
            StatusCode::TOO_MANY_REQUESTS => retry("http_429", after),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Verdict::Retry {
                kind: "unauthorized",
                text: format!(
                    "status {status}: {answer}; check the token for {}, nothing is dropped meanwhile",
                    self.config.endpoint
                ),
                at_least: Some(after.unwrap_or_default().max(self.config.auth_retry)),
            },
            status if status.is_client_error() => Verdict::Refused {
                status: status.as_u16(),
                answer,
            },
            status if status.is_redirection() => retry("http_3xx", after),
            _ => retry("http_5xx", after),
        }
    }
}

/// `ebpf-collector-linux-<arch>/<version>/<hostname>`.
pub(super) fn user_agent(hostname: &str) -> String {
    let hostname: String = hostname.chars().filter(|c| c.is_ascii_graphic()).collect();
    format!(
        "ebpf-collector-linux-{}/{}/{hostname}",
        std::env::consts::ARCH,
        env!("CARGO_PKG_VERSION")
    )
}

pub(super) fn authorities(path: &Path) -> Result<Vec<reqwest::Certificate>, ClientError> {
    let refused = |why: String| ClientError::CaFile {
        path: path.display().to_string(),
        why,
    };
    let pem = std::fs::read(path).map_err(|error| refused(error.to_string()))?;
    let certificates =
        reqwest::Certificate::from_pem_bundle(&pem).map_err(|error| refused(chain(&error.without_url())))?;
    if certificates.is_empty() {
        return Err(refused("no certificate inside".to_owned()));
    }
    Ok(certificates)
}

pub(super) async fn read_answer(mut response: reqwest::Response) -> String {
    let mut bytes = Vec::new();
    while let Ok(Some(chunk)) = response.chunk().await {
        bytes.extend_from_slice(&chunk);
        if bytes.len() >= ANSWER_LIMIT {
            bytes.truncate(ANSWER_LIMIT);
            break;
        }
    }
    String::from_utf8_lossy(&bytes).trim().to_owned()
}

/// An error with its causes; reqwest's own text says little without them.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// Seconds or an HTTP date.
pub(super) fn parse_retry_after(text: &str, now: jiff::Timestamp) -> Option<Duration> {
    let text = text.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let at = jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(text).ok()?;
    Some(Duration::try_from(at.duration_since(now)).unwrap_or_default())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
mod tests {
    use super::{endpoint::Endpoint, *};

    #[test]
    fn retry_after_takes_seconds_and_dates() {
        let now: jiff::Timestamp = "1994-11-06T08:49:00Z".parse().unwrap();
        let parse = |text| parse_retry_after(text, now);
        assert_eq!(parse(" 120 "), Some(Duration::from_secs(120)));
        assert_eq!(parse("Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::from_secs(37)));
        assert_eq!(parse("Sun, 06 Nov 1994 08:48:37 GMT"), Some(Duration::ZERO));
        assert_eq!(parse("soon"), None);
        assert_eq!(parse("-1"), None);
    }

    #[test]
    fn user_agent_is_a_header_value_for_any_host_name() {
        assert!(user_agent("höst name\n").ends_with("/hstname"));
        assert!(user_agent("n1").starts_with("ebpf-collector-linux-"));
    }

    #[test]
    fn unusable_certificates_and_proxies_are_named_without_secrets() {
        let endpoint = Endpoint::parse("http://h?token=t").unwrap();
        let mut config = DatawayConfig::new(endpoint);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.pem");
        std::fs::write(&path, "not a certificate").unwrap();
        config.ca_file = Some(path.clone());
        let text = Client::new(config.clone(), "h").unwrap_err().to_string();
        assert!(text.contains(path.to_str().unwrap()) && text.contains("PEM"), "{text}");
        config.ca_file = None;
        config.proxy = Some("http://user:secret@[::bad".to_owned());
        let text = Client::new(config, "h").unwrap_err().to_string();
        assert!(text.starts_with("proxy `") && !text.contains("secret"), "{text}");
    }
}
