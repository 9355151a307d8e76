//! What identity costs: memory per pod in a cluster of 20,000, and processor time under churn.
#![allow(clippy::unwrap_used)]

use std::time::Instant;

use node_agent::identity::k8s::{Store, objects};
use serde_json::json;
use telemetry::alloc_count::{self, CountingAllocator};

#[global_allocator]
static ALLOC: CountingAllocator = CountingAllocator;

const PODS: u32 = 20_000;
const S: i64 = 1_000_000_000;

fn uid(n: u32) -> String {
    format!("7f0c1a52-3d0b-4f5e-9a51-{n:012x}")
}

fn pod(n: u32) -> objects::Pod {
    let ip = format!("10.{}.{}.{}", n >> 16, n >> 8 & 255, n & 255);
    serde_json::from_value(json!({"metadata": {"name": format!("checkout-service-7d9f8b6c5d-{n:05x}"),
        "namespace": format!("team-{}", n % 100), "uid": uid(n), "ownerReferences": [{"apiVersion": "apps/v1",
        "kind": "ReplicaSet", "name": format!("checkout-{}", n / 10), "uid": uid(1_000_000 + n / 10), "controller": true}]},
        "spec": {"nodeName": "one"},
        "status": {"phase": "Running", "startTime": "1970-01-01T00:01:40Z", "podIP": ip, "podIPs": [{"ip": ip}]}}))
    .unwrap()
}

/// Ten pods to a replica set and a slice, as deployments are.
fn fill(store: &mut Store) {
    for n in 0..PODS {
        store.apply_pod(&pod(n), 110 * S);
    }
    for n in 0..PODS / 10 {
        let meta = json!({"name": format!("checkout-{n}"), "namespace": format!("team-{}", n % 100),
            "uid": uid(1_000_000 + n), "labels": {"kubernetes.io/service-name": format!("checkout-{n}")},
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "Deployment", "name": format!("checkout-{n}"),
            "uid": uid(2_000_000 + n), "controller": true}]});
        store.apply_replica_set(&serde_json::from_value(json!({"metadata": meta})).unwrap());
        let endpoints: Vec<_> = (n * 10..n * 10 + 10)
            .map(|n| json!({"addresses": [format!("10.{}.{}.{}", n >> 16, n >> 8 & 255, n & 255)]}))
            .collect();
        store.apply_slice(
            &serde_json::from_value(json!({"metadata": meta, "endpoints": endpoints})).unwrap(),
            110 * S,
        );
    }
}

/// A pod that comes (running, with the address of one that went) or goes.
fn change(n: u32, ip: u32) -> String {
    let ip = format!("10.{}.{}.{}", ip >> 16, ip >> 8 & 255, ip & 255);
    json!({"metadata": {"name": format!("checkout-service-7d9f8b6c5d-{n:05x}"), "namespace": "team-1", "uid": uid(n),
        "managedFields": [{"manager": "kubelet", "operation": "Update", "fieldsV1": {"f:status": {"f:podIP": {}}}}]},
        "spec": {"nodeName": "one", "containers": [{"name": "c", "image": "registry.example/checkout:1"}]},
        "status": {"phase": "Running", "startTime": "1970-01-01T00:04:50Z", "podIP": ip, "podIPs": [{"ip": ip}]}})
    .to_string()
}

#[test]
fn pods_stay_small_and_churn_cheap() {
    let before = alloc_count::snapshot();
    let mut store = Store::new("one");
    fill(&mut store);
    let each = alloc_count::snapshot().since(before).live() / u64::from(PODS);
    // A minute of churn: 2,500 pods go, 2,500 others come with their addresses.
    let gone: Vec<_> = (0..2_500).map(|n| change(n, n)).collect();
    let come: Vec<_> = (0..2_500).map(|n| change(500_000 + n, n)).collect();
    let start = Instant::now();
    for (gone, come) in gone.iter().zip(&come) {
        store.delete_pod(&serde_json::from_str(gone).unwrap(), 300 * S);
        store.apply_pod(&serde_json::from_str(come).unwrap(), 300 * S);
    }
    store.expire(310 * S);
    let share = start.elapsed().as_secs_f64() / 60.0;
    let counts = store.counts();
    assert_eq!((counts.pods, counts.history), (20_000, 2_500));
    println!("{each} bytes per pod, {:.3} % of a core", share * 100.0);
    assert!(each <= 400, "{each} bytes per pod");
    assert!(share <= 0.02, "{share} of a core");
}
