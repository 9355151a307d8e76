//! From the options to the settings of the agent's parts. No I/O.

use anyhow::bail;
use api::{AgentConfig, L7Flow, Plugin};
use records::Globals;

use crate::{
    capture::{
        bash::BashConfig,
        conntrack::ConntrackConfig,
        dns::DnsConfig,
        ebpf_net::NetCaptureConfig,
        http::HttpConfig,
        packets::{FlowLabels, PacketConfig},
    },
    ebpf::{self, net::LoadOptions, offsets::CgroupHierarchy},
    uplink::{ClientTls, GrpcConfig},
};

/// Rows kept at most; a flush is made early at half of them. About 250 bytes each.
const ROWS_MAX: usize = 100_000;

/// The capture's settings.
pub(crate) fn capture_config(config: &AgentConfig, refuse: Vec<String>) -> NetCaptureConfig {
    NetCaptureConfig {
        interval: config.interval,
        loopback: config.net.loopback,
        ipv6_disabled: config.net.ipv6_disabled,
        ephemeral_port: config.net.ephemeral_port,
        proc: config.identity.proc_dir(),
        own_node_only: config.kubernetes.collector.is_some(),
        rows_max: ROWS_MAX,
        load: LoadOptions {
            tcp_connections_max: config.kernel.tcp_connections_max,
            flow_map_entries: config.kernel.flow_map_entries,
            ring_buffer_size: ring_buffer_size(config),
            cgroups: CgroupHierarchy::default(),
            refuse: refuse
                .into_iter()
                .filter(|name| !is_bash(name) && !is_dns(name) && !is_http(name) && !is_tls(name) && !is_packets(name))
                .collect(),
        },
    }
}

/// The settings of `ebpf-conntrack`; `None` if it is off, or has nothing to add to.
pub(crate) fn conntrack_config(config: &AgentConfig) -> Option<ConntrackConfig> {
    let on = |plugin| config.plugins.contains(&plugin);
    (on(Plugin::EbpfNet) && on(Plugin::EbpfConntrack)).then(|| ConntrackConfig {
        proc: config.identity.proc_dir(),
    })
}

/// The settings of `ebpf-bash`; `None` if it is off.
pub(crate) fn bash_config(config: &AgentConfig, refuse: &[String]) -> Option<BashConfig> {
    config.plugins.contains(&Plugin::EbpfBash).then(|| BashConfig {
        interval: config.interval,
        proc: config.identity.proc_dir(),
        refuse: refuse.iter().filter(|name| is_bash(name)).cloned().collect(),
    })
}

/// The settings of `bpf-netlog`; `None` if it is off.
pub(crate) fn packet_config(config: &AgentConfig, refuse: &[String]) -> Option<PacketConfig> {
    let netlog = &config.netlog;
    config.plugins.contains(&Plugin::BpfNetlog).then(|| PacketConfig {
        interval: netlog.cache_active_timeout,
        sampling: netlog.sampling,
        max_flows: netlog.cache_max_flows,
        interfaces: netlog.interfaces.clone(),
        exclude: netlog.exclude_interfaces.clone(),
        labels: FlowLabels {
            cluster: netlog.cluster_name.clone().unwrap_or_default(),
            infra: netlog.infra_namespaces.clone(),
            subnets: netlog.subnet_labels.clone(),
        },
        proc: config.identity.proc_dir(),
        refuse: refuse.iter().filter(|name| is_packets(name)).cloned().collect(),
    })
}

/// The settings of `dnsflow`; `None` if it is off.
pub(crate) fn dns_config(config: &AgentConfig, refuse: &[String]) -> Option<DnsConfig> {
    let on = config.plugins.contains(&Plugin::EbpfNet) && !config.net.dns_ports.is_empty();
    on.then(|| DnsConfig {
        interval: config.interval,
        ports: config.net.dns_ports.clone(),
        questions: config.net.dns_names,
        loopback: config.net.loopback,
        ipv6_disabled: config.net.ipv6_disabled,
        proc: config.identity.proc_dir(),
        own_node_only: config.kubernetes.collector.is_some(),
        ring_buffer_size: ring_buffer_size(config),
        cgroups: CgroupHierarchy::default(),
        refuse: refuse.iter().filter(|name| is_dns(name)).cloned().collect(),
    })
}

