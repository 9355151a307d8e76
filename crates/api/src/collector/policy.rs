//! Which plugins run for a namespace: a pure function of the object and the namespace's name, labels and annotations.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

use super::{EbpfCollectorSpec, NamespaceMatch, NamespacePluginsSpec, PLUGINS_ANNOTATION, PluginsSpec};
use crate::{L7Flow, Plugin};

/// What runs for a namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NamespacePlugins {
    /// Plugins.
    pub plugins: BTreeSet<Plugin>,
    /// Application protocols that ebpf-net reads.
    pub l7: BTreeSet<L7Flow>,
    /// Items of the namespace's annotation without effect: unknown, or not allowed by the object.
    pub ignored: Vec<String>,
}

/// What runs for a namespace. The first rule that matches says what differs from `spec.plugins`; the namespace's
/// annotation, where the object allows it, can only take away from that.
#[must_use]
pub fn plugins_for(
    spec: &EbpfCollectorSpec,
    namespace: &str,
    labels: &BTreeMap<String, String>,
    annotations: &BTreeMap<String, String>,
) -> NamespacePlugins {
    let rule = spec
        .namespaces
        .iter()
        .flatten()
        .find(|rule| matches(&rule.matches, namespace, labels))
        .and_then(|rule| rule.plugins.as_ref());
    let mut wanted = with_rule(plugins_for_host(spec), rule);
    if spec.allow_namespace_annotation == Some(true)
        && let Some(annotation) = annotations.get(PLUGINS_ANNOTATION)
    {
        narrow(&mut wanted, annotation);
    }
    consistent(wanted)
}

/// What runs for processes outside pods: `spec.plugins` alone.
#[must_use]
pub fn plugins_for_host(spec: &EbpfCollectorSpec) -> NamespacePlugins {
    let default = PluginsSpec {
        net: Some(super::NetPlugin::default()),
        ..PluginsSpec::default()
    };
    let given = spec.plugins.as_ref().unwrap_or(&default);
    let on = |plugin: bool, enabled: Option<bool>| plugin && enabled != Some(false);
    let enabled = [
        (
            Plugin::EbpfNet,
            on(given.net.is_some(), given.net.as_ref().and_then(|p| p.enabled)),
        ),
        (
            Plugin::EbpfBash,
            on(given.bash.is_some(), given.bash.as_ref().and_then(|p| p.enabled)),
        ),
        (
            Plugin::EbpfConntrack,
            on(
                given.conntrack.is_some(),
                given.conntrack.as_ref().and_then(|p| p.enabled),
            ),
        ),
        (
            Plugin::EbpfTrace,
            on(given.trace.is_some(), given.trace.as_ref().and_then(|p| p.enabled)),
        ),
        (
            Plugin::BpfNetlog,
            on(given.netlog.is_some(), given.netlog.as_ref().and_then(|p| p.enabled)),
        ),
    ];
    let net = given.net.as_ref();
    let l7 = protocols(
        net.and_then(|net| net.l7.as_deref()),
        net.and_then(|net| net.l7_disabled.as_deref()),
    );
    NamespacePlugins {
        plugins: enabled
            .into_iter()
            .filter_map(|(plugin, on)| on.then_some(plugin))
            .collect(),
        l7: l7.unwrap_or_else(|| crate::AgentConfig::default().net.l7),
        ignored: Vec::new(),
    }
}

/// What runs anywhere: what the agents must be able to do.
pub(crate) fn plugins_anywhere(spec: &EbpfCollectorSpec) -> NamespacePlugins {
    let base = plugins_for_host(spec);
    let rules = spec.namespaces.iter().flatten();
    rules.fold(base.clone(), |mut all, rule| {
        let there = with_rule(base.clone(), rule.plugins.as_ref());
        all.plugins.extend(there.plugins);
        all.l7.extend(there.l7);
        all
    })
}

