//! The DataWay stub in the cluster, read through the API server: what it decoded, in the order of arrival.

use std::{collections::BTreeMap, net::IpAddr};

use anyhow::Context as _;
use kube::Client;
use serde::Deserialize;

/// Port of the stub's pod.
pub const PORT: u16 = 9529;
/// The token that it lets in.
pub const TOKEN: &str = "tkn_e2e0e2e0e2e0e2e0e2e0e2e0e2e0e2e0";
/// Points per request: answers of about a megabyte.
const PAGE: usize = 1000;

/// One decoded point.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct Row {
    /// Measurement.
    pub name: String,
    /// Nanoseconds since the Unix epoch.
    pub time: i64,
    /// Tags.
    pub tags: BTreeMap<String, String>,
    /// Fields.
    pub fields: BTreeMap<String, Field>,
}

/// What a field holds.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(untagged)]
pub enum Field {
    /// A flag.
    Flag(bool),
    /// A count.
    Count(i64),
    /// A text.
    Text(String),
}

/// What the stub counted; see `testkit::dataway::Summary`.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Summary {
    /// Points taken, without those of repeated bodies.
    pub points: u64,
    /// Points of bodies that had been taken before: not stored twice.
    pub duplicate_points: u64,
    /// Requests that broke a rule.
    pub violations_total: u64,
    /// The first of them.
    pub violations: Vec<String>,
}

/// Reads the stub from where the last reading ended.
pub struct Stub {
    client: Client,
    namespace: String,
    pod: String,
    next: u64,
    /// Everything read so far.
    pub rows: Vec<Row>,
}

#[derive(Deserialize)]
struct Page {
    next: u64,
    missed: u64,
    points: Vec<Row>,
}

// === impl Row ===

impl Row {
    /// A tag, empty if it is not there.
    #[must_use]
    pub fn tag(&self, key: &str) -> &str {
        self.tags.get(key).map_or("", String::as_str)
    }

    /// A count, zero if it is not there.
    #[must_use]
    pub fn field(&self, key: &str) -> i64 {
        match self.fields.get(key) {
            Some(Field::Count(count)) => *count,
            _ => 0,
        }
    }

    /// A text among the fields, empty if it is not there.
    #[must_use]
    pub fn text(&self, key: &str) -> &str {
        match self.fields.get(key) {
            Some(Field::Text(text)) => text,
            _ => "",
        }
    }

    /// The address of an end, `src` or `dst`.
    #[must_use]
    pub fn address(&self, side: &str) -> Option<IpAddr> {
        self.tag(&format!("{side}_ip")).parse().ok()
    }
}

// === impl Stub ===

impl Stub {
    /// Of the stub that runs in this pod.
    #[must_use]
    pub fn new(client: Client, namespace: &str, pod: &str) -> Self {
        Self {
            client,
            namespace: namespace.to_owned(),
            pod: pod.to_owned(),
            next: 0,
            rows: Vec::new(),
        }
    }

    /// Reads what has come since the last time; tells how many rows that were.
    ///
    /// # Errors
    /// The stub cannot be reached, or it has thrown away points that were not read yet.
    pub async fn read(&mut self) -> anyhow::Result<usize> {
        let before = self.rows.len();
        loop {
            let page: Page = self.get(&format!("page?from={}&limit={PAGE}", self.next)).await?;
            anyhow::ensure!(
                page.missed == 0,
                "the stub kept too few points: {} are gone unread, from {} on",
                page.missed,
                self.next
            );
            self.next = page.next;
            let last = page.points.len() < PAGE;
            self.rows.extend(page.points);
            if last {
                return Ok(self.rows.len() - before);
            }
        }
    }

    /// What the stub counted.
    ///
    /// # Errors
    /// The stub cannot be reached.
    pub async fn summary(&self) -> anyhow::Result<Summary> {
        self.get("summary").await
    }

    async fn get<T: serde::de::DeserializeOwned>(&self, what: &str) -> anyhow::Result<T> {
        let url = format!(
            "/api/v1/namespaces/{}/pods/{}:{PORT}/proxy/_stub/{what}",
            self.namespace, self.pod
        );
        let request = http::Request::get(&url).body(Vec::new())?;
        let text = self
            .client
            .request_text(request)
            .await
            .with_context(|| format!("read {url}"))?;
        serde_json::from_str(&text).with_context(|| format!("understand the answer of {url}"))
    }
}
