//! What the operator tells of the object.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Types of the conditions.
pub mod condition_type {
    /// The aggregator and every wanted agent work with the current configuration.
    pub const READY: &str = "Ready";
    /// The cluster is being brought to what the object says.
    pub const PROGRESSING: &str = "Progressing";
    /// Something that the object asks for is missing.
    pub const DEGRADED: &str = "Degraded";
    /// Records were delivered lately.
    pub const FLOWS_ARRIVING: &str = "FlowsArriving";
}

/// Reasons of conditions that programs branch on.
pub mod condition_reason {
    /// All is as the object says.
    pub const AS_WANTED: &str = "AsWanted";
    /// The options of the object contradict each other or are out of range.
    pub const INVALID_SPEC: &str = "InvalidSpec";
    /// Another object came first.
    pub const CONFLICT: &str = "AnotherObject";
    /// A Secret or a key in it is missing.
    pub const SECRET_MISSING: &str = "SecretMissing";
    /// Pods are being created or replaced.
    pub const ROLLING_OUT: &str = "RollingOut";
}

/// What the operator tells of the object.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EbpfCollectorStatus {
    /// Generation of the object that the rest tells of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Ready, Progressing, Degraded, FlowsArriving.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// Nodes with an agent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nodes: Option<NodeCounts>,
    /// Features over all nodes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub features: Vec<FeatureStatus>,
    /// Outputs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub sinks: Vec<SinkStatus>,
    /// Records that arrived per second, over the last minute.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flows_per_second: Option<f64>,
}

/// Nodes with an agent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeCounts {
    /// Nodes that should have an agent.
    pub wanted: i32,
    /// Nodes whose agent works.
    pub ready: i32,
    /// Nodes whose agent lacks a feature.
    pub degraded: i32,
    /// `ready/wanted`, for people.
    pub summary: String,
}

/// One feature over all nodes, such as `ebpf-net/netflow`. The keys are no plain `on` and `off`, which YAML 1.1 takes for
/// truth values.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FeatureStatus {
    /// Its name.
    pub name: String,
    /// Nodes that have it.
    #[serde(rename = "nodesOn")]
    pub on: i32,
    /// Nodes that have it in part.
    #[serde(rename = "nodesDegraded")]
    pub degraded: i32,
    /// Nodes that do not have it.
    #[serde(rename = "nodesOff")]
    pub off: i32,
    /// The most frequent reasons where it is degraded or off.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub top_reasons: Vec<FeatureReason>,
}

/// Why a feature is degraded or off.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FeatureReason {
    /// The reason.
    pub reason: String,
    /// On how many nodes.
    pub nodes: i32,
}

/// One output.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SinkStatus {
    /// Its name: `dataway`, or `dataway-2` and so on in the order of the URLs.
    pub name: String,
    /// When it last accepted records.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_delivery: Option<Time>,
    /// Bytes that wait for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backlog_bytes: Option<i64>,
    /// Records that wait for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backlog_records: Option<i64>,
    /// Its last failure, until it accepts records again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

// === impl NodeCounts ===

impl NodeCounts {
    /// The counts with their summary.
    #[must_use]
    pub fn new(wanted: i32, ready: i32, degraded: i32) -> Self {
        Self {
            wanted,
            ready,
            degraded,
            summary: format!("{ready}/{wanted}"),
        }
    }
}
