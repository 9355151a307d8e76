//! Address and token of a DataWay. The token never leaves this type except in the request URL.

use std::fmt;

/// Where to send, with the secret token. `Debug` and `Display` show the token as `***`.
#[derive(Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Scheme, host and port with the API path; the query holds everything but the token.
    base: reqwest::Url,
    token: String,
}

/// A DataWay address that cannot be used. Never shows the token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// Not a URL.
    #[error("`{shown}` is not a URL ({why}); accepted is http(s)://HOST[:PORT]?token=TOKEN")]
    NotAUrl {
        /// The text without its query.
        shown: String,
        /// What the parser said.
        why: String,
    },
    /// Scheme is not http or https, or no host.
    #[error("`{shown}` cannot be used; accepted is http(s)://HOST[:PORT]?token=TOKEN")]
    Scheme {
        /// The text without its query.
        shown: String,
    },
    /// No token.
    #[error("`{shown}` has no token; append ?token=TOKEN or name a token file")]
    NoToken {
        /// The text without its query.
        shown: String,
    },
    /// The token has characters that no token has.
    #[error("the token for `{shown}` is not usable: 1 to 256 letters, digits, `_` and `-` are accepted")]
    BadToken {
        /// The text without its query.
        shown: String,
    },
}

// === impl Endpoint ===

impl Endpoint {
    /// Parses `http(s)://HOST[:PORT]?token=TOKEN`. A path is ignored; other query parameters are kept.
    ///
    /// # Errors
    /// [`EndpointError`].
    pub fn parse(text: &str) -> Result<Self, EndpointError> {
        Self::with_token(text, None)
    }

    /// As [`Self::parse`], with the token from elsewhere (a file); it wins over one in the URL.
    ///
    /// # Errors
    /// [`EndpointError`].
    pub fn with_token(text: &str, token: Option<&str>) -> Result<Self, EndpointError> {
        let mut base = reqwest::Url::parse(text.trim()).map_err(|error| EndpointError::NotAUrl {
            shown: shown(text),
            why: error.to_string(),
        })?;
        if !matches!(base.scheme(), "http" | "https") || !base.has_host() {
            return Err(EndpointError::Scheme { shown: shown(text) });
        }
        let mut in_url = None;
        let mut others = Vec::new();
        for (key, value) in base.query_pairs() {
            if key == "token" {
                in_url = Some(value.into_owned());
            } else {
                others.push((key.into_owned(), value.into_owned()));
            }
        }
        let token = token
            .map(|token| token.trim().to_owned())
            .or(in_url)
            .unwrap_or_default();
        if token.is_empty() {
            return Err(EndpointError::NoToken { shown: shown(text) });
        }
        if token.len() > 256
            || !token
                .bytes()
                .all(|c| c.is_ascii_alphanumeric() || c == b'_' || c == b'-')
        {
            return Err(EndpointError::BadToken { shown: shown(text) });
        }
        base.set_query(None);
        base.set_fragment(None);
        base.set_path("");
        if !others.is_empty() {
            base.query_pairs_mut().extend_pairs(&others);
        }
        Ok(Self { base, token })
    }

    /// URL of one category's write path with the token. Never print it.
    #[must_use]
    pub fn write_url(&self, category: &str) -> reqwest::Url {
        let mut url = self.base.clone();
        url.set_path(&format!("/v1/write/{category}"));
        url.query_pairs_mut().append_pair("token", &self.token);
        url
    }

    /// `text` with every occurrence of the token replaced.
    #[must_use]
    pub fn redact(&self, text: &str) -> String {
        text.replace(&self.token, "***")
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}://{}",
            self.base.scheme(),
            self.base.host_str().unwrap_or_default()
        )?;
        match self.base.port() {
            Some(port) => write!(f, ":{port}"),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Endpoint({self}?token=***)")
    }
}

/// The part of a URL text that holds no secret: no query, no user name or password.
fn shown(text: &str) -> String {
    let text = text.trim().split(['?', '#']).next().unwrap_or_default();
    match (text.find("://"), text.rfind('@')) {
        (Some(scheme), Some(at)) if at > scheme => {
            format!(
                "{}{}",
                text.get(..scheme + 3).unwrap_or_default(),
                text.get(at + 1..).unwrap_or_default()
            )
        }
        _ => text.to_owned(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    const TOKEN: &str = "tkn_0123456789abcdef0123456789abcdef";

    #[test]
    fn keeps_host_port_and_other_parameters_and_drops_the_path() {
        let endpoint = Endpoint::parse(&format!("https://openway.example:9528/some/path?token={TOKEN}&to=x")).unwrap();
        assert_eq!(
            endpoint.write_url("network").as_str(),
            format!("https://openway.example:9528/v1/write/network?to=x&token={TOKEN}")
        );
        assert_eq!(endpoint.to_string(), "https://openway.example:9528");
    }

    #[test]
    fn token_shows_nowhere() {
        let endpoint = Endpoint::parse(&format!("http://h?token={TOKEN}")).unwrap();
        assert!(!format!("{endpoint} {endpoint:?}").contains(TOKEN));
        assert_eq!(endpoint.redact(&format!("bad token {TOKEN}!")), "bad token ***!");
        for bad in [
            format!("h?token={TOKEN}"),
            format!("ftp://u:pw@h?token={TOKEN}"),
            format!("http://h?token={TOKEN}%20x"),
        ] {
            let error = Endpoint::parse(&bad).unwrap_err().to_string();
            assert!(!error.contains("tkn_") && !error.contains("pw"), "{error}");
        }
    }

    #[test]
    fn token_file_wins_and_absence_is_named() {
        let endpoint = Endpoint::with_token("http://h?token=old", Some("new\n")).unwrap();
        assert_eq!(endpoint.write_url("network").query(), Some("token=new"));
        assert_eq!(
            Endpoint::parse("http://h").unwrap_err().to_string(),
            "`http://h` has no token; append ?token=TOKEN or name a token file"
        );
    }
}
