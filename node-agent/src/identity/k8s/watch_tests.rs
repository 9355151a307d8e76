//! Against a server on loopback that speaks the API's LIST and WATCH over HTTP.
#![allow(clippy::unwrap_used)]

use std::{fs, os::unix::fs::MetadataExt as _};

use records::Transport;
use serde_json::json;

use super::*;
use crate::identity::k8s::{
    LocalEnd, Unnamed, When,
    fake_api::{Cluster, loopback, pod, start, uid, until},
};

/// The pod of an address now.
fn name(names: &Names, n: u32) -> Result<String, Unnamed> {
    let ip = format!("10.0.0.{n}").parse().unwrap();
    let found = names.remote(ip, Some(80), Transport::Tcp, When::long_ago(now_ns()));
    Ok(found.name?.pod.to_string())
}

#[tokio::test]
async fn lists_in_pages_then_follows_and_resumes_at_a_bookmark() {
    let cluster = Cluster::new();
    (1..=5).for_each(|n| cluster.put("pods", pod(n)));
    let root = tempfile::tempdir().unwrap();
    let (address, _serving) = Arc::clone(&cluster).serve(loopback()).await;
    let (names, _feeding) = start(address, root.path());
    until("every kind is listed", || {
        Kind::NAMED.iter().all(|kind| names.health(*kind).lists == 1)
    })
    .await;
    for n in 1..=5 {
        assert_eq!(name(&names, n).unwrap(), format!("p{n}"));
    }
    let lists = cluster.requests("pods", false);
    let pages: Vec<_> = lists
        .iter()
        .map(|query| query.get("continue").map(String::as_str))
        .collect();
    assert_eq!(pages, [None, Some("2"), Some("4")]);

    until("pods are watched", || cluster.requests("pods", true).len() == 1).await;
    let watch = cluster.requests("pods", true).remove(0);
    assert_eq!(watch.get("resourceVersion").map(String::as_str), Some("100"));
    assert_eq!(watch.get("allowWatchBookmarks").map(String::as_str), Some("true"));
    cluster.send("pods", "ADDED", &pod(6));
    cluster.send("pods", "DELETED", &pod(1));
    let mark = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"resourceVersion": "900"}});
    cluster.send("pods", "BOOKMARK", &mark);
    until("a new pod is named", || name(&names, 6) == Ok("p6".to_owned())).await;
    until("a pod ends", || names.counts().history == 1).await;
    assert_eq!(name(&names, 1).unwrap(), "p1");
    cluster.lines.send(("pods", None)).unwrap();
    until("pods are watched again", || cluster.requests("pods", true).len() == 2).await;
    let watch = cluster.requests("pods", true).remove(1);
    assert_eq!(watch.get("resourceVersion").map(String::as_str), Some("900"));
    assert_eq!(cluster.requests("pods", false).len(), 3, "a resumed watch lists again");
}

#[tokio::test]
async fn an_expired_version_lists_again_and_ends_what_is_gone() {
    let cluster = Cluster::new();
    (1..=3).for_each(|n| cluster.put("pods", pod(n)));
    let root = tempfile::tempdir().unwrap();
    let (address, _serving) = Arc::clone(&cluster).serve(loopback()).await;
    let (names, _feeding) = start(address, root.path());
    until("pods are watched", || cluster.requests("pods", true).len() == 1).await;
    cluster.objects.lock().get_mut("pods").unwrap().remove("p2");
    cluster.put("pods", pod(4));
    let gone = json!({"apiVersion": "v1", "kind": "Status", "metadata": {}, "status": "Failure",
        "message": "too old resource version", "reason": "Expired", "code": 410});
    cluster.send("pods", "ERROR", &gone);
    until("pods are listed again", || names.health(Kind::Pod).lists == 2).await;
    assert_eq!((names.counts().pods, names.counts().history), (3, 1));
    assert_eq!(name(&names, 4).unwrap(), "p4");
    assert_eq!(names.health(Kind::Service).lists, 1, "another kind listed again");
}

#[tokio::test]
async fn answers_while_the_server_is_away() {
    let cluster = Cluster::new();
    cluster.put("pods", pod(1));
    let shop = |team: &str| {
        json!({"apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": "shop", "uid": uid(90), "resourceVersion": "150", "labels": {"team": team}}})
    };
    cluster.put("namespaces", shop("a"));
    let root = tempfile::tempdir().unwrap();
    let (address, mut serving) = Arc::clone(&cluster).serve(loopback()).await;
    let (names, _feeding) = start(address, root.path());
    let namespaces = names.namespaces();
    let team = || {
        namespaces
            .borrow()
            .get("shop")
            .and_then(|it| it.labels.get("team").cloned())
    };
    until("both kinds are watched", || {
        ["pods", "namespaces"]
            .iter()
            .all(|kind| cluster.requests(kind, true).len() == 1)
    })
    .await;
    assert_eq!(team().as_deref(), Some("a"));
    cluster.send("namespaces", "MODIFIED", &shop("b"));
    until("a label changes", || team().as_deref() == Some("b")).await;

    serving.shutdown().await;
    until("errors are counted", || names.health(Kind::Pod).errors_since_event > 0).await;
    assert_eq!(name(&names, 1).unwrap(), "p1");
    assert_eq!(team().as_deref(), Some("b"));
    let before = cluster.requests("pods", true).len();
    let (_, _serving) = Arc::clone(&cluster).serve(address).await;
    until("pods are watched again", || {
        cluster.requests("pods", true).len() > before
    })
    .await;
    cluster.send("pods", "ADDED", &pod(2));
    until("a new pod is named", || name(&names, 2) == Ok("p2".to_owned())).await;
    assert_eq!(names.health(Kind::Pod).errors_since_event, 0);
    assert!(
        names
            .health(Kind::Pod)
            .last_event
            .is_some_and(|age| age < Duration::from_secs(20))
    );
}

