//! What the API says about the ends of flows, and whether records say the same. No I/O.
//!
//! Data flow: objects ([`Truth::see_pod`] and its like) ▶ [`Truth::judge`] of a row ▶ [`Verdict`] of each end. The local end of our own
//! workloads is known without any address: their processes carry the names of their containers.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    net::IpAddr,
};

use k8s_openapi::{
    api::{
        apps::v1::ReplicaSet,
        batch::v1::Job,
        core::v1::{Node, Pod, Service},
        discovery::v1::EndpointSlice,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

use super::stub::Row;

/// What a record says where there is no name.
pub const NONE: &str = "N/A";
/// Clocks of API server and nodes are one, but times in the API are whole seconds.
const ROUNDING_NS: i64 = 1_000_000_000;

/// Names of one end.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Names {
    /// Namespace.
    pub namespace: String,
    /// Pod.
    pub pod: String,
    /// Service.
    pub service: String,
    /// Workload.
    pub workload: String,
}

/// How the names of an end on a record compare with what the API says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Verdict {
    /// The same.
    Right,
    /// Some are missing, the others are the same.
    Lesser,
    /// All are missing though the API has some.
    Unnamed,
    /// One is another.
    Wrong,
}

/// One end of one row.
#[derive(Clone, Debug)]
pub struct Judged {
    /// The verdict.
    pub verdict: Verdict,
    /// What the record says.
    pub said: Names,
    /// What it should say; any of them.
    pub expected: Vec<Names>,
}

/// A pod, and when it was.
#[derive(Clone, Debug)]
struct PodFact {
    namespace: String,
    name: String,
    owner: Option<(String, String)>,
    /// The service in front of it; kept when the pod has left it.
    service: Option<String>,
    node: String,
    host_network: bool,
    ips: Vec<IpAddr>,
    containers: Vec<String>,
    ports: Vec<(u16, String)>,
    from: i64,
    to: i64,
}

#[derive(Clone, Debug)]
struct ServiceFact {
    namespace: String,
    name: String,
    ips: Vec<IpAddr>,
    node_ports: Vec<(u16, String)>,
}

/// Everything that was ever seen in the API.
#[derive(Clone, Debug, Default)]
pub struct Truth {
    pods: BTreeMap<String, PodFact>,
    /// Workload above a replica set or job, by its uid.
    parents: HashMap<String, String>,
    /// Endpoint slices by uid: namespace, service, addresses.
    slices: HashMap<String, (String, String, Vec<IpAddr>)>,
    /// Services by uid.
    services: BTreeMap<String, ServiceFact>,
    nodes: HashMap<IpAddr, String>,
}

// === impl Names ===

impl Names {
    /// No name at all.
    #[must_use]
    pub fn none() -> Self {
        Self {
            namespace: NONE.to_owned(),
            pod: NONE.to_owned(),
            service: NONE.to_owned(),
            workload: NONE.to_owned(),
        }
    }

    /// A node: it has no namespace.
    fn node(name: &str) -> Self {
        Self {
            workload: name.to_owned(),
            ..Self::none()
        }
    }

    /// What a row says about one end, `src` or `dst`. Rows without Kubernetes tags say nothing.
    #[must_use]
    pub fn of(row: &Row, side: &str) -> Self {
        let tag = |key: &str| match row.tag(&format!("{side}_k8s_{key}")) {
            "" => NONE.to_owned(),
            text => text.to_owned(),
        };
        Self {
            namespace: tag("namespace"),
            pod: tag("pod_name"),
            service: tag("service_name"),
            workload: tag("deployment_name"),
        }
    }

    fn parts(&self) -> [&str; 4] {
        [&self.namespace, &self.pod, &self.service, &self.workload]
    }

    fn compare(&self, expected: &Self) -> Verdict {
        let pairs = || self.parts().into_iter().zip(expected.parts());
        if pairs().all(|(said, wanted)| said == wanted) {
            Verdict::Right
        } else if pairs().any(|(said, wanted)| said != wanted && said != NONE) {
            Verdict::Wrong
        } else if self.parts().iter().all(|said| *said == NONE) {
            Verdict::Unnamed
        } else {
            Verdict::Lesser
        }
    }
}

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.parts().join("/"))
    }
}

// === impl Truth ===

impl Truth {
    /// A replica set or job: what is above it.
    pub fn see_owner(&mut self, metadata: &ObjectMeta) {
        let Some(uid) = metadata.uid.clone() else { return };
        let above = controller(metadata).map(|(_, name)| name);
        let own = metadata.name.clone().unwrap_or_default();
        self.parents.insert(uid, above.unwrap_or(own));
    }