/// The settings of `httpflow`; `None` if it is off.
pub(crate) fn http_config(config: &AgentConfig, refuse: &[String]) -> Option<HttpConfig> {
    requests_config(config, L7Flow::Http, refuse, is_http)
}

/// The settings of `httpflow-tls`; `None` if it is off.
pub(crate) fn tls_config(config: &AgentConfig, refuse: &[String]) -> Option<HttpConfig> {
    requests_config(config, L7Flow::HttpTls, refuse, is_tls)
}

fn requests_config(
    config: &AgentConfig,
    flow: L7Flow,
    refuse: &[String],
    is_own: fn(&str) -> bool,
) -> Option<HttpConfig> {
    let on = config.plugins.contains(&Plugin::EbpfNet) && config.net.l7.contains(&flow);
    on.then(|| HttpConfig {
        interval: config.interval,
        loopback: config.net.loopback,
        ipv6_disabled: config.net.ipv6_disabled,
        ephemeral_port: config.net.ephemeral_port,
        keep_query: config.net.http_keep_query,
        path_limit: config.net.http_path_limit,
        routes: config.net.http_routes.clone(),
        series_max: usize::try_from(config.net.http_series_max).unwrap_or(usize::MAX),
        proc: config.identity.proc_dir(),
        own_node_only: config.kubernetes.collector.is_some(),
        load: ebpf::http::LoadOptions {
            ring_buffer_size: ring_buffer_size(config),
            cgroups: CgroupHierarchy::default(),
            refuse: refuse.iter().filter(|name| is_own(name)).cloned().collect(),
        },
    })
}

fn ring_buffer_size(config: &AgentConfig) -> u32 {
    u32::try_from(config.kernel.ring_buffer_size.0).unwrap_or(u32::MAX)
}

fn is_http(program: &str) -> bool {
    ebpf::http::PROGRAMS.contains(&program)
}

fn is_tls(program: &str) -> bool {
    ebpf::tls::is_program(program)
}

fn is_dns(program: &str) -> bool {
    ebpf::dns::PROGRAMS.contains(&program)
}

fn is_packets(program: &str) -> bool {
    ebpf::packets::is_program(program)
}

fn is_bash(program: &str) -> bool {
    ebpf::bash::PROGRAMS.contains(&program)
}

/// The way to the aggregator.
pub(super) fn grpc(config: &AgentConfig) -> anyhow::Result<GrpcConfig> {
    let Some(aggregator) = &config.uplink.aggregator else {
        bail!("option aggregator is not set: give the aggregator's URL, or run `node-agent standalone`");
    };
    let mut grpc = GrpcConfig::new(aggregator.to_string());
    let tls = &config.uplink.tls;
    grpc.allow_plaintext = config.uplink.allow_plaintext;
    grpc.tls = match (&tls.cert, &tls.key, &tls.ca) {
        (Some(cert), Some(key), Some(ca)) => Some(ClientTls {
            cert: cert.clone(),
            key: key.clone(),
            ca: ca.clone(),
            server_name: tls.server_name.clone(),
        }),
        (None, None, None) => None,
        _ => bail!("tls_ca, tls_cert and tls_key belong together: the aggregator wants a certificate from the agent"),
    };
    Ok(grpc)
}

/// The node's name.
pub(super) fn host(config: &AgentConfig) -> String {
    config
        .identity
        .hostname
        .clone()
        .unwrap_or_else(aggregator::config::hostname)
}

/// Tags of every record: `host`, `service` if set, then the user's.
pub(super) fn globals(config: &AgentConfig) -> Globals {
    let mut tags = vec![("host".into(), host(config).into())];
    if let Some(service) = &config.identity.service {
        tags.push(("service".into(), service.as_str().into()));
    }
    tags.extend(
        config
            .tags
            .iter()
            .map(|(key, value)| (key.as_str().into(), value.as_str().into())),
    );
    Globals { tags }
}
