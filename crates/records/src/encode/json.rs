//! JSON lines: one flat object per row, `measurement` and `time` (nanoseconds) first, tags as strings, fields as
//! numbers.
#![expect(clippy::indexing_slicing, reason = "ranges come from the plan that made the blob")]

use super::{
    check,
    plan::{Entry, EntryValue, Kind, Plan, PlanBuilder, Read},
    row::Record,
    text::{Cursor, Value},
};
use crate::column::Type;

/// Keys of the object that are neither tag nor field; a global tag of the same name is left out.
pub(super) const RESERVED: [&str; 2] = ["measurement", "time"];

pub(super) fn plan(measurement: &str, entries: Vec<Entry<'_>>) -> Plan {
    let mut plan = PlanBuilder::default();
    plan.lead(|out| {
        out.extend(b"{\"measurement\":");
        put_quoted(out, measurement);
        out.extend(b",\"time\":");
    });
    plan.read(Read::Time, Kind::Field(Type::Int), |_| {});
    for Entry { key, kind, value } in &entries {
        if RESERVED.contains(key) {
            continue;
        }
        plan.lead(|out| {
            out.push(b',');
            put_quoted(out, key);
            out.push(b':');
        });
        match (kind, value) {
            (_, EntryValue::Constant(value)) => plan.lead(|out| put_quoted(out, value)),
            (Kind::Field(Type::Int | Type::Bool), EntryValue::Read(read)) => plan.read(*read, *kind, |_| {}),
            (Kind::Tag | Kind::Field(Type::Text), EntryValue::Read(read)) => {
                plan.lead(|out| out.push(b'"'));
                plan.read(*read, *kind, |_| {});
                plan.lead(|out| out.push(b'"'));
            }
        }
    }
    plan.lead(|out| out.extend(b"}\n"));
    plan.finish()
}

pub(super) fn encode<R: Record>(plan: &Plan, row: &R, out: &mut Vec<u8>) {
    let mut cursor = Cursor::new(out, plan.budget);
    for op in &plan.ops {
        cursor.bytes(&plan.blob[op.lead.clone()]);
        match op.read.of(row) {
            Value::Text(text) => {
                let text = match op.kind {
                    Kind::Tag => check::clean_value(text),
                    Kind::Field(_) => text.into(),
                };
                // The longest escape, \u00XX, has six bytes.
                cursor.room(text.len() * 6 + plan.budget);
                for byte in text.bytes() {
                    put_byte(&mut cursor, byte);
                }
            }
            Value::Ip(ip) => cursor.ip(ip),
            Value::Unsigned(number) => cursor.unsigned(number),
            Value::Signed(number) => cursor.signed(number),
            Value::Bool(value) => cursor.bool(value),
        }
    }
    cursor.bytes(&plan.blob[plan.tail.clone()]);
    cursor.finish();
}

#[inline]
fn put_byte(cursor: &mut Cursor<'_>, byte: u8) {
    match byte {
        b'"' | b'\\' => cursor.bytes(&[b'\\', byte]),
        0..0x20 => {
            cursor.bytes(b"\\u00");
            for digit in [byte >> 4, byte & 0xf] {
                cursor.byte(b"0123456789abcdef"[usize::from(digit)]);
            }
        }
        _ => cursor.byte(byte),
    }
}

fn put_quoted(out: &mut Vec<u8>, text: &str) {
    let mut cursor = Cursor::new(out, text.len() * 6 + 2);
    cursor.byte(b'"');
    for byte in text.bytes() {
        put_byte(&mut cursor, byte);
    }
    cursor.byte(b'"');
    cursor.finish();
}
