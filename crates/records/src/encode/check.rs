//! The checks that every point passes, so that no receiver refuses it.
//!
//! Global tags are checked once, when an encoder is built; texts of a record are checked as they are written, at the
//! cost of one scan when they are clean. Cuts never split a UTF-8 character.

use std::{borrow::Cow, fmt};

use crate::Globals;

/// Most tags of one point.
pub const MAX_TAGS: usize = 256;
/// Longest tag or field key, bytes.
pub const MAX_KEY: usize = 256;
/// Longest tag value, bytes.
pub const MAX_TAG_VALUE: usize = 1024;

/// One change that the checks made to the global tags.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adjustment {
    /// The key as it was given.
    pub key: String,
    /// What happened to it.
    pub kind: AdjustmentKind,
}

/// What the checks did to a global tag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AdjustmentKind {
    /// The key is written as this instead: `.` and line breaks replaced, trailing back-slashes removed, cut.
    KeyChanged(String),
    /// The value was changed: line breaks replaced, trailing back-slashes removed, cut.
    ValueChanged,
    /// Dropped: nothing is left of the key.
    EmptyKey,
    /// Dropped: the same key was given again later.
    Duplicate,
    /// Dropped: the changed key is the key of another tag.
    Collision(String),
    /// Left out of records that have a column of this name; a global tag never replaces it.
    Shadowed,
    /// Dropped: a point can carry only [`MAX_TAGS`] tags.
    Surplus,
}

// === impl Adjustment ===

impl fmt::Display for Adjustment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { key, kind } = self;
        match kind {
            AdjustmentKind::KeyChanged(to) => write!(f, "tag {key:?} is written as {to:?}"),
            AdjustmentKind::ValueChanged => write!(
                f,
                "the value of tag {key:?} was changed: at most {MAX_TAG_VALUE} bytes, no line break, no back-slash at its end"
            ),
            AdjustmentKind::EmptyKey => write!(f, "tag {key:?} dropped: its key is empty"),
            AdjustmentKind::Duplicate => write!(f, "tag {key:?} was given twice: the last one is used"),
            AdjustmentKind::Collision(to) => {
                write!(f, "tag {key:?} dropped: it would be written as {to:?}, which is taken")
            }
            AdjustmentKind::Shadowed => write!(f, "tag {key:?} is left out of records that have a column of this name"),
            AdjustmentKind::Surplus => write!(f, "tag {key:?} dropped: a point can carry at most {MAX_TAGS} tags"),
        }
    }
}

/// Checks the tags of `globals` in order. `reserved` are the columns of the records they will be added to, of which
/// `reserved_tags` are tags.
pub(super) fn clean_globals(
    globals: &Globals,
    reserved: impl Fn(&str) -> bool,
    reserved_tags: usize,
) -> (Vec<(String, String)>, Vec<Adjustment>) {
    let mut adjustments = Vec::new();
    let mut adjust = |key: &str, kind| {
        adjustments.push(Adjustment {
            key: key.to_owned(),
            kind,
        })
    };
    let mut tags: Vec<(String, String)> = Vec::with_capacity(globals.tags.len());
    for (index, (key, value)) in globals.tags.iter().enumerate() {
        if globals.tags.iter().skip(index + 1).any(|(later, _)| later == key) {
            adjust(key, AdjustmentKind::Duplicate);
            continue;
        }
        let clean = clean_key(key);
        if clean.is_empty() {
            adjust(key, AdjustmentKind::EmptyKey);
            continue;
        }
        let taken = tags.iter().any(|(other, _)| *other == clean)
            || (clean != **key && globals.tags.iter().any(|(other, _)| **other == *clean));
        if taken {
            adjust(key, AdjustmentKind::Collision(clean.into_owned()));
            continue;
        }
        if tags.len() + reserved_tags >= MAX_TAGS {
            adjust(key, AdjustmentKind::Surplus);
            continue;
        }
        if clean != **key {
            adjust(key, AdjustmentKind::KeyChanged(clean.clone().into_owned()));
        }
        if reserved(&clean) {
            adjust(key, AdjustmentKind::Shadowed);
        }
        let clean_value = clean_value(value);
        if clean_value != **value {
            adjust(key, AdjustmentKind::ValueChanged);
        }
        tags.push((clean.into_owned(), clean_value.into_owned()));
    }
    (tags, adjustments)
}

/// A key as it may be written.
#[must_use]
pub fn clean_key(key: &str) -> Cow<'_, str> {
    if key.len() <= MAX_KEY && !key.ends_with('\\') && !key.contains(['\n', '.']) {
        return Cow::Borrowed(key);
    }
    let mut key = key.replace('\n', " ").replace('.', "_");
    cut(&mut key, MAX_KEY);
    Cow::Owned(key)
}

/// A tag value as it may be written.
#[inline]
#[must_use]
pub fn clean_value(value: &str) -> Cow<'_, str> {
    // No early exit: the loop over a short text is then a few vector instructions.
    let newline = value.bytes().fold(false, |found, byte| found | (byte == b'\n'));
    if value.len() <= MAX_TAG_VALUE && !newline && !value.ends_with('\\') {
        return Cow::Borrowed(value);
    }
    Cow::Owned(repair_value(value))
}

#[cold]
fn repair_value(value: &str) -> String {
    // Cut first, so that a huge text is not copied whole; the replacement keeps the length.
    let end = value.floor_char_boundary(MAX_TAG_VALUE);
    let mut value = value.get(..end).unwrap_or_default().replace('\n', " ");
    cut(&mut value, MAX_TAG_VALUE);
    value
}

/// Cuts to `max` bytes at a character boundary, then removes trailing back-slashes: before the separator that follows
/// they would escape it.
fn cut(text: &mut String, max: usize) {
    text.truncate(text.floor_char_boundary(max));
    text.truncate(text.trim_end_matches('\\').len());
}
