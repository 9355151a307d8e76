//! The object's status: a pure function from what was found to conditions and counts.
//!
//! Data flow: object (with its former status) and [`Finding`] ▶ [`status`] ▶ `EbpfCollectorStatus`. A condition keeps its
//! time of transition until its status turns.

use std::time::Duration;

use api::collector::{
    EbpfCollector, EbpfCollectorStatus, NOT_IN_THIS_BUILD, NodeCounts, condition_reason as reason, condition_type,
};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use serde_json::Value;

use crate::overview::Summary;

/// What a reconciliation found.
#[derive(Clone, Debug)]
pub enum Finding {
    /// Nothing was written: what runs goes on as it is.
    Held {
        /// Reason of the conditions.
        reason: &'static str,
        /// What is wrong and what to do.
        message: String,
    },
    /// The manifests are in the cluster.
    Applied {
        /// The live DaemonSet, once there is one.
        agents: Option<Value>,
        /// The live StatefulSet.
        aggregator: Option<Value>,
        /// Fields and features that are asked for and that this build does not have.
        missing: Vec<String>,
        /// What the aggregator told, or why it did not.
        overview: Result<Summary, String>,
    },
}

/// Records count as arriving when an output accepted some in this time, or in two cycles if that is longer.
const LATELY: Duration = Duration::from_secs(300);
/// Reason of `FlowsArriving` when records arrive.
const DELIVERED: &str = "Delivered";
/// Reason of `FlowsArriving` when none do.
const NO_DELIVERY: &str = "NoDelivery";
/// Reason of `FlowsArriving` when the aggregator does not tell.
const NOT_TOLD: &str = "AggregatorDoesNotTell";

/// The status that tells of `finding`.
#[must_use]
pub fn status(object: &EbpfCollector, finding: &Finding, now: Timestamp) -> EbpfCollectorStatus {
    let former = object.status.clone().unwrap_or_default();
    let generation = object.metadata.generation;
    let condition = |kind: &str, holds: Option<bool>, reason: &str, message: &str| {
        let status = match holds {
            Some(true) => "True",
            Some(false) => "False",
            None => "Unknown",
        };
        let same = former
            .conditions
            .iter()
            .find(|old| old.type_ == kind && old.status == status);
        Condition {
            type_: kind.to_owned(),
            status: status.to_owned(),
            reason: reason.to_owned(),
            message: message.to_owned(),
            observed_generation: generation,
            last_transition_time: same.map_or(Time(now), |old| old.last_transition_time.clone()),
        }
    };
    let mut status = EbpfCollectorStatus {
        observed_generation: generation,
        ..EbpfCollectorStatus::default()
    };
    status.conditions = match finding {
        Finding::Held { reason, message } => {
            status.nodes = former.nodes;
            vec![
                condition(condition_type::READY, Some(false), reason, message),
                condition(
                    condition_type::PROGRESSING,
                    Some(false),
                    reason,
                    "nothing is changed until this is resolved",
                ),
                condition(condition_type::DEGRADED, Some(true), reason, message),
            ]
        }
        Finding::Applied {
            agents,
            aggregator,
            missing,
            overview,
        } => {
            let lacking = overview.as_ref().map_or(0, |summary| summary.nodes_degraded);
            let nodes = agents.as_ref().map(|agents| nodes(agents, lacking));
            let (arriving, arrival, told) = arrival(object, overview, now);
            if let Ok(summary) = overview {
                status.features.clone_from(&summary.features);
                status.sinks.clone_from(&summary.sinks);
                status.flows_per_second = summary.flows_per_second;
            }
            let waits = waits(agents.as_ref(), aggregator.as_ref());
            status.nodes = nodes;
            let done = waits.is_empty();
            let (why, message) = if done {
                (
                    reason::AS_WANTED,
                    "the aggregator and the agents of all nodes are ready".to_owned(),
                )
            } else {
                (reason::ROLLING_OUT, waits.join("; "))
            };
            let (lacks, lack) = if missing.is_empty() {
                (reason::AS_WANTED, String::new())
            } else {
                (
                    NOT_IN_THIS_BUILD,
                    format!("without effect in this build: {}", missing.join(", ")),
                )
            };
            vec![
                condition(condition_type::READY, Some(done), why, &message),
                condition(condition_type::PROGRESSING, Some(!done), why, &message),
                condition(condition_type::DEGRADED, Some(!missing.is_empty()), lacks, &lack),
                condition(condition_type::FLOWS_ARRIVING, arriving, arrival, &told),
            ]
        }
    };
    status
}

/// A number of a live object; 0 while its controller has not told it.
fn number(object: &Value, pointer: &str) -> i32 {
    let number = object.pointer(pointer).and_then(Value::as_i64).unwrap_or_default();
    i32::try_from(number).unwrap_or(i32::MAX)
}

/// Whether records arrive, with reason and message.
fn arrival(
    object: &EbpfCollector,
    overview: &Result<Summary, String>,
    now: Timestamp,
) -> (Option<bool>, &'static str, String) {
    let summary = match overview {
        Ok(summary) => summary,
        Err(message) => return (None, NOT_TOLD, message.clone()),
    };
    let cycle = object
        .spec
        .agent_config()
        .map(|config| config.interval)
        .unwrap_or_default();
    let window = LATELY.max(cycle.saturating_mul(2));
    let past = |at: Timestamp| Duration::try_from(now.duration_since(at)).unwrap_or_default();
    if summary.last_delivery.is_some_and(|at| past(at) <= window) {
        return (
            Some(true),
            DELIVERED,
            format!("an output accepted records in the last {window:?}"),
        );
    }
    let message =
        format!("no output accepted records in the last {window:?}; status.sinks tells of errors and backlog");
    (Some(false), NO_DELIVERY, message)
}

