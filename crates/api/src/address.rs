//! Addresses in options: the aggregator, DataWay servers, `host:port`.

use std::{fmt, str::FromStr};

use url::{Host, Url};

use crate::Secret;

/// Address of a gRPC or HTTP server: scheme, host and port, no path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    url: Url,
}

/// Address of a DataWay server. Its token is kept apart: `Debug` and `Display` never show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatawayUrl {
    url: Url,
    token: Option<Secret>,
}

/// `host:port` without a scheme.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPort {
    host: Host,
    port: u16,
}

fn parse_http(text: &str) -> Result<Url, String> {
    // The parser's own messages do not repeat the text, which may hold a token.
    let url = Url::parse(text).map_err(|error| format!("not a URL: {error}"))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err("the scheme is neither http nor https".into());
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("user and password are not taken from a URL".into());
    }
    if url.fragment().is_some() {
        return Err("a fragment (#...) has no meaning here".into());
    }
    if url.port() == Some(0) {
        return Err("port 0 cannot be connected to".into());
    }
    Ok(url)
}

fn is_loopback(host: Option<Host<&str>>) -> bool {
    match host {
        Some(Host::Ipv4(ip)) => ip.is_loopback(),
        Some(Host::Ipv6(ip)) => ip.is_loopback() || ip.to_ipv4_mapped().is_some_and(|v4| v4.is_loopback()),
        Some(Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
        None => false,
    }
}

// === impl Endpoint ===

impl Endpoint {
    /// Whether the scheme is https.
    #[must_use]
    pub fn is_tls(&self) -> bool {
        self.url.scheme() == "https"
    }

    /// Host name or address; an IPv6 address is in brackets.
    #[must_use]
    pub fn host(&self) -> &str {
        self.url.host_str().unwrap_or_default()
    }

    /// Port, given or by the scheme.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.url.port_or_known_default().unwrap_or_default()
    }

    /// Whether the host is this machine's loopback.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        is_loopback(self.url.host())
    }
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let url = parse_http(text)?;
        if !matches!(url.path(), "" | "/") || url.query().is_some() {
            return Err("a path or query has no meaning here".into());
        }
        Ok(Self { url })
    }
}

impl fmt::Display for Endpoint {
    /// `scheme://host:port`, always with the port.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}:{}", self.url.scheme(), self.host(), self.port())
    }
}

// === impl DatawayUrl ===

impl DatawayUrl {
    /// The address without its token. A path is kept as given; other query parameters too.
    #[must_use]
    pub fn url(&self) -> &Url {
        &self.url
    }

    /// The token, if it was in the URL or was put in by [`DatawayUrl::with_token`].
    #[must_use]
    pub fn token(&self) -> Option<&Secret> {
        self.token.as_ref()
    }

    /// The same server with that token.
    ///
    /// # Errors
    /// When the token is empty or holds characters no token has.
    pub fn with_token(mut self, token: &str) -> Result<Self, String> {
        check_token(token)?;
        self.token = Some(Secret::new(token));
        Ok(self)
    }

    /// The whole URL, with the token as a query parameter: a secret.
    #[must_use]
    pub fn expose(&self) -> Secret {
        let mut url = self.url.clone();
        if let Some(token) = &self.token {
            url.query_pairs_mut().append_pair("token", token.expose());
        }
        Secret::new(url)
    }
}

impl FromStr for DatawayUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut url = parse_http(text)?;
        let (tokens, others): (Vec<_>, Vec<_>) = url
            .query_pairs()
            .into_owned()
            .partition(|(key, _)| key.eq_ignore_ascii_case("token"));
        if tokens.len() > 1 {
            return Err("the URL holds more than one token".into());
        }
        url.set_query(None);
        if !others.is_empty() {
            url.query_pairs_mut().extend_pairs(others);
        }
        let server = Self { url, token: None };
        match tokens.into_iter().next() {
            Some((_, token)) => server.with_token(&token),
            None => Ok(server),
        }
    }
}

