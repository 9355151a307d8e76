//! Flow logs to messages and back.

use std::{net::IpAddr, sync::Arc};

use records::{
    FlowLog, Str,
    flowlog::{
        FlowConversation, FlowDirection, FlowDns, FlowDnsAnswer, FlowDrops, FlowEvent, FlowInterface, FlowL4,
        FlowLayer, FlowPeer, FlowRecordType, FlowTotals, FlowXlat,
    },
};

use super::{
    decode::{At, DecodeError},
    encode::{EncodeError, Texts, address},
};
use crate::v1;

/// Interfaces, events, and texts of an event that one record may have.
const MAX_LIST: usize = 64;

/// Most bytes of a flow log on the wire without its texts and lists, rounded up.
const BOUND: usize = 700;

/// Most bytes of a flow log on the wire without its texts.
pub(super) fn bound(flow: &FlowLog) -> usize {
    let texts: usize = sent(&flow.events)
        .iter()
        .map(|event| 6 + 10 * sent(&event.values).len())
        .sum();
    BOUND + 6 * sent(&flow.interfaces).len() + texts
}

pub(super) fn for_each_text<'a>(flow: &'a FlowLog, mut visit: impl FnMut(&'a Str)) {
    for peer in [&flow.src_k8s, &flow.dst_k8s].into_iter().flatten() {
        let FlowPeer {
            kind,
            name,
            namespace,
            owner_name,
            owner_kind,
            host_ip: _,
            host_name,
            zone,
            network,
        } = peer.as_ref();
        [kind, name, namespace, owner_name, owner_kind, host_name, zone, network]
            .into_iter()
            .for_each(&mut visit);
    }
    [&flow.src_subnet_label, &flow.dst_subnet_label, &flow.cluster]
        .into_iter()
        .chain(sent(&flow.interfaces).iter().map(|seen| &seen.name))
        .chain(flow.dns.iter().map(|dns| &dns.name))
        .chain(flow.drops.iter().flat_map(|drops| [&drops.state, &drops.cause]))
        .chain(
            sent(&flow.events)
                .iter()
                .flat_map(|event| sent(&event.values).iter().flat_map(|(key, value)| [key, value])),
        )
        .for_each(visit);
}

/// As many as a record may carry; of pairs half as many texts.
fn sent<T>(list: &[T]) -> &[T] {
    list.get(..MAX_LIST / 2).unwrap_or(list)
}

// === impl Texts ===

