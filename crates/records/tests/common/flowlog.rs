// A flow log made of numbers and texts that a test draws.

/// Takes what it needs from `number` and `text`; every part is absent sometimes.
fn flowlog_of(number: &mut dyn FnMut() -> u64, text: &mut dyn FnMut() -> Str) -> FlowLog {
    fn ip(number: &mut dyn FnMut() -> u64) -> IpAddr {
        let (kind, hi, lo) = (number(), number(), number());
        if kind % 2 == 0 {
            std::net::Ipv4Addr::from_bits(lo as u32).into()
        } else {
            IpAddr::from(std::net::Ipv6Addr::from_bits(u128::from(hi) << 64 | u128::from(lo))).to_canonical()
        }
    }
    fn peer(number: &mut dyn FnMut() -> u64, text: &mut dyn FnMut() -> Str) -> Option<std::sync::Arc<FlowPeer>> {
        if number().is_multiple_of(4) {
            return None;
        }
        Some(std::sync::Arc::new(FlowPeer {
            kind: text(),
            name: text(),
            namespace: text(),
            owner_name: text(),
            owner_kind: text(),
            host_ip: (!number().is_multiple_of(3)).then(|| ip(number)),
            host_name: text(),
            zone: text(),
            network: text(),
        }))
    }
    let l4 = match number() % 3 {
        0 => FlowL4::Other,
        1 => FlowL4::Ports {
            src: number() as u16,
            dst: number() as u16,
        },
        _ => FlowL4::Icmp {
            kind: number() as u8,
            code: number() as u8,
        },
    };
    let mut flow = FlowLog::new(ip(number), ip(number), number() as u8, l4);
    let mut yes = |odds: u64| !number().is_multiple_of(odds);
    let [macs, dscp, flags, agent, dns, answer, drops, xlat, conversation, totals, first] = [(); 11].map(|()| yes(3));
    flow.start_unix_ms = number() as i64;
    flow.end_unix_ms = number() as i64;
    flow.etype = number() as u16;
    flow.macs = macs.then(|| [(); 2].map(|()| number().to_le_bytes()).map(|[a, b, c, d, e, f, ..]| [a, b, c, d, e, f]));
    flow.dscp = dscp.then(|| number() as u8);
    flow.flags = flags.then(|| number() as u16 & 0x7ff);
    flow.bytes = number() % 3 * (number() / 3);
    flow.packets = number() % 3 * (number() / 3);
    flow.sampling = number() as u32 % 3;
    flow.interfaces = (0..number() % 4)
        .map(|_| FlowInterface {
            name: text(),
            direction: [0, 1, 3][number() as usize % 3],
        })
        .collect();
    flow.direction = [
        None,
        Some(FlowDirection::Ingress),
        Some(FlowDirection::Egress),
        Some(FlowDirection::Inner),
    ][number() as usize % 4];
    flow.agent_ip = agent.then(|| ip(number));
    flow.src_k8s = peer(number, text);
    flow.dst_k8s = peer(number, text);
    flow.src_subnet_label = text();
    flow.dst_subnet_label = text();
    flow.layer = [None, Some(FlowLayer::App), Some(FlowLayer::Infra)][number() as usize % 3];
    flow.cluster = text();
    flow.rtt_ns = number() % 3 * (number() / 3);
    flow.dns = dns.then(|| FlowDns {
        answer: answer.then(|| FlowDnsAnswer {
            id: number() as u16,
            flags: number() as u16,
            latency_ms: number(),
        }),
        errno: number() as u8 % 3,
        name: text(),
    });
    flow.drops = drops.then(|| FlowDrops {
        bytes: number(),
        packets: number(),
        flags: number() as u16,
        state: text(),
        cause: text(),
    });
    flow.xlat = xlat.then(|| FlowXlat {
        zone: number() as u16,
        src: ip(number),
        dst: ip(number),
        src_port: number() as u16 % 3,
        dst_port: number() as u16 % 3,
    });
    flow.events = (0..number() % 3)
        .map(|_| FlowEvent {
            values: vec![("Feature".into(), text()), ("Action".into(), text())],
        })
        .collect();
    flow.conversation = conversation.then(|| FlowConversation {
        id: number(),
        kind: [
            FlowRecordType::Flow,
            FlowRecordType::New,
            FlowRecordType::Heartbeat,
            FlowRecordType::End,
        ][number() as usize % 4],
        first,
        totals: totals.then(|| FlowTotals {
            bytes_ab: number(),
            bytes_ba: number() % 2,
            packets_ab: number(),
            packets_ba: number(),
            flows: number() % 9,
        }),
    });
    flow
}
