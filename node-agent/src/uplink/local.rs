//! Transport to the aggregator inside this process.

use std::sync::Arc;

use aggregator::pipeline::{Accept, BatchId, Delivery};
use records::Str;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{LOG_LIMIT, config::Backoff, window::Window};

pub(super) struct Local {
    pub(super) node: Str,
    pub(super) boot_id: u64,
    pub(super) accept: Arc<dyn Accept>,
    pub(super) backoff: Backoff,
}

impl Local {
    /// Hands over batches in order until the window is finished or `stop` is cancelled.
    pub(super) async fn run(self, window: &Window, stop: &CancellationToken) {
        window.metrics.connects.inc();
        window.metrics.connected.set(1);
        stop.run_until_cancelled(self.hand_over(window)).await;
        window.metrics.connected.set(0);
    }

    async fn hand_over(&self, window: &Window) {
        let (mut done, mut attempt) = (0, 0);
        loop {
            // Only this task takes batches out: the tags are those of the batch.
            let next = window.globals_after(done).zip(window.after(done));
            let Some((globals, (seq, batch))) = next else {
                if window.is_finished() {
                    return;
                }
                window.work.notified().await;
                continue;
            };
            let id = BatchId {
                node: self.node.clone(),
                boot_id: self.boot_id,
                seq,
            };
            let delivery = Delivery {
                id,
                globals,
                batch: (*batch).clone(),
            };
            let asked = Instant::now();
            match self.accept.accept(delivery).await {
                Ok(_) => {
                    window.metrics.ack_seconds.observe(asked.elapsed().as_secs_f64());
                    window.ack(seq);
                    (done, attempt) = (seq, 0);
                }
                Err(error) => {
                    window.metrics.busy.inc();
                    if let Some(suppressed) = LOG_LIMIT.allow() {
                        tracing::warn!(seq, %error, suppressed, "batch refused: kept and tried again");
                    }
                    window.pause(self.backoff.delay(attempt)).await;
                    attempt += 1;
                }
            }
        }
    }
}
