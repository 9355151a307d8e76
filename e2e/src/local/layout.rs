//! Where everything of the local cluster is: directories, addresses, names. No I/O.

use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

/// The control plane's namespace seen as a node: it has no kubelet.
pub const CONTROL_PLANE: &str = "control-plane";
/// Names of the nodes, in the order of their addresses.
pub const NODES: [&str; 2] = ["node1", "node2"];
/// Port of the API server in the control plane's network namespace.
pub const API_PORT: u16 = 6443;
/// Addresses of the control plane on the nodes' network.
pub const CONTROL_PLANE_V4: &str = "172.31.250.1";
/// The same, IPv6.
pub const CONTROL_PLANE_V6: &str = "fd00:e2e::1";
/// An address outside every range of the cluster, in the control plane's network namespace.
pub const OUTSIDE_V4: &str = "203.0.113.10";
/// The same, IPv6.
pub const OUTSIDE_V6: &str = "2001:db8:e2e::10";
/// Addresses that a load balancer would hand out; routed to the first node from outside.
pub const LOAD_BALANCER_RANGE: &str = "198.51.100.0/24";
/// All pods of the cluster.
pub const POD_RANGE_V4: &str = "10.244.0.0/16";
/// The same, IPv6.
pub const POD_RANGE_V6: &str = "fd00:244::/48";
/// All ClusterIPs.
pub const SERVICE_RANGES: &str = "10.96.0.0/16,fd00:96::/112";
/// First ClusterIP: the API server's.
pub const API_SERVICE_IP: &str = "10.96.0.1";
/// ClusterIP of the cluster's DNS.
pub const DNS_IP: &str = "10.96.0.10";
/// All nodes.
pub const NODE_RANGE_V4: &str = "172.31.250.0/24";
/// The same, IPv6.
pub const NODE_RANGE_V6: &str = "fd00:e2e::/64";

/// Directories of one local cluster, and its name on the machine.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Data of the cluster; removed with it.
    pub root: PathBuf,
    /// Logs of the cluster's programs; kept.
    pub logs: PathBuf,
    /// Name of its cgroups: two checkouts on one machine have clusters of their own.
    pub id: String,
}

/// Addresses of one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// On the nodes' network.
    pub v4: String,
    /// The same, IPv6.
    pub v6: String,
    /// Its pods.
    pub pods_v4: String,
    /// The same, IPv6.
    pub pods_v6: String,
}

// === impl Layout ===

impl Layout {
    /// The cluster whose files are below `directory` (absolute).
    #[must_use]
    pub fn new(directory: &Path) -> Self {
        let root = directory.join("local");
        let digest = Sha256::digest(root.as_os_str().as_encoded_bytes());
        let id = digest.iter().take(4).fold("ec-e2e-".to_owned(), |mut id, byte| {
            id.push_str(&format!("{byte:02x}"));
            id
        });
        Self {
            logs: directory.join("logs"),
            root,
            id,
        }
    }

    /// The kubeconfig of an administrator, for programs of the machine.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.root.join("kubeconfig")
    }

    /// Directory of one namespace: the control plane's or a node's.
    #[must_use]
    pub fn place(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Image archives that nodes import when they start.
    #[must_use]
    pub fn images(&self) -> PathBuf {
        self.root.join("images")
    }
}

// === impl Addresses ===

impl Addresses {
    /// Of the node with this index in [`NODES`].
    #[must_use]
    pub fn of(index: usize) -> Self {
        let number = index + 1;
        Self {
            v4: format!("172.31.250.{}", 10 + number),
            v6: format!("fd00:e2e::1{number}"),
            pods_v4: format!("10.244.{number}.0/24"),
            pods_v6: format!("fd00:244:0:{number}::/64"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_of_two_checkouts_have_names_of_their_own() {
        let one = Layout::new(Path::new("/a/target/e2e"));
        let two = Layout::new(Path::new("/b/target/e2e"));
        assert_ne!(one.id, two.id);
        assert_eq!(one.id, Layout::new(Path::new("/a/target/e2e")).id);
    }

    #[test]
    fn addresses_of_nodes_are_inside_the_cluster_ranges_and_differ() {
        let (one, two) = (Addresses::of(0), Addresses::of(1));
        for node in [&one, &two] {
            assert!(node.v4.parse::<std::net::Ipv4Addr>().is_ok(), "{node:?}");
            assert!(node.v6.parse::<std::net::Ipv6Addr>().is_ok(), "{node:?}");
            assert!(node.v4.starts_with("172.31.250."), "{node:?}");
            assert!(node.pods_v4.starts_with("10.244."), "{node:?}");
            assert!(node.pods_v6.starts_with("fd00:244:0:"), "{node:?}");
        }
        assert_ne!(one, two);
    }
}
