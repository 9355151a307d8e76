//! DataWay protobuf: `PBPoints { repeated PBPoint arr = 1 }`, one entry per row.
//!
//! Written by hand: lengths are patched in place, so a row is one pass over the buffer and no heap object.
#![expect(clippy::indexing_slicing, reason = "positions come from the cursor that wrote them")]

use super::{
    check,
    plan::{Entry, EntryValue, INLINE_TEXT, Kind, Op, PADDING, Plan, PlanBuilder, Read},
    row::Record,
    text::{Cursor, Value},
};
use crate::column::Type;

// Field numbers and wire types of the schema, as the bytes they make.
const POINTS_ARR: u8 = 0x0a;
const POINT_NAME: u8 = 0x0a;
const POINT_FIELDS: u8 = 0x12;
const POINT_TIME: u8 = 0x18;
const FIELD_KEY: u8 = 0x0a;
const FIELD_I: u8 = 0x10;
const FIELD_B: u8 = 0x28;
const FIELD_S: u8 = 0x5a;
const FIELD_IS_TAG: [u8; 2] = [0x40, 0x01];

/// Constant tags first: they are then one run of ready bytes. The receiver does not care for the order.
pub(super) fn plan(measurement: &str, entries: Vec<Entry<'_>>) -> Plan {
    let mut plan = PlanBuilder::default();
    plan.lead(|out| {
        out.push(POINT_NAME);
        put_text(out, measurement);
        for Entry { key, kind, value } in &entries {
            let EntryValue::Constant(value) = value else { continue };
            let mut field = vec![FIELD_KEY];
            put_text(&mut field, key);
            field.push(FIELD_S);
            put_text(&mut field, value);
            if *kind == Kind::Tag {
                field.extend(FIELD_IS_TAG);
            }
            out.push(POINT_FIELDS);
            put_varint(out, field.len());
            out.extend(field);
        }
    });
    for Entry { key, kind, value } in &entries {
        let EntryValue::Read(read) = value else { continue };
        plan.read(*read, *kind, |out| {
            // Both lengths are patched when the value is known. Column names are far below 128 bytes.
            out.extend([POINT_FIELDS, 0, FIELD_KEY]);
            put_text(out, key);
            match kind {
                Kind::Tag | Kind::Field(Type::Text) => out.extend([FIELD_S, 0]),
                Kind::Field(Type::Int) => out.push(FIELD_I),
                Kind::Field(Type::Bool) => out.push(FIELD_B),
            }
        });
    }
    plan.finish()
}

pub(super) fn encode<R: Record>(plan: &Plan, row: &R, out: &mut Vec<u8>) {
    let start = out.len();
    let mut cursor = Cursor::new(out, plan.budget);
    cursor.bytes(&[POINTS_ARR, 0, 0]);
    for op in &plan.ops {
        if !op.lead.is_empty() {
            cursor.bytes(&plan.blob[op.lead.clone()]);
        }
        put_read(&mut cursor, plan, op, row);
    }
    cursor.byte(POINT_TIME);
    cursor.varint(row.time().cast_unsigned());
    let len = cursor.at - start - 3;
    if (0x80..0x4000).contains(&len) {
        cursor.out[start + 1] = len as u8 | 0x80;
        cursor.out[start + 2] = (len >> 7) as u8;
    } else {
        put_point_len(&mut cursor, start, len);
    }
    cursor.finish();
}

#[inline]
fn put_read<R: Record>(cursor: &mut Cursor<'_>, plan: &Plan, op: &Op, row: &R) {
    let head = cursor.at;
    let key = &plan.blob[op.key.start..];
    match key.first_chunk::<PADDING>() {
        Some(chunk) if op.key.len() <= PADDING => cursor.prefix(chunk, op.key.len()),
        _ => cursor.bytes(&plan.blob[op.key.clone()]),
    }
    if let Read::Counter(counter) = op.read {
        cursor.varint(row.counter(counter).cast_unsigned());
        cursor.out[head + 1] = (cursor.at - head - 2) as u8;
        return;
    }
    let value = cursor.at;
    match op.read.of(row) {
        Value::Text(text) => {
            let text = match op.kind {
                Kind::Tag => check::clean_value(text),
                Kind::Field(_) => text.into(),
            };
            if text.len() > INLINE_TEXT {
                cursor.room(text.len() + plan.budget);
            }
            cursor.bytes(text.as_bytes());
        }
        Value::Ip(ip) => cursor.ip(ip),
        Value::Unsigned(number) => cursor.unsigned(number),
        Value::Signed(number) => cursor.signed(number),
        Value::Bool(set) => {
            cursor.byte(set.into());
            cursor.out[head + 1] = (cursor.at - head - 2) as u8;
            return;
        }
    }
    let value_len = cursor.at - value;
    if op.kind == Kind::Tag {
        cursor.bytes(&FIELD_IS_TAG);
    }
    let field_len = cursor.at - head - 2;
    if field_len < 0x80 {
        cursor.out[value - 1] = value_len as u8;
        cursor.out[head + 1] = field_len as u8;
    } else {
        widen(cursor, head, value, value_len);
    }
}

/// A field whose length needs two bytes: moves what follows the lengths out of the way.
#[cold]
fn widen(cursor: &mut Cursor<'_>, head: usize, value: usize, value_len: usize) {
    replace_len(cursor, value - 1, value_len);
    let field_len = cursor.at - head - 2;
    replace_len(cursor, head + 1, field_len);
}

/// The point's length does not take two bytes.
#[cold]
fn put_point_len(cursor: &mut Cursor<'_>, start: usize, len: usize) {
    cursor.out.copy_within(start + 3..cursor.at, start + 2);
    cursor.at -= 1;
    cursor.out[start + 1] = 0;
    replace_len(cursor, start + 1, len);
}

/// Replaces the one byte at `position` by the varint `len`.
fn replace_len(cursor: &mut Cursor<'_>, position: usize, len: usize) {
    let mut varint = Vec::with_capacity(10);
    put_varint(&mut varint, len);
    cursor.room(varint.len());
    cursor.out.copy_within(position + 1..cursor.at, position + varint.len());
    cursor.out[position..position + varint.len()].copy_from_slice(&varint);
    cursor.at += varint.len() - 1;
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    put_varint(out, text.len());
    out.extend_from_slice(text.as_bytes());
}

fn put_varint(out: &mut Vec<u8>, mut value: usize) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}
