//! What the aggregator is told of this node beside its records.

use proto::{
    convert::{Feature, features_to_wire},
    v1::{self, client_message::Kind},
};

/// What this node can see and which configuration it runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeReport {
    /// The capability vector.
    pub features: Vec<Feature>,
    /// Generation of the object that the configuration came from; 0 when it came from none.
    pub configuration_generation: i64,
}

// === impl NodeReport ===

impl NodeReport {
    /// The messages that say it; none when there is nothing to say.
    pub(super) fn messages(&self) -> Vec<Kind> {
        if *self == Self::default() {
            return Vec::new();
        }
        let status = v1::AgentStatus {
            configuration_generation: self.configuration_generation,
        };
        vec![
            Kind::Capabilities(features_to_wire(&self.features)),
            Kind::AgentStatus(status),
        ]
    }
}
