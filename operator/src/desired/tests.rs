#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

use jiff::Timestamp;
use k8s_openapi::api::{
    apps::v1::{DaemonSet, StatefulSet},
    core::v1::{PersistentVolumeClaim, Secret, Service, ServiceAccount},
    networking::v1::NetworkPolicy,
    policy::v1::PodDisruptionBudget,
    rbac::v1::{ClusterRole, ClusterRoleBinding},
};
use serde::{Serialize, de::DeserializeOwned};

use super::*;
use crate::certificates::{Existing, Policy};

fn inputs() -> Inputs {
    let names = names::server_names("cluster", "observe");
    let now = Timestamp::from_second(1_800_000_000).unwrap();
    Inputs {
        name: "cluster".to_owned(),
        uid: "9f1c".to_owned(),
        namespace: "observe".to_owned(),
        aggregator_address: Some([10, 96, 0, 7].into()),
        material: Material::plan(Existing::default(), &names, &Policy::default(), now).unwrap(),
        agent: AgentInputs {
            pod: pod_inputs(),
            ..AgentInputs::default()
        },
        aggregator: AggregatorInputs {
            pod: pod_inputs(),
            token: Some(TokenSecret {
                name: "dataway".to_owned(),
                key: "token".to_owned(),
            }),
            ..AggregatorInputs::default()
        },
    }
}

fn pod_inputs() -> PodInputs {
    PodInputs {
        image: "ebpf-collector:1".to_owned(),
        ..PodInputs::default()
    }
}

/// All that people may say of a pod.
fn full_pod() -> PodInputs {
    let map = |key: &str, value: &str| BTreeMap::from([(key.to_owned(), value.to_owned())]);
    PodInputs {
        image: "ebpf-collector:1".to_owned(),
        image_pull_policy: Some("Never".to_owned()),
        image_pull_secrets: vec!["registry".to_owned()],
        resources: Some(json!({ "limits": { "memory": "256Mi" } })),
        node_selector: map("a", "b"),
        tolerations: Some(json!([{ "key": "dedicated", "operator": "Exists" }])),
        affinity: Some(
            json!({ "nodeAffinity": { "requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [{ "matchExpressions": [{ "key": "arch", "operator": "In", "values": ["amd64"] }] }],
        } } }),
        ),
        priority_class: Some("high".to_owned()),
        labels: map("team", "net"),
        annotations: map("note", "n"),
        env: vec![json!({ "name": "ENV_INPUT_EBPF_LOG_LEVEL", "value": "debug" })],
    }
}

fn of_kind<'a>(objects: &'a [Value], kind: &str) -> Vec<&'a Value> {
    objects.iter().filter(|object| object["kind"] == kind).collect()
}

fn pod(object: &Value) -> &Value {
    &object["spec"]["template"]["spec"]
}

/// The published types know every field that is set, with its type: nothing is lost on the way through them.
#[test]
fn every_manifest_is_of_its_published_type() {
    fn through<T: DeserializeOwned + Serialize>(object: &Value) -> Value {
        serde_json::to_value(serde_json::from_value::<T>(object.clone()).unwrap()).unwrap()
    }
    let mut inputs = inputs();
    inputs.aggregator.volume = claim(Some("fast"));
    inputs.agent.selinux_type = Some("spc_t".to_owned());
    inputs.agent.max_unavailable = Some(json!("10%"));
    (inputs.agent.pod, inputs.aggregator.pod) = (full_pod(), full_pod());
    let objects = desired(&inputs);
    for object in &objects {
        let back = match object["kind"].as_str().unwrap() {
            "ClusterRole" => through::<ClusterRole>(object),
            "ClusterRoleBinding" => through::<ClusterRoleBinding>(object),
            "DaemonSet" => through::<DaemonSet>(object),
            "NetworkPolicy" => through::<NetworkPolicy>(object),
            "PersistentVolumeClaim" => through::<PersistentVolumeClaim>(object),
            "PodDisruptionBudget" => through::<PodDisruptionBudget>(object),
            "Secret" => through::<Secret>(object),
            "Service" => through::<Service>(object),
            "ServiceAccount" => through::<ServiceAccount>(object),
            "StatefulSet" => through::<StatefulSet>(object),
            kind => panic!("nobody expects a {kind}"),
        };
        assert_eq!(crate::drift::is_current(object, &back), Ok(()), "{}", object["kind"]);
    }
    assert_eq!(objects.len(), 4 + 6 + 5 + 1);
}

