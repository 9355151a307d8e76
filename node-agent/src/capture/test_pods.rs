//! Pods for tests: cgroups, and what a Kubernetes API says of them.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

/// Directory of the pods' cgroups, removed unless others use it.
pub(super) struct Kubepods(pub(super) PathBuf);

impl Kubepods {
    pub(super) fn new(root: &Path) -> Self {
        let dir = root.join("kubepods/besteffort");
        fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }
}

impl Drop for Kubepods {
    fn drop(&mut self) {
        // Not empty where a kubelet has pods.
        let _ = fs::remove_dir(&self.0);
        let _ = self.0.parent().map(fs::remove_dir);
    }
}

/// A pod's identity, for this run of the tests alone.
pub(super) fn uid(n: u32) -> String {
    format!("ec7e5700-{:04x}-4000-8000-{n:012x}", std::process::id() & 0xffff)
}

/// A pod on node `one`, in the node's network.
pub(super) fn pod(name: &str, namespace: &str, n: u32) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "uid": uid(n), "resourceVersion": format!("{}", 200 + n)},
        "spec": {"nodeName": "one", "hostNetwork": true, "containers": []}, "status": {"phase": "Running"}})
}

/// A namespace, perhaps with the annotation that says which plugins are on.
pub(super) fn namespace(name: &str, plugins: Option<&str>) -> Value {
    let annotations = plugins.map(|plugins| json!({"ebpfcollector.io/plugins": plugins}));
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "uid": uid(90), "resourceVersion": "150",
        "annotations": annotations}})
}
