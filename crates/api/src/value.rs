//! Values of options: from what a source gives ([`Raw`]) to types, and back.
//!
//! Parsers say what is wrong; what is accepted is said by the option's table row.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::{self, Display},
    net::SocketAddr,
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

use crate::{DatawayUrl, Endpoint, HostPort, HttpRoute, Secret, SubnetLabel, words};

/// A value as a source gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Raw {
    /// One text; lists and maps are split at commas.
    Text(String),
    /// Several texts.
    List(Vec<String>),
    /// Key and value pairs.
    Map(BTreeMap<String, String>),
}

// === impl Raw ===

impl Raw {
    /// The texts in it; a text is split at commas.
    pub(crate) fn into_items(self) -> Vec<String> {
        match self {
            Self::Text(text) => split(&text, &[',']),
            Self::List(items) => items,
            Self::Map(map) => map.into_iter().map(|(key, value)| format!("{key}={value}")).collect(),
        }
    }
}

impl fmt::Display for Raw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => f.write_str(text),
            other => f.write_str(&other.clone().into_items().join(",")),
        }
    }
}

pub(crate) type Parsed<T> = Result<T, String>;

/// One text, trimmed, not empty.
pub(crate) fn text(raw: &Raw) -> Parsed<String> {
    match raw {
        Raw::Text(text) if text.trim().is_empty() => Err("it is empty".into()),
        Raw::Text(text) if text.contains('\0') => Err("it holds a NUL character".into()),
        Raw::Text(text) => Ok(text.trim().to_owned()),
        Raw::List(_) => Err("a list was given where one value is wanted".into()),
        Raw::Map(_) => Err("a table was given where one value is wanted".into()),
    }
}

/// One text, where the empty one stands for "not set".
pub(crate) fn text_or_none(raw: &Raw) -> Parsed<Option<String>> {
    match raw {
        Raw::Text(text) if text.trim().is_empty() => Ok(None),
        raw => text(raw).map(Some),
    }
}

pub(crate) fn path(raw: &Raw) -> Parsed<PathBuf> {
    text(raw).map(PathBuf::from)
}

pub(crate) fn secret(raw: &Raw) -> Parsed<Secret> {
    text(raw).map(Secret::new)
}

/// The forms that Go's `strconv.ParseBool` knows, which the documented collector is configured with.
pub(crate) fn boolean(raw: &Raw) -> Parsed<bool> {
    match text(raw)?.as_str() {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("it is neither true nor false".into()),
    }
}

pub(crate) fn from_str<T: FromStr<Err: Display>>(raw: &Raw) -> Parsed<T> {
    text(raw)?.parse().map_err(|error: T::Err| error.to_string())
}

/// A number of hosts with ports.
pub(crate) fn brokers(raw: &Raw) -> Parsed<Vec<String>> {
    let hosts: Vec<HostPort> = each(raw)?;
    Ok(hosts.iter().map(ToString::to_string).collect())
}

/// An address without anything secret in it.
pub(crate) fn plain_url(raw: &Raw) -> Parsed<String> {
    let text = text(raw)?;
    let url = url::Url::parse(text.trim()).map_err(|error| error.to_string())?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none_or(str::is_empty) {
        return Err("it is no http:// or https:// address".to_owned());
    }
    if !url.username().is_empty() || url.password().is_some() || url.query().is_some() || url.fragment().is_some() {
        return Err("it holds a user, a password or a query".to_owned());
    }
    Ok(text)
}

pub(crate) fn integer<T>(raw: &Raw, min: T, max: T) -> Parsed<T>
where
    T: TryFrom<i128> + Into<i128> + Display + Copy,
{
    let number: i128 = text(raw)?.parse().map_err(|_| "it is not a whole number".to_owned())?;
    if number < min.into() {
        return Err(format!("it is less than {min}"));
    }
    if number > max.into() {
        return Err(format!("it is more than {max}"));
    }
    T::try_from(number).map_err(|_| "it is out of range".to_owned())
}

pub(crate) fn decimal(raw: &Raw, min: f64, max: f64) -> Parsed<f64> {
    let text = text(raw)?;
    // Digits and a point only: `inf`, `nan` and `1e3` are numbers to Rust, not to a reader of the documents.
    if !text.bytes().all(|b| b.is_ascii_digit() || b == b'.' || b == b'-') {
        return Err("it is not a decimal number".into());
    }
    let number: f64 = text.parse().map_err(|_| "it is not a decimal number".to_owned())?;
    if number < min {
        return Err(format!("it is less than {min}"));
    }
    if number > max {
        return Err(format!("it is more than {max}"));
    }
    Ok(number)
}

