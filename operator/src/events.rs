//! Events: what a person who looks at the object should know, when it happens.
//!
//! Data flow: former status, new status and [`Deeds`] ▶ [`notices`], a pure function ▶ [`Events::publish`] ▶ API server. What goes
//! on and on is in the status; an Event tells of a turn. They are bounded: [`BURST`] at once, then one per [`REFILL`].

use std::time::Duration;

use api::collector::{EbpfCollector, EbpfCollectorStatus, condition_reason as reason, condition_type};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{
    Client, Resource as _,
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use parking_lot::Mutex;

use crate::{
    certificates::{Change, Role},
    cluster::{Why, Written},
    metrics::{EventOutcome, Metrics},
    names,
    status::FEATURES_LACKING,
};

/// Events that may be written at once.
const BURST: u32 = 25;
/// Time after which one more may be.
const REFILL: Duration = Duration::from_secs(30);
/// Longest note in bytes: the API server refuses more than 1 KiB.
const NOTE_MAX: usize = 1000;

/// What a reconciliation did.
#[derive(Clone, Debug, Default)]
pub struct Deeds {
    /// Objects that were applied.
    pub written: Vec<Written>,
    /// Objects that were removed.
    pub removed: Vec<String>,
    /// What became of certificates.
    pub certificates: Vec<Change>,
}

/// One Event to come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// Whether something is wrong.
    pub warning: bool,
    /// What happened, in one word.
    pub reason: &'static str,
    /// What the operator did.
    pub action: &'static str,
    /// For people.
    pub note: String,
}

/// Writes Events, within bounds.
pub struct Events {
    recorder: Recorder,
    metrics: Metrics,
    bucket: Mutex<Bucket>,
}

/// How many Events may be written now.
#[derive(Debug)]
struct Bucket {
    left: u32,
    filled: Timestamp,
}

/// What to tell after a reconciliation that did `deeds` and turned the status `former` into `status`.
#[must_use]
pub fn notices(former: Option<&EbpfCollectorStatus>, status: &EbpfCollectorStatus, deeds: &Deeds) -> Vec<Notice> {
    let normal = |reason, action, note| Notice {
        warning: false,
        reason,
        action,
        note,
    };
    let warning = |reason, action, note| Notice {
        warning: true,
        reason,
        action,
        note,
    };
    let mut notices = Vec::new();
    let of = |wanted: fn(&Why) -> bool| {
        let shown = deeds
            .written
            .iter()
            .filter(|write| wanted(&write.why))
            .map(Written::shown);
        shown.collect::<Vec<_>>().join(", ")
    };
    let created = of(|why| *why == Why::Missing);
    if !created.is_empty() {
        notices.push(normal("Created", "Apply", format!("made {created}")));
    }
    let updated = of(|why| *why == Why::Changed);
    if !updated.is_empty() {
        notices.push(normal(
            "Updated",
            "Apply",
            format!("brought to what is wanted now: {updated}"),
        ));
    }
    let repaired = of(|why| matches!(why, Why::Drifted(_)));
    if !repaired.is_empty() {
        let note = format!("put back what was changed by others: {repaired}");
        notices.push(warning("Repaired", "Apply", note));
    }
    if !deeds.removed.is_empty() {
        let note = format!("no longer wanted: {}", deeds.removed.join(", "));
        notices.push(normal("Removed", "Delete", note));
    }
    if !deeds.certificates.is_empty() {
        let founded = deeds.certificates.contains(&Change::Founded);
        let what: Vec<&str> = deeds.certificates.iter().map(described).collect();
        let reason = if founded {
            "CertificatesIssued"
        } else {
            "CertificatesRotated"
        };
        notices.push(normal(reason, "Issue", what.join("; ")));
    }
    let turned = |kind: &str| {
        let now = find(status, kind)?;
        let before = former.and_then(|former| find(former, kind));
        let same = before.is_some_and(|before| before.status == now.status && before.reason == now.reason);
        (!same).then_some((before, now))
    };
    if let Some((_, ready)) = turned(condition_type::READY) {
        if ready.status == "True" {
            notices.push(normal("RolledOut", "Watch", ready.message.clone()));
        } else if ready.reason != reason::ROLLING_OUT {
            notices.push(warning(held(&ready.reason), "Check", ready.message.clone()));
        }
    }
    let degraded = find(status, condition_type::DEGRADED).filter(|now| now.status == "True");
    if let Some(now) = degraded
        && [api::collector::NOT_IN_THIS_BUILD, FEATURES_LACKING].contains(&now.reason.as_str())
        && let before = former.and_then(|former| find(former, condition_type::DEGRADED))
        && before.is_none_or(|before| before.message != now.message)
    {
        notices.push(warning("Degraded", "Check", now.message.clone()));
    }
    if let Some((before, arriving)) = turned(condition_type::FLOWS_ARRIVING) {
        match arriving.status.as_str() {
            "True" => notices.push(normal("FlowsArriving", "Watch", arriving.message.clone())),
            // Before the first records it is no news that there are none.
            "False" if before.is_some_and(|before| before.status == "True") => {
                notices.push(warning("NoFlows", "Watch", arriving.message.clone()));
            }
            _ => {}
        }
    }
    for notice in &mut notices {
        shorten(&mut notice.note);
    }
    notices
}

