//! What the kernel's map must hold.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use serde_json::json;

use super::*;
use crate::identity::k8s::NamespaceMeta;

const NETFLOW: u32 = policy::NETFLOW;
const HOST: u32 = 100;

fn pod(n: u8) -> Uid {
    Uid([n; 16])
}

/// Pods 1 (shop) and 2 (bank) of this node, 3 of another, 4 that nobody knows, 5 (bank) in the node's network: two
/// cgroups each, and a network namespace.
fn places() -> Places {
    Places {
        cgroups: (1..=5_u8)
            .flat_map(|n| [(u64::from(n) * 10, pod(n)), (u64::from(n) * 10 + 1, pod(n))])
            .collect(),
        namespaces: (1..=4_u8).map(|n| (u32::from(n), pod(n))).collect(),
    }
}

fn placement(uid: Uid) -> Option<(Str, bool)> {
    match uid.0[0] {
        1 => Some(("shop".into(), true)),
        2 | 5 => Some(("bank".into(), true)),
        3 => Some(("shop".into(), false)),
        _ => None,
    }
}

fn namespaces(annotation: Option<&str>) -> Namespaces {
    let meta = |labels: &[(&str, &str)]| NamespaceMeta {
        labels: labels
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect(),
        annotations: BTreeMap::new(),
    };
    let mut bank = meta(&[("tier", "secret")]);
    if let Some(plugins) = annotation {
        bank.annotations
            .insert("ebpfcollector.io/plugins".to_owned(), plugins.to_owned());
    }
    Arc::new(BTreeMap::from([
        ("shop".to_owned(), meta(&[])),
        ("bank".to_owned(), bank),
    ]))
}

fn of(spec: serde_json::Value, namespaces: &Namespaces, sharing: Sharing) -> (BTreeMap<u64, u32>, Switches) {
    let inputs = Inputs {
        spec: &serde_json::from_value(spec).unwrap(),
        namespaces,
        places: &places(),
        host_netns: Some(HOST),
        sharing,
        flow: policy::NETFLOW,
    };
    let (entries, switches) = wanted(&inputs, placement);
    (entries.into_iter().collect(), switches)
}

fn pods(of: &[u8]) -> Pods {
    of.iter().map(|n| pod(*n)).collect()
}

#[test]
fn without_rules_only_other_nodes_pods_are_off() {
    let (entries, switches) = of(json!({}), &namespaces(None), Sharing::Not);
    let other = policy::OTHER_NODE;
    let netns = policy::of_netns(3);
    let differ: Vec<_> = entries
        .iter()
        .filter(|(_, bits)| **bits == other)
        .map(|(key, _)| *key)
        .collect();
    assert_eq!(differ, [30, 31, netns]);
    // All the others are there too: each pod's own cgroup is to decide.
    assert_eq!(entries.len(), 10 + 4);
    assert_eq!((switches.host, switches.unowned), (NETFLOW, NETFLOW));
    assert_eq!((&*switches.on, &*switches.off), (&pods(&[1, 2, 5]), &pods(&[])));
    // Nothing to ask for.
    let inputs = Inputs {
        spec: &EbpfCollectorSpec::default(),
        namespaces: &namespaces(None),
        places: &Places::default(),
        host_netns: Some(HOST),
        sharing: Sharing::Not,
        flow: policy::NETFLOW,
    };
    let (entries, switches) = wanted(&inputs, placement);
    assert!(entries.is_empty() && !switches.asks);
}

#[test]
fn a_namespace_is_switched_off_by_name_label_or_annotation() {
    let off =
        |rule: serde_json::Value| json!({"namespaces": [{"match": rule, "plugins": {"ebpf-net": {"enabled": false}}}]});
    let by_name = of(off(json!({"names": ["bank"]})), &namespaces(None), Sharing::Not);
    let by_label = of(
        off(json!({"selector": {"matchLabels": {"tier": "secret"}}})),
        &namespaces(None),
        Sharing::Not,
    );
    let by_annotation = of(
        json!({"allowNamespaceAnnotation": true}),
        &namespaces(Some("none")),
        Sharing::Not,
    );
    for (entries, switches) in [by_name, by_label, by_annotation] {
        let of_bank: Vec<_> = entries
            .iter()
            .filter(|(_, bits)| **bits == 0)
            .map(|(key, _)| *key)
            .collect();
        // The pod in the node's network has no entry for the namespace.
        assert_eq!(of_bank, [20, 21, 50, 51, policy::of_netns(2)]);
        assert_eq!((&*switches.on, &*switches.off), (&pods(&[1]), &pods(&[2, 5])));
        assert!(switches.asks);
    }
    // Not allowed by the object.
    let (_, switches) = of(json!({}), &namespaces(Some("none")), Sharing::Not);
    assert!(switches.off.is_empty());
}

