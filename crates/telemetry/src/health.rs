//! Health: each component says how it is; the process is alive and ready by what they all say.
//!
//! A component starts as [`State::Starting`] and reports through its [`ComponentHandle`]. A degraded component still
//! does its main job, so the process stays ready and says what is missing; a failed one makes it unready, and, if the
//! component was declared [fatal](Health::fatal_component), not alive.

use std::{collections::BTreeMap, fmt, sync::Arc};

use parking_lot::RwLock;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, gauge::ConstGauge},
};
use serde::Serialize;

/// All components of one process. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Health {
    components: Arc<RwLock<BTreeMap<String, Component>>>,
}

/// The way one component reports. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ComponentHandle {
    name: Arc<str>,
    health: Health,
}

/// What a component says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Not reported yet.
    Starting,
    /// Does all it should.
    Ok,
    /// Does its main job, but not all of it.
    Degraded,
    /// Does not do its job.
    Failed,
    /// On its way out.
    Stopping,
}

/// One component as shown by `/readyz`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Component {
    /// Its state.
    pub state: State,
    /// Why it is not [`State::Ok`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Whether the process should be restarted when it has failed.
    pub fatal: bool,
}

// === impl Health ===

impl Health {
    /// The component of that name, registered as [`State::Starting`] on first use. Its failure makes the process
    /// unready, not dead.
    #[must_use]
    pub fn component(&self, name: &str) -> ComponentHandle {
        self.register(name, false)
    }

    /// Like [`Health::component`], for a component without which only a restart helps.
    #[must_use]
    pub fn fatal_component(&self, name: &str) -> ComponentHandle {
        self.register(name, true)
    }

    fn register(&self, name: &str, fatal: bool) -> ComponentHandle {
        self.components
            .write()
            .entry(name.to_owned())
            .or_insert(Component {
                state: State::Starting,
                reason: None,
                fatal,
            })
            .fatal |= fatal;
        ComponentHandle {
            name: name.into(),
            health: self.clone(),
        }
    }

    /// All components by name.
    #[must_use]
    pub fn snapshot(&self) -> BTreeMap<String, Component> {
        self.components.read().clone()
    }

    /// False once a fatal component has failed.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        !self
            .components
            .read()
            .values()
            .any(|c| c.fatal && c.state == State::Failed)
    }

    /// True when at least one component is registered and each is [`State::Ok`] or [`State::Degraded`].
    #[must_use]
    pub fn is_ready(&self) -> bool {
        let components = self.components.read();
        !components.is_empty()
            && components
                .values()
                .all(|c| matches!(c.state, State::Ok | State::Degraded))
    }
}

// === impl ComponentHandle ===

impl ComponentHandle {
    /// Reports what is waited for before the job can be done: not ready yet, and nothing has failed. The reason is shown
    /// to users: it must hold no secret.
    pub fn set_starting(&self, waits_for: impl Into<String>) {
        self.set(State::Starting, Some(waits_for.into()));
    }

    /// Reports that all is well.
    pub fn set_ok(&self) {
        self.set(State::Ok, None);
    }

    /// Reports that part of the job is not done, and why. The reason is shown to users: it must hold no secret.
    pub fn set_degraded(&self, reason: impl Into<String>) {
        self.set(State::Degraded, Some(reason.into()));
    }

    /// Reports that the job is not done, and why. The reason is shown to users: it must hold no secret.
    pub fn set_failed(&self, reason: impl Into<String>) {
        self.set(State::Failed, Some(reason.into()));
    }

    /// Reports that the process is stopping: not ready any more, and nothing is wrong.
    pub fn set_stopping(&self) {
        self.set(State::Stopping, None);
    }

    fn set(&self, state: State, reason: Option<String>) {
        let changed = {
            let mut components = self.health.components.write();
            let Some(component) = components.get_mut(&*self.name) else {
                return;
            };
            let changed = component.state != state || component.reason != reason;
            component.state = state;
            component.reason.clone_from(&reason);
            changed
        };
        if !changed {
            return;
        }
        let (component, reason) = (&*self.name, reason.unwrap_or_default());
        match state {
            State::Starting => tracing::info!(component, reason, "component is starting"),
            State::Ok => tracing::info!(component, "component is ok"),
            State::Stopping => tracing::info!(component, "component is stopping"),
            State::Degraded => tracing::warn!(component, reason, "component is degraded"),
            State::Failed => tracing::error!(component, reason, "component has failed"),
        }
    }
}

// === impl State ===

impl State {
    const ALL: [Self; 5] = [Self::Starting, Self::Ok, Self::Degraded, Self::Failed, Self::Stopping];

    /// The state's name as shown in JSON and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Ok => "ok",
            Self::Degraded => "degraded",
            Self::Failed => "failed",
            Self::Stopping => "stopping",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Shows each component's state as metrics, computed at each scrape.
#[derive(Debug)]
pub(crate) struct HealthCollector(pub(crate) Health);

impl Collector for HealthCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let mut family = encoder.encode_descriptor(
            "component_state",
            "1 for the state a component is in, 0 for the others",
            None,
            MetricType::Gauge,
        )?;
        for (name, component) in self.0.snapshot() {
            for state in State::ALL {
                let labels = [("component", name.as_str()), ("state", state.as_str())];
                ConstGauge::new(i64::from(component.state == state)).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    #[test]
    fn ready_when_every_component_does_its_job() {
        let health = Health::default();
        assert!(!health.is_ready(), "nothing registered yet: not ready");
        assert!(health.is_alive());
        let (uplink, capture) = (health.component("uplink"), health.component("capture"));
        uplink.set_ok();
        assert!(!health.is_ready(), "capture has not started");
        capture.set_degraded("no BTF");
        assert!(health.is_ready());
        capture.set_failed("no ring buffer");
        assert!(!health.is_ready());
        assert!(health.is_alive(), "a restart would not help");
        assert_eq!(
            health.snapshot()["capture"],
            Component {
                state: State::Failed,
                reason: Some("no ring buffer".into()),
                fatal: false
            }
        );
        capture.set_ok();
        assert!(health.is_ready());
        assert_eq!(health.snapshot()["capture"].reason, None);
    }

    #[test]
    fn failed_fatal_component_ends_liveness() {
        let health = Health::default();
        let queue = health.fatal_component("queue");
        assert!(health.is_alive());
        queue.set_failed("the writer thread ended");
        assert!(!health.is_alive());
        // A second registration without `fatal` must not take the mark away, nor reset the state.
        let _again = health.component("queue");
        assert!(!health.is_alive());
    }
}
