//! Objects as the API server writes them, and what they must be called.
#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};

use super::*;
use crate::identity::k8s::objects::{EndpointSlice, Service};

const S: i64 = 1_000_000_000;

fn uid(n: u32) -> String {
    format!("00000000-0000-4000-8000-{n:012x}")
}

fn of<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

fn pod(n: u32, name: &str, ip: &str, owner: Option<(&str, &str, u32)>) -> Pod {
    let owners: Vec<_> = owner
        .iter()
        .map(|(kind, name, n)| json!({"apiVersion": "x/v1", "kind": kind, "name": name, "uid": uid(*n), "controller": true}))
        .collect();
    of(
        json!({"metadata": {"name": name, "namespace": "shop", "uid": uid(n), "ownerReferences": owners},
        "spec": {"nodeName": "one", "containers": [{"name": "c"}]},
        "status": {"phase": "Running", "startTime": "1970-01-01T00:01:40Z", "podIP": ip, "podIPs": [{"ip": ip}]}}),
    )
}

fn answer(store: &Store, ip: &str, port: u16, when: When) -> Answer {
    store.by_address(ip.parse().unwrap(), Some(port), Transport::Tcp, when)
}

fn at(store: &Store, ip: &str, port: u16, seconds: i64) -> Result<Arc<K8sEndpoint>, Unnamed> {
    answer(store, ip, port, When::long_ago(seconds * S)).name
}

#[test]
fn owners_of_every_kind() {
    let mut store = Store::new("one");
    store.apply_replica_set(&of(json!({"metadata": {"name": "cart-1", "namespace": "shop", "uid": uid(100),
        "ownerReferences": [{"apiVersion": "apps/v1", "kind": "Deployment", "name": "cart", "uid": uid(1), "controller": true}]}})));
    store.apply_job(&of(json!({"metadata": {"name": "bill-1", "namespace": "shop", "uid": uid(101),
        "ownerReferences": [{"apiVersion": "batch/v1", "kind": "CronJob", "name": "bill", "uid": uid(2), "controller": true}]}})));
    store.apply_job(&of(
        json!({"metadata": {"name": "once", "namespace": "shop", "uid": uid(102)}}),
    ));
    for (n, owner, kind, name) in [
        (1, Some(("ReplicaSet", "cart-1", 100)), "deployment", "cart"),
        (2, Some(("Job", "bill-1", 101)), "cronjob", "bill"),
        (3, Some(("Job", "once", 102)), "job", "once"),
        (4, Some(("StatefulSet", "db", 103)), "statefulset", "db"),
        (5, Some(("DaemonSet", "log", 104)), "daemonset", "log"),
        (6, Some(("GameServer", "arena", 105)), "gameserver", "arena"),
        (7, None, "pod", "p7"),
        // The replica set has not been seen: the deployment above it is not guessed.
        (8, Some(("ReplicaSet", "late-1", 106)), "", ""),
    ] {
        let ip = format!("10.0.0.{n}");
        store.apply_pod(&pod(n, &format!("p{n}"), &ip, owner), 200 * S);
        let found = at(&store, &ip, 80, 200).unwrap();
        assert_eq!((&*found.workload_type, &*found.workload), (kind, name));
        assert_eq!((&*found.namespace, &*found.pod), ("shop", format!("p{n}").as_str()));
    }
    assert!(store.placement(Uid::parse(&uid(1)).unwrap()).unwrap().1);
}

#[test]
fn a_pod_is_of_the_node_that_it_is_given_later() {
    let mut store = Store::new("one");
    let mut made = pod(1, "p", "", None);
    let own = |store: &Store| store.placement(Uid::parse(&uid(1)).unwrap()).map(|(_, own)| own);
    let node = made.spec.node_name.take();
    store.apply_pod(&made, 110 * S);
    assert_eq!(own(&store), Some(false));
    made.spec.node_name = node;
    store.apply_pod(&made, 111 * S);
    assert_eq!(own(&store), Some(true));
}

