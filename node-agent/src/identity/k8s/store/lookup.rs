//! Names of the ends of flows, out of a [`Store`].

use std::{
    net::IpAddr,
    sync::atomic::{AtomicU64, Ordering},
};

use records::{K8sEndpoint, Str, Transport};

use super::{NodeEntry, OPEN, PodEntry, Seen, Store};
use crate::identity::cgroup::Uid;

/// How long after its end an address still names its last holder: the last segments of a connection trail behind.
const TRAIL_NS: i64 = 10 * 1_000_000_000;

/// Why an end has no name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unnamed {
    /// No object is known by this address, uid or port.
    Unknown,
    /// Two pods may have held the address at that time.
    AddressAmbiguous,
    /// The address was not held at that time.
    NotHeldThen,
    /// Several pods in the node's network declare the port: the node is named in their place.
    PortAmbiguous,
    /// The pod is named, its workload is not: the replica set or job that owns it has not been seen.
    OwnerUnseen,
}

/// Lookups that gave no name or a lesser one, by [`Unnamed`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UnnamedCounts {
    /// [`Unnamed::Unknown`].
    pub unknown: u64,
    /// [`Unnamed::AddressAmbiguous`].
    pub address_ambiguous: u64,
    /// [`Unnamed::NotHeldThen`].
    pub not_held_then: u64,
    /// [`Unnamed::PortAmbiguous`].
    pub port_ambiguous: u64,
    /// [`Unnamed::OwnerUnseen`].
    pub owner_unseen: u64,
}

/// [`UnnamedCounts`] while they grow; lookups share the store.
#[derive(Debug, Default)]
pub(super) struct Unnameds {
    unknown: AtomicU64,
    address_ambiguous: AtomicU64,
    not_held_then: AtomicU64,
    port_ambiguous: AtomicU64,
    owner_unseen: AtomicU64,
}