impl Texts<'_> {
    pub(super) fn flowlog(&mut self, flow: &FlowLog) -> Result<v1::FlowLog, EncodeError> {
        // Destructured so that a new field is a compile error here.
        let FlowLog {
            start_unix_ms,
            end_unix_ms,
            etype,
            src,
            dst,
            macs,
            proto,
            l4,
            dscp,
            flags,
            bytes,
            packets,
            sampling,
            interfaces,
            direction,
            agent_ip,
            src_k8s,
            dst_k8s,
            src_subnet_label,
            dst_subnet_label,
            layer,
            cluster,
            rtt_ns,
            dns,
            drops,
            xlat,
            events,
            conversation,
        } = flow;
        let (src_v4, src_v6_hi, src_v6_lo) = address(*src);
        let (dst_v4, dst_v6_hi, dst_v6_lo) = address(*dst);
        let mut seen = Vec::with_capacity(interfaces.len());
        for FlowInterface { name, direction } in sent(interfaces) {
            seen.push(u64::from(self.number(name)?) << 2 | u64::from(direction & 3));
        }
        let mut told = Vec::with_capacity(events.len());
        for event in sent(events) {
            let mut values = Vec::with_capacity(2 * event.values.len());
            for (key, value) in sent(&event.values) {
                values.extend([self.number(key)?, self.number(value)?]);
            }
            told.push(v1::FlowEvent { values });
        }
        let dns = match dns {
            Some(FlowDns { answer, errno, name }) => Some(v1::FlowDns {
                answered: answer.is_some(),
                id: answer.map_or(0, |answer| answer.id.into()),
                flags: answer.map_or(0, |answer| answer.flags.into()),
                latency_ms: answer.map_or(0, |answer| answer.latency_ms),
                errno: u32::from(*errno),
                name: self.number(name)?,
            }),
            None => None,
        };
        let drops = match drops {
            Some(FlowDrops {
                bytes,
                packets,
                flags,
                state,
                cause,
            }) => Some(v1::FlowDrops {
                bytes: *bytes,
                packets: *packets,
                flags: u32::from(*flags),
                state: self.number(state)?,
                cause: self.number(cause)?,
            }),
            None => None,
        };
        Ok(v1::FlowLog {
            start_unix_ms: *start_unix_ms,
            end_unix_ms: *end_unix_ms,
            etype: u32::from(*etype),
            src_v4,
            src_v6_hi,
            src_v6_lo,
            dst_v4,
            dst_v6_hi,
            dst_v6_lo,
            src_mac: macs.map(|[src, _]| mac_bits(src)),
            dst_mac: macs.map(|[_, dst]| mac_bits(dst)),
            proto: u32::from(*proto),
            ports: match l4 {
                FlowL4::Ports { src, dst } => Some(u32::from(*src) << 16 | u32::from(*dst)),
                FlowL4::Other | FlowL4::Icmp { .. } => None,
            },
            icmp: match l4 {
                FlowL4::Icmp { kind, code } => Some(u32::from(*kind) << 8 | u32::from(*code)),
                FlowL4::Other | FlowL4::Ports { .. } => None,
            },
            dscp: dscp.map(u32::from),
            flags: flags.map(u32::from),
            bytes: *bytes,
            packets: *packets,
            sampling: *sampling,
            interfaces: seen,
            direction_plus_one: direction.map_or(0, |direction| u32::from(direction.number()) + 1),
            agent_ip: agent_ip.map(flow_address),
            src_k8s: self.flow_peer(src_k8s.as_deref())?,
            dst_k8s: self.flow_peer(dst_k8s.as_deref())?,
            src_subnet_label: self.number(src_subnet_label)?,
            dst_subnet_label: self.number(dst_subnet_label)?,
            layer: match layer {
                None => 0,
                Some(FlowLayer::App) => 1,
                Some(FlowLayer::Infra) => 2,
            },
            cluster: self.number(cluster)?,
            rtt_ns: *rtt_ns,
            dns,
            drops,
            xlat: xlat.map(|xlat| v1::FlowXlat {
                zone: u32::from(xlat.zone),
                src: Some(flow_address(xlat.src)),
                dst: Some(flow_address(xlat.dst)),
                src_port: u32::from(xlat.src_port),
                dst_port: u32::from(xlat.dst_port),
            }),
            events: told,
            conversation: conversation.map(|conversation| v1::FlowConversation {
                id: conversation.id,
                kind: match conversation.kind {
                    FlowRecordType::Flow => 0,
                    FlowRecordType::New => 1,
                    FlowRecordType::Heartbeat => 2,
                    FlowRecordType::End => 3,
                },
                first: conversation.first,
                totals: conversation.totals.map(|totals| v1::FlowTotals {
                    bytes_ab: totals.bytes_ab,
                    bytes_ba: totals.bytes_ba,
                    packets_ab: totals.packets_ab,
                    packets_ba: totals.packets_ba,
                    flows: totals.flows,
                }),
            }),
        })
    }

    fn flow_peer(&mut self, peer: Option<&FlowPeer>) -> Result<Option<v1::FlowPeer>, EncodeError> {
        let Some(peer) = peer else { return Ok(None) };
        Ok(Some(v1::FlowPeer {
            kind: self.number(&peer.kind)?,
            name: self.number(&peer.name)?,
            namespace: self.number(&peer.namespace)?,
            owner_name: self.number(&peer.owner_name)?,
            owner_kind: self.number(&peer.owner_kind)?,
            host_ip: peer.host_ip.map(flow_address),
            host_name: self.number(&peer.host_name)?,
            zone: self.number(&peer.zone)?,
            network: self.number(&peer.network)?,
        }))
    }
}

fn flow_address(ip: IpAddr) -> v1::FlowAddress {
    let (ip_v4, ip_v6_hi, ip_v6_lo) = address(ip);
    v1::FlowAddress {
        ip_v4,
        ip_v6_hi,
        ip_v6_lo,
    }
}

fn mac_bits([a, b, c, d, e, f]: [u8; 6]) -> u64 {
    u64::from_be_bytes([0, 0, a, b, c, d, e, f])
}