#[test]
fn a_reused_address_names_who_held_it_then() {
    let mut store = Store::new("one");
    let old = pod(1, "old", "10.0.0.1", None);
    store.apply_pod(&old, 110 * S);
    store.delete_pod(&old, 200 * S);
    assert_eq!(&*at(&store, "10.0.0.1", 80, 205).unwrap().pod, "old");
    let mut new = pod(2, "new", "10.0.0.1", None);
    new.status.start_time = of(json!("1970-01-01T00:03:40Z"));
    store.apply_pod(&new, 221 * S);
    assert_eq!(&*at(&store, "10.0.0.1", 80, 199).unwrap().pod, "old");
    assert_eq!(&*at(&store, "10.0.0.1", 80, 221).unwrap().pod, "new");
    assert_eq!(at(&store, "10.0.0.1", 80, 50), Err(Unnamed::NotHeldThen));
    // A third that says it began while the second lives.
    store.apply_pod(&pod(3, "odd", "10.0.0.1", None), 230 * S);
    let found = answer(&store, "10.0.0.1", 80, When::long_ago(231 * S));
    assert_eq!(
        (&*found.name.unwrap().pod, found.lesser),
        ("", Some(Unnamed::AddressAmbiguous))
    );
    store.expire(801 * S);
    assert_eq!((store.counts().history, store.counts().pods), (0, 2));
}

#[test]
fn services_by_every_address() {
    let mut store = Store::new("one");
    store.apply_node(&of(json!({"metadata": {"name": "one", "uid": uid(50)},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.168.0.1"}, {"type": "Hostname", "address": "one"}]}})));
    store.apply_service(&of(
        json!({"metadata": {"name": "web", "namespace": "shop", "uid": uid(51)},
        "spec": {"clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.9", "fd00::9"], "externalIPs": ["203.0.113.5"],
                 "ports": [{"port": 80, "nodePort": 30080, "protocol": "TCP"}]},
        "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.6"}, {"hostname": "lb.example"}]}}}),
    ));
    for ip in ["10.96.0.9", "fd00::9", "203.0.113.5", "203.0.113.6"] {
        assert_eq!(&*at(&store, ip, 80, 1).unwrap().service, "web");
    }
    assert_eq!(&*at(&store, "192.168.0.1", 30080, 1).unwrap().service, "web");
    let node = at(&store, "192.168.0.1", 22, 1).unwrap();
    assert_eq!((&*node.workload_type, &*node.workload, &*node.pod), ("node", "one", ""));
    // A pod and an outside machine behind slices.
    store.apply_pod(&pod(1, "w1", "10.0.0.1", None), 110 * S);
    let slice = |ips: &[&str]| -> EndpointSlice {
        of(
            json!({"metadata": {"name": "web-x", "namespace": "shop", "uid": uid(52),
            "labels": {"kubernetes.io/service-name": "web"}}, "endpoints": [{"addresses": ips}]}),
        )
    };
    store.apply_slice(&slice(&["10.0.0.1", "198.51.100.7"]), 110 * S);
    assert_eq!(&*at(&store, "10.0.0.1", 80, 110).unwrap().service, "web");
    let outside = at(&store, "198.51.100.7", 443, 110).unwrap();
    assert_eq!((&*outside.service, &*outside.pod), ("web", ""));
    store.delete_pod(&pod(1, "w1", "10.0.0.1", None), 120 * S);
    store.apply_slice(&slice(&[]), 120 * S);
    assert_eq!(&*at(&store, "10.0.0.1", 80, 119).unwrap().service, "web");
    assert_eq!(at(&store, "198.51.100.7", 443, 110), Err(Unnamed::Outside));
    store.begin_list(Kind::Service);
    store.end_list(Kind::Service, 130 * S);
    assert_eq!(at(&store, "10.96.0.9", 80, 1), Err(Unnamed::Unknown));
}