#[test]
fn the_object_owns_all_and_the_same_inputs_make_the_same_manifests() {
    let inputs = inputs();
    let objects = desired(&inputs);
    assert_eq!(objects, desired(&inputs));
    for object in &objects {
        let owner = &object["metadata"]["ownerReferences"][0];
        assert_eq!(
            (&owner["uid"], &owner["kind"]),
            (&json!("9f1c"), &json!("EbpfCollector"))
        );
        assert_eq!(
            object["metadata"]["labels"]["app.kubernetes.io/managed-by"],
            names::FIELD_MANAGER
        );
        assert_eq!(object["metadata"]["labels"]["app.kubernetes.io/instance"], "cluster");
        let cluster_wide = object["kind"].as_str().unwrap().starts_with("Cluster");
        assert_eq!(object["metadata"]["namespace"].is_null(), cluster_wide);
    }
}

#[test]
fn agents_have_the_listed_capabilities_and_no_more() {
    let objects = desired(&inputs());
    let agent = pod(of_kind(&objects, "DaemonSet")[0]);
    let container = &agent["containers"][0];
    let security = &container["securityContext"];
    assert_eq!(security["capabilities"]["drop"], json!(["ALL"]));
    // The document's table is what users are told.
    let document = include_str!("../../../docs/CAPABILITIES.md");
    let documented: Vec<String> = document
        .lines()
        .filter_map(|line| line.strip_prefix("| `CAP_")?.split('`').next().map(str::to_owned))
        .collect();
    assert_eq!(security["capabilities"]["add"], json!(documented));
    assert_eq!(security["privileged"], false);
    assert_eq!(security["readOnlyRootFilesystem"], true);
    assert_eq!(security["seccompProfile"]["type"], "RuntimeDefault");
    assert!(security.get("seLinuxOptions").is_none());
    assert_eq!((&agent["hostPID"], &agent["hostNetwork"]), (&json!(true), &json!(true)));
    assert_eq!(agent["tolerations"], json!([{ "operator": "Exists" }]));
    for mount in container["volumeMounts"].as_array().unwrap() {
        assert_eq!(mount["readOnly"], true, "{mount}");
    }
}

#[test]
fn pods_read_what_they_need_and_change_nothing() {
    let objects = desired(&inputs());
    let mut readable = Vec::new();
    let roles = of_kind(&objects, "ClusterRole");
    for rule in roles[0]["rules"].as_array().unwrap() {
        assert_eq!(rule["verbs"], json!(["get", "list", "watch"]));
        readable.extend(
            rule["resources"]
                .as_array()
                .unwrap()
                .iter()
                .map(|r| r.as_str().unwrap().to_owned()),
        );
    }
    readable.sort();
    let expected = [
        "cronjobs",
        "daemonsets",
        "deployments",
        "ebpfcollectors",
        "endpointslices",
        "jobs",
        "namespaces",
        "nodes",
        "pods",
        "replicasets",
        "services",
        "statefulsets",
    ];
    assert_eq!(readable, expected);
    // The aggregator, and nobody else's object.
    assert_eq!(
        roles[1]["rules"],
        json!([{ "apiGroups": ["ebpfcollector.io"], "resources": ["ebpfcollectors"], "resourceNames": ["cluster"],
            "verbs": ["get", "list", "watch"] }])
    );
    let bindings = of_kind(&objects, "ClusterRoleBinding");
    for (index, account) in ["cluster-agent", "cluster-aggregator"].into_iter().enumerate() {
        assert_eq!(bindings[index]["subjects"][0]["name"], account);
        assert_eq!(bindings[index]["roleRef"]["name"], roles[index]["metadata"]["name"]);
    }
    let aggregator = pod(of_kind(&objects, "StatefulSet")[0]);
    assert_eq!(aggregator["securityContext"]["runAsNonRoot"], true);
    assert!(
        aggregator["containers"][0]["securityContext"]["capabilities"]
            .get("add")
            .is_none()
    );
}

