//! InfluxDB line protocol as DataWay takes it: tags sorted by key, fields sorted by key, time in nanoseconds last.
//! Tags with an empty value are left out.
#![expect(clippy::indexing_slicing, reason = "ranges come from the plan that made the blob")]

use super::{
    PointTooLarge, check,
    plan::{Entry, EntryValue, Plan, PlanBuilder, Read},
    text::{Cursor, Value},
};
use crate::{Netflow, column::Role, netflow::MEASUREMENT};

/// Longest measurement with tags that receivers accept, bytes.
const MAX_SERIES_KEY: usize = 65_535;

pub(super) fn plan(measurement: &str, mut entries: Vec<Entry<'_>>) -> Plan {
    entries.sort_by_key(|entry| (entry.role == Role::Field, entry.key));
    let mut plan = PlanBuilder::default();
    plan.lead(|out| put_escaped(out, measurement, b", "));
    let mut separator = b' ';
    for Entry { key, role, value } in &entries {
        match (role, value) {
            (Role::Tag, EntryValue::Constant(value)) if value.is_empty() => {}
            (Role::Tag, EntryValue::Constant(value)) => plan.lead(|out| {
                put_tag_key(out, key);
                put_escaped(out, value, b", =");
            }),
            (Role::Tag, EntryValue::Read(read)) => plan.read(*read, |out| put_tag_key(out, key)),
            (Role::Field, EntryValue::Read(read)) => {
                plan.read(*read, |out| {
                    out.push(separator);
                    put_escaped(out, key, b",\" =");
                    out.push(b'=');
                });
                plan.lead(|out| out.push(b'i'));
                separator = b',';
            }
            // No column is a field with a constant value.
            (Role::Field, EntryValue::Constant(_)) => {}
        }
    }
    plan.lead(|out| out.push(b' '));
    plan.read(Read::Time, |_| {});
    plan.lead(|out| out.push(b'\n'));
    plan.finish()
}

pub(super) fn encode(plan: &Plan, row: &Netflow, out: &mut Vec<u8>) -> Result<(), PointTooLarge> {
    let start = out.len();
    let mut series_key = 0;
    let mut cursor = Cursor::new(out, plan.budget);
    for op in &plan.ops {
        cursor.bytes(&plan.blob[op.lead.clone()]);
        if op.first_field {
            series_key = cursor.at - start;
        }
        let key = &plan.blob[op.key.clone()];
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
        }
    }
    cursor.bytes(&plan.blob[plan.tail.clone()]);
    cursor.finish();
    if series_key > MAX_SERIES_KEY {
        out.truncate(start);
        return Err(PointTooLarge {
            measurement: MEASUREMENT,
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
