//! From the object to what its manifests depend on.
//!
//! Data flow: `EbpfCollector`, the operator's [`Settings`] and what the cluster holds ([`Observed`]) ▶ [`inputs`] ▶
//! [`Inputs`], or why there are none ([`InputsError`]). It does no I/O.

use std::net::IpAddr;

use api::{
    OptionSpec, Raw,
    collector::{EbpfCollector, OptionValue, OutputsSpec, QueueStorage, SecretKeyRef, quantity},
};
use k8s_openapi::api::core::v1::EnvVar;
use serde_json::{Value, json};

use crate::{
    certificates::Material,
    desired::{AgentInputs, AggregatorInputs, Inputs, PodInputs, QueueVolume, TokenSecret},
};

/// What the operator's own pod is given.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Namespace of everything that it makes.
    pub namespace: String,
    /// Image of agents and aggregator.
    pub image: String,
    /// When it is pulled, unless the object says otherwise; the cluster's default if absent.
    pub image_pull_policy: Option<String>,
    /// Secrets to pull it with, unless the object says otherwise.
    pub image_pull_secrets: Vec<String>,
    /// SELinux type of the agents, unless the object says otherwise.
    pub selinux_type: Option<String>,
}

/// What the cluster holds.
#[derive(Clone, Debug)]
pub struct Observed {
    /// Cluster address of the aggregator's Service, once it has one.
    pub aggregator_address: Option<IpAddr>,
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

/// Options that only a restart changes. Programs follow the object in all others.
const AT_START: [&str; 3] = ["log_format", "pprof_host", "pprof_port"];

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
    let token = token_reference(object).map(|reference| TokenSecret {
        name: reference.name.clone().unwrap_or_default(),
        key: token_key(reference).to_owned(),
    });
    let storage = aggregator.queue.clone().and_then(|queue| queue.storage);
    let at_start = |options: Vec<OptionValue>| {
        let options = options.into_iter().filter(|option| AT_START.contains(&option.key));
        options.flat_map(flags).collect()
    };
    Ok(Inputs {
        name,
        uid,
        namespace: settings.namespace.clone(),
        aggregator_address: observed.aggregator_address,
        material: observed.material,
        agent: AgentInputs {
            pod: PodInputs {
                image: agent.image.unwrap_or_else(|| settings.image.clone()),
                image_pull_policy: agent.image_pull_policy.or_else(|| settings.image_pull_policy.clone()),
                image_pull_secrets: agent
                    .image_pull_secrets
                    .unwrap_or_else(|| settings.image_pull_secrets.clone()),
                resources: agent.resources.map(|resources| json!(resources.to_requirements())),
                node_selector: agent.node_selector.unwrap_or_default(),
                tolerations: agent.tolerations.map(|tolerations| json!(tolerations)),
                affinity: agent.affinity.map(|affinity| json!(affinity)),
                priority_class: agent.priority_class_name,
                labels: agent.labels.unwrap_or_default(),
                annotations: agent.annotations.unwrap_or_default(),
                env: variables(agent.env),
            },
            selinux_type: agent.selinux_type.or_else(|| settings.selinux_type.clone()),
            max_unavailable: agent.max_unavailable.map(|number| json!(number)),
            host_root: agent.host_root,
            host_proc: agent.host_proc,
            arguments: at_start(spec.agent_options()),
        },
        aggregator: AggregatorInputs {
            pod: PodInputs {
                image: aggregator.image.unwrap_or_else(|| settings.image.clone()),
                image_pull_policy: aggregator
                    .image_pull_policy
                    .or_else(|| settings.image_pull_policy.clone()),
                image_pull_secrets: aggregator
                    .image_pull_secrets
                    .unwrap_or_else(|| settings.image_pull_secrets.clone()),
                resources: aggregator.resources.map(|resources| json!(resources.to_requirements())),
                node_selector: aggregator.node_selector.unwrap_or_default(),
                tolerations: aggregator.tolerations.map(|tolerations| json!(tolerations)),
                affinity: aggregator.affinity.map(|affinity| json!(affinity)),
                priority_class: aggregator.priority_class_name,
                labels: aggregator.labels.unwrap_or_default(),
                annotations: aggregator.annotations.unwrap_or_default(),
                env: variables(aggregator.env),
            },
            arguments: at_start(spec.aggregator_options()),
            token,
            volume: storage.and_then(volume).unwrap_or_default(),
        },
    })
}