#[test]
fn pods_in_the_nodes_network_are_told_by_port() {
    let mut store = Store::new("one");
    store.apply_node(&of(json!({"metadata": {"name": "one", "uid": uid(50)},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.168.0.1"}]}})));
    for (n, ports) in [(1, vec![9100, 9200]), (2, vec![9200])] {
        let ports: Vec<_> = ports.iter().map(|port| json!({"containerPort": port})).collect();
        let mut host = pod(n, &format!("h{n}"), "192.168.0.1", None);
        host.spec = of(json!({"nodeName": "one", "hostNetwork": true, "containers": [{"ports": ports}]}));
        // The address comes after the object.
        let mut early = host.clone();
        early.status = of(json!({"phase": "Pending"}));
        store.apply_pod(&early, 100 * S);
        store.apply_pod(&host, 101 * S);
    }
    assert_eq!(&*at(&store, "192.168.0.1", 9100, 110).unwrap().pod, "h1");
    assert_eq!(&*at(&store, "192.168.0.1", 9200, 110).unwrap().workload, "one");
    let when = When::long_ago(110 * S);
    assert_eq!(&*store.pod(Uid::parse(&uid(2)).unwrap(), when).name.unwrap().pod, "h2");
    assert_eq!(
        answer(&store, "192.168.0.1", 9200, when).lesser,
        Some(Unnamed::PortAmbiguous)
    );
    assert_eq!(answer(&store, "192.168.0.1", 9100, when).lesser, None);
}

#[test]
fn a_relist_ends_what_is_gone_and_history_is_bounded() {
    let mut store = Store::new("one");
    let count = u32::try_from(HISTORY_MAX).unwrap() + 10;
    for n in 0..count {
        store.apply_pod(
            &pod(n, "p", &format!("10.1.{}.{}", n >> 8 & 255, n & 255), None),
            110 * S,
        );
    }
    store.begin_list(Kind::Pod);
    store.apply_pod(&pod(0, "p", "10.1.0.0", None), 120 * S);
    store.end_list(Kind::Pod, 120 * S);
    let counts = store.counts();
    assert_eq!(
        (counts.pods, counts.history, counts.history_dropped),
        (1, HISTORY_MAX, 9)
    );
}

#[test]
fn every_missing_name_has_its_reason() {
    let mut store = Store::new("one");
    store.apply_pod(&pod(1, "a", "10.0.0.1", Some(("ReplicaSet", "late-1", 100))), 110 * S);
    let when = When::long_ago(110 * S);
    let found = answer(&store, "10.0.0.1", 80, when);
    assert_eq!(
        (&*found.name.unwrap().workload, found.lesser),
        ("", Some(Unnamed::OwnerUnseen))
    );
    assert_eq!(at(&store, "10.0.0.1", 80, 50), Err(Unnamed::NotHeldThen));
    assert_eq!(at(&store, "10.0.0.9", 80, 110), Err(Unnamed::Unknown));
    assert_eq!(at(&store, "198.51.100.1", 443, 110), Err(Unnamed::Outside));
    assert_eq!(at(&store, "224.0.0.251", 5353, 110), Err(Unnamed::Outside));
    // Of two that may be meant, what both are.
    store.apply_pod(&pod(2, "b", "10.0.0.1", Some(("ReplicaSet", "late-1", 100))), 120 * S);
    let found = answer(&store, "10.0.0.1", 80, When::long_ago(120 * S));
    assert_eq!(found.lesser, Some(Unnamed::AddressAmbiguous));
    let name = found.name.unwrap();
    assert_eq!((&*name.namespace, &*name.pod), ("shop", ""));
    // Of two that have nothing in common, neither.
    let mut other = pod(3, "c", "10.0.0.1", None);
    other.metadata.namespace = Some("bank".to_owned());
    store.apply_pod(&other, 130 * S);
    assert_eq!(at(&store, "10.0.0.1", 80, 130), Err(Unnamed::AddressAmbiguous));
}

#[test]
fn what_spans_a_handover_is_no_ones() {
    let mut store = Store::new("one");
    let old = pod(1, "old", "10.0.0.1", None);
    store.apply_pod(&old, 110 * S);
    let sole = answer(&store, "10.0.0.1", 80, When::long_ago(120 * S));
    assert_eq!(sole.since, 100 * S, "holds for all since the pod began");
    store.delete_pod(&old, 200 * S);
    let between = |first, last, now| {
        let when = When {
            first: first * S,
            last: last * S,
            now: now * S,
        };
        answer(&store, "10.0.0.1", 80, when).name.map(|it| it.pod.to_string())
    };
    // The last segments trail behind, but the next holder may not be known yet.
    assert_eq!(between(201, 201, 202), Err(Unnamed::NotHeldThen));
    assert_eq!(between(201, 201, 204), Ok("old".to_owned()));
    assert_eq!(between(190, 201, 201), Ok("old".to_owned()));
    let mut new = pod(2, "new", "10.0.0.1", None);
    new.metadata.namespace = Some("bank".to_owned());
    new.status.start_time = of(json!("1970-01-01T00:03:40Z"));
    store.apply_pod(&new, 221 * S);
    assert_eq!(store.holders("10.0.0.1".parse().unwrap()), 2);
    let between = |first, last| {
        let when = When {
            first: first * S,
            last: last * S,
            now: 230 * S,
        };
        answer(&store, "10.0.0.1", 80, when).name.map(|it| it.pod.to_string())
    };
    assert_eq!(between(190, 199), Ok("old".to_owned()));
    assert_eq!(between(190, 225), Err(Unnamed::AddressAmbiguous));
    assert_eq!(between(205, 225), Ok("new".to_owned()));
}

#[test]
fn a_service_has_the_workload_behind_it_if_it_is_one() {
    let mut store = Store::new("one");
    store.apply_service(&of(
        json!({"metadata": {"name": "web", "namespace": "shop", "uid": uid(51)},
        "spec": {"clusterIP": "10.96.0.9"}}),
    ));
    let slice = |n: u32, ip: &str| -> EndpointSlice {
        of(
            json!({"metadata": {"name": format!("web-{n}"), "namespace": "shop", "uid": uid(n),
            "labels": {"kubernetes.io/service-name": "web"}}, "endpoints": [{"addresses": [ip]}]}),
        )
    };
    let workload = |store: &Store| {
        let name = at(store, "10.96.0.9", 80, 120).unwrap();
        (name.workload_type.to_string(), name.workload.to_string())
    };
    assert_eq!(workload(&store), Default::default());
    for (n, owner) in [(1, 100), (2, 100), (3, 101)] {
        let owner = Some(("StatefulSet", if owner == 100 { "db" } else { "cache" }, owner));
        store.apply_pod(&pod(n, &format!("w{n}"), &format!("10.0.0.{n}"), owner), 110 * S);
    }
    store.apply_slice(&slice(60, "10.0.0.1"), 110 * S);
    store.apply_slice(&slice(61, "10.0.0.2"), 110 * S);
    assert_eq!(workload(&store), ("statefulset".to_owned(), "db".to_owned()));
    store.apply_slice(&slice(62, "10.0.0.3"), 110 * S);
    assert_eq!(workload(&store), Default::default(), "two workloads");
    store.delete_slice(&slice(62, "10.0.0.3"), 110 * S);
    assert_eq!(workload(&store), ("statefulset".to_owned(), "db".to_owned()));
}

#[test]
fn lists_of_several_kinds_interleave() {
    let mut store = Store::new("one");
    let service = |n: u32, ip: &str| -> Service {
        of(
            json!({"metadata": {"name": format!("s{n}"), "namespace": "shop", "uid": uid(n)}, "spec": {"clusterIP": ip}}),
        )
    };
    store.apply_pod(&pod(1, "stays", "10.0.0.1", None), 110 * S);
    store.apply_pod(&pod(2, "goes", "10.0.0.2", None), 110 * S);
    store.apply_service(&service(51, "10.96.0.1"));
    store.apply_service(&service(52, "10.96.0.2"));
    store.begin_list(Kind::Pod);
    store.apply_pod(&pod(1, "stays", "10.0.0.1", None), 120 * S);
    // The list of services begins twice, the first was cut off, and ends before that of pods.
    store.begin_list(Kind::Service);
    store.apply_service(&service(52, "10.96.0.2"));
    store.begin_list(Kind::Service);
    store.apply_service(&service(51, "10.96.0.1"));
    store.end_list(Kind::Service, 121 * S);
    assert_eq!(store.counts().pods, 2);
    store.end_list(Kind::Pod, 122 * S);
    assert_eq!(&*at(&store, "10.0.0.1", 80, 200).unwrap().pod, "stays");
    assert_eq!(at(&store, "10.0.0.2", 80, 200), Err(Unnamed::NotHeldThen));
    assert_eq!(&*at(&store, "10.96.0.1", 80, 200).unwrap().service, "s51");
    assert_eq!(at(&store, "10.96.0.2", 80, 200), Err(Unnamed::Unknown));
}

#[test]
fn a_service_that_let_go_before_the_end_is_kept() {
    let mut store = Store::new("one");
    let slice = |ips: &[&str]| -> EndpointSlice {
        of(
            json!({"metadata": {"name": "web-x", "namespace": "shop", "uid": uid(52),
            "labels": {"kubernetes.io/service-name": "web"}}, "endpoints": [{"addresses": ips}]}),
        )
    };
    for n in 1..=2 {
        store.apply_pod(&pod(n, &format!("w{n}"), &format!("10.0.0.{n}"), None), 110 * S);
    }
    store.apply_slice(&slice(&["10.0.0.1", "10.0.0.2"]), 110 * S);
    store.apply_slice(&slice(&[]), 120 * S);
    // Both live on without the service; one ends soon after, one much later.
    assert_eq!(&*at(&store, "10.0.0.1", 80, 119).unwrap().service, "web");
    assert_eq!(&*at(&store, "10.0.0.1", 80, 121).unwrap().service, "");
    store.delete_pod(&pod(1, "w1", "10.0.0.1", None), 122 * S);
    store.delete_pod(&pod(2, "w2", "10.0.0.2", None), 300 * S);
    assert_eq!(&*at(&store, "10.0.0.1", 80, 119).unwrap().service, "web");
    assert_eq!(&*at(&store, "10.0.0.2", 80, 299).unwrap().service, "");
}

#[test]
fn a_static_pod_comes_again_and_owners_leave_with_their_last_pod() {
    let mut store = Store::new("one");
    let owned = pod(1, "p1", "10.0.0.1", Some(("Job", "once", 100)));
    let job: Job = of(json!({"metadata": {"name": "once", "namespace": "shop", "uid": uid(100)}}));
    store.apply_job(&job);
    store.apply_pod(&owned, 110 * S);
    store.delete_pod(&owned, 120 * S);
    store.apply_pod(&owned, 130 * S);
    assert_eq!(&*at(&store, "10.0.0.1", 80, 500).unwrap().workload, "once");
    assert_eq!((store.counts().pods, store.counts().history), (1, 0));
    store.delete_owner(&job.metadata);
    store.delete_pod(&owned, 140 * S);
    assert_eq!(&*at(&store, "10.0.0.1", 80, 135).unwrap().workload, "once");
    store.expire(1000 * S);
    assert!(store.owners.is_empty());
}

#[test]
fn an_address_in_slices_of_two_services_has_the_first_by_name_that_is_left() {
    let mut store = Store::new("one");
    let slice = |n: u32, service: &str, ips: &[&str]| -> EndpointSlice {
        of(
            json!({"metadata": {"name": format!("s{n}"), "namespace": "shop", "uid": uid(n),
            "labels": {"kubernetes.io/service-name": service}}, "endpoints": [{"addresses": ips}]}),
        )
    };
    store.apply_pod(&pod(1, "w1", "10.0.0.1", None), 110 * S);
    store.apply_slice(&slice(51, "b", &["10.0.0.1"]), 110 * S);
    store.apply_slice(&slice(52, "a", &["10.0.0.1"]), 110 * S);
    assert_eq!(&*at(&store, "10.0.0.1", 80, 111).unwrap().service, "a");
    store.delete_slice(&slice(52, "a", &[]), 120 * S);
    assert_eq!(&*at(&store, "10.0.0.1", 80, 121).unwrap().service, "b");
    store.apply_slice(&slice(51, "b", &[]), 130 * S);
    assert_eq!(&*at(&store, "10.0.0.1", 80, 131).unwrap().service, "");
    assert!(store.backs.is_empty() && store.shared.is_empty());
}

#[test]
fn labels_become_tags_and_the_workloads_go_first() {
    let mut store = Store::new("one");
    let tags = |store: &Store| {
        let name = at(store, "10.0.0.1", 80, 120).unwrap();
        name.labels
            .iter()
            .map(|(tag, value)| format!("{tag}={value}"))
            .collect::<Vec<_>>()
    };
    let labelled = |name: &str, n: u32, labels: Value| {
        json!({"metadata": {"name": name, "namespace": "shop", "uid": uid(n), "labels": labels, "ownerReferences": [
            {"apiVersion": "apps/v1", "kind": "Deployment", "name": "cart", "uid": uid(101), "controller": true}]}})
    };
    let mut one = pod(1, "p1", "10.0.0.1", Some(("ReplicaSet", "cart-1", 100)));
    one.metadata.labels = Some(
        [("team", "pods"), ("tier", "web"), ("zone", "a"), ("secret", "x")]
            .map(|(label, value)| (label.to_owned(), value.to_owned()))
            .into(),
    );
    let set: ReplicaSet = of(labelled("cart-1", 100, json!({"team": "sets", "tier": "sets"})));
    let deployment: ObjectMeta = of(labelled("cart", 101, json!({"team": "shop"}))["metadata"].clone());
    let apply = |store: &mut Store| {
        store.apply_replica_set(&set);
        store.apply_workload(Kind::Deployment, &deployment);
        store.apply_pod(&one, 110 * S);
    };
    apply(&mut store);
    assert!(tags(&store).is_empty(), "none is wanted");
    let wanted = ["team", "tier", "zone", "none"].map(|label| (label.to_owned(), format!("k8s_{label}")));
    store.want_labels(&wanted);
    apply(&mut store);
    assert_eq!(tags(&store), ["k8s_team=shop", "k8s_tier=sets", "k8s_zone=a"]);
    store.begin_list(Kind::Deployment);
    store.end_list(Kind::Deployment, 120 * S);
    assert_eq!(tags(&store), ["k8s_team=sets", "k8s_tier=sets", "k8s_zone=a"]);
    store.delete_pod(&one, 130 * S);
    store.delete_owner(&set.metadata);
    store.expire(1000 * S);
    store.want_labels(&[]);
    apply(&mut store);
    assert!(tags(&store).is_empty());
}

#[test]
fn an_address_may_take_longer_while_a_pod_waits_for_one() {
    let mut store = Store::new("one");
    let (inside, outside) = ("10.0.0.9".parse().unwrap(), "203.0.113.9".parse().unwrap());
    let patience = |store: &Store, ip, seconds: i64| store.patience(ip, seconds * S) / S;
    store.apply_pod(&pod(1, "old", "10.0.0.9", None), 100 * S);
    store.delete_pod(&pod(1, "old", "10.0.0.9", None), 190 * S);
    assert_eq!(patience(&store, inside, 200), 3);
    let waits: Pod = of(
        json!({"metadata": {"name": "young", "namespace": "shop", "uid": uid(2)},
        "spec": {"nodeName": "one"}, "status": {"phase": "Pending"}}),
    );
    store.apply_pod(&waits, 200 * S);
    assert_eq!((patience(&store, inside, 201), patience(&store, outside, 201)), (15, 3));
    // What happens now may be the young one's, and is not put on the old one before that is told.
    let when = |now: i64| When {
        first: 195 * S,
        last: 195 * S,
        now: now * S,
    };
    assert_eq!(
        answer(&store, "10.0.0.9", 80, when(205)).name,
        Err(Unnamed::NotHeldThen)
    );
    assert_eq!(
        answer(&store, "10.0.0.9", 80, when(211)).name.unwrap().pod,
        "old".into()
    );
    // One that never gets an address holds nothing up.
    assert_eq!(patience(&store, inside, 261), 3);
    store.apply_pod(&pod(2, "young", "10.0.0.9", None), 262 * S);
    assert_eq!(patience(&store, inside, 263), 3);
}

#[test]
fn an_address_is_on_the_node_of_who_had_it() {
    let mut store = Store::new("one");
    let node = |n: u32, name: &str, ip: &str, zone: &str| {
        of(
            json!({"metadata": {"name": name, "uid": uid(n), "labels": {"topology.kubernetes.io/zone": zone}},
            "status": {"addresses": [{"type": "Hostname", "address": name}, {"type": "InternalIP", "address": ip}]}}),
        )
    };
    let at = |store: &Store, ip: &str, seconds: i64| {
        let host = store.host(ip.parse().unwrap(), When::long_ago(seconds * S))?;
        let ip = host.ip.map_or_else(String::new, |ip| ip.to_string());
        Some((host.name.to_string(), ip, host.zone.to_string(), host.own))
    };
    let host = |name: &str, ip: &str, zone: &str, own: bool| Some((name.into(), ip.into(), zone.into(), own));
    let mut here = pod(1, "a-1", "10.0.0.1", None);
    store.apply_pod(&here, 100 * S);
    // The node comes after its pod.
    assert_eq!(at(&store, "10.0.0.1", 110), host("one", "", "", true));
    store.apply_node(&node(50, "one", "192.168.0.1", "a"));
    store.apply_node(&node(51, "two", "fd00::2", "b"));
    assert_eq!(at(&store, "10.0.0.1", 110), host("one", "192.168.0.1", "a", true));
    assert_eq!(at(&store, "192.168.0.1", 110), host("one", "192.168.0.1", "a", true));
    assert_eq!(at(&store, "fd00::2", 110), host("two", "fd00::2", "b", false));
    let own = store.own_host();
    assert_eq!((&*own.name, own.own), ("one", true));
    // The address goes to a pod of the other node: who had it then counts.
    store.delete_pod(&here, 200 * S);
    here = pod(2, "b-1", "10.0.0.1", None);
    here.spec = of(json!({"nodeName": "two"}));
    here.status.start_time = Some(of(json!("1970-01-01T00:05:00Z")));
    store.apply_pod(&here, 300 * S);
    assert_eq!(at(&store, "10.0.0.1", 150), host("one", "192.168.0.1", "a", true));
    assert_eq!(at(&store, "10.0.0.1", 350), host("two", "fd00::2", "b", false));
    assert_eq!(at(&store, "10.0.0.1", 250), None);
    assert_eq!(at(&store, "10.9.9.9", 350), None);
    // The node moves to another zone, then it goes.
    store.apply_node(&node(51, "two", "fd00::2", "c"));
    assert_eq!(at(&store, "10.0.0.1", 350), host("two", "fd00::2", "c", false));
    store.delete_node(&node(51, "two", "fd00::2", "c"));
    assert_eq!(at(&store, "10.0.0.1", 350), host("two", "", "", false));
    assert_eq!(at(&store, "fd00::2", 350), None);
}
