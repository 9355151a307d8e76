//! The pods that the operator makes: node agents and aggregator.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::core::v1::{Affinity, EnvVar, ResourceRequirements, Toleration},
    apimachinery::pkg::{api::resource::Quantity, util::intstr::IntOrString},
};

use super::{cel, object::object};
use crate::LogFormat;

object! {
    /// The node agents' pods.
    AgentPods {
        /// Image; otherwise that of the operator.
        #[schemars(length(min = 1, max = 1024))]
        image: String,
        /// When the image is pulled; otherwise as that of the operator.
        #[schemars(extend("enum" = ["Always", "IfNotPresent", "Never"]))]
        image_pull_policy: String,
        /// Names of Secrets to pull the image with, in the operator's namespace; otherwise those of the operator.
        #[schemars(length(max = 16), extend("items" = cel::texts(253)))]
        image_pull_secrets: Vec<String>,
        /// CPU and memory that are asked for and allowed.
        resources: Resources,
        /// Labels of the nodes that get an agent; otherwise all nodes.
        #[schemars(extend("maxProperties" = 64))]
        node_selector: BTreeMap<String, String>,
        /// Taints that agents tolerate; otherwise all.
        #[schemars(length(max = 64))]
        tolerations: Vec<Toleration>,
        /// Which nodes get an agent, and other rules of the scheduler's.
        affinity: Affinity,
        /// Nodes whose agent may be replaced at the same time: a number, or a share such as 10%.
        #[schemars(extend("default" = 1))]
        max_unavailable: IntOrString,
        /// Priority class; otherwise system-node-critical.
        #[schemars(length(min = 1, max = 253))]
        priority_class_name: String,
        /// SELinux type of the container, where SELinux enforces; otherwise the one that the operator was installed with,
        /// spc_t unless changed there.
        #[schemars(length(min = 1, max = 253))]
        selinux_type: String,
        /// Labels added to the pods.
        #[schemars(extend("maxProperties" = 64))]
        labels: BTreeMap<String, String>,
        /// Annotations added to the pods.
        #[schemars(extend("maxProperties" = 64))]
        annotations: BTreeMap<String, String>,
        /// Environment variables added to the container. Options set here win over this object.
        #[schemars(length(max = 64))]
        env: Vec<EnvVar>,
        /// Logs.
        log: AgentLog,
        /// Sizes of kernel maps. A change makes agents load their programs anew.
        kernel: KernelMaps,
        /// Profiling service.
        pprof: PprofSpec,
        /// Where the host's root file system is mounted in the pod; the operator mounts it there.
        #[schemars(length(min = 2, max = 1024), regex(pattern = "^/"), extend("default" = "/host"))]
        host_root: String,
        /// Where the host's /proc is in the pod; otherwise proc below `hostRoot`.
        #[schemars(length(min = 1, max = 1024), regex(pattern = "^/"))]
        host_proc: String,
    }

    /// The aggregator's pods.
    AggregatorPods {
        /// How many.
        #[schemars(range(min = 1, max = 16), extend("default" = 1))]
        replicas: i32,
        /// Image; otherwise that of the operator.
        #[schemars(length(min = 1, max = 1024))]
        image: String,
        /// When the image is pulled; otherwise as that of the operator.
        #[schemars(extend("enum" = ["Always", "IfNotPresent", "Never"]))]
        image_pull_policy: String,
        /// Names of Secrets to pull the image with, in the operator's namespace; otherwise those of the operator.
        #[schemars(length(max = 16), extend("items" = cel::texts(253)))]
        image_pull_secrets: Vec<String>,
        /// CPU and memory that are asked for and allowed.
        resources: Resources,
        /// Labels of the nodes it may run on; otherwise all nodes.
        #[schemars(extend("maxProperties" = 64))]
        node_selector: BTreeMap<String, String>,
        /// Taints it tolerates.
        #[schemars(length(max = 64))]
        tolerations: Vec<Toleration>,
        /// Which nodes it may run on, and other rules of the scheduler's.
        affinity: Affinity,
        /// Priority class.
        #[schemars(length(min = 1, max = 253))]
        priority_class_name: String,
        /// Labels added to the pods.
        #[schemars(extend("maxProperties" = 64))]
        labels: BTreeMap<String, String>,
        /// Annotations added to the pods.
        #[schemars(extend("maxProperties" = 64))]
        annotations: BTreeMap<String, String>,
        /// Environment variables added to the container. Options set here win over this object.
        #[schemars(length(max = 64))]
        env: Vec<EnvVar>,
        /// Logs.
        log: AgentLog,
        /// Where records wait until they are delivered.
        queue: QueueSpec,
    }

