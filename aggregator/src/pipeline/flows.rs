//! Flow logs to bodies: lines for text sinks, keyed frames for Kafka, push requests for Loki.
//!
//! A frame is the key's 32 bytes, the time in milliseconds (8 bytes), the length of the object (4 bytes), both
//! little-endian, and the object. A push request is Loki's own message: streams by labels, in each the entries in the
//! order of their times.

use std::collections::HashMap;

use records::{
    Category, FlowLog,
    flowlog::{FieldSet, FlowFormat, FlowJson, FlowValue, fields::FIELDS},
};

use super::encode::{Encoded, Packed};
use crate::route::{FlowForm, LokiLabels};

/// Bytes of a frame before its object.
const FRAME_HEAD: usize = 32 + 8 + 4;

/// A frame of a body for Kafka.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Frame<'a> {
    pub(crate) key: &'a [u8; 32],
    pub(crate) unix_ms: i64,
    pub(crate) object: &'a [u8],
}

/// Bodies of one form.
pub(super) fn encode(form: &FlowForm, flows: &[&FlowLog], received: i64, workers: usize) -> Encoded {
    if flows.is_empty() {
        return Encoded::default();
    }
    let work = |flows: &[&FlowLog]| match &form.loki {
        None => kafka(form, flows, received),
        Some(labels) => loki(form, labels, flows, received),
    };
    // What fills less than a body per core is not worth a thread.
    let workers = workers.min(flows.len() / 1024).max(1);
    let mut shares = flows.chunks(flows.len().div_ceil(workers));
    std::thread::scope(|scope| {
        let mine = shares.next();
        let others: Vec<_> = shares.map(|share| scope.spawn(move || work(share))).collect();
        let mut encoded = mine.map(work).unwrap_or_default();
        for other in others {
            match other.join() {
                Ok(more) => {
                    encoded.too_large += more.too_large;
                    encoded.bodies.extend(more.bodies);
                }
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        encoded
    })
}

/// Adds flow logs as lines.
pub(super) fn lines(limit: usize, flows: &[&FlowLog], received: i64, encoded: &mut Encoded) {
    let json = FlowJson::new(FlowFormat::Current, FieldSet::NONE);
    let (mut bytes, mut points) = (Vec::new(), 0);
    let flush = |bytes: &mut Vec<u8>, points: &mut u32, encoded: &mut Encoded| {
        if *points > 0 {
            let len = bytes.len();
            encoded
                .bodies
                .push(packed(std::mem::take(bytes), std::mem::take(points), len));
        }
    };
    for flow in flows {
        json.encode_into(flow, received, &mut bytes);
        bytes.push(b'\n');
        points += 1;
        if bytes.len() >= limit {
            flush(&mut bytes, &mut points, encoded);
        }
    }
    flush(&mut bytes, &mut points, encoded);
}

fn kafka(form: &FlowForm, flows: &[&FlowLog], received: i64) -> Encoded {
    let json = FlowJson::new(form.format, FieldSet::NONE);
    let mut encoded = Encoded::default();
    let mut body = Vec::new();
    let mut points = 0;
    for flow in flows {
        let start = body.len();
        body.extend_from_slice(&flow.pair_key());
        body.extend_from_slice(&flow.end_unix_ms.to_le_bytes());
        body.extend_from_slice(&[0; 4]);
        let at = body.len();
        json.encode_into(flow, received, &mut body);
        let len = body.len() - at;
        if len + FRAME_HEAD > form.limit {
            body.truncate(start);
            encoded.too_large += 1;
            continue;
        }
        if let Some(place) = body.get_mut(at - 4..at) {
            place.copy_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
        }
        if body.len() > form.limit {
            let next = body.split_off(start);
            encoded.bodies.push(snappy(&body, points));
            (body, points) = (next, 0);
        }
        points += 1;
    }
    if points > 0 {
        encoded.bodies.push(snappy(&body, points));
    }
    encoded
}

/// The frames of a body, not compressed; ends early where it is damaged.
pub(crate) fn frames(mut body: &[u8]) -> impl Iterator<Item = Frame<'_>> {
    std::iter::from_fn(move || {
        let (key, rest) = body.split_first_chunk()?;
        let (unix_ms, rest) = rest.split_first_chunk()?;
        let (len, rest) = rest.split_first_chunk()?;
        let (object, rest) = rest.split_at_checked(usize::try_from(u32::from_le_bytes(*len)).ok()?)?;
        body = rest;
        Some(Frame {
            key,
            unix_ms: i64::from_le_bytes(*unix_ms),
            object,
        })
    })
}

/// Entries of one set of labels.
#[derive(Default)]
struct Stream {
    /// Time in milliseconds, and where the line ends in `lines`.
    entries: Vec<(i64, usize)>,
    lines: Vec<u8>,
}

fn loki(form: &FlowForm, labels: &LokiLabels, flows: &[&FlowLog], received: i64) -> Encoded {
    let json = FlowJson::new(form.format, labels.fields);
    let mut encoded = Encoded::default();
    let mut streams: HashMap<Vec<u8>, Stream> = HashMap::new();
    let (mut name, mut line) = (Vec::new(), Vec::new());
    let (mut bytes, mut points) = (0, 0);
    for flow in flows {
        stream_name(labels, form.format, flow, received, &mut name);
        line.clear();
        json.encode_into(flow, received, &mut line);
        let cost = line.len() + 32;
        if cost + name.len() + 16 > form.limit {
            encoded.too_large += 1;
            continue;
        }
        let new = if streams.contains_key(&name) {
            0
        } else {
            name.len() + 16
        };
        if bytes + cost + new > form.limit {
            encoded.bodies.push(snappy(&push_request(&streams), points));
            streams.clear();
            (bytes, points) = (0, 0);
        }
        if !streams.contains_key(&name) {
            bytes += name.len() + 16;
            streams.insert(name.clone(), Stream::default());
        }
        if let Some(stream) = streams.get_mut(&name) {
            stream.lines.extend_from_slice(&line);
            stream.entries.push((flow.end_unix_ms, stream.lines.len()));
        }
        bytes += cost;
        points += 1;
    }
    if points > 0 {
        encoded.bodies.push(snappy(&push_request(&streams), points));
    }
    encoded
}

/// `{app="x", SrcK8S_Namespace="y"}`: labels in the order of their names, none for what the flow does not have.
fn stream_name(labels: &LokiLabels, format: FlowFormat, flow: &FlowLog, received: i64, out: &mut Vec<u8>) {
    out.clear();
    let mut fixed = labels.fixed.iter().peekable();
    let mut put = |name: &str, value: &[u8]| {
        out.extend_from_slice(if out.is_empty() { b"{" } else { b", " });
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(b"=\"");
        for byte in value {
            match byte {
                b'"' | b'\\' => out.extend_from_slice(&[b'\\', *byte]),
                b'\n' => out.extend_from_slice(b"\\n"),
                // No other control character comes in names; Loki would refuse the whole request for one.
                0..0x20 | 0x7f => out.push(b'?'),
                _ => out.push(*byte),
            }
        }
        out.push(b'"');
    };
    let mut text = Vec::with_capacity(64);
    for field in FIELDS
        .iter()
        .filter(|field| labels.fields.has(field.id) && field.ty(format).is_some())
    {
        while let Some((name, value)) = fixed.next_if(|(name, _)| name.as_str() < field.name) {
            put(name, value.as_bytes());
        }
        // A static label goes before a field of its name.
        if fixed.peek().is_some_and(|(name, _)| name.as_str() == field.name) {
            continue;
        }
        let value = flow.value(field.id, received);
        if !matches!(value, FlowValue::Absent) {
            text.clear();
            value.plain(&mut text);
            put(field.name, &text);
        }
    }
    for (name, value) in fixed {
        put(name, value.as_bytes());
    }
    if out.is_empty() {
        out.push(b'{');
    }
    out.push(b'}');
}

/// Loki's `PushRequest`.
fn push_request(streams: &HashMap<Vec<u8>, Stream>) -> Vec<u8> {
    let mut out = Vec::new();
    let mut message = Vec::new();
    for (name, stream) in streams {
        message.clear();
        put_bytes(&mut message, 1, name);
        let mut order: Vec<(i64, usize, usize)> = Vec::with_capacity(stream.entries.len());
        let mut start = 0;
        for (unix_ms, end) in &stream.entries {
            order.push((*unix_ms, start, *end));
            start = *end;
        }
        order.sort_unstable();
        for (unix_ms, start, end) in order {
            let line = stream.lines.get(start..end).unwrap_or_default();
            let (seconds, nanos) = (unix_ms.div_euclid(1000), unix_ms.rem_euclid(1000) * 1_000_000);
            let mut time = Vec::with_capacity(20);
            // A negative number would take ten bytes in the same form.
            put_number(&mut time, 1, seconds as u64);
            put_number(&mut time, 2, nanos as u64);
            let mut entry = Vec::with_capacity(line.len() + 40);
            put_bytes(&mut entry, 1, &time);
            put_bytes(&mut entry, 2, line);
            put_bytes(&mut message, 2, &entry);
        }
        put_bytes(&mut out, 1, &message);
    }
    out
}

fn put_number(out: &mut Vec<u8>, field: u8, number: u64) {
    if number != 0 {
        out.push(field << 3);
        prost::encoding::encode_varint(number, out);
    }
}

fn put_bytes(out: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    out.push(field << 3 | 2);
    prost::encoding::encode_varint(bytes.len() as u64, out);
    out.extend_from_slice(bytes);
}

fn snappy(raw: &[u8], points: u32) -> Packed {
    // Fails only above 4 GiB, and bodies are far smaller; an empty body would show at the destination.
    let bytes = snap::raw::Encoder::new().compress_vec(raw).unwrap_or_default();
    packed(bytes, points, raw.len())
}

fn packed(bytes: Vec<u8>, points: u32, raw_len: usize) -> Packed {
    Packed {
        category: Category::Network,
        points,
        raw_len: u32::try_from(raw_len).unwrap_or(u32::MAX),
        gzip: false,
        bytes,
    }
}