pub(crate) fn duration(raw: &Raw, min: Duration, max: Duration) -> Parsed<Duration> {
    let text = text(raw)?;
    if text.parse::<f64>().is_ok() {
        return Err("it has no unit".into());
    }
    let value = humantime::parse_duration(&text).map_err(|error| format!("it is not a duration: {error}"))?;
    if value < min {
        return Err(format!("it is less than {}", show_duration(min)));
    }
    if value > max {
        return Err(format!("it is more than {}", show_duration(max)));
    }
    Ok(value)
}

const UNITS: [(&str, u64); 13] = [
    ("B", 1),
    ("K", 1000),
    ("KB", 1000),
    ("M", 1000_u64.pow(2)),
    ("MB", 1000_u64.pow(2)),
    ("G", 1000_u64.pow(3)),
    ("GB", 1000_u64.pow(3)),
    ("T", 1000_u64.pow(4)),
    ("TB", 1000_u64.pow(4)),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
];

/// A number of bytes with its unit, any case: `4GiB`, `100 MB`, `1.5G`.
pub(crate) fn size(raw: &Raw, min: u64, max: u64) -> Parsed<u64> {
    let bytes = parse_size(&text(raw)?)?;
    if bytes < min {
        return Err(format!("it is less than {}", show_size(min)));
    }
    if bytes > max {
        return Err(format!("it is more than {}", show_size(max)));
    }
    Ok(bytes)
}

/// A size per second: `100MiB/s`; the `/s` may be left out.
pub(crate) fn rate(raw: &Raw) -> Parsed<u64> {
    let text = text(raw)?;
    let number = text
        .strip_suffix("/s")
        .or_else(|| text.strip_suffix("/S"))
        .unwrap_or(&text);
    match parse_size(number)? {
        0 => Err("it is zero".into()),
        bytes => Ok(bytes),
    }
}

fn parse_size(text: &str) -> Parsed<u64> {
    let split = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let unit = unit.trim();
    if number.is_empty() {
        return Err("it does not start with a number".into());
    }
    if unit.is_empty() {
        return Err("it has no unit".into());
    }
    let factor = UNITS
        .iter()
        .find(|(name, _)| name.eq_ignore_ascii_case(unit))
        .map(|(_, factor)| *factor)
        .ok_or_else(|| format!("`{unit}` is not a unit of size"))?;
    let too_big = || "it is too big".to_owned();
    // Whole numbers stay exact; only a number with a point goes through floating point.
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(factor).ok_or_else(too_big);
    }
    let bytes = number
        .parse::<f64>()
        .map_err(|_| format!("`{number}` is not a number"))?
        * factor as f64;
    if bytes >= 9.0e15 {
        Err(too_big())
    } else {
        Ok(bytes as u64)
    }
}

pub(crate) fn list(raw: &Raw) -> Parsed<Vec<String>> {
    let items: Vec<String> = match raw {
        Raw::Text(text) => split(text, &[',']),
        Raw::List(items) => items.iter().map(|item| item.trim().to_owned()).collect(),
        Raw::Map(_) => return Err("a table was given where a list is wanted".into()),
    };
    if items.iter().any(String::is_empty) {
        return Err("an item of the list is empty".into());
    }
    let mut seen = BTreeSet::new();
    Ok(items.into_iter().filter(|item| seen.insert(item.clone())).collect())
}

pub(crate) fn word_set<T: FromStr<Err = words::UnknownWord> + Ord>(raw: &Raw) -> Parsed<BTreeSet<T>> {
    each(raw).map(|items: Vec<T>| items.into_iter().collect())
}

/// As [`word_set`], where an empty set must be asked for: by the word `none`.
pub(crate) fn word_set_or_none<T: FromStr<Err = words::UnknownWord> + Ord>(raw: &Raw) -> Parsed<BTreeSet<T>> {
    match list(raw)?.as_slice() {
        [] => Err("none is named".to_owned()),
        [word] if word == "none" => Ok(BTreeSet::new()),
        _ => word_set(raw),
    }
}

pub(crate) fn each<T: FromStr<Err: Display>>(raw: &Raw) -> Parsed<Vec<T>> {
    let mut errors = Vec::new();
    let mut items = Vec::new();
    for (index, item) in list(raw)?.iter().enumerate() {
        match item.parse() {
            Ok(item) => items.push(item),
            Err(error) => errors.push(format!("item {}: {error}", index + 1)),
        }
    }
    if errors.is_empty() {
        Ok(items)
    } else {
        Err(errors.join("; "))
    }
}

/// At most 256 patterns of paths, each of which matches others.
pub(crate) fn routes(raw: &Raw) -> Parsed<Vec<HttpRoute>> {
    let routes: Vec<HttpRoute> = each(raw)?;
    if routes.len() > 256 {
        return Err(format!("it names {} patterns", routes.len()));
    }
    for (number, route) in routes.iter().enumerate() {
        if let Some(first) = routes.iter().take(number).position(|other| other.is_like(route)) {
            let (first, number) = (first + 1, number + 1);
            return Err(format!(
                "item {number}: `{route}` matches the same paths as item {first}"
            ));
        }
    }
    Ok(routes)
}