fn find<'a>(status: &'a EbpfCollectorStatus, kind: &str) -> Option<&'a Condition> {
    status.conditions.iter().find(|condition| condition.type_ == kind)
}

/// The reason of a held object as that of an Event.
fn held(given: &str) -> &'static str {
    [
        reason::CONFLICT,
        reason::INVALID_SPEC,
        reason::SECRET_MISSING,
        crate::controller::APPLY_REFUSED,
    ]
    .into_iter()
    .find(|known| *known == given)
    .unwrap_or("NotReady")
}

fn described(change: &Change) -> &'static str {
    match change {
        Change::Founded => "a new authority signs",
        Change::Announced => "the next authority is trusted from now on",
        Change::Promoted => "the next authority signs from now on",
        Change::Retired => "the authority before is no longer trusted",
        Change::Issued(Role::Aggregator) => "new certificate of the aggregator",
        Change::Issued(Role::Agent) => "new certificate of the agents",
        Change::Issued(Role::Operator) => "new certificate of the operator",
    }
}

fn shorten(note: &mut String) {
    if note.len() > NOTE_MAX {
        note.truncate(note.floor_char_boundary(NOTE_MAX - 3));
        note.push_str("...");
    }
}

// === impl Events ===

impl Events {
    /// Events that `instance`, the operator's pod, reports.
    #[must_use]
    pub fn new(client: Client, instance: Option<String>, metrics: Metrics) -> Self {
        let reporter = Reporter {
            controller: names::FIELD_MANAGER.to_owned(),
            instance,
        };
        Self {
            recorder: Recorder::new(client, reporter),
            metrics,
            bucket: Mutex::new(Bucket {
                left: BURST,
                filled: Timestamp::now(),
            }),
        }
    }

    /// Writes Events about `object`. What cannot be written is counted and logged, and harms nothing else.
    pub async fn publish(&self, object: &EbpfCollector, notices: Vec<Notice>) {
        for notice in notices {
            if !self.bucket.lock().take(Timestamp::now()) {
                self.metrics.event(EventOutcome::Dropped);
                tracing::debug!(
                    reason = notice.reason,
                    note = notice.note,
                    "an Event is left out, there were many"
                );
                continue;
            }
            let event = Event {
                type_: if notice.warning {
                    EventType::Warning
                } else {
                    EventType::Normal
                },
                reason: notice.reason.to_owned(),
                note: Some(notice.note),
                action: notice.action.to_owned(),
                secondary: None,
            };
            match self.recorder.publish(&event, &object.object_ref(&())).await {
                Ok(()) => self.metrics.event(EventOutcome::Written),
                Err(error) => {
                    self.metrics.event(EventOutcome::Failed);
                    tracing::warn!(%error, reason = notice.reason, "an Event is not written");
                }
            }
        }
    }
}

// === impl Bucket ===

