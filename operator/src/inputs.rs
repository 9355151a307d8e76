//! From the object to what its manifests depend on.
//!
//! Data flow: `EbpfCollector`, the operator's [`Settings`] and what the cluster holds ([`Observed`]) ▶ [`inputs`] ▶
//! [`Inputs`], or why there are none ([`InputsError`]). It does no I/O.

use std::net::IpAddr;

use api::{
    OptionSpec, Raw,
    collector::{EbpfCollector, OptionValue, QueueStorage, SecretKeyRef, quantity},
};
use serde_json::json;

use crate::{
    certificates::Material,
    desired::{AgentInputs, AggregatorInputs, Inputs, QueueVolume, TokenSecret},
};

/// What the operator's own pod is given.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Namespace of everything that it makes.
    pub namespace: String,
    /// Image of agents and aggregator.
    pub image: String,
}

/// What the cluster holds.
#[derive(Clone, Debug)]
pub struct Observed {
    /// Cluster address of the aggregator's Service, once it has one.
    pub aggregator_address: Option<IpAddr>,
    /// Hash of the DataWay token, if the object asks for one.
    pub token_hash: Option<String>,
    /// Certificates and keys.
    pub material: Material,
}

/// Why nothing can be made of the object.
#[derive(Debug, thiserror::Error)]
pub enum InputsError {
    /// The API server has not given it an identity.
    #[error("the object has no {0}; it was not read from an API server")]
    NotStored(&'static str),
    /// Its options are wrong.
    #[error(transparent)]
    Invalid(#[from] api::ConfigErrors),
}

/// Options of the agents that only a restart changes.
const AT_START: [&str; 6] = [
    "log_format",
    "tcp_connections_max",
    "flow_map_entries",
    "ring_buffer_size",
    "pprof_host",
    "pprof_port",
];
/// Options that the manifests set by themselves: where the operator mounts something.
const MOUNTED: [&str; 1] = ["dataway_token_file"];

/// What the object's manifests depend on.
///
/// # Errors
/// [`InputsError`] with everything that is wrong.
pub fn inputs(object: &EbpfCollector, settings: &Settings, observed: Observed) -> Result<Inputs, InputsError> {
    let spec = &object.spec;
    spec.validate()?;
    let name = object.metadata.name.clone().ok_or(InputsError::NotStored("name"))?;
    let uid = object.metadata.uid.clone().ok_or(InputsError::NotStored("uid"))?;
    let agent = spec.agent.clone().unwrap_or_default();
    let aggregator = spec.aggregator.clone().unwrap_or_default();
    let token = token_reference(object)
        .zip(observed.token_hash)
        .map(|(reference, hash)| TokenSecret {
            name: reference.name.clone().unwrap_or_default(),
            key: token_key(reference).to_owned(),
            hash,
        });
    let storage = aggregator.queue.and_then(|queue| queue.storage);
    let at_start = spec
        .agent_options()
        .into_iter()
        .filter(|option| AT_START.contains(&option.key));
    let for_aggregator = spec
        .aggregator_options()
        .into_iter()
        .filter(|option| !MOUNTED.contains(&option.key));
    Ok(Inputs {
        name,
        uid,
        namespace: settings.namespace.clone(),
        image: settings.image.clone(),
        image_pull_policy: agent.image_pull_policy,
        selinux_type: agent.selinux_type,
        aggregator_address: observed.aggregator_address,
        material: observed.material,
        agent: AgentInputs {
            resources: agent.resources.map(|resources| json!(resources.to_requirements())),
            arguments: at_start.flat_map(flags).collect(),
            extra_capabilities: Vec::new(),
            node_selector: agent.node_selector.unwrap_or_default(),
            tolerations: agent.tolerations.map(|tolerations| json!(tolerations)),
        },
        aggregator: AggregatorInputs {
            resources: aggregator.resources.map(|resources| json!(resources.to_requirements())),
            arguments: for_aggregator.flat_map(flags).collect(),
            token,
            volume: storage.and_then(volume),
        },
    })
}

/// The Secret with the DataWay token that the object names.
#[must_use]
pub fn token_reference(object: &EbpfCollector) -> Option<&SecretKeyRef> {
    object.spec.dataway.as_ref()?.token_secret_ref.as_ref()
}

/// The key in it.
#[must_use]
pub fn token_key(reference: &SecretKeyRef) -> &str {
    reference.key.as_deref().unwrap_or("token")
}

/// Fields that are given and that this build does not carry into the pods: people must be told.
#[must_use]
pub fn without_effect(object: &EbpfCollector) -> Vec<String> {
    let spec = json!(object.spec);
    let both = [
        "image",
        "imagePullSecrets",
        "priorityClassName",
        "labels",
        "annotations",
        "env",
    ];
    let of_agent = ["hostRoot", "hostProc"];
    let of_aggregator = ["replicas", "imagePullPolicy", "nodeSelector", "tolerations"];
    let paths = both
        .iter()
        .flat_map(|field| [("agent", *field), ("aggregator", *field)])
        .chain(of_agent.map(|field| ("agent", field)))
        .chain(of_aggregator.map(|field| ("aggregator", field)));
    let pointed = |(part, field): (&str, &str)| {
        let given = spec.get(part)?.get(field)?;
        let is_default =
            (field == "replicas" && *given == json!(1)) || (field == "hostRoot" && *given == json!("/host"));
        (!is_default).then(|| format!("spec.{part}.{field}"))
    };
    let mut fields: Vec<String> = paths.filter_map(pointed).collect();
    let outputs = spec.get("outputs").and_then(|outputs| outputs.as_object());
    let not_built = outputs.into_iter().flat_map(|outputs| outputs.keys());
    let not_built = not_built.filter(|name| !api::collector::BUILT_OUTPUTS.contains(&name.as_str()));
    fields.extend(not_built.map(|name| format!("spec.outputs.{name}")));
    fields.sort();
    fields
}

fn volume(storage: QueueStorage) -> Option<QueueVolume> {
    let claim = storage.volume_claim?;
    Some(QueueVolume {
        size: quantity(&claim.size?).0,
        storage_class: claim.storage_class_name,
    })
}

/// An option as flags of the program; none if it has no flag.
fn flags(option: OptionValue) -> Vec<String> {
    let flag = api::options()
        .iter()
        .find(|spec| spec.key == option.key)
        .and_then(|spec: &OptionSpec| spec.flag);
    let Some(flag) = flag else { return Vec::new() };
    let write = |value: String| format!("--{flag}={value}");
    match option.raw {
        Raw::Text(text) => vec![write(text)],
        Raw::List(texts) => texts.into_iter().map(write).collect(),
        Raw::Map(pairs) => pairs
            .into_iter()
            .map(|(key, value)| write(format!("{key}={value}")))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]
    use jiff::Timestamp;

    use super::*;
    use crate::{
        certificates::{Existing, Policy},
        desired, names,
    };

    fn object(spec: serde_json::Value) -> EbpfCollector {
        serde_json::from_value(json!({
            "apiVersion": "ebpfcollector.io/v1alpha1", "kind": "EbpfCollector",
            "metadata": { "name": "cluster", "uid": "9f1c", "generation": 3 }, "spec": spec,
        }))
        .unwrap()
    }

    fn map(spec: serde_json::Value) -> Result<Inputs, InputsError> {
        let settings = Settings {
            namespace: "observe".to_owned(),
            image: "collector:1".to_owned(),
        };
        let names = names::server_names("cluster", "observe");
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        let observed = Observed {
            aggregator_address: Some([10, 96, 0, 7].into()),
            token_hash: Some("h".to_owned()),
            material: Material::plan(Existing::default(), &names, &Policy::default(), now).unwrap(),
        };
        inputs(&object(spec), &settings, observed)
    }

    #[test]
    fn the_short_object_becomes_pods() {
        let inputs = map(json!({
            "dataway": { "url": "https://openway.example", "tokenSecretRef": { "name": "dataway" } },
        }))
        .unwrap();
        assert_eq!(inputs.aggregator.arguments, ["--dataway=https://openway.example"]);
        assert!(inputs.agent.arguments.is_empty());
        let token = inputs.aggregator.token.as_ref().unwrap();
        assert_eq!((token.name.as_str(), token.key.as_str()), ("dataway", "token"));
        let kinds = desired::desired(&inputs);
        assert!(kinds.iter().any(|object| object["kind"] == "DaemonSet"));
    }

    #[test]
    fn what_running_agents_take_over_is_no_argument() {
        let inputs = map(json!({
            "interval": "5s", "tags": { "a": "b" }, "plugins": { "ebpf-net": { "l7": [] } },
            "agent": { "kernel": { "flowMapEntries": 2048 }, "log": { "format": "text" }, "resources": { "limits": { "cpu": 1 } } },
            "aggregator": { "queue": { "size": "1GiB", "storage": { "volumeClaim": { "size": "10Gi" } } } },
        }))
        .unwrap();
        assert_eq!(inputs.agent.arguments, ["--flow-map-entries=2048", "--log-format=text"]);
        assert_eq!(inputs.agent.resources.unwrap()["limits"]["cpu"], "1");
        assert_eq!(inputs.aggregator.arguments, ["--queue-max-size=1GiB"]);
        assert_eq!(inputs.aggregator.volume.unwrap().size, "10Gi");
    }

    #[test]
    fn a_wrong_option_is_named() {
        let error = map(json!({ "interval": "2h" })).unwrap_err();
        assert!(matches!(error, InputsError::Invalid(_)));
        assert!(error.to_string().contains("spec.interval"), "{error}");
    }

    #[test]
    fn what_has_no_effect_is_listed() {
        let object = object(json!({
            "agent": { "image": "x", "hostRoot": "/host" }, "aggregator": { "replicas": 2 },
            "outputs": { "stdout": "json", "loki": { "url": "http://loki:3100" } },
        }));
        let expected = ["spec.agent.image", "spec.aggregator.replicas", "spec.outputs.loki"];
        assert_eq!(without_effect(&object), expected);
    }
}
