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
    names: Names,
    node: String,
    host_network: bool,
    ips: Vec<IpAddr>,
    containers: Vec<String>,
    ports: Vec<(u16, String)>,
    from: i64,
    to: i64,
}

/// Everything that was ever seen in the API.
#[derive(Clone, Debug, Default)]
pub struct Truth {
    pods: BTreeMap<String, PodFact>,
    /// Workload above a replica set or job, by its uid.
    parents: HashMap<String, String>,
    /// Service names by the addresses behind them, from endpoint slices.
    backs: HashMap<(String, IpAddr), String>,
    services: HashMap<IpAddr, Names>,
    node_ports: HashMap<(u16, String), Names>,
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
        let name = pod.metadata.name.clone().unwrap_or_default();
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
            names: Names {
                namespace: pod.metadata.namespace.clone().unwrap_or_default(),
                service: NONE.to_owned(),
                workload: controller(&pod.metadata).map_or_else(
                    || name.clone(),
                    |(uid, own)| self.parents.get(&uid).cloned().unwrap_or(own),
                ),
                pod: name,
            },
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
    }

    /// An endpoint slice: which service is in front of which addresses.
    pub fn see_slice(&mut self, slice: &EndpointSlice) {
        let labels = slice.metadata.labels.iter().flatten();
        let service = labels
            .filter(|(key, _)| *key == "kubernetes.io/service-name")
            .map(|(_, name)| name);
        let namespace = slice.metadata.namespace.clone().unwrap_or_default();
        for (service, address) in service.flat_map(|service| {
            let addresses = slice.endpoints.iter().flat_map(|endpoint| endpoint.addresses.iter());
            addresses.map(move |address| (service, address))
        }) {
            if let Ok(ip) = address.parse() {
                self.backs.insert((namespace.clone(), ip), service.clone());
            }
        }
    }

    /// A service, with the workload that all of its pods belong to, if there is one: call after the pods.
    pub fn see_service(&mut self, service: &Service) {
        let Some(spec) = &service.spec else { return };
        let namespace = service.metadata.namespace.clone().unwrap_or_default();
        let name = service.metadata.name.clone().unwrap_or_default();
        let mut workloads: Vec<&str> = self
            .pods
            .values()
            .filter(|pod| !pod.host_network && pod.to == i64::MAX && pod.names.namespace == namespace)
            .filter(|pod| {
                pod.ips
                    .iter()
                    .any(|ip| self.backs.get(&(namespace.clone(), *ip)) == Some(&name))
            })
            .map(|pod| pod.names.workload.as_str())
            .collect();
        workloads.sort_unstable();
        workloads.dedup();
        let names = Names {
            namespace,
            pod: NONE.to_owned(),
            service: name,
            workload: match workloads.as_slice() {
                [one] => (*one).to_owned(),
                _ => NONE.to_owned(),
            },
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
        for ip in addresses.filter_map(|ip| ip.parse().ok()) {
            self.services.insert(ip, names.clone());
        }
        for port in spec.ports.iter().flatten() {
            if let Some(number) = port.node_port.and_then(|port| u16::try_from(port).ok()) {
                let protocol = port.protocol.as_deref().unwrap_or("TCP").to_lowercase();
                self.node_ports.insert((number, protocol), names.clone());
            }
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
        Some(&pod.names.namespace)
    }

    fn local(&self, row: &Row, when: (i64, i64)) -> Vec<Names> {
        let (process, host, ip) = (row.tag("process_name"), row.tag("host"), row.address("src"));
        let ours: Vec<Names> = self
            .pods_then(when)
            .filter(|pod| pod.node == host && pod.containers.iter().any(|name| name == process))
            .filter(|pod| pod.host_network || ip.is_some_and(|ip| pod.ips.contains(&ip)))
            .map(|pod| self.with_service(pod))
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
        if let Some(service) = self.services.get(&ip) {
            return vec![service.clone()];
        }
        let Some(node) = self.nodes.get(&ip) else {
            return vec![Names::none()];
        };
        let port = row
            .tag("dst_port")
            .parse()
            .ok()
            .map(|port: u16| (port, row.tag("transport").to_owned()));
        if let Some(service) = port.as_ref().and_then(|port| self.node_ports.get(port)) {
            return vec![service.clone()];
        }
        let declared: Vec<Names> = self
            .pods_then(when)
            .filter(|pod| pod.host_network && pod.node == *node)
            .filter(|pod| port.as_ref().is_some_and(|port| pod.ports.contains(port)))
            .map(|pod| pod.names.clone())
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
            .map(|pod| self.with_service(pod))
            .collect()
    }

    fn pods_then(&self, (first, last): (i64, i64)) -> impl Iterator<Item = &PodFact> {
        self.pods
            .values()
            .filter(move |pod| pod.from <= last && first <= pod.to)
    }

    fn with_service(&self, pod: &PodFact) -> Names {
        let mut names = pod.names.clone();
        let mut ips = pod.ips.iter().filter(|_| !pod.host_network);
        if let Some(service) = ips.find_map(|ip| self.backs.get(&(names.namespace.clone(), *ip))) {
            names.service = service.clone();
        }
        names
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
