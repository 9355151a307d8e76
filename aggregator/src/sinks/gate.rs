//! One sink's pause between tries: all bodies of a sink wait for the same door.

use std::time::Duration;

use parking_lot::Mutex;
use rand::Rng;
use tokio::time::Instant;

/// The door. Open at first; each failure shuts it for longer, a success opens it.
#[derive(Debug)]
pub(crate) struct Gate {
    min: Duration,
    max: Duration,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Grows with each failure that shut the door, so that parallel failures count once.
    round: u64,
    failures: u32,
    opens: Instant,
}

// === impl Gate ===

impl Gate {
    /// The first pause is about `min`; it doubles up to `max`.
    pub(crate) fn new(min: Duration, max: Duration) -> Self {
        Self {
            min,
            max,
            state: Mutex::new(State {
                round: 0,
                failures: 0,
                opens: Instant::now(),
            }),
        }
    }

    /// Waits until the door is open; returns the round for [`Self::shut`].
    pub(crate) async fn pass(&self) -> u64 {
        loop {
            let (opens, round) = {
                let state = self.state.lock();
                (state.opens, state.round)
            };
            if opens <= Instant::now() {
                return round;
            }
            tokio::time::sleep_until(opens).await;
        }
    }

    /// After a failure of an attempt that passed in `round`: shuts for the doubling pause, with jitter between half and
    /// all of it, and for `at_least`. Returns the pause.
    pub(crate) fn shut(&self, round: u64, at_least: Option<Duration>) -> Duration {
        let mut state = self.state.lock();
        let now = Instant::now();
        if state.round == round {
            let full = self.min.saturating_mul(1 << state.failures.min(20)).min(self.max);
            state.opens = now + full.mul_f64(rand::rng().random_range(0.5..=1.0));
            state.failures = state.failures.saturating_add(1);
            state.round += 1;
        }
        if let Some(at_least) = at_least {
            state.opens = state.opens.max(now + at_least);
        }
        state.opens.saturating_duration_since(now)
    }

    /// After a success.
    pub(crate) fn open(&self) {
        let mut state = self.state.lock();
        state.failures = 0;
        state.opens = Instant::now();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn pauses_double_to_the_bound_and_parallel_failures_count_once() {
        let (min, max) = (Duration::from_secs(1), Duration::from_secs(8));
        let gate = Gate::new(min, max);
        for expected in [1, 2, 4, 8, 8, 8] {
            let round = gate.pass().await;
            let pause = gate.shut(round, None);
            let expected = Duration::from_secs(expected);
            assert!(pause >= expected / 2 && pause <= expected, "{pause:?} for {expected:?}");
            assert_eq!(gate.shut(round, None), pause);
        }
        gate.open();
        let round = gate.pass().await;
        assert!(gate.shut(round, None) <= min);
    }

    #[tokio::test(start_paused = true)]
    async fn a_named_wait_is_kept() {
        let gate = Gate::new(Duration::from_millis(1), Duration::from_secs(1));
        let round = gate.pass().await;
        let start = Instant::now();
        assert_eq!(gate.shut(round, Some(Duration::from_secs(90))), Duration::from_secs(90));
        gate.pass().await;
        assert!(start.elapsed() >= Duration::from_secs(90));
    }
}
