//! Flow logs as JSON against the documented field table and a plain parser.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, missing_docs)]

use std::{collections::BTreeMap, net::IpAddr};

use ec_records::{
    FlowLog, Str,
    flowlog::{
        Cardinality, FieldSet, FlowConversation, FlowDirection, FlowDns, FlowDnsAnswer, FlowDrops, FlowEvent,
        FlowFormat, FlowInterface, FlowJson, FlowL4, FlowLayer, FlowPeer, FlowRecordType, FlowTotals, FlowType,
        FlowValue, FlowXlat,
        fields::{FIELDS, Field, find},
    },
};
use proptest::{collection::vec, prelude::*};
use serde_json::{Value, json};

include!("common/flowlog.rs");

const RECEIVED: i64 = 1_700_000_002;

fn flow() -> impl Strategy<Value = FlowLog> {
    let text = prop_oneof![
        Just(String::new()),
        "[a-z]{1,8}",
        ".{0,12}",
        Just("a<b>&\u{2028}\u{2029}\u{20ac}\"\\\n\u{1}é".to_owned())
    ];
    (vec(any::<u64>(), 97), vec(text, 7)).prop_map(|(numbers, texts)| {
        let (mut numbers, mut texts) = (numbers.into_iter().cycle(), texts.into_iter().cycle());
        flowlog_of(&mut || numbers.next().unwrap(), &mut || texts.next().unwrap().into())
    })
}

/// Name, type, Loki label and class of the documented fields.
fn documented() -> BTreeMap<&'static str, (&'static str, bool, &'static str)> {
    include_str!("data/netobserv-fields.txt")
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| {
            let [name, ty, _, label, class] = line.split(' ').collect::<Vec<_>>().try_into().unwrap();
            (name, (ty, label == "yes", class))
        })
        .collect()
}

#[test]
fn the_table_has_exactly_the_documented_fields() {
    let documented = documented();
    assert_eq!(documented.len(), 53);
    let table: BTreeMap<_, _> = FIELDS
        .iter()
        .filter_map(|field| {
            let ty = match field.seed? {
                FlowType::Number => "number",
                FlowType::Text => "string",
                FlowType::Bool => "boolean",
                other => panic!("{}: {other:?}", field.name),
            };
            let class = match field.cardinality {
                Cardinality::Fine => "fine",
                Cardinality::Careful => "careful",
                Cardinality::Avoid => "avoid",
            };
            // Became a list of names, and with that more series.
            let class = if field.name == "Flags" { "fine" } else { class };
            Some((field.name, (ty, field.is_label(FlowFormat::Seed), class)))
        })
        .collect();
    assert_eq!(table, documented);
}

#[test]
fn fields_are_sorted_and_found() {
    assert!(FIELDS.is_sorted_by(|a, b| a.name < b.name));
    for (at, field) in FIELDS.iter().enumerate() {
        assert_eq!(find(field.name).unwrap().id, field.id);
        assert_eq!(field.id as usize, at);
    }
    assert!(find("Interface").is_none());
}

fn encoded(json: &FlowJson, flow: &FlowLog) -> String {
    let mut out = b"before".to_vec();
    json.encode_into(flow, RECEIVED, &mut out);
    String::from_utf8(out)
        .unwrap()
        .strip_prefix("before")
        .unwrap()
        .to_owned()
}

