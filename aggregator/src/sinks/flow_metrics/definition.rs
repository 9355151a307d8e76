//! What a metric is made of, and the checks on it.

use std::collections::BTreeMap;

use records::flowlog::{
    Cardinality, FlowFormat, FlowType,
    fields::{self, FlowField},
};
use serde::Deserialize;

/// One metric made from flows.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FlowMetric {
    /// Its name, without the prefix.
    pub name: String,
    /// Its kind.
    #[serde(rename = "type")]
    pub kind: MetricKind,
    /// What it tells.
    #[serde(default)]
    pub help: String,
    /// Flows it is made from: filters of one field are alternatives, those of different fields must all hold.
    #[serde(default)]
    pub filters: Vec<MetricFilter>,
    /// Field that is summed up; empty: flows are counted.
    #[serde(default)]
    pub value_key: String,
    /// Fields that become labels; `NetworkEvents>KEY` for a value of an event.
    #[serde(default)]
    pub labels: Vec<String>,
    /// Other names for labels.
    #[serde(default)]
    pub remap: BTreeMap<String, String>,
    /// List fields of which each element makes a sample.
    #[serde(default)]
    pub flatten: Vec<String>,
    /// Upper bounds of a histogram's buckets.
    #[serde(default)]
    pub buckets: Vec<f64>,
    /// The value is divided by this; 0 for 1.
    #[serde(default)]
    pub value_scale: f64,
}

/// Kind of a metric.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MetricKind {
    /// Sums.
    #[default]
    Counter,
    /// The last value.
    Gauge,
    /// How values are spread.
    Histogram,
}

/// Which flows a metric is made from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetricFilter {
    /// Field.
    pub key: String,
    /// What it is compared with.
    #[serde(default)]
    pub value: String,
    /// How.
    #[serde(default, rename = "type")]
    pub how: Match,
}

/// How a field is compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Match {
    /// The same text.
    #[default]
    Equal,
    /// Another text, or none.
    NotEqual,
    /// There is a value.
    Presence,
    /// There is none.
    Absence,
    /// The expression is found in the text.
    MatchRegex,
    /// It is not.
    NotMatchRegex,
}

/// What is wrong with a metric.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{part}: `{value}` is not accepted; {accepted}")]
pub struct MetricError {
    /// Part of the definition.
    pub part: &'static str,
    /// Its value.
    pub value: String,
    /// What would be accepted.
    pub accepted: String,
}

/// A field, or a value of an event, by the name in a definition.
#[derive(Clone, Copy, Debug)]
pub(super) enum Source<'a> {
    Field(&'static FlowField),
    Event(&'a str),
}

/// The source of a name.
pub(super) fn source(name: &str) -> Option<Source<'_>> {
    if let Some(key) = name.strip_prefix("NetworkEvents>") {
        return (!key.is_empty()).then_some(Source::Event(key));
    }
    fields::find(name)
        .filter(|field| field.ty(FlowFormat::Current).is_some())
        .map(Source::Field)
}

/// Name of a label.
pub(super) fn label_name<'a>(metric: &'a FlowMetric, label: &'a str) -> &'a str {
    match metric.remap.get(label) {
        Some(name) => name,
        None => label.strip_prefix("NetworkEvents>").unwrap_or(label),
    }
}

fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

