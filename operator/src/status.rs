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
pub struct Finding {
    /// Why the manifests were not applied; what runs goes on as it is. None: they are in the cluster.
    pub held: Option<Held>,
    /// What runs; none if the object is not the one that is served.
    pub running: Option<Running>,
}

/// Why nothing is changed.
#[derive(Clone, Debug)]
pub struct Held {
    /// Reason of the conditions.
    pub reason: &'static str,
    /// What is wrong and what to do.
    pub message: String,
}

/// What runs.
#[derive(Clone, Debug)]
pub struct Running {
    /// The live DaemonSet, once there is one.
    pub agents: Option<Value>,
    /// The live StatefulSet.
    pub aggregator: Option<Value>,
    /// Fields and features that are asked for and that this build does not have.
    pub missing: Vec<String>,
    /// What the aggregator told, or why it did not.
    pub overview: Result<Summary, String>,
}

/// Records count as arriving when an output accepted some in this time, or in two cycles if that is longer.
const LATELY: Duration = Duration::from_secs(300);
/// Reason of `Degraded` when nodes lack a feature.
pub const FEATURES_LACKING: &str = "FeaturesLacking";
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
    let running = finding.running.as_ref();
    if let Some(running) = running {
        let lacking = running.overview.as_ref().map_or(0, |summary| summary.nodes_degraded);
        status.nodes = running.agents.as_ref().map(|agents| nodes(agents, lacking));
        if let Ok(summary) = &running.overview {
            status.features.clone_from(&summary.features);
            status.sinks.clone_from(&summary.sinks);
            status.flows_per_second = summary.flows_per_second;
        }
    }
    status.conditions = match (&finding.held, running) {
        (Some(Held { reason, message }), _) => vec![
            condition(condition_type::READY, Some(false), reason, message),
            condition(
                condition_type::PROGRESSING,
                Some(false),
                reason,
                "nothing is changed until this is resolved",
            ),
            condition(condition_type::DEGRADED, Some(true), reason, message),
        ],
        (None, Some(running)) => {
            let waits = waits(running, generation.unwrap_or_default());
            let done = waits.is_empty();
            let (why, message) = if done {
                (
                    reason::AS_WANTED,
                    "the aggregator and the agents of all nodes are ready".to_owned(),
                )
            } else {
                (reason::ROLLING_OUT, waits.join("; "))
            };
            let (lacks, lack) = lacks(running);
            vec![
                condition(condition_type::READY, Some(done), why, &message),
                condition(condition_type::PROGRESSING, Some(!done), why, &message),
                condition(condition_type::DEGRADED, Some(!lack.is_empty()), lacks, &lack),
            ]
        }
        (None, None) => Vec::new(),
    };
    if let Some(running) = running {
        let (arriving, arrival, told) = arrival(object, &running.overview, now);
        status
            .conditions
            .push(condition(condition_type::FLOWS_ARRIVING, arriving, arrival, &told));
    }
    status
}

/// What is missing of what the object asks for: reason and message of `Degraded`; no message if nothing is.
fn lacks(running: &Running) -> (&'static str, String) {
    let mut parts = Vec::new();
    if !running.missing.is_empty() {
        parts.push(format!("without effect: {}", running.missing.join(", ")));
    }
    if let Ok(summary) = &running.overview
        && summary.nodes_degraded > 0
    {
        let lacking = summary.features.iter().filter(|it| it.degraded + it.off > 0);
        let named = lacking.map(|it| {
            let why = it.top_reasons.first().map_or("", |it| it.reason.as_str());
            format!("{} on {} ({why})", it.name, it.degraded + it.off)
        });
        let named: Vec<String> = named.collect();
        parts.push(format!(
            "nodes that lack a feature: {}; by feature: {}",
            summary.nodes_degraded,
            named.join(", ")
        ));
    }
    let reason = match (running.missing.is_empty(), parts.is_empty()) {
        (_, true) => reason::AS_WANTED,
        (false, _) => NOT_IN_THIS_BUILD,
        (true, false) => FEATURES_LACKING,
    };
    (reason, parts.join("; "))
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

/// What is not finished, in words; `generation` is the object's.
fn waits(running: &Running, generation: i64) -> Vec<String> {
    let (agents, aggregator) = (running.agents.as_ref(), running.aggregator.as_ref());
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
    let behind = running.overview.as_ref().map_or(0, |it| it.behind(generation));
    if behind > 0 {
        waits.push(format!(
            "nodes that have not taken up the latest configuration: {behind}"
        ));
    }
    waits
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use api::collector::{FeatureReason, FeatureStatus};
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
        let running = Running {
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
        };
        Finding {
            held: None,
            running: Some(running),
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
    fn what_is_held_says_why_and_what_goes_on() {
        let mut finding = applied(3);
        finding.running.as_mut().unwrap().overview = Ok(Summary {
            last_delivery: Some(at(10)),
            features: vec![FeatureStatus::default()],
            ..Summary::default()
        });
        finding.held = Some(Held {
            reason: reason::SECRET_MISSING,
            message: "Secret dataway is missing".to_owned(),
        });
        let held = status(&object(), &finding, at(20));
        assert_eq!(
            shown(&held),
            [
                "Ready=False SecretMissing",
                "Progressing=False SecretMissing",
                "Degraded=True SecretMissing",
                "FlowsArriving=True Delivered"
            ]
        );
        assert_eq!((held.nodes.unwrap().summary.as_str(), held.features.len()), ("3/3", 1));
        finding.running = None;
        let other = status(&object(), &finding, at(20));
        assert_eq!((other.conditions.len(), other.nodes), (3, None));
    }

    #[test]
    fn what_nodes_lack_is_degraded_and_an_old_configuration_is_not_ready() {
        let mut finding = applied(3);
        finding.running.as_mut().unwrap().overview = Ok(Summary {
            nodes_degraded: 2,
            features: vec![FeatureStatus {
                name: "ebpf-net/tcp-owner".to_owned(),
                on: 1,
                degraded: 2,
                top_reasons: vec![FeatureReason {
                    reason: "no kprobes".to_owned(),
                    nodes: 2,
                }],
                ..FeatureStatus::default()
            }],
            // The object is at 4; 0 is of agents that follow no object.
            configurations: [(0, 1), (3, 1), (4, 1)].into(),
            ..Summary::default()
        });
        let status = status(&object(), &finding, at(20));
        let find = |kind: &str| status.conditions.iter().find(|it| it.type_ == kind).unwrap();
        let (degraded, ready) = (find("Degraded"), find("Ready"));
        assert_eq!(
            (degraded.status.as_str(), degraded.reason.as_str()),
            ("True", FEATURES_LACKING)
        );
        assert!(
            degraded.message.contains("ebpf-net/tcp-owner on 2 (no kprobes)"),
            "{degraded:?}"
        );
        assert_eq!(ready.status, "False");
        assert!(ready.message.ends_with("latest configuration: 1"), "{ready:?}");
    }

    #[test]
    fn flows_arrive_while_an_output_accepts_them() {
        for (delivered, expected) in [
            (Some(900), "FlowsArriving=True Delivered"),
            (Some(600), "FlowsArriving=False NoDelivery"),
            (None, "FlowsArriving=False NoDelivery"),
        ] {
            let mut finding = applied(3);
            finding.running.as_mut().unwrap().overview = Ok(Summary {
                last_delivery: delivered.map(at),
                nodes_degraded: 1,
                ..Summary::default()
            });
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