#[test]
fn pods_wait_for_the_services_address_and_use_its_family() {
    let mut inputs = inputs();
    let listens = |inputs: &Inputs, at: &str| {
        let objects = desired(inputs);
        let arguments = pod(of_kind(&objects, "StatefulSet")[0])["containers"][0]["args"].clone();
        arguments.as_array().unwrap().contains(&json!(at))
    };
    assert!(listens(&inputs, "0.0.0.0:6063"));
    inputs.aggregator_address = None;
    let kinds: Vec<Value> = desired(&inputs).iter().map(|object| object["kind"].clone()).collect();
    assert!(
        kinds.contains(&json!("Service"))
            && !kinds.contains(&json!("DaemonSet"))
            && !kinds.contains(&json!("StatefulSet"))
    );
    inputs.aggregator_address = Some("fd00::7".parse().unwrap());
    assert!(listens(&inputs, "[::]:6063"));
    let objects = desired(&inputs);
    let arguments = &pod(of_kind(&objects, "DaemonSet")[0])["containers"][0]["args"];
    assert!(
        arguments.as_array().unwrap().contains(&json!("https://[fd00::7]:6063")),
        "{arguments}"
    );
    assert!(
        arguments
            .as_array()
            .unwrap()
            .contains(&json!("cluster-aggregator.observe.svc")),
        "{arguments}"
    );
}

#[test]
fn each_change_touches_only_what_it_must() {
    type Change = fn(&mut Inputs);
    let changes: [(&str, Change, &[&str]); 6] = [
        ("nothing", |_| {}, &[]),
        (
            "image",
            |i| i.agent.pod.image = "ebpf-collector:2".to_owned(),
            &["DaemonSet"],
        ),
        (
            "another Secret with the token",
            |i| i.aggregator.token.as_mut().unwrap().name = "other".to_owned(),
            &["StatefulSet"],
        ),
        (
            "aggregator's log format",
            |i| i.aggregator.arguments.push("--log-format=text".to_owned()),
            &["StatefulSet"],
        ),
        (
            "agent's memory",
            |i| i.agent.pod.resources = Some(json!({ "limits": { "memory": "1Gi" } })),
            &["DaemonSet"],
        ),
        (
            "agents' certificate",
            |i| i.material.agent.certificate.push('\n'),
            // Running pods read the files again: a renewal restarts nothing.
            &["Secret"],
        ),
    ];
    let before = desired(&inputs());
    let base = inputs();
    let before_of = |object: &Value| {
        let same =
            |other: &&Value| other["kind"] == object["kind"] && other["metadata"]["name"] == object["metadata"]["name"];
        desired(&base).iter().find(same).cloned()
    };
    for (what, change, kinds) in changes {
        let mut changed = base.clone();
        change(&mut changed);
        let after = desired(&changed);
        assert_eq!(after.len(), before.len(), "{what}");
        let touched: Vec<&str> = after
            .iter()
            .filter(|object| before_of(object).as_ref() != Some(*object))
            .map(|object| object["kind"].as_str().unwrap())
            .collect();
        let mut touched = touched;
        touched.sort_unstable();
        assert_eq!(touched, kinds, "{what}");
    }
}

#[test]
fn no_secret_is_outside_secrets() {
    let inputs = inputs();
    let keys = [
        &inputs.material.authority.current.key,
        &inputs.material.aggregator.key,
        &inputs.material.agent.key,
    ];
    for object in desired(&inputs).iter().filter(|object| object["kind"] != "Secret") {
        let text = object.to_string();
        for key in keys {
            assert!(
                !text.contains(base64(key).as_str().unwrap()) && !text.contains("PRIVATE KEY"),
                "{text}"
            );
        }
    }
    let objects = desired(&inputs);
    let aggregator = pod(of_kind(&objects, "StatefulSet")[0]);
    assert_eq!(aggregator["volumes"][2]["secret"]["secretName"], "dataway");
    // The authority's key is mounted nowhere.
    assert!(
        !objects
            .iter()
            .any(|o| o["spec"].to_string().contains("cluster-authority"))
    );
}

