//! The Kubernetes object `EbpfCollector`: its schema, what it means as options, its policy by namespace, its status.
//!
//! Data flow: object ▶ [`EbpfCollectorSpec::agent_config`] and [`EbpfCollectorSpec::aggregator_config`] (the same table,
//! checks and messages as flags, environment and TOML) and [`policy::plugins_for`] (per namespace). The operator writes
//! [`EbpfCollectorStatus`]. The schema ([`EbpfCollector`] as a custom resource definition) refuses at `kubectl apply`
//! what can be said there; the options' own checks say the rest.

mod cel;
mod fields;
mod object;
mod outputs;
mod plugins;
mod pods;
pub mod policy;
mod spec;
mod status;

#[cfg(test)]
mod tests;

pub use fields::{NOT_IN_OBJECT, OptionValue, option_fields};
pub use outputs::{
    DatawaySpec, FileOutput, KafkaOutput, KafkaSasl, LokiOutput, MetricFilter, MetricItem, OtlpLogs, OtlpMapping,
    OtlpMetrics, OtlpOutput, OutputsSpec, PrometheusOutput, SecretKeyRef, TlsSpec,
};
pub use plugins::{
    BashPlugin, ConntrackPlugin, NamespacePluginsSpec, NetPlugin, NetToggle, NetlogPlugin, PluginToggle, PluginsSpec,
    TracePlugin,
};
pub use pods::{
    AgentLog, AgentPods, AggregatorPods, EmptyDir, KernelMaps, PprofSpec, QueueSpec, QueueStorage, Resources,
    VolumeClaim, quantity,
};
pub use policy::{NamespacePlugins, plugins_for};
pub use spec::{
    EbpfCollector, EbpfCollectorSpec, IdentitySpec, KubernetesSpec, LimitsSpec, NamespaceMatch, NamespaceRule,
    SamplingSpec,
};
pub use status::{
    EbpfCollectorStatus, FeatureReason, FeatureStatus, NodeCounts, SinkStatus, condition_reason, condition_type,
};

/// API group of the object.
pub const GROUP: &str = "ebpfcollector.io";
/// Kind of the object.
pub const KIND: &str = "EbpfCollector";
/// Version of the object.
pub const VERSION: &str = "v1alpha1";
/// Annotation of a namespace with the plugins it wants, where the object allows it.
pub const PLUGINS_ANNOTATION: &str = "ebpfcollector.io/plugins";
/// Where the operator mounts the Secret of `dataway.tokenSecretRef` in the aggregator: the file with the token.
pub const DATAWAY_TOKEN_FILE: &str = "/etc/ebpf-collector/dataway/token";
/// Reason of a feature that is off because this build does not have it.
pub const NOT_IN_THIS_BUILD: &str = "NotInThisBuild";
/// Features whose capture this build has; any other one that is enabled is off with [`NOT_IN_THIS_BUILD`].
pub const BUILT_FEATURES: &[&str] = &["ebpf-net/netflow"];
/// Outputs that this build delivers to.
pub const BUILT_OUTPUTS: &[&str] = &["dataway", "file", "stdout"];
