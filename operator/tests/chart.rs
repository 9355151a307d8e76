//! The chart's files against each other and against what uses them, as far as that can be told without Helm.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::{collections::BTreeSet, fs, path::Path};

use serde_json::Value;

fn read(path: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    fs::read_to_string(root.join(path)).unwrap_or_else(|error| unreachable!("{path}: {error}"))
}

fn yaml(path: &str) -> Value {
    serde_yaml::from_str(&read(path)).unwrap()
}

/// Paths of all values that are no objects, and of empty objects.
fn leaves(value: &Value, path: &str, into: &mut BTreeSet<String>) {
    match value.as_object().filter(|fields| !fields.is_empty()) {
        Some(fields) => fields
            .iter()
            .for_each(|(name, value)| leaves(value, &format!("{path}.{name}"), into)),
        None => {
            into.insert(path.to_owned());
        }
    }
}

/// Paths of all properties of a schema that have none themselves.
fn properties(schema: &Value, path: &str, into: &mut BTreeSet<String>) {
    match schema["properties"].as_object() {
        Some(fields) => fields
            .iter()
            .for_each(|(name, schema)| properties(schema, &format!("{path}.{name}"), into)),
        None => {
            into.insert(path.to_owned());
        }
    }
}

#[test]
fn schema_and_values_have_the_same_fields() {
    let schema: Value = serde_json::from_str(&read("charts/ebpf-collector/values.schema.json")).unwrap();
    // Requests and limits are the cluster's to name.
    let mut values = yaml("charts/ebpf-collector/values.yaml");
    values["resources"] = Value::Null;
    let (mut given, mut known) = (BTreeSet::new(), BTreeSet::new());
    leaves(&values, "", &mut given);
    properties(&schema, "", &mut known);
    // Helm puts it in for subcharts.
    assert!(known.remove(".global"));
    assert_eq!(given, known);
}

#[test]
fn skaffold_sets_values_that_the_chart_has() {
    let skaffold = yaml("skaffold.yaml");
    let release = &skaffold["deploy"]["helm"]["releases"][0];
    let chart = release["chartPath"].as_str().unwrap();
    let values = yaml(&format!("{chart}/values.yaml"));
    let set = release["setValueTemplates"].as_object().unwrap();
    assert!(set.contains_key("image.repository") && set.contains_key("image.tag"));
    for path in set.keys() {
        let pointer = format!("/{}", path.replace('.', "/"));
        assert!(values.pointer(&pointer).is_some(), "{path} is no value of the chart");
    }
    let image = skaffold["build"]["artifacts"][0]["image"].as_str().unwrap();
    let template = format!("{{{{.IMAGE_REPO_{}}}}}", image.replace('-', "_"));
    assert_eq!(set["image.repository"], template);
}

#[test]
fn chart_and_programs_are_of_one_version() {
    let chart = yaml("charts/ebpf-collector/Chart.yaml");
    assert_eq!(chart["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(chart["appVersion"], env!("CARGO_PKG_VERSION"));
}