/// The object as it should be, written down a second time from the reference.
fn expected(flow: &FlowLog) -> Value {
    let mut out = serde_json::Map::new();
    let mut put = |key: &str, value: Value| {
        let nothing = value.is_null() || value == json!("") || value == json!([]);
        if !nothing {
            out.insert(key.to_owned(), value);
        }
    };
    let nonzero = |n: u64| if n == 0 { Value::Null } else { json!(n) };
    put("AgentIP", json!(flow.agent_ip.map(|ip| ip.to_string())));
    put("Bytes", nonzero(flow.bytes));
    put("Packets", nonzero(flow.packets));
    put("TimeFlowStartMs", json!(flow.start_unix_ms));
    put("TimeFlowEndMs", json!(flow.end_unix_ms));
    put("TimeReceived", json!(RECEIVED));
    put("SrcAddr", json!(flow.src.to_string()));
    put("DstAddr", json!(flow.dst.to_string()));
    if let Some(macs) = flow.macs {
        let text = |mac: [u8; 6]| mac.map(|byte| format!("{byte:02x}")).join(":");
        put("SrcMac", json!(text(macs[0])));
        put("DstMac", json!(text(macs[1])));
    }
    put("Proto", json!(flow.proto));
    match flow.l4 {
        FlowL4::Other => {}
        FlowL4::Ports { src, dst } => {
            put("SrcPort", json!(src));
            put("DstPort", json!(dst));
        }
        FlowL4::Icmp { kind, code } => {
            put("IcmpType", json!(kind));
            put("IcmpCode", json!(code));
        }
    }
    put("Dscp", json!(flow.dscp));
    put("Etype", nonzero(flow.etype.into()));
    put("Sampling", nonzero(flow.sampling.into()));
    put(
        "Interfaces",
        flow.interfaces.iter().map(|seen| seen.name.to_string()).collect(),
    );
    put(
        "IfDirections",
        flow.interfaces.iter().map(|seen| seen.direction).collect(),
    );
    put("FlowDirection", json!(flow.direction.map(FlowDirection::number)));
    for (side, peer) in [("Src", &flow.src_k8s), ("Dst", &flow.dst_k8s)] {
        let Some(peer) = peer else { continue };
        for (key, text) in [
            ("Type", &peer.kind),
            ("Name", &peer.name),
            ("Namespace", &peer.namespace),
            ("OwnerName", &peer.owner_name),
            ("OwnerType", &peer.owner_kind),
            ("HostName", &peer.host_name),
            ("Zone", &peer.zone),
            ("NetworkName", &peer.network),
        ] {
            put(&format!("{side}K8S_{key}"), json!(**text));
        }
        put(
            &format!("{side}K8S_HostIP"),
            json!(peer.host_ip.map(|ip| ip.to_string())),
        );
    }
    put("SrcSubnetLabel", json!(*flow.src_subnet_label));
    put("DstSubnetLabel", json!(*flow.dst_subnet_label));
    put("K8S_ClusterName", json!(*flow.cluster));
    put(
        "K8S_FlowLayer",
        match flow.layer {
            None => Value::Null,
            Some(FlowLayer::App) => json!("app"),
            Some(FlowLayer::Infra) => json!("infra"),
        },
    );
    put("TimeFlowRttNs", nonzero(flow.rtt_ns));
    if let Some(dns) = &flow.dns {
        put("DnsErrno", nonzero(dns.errno.into()));
        put("DnsName", json!(*dns.name));
        if let Some(answer) = dns.answer {
            let names = "NoError FormErr ServFail NXDomain NotImp Refused YXDomain YXRRSet NXRRSet NotAuth NotZone";
            let name = names.split(' ').nth((answer.flags & 15).into()).unwrap_or("UnDefined");
            put("DnsId", json!(answer.id));
            put("DnsFlags", json!(answer.flags));
            put("DnsFlagsResponseCode", json!(name));
            put("DnsLatencyMs", json!(answer.latency_ms));
        }
    }
    if let Some(drops) = &flow.drops {
        put("PktDropBytes", json!(drops.bytes));
        put("PktDropPackets", json!(drops.packets));
        put("PktDropLatestFlags", json!(drops.flags));
        put("PktDropLatestState", json!(*drops.state));
        put("PktDropLatestDropCause", json!(*drops.cause));
    }
    if let Some(xlat) = flow.xlat {
        put("ZoneId", json!(xlat.zone));
        put("XlatSrcAddr", json!(xlat.src.to_string()));
        put("XlatDstAddr", json!(xlat.dst.to_string()));
        put("XlatSrcPort", nonzero(xlat.src_port.into()));
        put("XlatDstPort", nonzero(xlat.dst_port.into()));
    }
    let event = |event: &FlowEvent| -> Value {
        let pairs = event
            .values
            .iter()
            .map(|(key, value)| (key.to_string(), json!(**value)));
        Value::Object(pairs.collect())
    };
    put("NetworkEvents", flow.events.iter().map(event).collect());
    if let Some(conversation) = flow.conversation {
        put("_HashId", json!(format!("{:x}", conversation.id)));
        let kind = match conversation.kind {
            FlowRecordType::Flow => "flowLog",
            FlowRecordType::New => "newConnection",
            FlowRecordType::Heartbeat => "heartbeat",
            FlowRecordType::End => "endConnection",
        };
        put("_RecordType", json!(kind));
        if let Some(totals) = conversation.totals {
            put("_IsFirst", json!(conversation.first));
            put("Bytes_AB", nonzero(totals.bytes_ab));
            put("Bytes_BA", nonzero(totals.bytes_ba));
            put("Packets_AB", nonzero(totals.packets_ab));
            put("Packets_BA", nonzero(totals.packets_ba));
            put("numFlowLogs", nonzero(totals.flows));
        }
    }
    if let Some(flags) = flow.flags {
        let names = "FIN SYN RST PSH ACK URG ECE CWR SYN_ACK FIN_ACK RST_ACK";
        let set: Vec<&str> = names
            .split(' ')
            .enumerate()
            .filter_map(|(bit, name)| (flags >> bit & 1 == 1).then_some(name))
            .collect();
        out.insert(
            "Flags".to_owned(),
            if set.is_empty() { Value::Null } else { json!(set) },
        );
    }
    Value::Object(out)
}