    /// A replica set.
    pub fn see_replica_set(&mut self, set: &ReplicaSet) {
        self.see_owner(&set.metadata);
    }

    /// A job.
    pub fn see_job(&mut self, job: &Job) {
        self.see_owner(&job.metadata);
    }

    /// A pod as it is now, or as it was when it was deleted at `gone` (nanoseconds since 1970).
    pub fn see_pod(&mut self, pod: &Pod, gone: Option<i64>) {
        let (Some(uid), Some(spec)) = (pod.metadata.uid.clone(), &pod.spec) else {
            return;
        };
        let status = pod.status.clone().unwrap_or_default();
        let mut ips: Vec<IpAddr> = status
            .pod_ips
            .iter()
            .flatten()
            .filter_map(|ip| ip.ip.parse().ok())
            .collect();
        let known = self.pods.get(&uid);
        if ips.is_empty() {
            // Its last state may be without them.
            ips = known.map(|pod| pod.ips.clone()).unwrap_or_default();
        }
        let ended = ["Succeeded", "Failed"].contains(&status.phase.as_deref().unwrap_or_default());
        let now_ended = ended.then(now).filter(|_| known.is_none_or(|pod| pod.to == i64::MAX));
        let to = gone.or(now_ended).or(known.map(|pod| pod.to)).unwrap_or(i64::MAX);
        let to = known.map_or(to, |pod| pod.to.min(to));
        let fact = PodFact {
            namespace: pod.metadata.namespace.clone().unwrap_or_default(),
            name: pod.metadata.name.clone().unwrap_or_default(),
            owner: controller(&pod.metadata),
            service: known.and_then(|pod| pod.service.clone()),
            node: spec.node_name.clone().unwrap_or_default(),
            host_network: spec.host_network == Some(true),
            ips,
            containers: spec.containers.iter().map(|container| container.name.clone()).collect(),
            ports: spec
                .containers
                .iter()
                .flat_map(|container| container.ports.iter().flatten())
                .filter_map(|port| {
                    let protocol = port.protocol.as_deref().unwrap_or("TCP").to_lowercase();
                    Some((u16::try_from(port.container_port).ok()?, protocol))
                })
                .collect(),
            from: status.start_time.map_or(0, |time| time.0.as_nanosecond() as i64),
            to,
        };
        self.pods.insert(uid, fact);
        self.settle_services();
    }

    /// An endpoint slice: which service is in front of which addresses.
    pub fn see_slice(&mut self, slice: &EndpointSlice, gone: bool) {
        let Some(uid) = slice.metadata.uid.clone() else { return };
        if gone {
            self.slices.remove(&uid);
            return;
        }
        let labels = slice.metadata.labels.as_ref();
        let Some(service) = labels.and_then(|labels| labels.get("kubernetes.io/service-name")) else {
            return;
        };
        let namespace = slice.metadata.namespace.clone().unwrap_or_default();
        let addresses = slice.endpoints.iter().flat_map(|endpoint| endpoint.addresses.iter());
        let ips = addresses.filter_map(|address| address.parse().ok()).collect();
        self.slices.insert(uid, (namespace, service.clone(), ips));
        self.settle_services();
    }

    /// Pods that live now are behind the services whose slices have their addresses now.
    fn settle_services(&mut self) {
        for pod in self
            .pods
            .values_mut()
            .filter(|pod| pod.to == i64::MAX && !pod.host_network)
        {
            let mut services: Vec<&String> = self
                .slices
                .values()
                .filter(|(namespace, _, ips)| *namespace == pod.namespace && ips.iter().any(|ip| pod.ips.contains(ip)))
                .map(|(_, service, _)| service)
                .collect();
            services.sort_unstable();
            if let Some(service) = services.first() {
                pod.service = Some((*service).clone());
            }
        }
    }

    /// A service.
    pub fn see_service(&mut self, service: &Service) {
        let (Some(uid), Some(spec)) = (service.metadata.uid.clone(), &service.spec) else {
            return;
        };
        let balancer = service
            .status
            .iter()
            .flat_map(|status| &status.load_balancer)
            .flat_map(|it| &it.ingress);
        let addresses = spec
            .cluster_ips
            .iter()
            .chain(&spec.external_ips)
            .flatten()
            .chain(balancer.flatten().filter_map(|ingress| ingress.ip.as_ref()));
        let ports = spec.ports.iter().flatten().filter_map(|port| {
            let protocol = port.protocol.as_deref().unwrap_or("TCP").to_lowercase();
            Some((u16::try_from(port.node_port?).ok()?, protocol))
        });
        let fact = ServiceFact {
            namespace: service.metadata.namespace.clone().unwrap_or_default(),
            name: service.metadata.name.clone().unwrap_or_default(),
            ips: addresses.filter_map(|ip| ip.parse().ok()).collect(),
            node_ports: ports.collect(),
        };
        self.services.insert(uid, fact);
    }

