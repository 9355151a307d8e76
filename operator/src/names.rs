//! Names that the operator gives: labels, annotations, objects, the field manager.

use std::collections::BTreeMap;

/// Field manager of everything that the operator applies.
pub const FIELD_MANAGER: &str = "ebpfcollector-operator";
/// Value of `app.kubernetes.io/name`.
pub const APP: &str = "ebpf-collector";
/// Annotation with the hash of an object as it was applied.
pub const APPLIED_HASH: &str = "ebpfcollector.io/applied-hash";
/// Port that agents connect to.
pub const INGEST_PORT: i32 = 6063;
/// Port of `/metrics` and the probes.
pub const ADMIN_PORT: i32 = 6062;

/// A part of what one object becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Component {
    /// On every node.
    Agent,
    /// Takes in what agents send.
    Aggregator,
    /// What the parts share.
    Common,
}

// === impl Component ===

impl Component {
    /// Value of `app.kubernetes.io/component`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Agent => "node-agent",
            Self::Aggregator => "aggregator",
            Self::Common => "common",
        }
    }
}

/// Labels that select a component's pods; they never change.
#[must_use]
pub fn selector(instance: &str, component: Component) -> BTreeMap<String, String> {
    [
        ("app.kubernetes.io/name", APP),
        ("app.kubernetes.io/instance", instance),
        ("app.kubernetes.io/component", component.as_str()),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into()
}

/// Labels of every object of a component.
#[must_use]
pub fn labels(instance: &str, component: Component) -> BTreeMap<String, String> {
    let mut labels = selector(instance, component);
    labels.insert("app.kubernetes.io/managed-by".to_owned(), FIELD_MANAGER.to_owned());
    labels
}

/// Label selector of everything that the operator made for an object.
#[must_use]
pub fn everything(instance: &str) -> String {
    format!("app.kubernetes.io/managed-by={FIELD_MANAGER},app.kubernetes.io/instance={instance}")
}

/// Name of the agents' objects.
#[must_use]
pub fn agent(instance: &str) -> String {
    format!("{instance}-agent")
}

/// Name of the aggregator's objects.
#[must_use]
pub fn aggregator(instance: &str) -> String {
    format!("{instance}-aggregator")
}

/// Names in the aggregator's certificate; agents ask for the first.
#[must_use]
pub fn server_names(instance: &str, namespace: &str) -> Vec<String> {
    let service = aggregator(instance);
    vec![
        format!("{service}.{namespace}.svc"),
        format!("{service}.{namespace}"),
        service,
    ]
}