/// At most 64 names of interfaces, or expressions between slashes.
pub(crate) fn interfaces(raw: &Raw) -> Parsed<Vec<String>> {
    let patterns = list(raw)?;
    if patterns.len() > 64 {
        return Err(format!("it names {} interfaces", patterns.len()));
    }
    for pattern in &patterns {
        let expression = pattern.strip_prefix('/').and_then(|rest| rest.strip_suffix('/'));
        if let Some(Err(error)) = expression.map(regex::Regex::new) {
            let text = error.to_string();
            let why = text.lines().last().unwrap_or_default();
            return Err(format!("`{pattern}` is no expression: {why}"));
        }
        if expression.is_none() && (pattern.len() > 15 || pattern.contains('/')) {
            return Err(format!("`{pattern}` is no name of an interface"));
        }
    }
    Ok(patterns)
}

/// At most 64 names of namespaces, or beginnings of names before a `*`.
pub(crate) fn namespaces(raw: &Raw) -> Parsed<Vec<String>> {
    let patterns = list(raw)?;
    if patterns.len() > 64 {
        return Err(format!("it names {} namespaces", patterns.len()));
    }
    for pattern in &patterns {
        let name = pattern.strip_suffix('*').unwrap_or(pattern);
        let of_a_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if name.len() > 63 || !name.chars().all(of_a_name) {
            return Err(format!("`{pattern}` is no name of a namespace"));
        }
    }
    Ok(patterns)
}

/// At most 1024 named ranges of addresses, each once.
pub(crate) fn subnets(raw: &Raw) -> Parsed<Vec<SubnetLabel>> {
    let labels: Vec<SubnetLabel> = each(raw)?;
    if labels.len() > 1024 {
        return Err(format!("it names {} ranges", labels.len()));
    }
    let mut seen = BTreeMap::new();
    for (number, label) in (1..).zip(&labels) {
        if let Some(first) = seen.insert(label.prefix(), number) {
            return Err(format!("item {number}: `{label}` is the same range as item {first}"));
        }
    }
    Ok(labels)
}

/// At most 64 ports.
pub(crate) fn ports(raw: &Raw) -> Parsed<BTreeSet<u16>> {
    let ports: BTreeSet<u16> = each(raw)?.into_iter().collect();
    if ports.contains(&0) {
        return Err("0 is no port".into());
    }
    if ports.len() > 64 {
        return Err(format!("it names {} ports", ports.len()));
    }
    Ok(ports)
}

pub(crate) fn map(raw: &Raw) -> Parsed<BTreeMap<String, String>> {
    let items = match raw {
        Raw::Map(map) => return Ok(map.clone()),
        Raw::Text(text) => split(text, &[',', ';']),
        Raw::List(items) => items.clone(),
    };
    let mut map = BTreeMap::new();
    for item in items {
        let (key, value) = item
            .split_once('=')
            .ok_or_else(|| format!("`{item}` is not key=value"))?;
        let key = key.trim().to_owned();
        if map.insert(key.clone(), value.trim().to_owned()).is_some() {
            return Err(format!("`{key}` is given twice"));
        }
    }
    Ok(map)
}

pub(crate) fn split(text: &str, separators: &[char]) -> Vec<String> {
    if text.trim().is_empty() {
        return Vec::new();
    }
    text.split(separators).map(|item| item.trim().to_owned()).collect()
}

/// How a typed value is written, so that parsing it gives the same value again; `None` for "not set".
pub(crate) trait Show {
    fn show(&self) -> Option<Raw>;
}

macro_rules! show_by_display {
    ($($type:ty),+) => {
        $(impl Show for $type {
            fn show(&self) -> Option<Raw> {
                Some(Raw::Text(self.to_string()))
            }
        })+
    };
}

show_by_display!(
    bool,
    u16,
    u32,
    u64,
    f64,
    String,
    SocketAddr,
    Endpoint,
    HostPort,
    Secret,
    words::LogFormat,
    words::DatawayEncoding,
    words::FileFormat,
    words::StdoutFormat,
    words::FlowFormat,
    words::FlowLogTypes,
    words::KafkaCompression,
    words::KafkaSasl
);

impl<T: Show> Show for Option<T> {
    fn show(&self) -> Option<Raw> {
        self.as_ref().and_then(Show::show)
    }
}

impl Show for PathBuf {
    fn show(&self) -> Option<Raw> {
        Some(Raw::Text(self.display().to_string()))
    }
}

impl Show for Duration {
    fn show(&self) -> Option<Raw> {
        Some(Raw::Text(show_duration(*self)))
    }
}