#[test]
fn one_namespace_may_be_on_where_the_rest_is_off() {
    let spec = json!({"plugins": {"ebpf-net": {"enabled": false}},
        "namespaces": [{"match": {"names": ["shop"]}, "plugins": {"ebpf-net": {"enabled": true}}}]});
    let (entries, switches) = of(spec, &namespaces(None), Sharing::Not);
    assert_eq!((switches.host, switches.unowned, switches.asks), (0, 0, true));
    let on: Vec<_> = entries
        .iter()
        .filter(|(_, bits)| **bits == NETFLOW)
        .map(|(key, _)| *key)
        .collect();
    assert_eq!(on, [10, 11, policy::of_netns(1)]);
}

#[test]
fn nodes_that_share_a_kernel_name_their_own() {
    let (entries, switches) = of(json!({}), &namespaces(None), Sharing::ByProcess);
    assert_eq!((switches.host, switches.unowned), (NETFLOW, policy::OTHER_NODE));
    // Own namespaces and the node's differ from what is nobody's; the other node's does not.
    let netns = |n| entries.get(&policy::of_netns(n)).copied();
    assert_eq!([netns(1), netns(2), netns(4), netns(HOST)], [Some(NETFLOW); 4]);
    assert_eq!([netns(3), entries.get(&30).copied()], [Some(policy::OTHER_NODE); 2]);
    assert!(switches.asks);
    // Where processes do not tell whose they are, each of this node's cgroups and namespaces does.
    let (entries, switches) = of(json!({}), &namespaces(None), Sharing::Unknown);
    assert_eq!((switches.host, switches.processes), (NETFLOW, policy::OTHER_NODE));
    let cgroup = |id| entries.get(&policy::of_cgroup(id)).copied();
    assert_eq!([cgroup(10), cgroup(20), cgroup(50)], [Some(NETFLOW); 3]);
    assert_eq!(entries.get(&policy::of_netns(HOST)).copied(), Some(NETFLOW));
}

#[test]
fn a_switch_tells_new_pods_from_those_that_were_on() {
    let state = |on: &[u8], off: &[u8], host: u32| Switches {
        host,
        on: Arc::new(pods(on)),
        off: Arc::new(pods(off)),
        ..Switches::default()
    };
    let old = state(&[1, 2], &[3, 4], NETFLOW);
    assert_eq!(Switched::between(&old, &old), Switched::default());
    let new = state(&[1, 3], &[2, 4, 5], 0);
    let expected = Switched {
        off: pods(&[2]),
        new_off: pods(&[5]),
        on: pods(&[3]),
        host: Some(false),
    };
    assert_eq!(Switched::between(&old, &new), expected);
}

#[test]
fn translations_are_for_those_that_the_plugin_is_on_for() {
    let of = |spec| of(spec, &namespaces(None), Sharing::Not).1;
    let switches = of(json!({}));
    assert_eq!((&*switches.nat_off, switches.host_nat_off), (&pods(&[1, 2, 5]), true));
    let plugins = json!({ "ebpf-net": {}, "ebpf-conntrack": {} });
    let switches = of(json!({ "plugins": plugins }));
    assert_eq!((&*switches.nat_off, switches.host_nat_off), (&pods(&[]), false));
    let rule =
        |on: bool| json!([{ "match": { "names": ["bank"] }, "plugins": { "ebpf-conntrack": { "enabled": on } } }]);
    let switches = of(json!({ "plugins": plugins, "namespaces": rule(false) }));
    assert_eq!((&*switches.nat_off, switches.host_nat_off), (&pods(&[2, 5]), false));
    assert_eq!(*switches.off, pods(&[]), "netflow is on for all");
    let switches = of(json!({ "namespaces": rule(true) }));
    assert_eq!((&*switches.nat_off, switches.host_nat_off), (&pods(&[1]), true));
}
