//! Slices, services and nodes of a [`Store`].

use std::{net::IpAddr, sync::Arc};

use records::K8sEndpoint;

use super::{Kind, NodeEntry, OPEN, ServiceEntry, SliceEntry, Store, ZONE, address, meta_uid, transport};
use crate::identity::{
    cgroup::Uid,
    k8s::objects::{EndpointSlice, Node, Service},
};

/// Label of a slice with the service's name.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

impl Store {
    /// A slice is, or changed.
    pub fn apply_slice(&mut self, slice: &EndpointSlice, now: i64) {
        let meta = &slice.metadata;
        let Some(uid) = meta_uid(meta) else { return };
        let Some(service) = meta.labels.as_ref().and_then(|labels| labels.get(SERVICE_NAME)) else {
            return;
        };
        let before = self.remove_slice(uid);
        let entry = SliceEntry {
            namespace: self.text(meta.namespace.as_deref().unwrap_or_default()),
            service: self.text(service),
            ips: addresses(slice.endpoints.iter().flat_map(|it| &it.addresses)),
            list: self.lists.get(Kind::EndpointSlice),
        };
        let names = |slice: &SliceEntry| (slice.namespace.clone(), slice.service.clone());
        for ip in &entry.ips {
            let other = self.backs.get(ip).and_then(|other| self.slices.get(other));
            if other.is_some() {
                self.shared.insert(*ip);
            }
            if other.is_none_or(|other| names(&entry) < names(other)) {
                self.backs.insert(*ip, uid);
            }
        }
        self.slices_of.entry(names(&entry)).or_default().push(uid);
        self.slices.insert(uid, entry);
        before.into_iter().for_each(|before| self.let_go(&before, now));
    }

    /// A slice is gone.
    pub fn delete_slice(&mut self, slice: &EndpointSlice, now: i64) {
        meta_uid(&slice.metadata)
            .into_iter()
            .for_each(|uid| self.drop_slice(uid, now));
    }

    pub(super) fn drop_slice(&mut self, uid: Uid, now: i64) {
        let gone = self.remove_slice(uid);
        gone.into_iter().for_each(|gone| self.let_go(&gone, now));
    }

    /// Remembers the service of living pods whose addresses are in no slice any more.
    fn let_go(&mut self, gone: &SliceEntry, now: i64) {
        for ip in gone.ips.iter().filter(|ip| !self.backs.contains_key(*ip)) {
            for uid in self.by_ip.of(*ip) {
                let pod = self.pods.get(*uid);
                if pod.is_some_and(|pod| pod.to == OPEN && pod.ports.is_none() && pod.namespace == gone.namespace) {
                    self.let_go.insert(*uid, (gone.service.clone(), now));
                }
            }
        }
    }

    fn remove_slice(&mut self, uid: Uid) -> Option<SliceEntry> {
        let gone = self.slices.remove(&uid)?;
        let service = (gone.namespace.clone(), gone.service.clone());
        if let Some(slices) = self.slices_of.get_mut(&service) {
            slices.retain(|it| *it != uid);
            if slices.is_empty() {
                self.slices_of.remove(&service);
            }
        }
        for ip in &gone.ips {
            if self.backs.get(ip) != Some(&uid) {
                continue;
            }
            if !self.shared.contains(ip) {
                self.backs.remove(ip);
                continue;
            }
            // Rare: an address in the slices of two services, or moved between two of one.
            let slices = self.slices.iter().filter(|(_, slice)| slice.ips.contains(ip));
            let next = slices
                .min_by(|(_, a), (_, b)| (&a.namespace, &a.service).cmp(&(&b.namespace, &b.service)))
                .map(|(uid, _)| *uid);
            match next {
                Some(next) => {
                    self.backs.insert(*ip, next);
                }
                None => {
                    self.backs.remove(ip);
                    self.shared.remove(ip);
                }
            }
        }
        Some(gone)
    }

