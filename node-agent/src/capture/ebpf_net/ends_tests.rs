//! Rows of pods, nodes and services of a cluster, named over a server that speaks the Kubernetes API.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::{
    collections::BTreeMap,
    fs,
    net::IpAddr,
    os::unix::fs::MetadataExt as _,
    path::Path,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use ebpf_common::net::{FlowKey, Tuple, direction};
use records::{
    Globals, Netflow,
    encode::{EncodeOptions, Format, PointEncoder},
};
use serde_json::{Value, json};
use telemetry::Telemetry;

use super::rows::{LeftOut, Origin, Row, Rows};
use crate::{
    capture::{
        conntrack::{self, End, Nat, Protocol},
        ends::{Ends, Names, Pods, UnnamedEnds, Which},
    },
    ebpf::sys::monotonic_ns,
    identity::{
        k8s::{
            Kind, LocalEnd, SETTLE_NS,
            fake_api::{Cluster, loopback, pod, start, uid, until},
        },
        process::Proc,
    },
};

const HOST_PORT: u16 = 9100;

/// Pods 1 to 3 of which 2 is behind service `web` and 3 on another node, pod 4 in this node's network, and node `one`.
fn cluster() -> Arc<Cluster> {
    let cluster = Cluster::new();
    for n in 1..=3 {
        let mut pod = pod(n);
        pod["metadata"]["ownerReferences"] = json!([{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "app-1",
            "uid": uid(100), "controller": true}]);
        if n == 3 {
            pod["spec"]["nodeName"] = "two".into();
        }
        cluster.put("pods", pod);
    }
    let mut host = pod(4);
    host["spec"] =
        json!({"nodeName": "one", "hostNetwork": true, "containers": [{"ports": [{"containerPort": HOST_PORT}]}]});
    host["status"]["podIP"] = "192.168.0.1".into();
    host["status"]["podIPs"] = json!([{"ip": "192.168.0.1"}]);
    cluster.put("pods", host);
    let object = |name: &str, n: u32| json!({"metadata": {"name": name, "namespace": "shop", "uid": uid(n), "resourceVersion": "9"}});
    let mut set = object("app-1", 100);
    set["metadata"]["ownerReferences"] = json!([{"apiVersion": "apps/v1", "kind": "Deployment", "name": "app",
        "uid": uid(101), "controller": true}]);
    cluster.put("replicasets", set);
    let mut service = object("web", 51);
    service["spec"] = json!({"clusterIP": "10.96.0.9", "ports": [{"port": 80, "nodePort": 30080}]});
    cluster.put("services", service);
    let mut slice = object("web-x", 52);
    slice["metadata"]["labels"] = json!({"kubernetes.io/service-name": "web"});
    slice["endpoints"] = json!([{"addresses": ["10.0.0.2"]}]);
    cluster.put("endpointslices", slice);
    let mut node = object("one", 50);
    node["status"] = json!({"addresses": [{"type": "InternalIP", "address": "192.168.0.1"}]});
    cluster.put("nodes", node);
    cluster
}

/// Makes the cgroup of a pod; its id.
fn cgroup(root: &Path, n: u32) -> u64 {
    let dir = root.join(format!("sys/fs/cgroup/kubepods/burstable/pod{}/c", uid(n)));
    fs::create_dir_all(&dir).unwrap();
    fs::metadata(&dir).unwrap().ino()
}

