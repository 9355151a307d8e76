//! The few fields of Kubernetes objects that identity needs; everything else of an answer is skipped while it is parsed.

use std::{borrow::Cow, collections::BTreeMap};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::Resource;
use serde::{Deserialize, Deserializer};

/// Declares one trimmed kind.
macro_rules! kind {
    ($(#[$doc:meta])* $name:ident $group:literal $version:literal $plural:literal $scope:ident { $($(#[$meta:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Default, Deserialize)]
        #[serde(rename_all = "camelCase")]
        pub struct $name {
            /// Name, uid and owners.
            #[serde(default, deserialize_with = "metadata")]
            pub metadata: ObjectMeta,
            $($(#[$meta])* pub $field: $type,)*
        }

        impl Resource for $name {
            type DynamicType = ();
            type Scope = k8s_openapi::$scope;
            fn kind(_: &()) -> Cow<'_, str> {
                stringify!($name).into()
            }
            fn group(_: &()) -> Cow<'_, str> {
                $group.into()
            }
            fn version(_: &()) -> Cow<'_, str> {
                $version.into()
            }
            fn plural(_: &()) -> Cow<'_, str> {
                $plural.into()
            }
            fn meta(&self) -> &ObjectMeta {
                &self.metadata
            }
            fn meta_mut(&mut self) -> &mut ObjectMeta {
                &mut self.metadata
            }
        }
    };
}

kind! {
    /// A pod.
    Pod "" "v1" "pods" NamespaceResourceScope {
        /// What was asked for.
        #[serde(default)]
        spec: PodSpec,
        /// What is.
        #[serde(default)]
        status: PodStatus,
    }
}
kind! {
    /// A service.
    Service "" "v1" "services" NamespaceResourceScope {
        /// Addresses and ports.
        #[serde(default)]
        spec: ServiceSpec,
        /// Addresses of load balancers.
        #[serde(default)]
        status: ServiceStatus,
    }
}
kind! {
    /// A part of a service's endpoints.
    EndpointSlice "discovery.k8s.io" "v1" "endpointslices" NamespaceResourceScope {
        /// The endpoints.
        #[serde(default, deserialize_with = "nullable")]
        endpoints: Vec<SliceEndpoint>,
    }
}
kind! {
    /// A node.
    Node "" "v1" "nodes" ClusterResourceScope {
        /// Its addresses.
        #[serde(default)]
        status: NodeStatus,
    }
}
kind! {
    /// A namespace: labels and annotations only.
    Namespace "" "v1" "namespaces" ClusterResourceScope {}
}
kind! {
    /// A replica set: its owner only.
    ReplicaSet "apps" "v1" "replicasets" NamespaceResourceScope {}
}
kind! {
    /// A job: its owner only.
    Job "batch" "v1" "jobs" NamespaceResourceScope {}
}

kind! {
    /// A deployment: its labels only.
    Deployment "apps" "v1" "deployments" NamespaceResourceScope {}
}
kind! {
    /// A stateful set: its labels only.
    StatefulSet "apps" "v1" "statefulsets" NamespaceResourceScope {}
}
kind! {
    /// A daemon set: its labels only.
    DaemonSet "apps" "v1" "daemonsets" NamespaceResourceScope {}
}
kind! {
    /// A cron job: its labels only.
    CronJob "batch" "v1" "cronjobs" NamespaceResourceScope {}
}

/// See [`Pod`].
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodSpec {
    /// The node it runs on.
    #[serde(default)]
    pub node_name: Option<String>,
    /// It has the node's addresses.
    #[serde(default)]
    pub host_network: bool,
    /// Its containers' ports.
    #[serde(default, deserialize_with = "nullable")]
    pub containers: Vec<Container>,
}

/// See [`PodSpec`].
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Container {
    /// Declared ports.
    #[serde(default, deserialize_with = "nullable")]
    pub ports: Vec<ContainerPort>,
}

/// See [`Container`].
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerPort {
    /// Port in the pod.
    #[serde(default)]
    pub container_port: u16,
    /// Port on the node.
    #[serde(default)]
    pub host_port: Option<u16>,
    /// `TCP` if unset.
    #[serde(default)]
    pub protocol: Option<String>,
}