    /// A service is, or changed.
    pub fn apply_service(&mut self, service: &Service) {
        let meta = &service.metadata;
        let (Some(uid), Some(name)) = (meta_uid(meta), meta.name.as_deref()) else {
            return;
        };
        self.remove_service(uid);
        let spec = &service.spec;
        let endpoint = Arc::new(K8sEndpoint {
            namespace: self.text(meta.namespace.as_deref().unwrap_or_default()),
            service: self.text(name),
            ..K8sEndpoint::default()
        });
        let balancer = service.status.load_balancer.ingress.iter().map(|it| &it.ip);
        let ips = addresses(
            spec.cluster_ip
                .iter()
                .chain(&spec.cluster_ips)
                .chain(&spec.external_ips)
                .chain(balancer),
        );
        let node_ports = spec
            .ports
            .iter()
            .filter_map(|port| {
                Some((
                    port.node_port.filter(|it| *it != 0)?,
                    transport(port.protocol.as_deref())?,
                ))
            })
            .collect::<Box<[_]>>();
        self.service_ips.extend(ips.iter().map(|ip| (*ip, uid)));
        self.node_ports.extend(node_ports.iter().map(|port| (*port, uid)));
        let list = self.lists.get(Kind::Service);
        self.services.insert(
            uid,
            ServiceEntry {
                endpoint,
                ips,
                node_ports,
                list,
            },
        );
    }

    /// A service is gone.
    pub fn delete_service(&mut self, service: &Service) {
        meta_uid(&service.metadata)
            .into_iter()
            .for_each(|uid| self.remove_service(uid));
    }

    pub(super) fn remove_service(&mut self, uid: Uid) {
        let Some(gone) = self.services.remove(&uid) else { return };
        for ip in &gone.ips {
            if self.service_ips.get(ip) == Some(&uid) {
                self.service_ips.remove(ip);
            }
        }
        for port in &gone.node_ports {
            if self.node_ports.get(port) == Some(&uid) {
                self.node_ports.remove(port);
            }
        }
    }

    /// A node is, or changed.
    pub fn apply_node(&mut self, node: &Node) {
        let (Some(uid), Some(name)) = (meta_uid(&node.metadata), node.metadata.name.as_deref()) else {
            return;
        };
        self.remove_node(uid);
        if *name == *self.node {
            self.own_node = Some(uid);
        }
        let endpoint = Arc::new(K8sEndpoint {
            workload: self.text(name),
            workload_type: self.text("node"),
            ..K8sEndpoint::default()
        });
        let ips = addresses(node.status.addresses.iter().map(|it| &it.address));
        self.node_ips.extend(ips.iter().map(|ip| (*ip, uid)));
        let list = self.lists.get(Kind::Node);
        let zone = node.metadata.labels.as_ref().and_then(|labels| labels.get(ZONE));
        let zone = self.text(zone.map_or("", String::as_str));
        self.node_names.insert(endpoint.workload.clone(), uid);
        self.nodes.insert(
            uid,
            NodeEntry {
                endpoint,
                ips,
                zone,
                list,
            },
        );
    }

    /// A node is gone.
    pub fn delete_node(&mut self, node: &Node) {
        meta_uid(&node.metadata)
            .into_iter()
            .for_each(|uid| self.remove_node(uid));
    }

    pub(super) fn remove_node(&mut self, uid: Uid) {
        let Some(gone) = self.nodes.remove(&uid) else { return };
        if self.node_names.get(&gone.endpoint.workload) == Some(&uid) {
            self.node_names.remove(&gone.endpoint.workload);
        }
        for ip in &gone.ips {
            if self.node_ips.get(ip) == Some(&uid) {
                self.node_ips.remove(ip);
            }
        }
    }
}

fn addresses<'a>(texts: impl Iterator<Item = &'a String>) -> Box<[IpAddr]> {
    texts.filter_map(|text| address(text)).collect()
}