#[tokio::test]
async fn local_ends_by_cgroup_process_and_address() {
    let cluster = Cluster::new();
    (1..=3).for_each(|n| cluster.put("pods", pod(n)));
    let node = json!({"metadata": {"name": "one", "uid": uid(50), "resourceVersion": "9"},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.168.0.1"}]}});
    cluster.put("nodes", node);
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    let dir = |n: u32| format!("kubepods.slice/kubepods-pod{}.slice", uid(n).replace('-', "_"));
    let cgroup = root.join("sys/fs/cgroup").join(dir(1));
    fs::create_dir_all(&cgroup).unwrap();
    fs::write(root.join("sys/fs/cgroup/cgroup.controllers"), "").unwrap();
    fs::create_dir_all(root.join("proc/7")).unwrap();
    fs::write(root.join("proc/7/cgroup"), format!("0::/{}/c\n", dir(2))).unwrap();
    fs::create_dir_all(root.join("proc/1/ns")).unwrap();
    fs::write(root.join("proc/1/ns/net"), "").unwrap();
    let host = fs::metadata(root.join("proc/1/ns/net")).unwrap().ino();
    let id = fs::metadata(&cgroup).unwrap().ino();
    let (address, _serving) = Arc::clone(&cluster).serve(loopback()).await;
    let (names, _feeding) = start(address, root);
    until("names are there", || {
        [Kind::Pod, Kind::Node]
            .iter()
            .all(|kind| names.health(*kind).lists == 1)
            && names.pod_of_cgroup(id).is_some()
    })
    .await;
    let host = u32::try_from(host).unwrap();
    let local = |cgroup_id, pid, netns, ip: &str| {
        let (end, when) = (names.local_end(cgroup_id, pid, netns), When::long_ago(now_ns()));
        let found = names.local(end, ip.parse().unwrap(), None, Transport::Tcp, when);
        found.name.map(|it| format!("{}/{}", it.workload_type, it.workload))
    };
    // All on the node's address: pods in its network are told apart by cgroup, then by process.
    assert_eq!(local(id, 7, host, "192.168.0.1").unwrap(), "pod/p1");
    assert_eq!(local(0, 7, host, "192.168.0.1").unwrap(), "pod/p2");
    assert_eq!(local(0, 0, host, "127.0.0.1").unwrap(), "node/one");
    assert_eq!(local(0, 0, host + 1, "10.0.0.3").unwrap(), "pod/p3");
    assert_eq!(local(0, 0, host + 1, "127.0.0.1"), Err(Unnamed::Unknown));
    assert_eq!(names.is_local(names.pod_of_cgroup(id).unwrap()), Some(true));
    // A namespace belongs to the pod whose process was seen in it.
    assert_eq!(names.local_end(0, 0, 77), LocalEnd::Unknown);
    let LocalEnd::Pod(pod) = names.local_end(id, 0, 77) else {
        panic!("not known by its cgroup");
    };
    names.learn_netns(pod, 77);
    assert_eq!(names.local_end(0, 0, 77), LocalEnd::Pod(pod));
    names.learn_netns(pod, host);
    assert_eq!(names.local_end(0, 0, host), LocalEnd::Host);
}

#[tokio::test]
async fn labels_are_wanted_and_not_wanted_while_it_runs() {
    let cluster = Cluster::new();
    let mut one = pod(1);
    one["metadata"]["labels"] = json!({"team": "a", "other": "b"});
    cluster.put("pods", one);
    let root = tempfile::tempdir().unwrap();
    let (address, _serving) = Arc::clone(&cluster).serve(loopback()).await;
    let (names, _feeding) = start(address, root.path());
    until("pods are watched", || cluster.requests("pods", true).len() == 1).await;
    let tags = || {
        let found = names.remote(
            "10.0.0.1".parse().unwrap(),
            None,
            Transport::Tcp,
            When::long_ago(now_ns()),
        );
        found
            .name
            .unwrap()
            .labels
            .iter()
            .map(|(tag, value)| format!("{tag}={value}"))
            .collect::<Vec<_>>()
    };
    assert!(tags().is_empty());
    assert_eq!(
        cluster.requests("deployments", false).len(),
        0,
        "nobody wants their labels"
    );
    names.want_labels([("team".to_owned(), "k8s_team".to_owned())].into());
    until("the label is a tag", || tags() == ["k8s_team=a"]).await;
    until("workloads are listed", || {
        cluster.requests("deployments", false).len() == 1
    })
    .await;
    names.want_labels(Arc::default());
    until("it is none any more", || tags().is_empty()).await;
    assert_eq!(name(&names, 1).unwrap(), "p1");
}
