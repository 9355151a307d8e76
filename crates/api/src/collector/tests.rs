//! Tests of the object.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::collections::{BTreeMap, BTreeSet};

use kube::CustomResourceExt as _;
use serde_json::Value;

use super::*;
use crate::{L7Flow, Plugin, options};

const MINIMAL: &str = "
apiVersion: ebpfcollector.io/v1alpha1
kind: EbpfCollector
metadata: { name: cluster }
spec:
  dataway:
    url: https://openway.guance.com
    tokenSecretRef: { name: dataway }
";

fn spec(yaml: &str) -> EbpfCollectorSpec {
    serde_yaml::from_str(yaml).unwrap()
}

fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}

fn schema() -> Value {
    let crd = serde_json::to_value(EbpfCollector::crd()).unwrap();
    crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"].clone()
}

#[test]
fn minimal_object_is_the_documented_default() {
    let object: EbpfCollector = serde_yaml::from_str(MINIMAL).unwrap();
    let agent = object.spec.agent_config().unwrap();
    assert_eq!(agent, crate::AgentConfig::default());
    let aggregator = object.spec.aggregator_config().unwrap();
    assert_eq!(aggregator.outputs.dataway.len(), 1);
    assert_eq!(
        aggregator.outputs.dataway_token_file.unwrap().to_str(),
        Some(DATAWAY_TOKEN_FILE)
    );
}

#[test]
fn every_option_is_a_field_or_has_a_reason_not_to_be() {
    let fields: BTreeSet<&str> = option_fields().map(|(key, _)| key).collect();
    let without: BTreeSet<&str> = NOT_IN_OBJECT.iter().map(|(key, _)| *key).collect();
    for option in options() {
        assert!(
            fields.contains(option.key) != without.contains(option.key),
            "{} must be either a field or in NOT_IN_OBJECT",
            option.key
        );
    }
}