impl Bucket {
    fn take(&mut self, now: Timestamp) -> bool {
        let passed = Duration::try_from(now.duration_since(self.filled)).unwrap_or_default();
        let more = u32::try_from(passed.as_secs() / REFILL.as_secs()).unwrap_or(BURST);
        if more > 0 {
            self.left = self.left.saturating_add(more).min(BURST);
            self.filled = now;
        }
        let may = self.left > 0;
        self.left = self.left.saturating_sub(1);
        may
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    use super::*;

    fn status(conditions: &[(&str, &str, &str)]) -> EbpfCollectorStatus {
        let condition = |(kind, status, reason): &(&str, &str, &str)| Condition {
            type_: (*kind).to_owned(),
            status: (*status).to_owned(),
            reason: (*reason).to_owned(),
            message: format!("because of {reason}"),
            observed_generation: None,
            last_transition_time: Time(Timestamp::UNIX_EPOCH),
        };
        EbpfCollectorStatus {
            conditions: conditions.iter().map(condition).collect(),
            ..EbpfCollectorStatus::default()
        }
    }

    fn reasons(
        former: Option<&EbpfCollectorStatus>,
        now: &EbpfCollectorStatus,
        deeds: &Deeds,
    ) -> Vec<(bool, &'static str)> {
        let notices = notices(former, now, deeds);
        notices.iter().map(|notice| (notice.warning, notice.reason)).collect()
    }

    #[test]
    fn a_turn_is_told_once() {
        let missing = status(&[
            ("Ready", "False", "SecretMissing"),
            ("Degraded", "True", "SecretMissing"),
        ]);
        let rolling = status(&[
            ("Ready", "False", "RollingOut"),
            ("FlowsArriving", "False", "NoDelivery"),
        ]);
        let ready = status(&[("Ready", "True", "AsWanted"), ("FlowsArriving", "True", "Delivered")]);
        let quiet = status(&[("Ready", "True", "AsWanted"), ("FlowsArriving", "False", "NoDelivery")]);
        let lacking = status(&[("Ready", "True", "AsWanted"), ("Degraded", "True", FEATURES_LACKING)]);
        let nothing = Deeds::default();
        for (former, now, told) in [
            (None, &missing, vec![(true, "SecretMissing")]),
            (Some(&missing), &missing, vec![]),
            (Some(&missing), &rolling, vec![]),
            (
                Some(&rolling),
                &ready,
                vec![(false, "RolledOut"), (false, "FlowsArriving")],
            ),
            (Some(&ready), &ready, vec![]),
            (Some(&ready), &quiet, vec![(true, "NoFlows")]),
            (Some(&quiet), &quiet, vec![]),
            (Some(&ready), &lacking, vec![(true, "Degraded")]),
            (Some(&lacking), &lacking, vec![]),
        ] {
            assert_eq!(reasons(former, now, &nothing), told, "{former:?} {now:?}");
        }
    }

    #[test]
    fn deeds_are_told_by_what_they_were() {
        let ready = status(&[("Ready", "True", "AsWanted")]);
        let write = |why| Written {
            kind: "Service".to_owned(),
            name: "a".to_owned(),
            why,
        };
        let deeds = Deeds {
            written: vec![
                write(Why::Missing),
                write(Why::Changed),
                write(Why::Drifted(".spec.ports".to_owned())),
            ],
            removed: vec!["PersistentVolumeClaim b".to_owned()],
            certificates: vec![Change::Issued(Role::Agent)],
        };
        let told = [
            (false, "Created"),
            (false, "Updated"),
            (true, "Repaired"),
            (false, "Removed"),
            (false, "CertificatesRotated"),
        ];
        assert_eq!(reasons(Some(&ready), &ready, &deeds), told);
        let notes = notices(Some(&ready), &ready, &deeds);
        assert!(notes.iter().any(|it| it.note.contains(".spec.ports")), "{notes:?}");
    }

    #[test]
    fn notes_fit() {
        let mut note = "ä".repeat(2000);
        shorten(&mut note);
        assert!(note.len() <= NOTE_MAX && note.ends_with("..."));
    }

    #[test]
    fn there_are_bounds() {
        let at = |second: i64| Timestamp::from_second(second).unwrap();
        let mut bucket = Bucket {
            left: BURST,
            filled: at(0),
        };
        assert!((0..BURST).all(|_| bucket.take(at(1))));
        assert!(!bucket.take(at(1)));
        assert!(bucket.take(at(31)) && !bucket.take(at(31)));
        assert_eq!((0..100).filter(|_| bucket.take(at(1_000_000))).count(), BURST as usize);
    }
}