impl fmt::Display for DatawayUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut url = self.url.clone();
        if self.token.is_some() {
            url.query_pairs_mut().append_pair("token", "***");
        }
        f.write_str(url.as_str())
    }
}

fn check_token(token: &str) -> Result<(), String> {
    if token.is_empty() {
        return Err("the token is empty".into());
    }
    if !token
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
    {
        return Err("the token holds characters other than letters, digits, `_` and `-`".into());
    }
    Ok(())
}

// === impl HostPort ===

impl HostPort {
    /// Port.
    #[must_use]
    pub const fn port(&self) -> u16 {
        self.port
    }
}

impl FromStr for HostPort {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (host, port) = text.rsplit_once(':').ok_or("there is no port")?;
        let port = match port.parse::<u16>() {
            Ok(0) => return Err("port 0 cannot be connected to".into()),
            Ok(port) => port,
            Err(_) => return Err(format!("`{port}` is not a port")),
        };
        if host.contains(':') && !host.starts_with('[') {
            return Err("an IPv6 address needs brackets".into());
        }
        let host = Host::parse(host).map_err(|error| format!("`{host}` is not a host: {error}"))?;
        Ok(Self { host, port })
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn token_is_kept_apart() {
        let server: DatawayUrl = "https://openway.example/?a=1&token=tkn_0123&b=2".parse().unwrap();
        assert_eq!(server.token().unwrap().expose(), "tkn_0123");
        assert_eq!(server.url().as_str(), "https://openway.example/?a=1&b=2");
        assert_eq!(server.to_string(), "https://openway.example/?a=1&b=2&token=***");
        assert!(!format!("{server:?}").contains("0123"));
        assert_eq!(
            server.expose().expose(),
            "https://openway.example/?a=1&b=2&token=tkn_0123"
        );
        let bare: DatawayUrl = "http://127.0.0.1:9528".parse().unwrap();
        assert_eq!(bare.token(), None);
        assert_eq!(
            bare.with_token("tkn_x").unwrap().expose().expose(),
            "http://127.0.0.1:9528/?token=tkn_x"
        );
    }

    #[test]
    fn refuses_what_cannot_be_meant_and_never_repeats_a_token() {
        for (text, why) in [
            ("ftp://h/?token=tkn_s3cret", "scheme"),
            ("https://u:s3cret@h/", "user"),
            ("https://h/?token=", "empty"),
            ("https://h/?token=<s3cret>", "characters"),
            ("https://h/?token=s3cret&token=s3cret", "more than one"),
            ("https://h/?token=s3cret#x", "fragment"),
            ("https://:80/?token=s3cret", "not a URL"),
            ("s3cret", "not a URL"),
        ] {
            let error = text.parse::<DatawayUrl>().unwrap_err();
            assert!(error.contains(why) && !error.contains("s3cret"), "{text}: {error}");
        }
    }

    #[test]
    fn endpoint_shows_its_port() {
        let show = |text: &str| text.parse::<Endpoint>().map(|endpoint| endpoint.to_string());
        assert_eq!(show("https://agg"), Ok("https://agg:443".into()));
        assert_eq!(show("http://[::1]:4317/"), Ok("http://[::1]:4317".into()));
        assert!(show("http://agg/path").is_err());
        assert!("http://[::1]:1".parse::<Endpoint>().unwrap().is_loopback());
        assert!("http://127.9.0.1:1".parse::<Endpoint>().unwrap().is_loopback());
        assert!("http://localhost:1".parse::<Endpoint>().unwrap().is_loopback());
        assert!(!"http://localhost.example:1".parse::<Endpoint>().unwrap().is_loopback());
    }

    #[test]
    fn host_port_needs_both() {
        for text in ["10.0.0.1:9529", "[::1]:9529", "linker.ns.svc:9529"] {
            assert_eq!(text.parse::<HostPort>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "host",
            "host:",
            "host:0",
            "host:65536",
            "::1:80",
            ":80",
            "a b:80",
            "http://h:80",
        ] {
            assert!(text.parse::<HostPort>().is_err(), "{text}");
        }
    }
}
