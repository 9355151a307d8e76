//! Rate-limited logging: a fault that repeats is told once per period, with how often it was left out.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

/// Lets one event through per period and counts the others. Share it by reference, or put it in a `static`.
///
/// ```
/// static LIMIT: ec_telemetry::LogLimit = ec_telemetry::LogLimit::new(std::time::Duration::from_secs(10));
/// if let Some(suppressed) = LIMIT.allow() {
///     tracing::warn!(suppressed, "ring buffer full");
/// }
/// ```
#[derive(Debug)]
pub struct LogLimit {
    period: Duration,
    last: Mutex<Option<Instant>>,
    suppressed: AtomicU64,
}

impl LogLimit {
    /// A limit of one event per `period`.
    #[must_use]
    pub const fn new(period: Duration) -> Self {
        Self {
            period,
            last: Mutex::new(None),
            suppressed: AtomicU64::new(0),
        }
    }

    /// `Some(n)` if the event should be logged now, where `n` events were held back since the last one that was.
    pub fn allow(&self) -> Option<u64> {
        self.allow_at(Instant::now())
    }

    fn allow_at(&self, now: Instant) -> Option<u64> {
        let mut last = self.last.lock();
        if last.is_some_and(|last| now.saturating_duration_since(last) < self.period) {
            self.suppressed.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        *last = Some(now);
        Some(self.suppressed.swap(0, Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_per_period_with_the_count_of_the_others() {
        let limit = LogLimit::new(Duration::from_secs(10));
        let start = Instant::now();
        let at = |seconds| limit.allow_at(start + Duration::from_secs(seconds));
        assert_eq!(at(0), Some(0));
        assert_eq!(at(1), None);
        assert_eq!(at(9), None);
        assert_eq!(at(10), Some(2));
        assert_eq!(at(11), None);
        assert_eq!(at(30), Some(1));
        assert_eq!(at(40), Some(0));
    }
}
