//! Takes over what changes in the object, while the agent runs. The captures follow the configuration themselves.
//!
//! Entry: [`Live::run`].

use std::sync::Arc;

use api::AgentConfig;
use follow::Followed;
use telemetry::{ComponentHandle, Telemetry, logging};

use super::options::globals;
use crate::uplink::UplinkHandle;

/// The parts that are told of changes.
pub(super) struct Live {
    followed: Followed,
    /// The configuration that the agent was started with.
    started: Arc<AgentConfig>,
    uplink: UplinkHandle,
    health: ComponentHandle,
}

impl Live {
    pub(super) fn new(
        followed: Followed,
        started: Arc<AgentConfig>,
        uplink: UplinkHandle,
        telemetry: &Telemetry,
    ) -> Self {
        Self {
            followed,
            started,
            uplink,
            health: telemetry.health.component("configuration"),
        }
    }

    /// Ends when the object is followed no longer.
    pub(super) async fn run(mut self) {
        loop {
            let generation = *self.followed.generation.borrow_and_update();
            let config = Arc::clone(&self.followed.config.borrow());
            self.apply(&config);
            self.uplink
                .report(|report| report.configuration_generation = generation);
            if self.followed.generation.changed().await.is_err() {
                return;
            }
        }
    }

    fn apply(&self, config: &AgentConfig) {
        self.uplink.set_globals(Arc::new(globals(config)));
        let mut problems = self.started.at_next_start(config);
        if !problems.is_empty() {
            problems = vec![format!("takes effect at the next start: {}", problems.join(", "))];
        }
        if let Err(error) = logging::set_level(&config.log.level) {
            problems.push(error.to_string());
        }
        if problems.is_empty() {
            self.health.set_ok();
        } else {
            self.health.set_degraded(problems.join("; "));
        }
    }
}
