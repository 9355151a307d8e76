//! Bodies to points, independent of the encoders under test: protobuf by a schema written down here and decoded by
//! prost, line protocol by a small parser of its own.

use std::collections::BTreeMap;

use prost::Message as _;
use serde::Serialize;

/// One decoded point.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Point {
    /// Measurement.
    pub name: String,
    /// Nanoseconds since the Unix epoch.
    pub time: i64,
    /// Tags by key.
    pub tags: BTreeMap<String, String>,
    /// Fields by key.
    pub fields: BTreeMap<String, Value>,
}

/// Value of a field.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Value {
    /// Signed integer.
    Int(i64),
    /// Unsigned integer.
    Uint(u64),
    /// Floating point number.
    Float(f64),
    /// Boolean.
    Bool(bool),
    /// Text.
    Text(String),
    /// Bytes.
    Bytes(Vec<u8>),
}

mod pb {
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Points {
        #[prost(message, repeated, tag = "1")]
        pub(super) arr: Vec<Point>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Point {
        #[prost(string, tag = "1")]
        pub(super) name: String,
        #[prost(message, repeated, tag = "2")]
        pub(super) fields: Vec<Field>,
        #[prost(int64, tag = "3")]
        pub(super) time: i64,
        #[prost(message, repeated, tag = "4")]
        pub(super) warns: Vec<Warn>,
        #[prost(message, repeated, tag = "5")]
        pub(super) debugs: Vec<Debug>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Field {
        #[prost(string, tag = "1")]
        pub(super) key: String,
        #[prost(oneof = "Val", tags = "2, 3, 4, 5, 6, 7, 11")]
        pub(super) val: Option<Val>,
        #[prost(bool, tag = "8")]
        pub(super) is_tag: bool,
        #[prost(int32, tag = "9")]
        pub(super) metric_type: i32,
        #[prost(string, tag = "10")]
        pub(super) unit: String,
        #[prost(string, tag = "12")]
        pub(super) description: String,
    }
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub(super) enum Val {
        #[prost(int64, tag = "2")]
        I(i64),
        #[prost(uint64, tag = "3")]
        U(u64),
        #[prost(double, tag = "4")]
        F(f64),
        #[prost(bool, tag = "5")]
        B(bool),
        #[prost(bytes, tag = "6")]
        D(Vec<u8>),
        #[prost(message, tag = "7")]
        A(Any),
        #[prost(string, tag = "11")]
        S(String),
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Any {
        #[prost(string, tag = "1")]
        pub(super) type_url: String,
        #[prost(bytes, tag = "2")]
        pub(super) value: Vec<u8>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Warn {
        #[prost(string, tag = "1")]
        pub(super) kind: String,
        #[prost(string, tag = "2")]
        pub(super) msg: String,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Debug {
        #[prost(string, tag = "1")]
        pub(super) info: String,
    }
}

/// Decodes a `PBPoints` body.
///
/// # Errors
/// What is wrong with it: not the schema, an unknown field, a doubled key, a tag that is no string.
pub(super) fn protobuf(body: &[u8]) -> Result<Vec<Point>, String> {
    let points = pb::Points::decode(body).map_err(|error| format!("protobuf: {error}"))?;
    // Bytes that the schema does not explain, or lengths and numbers not in their shortest form.
    if points.encoded_len() != body.len() {
        return Err(format!(
            "protobuf: {} bytes, but the points explain {}",
            body.len(),
            points.encoded_len()
        ));
    }
    points.arr.into_iter().map(point).collect()
}

fn point(point: pb::Point) -> Result<Point, String> {
    let pb::Point {
        name,
        fields,
        time,
        warns: _,
        debugs: _,
    } = point;
    let mut out = Point {
        name,
        time,
        ..Point::default()
    };
    for pb::Field { key, val, is_tag, .. } in fields {
        let value = match val {
            None => return Err(format!("`{key}` has no value")),
            Some(pb::Val::I(v)) => Value::Int(v),
            Some(pb::Val::U(v)) => Value::Uint(v),
            Some(pb::Val::F(v)) => Value::Float(v),
            Some(pb::Val::B(v)) => Value::Bool(v),
            Some(pb::Val::D(v)) => Value::Bytes(v),
            Some(pb::Val::S(v)) => Value::Text(v),
            Some(pb::Val::A(v)) => return Err(format!("`{key}` has a value of type {}", v.type_url)),
        };
        out.put(key, value, is_tag)?;
    }
    Ok(out)
}

/// Decodes a line-protocol body.
///
/// # Errors
/// What is wrong with which line.
pub(super) fn lines(body: &[u8]) -> Result<Vec<Point>, String> {
    let text = std::str::from_utf8(body).map_err(|error| format!("line protocol: {error}"))?;
    let mut points = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let number = points.len() + 1;
        let mut parser = Parser { rest };
        points.push(
            parser
                .point()
                .map_err(|error| format!("line protocol, point {number}: {error}"))?,
        );
        rest = parser.rest;
    }
    Ok(points)
}

struct Parser<'a> {
    rest: &'a str,
}

// === impl Point ===

impl Point {
    fn put(&mut self, key: String, value: Value, is_tag: bool) -> Result<(), String> {
        if self.tags.contains_key(&key) || self.fields.contains_key(&key) {
            return Err(format!("key `{key}` occurs twice"));
        }
        match (is_tag, value) {
            (true, Value::Text(text)) => drop(self.tags.insert(key, text)),
            (true, other) => return Err(format!("tag `{key}` is no string but {other:?}")),
            (false, value) => drop(self.fields.insert(key, value)),
        }
        Ok(())
    }
}

// === impl Parser ===

impl Parser<'_> {
    fn point(&mut self) -> Result<Point, String> {
        let mut point = Point {
            name: self.word(", ")?,
            ..Point::default()
        };
        if point.name.is_empty() {
            return Err("no measurement".to_owned());
        }
        let mut last = String::new();
        while self.eat(',') {
            let key = self.word(",= ")?;
            self.expect('=')?;
            let value = self.word(",= ")?;
            if key.is_empty() || value.is_empty() {
                return Err(format!("tag `{key}` has an empty key or value"));
            }
            if key < last {
                return Err(format!("tag `{key}` comes after `{last}`: not sorted"));
            }
            last.clone_from(&key);
            point.put(key, Value::Text(value), true)?;
        }
        self.expect(' ')?;
        loop {
            let key = self.word(",= ")?;
            self.expect('=')?;
            let value = self.value().map_err(|error| format!("field `{key}`: {error}"))?;
            point.put(key, value, false)?;
            if !self.eat(',') {
                break;
            }
        }
        self.expect(' ')?;
        let (time, rest) = self.rest.split_once('\n').unwrap_or((self.rest, ""));
        point.time = time.parse().map_err(|_| format!("time `{time}` is no integer"))?;
        self.rest = rest;
        Ok(point)
    }

    fn eat(&mut self, wanted: char) -> bool {
        let rest = self.rest.strip_prefix(wanted);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    fn expect(&mut self, wanted: char) -> Result<(), String> {
        if self.eat(wanted) {
            return Ok(());
        }
        Err(format!(
            "expected {wanted:?} before {:?}",
            self.rest.chars().take(20).collect::<String>()
        ))
    }

    /// An escaped word up to one of `ends` or the end of the line.
    fn word(&mut self, ends: &str) -> Result<String, String> {
        let mut word = String::new();
        let mut chars = self.rest.chars();
        loop {
            let before = chars.as_str();
            match chars.next() {
                Some('\\') if chars.as_str().starts_with([',', ' ', '=']) => word.extend(chars.next()),
                Some(c) if ends.contains(c) => {
                    self.rest = before;
                    return Ok(word);
                }
                Some('\n') | None => return Err(format!("the line ends after {word:?}")),
                Some(c) => word.push(c),
            }
        }
    }

    fn value(&mut self) -> Result<Value, String> {
        if self.eat('"') {
            let mut text = String::new();
            let mut chars = self.rest.chars();
            loop {
                match chars.next() {
                    Some('\\') if chars.as_str().starts_with(['"', '\\']) => text.extend(chars.next()),
                    Some('"') => {
                        self.rest = chars.as_str();
                        return Ok(Value::Text(text));
                    }
                    Some(c) => text.push(c),
                    None => return Err("the string has no end".to_owned()),
                }
            }
        }
        let word = self.word(", ")?;
        let bad = || format!("`{word}` is no value");
        match word.as_str() {
            "true" => return Ok(Value::Bool(true)),
            "false" => return Ok(Value::Bool(false)),
            _ => {}
        }
        if let Some(number) = word.strip_suffix('i') {
            return number.parse().map(Value::Int).map_err(|_| bad());
        }
        if let Some(number) = word.strip_suffix('u') {
            return number.parse().map(Value::Uint).map_err(|_| bad());
        }
        word.parse().map(Value::Float).map_err(|_| bad())
    }
}