fn with_rule(mut wanted: NamespacePlugins, rule: Option<&NamespacePluginsSpec>) -> NamespacePlugins {
    let Some(rule) = rule else { return wanted };
    let toggles = [
        (Plugin::EbpfNet, rule.net.as_ref().and_then(|toggle| toggle.enabled)),
        (Plugin::EbpfBash, rule.bash.as_ref().and_then(|toggle| toggle.enabled)),
        (
            Plugin::EbpfConntrack,
            rule.conntrack.as_ref().and_then(|toggle| toggle.enabled),
        ),
        (Plugin::EbpfTrace, rule.trace.as_ref().and_then(|toggle| toggle.enabled)),
        (
            Plugin::BpfNetlog,
            rule.netlog.as_ref().and_then(|toggle| toggle.enabled),
        ),
    ];
    for (plugin, enabled) in toggles {
        match enabled {
            Some(true) => {
                wanted.plugins.insert(plugin);
            }
            Some(false) => {
                wanted.plugins.remove(&plugin);
            }
            None => {}
        }
    }
    if let Some(net) = &rule.net
        && let Some(l7) = protocols(net.l7.as_deref(), net.l7_disabled.as_deref())
    {
        wanted.l7 = l7;
    }
    wanted
}

/// Protocols by either list; `None` when neither is given.
fn protocols(enabled: Option<&[L7Flow]>, disabled: Option<&[L7Flow]>) -> Option<BTreeSet<L7Flow>> {
    match (enabled, disabled) {
        (Some(enabled), _) => Some(enabled.iter().copied().collect()),
        (None, Some(disabled)) => {
            let read = |l7: &L7Flow| !disabled.contains(l7);
            Some(L7Flow::ALL.iter().copied().filter(read).collect())
        }
        (None, None) => None,
    }
}

/// Keeps what the annotation names. A plugin named alone keeps all its protocols; `ebpf-net/httpflow` keeps that one.
fn narrow(wanted: &mut NamespacePlugins, annotation: &str) {
    let mut plugins = BTreeSet::new();
    let mut l7 = BTreeSet::new();
    let mut ignored = Vec::new();
    let items = annotation.split(',').map(str::trim);
    for item in items.filter(|item| !item.is_empty() && *item != "none") {
        let (name, part) = item
            .split_once('/')
            .map_or((item, None), |(name, part)| (name, Some(part)));
        let plugin = name
            .parse::<Plugin>()
            .ok()
            .filter(|plugin| wanted.plugins.contains(plugin));
        let flow = part.map(|part| part.parse::<L7Flow>().ok().filter(|flow| wanted.l7.contains(flow)));
        match (plugin, flow) {
            (Some(plugin), None) => {
                plugins.insert(plugin);
            }
            (Some(Plugin::EbpfNet), Some(Some(flow))) => {
                plugins.insert(Plugin::EbpfNet);
                l7.insert(flow);
            }
            _ => ignored.push(item.to_owned()),
        }
    }
    wanted.plugins = plugins;
    if !l7.is_empty() {
        wanted.l7 = l7;
    }
    wanted.ignored = ignored;
}

/// Takes away what cannot run without what is off.
fn consistent(mut wanted: NamespacePlugins) -> NamespacePlugins {
    if !wanted.plugins.contains(&Plugin::EbpfNet) {
        wanted.l7.clear();
    }
    // Spans are made from the requests that ebpf-net reads.
    if !wanted.l7.contains(&L7Flow::Http) {
        wanted.plugins.remove(&Plugin::EbpfTrace);
    }
    wanted
}

fn matches(rule: &NamespaceMatch, namespace: &str, labels: &BTreeMap<String, String>) -> bool {
    let named = rule
        .names
        .as_ref()
        .is_some_and(|names| names.iter().any(|name| name == namespace));
    named || rule.selector.as_ref().is_some_and(|selector| selects(selector, labels))
}

fn selects(selector: &LabelSelector, labels: &BTreeMap<String, String>) -> bool {
    let pairs = selector.match_labels.iter().flatten();
    let all_pairs = pairs.into_iter().all(|(key, value)| labels.get(key) == Some(value));
    let mut expressions = selector.match_expressions.iter().flatten();
    all_pairs
        && expressions.all(|expression| {
            let label = labels.get(&expression.key);
            let listed = label.is_some_and(|label| expression.values.iter().flatten().any(|value| value == label));
            match expression.operator.as_str() {
                "In" => listed,
                "NotIn" => !listed,
                "Exists" => label.is_some(),
                "DoesNotExist" => label.is_none(),
                // The API server knows no other operator; a rule that cannot be read matches nothing.
                _ => false,
            }
        })
}