impl Show for Bytes {
    fn show(&self) -> Option<Raw> {
        Some(Raw::Text(show_size(self.0)))
    }
}

macro_rules! show_items {
    ($($type:ty),+) => {
        $(impl Show for $type {
            fn show(&self) -> Option<Raw> {
                Some(Raw::List(self.iter().map(ToString::to_string).collect()))
            }
        })+
    };
}

show_items!(
    Vec<String>,
    Vec<DatawayUrl>,
    Vec<HttpRoute>,
    Vec<SubnetLabel>,
    BTreeSet<u16>,
    BTreeSet<words::Plugin>,
    BTreeSet<words::L7Flow>
);

impl Show for BTreeMap<String, String> {
    fn show(&self) -> Option<Raw> {
        Some(Raw::Map(self.clone()))
    }
}

/// A number of bytes (or bytes per second).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

fn show_duration(value: Duration) -> String {
    humantime::format_duration(value).to_string().replace(' ', "")
}

fn show_size(bytes: u64) -> String {
    let unit = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    match unit
        .iter()
        .find(|(_, shift)| bytes > 0 && bytes.trailing_zeros() >= *shift)
    {
        Some((name, shift)) => format!("{}{name}", bytes >> shift),
        None => format!("{bytes}B"),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn raw(text: &str) -> Raw {
        Raw::Text(text.into())
    }

    #[test]
    fn sizes() {
        for (text, want) in [
            ("4GiB", 4 << 30),
            ("4gib", 4 << 30),
            ("100MiB", 100 << 20),
            ("1K", 1000),
            ("2kb", 2000),
            ("3M", 3_000_000),
            ("1.5G", 1_500_000_000),
            ("0.5 KiB", 512),
            ("7B", 7),
            ("1TiB", 1 << 40),
        ] {
            assert_eq!(size(&raw(text), 0, u64::MAX), Ok(want), "{text}");
        }
        for text in [
            "",
            "4",
            "GiB",
            "-1GiB",
            "1.2.3K",
            "4GiBs",
            "99999999999TiB",
            "1e3M",
            "4 Gi B",
            "999999999.5TB",
        ] {
            assert!(size(&raw(text), 0, u64::MAX).is_err(), "{text}");
        }
        assert_eq!(rate(&raw("100MiB/s")), Ok(100 << 20));
        assert_eq!(rate(&raw("100MiB")), Ok(100 << 20));
        assert!(rate(&raw("0B/s")).is_err() && rate(&raw("100MiB/m")).is_err());
    }

    #[test]
    fn durations() {
        let parse = |text| duration(&raw(text), Duration::from_secs(1), Duration::from_secs(3600));
        assert_eq!(parse("1m30s"), Ok(Duration::from_secs(90)));
        assert_eq!(parse("60s"), Ok(Duration::from_secs(60)));
        assert_eq!(parse("1500ms"), Ok(Duration::from_millis(1500)));
        for (text, why) in [
            ("60", "no unit"),
            ("999ms", "less than 1s"),
            ("61m", "more than 1h"),
            ("soon", "not a duration"),
            ("-5s", "not a duration"),
            ("18446744073709551615d", "not a duration"),
        ] {
            assert!(parse(text).unwrap_err().contains(why), "{text}: {:?}", parse(text));
        }
    }

    #[test]
    fn numbers() {
        assert_eq!(integer::<u16>(&raw("65535"), 0, u16::MAX), Ok(u16::MAX));
        assert!(
            integer::<u16>(&raw("65536"), 0, u16::MAX)
                .unwrap_err()
                .contains("more than")
        );
        assert!(
            integer::<u16>(&raw("-1"), 0, u16::MAX)
                .unwrap_err()
                .contains("less than")
        );
        assert!(integer::<u16>(&raw("1.0"), 0, u16::MAX).is_err());
        assert_eq!(decimal(&raw("0.50"), 0.01, 1.0), Ok(0.5));
        for text in ["0.001", "1.01", "nan", "inf", "1e-1", "", "."] {
            assert!(decimal(&raw(text), 0.01, 1.0).is_err(), "{text}");
        }
    }

    #[test]
    fn lists_and_maps() {
        assert_eq!(list(&raw("a, b,a")), Ok(vec!["a".into(), "b".into()]));
        assert_eq!(list(&raw("")), Ok(vec![]));
        assert!(list(&raw("a,,b")).is_err());
        let want = BTreeMap::from([("a".to_owned(), "1=2".to_owned()), ("b".to_owned(), String::new())]);
        assert_eq!(map(&raw("a=1=2;b=")), Ok(want.clone()));
        assert_eq!(map(&Raw::List(vec!["a=1=2".into(), "b=".into()])), Ok(want));
        assert!(map(&raw("a")).is_err() && map(&raw("a=1,a=2")).is_err());
    }
}