#[test]
fn the_queue_has_a_claim_if_asked_for() {
    let mut inputs = inputs();
    let volume = |inputs: &Inputs| pod(of_kind(&desired(inputs), "StatefulSet")[0])["volumes"][0].clone();
    assert_eq!(volume(&inputs), json!({ "name": "queue", "emptyDir": {} }));
    inputs.aggregator.volume = QueueVolume::Directory {
        size_limit: Some("4Gi".to_owned()),
    };
    assert_eq!(
        volume(&inputs),
        json!({ "name": "queue", "emptyDir": { "sizeLimit": "4Gi" } })
    );
    inputs.aggregator.volume = claim(None);
    assert_eq!(
        volume(&inputs)["persistentVolumeClaim"]["claimName"],
        "cluster-aggregator-queue"
    );
    let objects = desired(&inputs);
    assert_eq!(
        of_kind(&objects, "PersistentVolumeClaim")[0]["metadata"]["name"],
        "cluster-aggregator-queue"
    );
}

fn claim(class: Option<&str>) -> QueueVolume {
    QueueVolume::Claim {
        size: "10Gi".to_owned(),
        storage_class: class.map(str::to_owned),
        access_modes: vec!["ReadWriteOnce".to_owned()],
    }
}

#[test]
fn what_people_say_of_pods_is_in_them_and_ours_wins() {
    let mut inputs = inputs();
    let mut given = full_pod();
    given
        .labels
        .insert("app.kubernetes.io/component".to_owned(), "other".to_owned());
    (inputs.agent.pod, inputs.aggregator.pod) = (given.clone(), given);
    inputs.agent.host_root = Some("/node".to_owned());
    inputs.agent.host_proc = Some("/node/proc".to_owned());
    inputs.agent.max_unavailable = Some(json!("10%"));
    let objects = desired(&inputs);
    let agents = of_kind(&objects, "DaemonSet")[0];
    assert_eq!(
        agents["spec"]["updateStrategy"]["rollingUpdate"]["maxUnavailable"],
        "10%"
    );
    let agent = pod(agents);
    assert_eq!(agent["containers"][0]["volumeMounts"][0]["mountPath"], "/node");
    let arguments = agent["containers"][0]["args"].as_array().unwrap().clone();
    for pair in [["--host-root", "/node"], ["--host-proc", "/node/proc"]] {
        assert!(arguments.windows(2).any(|two| two == pair), "{arguments:?}");
    }
    for (kind, component, env) in [("DaemonSet", "node-agent", 1), ("StatefulSet", "aggregator", 0)] {
        let object = of_kind(&objects, kind)[0];
        let (metadata, pod) = (&object["spec"]["template"]["metadata"], pod(object));
        assert_eq!(metadata["labels"]["team"], "net");
        assert_eq!(metadata["labels"]["app.kubernetes.io/component"], component);
        assert_eq!(metadata["annotations"]["note"], "n");
        assert_eq!(pod["imagePullSecrets"], json!([{ "name": "registry" }]));
        assert_eq!(pod["priorityClassName"], "high");
        assert_eq!(pod["tolerations"][0]["key"], "dedicated");
        assert_eq!(pod["nodeSelector"], json!({ "a": "b" }));
        assert!(pod["affinity"]["nodeAffinity"].is_object());
        assert_eq!(pod["containers"][0]["env"][env]["name"], "ENV_INPUT_EBPF_LOG_LEVEL");
        assert_eq!(pod["containers"][0]["imagePullPolicy"], "Never");
        // The selector names what the pods carry.
        for (label, value) in object["spec"]["selector"]["matchLabels"].as_object().unwrap() {
            assert_eq!(&metadata["labels"][label], value);
        }
    }
}
