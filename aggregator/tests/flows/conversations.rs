//! Conversations of all endings: what a sink gets is counted against what was put in.

use std::{collections::HashMap, net::Ipv4Addr, time::Duration};

use aggregator::config::{ConversationOptions, FlowRecords, SinkConfig, TextFormat};
use records::{
    FlowLog,
    flowlog::{FlowL4, TCP},
};
use serde_json::Value;

use super::{DRAIN, delivery};
use crate::common::{assert_ledger_closes, config, eventually, start};

const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
const CONNECTIONS: u16 = 1000;

/// Bytes of each flow are its port's, so that sums tell what was summed.
fn flow(port: u16, back: bool, proto: u8, flags: u16) -> FlowLog {
    let (mut ends, mut ports) = ([CLIENT, SERVER], [port, 443]);
    if back {
        ends.reverse();
        ports.reverse();
    }
    let [src, dst] = ports;
    let mut flow = FlowLog::new(ends[0].into(), ends[1].into(), proto, FlowL4::Ports { src, dst });
    (flow.bytes, flow.packets) = (u64::from(port) * (1 + u64::from(back)), 1);
    flow.flags = (proto == TCP).then_some(flags);
    flow
}

/// Flows of a connection in the first and the second drain: closed by both, reset, half closed, silent, of UDP.
fn flows(port: u16) -> [Vec<FlowLog>; 2] {
    match port % 5 {
        0 => [
            vec![flow(port, false, TCP, 0x02), flow(port, true, TCP, 0x100)],
            vec![flow(port, true, TCP, 0x200), flow(port, false, TCP, 0x200)],
        ],
        1 => [
            vec![flow(port, false, TCP, 0x02), flow(port, true, TCP, 0x100)],
            vec![flow(port, true, TCP, 0x400)],
        ],
        2 => [vec![flow(port, false, TCP, 0x203)], vec![flow(port, true, TCP, 0x10)]],
        3 => [vec![flow(port, false, TCP, 0x02)], vec![]],
        _ => [vec![flow(port, true, 17, 0)], vec![flow(port, false, 17, 0)]],
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_conversation_begins_and_ends_once_with_its_sums() {
    let dir = tempfile::tempdir().unwrap();
    let told = dir.path().join("told");
    let mut config = config(dir.path(), vec![SinkConfig::file(told.clone(), TextFormat::Json)]);
    let second = Duration::from_secs(1);
    config.conversations = Some(ConversationOptions {
        records: FlowRecords::Conversations,
        heartbeat: 60 * second,
        end_timeout: 3 * second,
        terminating_timeout: second,
        max: 5000,
    });
    let (aggregator, telemetry) = start(config).await;
    let accept = aggregator.accept();
    for (seq, drain) in (1..).zip(0..2) {
        let mut batch = delivery(seq, 0..0);
        batch.batch.flowlog = (1..=CONNECTIONS).flat_map(|port| flows(port)[drain].clone()).collect();
        accept.accept(batch.clone()).await.unwrap();
        // A repeat is no more traffic.
        accept.accept(batch).await.unwrap();
    }
    let lines = || -> Vec<Value> {
        let text = std::fs::read_to_string(&told).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let of_kind = |kind: &str| -> Vec<Value> {
        let mut lines = lines();
        lines.retain(|line| line["_RecordType"] == kind);
        lines
    };
    eventually("all are over", || {
        of_kind("endConnection").len() >= usize::from(CONNECTIONS)
    })
    .await;
    tokio::time::sleep(2 * second).await;
    assert_eq!(lines().len(), 2 * usize::from(CONNECTIONS));
    let by_port = |lines: Vec<Value>| -> HashMap<u16, Value> {
        let port = |line: &Value| {
            let ports = [&line["SrcPort"], &line["DstPort"]].map(|port| port.as_u64().unwrap());
            u16::try_from(ports.into_iter().find(|port| *port != 443).unwrap_or(443)).unwrap()
        };
        lines.into_iter().map(|line| (port(&line), line)).collect()
    };
    let (begun, ended) = (by_port(of_kind("newConnection")), by_port(of_kind("endConnection")));
    assert_eq!((begun.len(), ended.len()), (1000, 1000));
    let mut ids = std::collections::HashSet::new();
    for port in 1..=CONNECTIONS {
        let (begun, ended) = (&begun[&port], &ended[&port]);
        assert!(
            begun["_IsFirst"] == true && ended["_IsFirst"] == false,
            "{begun} {ended}"
        );
        assert_eq!(begun["_HashId"], ended["_HashId"]);
        assert!(ids.insert(begun["_HashId"].as_str().unwrap().to_owned()), "{begun}");
        // A is who was seen first.
        let all: Vec<FlowLog> = flows(port).concat();
        let sum = |of: &str| -> [u64; 2] {
            let mut sums = [0, 0];
            for flow in &all {
                let back = usize::from(flow.src != all[0].src);
                sums[back] += if of == "Bytes" { flow.bytes } else { flow.packets };
            }
            sums
        };
        for of in ["Bytes", "Packets"] {
            let number = |name: String| ended[name].as_u64().unwrap_or(0);
            assert_eq!(
                [number(format!("{of}_AB")), number(format!("{of}_BA"))],
                sum(of),
                "{ended}"
            );
            assert_eq!(number(of.to_owned()), sum(of).iter().sum::<u64>(), "{ended}");
        }
        assert_eq!(ended["numFlowLogs"], all.len(), "{ended}");
        assert_eq!(ended["SrcAddr"], all[0].src.to_string(), "{ended}");
    }
    let metrics = telemetry.render_metrics().unwrap();
    assert!(
        metrics
            .lines()
            .any(|line| line == "ebpfcollector_pipeline_conversations 0"),
        "{metrics}"
    );
    aggregator.drain(DRAIN).await;
    assert_ledger_closes(&telemetry);
}
