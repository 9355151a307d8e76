//! An aggregator that follows its options while it runs: outputs, bounds of the queue, log level, and the token's file.
//!
//! ```text
//! options (fixed, or those of an object) ─┐
//! file with the token, every 2 s ─────────┴▶ AggregatorConfig ▶ Aggregator::reconfigure
//! ```
//! What cannot be used changes nothing, and health says what is wrong. Entry: [`Live::start`], then [`Live::run`].

use std::{sync::Arc, time::Duration};

use api::AgentConfig;
use telemetry::{ComponentHandle, Telemetry, logging};
use tokio::{sync::watch, time};
use tokio_util::sync::CancellationToken;

use crate::{Aggregator, config::AggregatorConfig};

/// How often the file with the token is looked at.
const LOOK: Duration = Duration::from_secs(2);

/// The options, as they change.
pub type Options = watch::Receiver<Arc<AgentConfig>>;

/// A running aggregator and how its settings are made.
pub struct Live<B> {
    /// The aggregator.
    pub aggregator: Aggregator,
    build: B,
    started: Arc<AgentConfig>,
    health: ComponentHandle,
}

// === impl Live ===

impl<B: Fn(&AgentConfig) -> anyhow::Result<AggregatorConfig>> Live<B> {
    /// Starts the aggregator that `build` makes of the options. While it cannot be made of options that may change, health
    /// says why, and it is tried again.
    ///
    /// # Errors
    /// When options that stay as they are cannot be used, or the aggregator does not start.
    pub async fn start(build: B, options: &mut Options, telemetry: &Telemetry) -> anyhow::Result<Self> {
        let health = telemetry.health.component("configuration");
        loop {
            let started = Arc::clone(&options.borrow_and_update());
            match build(&started) {
                Ok(config) => {
                    let aggregator = Aggregator::start(config, telemetry, CancellationToken::new()).await?;
                    health.set_ok();
                    return Ok(Self {
                        aggregator,
                        build,
                        started,
                        health,
                    });
                }
                Err(error) if options.has_changed().is_err() => return Err(error),
                Err(error) => health.set_starting(one_line(&error)),
            }
            // The token's file may come later than the object.
            let _ = time::timeout(LOOK, options.changed()).await;
        }
    }

    /// Follows the options for ever. May be dropped at any time: what is queued then waits for the next start.
    pub async fn run(&mut self, options: &mut Options) {
        let mut fixed = false;
        loop {
            tokio::select! {
                changed = options.changed(), if !fixed => fixed = changed.is_err(),
                () = time::sleep(LOOK) => {}
            }
            let now = Arc::clone(&options.borrow_and_update());
            match self.apply(&now).await {
                Ok(()) => self.health.set_ok(),
                Err(error) => self.health.set_degraded(one_line(&error)),
            }
        }
    }

    async fn apply(&mut self, options: &AgentConfig) -> anyhow::Result<()> {
        logging::set_level(&options.log.level)?;
        let config = (self.build)(options)?;
        if self.aggregator.reconfigure(config).await? {
            tracing::info!("Outputs or bounds of the queue changed");
        }
        let later = self.started.at_next_start(options);
        anyhow::ensure!(later.is_empty(), "takes effect at the next start: {}", later.join(", "));
        Ok(())
    }
}

/// Errors of options have a line each.
fn one_line(error: &anyhow::Error) -> String {
    format!("{error:#}").replace('\n', " ")
}