#[test]
fn every_field_is_in_the_schema_with_the_options_default() {
    let schema = schema();
    for (key, path) in option_fields() {
        let mut at = &schema;
        for step in path.split('.') {
            at = &at["properties"][step];
        }
        assert!(at["description"].is_string(), "{path} is not in the schema");
        let option = options().iter().find(|option| option.key == key).unwrap();
        let shown = match &at["default"] {
            Value::Null => continue,
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        // In a pod the host's root is mounted below the pod's own. What is given in the object is on unless it says
        // otherwise. The others are the same value in another form.
        if ![
            "host_root",
            "kafka_tls",
            "flow_metrics",
            "loki_batch_size",
            "loki_static_labels",
        ]
        .contains(&key)
        {
            assert_eq!(Some(shown.as_str()), option.default, "{path}");
        }
    }
}

#[test]
fn explicit_false_and_zero_survive() {
    let text = "{ plugins: { ebpf-net: { ephemeralPort: 0, l7: [] }, bpf-netlog: { enabled: false, metric: false } }, dataway: { gzip: false } }";
    let spec = spec(text);
    let again: EbpfCollectorSpec = serde_json::from_value(serde_json::to_value(&spec).unwrap()).unwrap();
    assert_eq!(again, spec);
    let agent = again.agent_config().unwrap();
    assert_eq!(agent.net.ephemeral_port, 0);
    assert!(agent.net.l7.is_empty() && !agent.netlog.metric);
    assert!(!again.aggregator_config().unwrap().outputs.dataway_gzip);
}

#[test]
fn errors_name_the_field() {
    for (yaml, wants) in [
        ("{ interval: 2h }", ["interval = \"2h\"", "spec.interval"]),
        ("{ limits: { mem: 4X } }", ["mem_limit", "spec.limits.mem"]),
        (
            "{ plugins: { bpf-netlog: { blacklist: 'tcp &&' } } }",
            [
                "line 1, column 7: the end of the program",
                "spec.plugins.bpf-netlog.blacklist",
            ],
        ),
        (
            "{ outputs: { kafka: { address: 'k1', topic: t } } }",
            ["kafka_address", "spec.outputs.kafka.address"],
        ),
        (
            "{ sampling: { rate: 0.1, ptsPerMin: 5 } }",
            ["exclude", "spec.sampling.rate"],
        ),
        (
            "{ plugins: { ebpf-net: {}, ebpf-trace: {} } }",
            ["trace_server", "spec.plugins"],
        ),
        ("{ tags: { dst_ip: x } }", ["dst_ip", "spec.tags"]),
        ("{ dataway: { url: 'https://h' } }", ["no token", "spec.dataway.urls"]),
        (
            "{ dataway: { urls: ['https://h?token=s3cret', 'https://g?Token=t'] } }",
            ["tokenSecretRef", "spec.dataway"],
        ),
        ("{ limits: { mem: 1MiB } }", ["16MiB", "spec.limits.mem"]),
        (
            "{ agent: { kernel: { ringBufferSize: 3MiB } } }",
            ["power of two", "spec.agent.kernel.ringBufferSize"],
        ),
    ] {
        let message = spec(yaml).validate().unwrap_err().to_string();
        assert!(!message.contains("s3cret"), "{message}");
        assert!(wants.iter().all(|want| message.contains(want)), "{yaml}: {message}");
    }
}

#[test]
fn policy_by_namespace() {
    let spec = spec(
        "
plugins: { ebpf-net: { l7: [httpflow] }, ebpf-conntrack: {}, ebpf-trace: { server: 'h:1' }, ebpf-bash: { enabled: false } }
allowNamespaceAnnotation: true
namespaces:
  - { match: { names: [quiet] }, plugins: { ebpf-net: { enabled: false }, ebpf-conntrack: { enabled: false } } }
  - match: { selector: { matchLabels: { tier: gold }, matchExpressions: [{ key: env, operator: NotIn, values: [dev] }] } }
    plugins: { ebpf-net: { l7: [httpflow, httpflow-tls] }, ebpf-bash: { enabled: true } }
  - { match: { names: [gold] }, plugins: { ebpf-net: { enabled: false } } }
",
    );
    use Plugin::{EbpfBash as Bash, EbpfConntrack as Conntrack, EbpfNet as Net, EbpfTrace as Trace};
    let gold = map(&[("tier", "gold")]);
    let gold_dev = map(&[("tier", "gold"), ("env", "dev")]);
    let none = BTreeMap::new();
    let http = [L7Flow::Http].as_slice();
    let both = [L7Flow::Http, L7Flow::HttpTls].as_slice();
    // (namespace, labels, annotation, plugins, l7, ignored items)
    // Namespace, its labels, its annotation; plugins, protocols and number of ignored items expected.
    type Row<'a> = (
        &'a str,
        &'a BTreeMap<String, String>,
        Option<&'a str>,
        &'a [Plugin],
        &'a [L7Flow],
        usize,
    );
    let table: &[Row<'_>] = &[
        ("other", &none, None, &[Net, Conntrack, Trace], http, 0),
        ("quiet", &gold, None, &[], &[], 0),
        ("gold", &gold, None, &[Net, Bash, Conntrack, Trace], both, 0),
        ("gold", &gold_dev, None, &[Conntrack], &[], 0),
        ("other", &none, Some(""), &[], &[], 0),
        ("other", &none, Some("none"), &[], &[], 0),
        ("other", &none, Some("ebpf-net"), &[Net], http, 0),
        ("other", &none, Some("ebpf-net, ebpf-bash, nonsense"), &[Net], http, 2),
        (
            "x",
            &gold,
            Some("ebpf-net/httpflow-tls,ebpf-trace"),
            &[Net],
            &[L7Flow::HttpTls],
            0,
        ),
        ("quiet", &none, Some("ebpf-net"), &[], &[], 1),
    ];
    for (namespace, labels, annotation, plugins, l7, ignored) in table {
        let annotations = annotation.map_or_else(BTreeMap::new, |value| map(&[(PLUGINS_ANNOTATION, value)]));
        let got = plugins_for(&spec, namespace, labels, &annotations);
        assert_eq!(
            got.plugins,
            plugins.iter().copied().collect(),
            "{namespace} {labels:?} {annotation:?}"
        );
        assert_eq!(
            got.l7,
            l7.iter().copied().collect(),
            "{namespace} {labels:?} {annotation:?}"
        );
        assert_eq!(got.ignored.len(), *ignored, "{namespace} {annotation:?}");
    }
    let agent = spec.agent_config().unwrap();
    assert_eq!(agent.plugins, [Net, Bash, Conntrack, Trace].into_iter().collect());
    assert_eq!(agent.net.l7, both.iter().copied().collect());
    assert!(spec.features_not_built().unwrap().contains(&"ebpf-trace".to_owned()));
}

#[test]
fn outputs_of_flows_are_taken_over() {
    let text = "{ outputs: { flowFormat: seed, kafka: { address: 'k1:9092,k2:9092', topic: flows, tls: {} }, \
                loki: { url: 'http://loki:3100', writeBatchSize: 2048, staticLabels: { app: x } }, \
                prometheus: { includeList: [node_flows], metrics: [{ name: mine, type: counter, valueKey: Bytes }] } } }";
    let spec = spec(text);
    let config = spec.aggregator_config().unwrap();
    let outputs = &config.outputs;
    assert_eq!(outputs.flow_format, crate::FlowFormat::Seed);
    assert_eq!((outputs.kafka.address.len(), outputs.kafka.tls), (2, true));
    assert_eq!((outputs.loki.batch_size.0, outputs.loki.static_labels.len()), (2048, 1));
    assert!(outputs.flow_metrics.enable);
    assert_eq!(outputs.flow_metrics.include, ["node_flows"]);
    let own: Value = serde_json::from_str(outputs.flow_metrics.custom.as_ref().unwrap()).unwrap();
    assert_eq!(
        own,
        serde_json::json!([{ "name": "mine", "type": "counter", "valueKey": "Bytes" }])
    );
}

#[test]
fn annotation_has_no_effect_unless_allowed() {
    let got = plugins_for(
        &EbpfCollectorSpec::default(),
        "x",
        &BTreeMap::new(),
        &map(&[(PLUGINS_ANNOTATION, "none")]),
    );
    assert_eq!(got.plugins, [Plugin::EbpfNet].into_iter().collect());
}
