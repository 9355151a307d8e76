//! Records to messages and back.
//!
//! [`StreamEncoder`] numbers texts in step with the peer's [`StreamDecoder`]; both live as long as their stream.
//! The decoder trusts nothing: every field is checked, and what it holds is bounded by [`Limits`].

mod decode;
mod encode;
mod features;
mod flowlog;
mod hello;
#[cfg(test)]
mod tests;

pub use decode::{DecodeError, StreamDecoder};
pub use encode::{EncodeError, StreamEncoder, wire_bound};
pub use features::{Feature, FeatureError, FeatureState, features_from_wire, features_to_wire};
pub use hello::{Hello, HelloError};

use crate::{limits, v1};

/// What the aggregator takes on one stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of one message.
    pub max_message_bytes: usize,
    /// Bytes of one text.
    pub max_string_bytes: usize,
    /// Texts held at once.
    pub max_dictionary_entries: usize,
    /// Bytes of all texts held at once.
    pub max_dictionary_bytes: usize,
    /// Batches sent and not yet acknowledged.
    pub max_unacked_batches: usize,
    /// Silence after which a stream is closed, milliseconds.
    pub idle_ms: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_message_bytes: 4 << 20,
            max_string_bytes: limits::MAX_STRING_BYTES,
            max_dictionary_entries: limits::MAX_DICTIONARY_ENTRIES,
            max_dictionary_bytes: limits::MAX_DICTIONARY_BYTES,
            max_unacked_batches: 8,
            idle_ms: 300_000,
        }
    }
}

/// A peer's [`v1::Limits`] are below what the protocol promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("peer's limit `{field}` is {value}, protocol version 1 promises at least {promised}")]
pub struct LimitsError {
    /// Field of [`v1::Limits`].
    pub field: &'static str,
    /// What the peer said.
    pub value: u32,
    /// What it must at least be.
    pub promised: usize,
}

impl From<Limits> for v1::Limits {
    fn from(limits: Limits) -> Self {
        let int = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
        Self {
            max_message_bytes: int(limits.max_message_bytes),
            max_string_bytes: int(limits.max_string_bytes),
            max_dictionary_entries: int(limits.max_dictionary_entries),
            max_dictionary_bytes: int(limits.max_dictionary_bytes),
            max_unacked_batches: int(limits.max_unacked_batches),
            idle_ms: limits.idle_ms,
        }
    }
}

impl TryFrom<v1::Limits> for Limits {
    type Error = LimitsError;

    fn try_from(theirs: v1::Limits) -> Result<Self, LimitsError> {
        let at_least = |field, value: u32, promised: usize| match usize::try_from(value) {
            Ok(size) if size >= promised => Ok(size),
            _ => Err(LimitsError { field, value, promised }),
        };
        Ok(Self {
            max_message_bytes: at_least(
                "max_message_bytes",
                theirs.max_message_bytes,
                limits::MIN_MAX_MESSAGE_BYTES,
            )?,
            max_string_bytes: at_least("max_string_bytes", theirs.max_string_bytes, limits::MAX_STRING_BYTES)?,
            max_dictionary_entries: at_least(
                "max_dictionary_entries",
                theirs.max_dictionary_entries,
                limits::MAX_DICTIONARY_ENTRIES,
            )?,
            max_dictionary_bytes: at_least(
                "max_dictionary_bytes",
                theirs.max_dictionary_bytes,
                limits::MAX_DICTIONARY_BYTES,
            )?,
            max_unacked_batches: at_least("max_unacked_batches", theirs.max_unacked_batches, 1)?,
            idle_ms: theirs.idle_ms,
        })
    }
}
