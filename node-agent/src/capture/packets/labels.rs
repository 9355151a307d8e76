//! What the format tells of ends by settings alone: names of address ranges, and the layer a flow is of. Pure.

use std::net::IpAddr;

use ahash::RandomState;
use api::SubnetLabel;
use hashbrown::HashMap;
use records::{
    Str,
    flowlog::{FlowLayer, FlowPeer},
};

/// Names of address ranges; the longest prefix names an address.
#[derive(Debug, Default)]
pub(super) struct Subnets {
    /// By length, longest first: names by first address.
    lengths: Vec<(u8, HashMap<u128, Str, RandomState>)>,
}

impl Subnets {
    pub(super) fn new(labels: &[SubnetLabel]) -> Self {
        let mut lengths: Vec<(u8, HashMap<u128, Str, RandomState>)> = Vec::new();
        for label in labels {
            let (first, length) = label.prefix();
            let at = lengths.partition_point(|(known, _)| *known > length);
            if lengths.get(at).is_none_or(|(known, _)| *known != length) {
                lengths.insert(at, (length, HashMap::default()));
            }
            if let Some((_, names)) = lengths.get_mut(at) {
                names.insert(first, label.name().into());
            }
        }
        Self { lengths }
    }

    /// The name of the smallest range that holds an address; empty if none does.
    pub(super) fn name(&self, ip: IpAddr) -> Str {
        let address = match ip {
            IpAddr::V4(ip) => u128::from(ip.to_ipv6_mapped()),
            IpAddr::V6(ip) => u128::from(ip),
        };
        self.lengths
            .iter()
            .find_map(|(length, names)| {
                let beyond = u128::MAX.checked_shr((*length).into()).unwrap_or_default();
                names.get(&(address & !beyond)).cloned()
            })
            .unwrap_or_default()
    }
}

/// Which namespaces are the infrastructure's.
#[derive(Debug, Default)]
pub(super) struct Layers {
    /// Names, or beginnings of names before a `*`.
    infra: Vec<String>,
}

impl Layers {
    pub(super) fn new(infra: &[String]) -> Self {
        Self { infra: infra.to_vec() }
    }

    /// Of the applications, if either end is in a namespace that is not the infrastructure's.
    pub(super) fn of(&self, src: Option<&FlowPeer>, dst: Option<&FlowPeer>) -> FlowLayer {
        let of_an_application = |peer: &FlowPeer| {
            let api = &*peer.namespace == "default" && &*peer.name == "kubernetes" && &*peer.kind == "Service";
            !peer.namespace.is_empty() && !api && !self.is_infra(&peer.namespace)
        };
        if src.is_some_and(of_an_application) || dst.is_some_and(of_an_application) {
            FlowLayer::App
        } else {
            FlowLayer::Infra
        }
    }

    fn is_infra(&self, namespace: &str) -> bool {
        self.infra.iter().any(|pattern| match pattern.strip_suffix('*') {
            Some(beginning) => namespace.starts_with(beginning),
            None => namespace == pattern,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_prefix_names_an_address() {
        let labels: Vec<SubnetLabel> = [
            "private=10.0.0.0/8",
            "office=10.1.0.0/16",
            "printer=10.1.2.3/32",
            "lab=2001:db8::/32",
            "four=0.0.0.0/0",
            "site=2001:db8:0:1::/64",
        ]
        .map(|text| text.parse().unwrap())
        .to_vec();
        let subnets = Subnets::new(&labels);
        for (ip, name) in [
            ("10.1.2.3", "printer"),
            ("10.1.2.4", "office"),
            ("10.2.0.1", "private"),
            ("11.0.0.1", "four"),
            ("2001:db8::1", "lab"),
            ("2001:db8:0:1::1", "site"),
            ("2001:db9::1", ""),
        ] {
            assert_eq!(&*subnets.name(ip.parse().unwrap()), name, "{ip}");
        }
        assert_eq!(&*Subnets::new(&[]).name("10.0.0.1".parse().unwrap()), "");
        let all = Subnets::new(&["all=::/0".parse().unwrap()]);
        assert_eq!(&*all.name("10.0.0.1".parse().unwrap()), "all");
    }

    #[test]
    fn a_flow_is_of_the_applications_if_either_end_is() {
        let layers = Layers::new(&["kube-*".into(), "monitoring".into()]);
        let peer = |kind: &str, namespace: &str, name: &str| {
            Some(FlowPeer {
                kind: kind.into(),
                namespace: namespace.into(),
                name: name.into(),
                ..FlowPeer::default()
            })
        };
        let shop = peer("Pod", "shop", "a");
        let dns = peer("Pod", "kube-system", "dns");
        let node = peer("Node", "", "n1");
        let api = peer("Service", "default", "kubernetes");
        let metrics = peer("Pod", "monitoring", "p");
        let near = peer("Pod", "monitoring-shop", "p");
        for (src, dst, wanted) in [
            (&shop, &dns, FlowLayer::App),
            (&dns, &shop, FlowLayer::App),
            (&dns, &node, FlowLayer::Infra),
            (&None, &None, FlowLayer::Infra),
            (&metrics, &api, FlowLayer::Infra),
            (&near, &api, FlowLayer::App),
        ] {
            assert_eq!(layers.of(src.as_ref(), dst.as_ref()), wanted, "{src:?} {dst:?}");
        }
    }
}
