//! The capability vector: what this kernel and these privileges let the agent see, feature by feature, and why not.

use std::fmt;

/// How well a feature works here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Works as documented.
    On,
    /// Works with a stated limit.
    Degraded,
    /// Does not work.
    Off,
}

/// One feature's standing.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Feature {
    /// `<plugin>/<what>`, e.g. `ebpf-net/tcp`.
    pub name: &'static str,
    /// How well it works.
    pub state: State,
    /// The hook in use, empty when off.
    pub hook: String,
    /// Why it is not fully on; empty when on.
    pub reason: String,
}

/// All features, in the order they were probed.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Capabilities {
    /// The features.
    pub features: Vec<Feature>,
}

impl Capabilities {
    /// Records a working feature.
    pub fn on(&mut self, name: &'static str, hook: impl Into<String>) {
        self.features.push(Feature {
            name,
            state: State::On,
            hook: hook.into(),
            reason: String::new(),
        });
    }

    /// Records a feature that works with a limit.
    pub fn degraded(&mut self, name: &'static str, hook: impl Into<String>, reason: impl Into<String>) {
        self.features.push(Feature {
            name,
            state: State::Degraded,
            hook: hook.into(),
            reason: reason.into(),
        });
    }

    /// Records a feature that does not work.
    pub fn off(&mut self, name: &'static str, reason: impl Into<String>) {
        self.features.push(Feature {
            name,
            state: State::Off,
            hook: String::new(),
            reason: reason.into(),
        });
    }

    /// Lowers a feature that was found to work with a limit only.
    pub fn replace_degraded(&mut self, name: &str, reason: impl Into<String>) {
        if let Some(feature) = self.features.iter_mut().find(|f| f.name == name) {
            feature.state = State::Degraded;
            feature.reason = reason.into();
        }
    }

    /// Takes that back.
    pub fn replace_on(&mut self, name: &str) {
        if let Some(feature) = self.features.iter_mut().find(|f| f.name == name) {
            feature.state = State::On;
            feature.reason.clear();
        }
    }

    /// State of one feature; off if it was never probed.
    #[must_use]
    pub fn state(&self, name: &str) -> State {
        self.features
            .iter()
            .find(|f| f.name == name)
            .map_or(State::Off, |f| f.state)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::On => "on",
            Self::Degraded => "degraded",
            Self::Off => "off",
        })
    }
}
