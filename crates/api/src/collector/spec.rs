//! The object and the parts of its spec that belong to no plugin, output or pod.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    AgentPods, AggregatorPods, DatawaySpec, EbpfCollectorStatus, NamespacePluginsSpec, OutputsSpec, PluginsSpec, cel,
    object::object,
};

/// Watches the network traffic of the cluster's nodes with eBPF, names both ends of every flow and delivers records.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema, CustomResource)]
#[kube(
    group = "ebpfcollector.io",
    version = "v1alpha1",
    kind = "EbpfCollector",
    shortname = "ebc",
    status = "EbpfCollectorStatus",
    derive = "PartialEq",
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].status"}"#,
    printcolumn = r#"{"name":"Nodes","type":"string","jsonPath":".status.nodes.summary"}"#,
    printcolumn = r#"{"name":"Degraded","type":"string","jsonPath":".status.conditions[?(@.type==\"Degraded\")].status"}"#,
    printcolumn = r#"{"name":"Flows/s","type":"number","jsonPath":".status.flowsPerSecond"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = cel::spec_rules()))]
pub struct EbpfCollectorSpec {
    /// What is collected. A plugin that is named runs, unless its `enabled` is false; without `plugins`, ebpf-net runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plugins: Option<PluginsSpec>,
    /// Length of a collection cycle, from 1s to 1h: every record sums up one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32), regex(pattern = cel::DURATION), extend("default" = "60s", "x-kubernetes-validations" = cel::duration_rules("1s", "1h")))]
    pub interval: Option<String>,
    /// Tags added to every record, beside `host`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("maxProperties" = 64, "additionalProperties" = {"type": "string", "minLength": 1, "maxLength": 1024}, "x-kubernetes-validations" = cel::tags_rules()))]
    pub tags: Option<BTreeMap<String, String>>,
    /// Which share of records is reported.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sampling: Option<SamplingSpec>,
    /// Most that each agent may use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limits: Option<LimitsSpec>,
    /// Names on records.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity: Option<IdentitySpec>,
    /// How agents read the cluster's objects, and what they take from them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kubernetes: Option<KubernetesSpec>,
    /// Plugins by namespace: the first rule that matches a namespace says what differs there. Processes outside pods
    /// follow `plugins` alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub namespaces: Option<Vec<NamespaceRule>>,
    /// Whether a namespace may switch plugins off for itself, by its annotation `ebpfcollector.io/plugins`: a list with
    /// commas of those it keeps, such as `ebpf-net,ebpf-net/httpflow`; empty or `none` for no plugin.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("default" = false))]
    pub allow_namespace_annotation: Option<bool>,
    /// The DataWay servers that records go to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dataway: Option<DatawaySpec>,
    /// Further outputs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outputs: Option<OutputsSpec>,
    /// The node agents' pods.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent: Option<AgentPods>,
    /// The aggregator's pods.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aggregator: Option<AggregatorPods>,
}

object! {
    /// Which share of records is reported; without either, all of them.
    #[schemars(extend("x-kubernetes-validations" = cel::sampling_rules()))]
    SamplingSpec {
        /// Share of records to report, from 0.01 to 1. Excludes `ptsPerMin`.
        #[schemars(range(min = 0.01, max = 1.0))]
        rate: f64,
        /// Records per minute above which the share reported is lowered. Excludes `rate`.
        #[schemars(range(min = 1))]
        pts_per_min: u64,
    }

    /// Most that each agent may use; what is not given has no limit.
    #[schemars(extend("x-kubernetes-validations" = cel::limits_rules()))]
    LimitsSpec {
        /// CPU cores, such as 2.0.
        #[schemars(range(min = 0.01, max = 1024.0))]
        cpu: f64,
        /// Memory from 16MiB, such as 4GiB (K, KB, M, MB, G, GB decimal; KiB, MiB, GiB binary).
        #[schemars(length(max = 32), regex(pattern = cel::SIZE), extend("x-kubernetes-validations" = cel::size_rules(None, "must be a size from 16MiB, such as 4GiB")))]
        mem: String,
        /// Traffic of any interface per second, such as 100MiB/s.
        #[schemars(length(max = 32), regex(pattern = cel::RATE), extend("x-kubernetes-validations" = cel::rate_rules()))]
        net: String,
    }

    /// Names on records.
    IdentitySpec {
        /// Value of the tag `service`; otherwise there is no such tag.
        #[schemars(length(min = 1, max = 1024))]
        service: String,
    }

    /// How agents read the cluster's objects, and what they take from them.
    KubernetesSpec {
        /// API server, such as https://kubernetes.default:443; otherwise that of the pod's service account.
        #[schemars(length(max = 1024), regex(pattern = cel::HTTP_URL))]
        url: String,
        /// File in the agent's pod with the token for the API server; otherwise that of the pod's service account.
        #[schemars(length(min = 1, max = 1024))]
        bearer_token: String,
        /// Labels of pods and workloads to add as tags.
        #[schemars(length(max = 64), extend("items" = cel::texts(317)))]
        workload_labels: Vec<String>,
        /// Put before the names of the tags made from labels.
        #[schemars(length(min = 1, max = 128))]
        workload_label_prefix: String,
    }
}

/// What differs in the namespaces it matches.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NamespaceRule {
    /// Which namespaces.
    #[serde(rename = "match")]
    pub matches: NamespaceMatch,
    /// What differs there; a plugin not named is as in `spec.plugins`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plugins: Option<NamespacePluginsSpec>,
}

object! {
    /// Namespaces by name or by label.
    #[schemars(extend("x-kubernetes-validations" = cel::match_rules()))]
    NamespaceMatch {
        /// Names of namespaces.
        #[schemars(length(min = 1, max = 256), extend("items" = cel::texts(63)))]
        names: Vec<String>,
        /// Labels of namespaces; the empty selector matches all.
        selector: LabelSelector,
    }
}