fn mapped(ip: &str) -> [u8; 16] {
    match ip.parse::<IpAddr>().unwrap() {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// A contribution of a process in `cgroup` and `netns`, between two ends with their ports.
fn origin(cgroup: u64, netns: u32, local: (&str, u16), remote: (&str, u16)) -> Origin {
    let tuple = Tuple {
        local: mapped(local.0),
        remote: mapped(remote.0),
        local_port: local.1,
        remote_port: remote.1,
        netns,
    };
    Origin {
        flow: FlowKey {
            tuple,
            direction: direction::OUTGOING,
            ..FlowKey::default()
        },
        udp: false,
        cgroup,
    }
}

fn part(first_ns: u64) -> Row {
    Row {
        read: 1,
        first_ns,
        last_ns: first_ns,
        ..Row::default()
    }
}

/// Takes rows as a flush does.
fn take(rows: &mut Rows, which: Which, unnamed: &UnnamedEnds) -> Vec<Netflow> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let now = i64::try_from(now.as_nanos()).unwrap();
    let book = rows.ends().book(now, monotonic_ns());
    let proc = Proc::new("/nonexistent");
    let mut names = Names::new(&proc, book, unnamed);
    let taken = rows.take(which, usize::MAX, now, &mut names);
    rows.ends().give_back(names.into_book());
    taken
}

/// The Kubernetes tags of a record as an output writes them, those of both ends without the values that are missing.
fn tags(record: &Netflow) -> BTreeMap<String, String> {
    let encoder = PointEncoder::new(Format::Json, &Globals::default(), EncodeOptions::default());
    let mut json = Vec::new();
    encoder.encode_into(record, &mut json).unwrap();
    let point: BTreeMap<String, Value> = serde_json::from_slice(&json).unwrap();
    let k8s = point
        .into_iter()
        .filter(|(key, _)| key.contains("k8s") || key == "sub_source");
    k8s.map(|(key, value)| (key.replace("_k8s", ""), value.as_str().unwrap().to_owned()))
        .filter(|(_, value)| value != "N/A")
        .collect()
}

fn expected(tags: &[(&str, &str)]) -> BTreeMap<String, String> {
    tags.iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}

#[tokio::test]
async fn rows_get_the_names_of_both_ends() {
    let cluster = cluster();
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    let ids: Vec<u64> = [1, 2, 3, 4].into_iter().map(|n| cgroup(root, n)).collect();
    fs::write(root.join("sys/fs/cgroup/cgroup.controllers"), "").unwrap();
    fs::create_dir_all(root.join("proc/1/ns")).unwrap();
    fs::write(root.join("proc/1/ns/net"), "").unwrap();
    let host = u32::try_from(fs::metadata(root.join("proc/1/ns/net")).unwrap().ino()).unwrap();
    let (address, _serving) = Arc::clone(&cluster).serve(loopback()).await;
    let (names, _feeding) = start(address, root);
    until("names are there", || {
        Kind::NAMED.iter().all(|kind| names.health(*kind).lists == 1) && names.pod_of_cgroup(ids[0]).is_some()
    })
    .await;

    let mut rows = Rows::new(100, Ends::new(Some(names.clone())));
    let telemetry = Telemetry::new("test", "0");
    let unnamed = UnnamedEnds::new(&telemetry, "identity");
    let mut row = |origin: Origin| {
        rows.add(&origin, &part(monotonic_ns()));
        let mut taken = take(&mut rows, Which::All, &unnamed);
        (taken.len() == 1).then(|| tags(&taken.remove(0)))
    };
    let one = [
        ("src_namespace", "shop"),
        ("src_pod_name", "p1"),
        ("src_deployment_name", "app"),
        ("sub_source", "K8s"),
    ];
    let two = [
        ("dst_namespace", "shop"),
        ("dst_pod_name", "p2"),
        ("dst_service_name", "web"),
        ("dst_deployment_name", "app"),
    ];
    let web = [
        ("dst_namespace", "shop"),
        ("dst_service_name", "web"),
        ("dst_deployment_name", "app"),
    ];
    let with = |a: &[(&str, &str)], b: &[(&str, &str)]| Some(expected(&[a, b].concat()));
    // Pod to pod, to a service, to a node port, to another node's pod, and to the world.
    let from_one = |remote| origin(ids[0], 7, ("10.0.0.1", 40_000), remote);
    assert_eq!(row(from_one(("10.0.0.2", 80))), with(&one, &two));
    assert_eq!(row(from_one(("10.96.0.9", 80))), with(&one, &web));
    assert_eq!(row(from_one(("192.168.0.1", 30080))), with(&one, &web));
    let three = [
        ("dst_namespace", "shop"),
        ("dst_pod_name", "p3"),
        ("dst_deployment_name", "app"),
    ];
    assert_eq!(row(from_one(("10.0.0.3", 80))), with(&one, &three));
    assert_eq!(row(from_one(("203.0.113.9", 443))), with(&one, &[]));
    // A pod to itself: the other end is it too.
    let itself = [
        ("dst_namespace", "shop"),
        ("dst_pod_name", "p1"),
        ("dst_deployment_name", "app"),
    ];
    let to_itself = origin(ids[0], 7, ("127.0.0.1", 40_000), ("127.0.0.1", 80));
    assert_eq!(row(to_itself), with(&one, &itself));
    // Neither the cgroup nor the process is known: the namespace is, from before.
    assert_eq!(
        row(origin(0, 7, ("10.0.0.1", 40_000), ("10.0.0.2", 80))),
        with(&one, &two)
    );
    // In the node's network: a pod by its cgroup, and the node itself.
    let four = [
        ("src_namespace", "shop"),
        ("src_pod_name", "p4"),
        ("src_deployment_name", "p4"),
        ("sub_source", "K8s"),
    ];
    let from_host = |cgroup| origin(cgroup, host, ("192.168.0.1", 40_000), ("10.0.0.2", 80));
    assert_eq!(row(from_host(ids[3])), with(&four, &two));
    let node = [("src_deployment_name", "one"), ("sub_source", "K8s")];
    assert_eq!(row(from_host(0)), with(&node, &two));
    let port = [
        ("dst_namespace", "shop"),
        ("dst_pod_name", "p4"),
        ("dst_deployment_name", "p4"),
    ];
    assert_eq!(row(from_one(("192.168.0.1", HOST_PORT))), with(&one, &port));
    // Nothing known of either end: no Kubernetes tags.
    let unknown = origin(0, 99, ("172.16.0.1", 1), ("172.16.0.2", 2));
    assert_eq!(row(unknown), Some(BTreeMap::new()));
    // A process of another node that shares this kernel.
    assert_eq!(row(origin(ids[2], 8, ("10.0.0.3", 1), ("10.0.0.2", 2))), None);
    let LeftOut {
        switched_off,
        other_node,
    } = rows.take_left_out();
    assert_eq!((rows.len(), switched_off, other_node), (0, 0, 1));
    // Where others share the kernel, an end that nobody here has is theirs.
    rows.ends().share_kernel();
    rows.ends().forget();
    rows.add(&origin(0, 99, ("172.16.0.1", 1), ("172.16.0.2", 2)), &part(1));
    assert_eq!((rows.len(), rows.take_left_out().other_node), (0, 1));
    // Switched off: a pod, then what is in no pod.
    let LocalEnd::Pod(first) = names.local_end(ids[0], 0, 0) else {
        panic!("pod 1 is not known by its cgroup");
    };
    for (off, host_off, reported) in [
        (vec![first], false, [false, true, true]),
        (vec![], true, [true, true, false]),
    ] {
        rows.ends().leave_out(Arc::new(off.into_iter().collect()), host_off);
        for (cgroup, reported) in [ids[0], ids[1], 0].into_iter().zip(reported) {
            rows.add(&origin(cgroup, host, ("192.168.0.1", 1), ("10.0.0.2", 2)), &part(1));
            assert_eq!(
                (
                    take(&mut rows, Which::All, &unnamed).len(),
                    rows.take_left_out().switched_off
                ),
                if reported { (1, 0) } else { (0, 1) }
            );
        }
    }

    let metrics = telemetry.render_metrics().unwrap();
    for line in [
        "ebpfcollector_identity_unnamed_ends_total{end=\"local\",reason=\"unknown\"} 1",
        "ebpfcollector_identity_unnamed_ends_total{end=\"remote\",reason=\"unknown\"} 1",
        "ebpfcollector_identity_unnamed_ends_total{end=\"remote\",reason=\"outside\"} 1",
        "ebpfcollector_identity_named_ends_total{end=\"local\"} 14",
    ] {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }
}

#[tokio::test]
async fn rows_wait_for_a_name_that_may_come_and_no_longer() {
    let cluster = cluster();
    let root = tempfile::tempdir().unwrap();
    let id = cgroup(root.path(), 1);
    fs::write(root.path().join("sys/fs/cgroup/cgroup.controllers"), "").unwrap();
    let (address, _serving) = Arc::clone(&cluster).serve(loopback()).await;
    let (names, _feeding) = start(address, root.path());
    until("pods are watched", || {
        names.pod_of_cgroup(id).is_some() && cluster.requests("pods", true).len() == 1
    })
    .await;
    let mut rows = Rows::new(100, Ends::new(Some(names.clone())));
    let unnamed = UnnamedEnds::default();
    let young = monotonic_ns();
    let old = young - u64::try_from(2 * SETTLE_NS).unwrap();
    rows.add(&origin(id, 7, ("10.0.0.1", 0), ("10.0.0.2", 80)), &part(young));
    rows.add(&origin(id, 7, ("10.0.0.1", 0), ("10.0.0.77", 80)), &part(young));
    rows.add(&origin(id, 7, ("10.0.0.1", 0), ("10.0.0.78", 80)), &part(old));
    let remote = |records: Vec<Netflow>| {
        let mut ends: Vec<_> = records
            .iter()
            .map(|it| (it.remote.ip.to_string(), it.remote_k8s.is_some()))
            .collect();
        ends.sort();
        ends
    };
    // The pod at .77 has just been made; nobody is at .78, and never will be.
    let sent = remote(take(&mut rows, Which::Settled, &unnamed));
    assert_eq!(sent, [("10.0.0.2".to_owned(), true), ("10.0.0.78".to_owned(), false)]);
    assert_eq!((rows.held(), rows.len()), (1, 1));
    assert_eq!(remote(take(&mut rows, Which::Held, &unnamed)), []);
    cluster.send("pods", "ADDED", &pod(77));
    until("the new pod is known", || {
        names.holders("10.0.0.77".parse().unwrap()) == 1
    })
    .await;
    let sent = remote(take(&mut rows, Which::Held, &unnamed));
    assert_eq!(sent, [("10.0.0.77".to_owned(), true)]);
    // Held ones do not stay: after some time the API has said what it knows.
    let to = |ip: &str| origin(id, 7, ("10.0.0.1", 0), (ip, 80));
    rows.add(&to("10.0.0.79"), &part(young));
    assert_eq!(remote(take(&mut rows, Which::Settled, &unnamed)), []);
    rows.add(&to("10.0.0.79"), &part(old));
    let nobody = [("10.0.0.79".to_owned(), false)];
    assert_eq!(remote(take(&mut rows, Which::Held, &unnamed)), nobody);
    // Who was nobody once is not waited for again.
    rows.add(&to("10.0.0.79"), &part(monotonic_ns()));
    assert_eq!(remote(take(&mut rows, Which::Settled, &unnamed)), nobody);
}

#[tokio::test]
async fn an_address_that_changes_hands_makes_rows_of_its_own() {
    let cluster = cluster();
    let root = tempfile::tempdir().unwrap();
    let (address, _serving) = Arc::clone(&cluster).serve(loopback()).await;
    let (names, _feeding) = start(address, root.path());
    until("pods are watched", || cluster.requests("pods", true).len() == 1).await;
    let mut rows = Rows::new(100, Ends::new(Some(names.clone())));
    let to_two = origin(0, 7, ("172.16.0.1", 0), ("10.0.0.2", 80));
    rows.add(&to_two, &part(monotonic_ns()));
    cluster.send("pods", "DELETED", &pod(2));
    until("the pod ended", || names.counts().history == 1).await;
    let mut next = pod(78);
    next["metadata"]["namespace"] = "bank".into();
    next["status"]["podIP"] = "10.0.0.2".into();
    next["status"]["podIPs"] = json!([{"ip": "10.0.0.2"}]);
    next["status"]["startTime"] = Value::Null;
    cluster.send("pods", "ADDED", &next);
    until("the next pod is known", || {
        names.holders("10.0.0.2".parse().unwrap()) == 2
    })
    .await;
    rows.add(&to_two, &part(monotonic_ns()));
    let unnamed = UnnamedEnds::default();
    let mut pods: Vec<_> = take(&mut rows, Which::All, &unnamed)
        .iter()
        .map(|it| it.remote_k8s.as_ref().map(|name| name.pod.to_string()))
        .collect();
    pods.sort();
    assert_eq!(pods, [Some("p2".to_owned()), Some("p78".to_owned())]);
}

#[tokio::test]
async fn translated_flows_are_named_by_the_backend_and_the_service_that_was_dialled() {
    let cluster = cluster();
    // Another service that the same pod is behind, first by name.
    let mut slice = json!({"metadata": {"name": "a-x", "namespace": "shop", "uid": uid(60), "resourceVersion": "9"}});
    slice["metadata"]["labels"] = json!({"kubernetes.io/service-name": "a"});
    slice["endpoints"] = json!([{"addresses": ["10.0.0.2"]}]);
    cluster.put("endpointslices", slice);
    let root = tempfile::tempdir().unwrap();
    let ids = [cgroup(root.path(), 1), cgroup(root.path(), 3)];
    fs::write(root.path().join("sys/fs/cgroup/cgroup.controllers"), "").unwrap();
    let (address, _serving) = Arc::clone(&cluster).serve(loopback()).await;
    let (names, _feeding) = start(address, root.path());
    until("names are there", || {
        Kind::NAMED.iter().all(|kind| names.health(*kind).lists == 1) && names.pod_of_cgroup(ids[0]).is_some()
    })
    .await;
    let at = |ip: &str, port| End {
        ip: ip.parse().unwrap(),
        port,
    };
    let tuple = |port, to| conntrack::Tuple {
        protocol: Protocol::Tcp,
        from: at("10.0.0.1", port),
        to,
    };
    let web = at("10.96.0.9", 80);
    let nat = Nat::knowing(
        7,
        &[
            (tuple(40_000, web), tuple(40_000, at("10.0.0.2", 8080))),
            (tuple(40_001, web), tuple(40_001, at("10.0.0.3", 8080))),
            (tuple(40_002, web), tuple(40_002, at("203.0.113.5", 8080))),
        ],
    );
    let nat = nat.unwrap();
    let mut rows = Rows::new(100, Ends::new(Some(names.clone()))).folding(10_001);
    let unnamed = UnnamedEnds::default();
    let old = monotonic_ns() - u64::try_from(2 * SETTLE_NS).unwrap();
    let mut all = |nat: Option<Nat>, off: Pods, direction: u8| {
        rows.ends().translate(nat, Arc::new(off), false);
        for port in [40_000, 40_001, 40_001, 40_002, 40_003] {
            let mut from_one = origin(ids[0], 7, ("10.0.0.1", port), ("10.96.0.9", 80));
            from_one.flow.direction = direction;
            rows.add(&from_one, &part(old));
        }
        let told = |it: Netflow| {
            let name = it.remote_k8s.map(|it| (it.pod.to_string(), it.service.to_string()));
            (it.dst_nat.map(|(ip, port)| format!("{ip}:{port}")), name, it.bytes_read)
        };
        let mut all: Vec<_> = take(&mut rows, Which::All, &unnamed).into_iter().map(told).collect();
        all.sort();
        all
    };
    let name = |pod: &str| Some((pod.to_owned(), "web".to_owned()));
    let nat_ip = |text: &str| Some(text.to_owned());
    // Of a backend that is nobody's the service is named; what is not translated keeps its own.
    let wanted = [
        (None, name(""), 1),
        (nat_ip("10.0.0.2:8080"), name("p2"), 1),
        (nat_ip("10.0.0.3:8080"), name("p3"), 2),
        (nat_ip("203.0.113.5:8080"), name(""), 1),
    ];
    assert_eq!(all(Some(nat.clone()), Pods::default(), direction::OUTGOING), wanted);
    // Off for the pod, off altogether, and of no use for who is called.
    let untranslated = [(None, name(""), 5)];
    let pod = Pods::from_iter([names.pod_of_cgroup(ids[0]).unwrap()]);
    assert_eq!(all(Some(nat.clone()), pod, direction::OUTGOING), untranslated);
    assert_eq!(all(None, Pods::default(), direction::OUTGOING), untranslated);
    let incoming = all(Some(nat), Pods::default(), direction::INCOMING);
    assert!(incoming.iter().all(|(nat, ..)| nat.is_none()), "{incoming:?}");
}