impl Unnameds {
    fn add(&self, why: Unnamed) {
        let counter = match why {
            Unnamed::Unknown => &self.unknown,
            Unnamed::AddressAmbiguous => &self.address_ambiguous,
            Unnamed::NotHeldThen => &self.not_held_then,
            Unnamed::PortAmbiguous => &self.port_ambiguous,
            Unnamed::OwnerUnseen => &self.owner_unseen,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

impl Store {
    /// Lookups so far that gave no name or a lesser one.
    #[must_use]
    pub fn unnamed(&self) -> UnnamedCounts {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        UnnamedCounts {
            unknown: of(&self.unnamed.unknown),
            address_ambiguous: of(&self.unnamed.address_ambiguous),
            not_held_then: of(&self.unnamed.not_held_then),
            port_ambiguous: of(&self.unnamed.port_ambiguous),
            owner_unseen: of(&self.unnamed.owner_unseen),
        }
    }

    /// The pod of a uid as it was at `at`; ended ones too, while they are remembered.
    ///
    /// # Errors
    /// Why there is no name.
    pub fn pod(&self, uid: Uid, at: i64) -> Result<K8sEndpoint, Unnamed> {
        let found = self.pods.get(uid).map(|pod| self.endpoint(pod, at));
        found.ok_or(Unnamed::Unknown).inspect_err(|why| self.unnamed.add(*why))
    }

    /// The agent's own node.
    #[must_use]
    pub fn own_node(&self) -> Option<K8sEndpoint> {
        let node = self.own_node.and_then(|uid| self.nodes.get(&uid))?;
        Some(K8sEndpoint::clone(&node.endpoint))
    }

    /// Namespace of a pod, and whether it is on the agent's own node.
    #[must_use]
    pub fn placement(&self, uid: Uid) -> Option<(Str, bool)> {
        self.pods.get(uid).map(|pod| (pod.namespace.clone(), pod.own))
    }

    /// Who held `ip` at `at`; `port` tells services on a node's address and pods in a node's network.
    ///
    /// # Errors
    /// Why there is no name.
    pub fn by_address(
        &self,
        ip: IpAddr,
        port: Option<u16>,
        transport: Transport,
        at: i64,
    ) -> Result<K8sEndpoint, Unnamed> {
        self.find(ip, port, transport, at)
            .inspect_err(|why| self.unnamed.add(*why))
    }

    fn find(&self, ip: IpAddr, port: Option<u16>, transport: Transport, at: i64) -> Result<K8sEndpoint, Unnamed> {
        if let Some(node) = self.node_ips.get(&ip).and_then(|uid| self.nodes.get(uid)) {
            return Ok(self.on_node(node, ip, port, transport, at));
        }
        let held = match self.by_ip.of(ip) {
            [] => Err(Unnamed::Unknown),
            uids => self.holder(uids, at),
        };
        match held {
            Ok(pod) => return Ok(self.endpoint(pod, at)),
            Err(Unnamed::AddressAmbiguous) => return Err(Unnamed::AddressAmbiguous),
            Err(_) => {}
        }
        if let Some(service) = self.service_ips.get(&ip).and_then(|uid| self.services.get(uid)) {
            return Ok(K8sEndpoint::clone(&service.endpoint));
        }
        // An endpoint of a service without a selector.
        if let (Err(Unnamed::Unknown), Some(slice)) = (&held, self.backs.get(&ip).and_then(|uid| self.slices.get(uid)))
        {
            return Ok(K8sEndpoint {
                namespace: slice.namespace.clone(),
                service: slice.service.clone(),
                ..K8sEndpoint::default()
            });
        }
        held.map(|pod| self.endpoint(pod, at))
    }

    fn on_node(&self, node: &NodeEntry, ip: IpAddr, port: Option<u16>, transport: Transport, at: i64) -> K8sEndpoint {
        let Some(key) = port.map(|port| (port, transport)) else {
            return K8sEndpoint::clone(&node.endpoint);
        };
        if let Some(service) = self.node_ports.get(&key).and_then(|uid| self.services.get(uid)) {
            return K8sEndpoint::clone(&service.endpoint);
        }
        let uids = self.by_ip.of(ip);
        let mut pods = uids
            .iter()
            .filter_map(|uid| self.pods.get(*uid))
            .filter(|pod| pod.ports.as_ref().is_some_and(|ports| ports.0.contains(&key)))
            .filter(|pod| pod.from <= at && at < pod.to);
        match (pods.next(), pods.next()) {
            (Some(pod), None) => self.endpoint(pod, at),
            (Some(_), Some(_)) => {
                self.unnamed.add(Unnamed::PortAmbiguous);
                K8sEndpoint::clone(&node.endpoint)
            }
            (None, _) => K8sEndpoint::clone(&node.endpoint),
        }
    }

    fn holder(&self, uids: &[Uid], at: i64) -> Result<&PodEntry, Unnamed> {
        let pods = || {
            uids.iter()
                .filter_map(|uid| self.pods.get(*uid))
                .filter(|pod| pod.ports.is_none())
        };
        let mut then = pods().filter(|pod| pod.from <= at && at < pod.to);
        match (then.next(), then.next()) {
            (Some(pod), None) => return Ok(pod),
            (Some(_), Some(_)) => return Err(Unnamed::AddressAmbiguous),
            (None, _) => {}
        }
        pods()
            .filter(|pod| pod.to <= at && at - pod.to < TRAIL_NS)
            .max_by_key(|pod| pod.to)
            .ok_or(Unnamed::NotHeldThen)
    }

    fn endpoint(&self, pod: &PodEntry, at: i64) -> K8sEndpoint {
        let slice = || {
            // The address of a pod in the node's network is not its own.
            let ips = pod.ips.iter().flatten().filter(|_| pod.ports.is_none());
            ips.filter_map(|ip| self.slices.get(self.backs.get(ip)?))
                .find(|slice| slice.namespace == pod.namespace)
                .map(|slice| slice.service.clone())
        };
        let let_go = || self.let_go.get(&pod.uid).filter(|(_, when)| at < *when);
        // The address of an ended pod may back another's service by now.
        let service = if pod.to == OPEN { slice() } else { None };
        let service = service.or_else(|| let_go().map(|(service, _)| service.clone()));
        let (workload_type, workload) = match pod.owner.and_then(|uid| self.owners.get(&uid)) {
            None => ("pod".into(), pod.name.clone()),
            Some(owner) => match &owner.parent {
                Some((kind, name)) => (kind.clone(), name.clone()),
                // Not seen yet: whether a deployment is above it is not known.
                None if owner.seen == Seen::Never && matches!(&*owner.kind, "replicaset" | "job") => {
                    self.unnamed.add(Unnamed::OwnerUnseen);
                    (Str::default(), Str::default())
                }
                None => (owner.kind.clone(), owner.name.clone()),
            },
        };
        K8sEndpoint {
            namespace: pod.namespace.clone(),
            pod: pod.name.clone(),
            service: service.unwrap_or_default(),
            workload,
            workload_type,
        }
    }
}
