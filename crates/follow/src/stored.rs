//! The object as it is stored: its spec unread, so that one that cannot be read is an answer and not a failed watch.

use std::borrow::Cow;

use api::collector::EbpfCollector;
use k8s_openapi::{ClusterResourceScope, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::Resource;
use serde::Deserialize;

/// One object.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Stored {
    pub(crate) metadata: ObjectMeta,
    #[serde(default = "nothing")]
    pub(crate) spec: serde_json::Value,
}

/// All of a spec is optional.
fn nothing() -> serde_json::Value {
    serde_json::Value::Object(serde_json::Map::new())
}

impl Resource for Stored {
    type DynamicType = ();
    type Scope = ClusterResourceScope;

    fn kind(_: &()) -> Cow<'_, str> {
        EbpfCollector::kind(&())
    }

    fn group(_: &()) -> Cow<'_, str> {
        EbpfCollector::group(&())
    }

    fn version(_: &()) -> Cow<'_, str> {
        EbpfCollector::version(&())
    }

    fn plural(_: &()) -> Cow<'_, str> {
        EbpfCollector::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}