/// See [`Pod`].
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodStatus {
    /// `Pending`, `Running`, `Succeeded`, `Failed`, `Unknown`.
    #[serde(default)]
    pub phase: Option<String>,
    /// When the kubelet took it.
    #[serde(default)]
    pub start_time: Option<k8s_openapi::apimachinery::pkg::apis::meta::v1::Time>,
    /// First address.
    #[serde(default, rename = "podIP")]
    pub pod_ip: Option<String>,
    /// All addresses.
    #[serde(default, rename = "podIPs", deserialize_with = "nullable")]
    pub pod_ips: Vec<Ip>,
}

/// An address in a list.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Ip {
    /// The address; absent where a load balancer has a host name instead.
    #[serde(default)]
    pub ip: String,
}

/// See [`Service`].
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceSpec {
    /// First cluster address, or `None`.
    #[serde(default, rename = "clusterIP")]
    pub cluster_ip: Option<String>,
    /// All cluster addresses.
    #[serde(default, rename = "clusterIPs", deserialize_with = "nullable")]
    pub cluster_ips: Vec<String>,
    /// Addresses that reach the service by other means.
    #[serde(default, rename = "externalIPs", deserialize_with = "nullable")]
    pub external_ips: Vec<String>,
    /// Ports.
    #[serde(default, deserialize_with = "nullable")]
    pub ports: Vec<ServicePort>,
}

/// See [`ServiceSpec`].
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServicePort {
    /// Port on each node.
    #[serde(default)]
    pub node_port: Option<u16>,
    /// `TCP` if unset.
    #[serde(default)]
    pub protocol: Option<String>,
}

/// See [`Service`].
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceStatus {
    /// The load balancer.
    #[serde(default)]
    pub load_balancer: LoadBalancer,
}

/// See [`ServiceStatus`].
#[derive(Clone, Debug, Default, Deserialize)]
pub struct LoadBalancer {
    /// Its addresses.
    #[serde(default, deserialize_with = "nullable")]
    pub ingress: Vec<Ip>,
}

/// See [`EndpointSlice`].
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SliceEndpoint {
    /// Its addresses.
    #[serde(default, deserialize_with = "nullable")]
    pub addresses: Vec<String>,
    /// The object behind it.
    #[serde(default)]
    pub target_ref: Option<TargetRef>,
}

/// See [`SliceEndpoint`].
#[derive(Clone, Debug, Default, Deserialize)]
pub struct TargetRef {
    /// `Pod` for pods.
    #[serde(default)]
    pub kind: Option<String>,
    /// Its uid.
    #[serde(default)]
    pub uid: Option<String>,
}

/// See [`Node`].
#[derive(Clone, Debug, Default, Deserialize)]
pub struct NodeStatus {
    /// Addresses and host names.
    #[serde(default, deserialize_with = "nullable")]
    pub addresses: Vec<NodeAddress>,
}

/// See [`NodeStatus`].
#[derive(Clone, Debug, Default, Deserialize)]
pub struct NodeAddress {
    /// An address or a host name.
    #[serde(default)]
    pub address: String,
}

/// `null` in place of an empty list, as Go programs write it.
fn nullable<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<Vec<T>, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

/// The part of the metadata that is read; managed fields, the bulk of it, are skipped.
fn metadata<'de, D: Deserializer<'de>>(from: D) -> Result<ObjectMeta, D::Error> {
    #[derive(Default, Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Trimmed {
        name: Option<String>,
        namespace: Option<String>,
        uid: Option<String>,
        resource_version: Option<String>,
        labels: Option<BTreeMap<String, String>>,
        annotations: Option<BTreeMap<String, String>>,
        #[serde(default)]
        owner_references: Option<Vec<OwnerReference>>,
    }
    let trimmed = Trimmed::deserialize(from)?;
    Ok(ObjectMeta {
        name: trimmed.name,
        namespace: trimmed.namespace,
        uid: trimmed.uid,
        resource_version: trimmed.resource_version,
        labels: trimmed.labels,
        annotations: trimmed.annotations,
        owner_references: trimmed.owner_references,
        ..ObjectMeta::default()
    })
}