/// Checks a definition.
///
/// # Errors
/// [`MetricError`] names the part.
pub(crate) fn check(metric: &FlowMetric) -> Result<(), MetricError> {
    let refuse = |part, value: &str, accepted: &str| {
        Err(MetricError {
            part,
            value: value.to_owned(),
            accepted: accepted.to_owned(),
        })
    };
    if !is_name(&metric.name) || metric.name.len() > 128 {
        return refuse("name", &metric.name, "1 to 128 letters, digits and `_` are accepted");
    }
    for label in &metric.labels {
        match source(label) {
            None => return refuse("labels", label, "the name of a field of flows is accepted"),
            Some(Source::Event(_)) if !metric.flatten.iter().any(|list| list == "NetworkEvents") => {
                return refuse("labels", label, "NetworkEvents in `flatten` is needed for it");
            }
            Some(Source::Event(_)) => {}
            Some(Source::Field(field)) => {
                if field.cardinality == Cardinality::Avoid {
                    return refuse(
                        "labels",
                        label,
                        "it has too many values to be a label; fields of the classes fine and careful are accepted",
                    );
                }
                let list = matches!(field.current, Some(FlowType::Texts | FlowType::Numbers));
                if list && !metric.flatten.iter().any(|list| list == label) {
                    return refuse("labels", label, "a list as a label is accepted together with `flatten`");
                }
            }
        }
        let name = label_name(metric, label);
        if !is_name(name) || name.starts_with("__") || name == "le" {
            return refuse("remap", name, "letters, digits and `_` are accepted, not `le`");
        }
    }
    let mut names: Vec<&str> = metric.labels.iter().map(|label| label_name(metric, label)).collect();
    names.sort_unstable();
    if let Some([twice, _]) = names.array_windows().find(|[a, b]| a == b) {
        return refuse("labels", twice, "each label once is accepted");
    }
    for list in &metric.flatten {
        let known = fields::find(list).is_some_and(|field| {
            matches!(
                field.current,
                Some(FlowType::Texts | FlowType::Numbers | FlowType::Objects)
            )
        });
        if !known {
            return refuse(
                "flatten",
                list,
                "Interfaces, IfDirections, Flags and NetworkEvents are accepted",
            );
        }
    }
    let number = |field: &FlowField| field.current == Some(FlowType::Number);
    if !metric.value_key.is_empty() && !fields::find(&metric.value_key).is_some_and(number) {
        return refuse(
            "valueKey",
            &metric.value_key,
            "the name of a field that is a number is accepted",
        );
    }
    if metric.value_key.is_empty() && metric.kind != MetricKind::Counter {
        return refuse("valueKey", "", "a gauge or histogram needs a field");
    }
    for filter in &metric.filters {
        if source(&filter.key).is_none() {
            return refuse("filters", &filter.key, "the name of a field of flows is accepted");
        }
        if matches!(filter.how, Match::MatchRegex | Match::NotMatchRegex)
            && let Err(error) = expression(&filter.value)
        {
            return refuse(
                "filters",
                &filter.value,
                &format!("a regular expression is accepted ({error})"),
            );
        }
    }
    let histogram = metric.kind == MetricKind::Histogram;
    if histogram == metric.buckets.is_empty() {
        let text = format!("{:?}", metric.buckets);
        return refuse("buckets", &text, "a histogram needs them, another kind has none");
    }
    let ascending = metric.buckets.iter().all(|bound| bound.is_finite()) && metric.buckets.is_sorted_by(|a, b| a < b);
    if !ascending || metric.buckets.len() > 64 {
        let text = format!("{:?}", metric.buckets);
        return refuse("buckets", &text, "at most 64 growing numbers are accepted");
    }
    if metric.value_scale < 0.0 || !metric.value_scale.is_finite() {
        return refuse(
            "valueScale",
            &metric.value_scale.to_string(),
            "a number above 0 is accepted",
        );
    }
    Ok(())
}

/// What is accepted but should be looked at.
pub(crate) fn warnings(metric: &FlowMetric) -> Vec<String> {
    metric
        .labels
        .iter()
        .filter(
            |label| matches!(source(label), Some(Source::Field(field)) if field.cardinality == Cardinality::Careful),
        )
        .map(|label| {
            format!(
                "Metric {}: label {label} may have many values, and each makes a series",
                metric.name
            )
        })
        .collect()
}

/// Compiles an expression, with a bound on what it may take.
pub(super) fn expression(text: &str) -> Result<regex::Regex, regex::Error> {
    regex::RegexBuilder::new(text).size_limit(1 << 20).build()
}
