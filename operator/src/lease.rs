//! Who of several operators works: rules of a `coordination.k8s.io` Lease.
//!
//! [`Elector::decide`] is pure: from the Lease as read and the local clock it says what to do next. The writes it asks for carry
//! the resourceVersion that was read, so of two that want the Lease at once one gets a conflict and reads again.
//!
//! Clocks of two machines are never compared: a holder counts as gone when its Lease has not changed for its whole
//! duration, by this machine's own clock.

use std::time::Duration;

/// How long a Lease holds without being renewed.
pub const DURATION: Duration = Duration::from_secs(15);
/// How often the holder renews it.
pub const RENEW: Duration = Duration::from_secs(5);
/// A holder that could not renew for this long stops working, before another may begin.
pub const GIVE_UP: Duration = Duration::from_secs(10);

/// What a Lease says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The holder; empty when it was given back.
    pub holder: String,
    /// Changes with every write.
    pub resource_version: String,
    /// For how long it holds.
    pub duration: Duration,
}

/// What to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Write ourselves into the Lease (or make it), with the version that was read as precondition.
    Acquire,
    /// Write a new renewal time.
    Renew,
    /// Look again after this.
    Wait(Duration),
}

/// One candidate's memory. Times are readings of one monotonic clock.
#[derive(Debug)]
pub struct Elector {
    identity: String,
    /// The version seen last, and when it was first seen.
    seen: Option<(String, Duration)>,
    /// When the last successful write began.
    renewed: Option<Duration>,
}

// === impl Elector ===

impl Elector {
    /// A candidate; its identity (the pod's name) is unique.
    #[must_use]
    pub fn new(identity: impl Into<String>) -> Self {
        Self {
            identity: identity.into(),
            seen: None,
            renewed: None,
        }
    }

    /// What to do, given the Lease as just read (none: there is no Lease).
    pub fn decide(&mut self, claim: Option<&Claim>, now: Duration) -> Decision {
        let Some(claim) = claim else {
            self.seen = None;
            return Decision::Acquire;
        };
        if self
            .seen
            .as_ref()
            .is_none_or(|(version, _)| *version != claim.resource_version)
        {
            self.seen = Some((claim.resource_version.clone(), now));
        }
        if claim.holder == self.identity {
            return match self.renewed {
                // Of an earlier life under the same name: take it anew.
                None => Decision::Acquire,
                Some(renewed) if now.saturating_sub(renewed) >= RENEW => Decision::Renew,
                Some(renewed) => Decision::Wait(RENEW.saturating_sub(now.saturating_sub(renewed))),
            };
        }
        self.renewed = None;
        if claim.holder.is_empty() {
            return Decision::Acquire;
        }
        let since = self.seen.as_ref().map_or(now, |(_, since)| *since);
        let unchanged = now.saturating_sub(since);
        if unchanged >= claim.duration {
            Decision::Acquire
        } else {
            Decision::Wait(RENEW.min(claim.duration.saturating_sub(unchanged)))
        }
    }

    /// A write that began at `began` succeeded.
    pub fn written(&mut self, began: Duration) {
        self.renewed = Some(began);
    }

    /// Whether we may work at `now`: until [`GIVE_UP`] after the last write that succeeded.
    #[must_use]
    pub fn is_leader(&self, now: Duration) -> bool {
        self.renewed
            .is_some_and(|renewed| now.saturating_sub(renewed) < GIVE_UP)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// A Lease as the API server keeps it: a write needs the version that was read.
    #[derive(Default)]
    struct Server {
        claim: Option<Claim>,
        version: u64,
    }

    impl Server {
        fn write(&mut self, read: Option<&Claim>, holder: &str) -> bool {
            if self.claim.as_ref() != read {
                return false;
            }
            self.version += 1;
            self.claim = Some(Claim {
                holder: holder.to_owned(),
                resource_version: self.version.to_string(),
                duration: DURATION,
            });
            true
        }

        /// One round of a candidate: read, decide, write.
        fn round(&mut self, elector: &mut Elector, now: Duration) {
            let read = self.claim.clone();
            let decision = elector.decide(read.as_ref(), now);
            let writes = matches!(decision, Decision::Acquire | Decision::Renew);
            if writes && self.write(read.as_ref(), &elector.identity.clone()) {
                elector.written(now);
            }
        }
    }

    #[test]
    fn of_two_one_leads_and_the_other_follows_when_it_is_gone() {
        let (mut server, mut a, mut b) = (Server::default(), Elector::new("a"), Elector::new("b"));
        for second in 0..60 {
            server.round(&mut a, s(second));
            server.round(&mut b, s(second));
            assert!(a.is_leader(s(second)) && !b.is_leader(s(second)), "at {second}");
        }
        // `a` is gone after second 59, its last renewal was at 55.
        let mut taken = None;
        for second in 60..100 {
            server.round(&mut b, s(second));
            assert!(
                !(a.is_leader(s(second)) && b.is_leader(s(second))),
                "two leaders at {second}"
            );
            if b.is_leader(s(second)) {
                taken.get_or_insert(second);
            }
        }
        assert_eq!(taken, Some(70), "15 s after the last renewal");
    }

    #[test]
    fn of_two_that_write_at_once_one_wins() {
        let (mut server, mut a, mut b) = (Server::default(), Elector::new("a"), Elector::new("b"));
        assert_eq!(a.decide(None, s(0)), Decision::Acquire);
        assert_eq!(b.decide(None, s(0)), Decision::Acquire);
        assert!(server.write(None, "b"));
        assert!(!server.write(None, "a"), "the API server refuses the second");
        b.written(s(0));
        assert!(matches!(a.decide(server.claim.as_ref(), s(0)), Decision::Wait(_)));
        assert!(!a.is_leader(s(0)));
    }

    #[test]
    fn a_lease_given_back_is_taken_at_once() {
        let mut server = Server::default();
        assert!(server.write(None, ""));
        let mut b = Elector::new("b");
        assert_eq!(b.decide(server.claim.as_ref(), s(0)), Decision::Acquire);
    }

    #[test]
    fn a_leader_that_cannot_write_stops_before_another_begins() {
        let mut server = Server::default();
        let (mut a, mut b) = (Elector::new("a"), Elector::new("b"));
        server.round(&mut a, s(0));
        server.round(&mut b, s(0));
        // The API server is away for `a` only.
        assert!(a.is_leader(s(9)) && !a.is_leader(s(10)));
        assert!(matches!(b.decide(server.claim.as_ref(), s(14)), Decision::Wait(_)));
        assert_eq!(b.decide(server.claim.as_ref(), s(15)), Decision::Acquire);
    }

    #[test]
    fn a_name_from_an_earlier_life_gives_no_right() {
        let mut server = Server::default();
        assert!(server.write(None, "a"));
        let mut a = Elector::new("a");
        assert_eq!(a.decide(server.claim.as_ref(), s(0)), Decision::Acquire);
        assert!(!a.is_leader(s(0)));
    }
}
