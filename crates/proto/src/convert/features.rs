//! The capability vector of a node.

use std::collections::HashSet;

use records::Str;

use crate::{limits, v1};

/// How well a feature works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureState {
    /// Works as documented.
    On,
    /// Works with a stated limit.
    Degraded,
    /// Does not work.
    Off,
}

/// One feature of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Feature {
    /// `<plugin>/<what>`, unique within its vector.
    pub name: Str,
    /// How well it works.
    pub state: FeatureState,
    /// Why it is not on; empty when it is.
    pub reason: Str,
}

/// What is wrong with a capability vector.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("capabilities.{field}: {why}")]
pub struct FeatureError {
    /// The field.
    pub field: &'static str,
    /// What is wrong.
    pub why: String,
}

/// The message for `features`. What is beyond the protocol's limits is cut: features at the end, names and reasons at
/// theirs.
#[must_use]
pub fn features_to_wire(features: &[Feature]) -> v1::Capabilities {
    let wire = |feature: &Feature| {
        let state = match feature.state {
            FeatureState::On => v1::FeatureState::On,
            FeatureState::Degraded => v1::FeatureState::Degraded,
            FeatureState::Off => v1::FeatureState::Off,
        };
        v1::Feature {
            name: cut(&feature.name, limits::MAX_FEATURE_NAME_BYTES),
            state: state.into(),
            reason: cut(&feature.reason, limits::MAX_FEATURE_REASON_BYTES),
        }
    };
    v1::Capabilities {
        features: features.iter().take(limits::MAX_FEATURES).map(wire).collect(),
    }
}

/// Checks a message.
///
/// # Errors
/// [`FeatureError`] names the field that is out of range.
pub fn features_from_wire(wire: v1::Capabilities) -> Result<Vec<Feature>, FeatureError> {
    let refused = |field, why| Err(FeatureError { field, why });
    let v1::Capabilities { features } = wire;
    if features.len() > limits::MAX_FEATURES {
        let why = format!(
            "{} of them: accepted is at most {}",
            features.len(),
            limits::MAX_FEATURES
        );
        return refused("features", why);
    }
    let mut names = HashSet::with_capacity(features.len());
    let mut out = Vec::with_capacity(features.len());
    for v1::Feature { name, state, reason } in features {
        let state = match v1::FeatureState::try_from(state) {
            Ok(v1::FeatureState::On) => FeatureState::On,
            Ok(v1::FeatureState::Degraded) => FeatureState::Degraded,
            Ok(v1::FeatureState::Off) => FeatureState::Off,
            Ok(v1::FeatureState::Unspecified) | Err(_) => {
                return refused("features.state", format!("{state} is not a state"));
            }
        };
        if name.is_empty() || name.len() > limits::MAX_FEATURE_NAME_BYTES {
            let (len, max) = (name.len(), limits::MAX_FEATURE_NAME_BYTES);
            return refused("features.name", format!("{len} bytes long: accepted is 1 to {max}"));
        }
        if reason.len() > limits::MAX_FEATURE_REASON_BYTES {
            let (len, max) = (reason.len(), limits::MAX_FEATURE_REASON_BYTES);
            return refused(
                "features.reason",
                format!("{len} bytes long: accepted is at most {max}"),
            );
        }
        if !names.insert(name.clone()) {
            return refused("features.name", format!("`{name}` comes twice"));
        }
        out.push(Feature {
            name: name.into(),
            state,
            reason: reason.into(),
        });
    }
    Ok(out)
}

/// The longest start of `text` that fits and ends between characters.
fn cut(text: &str, max: usize) -> String {
    text.get(..text.floor_char_boundary(max)).unwrap_or_default().to_owned()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    fn feature(name: &str, reason: &str) -> v1::Feature {
        v1::Feature {
            name: name.to_owned(),
            state: v1::FeatureState::Off.into(),
            reason: reason.to_owned(),
        }
    }

    fn refusal(features: Vec<v1::Feature>) -> String {
        features_from_wire(v1::Capabilities { features })
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn what_is_out_of_range_is_named() {
        let state = v1::Feature {
            state: 9,
            ..feature("a", "")
        };
        assert_eq!(refusal(vec![state]), "capabilities.features.state: 9 is not a state");
        assert_eq!(
            refusal(vec![feature("", "")]),
            "capabilities.features.name: 0 bytes long: accepted is 1 to 64"
        );
        assert_eq!(
            refusal(vec![feature("a", &"x".repeat(513))]),
            "capabilities.features.reason: 513 bytes long: accepted is at most 512"
        );
        assert_eq!(
            refusal(vec![feature("a", ""), feature("a", "")]),
            "capabilities.features.name: `a` comes twice"
        );
        let many = (0..65).map(|n| feature(&n.to_string(), "")).collect();
        assert_eq!(
            refusal(many),
            "capabilities.features: 65 of them: accepted is at most 64"
        );
    }

    #[test]
    fn what_is_sent_is_always_accepted() {
        // `ß` takes two bytes, so a cut at 64 or 512 bytes after `a` falls into one.
        let long = |n: u32| Feature {
            name: format!("{n:02}{}", "a".repeat(61) + "ßß").into(),
            state: FeatureState::Degraded,
            reason: format!("a{}", "ß".repeat(400)).into(),
        };
        let sent: Vec<_> = (0..70).map(long).collect();
        let heard = features_from_wire(features_to_wire(&sent)).unwrap();
        assert_eq!(heard.len(), 64);
        assert_eq!(&*heard[3].name, "03".to_owned() + &"a".repeat(61));
        assert_eq!(heard[3].reason.len(), 511);
        let short = vec![Feature {
            name: "ebpf-net/udp".into(),
            state: FeatureState::Off,
            reason: "cgroup v2 is not mounted".into(),
        }];
        assert_eq!(features_from_wire(features_to_wire(&short)).unwrap(), short);
    }
}
