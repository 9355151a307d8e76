//! Who owns a socket, what that process is called, and which Kubernetes objects the ends of a flow are.

pub mod cgroup;
pub mod k8s;
pub mod process;
pub mod sockets;