    /// Logs.
    AgentLog {
        /// off, error, warn, info, debug, trace, or a filter such as info,node_agent=debug.
        #[schemars(length(min = 1, max = 1024), extend("default" = "info"))]
        level: String,
        /// Shape of a log line.
        #[schemars(extend("default" = "text"))]
        format: LogFormat,
    }

    /// Sizes of kernel maps.
    KernelMaps {
        /// TCP connections watched at one time. Further ones are counted as a whole when they close.
        #[schemars(range(min = 1024, max = 16777216), extend("default" = 131072))]
        tcp_connections_max: u32,
        /// Flows that the kernel sums up between two drains, TCP and UDP each. Further ones go through the ring buffer.
        #[schemars(range(min = 1024, max = 16777216), extend("default" = 16384))]
        flow_map_entries: u32,
        /// Size of each ring buffer between kernel and agent: a power of two from 64KiB to 1GiB.
        #[schemars(length(max = 16), regex(pattern = cel::RING_BUFFER), extend("default" = "4MiB"))]
        ring_buffer_size: String,
    }

    /// Profiling service.
    PprofSpec {
        /// Host name or address to listen on.
        #[schemars(length(min = 1, max = 253))]
        host: String,
        /// Port to listen on.
        #[schemars(range(min = 1, max = 65535))]
        port: u16,
    }

    /// Where records wait until they are delivered.
    QueueSpec {
        /// Most disk space that each DataWay's queue may use, from 16MiB to 64TiB. When it is full, new records stay
        /// with the agents.
        #[schemars(length(max = 32), regex(pattern = cel::SIZE), extend("default" = "2GiB", "x-kubernetes-validations" = cel::size_rules(Some(70_368_744_177_664.0), "must be a size from 16MiB to 64TiB")))]
        size: String,
        /// Records that waited longer are given up and counted as lost; from 1m to 720h.
        #[schemars(length(max = 32), regex(pattern = cel::DURATION), extend("default" = "12h", "x-kubernetes-validations" = cel::duration_rules("1m", "720h")))]
        age: String,
        /// The volume; otherwise an emptyDir, which outlives the container and not the pod.
        storage: QueueStorage,
    }

    /// The queue's volume.
    #[schemars(extend("x-kubernetes-validations" = cel::storage_rules()))]
    QueueStorage {
        /// A directory of the node that lives as long as the pod.
        empty_dir: EmptyDir,
        /// A persistent volume for each replica.
        volume_claim: VolumeClaim,
    }

    /// A directory of the node that lives as long as the pod.
    EmptyDir {
        /// Most it may hold, such as 4Gi; the pod is evicted above.
        size_limit: IntOrString,
    }

    /// A persistent volume for each replica.
    #[schemars(extend("required" = ["size"]))]
    VolumeClaim {
        /// Storage class; otherwise the cluster's default.
        #[schemars(length(max = 253))]
        storage_class_name: String,
        /// Space asked for, such as 10Gi.
        size: IntOrString,
        /// How it is mounted.
        #[schemars(length(min = 1, max = 4), extend("items" = {"type": "string", "enum": ["ReadWriteOnce", "ReadWriteOncePod", "ReadWriteMany"]}))]
        access_modes: Vec<String>,
    }

    /// CPU and memory that are asked for and allowed, by name: cpu, memory, ephemeral-storage.
    Resources {
        /// What the scheduler keeps free for the container.
        #[schemars(extend("maxProperties" = 16))]
        requests: BTreeMap<String, IntOrString>,
        /// Most it may use.
        #[schemars(extend("maxProperties" = 16))]
        limits: BTreeMap<String, IntOrString>,
    }
}

// === impl Resources ===

impl Resources {
    /// As a pod's container takes it.
    #[must_use]
    pub fn to_requirements(&self) -> ResourceRequirements {
        let quantities = |map: &BTreeMap<String, IntOrString>| {
            map.iter()
                .map(|(name, amount)| (name.clone(), quantity(amount)))
                .collect()
        };
        ResourceRequirements {
            requests: self.requests.as_ref().map(quantities),
            limits: self.limits.as_ref().map(quantities),
            ..ResourceRequirements::default()
        }
    }
}

/// `1` and `"1"` are the same amount.
#[must_use]
pub fn quantity(amount: &IntOrString) -> Quantity {
    Quantity(match amount {
        IntOrString::Int(number) => number.to_string(),
        IntOrString::String(text) => text.clone(),
    })
}