proptest! {
    #[test]
    fn today_s_form_is_what_the_reference_says(flow in flow()) {
        let text = encoded(&FlowJson::new(FlowFormat::Current, FieldSet::NONE), &flow);
        let parsed: Value = serde_json::from_str(&text).unwrap();
        prop_assert_eq!(&parsed, &expected(&flow));
        // Compact, keys sorted by bytes, and nothing that HTML or JavaScript would take apart.
        let again = serde_json::to_string(&parsed).unwrap();
        let again = again.replace('<', "\\u003c").replace('>', "\\u003e").replace('&', "\\u0026");
        let again = again.replace('\u{2028}', "\\u2028").replace('\u{2029}', "\\u2029");
        prop_assert_eq!(text.len() >= again.len(), true);
        let clean = !text.contains(['<', '>', '&', '\n', '\u{2028}', '\u{2029}']);
        prop_assert!(clean);
        let keys: Vec<usize> = parsed.as_object().unwrap().keys().map(|key| text.find(&format!("\"{key}\":")).unwrap()).collect();
        prop_assert!(keys.is_sorted());
    }

    #[test]
    fn the_documented_form_has_the_documented_types(flow in flow()) {
        let documented = documented();
        let text = encoded(&FlowJson::new(FlowFormat::Seed, FieldSet::NONE), &flow);
        let parsed: Value = serde_json::from_str(&text).unwrap();
        let now = expected(&flow);
        for (key, value) in parsed.as_object().unwrap() {
            let (ty, ..) = documented[key.as_str()];
            let right = match ty {
                "number" => value.is_number(),
                "string" => value.is_string(),
                _ => value.is_boolean(),
            };
            prop_assert!(right, "{}: {}", key, value);
            match key.as_str() {
                "Duplicate" => prop_assert_eq!(value, &json!(false)),
                "Flags" => prop_assert_eq!(value, &json!(flow.flags.unwrap())),
                "Interfaces" | "IfDirections" => prop_assert_eq!(value, &now[key][0]),
                _ => prop_assert_eq!(value, &now[key]),
            }
        }
        for key in now.as_object().unwrap().keys().filter(|key| documented.contains_key(key.as_str())) {
            prop_assert!(parsed.get(key).is_some(), "{}", key);
        }
    }

    #[test]
    fn fields_can_be_left_out(flow in flow(), at in 0..FIELDS.len()) {
        let field = &FIELDS[at];
        let text = encoded(&FlowJson::new(FlowFormat::Current, FieldSet::NONE.with(field.id)), &flow);
        let mut wanted = expected(&flow);
        wanted.as_object_mut().unwrap().remove(field.name);
        prop_assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), wanted);
    }

    #[test]
    fn labels_are_the_texts_of_the_values(flow in flow()) {
        let object = expected(&flow);
        for field in FIELDS {
            let mut out = Vec::new();
            let value = flow.value(field.id, RECEIVED);
            value.plain(&mut out);
            let label = String::from_utf8(out).unwrap();
            match &object[field.name] {
                Value::Null if field.id == Field::Duplicate => prop_assert_eq!(label, "false"),
                Value::Null => prop_assert_eq!(label, "", "{}", field.name),
                Value::String(text) => prop_assert_eq!(&label, text),
                Value::Number(number) => {
                    prop_assert_eq!(&label, &number.to_string());
                    prop_assert_eq!(value.number(), number.as_f64());
                }
                Value::Bool(value) => prop_assert_eq!(label, value.to_string()),
                Value::Array(list) if field.id != Field::NetworkEvents => {
                    let items: Vec<String> = list.iter().map(|item| item.as_str().map_or_else(|| item.to_string(), str::to_owned)).collect();
                    prop_assert_eq!(label, items.join(","));
                }
                _ => prop_assert!(matches!(value, FlowValue::Events(_))),
            }
        }
    }
}