// === impl At ===

impl At<'_> {
    pub(super) fn flowlog(self, wire: v1::FlowLog) -> Result<FlowLog, DecodeError> {
        const PORT: &str = "at most 65535";
        const BYTE: &str = "at most 255";
        let needed = |field, ip: Option<IpAddr>| ip.ok_or_else(|| self.refused(field, 0, "an address"));
        let src = self.address("src", wire.src_v4, wire.src_v6_hi, wire.src_v6_lo)?;
        let dst = self.address("dst", wire.dst_v4, wire.dst_v6_hi, wire.dst_v6_lo)?;
        let mut flow = FlowLog::new(
            needed("src", src)?,
            needed("dst", dst)?,
            self.range("proto", wire.proto, BYTE)?,
            match (wire.ports, wire.icmp) {
                (None, None) => FlowL4::Other,
                (Some(ports), None) => {
                    let [a, b, c, d] = ports.to_be_bytes();
                    FlowL4::Ports {
                        src: u16::from_be_bytes([a, b]),
                        dst: u16::from_be_bytes([c, d]),
                    }
                }
                (None, Some(icmp)) => {
                    let [kind, code] = self.range::<u16>("icmp", icmp, PORT)?.to_be_bytes();
                    FlowL4::Icmp { kind, code }
                }
                (Some(_), Some(icmp)) => return Err(self.refused("icmp", icmp.into(), "none together with ports")),
            },
        );
        flow.start_unix_ms = wire.start_unix_ms;
        flow.end_unix_ms = wire.end_unix_ms;
        flow.etype = self.range("etype", wire.etype, PORT)?;
        flow.macs = match (wire.src_mac, wire.dst_mac) {
            (None, None) => None,
            (src, dst) => Some([self.mac("src_mac", src)?, self.mac("dst_mac", dst)?]),
        };
        flow.dscp = wire.dscp.map(|dscp| self.range("dscp", dscp, BYTE)).transpose()?;
        flow.flags = wire.flags.map(|flags| self.range("flags", flags, PORT)).transpose()?;
        flow.bytes = wire.bytes;
        flow.packets = wire.packets;
        flow.sampling = wire.sampling;
        self.short("interfaces", wire.interfaces.len())?;
        flow.interfaces = self.list(wire.interfaces, |seen| {
            Ok(FlowInterface {
                name: self.text(
                    "interfaces",
                    self.range("interfaces", seen >> 2, "the number of a text")?,
                )?,
                direction: (seen & 3) as u8,
            })
        })?;
        flow.direction = match wire.direction_plus_one {
            0 => None,
            1 => Some(FlowDirection::Ingress),
            2 => Some(FlowDirection::Egress),
            3 => Some(FlowDirection::Inner),
            other => return Err(self.refused("direction_plus_one", other.into(), "at most 3")),
        };
        flow.agent_ip = self.flow_address("agent_ip.ip", wire.agent_ip)?;
        flow.src_k8s = self.flow_peer(wire.src_k8s)?;
        flow.dst_k8s = self.flow_peer(wire.dst_k8s)?;
        flow.src_subnet_label = self.text("src_subnet_label", wire.src_subnet_label)?;
        flow.dst_subnet_label = self.text("dst_subnet_label", wire.dst_subnet_label)?;
        flow.layer = match wire.layer {
            0 => None,
            1 => Some(FlowLayer::App),
            2 => Some(FlowLayer::Infra),
            other => return Err(self.refused("layer", other.into(), "at most 2")),
        };
        flow.cluster = self.text("cluster", wire.cluster)?;
        flow.rtt_ns = wire.rtt_ns;
        if let Some(dns) = wire.dns {
            let answer = FlowDnsAnswer {
                id: self.range("dns.id", dns.id, PORT)?,
                flags: self.range("dns.flags", dns.flags, PORT)?,
                latency_ms: dns.latency_ms,
            };
            flow.dns = Some(FlowDns {
                answer: dns.answered.then_some(answer),
                errno: self.range("dns.errno", dns.errno, BYTE)?,
                name: self.text("dns.name", dns.name)?,
            });
        }
        if let Some(drops) = wire.drops {
            flow.drops = Some(FlowDrops {
                bytes: drops.bytes,
                packets: drops.packets,
                flags: self.range("drops.flags", drops.flags, PORT)?,
                state: self.text("drops.state", drops.state)?,
                cause: self.text("drops.cause", drops.cause)?,
            });
        }
        if let Some(xlat) = wire.xlat {
            flow.xlat = Some(FlowXlat {
                zone: self.range("xlat.zone", xlat.zone, PORT)?,
                src: needed("xlat.src", self.flow_address("xlat.src.ip", xlat.src)?)?,
                dst: needed("xlat.dst", self.flow_address("xlat.dst.ip", xlat.dst)?)?,
                src_port: self.range("xlat.src_port", xlat.src_port, PORT)?,
                dst_port: self.range("xlat.dst_port", xlat.dst_port, PORT)?,
            });
        }
        self.short("events", wire.events.len())?;
        flow.events = self.list(wire.events, |event| {
            self.short("events.values", event.values.len())?;
            let pairs = event.values.chunks(2).map(|pair| match *pair {
                [key, value] => Ok((self.text("events.values", key)?, self.text("events.values", value)?)),
                _ => Err(self.refused("events.values", event.values.len() as u64, "an even number of them")),
            });
            Ok(FlowEvent {
                values: pairs.collect::<Result<_, _>>()?,
            })
        })?;
        if let Some(conversation) = wire.conversation {
            flow.conversation = Some(FlowConversation {
                id: conversation.id,
                kind: match conversation.kind {
                    0 => FlowRecordType::Flow,
                    1 => FlowRecordType::New,
                    2 => FlowRecordType::Heartbeat,
                    3 => FlowRecordType::End,
                    other => return Err(self.refused("conversation.kind", other.into(), "at most 3")),
                },
                first: conversation.first,
                totals: conversation.totals.map(|totals| FlowTotals {
                    bytes_ab: totals.bytes_ab,
                    bytes_ba: totals.bytes_ba,
                    packets_ab: totals.packets_ab,
                    packets_ba: totals.packets_ba,
                    flows: totals.flows,
                }),
            });
        }
        Ok(flow)
    }

    /// An empty list needs no memory of its own.
    fn list<W, R>(self, wire: Vec<W>, decode: impl Fn(W) -> Result<R, DecodeError>) -> Result<Arc<[R]>, DecodeError> {
        if wire.is_empty() {
            return Ok(Arc::default());
        }
        wire.into_iter().map(decode).collect()
    }

    fn short(self, field: &'static str, len: usize) -> Result<(), DecodeError> {
        if len > MAX_LIST {
            return Err(self.refused(field, len as u64, "at most 64 of them"));
        }
        Ok(())
    }

    fn mac(self, field: &'static str, bits: Option<u64>) -> Result<[u8; 6], DecodeError> {
        let bits = bits.ok_or_else(|| self.refused(field, 0, "both MAC addresses or neither"))?;
        match bits.to_be_bytes() {
            [0, 0, mac @ ..] => Ok(mac),
            _ => Err(self.refused(field, bits, "48 bits")),
        }
    }

    fn flow_address(self, field: &'static str, wire: Option<v1::FlowAddress>) -> Result<Option<IpAddr>, DecodeError> {
        wire.map_or(Ok(None), |wire| {
            self.address(field, wire.ip_v4, wire.ip_v6_hi, wire.ip_v6_lo)
        })
    }

    fn flow_peer(self, wire: Option<v1::FlowPeer>) -> Result<Option<Arc<FlowPeer>>, DecodeError> {
        let Some(wire) = wire else { return Ok(None) };
        Ok(Some(Arc::new(FlowPeer {
            kind: self.text("k8s.kind", wire.kind)?,
            name: self.text("k8s.name", wire.name)?,
            namespace: self.text("k8s.namespace", wire.namespace)?,
            owner_name: self.text("k8s.owner_name", wire.owner_name)?,
            owner_kind: self.text("k8s.owner_kind", wire.owner_kind)?,
            host_ip: self.flow_address("k8s.host_ip.ip", wire.host_ip)?,
            host_name: self.text("k8s.host_name", wire.host_name)?,
            zone: self.text("k8s.zone", wire.zone)?,
            network: self.text("k8s.network", wire.network)?,
        })))
    }
}