    /// A service, with the workload that all of its pods belong to, if there is one.
    fn names_of_service(&self, service: &ServiceFact) -> Names {
        let behind = |pod: &&PodFact| {
            pod.to == i64::MAX && pod.namespace == service.namespace && pod.service.as_ref() == Some(&service.name)
        };
        let mut workloads: Vec<String> = self
            .pods
            .values()
            .filter(behind)
            .map(|pod| self.workload(pod))
            .collect();
        workloads.sort_unstable();
        workloads.dedup();
        Names {
            namespace: service.namespace.clone(),
            pod: NONE.to_owned(),
            service: service.name.clone(),
            workload: match workloads.as_slice() {
                [one] => one.clone(),
                _ => NONE.to_owned(),
            },
        }
    }

    /// What runs a pod: the Deployment above its replica set, the CronJob above its job, its controller, or itself.
    fn workload(&self, pod: &PodFact) -> String {
        match &pod.owner {
            Some((uid, name)) => self.parents.get(uid).unwrap_or(name).clone(),
            None => pod.name.clone(),
        }
    }

    /// A node.
    pub fn see_node(&mut self, node: &Node) {
        let name = node.metadata.name.clone().unwrap_or_default();
        let addresses = node.status.iter().flat_map(|status| &status.addresses).flatten();
        for ip in addresses.filter_map(|address| address.address.parse().ok()) {
            self.nodes.insert(ip, name.clone());
        }
    }

    /// Compares both ends of a row with the API. `interval` is how long a row sums up, nanoseconds.
    #[must_use]
    pub fn judge(&self, row: &Row, interval: i64) -> [Judged; 2] {
        let when = (row.time - interval - ROUNDING_NS, row.time + ROUNDING_NS);
        [("src", self.local(row, when)), ("dst", self.remote(row, when))].map(|(side, expected)| {
            let said = Names::of(row, side);
            let verdict = expected
                .iter()
                .map(|one| said.compare(one))
                .min()
                .unwrap_or(Verdict::Wrong);
            Judged {
                verdict,
                said,
                expected,
            }
        })
    }

    /// Whether a row is of a process in this namespace, by the process' name; rows of others are nobody's.
    #[must_use]
    pub fn namespace_of(&self, row: &Row) -> Option<&str> {
        let process = row.tag("process_name");
        let pod = self
            .pods
            .values()
            .find(|pod| pod.containers.iter().any(|name| name == process))?;
        Some(&pod.namespace)
    }

    fn local(&self, row: &Row, when: (i64, i64)) -> Vec<Names> {
        let (process, host, ip) = (row.tag("process_name"), row.tag("host"), row.address("src"));
        let ours: Vec<Names> = self
            .pods_then(when)
            .filter(|pod| pod.node == host && pod.containers.iter().any(|name| name == process))
            .filter(|pod| pod.host_network || ip.is_some_and(|ip| pod.ips.contains(&ip)))
            .map(|pod| self.names_of(pod))
            .collect();
        if !ours.is_empty() {
            return ours;
        }
        let holders = self.holders(ip, when);
        if !holders.is_empty() {
            return holders;
        }
        vec![Names::node(host)]
    }

    fn remote(&self, row: &Row, when: (i64, i64)) -> Vec<Names> {
        let ip = row.address("dst");
        let holders = self.holders(ip, when);
        if !holders.is_empty() {
            return holders;
        }
        let Some(ip) = ip else { return vec![Names::none()] };
        if let Some(service) = self.services.values().find(|service| service.ips.contains(&ip)) {
            return vec![self.names_of_service(service)];
        }
        let Some(node) = self.nodes.get(&ip) else {
            // An endpoint that is no pod, as of a service without a selector.
            let slices = self.slices.values();
            let of = slices
                .filter(|(_, _, ips)| ips.contains(&ip))
                .map(|(namespace, service, _)| Names {
                    namespace: namespace.clone(),
                    service: service.clone(),
                    ..Names::none()
                });
            let services: Vec<Names> = of.collect();
            return if services.is_empty() {
                vec![Names::none()]
            } else {
                services
            };
        };
        let port = row
            .tag("dst_port")
            .parse()
            .ok()
            .map(|port: u16| (port, row.tag("transport").to_owned()));
        let on_port = |service: &&ServiceFact| port.as_ref().is_some_and(|port| service.node_ports.contains(port));
        if let Some(service) = self.services.values().find(on_port) {
            return vec![self.names_of_service(service)];
        }
        let declared: Vec<Names> = self
            .pods_then(when)
            .filter(|pod| pod.host_network && pod.node == *node)
            .filter(|pod| port.as_ref().is_some_and(|port| pod.ports.contains(port)))
            .map(|pod| self.names_of(pod))
            .collect();
        if declared.is_empty() {
            vec![Names::node(node)]
        } else {
            declared
        }
    }

