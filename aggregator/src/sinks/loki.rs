//! The Loki destination: `POST /loki/api/v1/push` with the stored body, which is a snappy-compressed push request.
//!
//! What each answer means: 2xx is taken. 429, 5xx, transport errors and timeouts are tried again with growing pauses, not
//! before `Retry-After`; 401 and 403 slowly, as for DataWay. Other 4xx are refusals of entries: those too old or out of
//! order, or of labels beyond a limit. Loki has taken the rest of the body then, so it goes to the dead letters and is not
//! sent again. A body sent twice is stored once: Loki drops an entry of the same stream, time and line.

use reqwest::{
    StatusCode,
    header::{AUTHORIZATION, CONTENT_ENCODING, CONTENT_TYPE, HeaderValue, RETRY_AFTER},
};

use super::{
    dataway::{ClientError, authorities, chain, parse_retry_after, read_answer, user_agent},
    deliver::{Destination, QueuedBody, Verdict},
};
use crate::config::{LokiAuth, LokiConfig};

/// One Loki.
pub(crate) struct LokiClient {
    http: reqwest::Client,
    config: LokiConfig,
    push: reqwest::Url,
    authorization: Option<HeaderValue>,
}

// === impl LokiClient ===

impl LokiClient {
    /// Prepares the connection pool; connects to nothing.
    pub(crate) fn new(config: LokiConfig, hostname: &str) -> Result<Self, ClientError> {
        let mut builder = reqwest::Client::builder()
            .user_agent(user_agent(hostname))
            .timeout(config.timeout)
            .connect_timeout(config.timeout)
            .redirect(reqwest::redirect::Policy::none())
            .tcp_nodelay(true)
            .danger_accept_invalid_certs(config.tls.insecure);
        if let Some(path) = &config.tls.ca {
            for certificate in authorities(path)? {
                builder = builder.add_root_certificate(certificate);
            }
        }
        if let (Some(cert), Some(key)) = (&config.tls.cert, &config.tls.key) {
            let refused = |why: String| ClientError::Identity {
                path: cert.display().to_string(),
                why,
            };
            let mut pem = std::fs::read(cert).map_err(|error| refused(error.to_string()))?;
            pem.push(b'\n');
            pem.extend(std::fs::read(key).map_err(|error| refused(format!("{}: {error}", key.display())))?);
            let identity = reqwest::Identity::from_pem(&pem).map_err(|error| refused(chain(&error.without_url())))?;
            builder = builder.identity(identity);
        }
        let http = builder
            .build()
            .map_err(|error| ClientError::Build(chain(&error.without_url())))?;
        let mut push = config.url.clone();
        let path = push
            .path()
            .trim_end_matches('/')
            .trim_end_matches("/loki/api/v1/push")
            .to_owned();
        push.set_path(&format!("{path}/loki/api/v1/push"));
        let authorization = match &config.auth {
            LokiAuth::None => None,
            LokiAuth::Bearer(token) => Some(format!("Bearer {}", token.expose())),
            LokiAuth::Basic { user, password } => {
                use base64::Engine as _;
                let pair = format!("{user}:{}", password.expose());
                Some(format!(
                    "Basic {}",
                    base64::engine::general_purpose::STANDARD.encode(pair)
                ))
            }
        };
        let header = |text: String| {
            let mut value = HeaderValue::try_from(text)
                .map_err(|_| ClientError::Build("the token has characters that no header takes".to_owned()))?;
            value.set_sensitive(true);
            Ok(value)
        };
        let authorization = authorization.map(header).transpose()?;
        Ok(Self {
            http,
            config,
            push,
            authorization,
        })
    }

    /// The text without what is secret.
    fn redact(&self, text: &str) -> String {
        match &self.config.auth {
            LokiAuth::None => text.to_owned(),
            LokiAuth::Bearer(secret) | LokiAuth::Basic { password: secret, .. } => text.replace(secret.expose(), "***"),
        }
    }
}

#[async_trait::async_trait]
impl Destination for LokiClient {
    async fn attempt(&self, body: &QueuedBody) -> Verdict {
        let mut request = self
            .http
            .post(self.push.clone())
            .header(CONTENT_TYPE, body.meta.format.content_type())
            .header(CONTENT_ENCODING, "snappy");
        if !self.config.tenant.is_empty() {
            request = request.header("X-Scope-OrgID", &self.config.tenant);
        }
        if let Some(authorization) = &self.authorization {
            request = request.header(AUTHORIZATION, authorization.clone());
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
                    text: self.redact(&chain(&error)),
                    at_least: None,
                };
            }
        };
        let status = response.status();
        let after = response
            .headers()
            .get(RETRY_AFTER)
            .and_then(|value| parse_retry_after(value.to_str().ok()?, jiff::Timestamp::now()))
            .map(|wait| wait.min(self.config.retry_after_max));
        let answer = self.redact(&read_answer(response).await);
        let retry = |kind, at_least| Verdict::Retry {
            kind,
            text: format!("status {status}: {answer}"),
            at_least,
        };
        match status {
            status if status.is_success() => Verdict::Delivered,
            StatusCode::TOO_MANY_REQUESTS => retry("http_429", after),
            StatusCode::REQUEST_TIMEOUT => retry("timeout", after),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Verdict::Retry {
                kind: "unauthorized",
                text: format!(
                    "status {status}: {answer}; check tenant, token and password for {}, nothing is dropped meanwhile",
                    self.config.url
                ),
                at_least: Some(after.unwrap_or_default().max(self.config.auth_retry)),
            },
            // The address of something else: corrected later, as a token is.
            StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => retry("no_loki", after),
            status if status.is_client_error() => Verdict::Refused {
                status: status.as_u16(),
                answer,
            },
            status if status.is_redirection() => retry("http_3xx", after),
            _ => retry("http_5xx", after),
        }
    }
}
