//! What a running capture is told, and the beat it keeps. No I/O.

use std::time::{Duration, Instant};

use tokio::sync::watch;

/// Longest time between two drains of the kernel's maps, so that they stay small and names stay fresh.
const DRAIN_PERIOD: Duration = Duration::from_secs(5);

/// What the capture is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Orders {
    /// Collect, and flush once per interval.
    Collect {
        /// Time between two flushes.
        interval: Duration,
    },
    /// Take the programs away, hand on what there is, end.
    Finish(End),
}

impl Orders {
    /// What is to be done now. It is copied out at once: who holds a borrow of the channel's value, as the head of a loop
    /// does through all of its body, keeps the next order from being given.
    #[must_use]
    pub fn now(orders: &watch::Receiver<Self>) -> Self {
        *orders.borrow()
    }
}

/// Why a capture ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The next one starts at once, and takes over the rows that the uplink has no room for.
    Restart,
    /// The plugin is switched off: there is all the time to hand on the rows.
    Off,
    /// The process ends.
    Stop,
}

/// When to drain and when to flush.
#[derive(Debug)]
pub(super) struct Beat {
    interval: Duration,
    next_drain: Instant,
    /// Begin of the running interval.
    begun: Instant,
}

impl Beat {
    pub(super) fn new(interval: Duration, now: Instant) -> Self {
        Self {
            interval,
            next_drain: now + DRAIN_PERIOD.min(interval),
            begun: now,
        }
    }

    /// The running interval gets the new length: it ends at once if it has lasted longer already.
    pub(super) fn set(&mut self, interval: Duration, now: Instant) {
        if interval != self.interval {
            self.interval = interval;
            self.next_drain = self.next_drain.min(now + DRAIN_PERIOD.min(interval));
        }
    }

    /// True once per drain period.
    pub(super) fn drain_due(&mut self, now: Instant) -> bool {
        let due = now >= self.next_drain;
        if due {
            self.next_drain = now + DRAIN_PERIOD.min(self.interval);
        }
        due
    }

    /// True once per interval. A late flush does not move the later ones, a missed one is not made up for.
    pub(super) fn flush_due(&mut self, now: Instant) -> bool {
        let due = now >= self.begun + self.interval;
        while now >= self.begun + self.interval {
            self.begun += self.interval;
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    #[test]
    fn a_late_flush_keeps_the_beat() {
        let start = Instant::now();
        let mut beat = Beat::new(10 * S, start);
        assert!(!beat.flush_due(start + 9 * S));
        assert!(beat.flush_due(start + 13 * S));
        assert!(!beat.flush_due(start + 19 * S));
        assert!(beat.flush_due(start + 20 * S));
        assert!(beat.flush_due(start + 55 * S) && !beat.flush_due(start + 59 * S));
    }

    #[test]
    fn the_running_interval_takes_the_new_length() {
        let start = Instant::now();
        let mut beat = Beat::new(60 * S, start);
        beat.set(2 * S, start + 7 * S);
        assert!(beat.flush_due(start + 7 * S), "it has lasted longer already");
        assert!(!beat.flush_due(start + 7 * S));
        assert!(beat.flush_due(start + 8 * S));
        beat.set(60 * S, start + 9 * S);
        assert!(!beat.flush_due(start + 67 * S) && beat.flush_due(start + 68 * S));
    }

    #[test]
    fn drains_come_at_least_every_five_seconds_and_once_per_interval() {
        let start = Instant::now();
        let mut beat = Beat::new(60 * S, start);
        assert!(!beat.drain_due(start + 4 * S) && beat.drain_due(start + 5 * S));
        beat.set(S, start + 5 * S);
        assert!(beat.drain_due(start + 6 * S) && beat.drain_due(start + 7 * S));
    }
}