fn variables(env: Option<Vec<EnvVar>>) -> Vec<Value> {
    env.into_iter().flatten().map(|variable| json!(variable)).collect()
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

/// Fields that are given and that change nothing, as this build does not carry them into the pods, or as others are
/// missing: people must be told.
#[must_use]
pub fn without_effect(object: &EbpfCollector) -> Vec<String> {
    let spec = &object.spec;
    let replicas = spec.aggregator.as_ref().and_then(|aggregator| aggregator.replicas);
    let more = replicas
        .is_some_and(|replicas| replicas != 1)
        .then(|| "spec.aggregator.replicas".to_owned());
    let outputs = spec.outputs.iter().flat_map(OutputsSpec::not_built);
    let alone = spec.agent_config().is_ok_and(|config| config.lacks_net_for_conntrack());
    more.into_iter()
        .chain(outputs.map(|name| format!("spec.outputs.{name}")))
        .chain(alone.then(|| "spec.plugins.ebpf-conntrack (without ebpf-net, to whose records it adds)".to_owned()))
        .collect()
}

fn volume(storage: QueueStorage) -> Option<QueueVolume> {
    if let Some(claim) = storage.volume_claim {
        return Some(QueueVolume::Claim {
            size: quantity(&claim.size?).0,
            storage_class: claim.storage_class_name,
            access_modes: claim.access_modes.unwrap_or_else(|| vec!["ReadWriteOnce".to_owned()]),
        });
    }
    Some(QueueVolume::Directory {
        size_limit: storage.empty_dir?.size_limit.as_ref().map(|size| quantity(size).0),
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
            image_pull_policy: Some("IfNotPresent".to_owned()),
            image_pull_secrets: vec!["registry".to_owned()],
            selinux_type: Some("spc_t".to_owned()),
        };
        let names = names::server_names("cluster", "observe");
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        let observed = Observed {
            aggregator_address: Some([10, 96, 0, 7].into()),
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
        assert!(inputs.aggregator.arguments.is_empty() && inputs.agent.arguments.is_empty());
        let token = inputs.aggregator.token.as_ref().unwrap();
        assert_eq!((token.name.as_str(), token.key.as_str()), ("dataway", "token"));
        let kinds = desired::desired(&inputs);
        assert!(kinds.iter().any(|object| object["kind"] == "DaemonSet"));
    }

    #[test]
    fn what_running_programs_take_over_is_no_argument() {
        let inputs = map(json!({
            "interval": "5s", "tags": { "a": "b" }, "plugins": { "ebpf-net": { "l7": [] } },
            "agent": { "kernel": { "flowMapEntries": 2048 }, "log": { "format": "text" }, "resources": { "limits": { "cpu": 1 } } },
            "aggregator": { "queue": { "size": "1GiB", "storage": { "volumeClaim": { "size": "10Gi" } } } },
        }))
        .unwrap();
        assert_eq!(inputs.agent.arguments, ["--log-format=text"]);
        assert_eq!(inputs.agent.pod.resources.unwrap()["limits"]["cpu"], "1");
        assert!(inputs.aggregator.arguments.is_empty());
        assert_eq!(
            inputs.aggregator.volume,
            QueueVolume::Claim {
                size: "10Gi".to_owned(),
                storage_class: None,
                access_modes: vec!["ReadWriteOnce".to_owned()],
            }
        );
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
            "outputs": { "stdout": "json", "loki": { "url": "http://loki:3100", "tokenSecretRef": { "name": "s" } }, "prometheus": { "enable": false } },
        }));
        assert_eq!(
            without_effect(&object),
            ["spec.aggregator.replicas", "spec.outputs.loki.tokenSecretRef"]
        );
        for nothing in [
            json!({ "aggregator": { "replicas": 1 } }),
            json!({ "plugins": { "ebpf-net": {}, "ebpf-conntrack": {} } }),
            json!({ "plugins": { "ebpf-conntrack": {} }, "namespaces": [
                { "match": { "names": ["shop"] }, "plugins": { "ebpf-net": { "enabled": true } } } ] }),
        ] {
            assert!(without_effect(&self::object(nothing.clone())).is_empty(), "{nothing}");
        }
        let alone = json!({ "plugins": { "ebpf-net": { "enabled": false }, "ebpf-conntrack": {} } });
        let told = without_effect(&self::object(alone));
        assert!(
            told.len() == 1 && told[0].starts_with("spec.plugins.ebpf-conntrack"),
            "{told:?}"
        );
    }

    #[test]
    fn what_the_object_leaves_open_is_as_the_operator_was_installed() {
        let inputs = map(json!({
            "agent": { "image": "mirror/collector:2", "imagePullSecrets": [], "selinuxType": "own_t" },
            "aggregator": { "imagePullPolicy": "Always" },
        }))
        .unwrap();
        let (agent, aggregator) = (&inputs.agent.pod, &inputs.aggregator.pod);
        assert_eq!(
            (agent.image.as_str(), aggregator.image.as_str()),
            ("mirror/collector:2", "collector:1")
        );
        assert_eq!(agent.image_pull_policy.as_deref(), Some("IfNotPresent"));
        assert_eq!(aggregator.image_pull_policy.as_deref(), Some("Always"));
        assert!(agent.image_pull_secrets.is_empty());
        assert_eq!(aggregator.image_pull_secrets, ["registry"]);
        assert_eq!(inputs.agent.selinux_type.as_deref(), Some("own_t"));
        assert_eq!(map(json!({})).unwrap().agent.selinux_type.as_deref(), Some("spc_t"));
    }
}
