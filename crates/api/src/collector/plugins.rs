//! The plugins' options, and what a namespace rule may say of them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{cel, object::object};
use crate::L7Flow;

macro_rules! by_plugin {
    ($($(#[$outer:meta])* $name:ident { $net:ty, $bash:ty, $conntrack:ty, $trace:ty, $netlog:ty })+) => {$(
        #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
        $(#[$outer])*
        pub struct $name {
            /// Flows of TCP and UDP, and requests of HTTP and DNS.
            #[serde(rename = "ebpf-net", skip_serializing_if = "Option::is_none")]
            pub net: Option<$net>,
            /// Commands typed into bash.
            #[serde(rename = "ebpf-bash", skip_serializing_if = "Option::is_none")]
            pub bash: Option<$bash>,
            /// The address behind a destination NAT, added to network records.
            #[serde(rename = "ebpf-conntrack", skip_serializing_if = "Option::is_none")]
            pub conntrack: Option<$conntrack>,
            /// Spans for tracing, made from the requests that ebpf-net reads.
            #[serde(rename = "ebpf-trace", skip_serializing_if = "Option::is_none")]
            pub trace: Option<$trace>,
            /// Network records and logs read from packets.
            #[serde(rename = "bpf-netlog", skip_serializing_if = "Option::is_none")]
            pub netlog: Option<$netlog>,
        }
    )+};
}

by_plugin! {
    /// What is collected: a plugin that is named runs, unless its `enabled` is false.
    #[schemars(extend("x-kubernetes-validations" = cel::plugins_rules()))]
    PluginsSpec { NetPlugin, BashPlugin, ConntrackPlugin, TracePlugin, NetlogPlugin }

    /// What differs in a namespace; a plugin not named is as in `spec.plugins`.
    NamespacePluginsSpec { NetToggle, PluginToggle, PluginToggle, PluginToggle, PluginToggle }
}

object! {
    /// Flows and requests.
    #[schemars(extend("x-kubernetes-validations" = cel::l7_rules()))]
    NetPlugin {
        /// Whether the plugin runs.
        #[schemars(extend("default" = true))]
        enabled: bool,
        /// Application protocols to read; an empty list for none. Without it and `l7Disabled`: httpflow.
        #[schemars(length(max = 8))]
        l7: Vec<L7Flow>,
        /// Application protocols not to read; all others are read. Excludes `l7`.
        #[schemars(length(max = 8))]
        l7_disabled: Vec<L7Flow>,
        /// Leave IPv6 out, for systems without it.
        #[schemars(extend("default" = false))]
        ipv6_disabled: bool,
        /// First ephemeral port. Ports from here up are taken for clients' and are not told apart in records.
        #[schemars(range(min = 0, max = 65535), extend("default" = 10001))]
        ephemeral_port: u16,
        /// Report flows of the loopback interface too.
        #[schemars(extend("default" = false))]
        loopback: bool,
        /// Ports at which DNS is looked for, over UDP and TCP; an empty list for no dnsflow. Without it: 53.
        #[schemars(length(max = 64), inner(range(min = 1, max = 65535)))]
        dns_ports: Vec<u16>,
        /// Tell what was looked up, in the tags query_name and query_type: a series for each name.
        #[schemars(extend("default" = false))]
        dns_names: bool,
        /// Keep the query string in the field path of httpflow. It may hold secrets, and makes many series.
        #[schemars(extend("default" = false))]
        http_keep_query: bool,
        /// Longest path that httpflow keeps, in bytes. One of this length or longer is cut there, and marked as truncated.
        #[schemars(range(min = 16, max = 8192), extend("default" = 512))]
        http_path_limit: u16,
        /// Patterns of paths, such as /users/{id}/orders/*. httpflow tells a path that matches one as the pattern.
        #[schemars(length(max = 256), inner(length(max = 512), regex(pattern = "^/")))]
        http_routes: Vec<String>,
        /// Records of httpflow per interval that have a path of their own. Further exchanges are told with the path `other`.
        #[schemars(range(min = 100, max = 1_000_000), extend("default" = 10000))]
        http_series_max: u32,
    }

    /// Commands typed into bash.
    BashPlugin {
        /// Whether the plugin runs.
        #[schemars(extend("default" = true))]
        enabled: bool,
    }

    /// The address behind a destination NAT.
    ConntrackPlugin {
        /// Whether the plugin runs.
        #[schemars(extend("default" = true))]
        enabled: bool,
    }

    /// Spans for tracing. Needs ebpf-net with httpflow.
    #[schemars(extend("x-kubernetes-validations" = cel::trace_rules()))]
    TracePlugin {
        /// Whether the plugin runs.
        #[schemars(extend("default" = true))]
        enabled: bool,
        /// Where spans go, host:port. Needed.
        #[schemars(length(max = 300), regex(pattern = cel::HOST_PORT))]
        server: String,
        /// Trace every process, except those on a blacklist.
        #[schemars(extend("default" = false))]
        all_process: bool,
        /// Trace processes that have any of these environment variables. Without it: DK_BPFTRACE_SERVICE, DD_SERVICE,
        /// OTEL_SERVICE_NAME.
        #[schemars(length(max = 64), extend("items" = cel::texts(256)))]
        env_list: Vec<String>,
        /// Never trace processes that have any of these environment variables.
        #[schemars(length(max = 64), extend("items" = cel::texts(256)))]
        env_blacklist: Vec<String>,
        /// Trace processes of these names.
        #[schemars(length(max = 64), extend("items" = cel::texts(256)))]
        name_list: Vec<String>,
        /// Never trace processes of these names.
        #[schemars(length(max = 64), extend("items" = cel::texts(256)))]
        name_blacklist: Vec<String>,
        /// Show trace ids of applications as decimal 64-bit numbers.
        #[schemars(extend("default" = false))]
        conv_to_ddtrace: bool,
    }

    /// Network records and logs read from packets.
    #[schemars(extend("x-kubernetes-validations" = cel::netlog_rules()))]
    NetlogPlugin {
        /// Whether the plugin runs.
        #[schemars(extend("default" = true))]
        enabled: bool,
        /// Packets to leave out, such as ip_saddr=='127.0.0.1' || ip_daddr=='127.0.0.1': those that any rule matches.
        #[schemars(length(max = 4096), regex(pattern = cel::BLACKLIST))]
        blacklist: String,
        /// Make network records.
        #[schemars(extend("default" = true))]
        metric: bool,
        /// Make logs of layers 4 and 7.
        #[schemars(extend("default" = false))]
        log: bool,
        /// One packet of this many is counted, chosen at random; 1 for all. Flows carry the number.
        #[schemars(range(min = 1, max = 1_000_000), extend("default" = 1))]
        sampling: u32,
        /// So long packets of a flow are summed up before they are told, from 1s to 1h.
        #[schemars(length(max = 32), regex(pattern = cel::DURATION), extend("default" = "5s", "x-kubernetes-validations" = cel::duration_rules("1s", "1h")))]
        cache_active_timeout: String,
        /// Flows kept in the kernel at a time, one per direction and interface. Packets of further ones are counted for their
        /// interface alone.
        #[schemars(range(min = 1000, max = 10_000_000), extend("default" = 100_000))]
        cache_max_flows: u32,
        /// Interfaces whose packets are counted, by name or by an expression such as /^eth/. Without it: all.
        #[schemars(length(max = 64), extend("items" = cel::texts(256)))]
        interfaces: Vec<String>,
        /// Interfaces whose packets are not counted, likewise. Without it: lo.
        #[schemars(length(max = 64), extend("items" = cel::texts(256)))]
        exclude_interfaces: Vec<String>,
        /// Name of the cluster in flows, where flows of several clusters come together.
        #[schemars(length(max = 253))]
        cluster_name: String,
        /// Namespaces of the infrastructure, by name or by how it begins before a *. Without it: kube-*.
        #[schemars(length(max = 64), inner(length(max = 64), regex(pattern = "^[a-z0-9-]*[*]?$")))]
        infra_namespaces: Vec<String>,
        /// Names of address ranges in flows, such as office=10.1.0.0/16. The longest prefix names an address.
        #[schemars(length(max = 1024), inner(length(max = 256), regex(pattern = "^[^=]+=[0-9a-fA-F.:]+/[0-9]{1,3}$")))]
        subnet_labels: Vec<String>,
    }

    /// Whether a plugin runs in a namespace.
    PluginToggle {
        /// Whether the plugin runs there; otherwise as in `spec.plugins`.
        enabled: bool,
    }

    /// Whether ebpf-net runs in a namespace, and for which protocols.
    #[schemars(extend("x-kubernetes-validations" = cel::l7_rules()))]
    NetToggle {
        /// Whether the plugin runs there; otherwise as in `spec.plugins`.
        enabled: bool,
        /// Application protocols to read there; otherwise as in `spec.plugins`.
        #[schemars(length(max = 8))]
        l7: Vec<L7Flow>,
        /// Application protocols not to read there; all others are read. Excludes `l7`.
        #[schemars(length(max = 8))]
        l7_disabled: Vec<L7Flow>,
    }
}
