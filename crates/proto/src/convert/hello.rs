//! The first message of a stream.

use std::sync::Arc;

use records::{Globals, Str};

use crate::{PROTOCOL_VERSION, limits, v1};

/// A checked Hello.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Node (host) name, not empty.
    pub node: Str,
    /// Random number drawn at agent start, not 0.
    pub boot_id: u64,
    /// Version of the agent.
    pub agent_version: Str,
    /// Tags of all records.
    pub globals: Arc<Globals>,
}

/// What is wrong with a Hello.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HelloError {
    /// The peer speaks another protocol.
    #[error("hello.protocol_version is {theirs}: this aggregator speaks version {PROTOCOL_VERSION}")]
    Version {
        /// What the peer speaks.
        theirs: u32,
    },
    /// A field is missing or out of range.
    #[error("hello.{field}: {why}")]
    Field {
        /// The field.
        field: &'static str,
        /// What is wrong.
        why: String,
    },
}

impl HelloError {
    /// Reason for counters.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Version { .. } => "hello_version",
            Self::Field { .. } => "hello_field",
        }
    }
}

impl From<&Hello> for v1::Hello {
    fn from(hello: &Hello) -> Self {
        let tag = |(key, value): &(Str, Str)| v1::Tag {
            key: key.to_string(),
            value: value.to_string(),
        };
        Self {
            protocol_version: PROTOCOL_VERSION,
            node: hello.node.to_string(),
            boot_id: hello.boot_id,
            agent_version: hello.agent_version.to_string(),
            tags: hello.globals.tags.iter().map(tag).collect(),
        }
    }
}

impl TryFrom<v1::Hello> for Hello {
    type Error = HelloError;

    fn try_from(wire: v1::Hello) -> Result<Self, HelloError> {
        let v1::Hello {
            protocol_version,
            node,
            boot_id,
            agent_version,
            tags,
        } = wire;
        if protocol_version != PROTOCOL_VERSION {
            return Err(HelloError::Version {
                theirs: protocol_version,
            });
        }
        if boot_id == 0 {
            return Err(HelloError::Field {
                field: "boot_id",
                why: "is 0".to_owned(),
            });
        }
        if tags.len() > limits::MAX_TAGS {
            let why = format!("{} tags: accepted is at most {}", tags.len(), limits::MAX_TAGS);
            return Err(HelloError::Field { field: "tags", why });
        }
        let tags = tags
            .into_iter()
            .map(|v1::Tag { key, value }| Ok((text("tags.key", key, 1)?, text("tags.value", value, 0)?)))
            .collect::<Result<_, HelloError>>()?;
        Ok(Self {
            node: text("node", node, 1)?,
            boot_id,
            agent_version: text("agent_version", agent_version, 0)?,
            globals: Arc::new(Globals { tags }),
        })
    }
}

fn text(field: &'static str, text: String, min: usize) -> Result<Str, HelloError> {
    if (min..=limits::MAX_STRING_BYTES).contains(&text.len()) {
        return Ok(text.into());
    }
    let why = format!(
        "{} bytes long: accepted is {min} to {}",
        text.len(),
        limits::MAX_STRING_BYTES
    );
    Err(HelloError::Field { field, why })
}