    fn holders(&self, ip: Option<IpAddr>, when: (i64, i64)) -> Vec<Names> {
        self.pods_then(when)
            .filter(|pod| !pod.host_network && ip.is_some_and(|ip| pod.ips.contains(&ip)))
            .map(|pod| self.names_of(pod))
            .collect()
    }

    fn pods_then(&self, (first, last): (i64, i64)) -> impl Iterator<Item = &PodFact> {
        self.pods
            .values()
            .filter(move |pod| pod.from <= last && first <= pod.to)
    }

    fn names_of(&self, pod: &PodFact) -> Names {
        Names {
            namespace: pod.namespace.clone(),
            pod: pod.name.clone(),
            service: pod.service.clone().unwrap_or_else(|| NONE.to_owned()),
            workload: self.workload(pod),
        }
    }
}

fn controller(metadata: &ObjectMeta) -> Option<(String, String)> {
    let owners = metadata.owner_references.iter().flatten();
    let owner = owners.into_iter().find(|owner| owner.controller == Some(true))?;
    Some((owner.uid.clone(), owner.name.clone()))
}

/// Nanoseconds since 1970.
#[must_use]
pub fn now() -> i64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .ok()
        .and_then(|age| i64::try_from(age.as_nanos()).ok())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const SECOND: i64 = 1_000_000_000;

    fn object<T: serde::de::DeserializeOwned>(value: Value) -> T {
        serde_json::from_value(value).unwrap()
    }

    fn pod(name: &str, ip: &str, start: &str, extra: Value) -> Pod {
        let mut pod = json!({
            "metadata": { "uid": name, "name": name, "namespace": "shop" },
            "spec": { "nodeName": "node1", "containers": [{ "name": name }] },
            "status": { "podIPs": [{ "ip": ip }], "startTime": start, "phase": "Running" },
        });
        if let Value::Object(fields) = extra {
            for (key, value) in fields {
                pod["metadata"][&key] = value;
            }
        }
        object(pod)
    }

    fn row(process: &str, src: &str, dst: &str, dst_port: &str, time: i64, names: [[&str; 4]; 2]) -> Row {
        let mut row = Row { time, ..Row::default() };
        let mut tag = |key: &str, value: &str| {
            row.tags.insert(key.to_owned(), value.to_owned());
        };
        tag("process_name", process);
        tag("host", "node1");
        tag("transport", "tcp");
        tag("src_ip", src);
        tag("dst_ip", dst);
        tag("dst_port", dst_port);
        for (side, names) in ["src", "dst"].iter().zip(names) {
            for (key, name) in ["namespace", "pod_name", "service_name", "deployment_name"]
                .iter()
                .zip(names)
            {
                tag(&format!("{side}_k8s_{key}"), name);
            }
        }
        row
    }

    fn verdicts(truth: &Truth, row: &Row) -> [Verdict; 2] {
        truth.judge(row, 2 * SECOND).map(|judged| judged.verdict)
    }

    fn shop() -> Truth {
        let mut truth = Truth::default();
        truth.see_node(&object(json!({
            "metadata": { "name": "node1" }, "status": { "addresses": [{ "type": "InternalIP", "address": "172.31.0.1" }] } })));
        let owner = json!({ "ownerReferences": [
            { "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-1", "uid": "rs", "controller": true }] });
        truth.see_pod(&pod("web-1-a", "10.0.0.2", "1970-01-01T00:01:00Z", owner), None);
        truth.see_pod(&pod("client", "10.0.0.3", "1970-01-01T00:01:00Z", json!({})), None);
        // Later than its pod: the order of watches is nobody's to choose.
        truth.see_owner(&object(json!({ "uid": "rs", "name": "web-1", "ownerReferences": [
            { "apiVersion": "apps/v1", "kind": "Deployment", "name": "web", "uid": "d", "controller": true }] })));
        truth.see_slice(&object(json!({
            "metadata": { "uid": "s", "name": "web-x", "namespace": "shop", "labels": { "kubernetes.io/service-name": "web" } },
            "addressType": "IPv4", "endpoints": [{ "addresses": ["10.0.0.2"] }] })), false);
        truth.see_service(&object(json!({
            "metadata": { "uid": "v", "name": "web", "namespace": "shop" },
            "spec": { "clusterIPs": ["10.96.0.7"], "ports": [{ "port": 80, "nodePort": 30080 }] } })));
        truth
    }

    #[test]
    fn pods_services_and_nodes_are_expected_under_their_names() {
        let truth = shop();
        let client = ["shop", "client", NONE, "client"];
        let at = 100 * SECOND;
        for (dst, port, names) in [
            ("10.0.0.2", "80", ["shop", "web-1-a", "web", "web"]),
            ("10.96.0.7", "80", ["shop", NONE, "web", "web"]),
            ("172.31.0.1", "30080", ["shop", NONE, "web", "web"]),
            ("172.31.0.1", "22", [NONE, NONE, NONE, "node1"]),
            ("203.0.113.10", "80", [NONE; 4]),
        ] {
            let row = row("client", "10.0.0.3", dst, port, at, [client, names]);
            assert_eq!(
                verdicts(&truth, &row),
                [Verdict::Right; 2],
                "{dst}:{port} {:?}",
                truth.judge(&row, 0)
            );
        }
    }

    #[test]
    fn other_names_are_wrong_and_missing_ones_are_told_apart() {
        let truth = shop();
        let client = ["shop", "client", NONE, "client"];
        let judge = |names| {
            verdicts(
                &truth,
                &row("client", "10.0.0.3", "10.0.0.2", "80", 100 * SECOND, [client, names]),
            )[1]
        };
        assert_eq!(judge(["shop", "web-1-b", "web", "web"]), Verdict::Wrong);
        assert_eq!(judge(["shop", "web-1-a", NONE, "web"]), Verdict::Lesser);
        assert_eq!(judge([NONE; 4]), Verdict::Unnamed);
        // A name where there should be none.
        let row = row(
            "client",
            "10.0.0.3",
            "203.0.113.10",
            "80",
            100 * SECOND,
            [client, ["shop", NONE, NONE, NONE]],
        );
        assert_eq!(verdicts(&truth, &row)[1], Verdict::Wrong);
    }

    #[test]
    fn a_reused_address_names_who_held_it_then() {
        let mut truth = shop();
        truth.see_pod(
            &pod("client", "10.0.0.3", "1970-01-01T00:01:00Z", json!({})),
            Some(200 * SECOND),
        );
        truth.see_pod(&pod("next", "10.0.0.3", "1970-01-01T00:05:00Z", json!({})), None);
        let web = ["shop", "web-1-a", "web", "web"];
        let judge = |time, pod| {
            let row = row("", "10.0.0.3", "10.0.0.2", "80", time, [["shop", pod, NONE, pod], web]);
            verdicts(&truth, &row)[0]
        };
        assert_eq!(judge(150 * SECOND, "client"), Verdict::Right);
        assert_eq!(judge(150 * SECOND, "next"), Verdict::Wrong);
        assert_eq!(judge(310 * SECOND, "next"), Verdict::Right);
        assert_eq!(judge(310 * SECOND, "client"), Verdict::Wrong);
    }

    #[test]
    fn a_process_is_known_by_its_container_even_in_the_nodes_network() {
        let mut truth = shop();
        let mut host = pod("hostd", "172.31.0.1", "1970-01-01T00:01:00Z", json!({}));
        host.spec.as_mut().unwrap().host_network = Some(true);
        truth.see_pod(&host, None);
        let web = ["shop", "web-1-a", "web", "web"];
        let named = row(
            "hostd",
            "172.31.0.1",
            "10.0.0.2",
            "80",
            100 * SECOND,
            [["shop", "hostd", NONE, "hostd"], web],
        );
        assert_eq!(verdicts(&truth, &named), [Verdict::Right; 2]);
        let node = row(
            "kubelet",
            "172.31.0.1",
            "10.0.0.2",
            "80",
            100 * SECOND,
            [[NONE, NONE, NONE, "node1"], web],
        );
        assert_eq!(verdicts(&truth, &node), [Verdict::Right; 2]);
        assert_eq!(truth.namespace_of(&named), Some("shop"));
        assert_eq!(truth.namespace_of(&node), None);
    }
}
