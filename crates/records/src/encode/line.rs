//! InfluxDB line protocol as DataWay takes it: tags sorted by key, fields sorted by key, time in nanoseconds last.
//! Tags with an empty value are left out.
#![expect(clippy::indexing_slicing, reason = "ranges come from the plan that made the blob")]

use super::{
    PointTooLarge, check,
    plan::{Entry, EntryValue, Kind, Plan, PlanBuilder, Read},
    row::Record,
    text::{Cursor, Value},
};
use crate::column::Type;

/// Longest measurement with tags that receivers accept, bytes.
const MAX_SERIES_KEY: usize = 65_535;

pub(super) fn plan(measurement: &str, mut entries: Vec<Entry<'_>>) -> Plan {
    entries.sort_by_key(|entry| (entry.kind != Kind::Tag, entry.key));
    let mut plan = PlanBuilder::default();
    plan.lead(|out| put_escaped(out, measurement, b", "));
    let mut separator = b' ';
    for Entry { key, kind, value } in &entries {
        let field = |out: &mut Vec<u8>| {
            out.push(separator);
            put_escaped(out, key, b",\" =");
            out.push(b'=');
        };
        match (kind, value) {
            (Kind::Tag, EntryValue::Constant(value)) if value.is_empty() => {}
            (Kind::Tag, EntryValue::Constant(value)) => plan.lead(|out| {
                put_tag_key(out, key);
                put_escaped(out, value, b", =");
            }),
            (Kind::Tag, EntryValue::Read(read)) => plan.read(*read, *kind, |out| put_tag_key(out, key)),
            (Kind::Field(ty), EntryValue::Read(read)) => {
                plan.read(*read, *kind, field);
                if *ty == Type::Int {
                    plan.lead(|out| out.push(b'i'));
                }
                separator = b',';
            }
            (Kind::Field(_), EntryValue::Constant(value)) => {
                plan.lead(|out| {
                    field(out);
                    out.push(b'"');
                    put_field_escaped(out, value);
                    out.push(b'"');
                });
                separator = b',';
            }
        }
    }
    plan.lead(|out| out.push(b' '));
    plan.read(Read::Time, Kind::Field(Type::Int), |_| {});
    plan.lead(|out| out.push(b'\n'));
    plan.finish()
}

pub(super) fn encode<R: Record>(plan: &Plan, row: &R, out: &mut Vec<u8>) -> Result<(), PointTooLarge> {
    let start = out.len();
    let mut series_key = 0;
    let mut cursor = Cursor::new(out, plan.budget);
    for op in &plan.ops {
        cursor.bytes(&plan.blob[op.lead.clone()]);
        if op.first_field {
            series_key = cursor.at - start;
        }
        let key = &plan.blob[op.key.clone()];
        if op.kind == Kind::Field(Type::Text) {
            cursor.bytes(key);
            put_field(&mut cursor, op.read.of(row), plan.budget);
            continue;
        }
        match op.read.of(row) {
            Value::Text("") => {}
            Value::Text(text) => {
                let text = check::clean_value(text);
                if text.is_empty() {
                    continue;
                }
                cursor.bytes(key);
                put_value(&mut cursor, &text, plan.budget);
            }
            Value::Ip(ip) => {
                cursor.bytes(key);
                cursor.ip(ip);
            }
            Value::Unsigned(number) => {
                cursor.bytes(key);
                cursor.unsigned(number);
            }
            Value::Signed(number) => {
                cursor.bytes(key);
                cursor.signed(number);
            }
            Value::Bool(value) => {
                cursor.bytes(key);
                cursor.bool(value);
            }
        }
    }
    cursor.bytes(&plan.blob[plan.tail.clone()]);
    cursor.finish();
    if series_key > MAX_SERIES_KEY {
        out.truncate(start);
        return Err(PointTooLarge {
            measurement: R::MEASUREMENT.name(),
            part: "series key",
            bytes: series_key,
            limit: MAX_SERIES_KEY,
        });
    }
    Ok(())
}

#[inline]
fn put_value(cursor: &mut Cursor<'_>, text: &str, budget: usize) {
    if text.len() * 2 > super::plan::INLINE_TEXT {
        cursor.room(text.len() * 2 + budget);
    }
    // No early exit: a few vector instructions for a short text.
    if !text
        .bytes()
        .fold(false, |found, byte| found | matches!(byte, b',' | b' ' | b'='))
    {
        return cursor.bytes(text.as_bytes());
    }
    for byte in text.bytes() {
        if matches!(byte, b',' | b' ' | b'=') {
            cursor.byte(b'\\');
        }
        cursor.byte(byte);
    }
}

/// A text field, quoted; line breaks stay as they are.
fn put_field(cursor: &mut Cursor<'_>, value: Value<'_>, budget: usize) {
    cursor.byte(b'"');
    match value {
        Value::Text(text) => {
            cursor.room(text.len() * 2 + budget);
            for byte in text.bytes() {
                if matches!(byte, b'"' | b'\\') {
                    cursor.byte(b'\\');
                }
                cursor.byte(byte);
            }
        }
        Value::Ip(ip) => cursor.ip(ip),
        Value::Unsigned(number) => cursor.unsigned(number),
        Value::Signed(number) => cursor.signed(number),
        Value::Bool(value) => cursor.bool(value),
    }
    cursor.byte(b'"');
}

fn put_field_escaped(out: &mut Vec<u8>, text: &str) {
    put_escaped(out, text, b"\"\\");
}

fn put_tag_key(out: &mut Vec<u8>, key: &str) {
    out.push(b',');
    put_escaped(out, key, b", =");
    out.push(b'=');
}

fn put_escaped(out: &mut Vec<u8>, text: &str, special: &[u8]) {
    for byte in text.bytes() {
        if special.contains(&byte) {
            out.push(b'\\');
        }
        out.push(byte);
    }
}
