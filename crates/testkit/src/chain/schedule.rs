//! What fails when: a pure function of the options, so that a run can be repeated.

use std::time::Duration;

use crate::{dataway::Fault, traffic::rng::Rng};

/// Rounds through all faults take about so long.
const ROUND: Duration = Duration::from_secs(27);
/// A fault lasts at least so long, so that the sender meets it even when it is frozen, killed and away meanwhile: short
/// runs have fewer faults.
const FAULT_MIN: Duration = Duration::from_millis(4500);
/// Longest time that a killed aggregator stays away.
const DOWN_MAX: Duration = Duration::from_secs(1);

/// Time that a frozen aggregator has left: the agent, which flushes every second, sends it something.
const FROZEN: Duration = Duration::from_millis(1500);

/// Something that happens.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// DataWay does this from now on.
    Fault(Fault),
    /// The aggregator gets SIGSTOP: what reaches it now dies with it, unacknowledged.
    Freeze,
    /// The aggregator gets SIGKILL.
    Kill,
    /// The aggregator is started again.
    Restart,
    /// DataWay is gone: connecting is refused.
    Gone,
    /// DataWay is there again.
    Back,
}

/// Something that happens at a time.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// After the traffic's start.
    pub at: Duration,
    /// What.
    pub event: Event,
}

/// What DataWay does in turn during a storm of this length; the last is to work.
#[must_use]
pub fn faults(length: Duration) -> Vec<Fault> {
    let all = [
        Fault::Status {
            status: 503,
            retry_after: None,
        },
        Fault::DropAnswer,
        Fault::Status {
            status: 429,
            retry_after: Some(1),
        },
        // Longer than the sender waits.
        Fault::Hang { seconds: 20.0 },
        Fault::Close,
    ];
    let fitting = usize::try_from(length.as_millis() / FAULT_MIN.as_millis()).unwrap_or(usize::MAX);
    all.into_iter()
        .take(fitting.saturating_sub(1))
        .chain([Fault::None])
        .collect()
}

/// Rounds of [`faults`] over `length`, and `kills` kills: one in each of `kills` equal parts of it, at a random moment.
/// Every other one comes while the aggregator is frozen, if there is time for that.
#[must_use]
pub fn storm(length: Duration, kills: u32, seed: u64) -> Vec<Step> {
    let mut random = Random(Rng::new(seed));
    let mut steps = Vec::new();
    let rounds = u32::try_from(length.as_millis() / ROUND.as_millis())
        .unwrap_or(u32::MAX)
        .max(1);
    let round = length / rounds;
    let faults = faults(length);
    let each = round / u32::try_from(faults.len()).unwrap_or(u32::MAX);
    for start in (0..rounds).map(|index| round * index) {
        for (index, fault) in (0..).zip(&faults) {
            steps.push(Step {
                at: start + each * index + each.mul_f64(random.between(0.0, 0.2)),
                event: Event::Fault(fault.clone()),
            });
        }
    }
    if kills > 0 {
        let part = length / kills;
        for index in 0..kills {
            let at = part * index + part.mul_f64(random.between(0.3, 0.7));
            let down = DOWN_MAX.min(part / 5).mul_f64(random.between(0.0, 1.0));
            if index % 2 == 1 && FROZEN <= part.mul_f64(0.3) {
                steps.push(Step {
                    at: at - FROZEN,
                    event: Event::Freeze,
                });
            }
            steps.push(Step { at, event: Event::Kill });
            steps.push(Step {
                at: at + down,
                event: Event::Restart,
            });
        }
    }
    steps.sort_by_key(|step| step.at);
    steps
}

/// DataWay is gone for `length`, beginning `before` after the start.
#[must_use]
pub fn outage(before: Duration, length: Duration) -> Vec<Step> {
    vec![
        Step {
            at: before,
            event: Event::Gone,
        },
        Step {
            at: before + length,
            event: Event::Back,
        },
    ]
}

struct Random(Rng);

// === impl Random ===

impl Random {
    fn between(&mut self, min: f64, max: f64) -> f64 {
        // 53 bits: all that a double holds.
        let unit = (self.0.next_u64() >> 11) as f64 / (1_u64 << 53) as f64;
        min + (max - min) * unit
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_storm_has_every_fault_in_every_round_and_all_kills_one_after_the_other() {
        for (seconds, kills) in [(60, 5), (5, 1), (10, 3), (90, 40)] {
            let length = Duration::from_secs(seconds);
            for seed in 0..50 {
                let steps = storm(length, kills, seed);
                assert_eq!(steps, storm(length, kills, seed));
                assert!(steps.is_sorted_by_key(|step| step.at));
                assert!(steps.last().unwrap().at < length);
                let rounds = (seconds / 27).max(1);
                for fault in faults(length) {
                    let times = steps
                        .iter()
                        .filter(|step| step.event == Event::Fault(fault.clone()))
                        .count();
                    assert!(times as u64 >= rounds, "{fault:?} {times} times in {seconds} s");
                }
                let lives: Vec<_> = steps
                    .iter()
                    .filter(|step| matches!(step.event, Event::Kill | Event::Restart))
                    .map(|step| step.event.clone())
                    .collect();
                assert_eq!(lives.len(), 2 * kills as usize);
                for (index, event) in lives.iter().enumerate() {
                    let wanted = if index % 2 == 0 { Event::Kill } else { Event::Restart };
                    assert_eq!(*event, wanted);
                }
            }
        }
    }

    #[test]
    fn every_other_kill_is_of_a_frozen_aggregator() {
        let steps = storm(Duration::from_secs(60), 5, 3);
        let lives: Vec<_> = steps
            .iter()
            .filter(|step| matches!(step.event, Event::Freeze | Event::Kill))
            .map(|step| step.event == Event::Freeze)
            .collect();
        assert_eq!(lives, [false, true, false, false, true, false, false]);
    }

    #[test]
    fn seeds_give_different_moments() {
        let length = Duration::from_secs(60);
        assert_ne!(storm(length, 5, 1), storm(length, 5, 2));
    }

    #[test]
    fn faults_end_with_none_and_are_as_many_as_fit() {
        for (seconds, number) in [(1, 1), (6, 1), (10, 2), (15, 3), (27, 6), (60, 6)] {
            let faults = faults(Duration::from_secs(seconds));
            assert_eq!((faults.len(), faults.last()), (number, Some(&Fault::None)));
        }
    }
}