fn nodes(agents: &Value, lacking: i32) -> NodeCounts {
    let wanted = number(agents, "/status/desiredNumberScheduled");
    NodeCounts::new(wanted, number(agents, "/status/numberReady"), lacking)
}

/// What is not finished, in words.
fn waits(agents: Option<&Value>, aggregator: Option<&Value>) -> Vec<String> {
    let unseen = |object: &Value| number(object, "/status/observedGeneration") < number(object, "/metadata/generation");
    let mut waits = Vec::new();
    match aggregator {
        None => waits.push("the aggregator does not exist yet".to_owned()),
        Some(it) if unseen(it) => waits.push("the aggregator's change is not taken up yet".to_owned()),
        Some(it) if number(it, "/status/readyReplicas") < 1 => {
            waits.push("the aggregator's pod is not ready".to_owned())
        }
        Some(it) if it.pointer("/status/updateRevision") != it.pointer("/status/currentRevision") => {
            waits.push("the aggregator's pod is being replaced".to_owned());
        }
        Some(_) => {}
    }
    match agents {
        None => waits.push("the agents wait for the address of the aggregator".to_owned()),
        Some(it) if unseen(it) => waits.push("the agents' change is not taken up yet".to_owned()),
        Some(it) => {
            let wanted = number(it, "/status/desiredNumberScheduled");
            let (updated, ready) = (
                number(it, "/status/updatedNumberScheduled"),
                number(it, "/status/numberReady"),
            );
            if updated < wanted {
                waits.push(format!("agents replaced on {updated} of {wanted} nodes"));
            }
            if ready < wanted {
                waits.push(format!("agents ready on {ready} of {wanted} nodes"));
            }
        }
    }
    waits
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;

    fn object() -> EbpfCollector {
        let mut object = EbpfCollector::new("cluster", api::collector::EbpfCollectorSpec::default());
        object.metadata.generation = Some(4);
        object
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn applied(ready: i32) -> Finding {
        Finding::Applied {
            agents: Some(
                json!({ "metadata": { "generation": 2 }, "status": { "observedGeneration": 2,
                "desiredNumberScheduled": 3, "updatedNumberScheduled": 3, "numberReady": ready } }),
            ),
            aggregator: Some(
                json!({ "metadata": { "generation": 1 }, "status": { "observedGeneration": 1,
                "readyReplicas": 1, "updateRevision": "a", "currentRevision": "a" } }),
            ),
            missing: Vec::new(),
            overview: Err("not asked".to_owned()),
        }
    }

    fn shown(status: &EbpfCollectorStatus) -> Vec<String> {
        status
            .conditions
            .iter()
            .map(|it| format!("{}={} {}", it.type_, it.status, it.reason))
            .collect()
    }

    #[test]
    fn it_is_ready_when_every_node_is() {
        let two = status(&object(), &applied(2), at(10));
        assert_eq!(
            shown(&two),
            [
                "Ready=False RollingOut",
                "Progressing=True RollingOut",
                "Degraded=False AsWanted",
                "FlowsArriving=Unknown AggregatorDoesNotTell"
            ]
        );
        assert_eq!(two.nodes.as_ref().unwrap().summary, "2/3");
        assert!(two.conditions.iter().any(|it| it.message.contains("2 of 3 nodes")));
        let three = status(&object(), &applied(3), at(10));
        assert_eq!(
            shown(&three),
            [
                "Ready=True AsWanted",
                "Progressing=False AsWanted",
                "Degraded=False AsWanted",
                "FlowsArriving=Unknown AggregatorDoesNotTell"
            ]
        );
        assert!(three.conditions.iter().all(|it| it.observed_generation == Some(4)));
    }

    #[test]
    fn a_time_of_transition_stays_until_the_status_turns() {
        let mut object = object();
        object.status = Some(status(&object, &applied(2), at(10)));
        assert_eq!(status(&object, &applied(2), at(20)), object.status.clone().unwrap());
        let turned = status(&object, &applied(3), at(30));
        let times: Vec<Timestamp> = turned.conditions.iter().map(|it| it.last_transition_time.0).collect();
        assert_eq!(times, [at(30), at(30), at(10), at(10)]);
    }

    #[test]
    fn what_is_held_keeps_the_counts_and_says_why() {
        let mut object = object();
        object.status = Some(status(&object, &applied(3), at(10)));
        let message = "Secret dataway is missing".to_owned();
        let held = status(
            &object,
            &Finding::Held {
                reason: reason::SECRET_MISSING,
                message,
            },
            at(20),
        );
        assert_eq!(
            shown(&held),
            [
                "Ready=False SecretMissing",
                "Progressing=False SecretMissing",
                "Degraded=True SecretMissing"
            ]
        );
        assert_eq!(held.nodes.unwrap().summary, "3/3");
    }

    #[test]
    fn flows_arrive_while_an_output_accepts_them() {
        for (delivered, expected) in [
            (Some(900), "FlowsArriving=True Delivered"),
            (Some(600), "FlowsArriving=False NoDelivery"),
            (None, "FlowsArriving=False NoDelivery"),
        ] {
            let mut finding = applied(3);
            if let Finding::Applied { overview, .. } = &mut finding {
                *overview = Ok(Summary {
                    last_delivery: delivered.map(at),
                    nodes_degraded: 1,
                    ..Summary::default()
                });
            }
            let status = status(&object(), &finding, at(1000));
            assert_eq!(
                shown(&status).last().map(String::as_str),
                Some(expected),
                "{delivered:?}"
            );
            assert_eq!(status.nodes.unwrap().degraded, 1);
        }
    }
}
