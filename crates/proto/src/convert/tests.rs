#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use proptest::{collection::vec, option, prelude::*};
use prost::Message as _;
use records::{
    AnyRecord, Bash, Direction, Dnsflow, Endpoint, Family, Flow, FlowLog, Httpflow, K8sEndpoint, Netflow, Port,
    Question, RecordBatch, Str, Transport,
    flowlog::{
        FlowConversation, FlowDirection, FlowDns, FlowDnsAnswer, FlowDrops, FlowEvent, FlowInterface, FlowL4,
        FlowLayer, FlowPeer, FlowRecordType, FlowTotals, FlowXlat,
    },
};

use super::*;
use crate::limits::MAX_STRING_BYTES;

/// Boxed, as the other parts of a record: value trees nested by value do not fit a test thread's stack.
fn text() -> BoxedStrategy<Str> {
    prop_oneof![
        Just("".into()),
        "[a-c]{1,2}".prop_map(Str::from),
        ".{0,40}".prop_map(Str::from),
        (1..=MAX_STRING_BYTES).prop_map(|len| "x".repeat(len).into()),
    ]
    .boxed()
}

fn ip() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        any::<u32>().prop_map(|bits| Ipv4Addr::from_bits(bits).into()),
        any::<u128>().prop_map(|bits| IpAddr::from(Ipv6Addr::from_bits(bits)).to_canonical()),
        Just(Ipv4Addr::UNSPECIFIED.into()),
        Just(Ipv6Addr::UNSPECIFIED.into()),
    ]
}

fn endpoint() -> impl Strategy<Value = Endpoint> {
    let port = prop_oneof![Just(Port::Any), any::<u16>().prop_map(Port::Number)];
    (ip(), port).prop_map(|(ip, port)| Endpoint { ip, port })
}

fn k8s() -> BoxedStrategy<Option<Arc<K8sEndpoint>>> {
    let names = (text(), text(), text(), text(), text(), vec((text(), text()), 0..3));
    option::of(
        names.prop_map(|(namespace, pod, service, workload, workload_type, labels)| {
            Arc::new(K8sEndpoint {
                labels: labels.into(),
                namespace,
                pod,
                service,
                workload,
                workload_type,
            })
        }),
    )
    .boxed()
}

fn netflow() -> BoxedStrategy<Netflow> {
    let kinds = (any::<bool>(), any::<bool>(), any::<bool>());
    let ends = (endpoint(), endpoint(), option::of((ip(), any::<u16>())));
    let names = (text(), text(), k8s(), k8s());
    (kinds, ends, names, any::<i64>(), any::<(u32, u32)>(), any::<[u64; 9]>())
        .prop_map(
            |(
                (tcp, v4, incoming),
                (local, remote, dst_nat),
                (process_name, dst_domain, local_k8s, remote_k8s),
                t,
                ids,
                n,
            )| {
                Netflow {
                    time_unix_ns: t,
                    local,
                    remote,
                    transport: if tcp { Transport::Tcp } else { Transport::Udp },
                    family: if v4 { Family::V4 } else { Family::V6 },
                    direction: if incoming {
                        Direction::Incoming
                    } else {
                        Direction::Outgoing
                    },
                    netns: ids.0,
                    pid: ids.1,
                    process_name,
                    dst_nat,
                    dst_domain,
                    local_k8s,
                    remote_k8s,
                    bytes_read: n[0],
                    bytes_written: n[1],
                    retransmits: n[2],
                    rtt_us: n[3],
                    rtt_var_us: n[4],
                    tcp_closed: n[5],
                    tcp_established: n[6],
                    datagrams_read: n[7],
                    datagrams_written: n[8],
                }
            },
        )
        .boxed()
}

fn flow() -> BoxedStrategy<Flow> {
    netflow()
        .prop_map(|it| Flow {
            local: it.local,
            remote: it.remote,
            transport: it.transport,
            family: it.family,
            direction: it.direction,
            netns: it.netns,
            pid: it.pid,
            process_name: it.process_name,
            dst_nat: it.dst_nat,
            dst_domain: it.dst_domain,
            local_k8s: it.local_k8s,
            remote_k8s: it.remote_k8s,
        })
        .boxed()
}

fn httpflow() -> BoxedStrategy<Httpflow> {
    let texts = (text(), text(), text());
    let numbers = (any::<u32>(), option::of(any::<u32>()), any::<[u64; 4]>());
    (flow(), texts, numbers, any::<i64>(), any::<bool>())
        .prop_map(
            |(flow, (method, path, http_version), (status_code, grpc_status, n), time_unix_ns, truncated)| Httpflow {
                time_unix_ns,
                flow,
                method,
                path,
                http_version,
                status_code,
                grpc_status,
                truncated,
                count: n[0],
                latency_ns: n[1],
                bytes_read: n[2],
                bytes_written: n[3],
            },
        )
        .boxed()
}

fn dnsflow() -> BoxedStrategy<Dnsflow> {
    let question = option::of((text(), text()).prop_map(|(name, kind)| Question { name, kind }));
    (flow(), question, any::<i64>(), any::<i32>(), any::<[u64; 3]>())
        .prop_map(|(flow, question, time_unix_ns, rcode, n)| Dnsflow {
            time_unix_ns,
            flow,
            question,
            rcode,
            count: n[0],
            latency_ns: n[1],
            latency_max_ns: n[2],
        })
        .boxed()
}

fn bash() -> BoxedStrategy<Bash> {
    // A time within the years that have four digits.
    let time = 0..4_000_000_000_000_000_000_i64;
    (time, any::<u32>(), text(), text(), any::<bool>(), k8s())
        .prop_map(|(time, pid, user, cmd, truncated, k8s)| Bash::new(time, pid, user, cmd, truncated, k8s))
        .boxed()
}

include!("../../../records/tests/common/flowlog.rs");

fn flowlog() -> BoxedStrategy<FlowLog> {
    (vec(any::<u64>(), 97), vec(text(), 7))
        .prop_map(|(numbers, texts)| {
            let (mut numbers, mut texts) = (numbers.into_iter().cycle(), texts.into_iter().cycle());
            flowlog_of(&mut || numbers.next().unwrap(), &mut || texts.next().unwrap())
        })
        .boxed()
}

fn any_record() -> impl Strategy<Value = AnyRecord> {
    prop_oneof![
        netflow().prop_map(AnyRecord::Netflow),
        httpflow().prop_map(AnyRecord::Httpflow),
        dnsflow().prop_map(AnyRecord::Dnsflow),
        bash().prop_map(AnyRecord::Bash),
        flowlog().prop_map(|flow| AnyRecord::FlowLog(Box::new(flow))),
    ]
}

fn batch() -> impl Strategy<Value = RecordBatch> {
    vec(any_record(), 0..8).prop_map(|records| {
        let mut batch = RecordBatch::default();
        records.into_iter().for_each(|record| batch.push(record));
        batch
    })
}

/// The largest record without texts: every integer at its longest.
fn widest() -> Netflow {
    let ip = IpAddr::from(Ipv6Addr::from_bits(u128::MAX));
    Netflow {
        time_unix_ns: -1,
        local: Endpoint {
            ip,
            port: Port::Number(u16::MAX),
        },
        remote: Endpoint {
            ip,
            port: Port::Number(u16::MAX),
        },
        transport: Transport::Udp,
        family: Family::V6,
        direction: Direction::Outgoing,
        netns: u32::MAX,
        pid: u32::MAX,
        process_name: "".into(),
        dst_nat: Some((ip, u16::MAX)),
        dst_domain: "".into(),
        local_k8s: Some(Arc::default()),
        remote_k8s: Some(Arc::default()),
        bytes_read: u64::MAX,
        bytes_written: u64::MAX,
        retransmits: u64::MAX,
        rtt_us: u64::MAX,
        rtt_var_us: u64::MAX,
        tcp_closed: u64::MAX,
        tcp_established: u64::MAX,
        datagrams_read: u64::MAX,
        datagrams_written: u64::MAX,
    }
}

fn named(name: &str) -> RecordBatch {
    RecordBatch {
        netflow: vec![Netflow {
            process_name: name.into(),
            ..widest()
        }],
        ..RecordBatch::default()
    }
}

/// Through the wire bytes, as a peer would get it.
fn carry(batch: v1::Batch) -> v1::Batch {
    v1::Batch::decode(batch.encode_to_vec().as_slice()).unwrap()
}

fn valid() -> v1::Batch {
    StreamEncoder::new(Limits::default())
        .encode(1, &named("nginx"))
        .unwrap()
}

fn refused(change: impl FnOnce(&mut v1::Batch)) -> DecodeError {
    let mut batch = valid();
    change(&mut batch);
    StreamDecoder::new(Limits::default())
        .decode(batch)
        .expect_err("a changed batch must be refused")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn batches_of_one_stream_round_trip(batches in vec(batch(), 1..5)) {
        let mut encoder = StreamEncoder::new(Limits::default());
        let mut decoder = StreamDecoder::new(Limits::default());
        for (seq, batch) in (1..).zip(&batches) {
            let wire = carry(encoder.encode(seq, batch).unwrap());
            prop_assert_eq!(decoder.decode(wire).unwrap(), (seq, batch.clone()));
        }
    }

    #[test]
    fn round_trip_survives_full_dictionaries(batches in vec(vec("[a-z]{1,4}", 0..4), 1..30)) {
        let limits = Limits { max_dictionary_entries: 4, max_dictionary_bytes: 12, ..Limits::default() };
        let mut encoder = StreamEncoder::new(limits);
        let mut decoder = StreamDecoder::new(limits);
        for (seq, names) in (1..).zip(batches) {
            let records = names.iter().map(|name| Netflow { process_name: name.as_str().into(), ..widest() });
            let batch = RecordBatch { netflow: records.collect(), ..RecordBatch::default() };
            match encoder.encode(seq, &batch) {
                Ok(wire) => prop_assert_eq!(decoder.decode(carry(wire)).unwrap().1, batch),
                Err(error) => prop_assert!(false, "{}", error),
            }
        }
    }

    #[test]
    fn wire_bound_is_a_bound(record in any_record()) {
        let bound = wire_bound(&record).unwrap();
        let mut batch = RecordBatch::default();
        batch.push(record);
        let wire = StreamEncoder::new(Limits::default()).encode(u64::MAX, &batch).unwrap();
        // The batch's own fields (seq, reset, first_id, length of strings) are not part of the record.
        prop_assert!(wire.encoded_len() <= bound + 32, "{} > {}", wire.encoded_len(), bound);
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in vec(any::<u8>(), 0..300)) {
        if let Ok(message) = v1::ClientMessage::decode(bytes.as_slice()) {
            exercise(message);
        }
    }

    #[test]
    fn damaged_messages_never_panic(batches in vec(batch(), 1..3), hits in vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let mut encoder = StreamEncoder::new(Limits::default());
        for (seq, batch) in (1..).zip(&batches) {
            let kind = v1::client_message::Kind::Batch(encoder.encode(seq, batch).unwrap());
            let mut bytes = v1::ClientMessage { kind: Some(kind) }.encode_to_vec();
            for (at, value) in &hits {
                let at = at.index(bytes.len());
                bytes[at] = *value;
            }
            if let Ok(message) = v1::ClientMessage::decode(bytes.as_slice()) {
                exercise(message);
            }
        }
    }
}

/// Converts whatever came; only the absence of a panic and the bounds are looked at.
fn exercise(message: v1::ClientMessage) {
    match message.kind {
        Some(v1::client_message::Kind::Hello(hello)) => drop(Hello::try_from(hello)),
        Some(v1::client_message::Kind::Batch(batch)) => {
            let mut decoder = StreamDecoder::new(Limits::default());
            drop(decoder.decode(batch.clone()));
            drop(decoder.skip(batch));
        }
        Some(v1::client_message::Kind::Capabilities(capabilities)) => drop(features_from_wire(capabilities)),
        Some(v1::client_message::Kind::AgentStatus(_) | v1::client_message::Kind::Heartbeat(_)) | None => {}
    }
}

#[test]
fn widest_record_is_within_the_bound() {
    let batch = RecordBatch {
        netflow: vec![widest()],
        ..RecordBatch::default()
    };
    let wire = StreamEncoder::new(Limits::default()).encode(1, &batch).unwrap();
    let record = wire.encoded_len()
        - v1::Batch {
            netflow: Vec::new(),
            ..wire.clone()
        }
        .encoded_len();
    let bound = wire_bound(&AnyRecord::Netflow(widest())).unwrap() - 12 * 4;
    assert!(record <= bound, "{record} > {bound}");
}

#[test]
fn texts_travel_once_per_stream() {
    let mut encoder = StreamEncoder::new(Limits::default());
    let first = encoder.encode(1, &named("nginx")).unwrap();
    assert_eq!(
        first.strings,
        Some(v1::Strings {
            reset: true,
            first_id: 1,
            texts: vec!["nginx".into()]
        })
    );
    assert_eq!(encoder.encode(2, &named("nginx")).unwrap().strings, None);
    let third = encoder.encode(3, &named("redis")).unwrap();
    assert_eq!(
        third.strings,
        Some(v1::Strings {
            reset: false,
            first_id: 2,
            texts: vec!["redis".into()]
        })
    );
}

#[test]
fn decoded_texts_share_memory() {
    let mut decoder = StreamDecoder::new(Limits::default());
    let mut encoder = StreamEncoder::new(Limits::default());
    let (_, one) = decoder.decode(encoder.encode(1, &named("nginx")).unwrap()).unwrap();
    let (_, two) = decoder.decode(encoder.encode(2, &named("nginx")).unwrap()).unwrap();
    assert!(Str::ptr_eq(&one.netflow[0].process_name, &two.netflow[0].process_name));
}

#[test]
fn texts_of_skipped_batches_are_kept() {
    let mut decoder = StreamDecoder::new(Limits::default());
    let mut encoder = StreamEncoder::new(Limits::default());
    assert_eq!(decoder.skip(encoder.encode(1, &named("nginx")).unwrap()), Ok(1));
    let (_, batch) = decoder.decode(encoder.encode(2, &named("nginx")).unwrap()).unwrap();
    assert_eq!(&*batch.netflow[0].process_name, "nginx");
}

#[test]
fn encoder_goes_on_after_a_batch_that_fits_no_stream() {
    let limits = Limits {
        max_string_bytes: 8,
        ..Limits::default()
    };
    let (mut encoder, mut decoder) = (StreamEncoder::new(limits), StreamDecoder::new(limits));
    decoder.decode(encoder.encode(1, &named("one")).unwrap()).unwrap();
    assert_eq!(
        encoder.encode(2, &named("much too long")),
        Err(EncodeError::TextTooLong { len: 13, max: 8 })
    );
    for (seq, name) in [(3, "one"), (4, "two")] {
        let (_, batch) = decoder.decode(encoder.encode(seq, &named(name)).unwrap()).unwrap();
        assert_eq!(batch, named(name));
    }
}

#[test]
fn every_lie_is_named() {
    let cases: Vec<(DecodeError, &str, &str)> = vec![
        (refused(|b| b.seq = 0), "seq", "batch.seq"),
        (
            refused(|b| b.netflow[0].transport = 0),
            "enum",
            "netflow[0].transport is 0",
        ),
        (refused(|b| b.netflow[0].family = 3), "enum", "netflow[0].family is 3"),
        (
            refused(|b| b.netflow[0].direction = -1),
            "enum",
            "netflow[0].direction is -1",
        ),
        (refused(|b| b.netflow[0].local_v6_lo = None), "address", "local_v4"),
        (refused(|b| b.netflow[0].remote_v6_hi = None), "address", "remote_v4"),
        (refused(|b| b.netflow[0].local_v4 = Some(1)), "address", "both"),
        (
            refused(|b| (b.netflow[0].local_v6_lo, b.netflow[0].local_v6_hi) = (None, None)),
            "address",
            "no address",
        ),
        (
            refused(|b| {
                (b.netflow[0].local_v6_hi, b.netflow[0].local_v6_lo) = (Some(0), Some(0xffff_7f00_0001));
            }),
            "address",
            "v4-mapped",
        ),
        (
            refused(|b| (b.netflow[0].nat_v6_lo, b.netflow[0].nat_v6_hi) = (None, None)),
            "address",
            "nat_port without address",
        ),
        (refused(|b| b.netflow[0].nat_port = 65_536), "port", "nat_port is 65536"),
        (
            refused(|b| b.netflow[0].local_port_plus_one = 65_537),
            "port",
            "local_port_plus_one is 65537",
        ),
        (
            refused(|b| b.netflow[0].process_name = 2),
            "unknown_text",
            "process_name is text 2",
        ),
        (
            refused(|b| b.netflow[0].remote_k8s.as_mut().unwrap().pod = u32::MAX),
            "unknown_text",
            "k8s.pod",
        ),
        (
            refused(|b| b.strings.as_mut().unwrap().first_id = 7),
            "text_number",
            "first_id is 7",
        ),
        (
            refused(|b| b.strings.as_mut().unwrap().texts[0].clear()),
            "text_length",
            "texts[0]",
        ),
        (
            refused(|b| b.strings.as_mut().unwrap().texts[0] = "x".repeat(MAX_STRING_BYTES + 1)),
            "text_length",
            "16385 bytes",
        ),
        (
            refused(|b| b.netflow[0].local_k8s.get_or_insert_default().labels = vec![0; 3]),
            "labels",
            "3 numbers",
        ),
        (
            refused(|b| b.netflow[0].local_k8s.get_or_insert_default().labels = vec![0; 130]),
            "labels",
            "up to 128",
        ),
        (
            refused(|b| b.netflow = vec![b.netflow[0].clone(); 2001]),
            "too_many_records",
            "2001",
        ),
        (
            refused(|b| (b.netflow, b.bash) = (vec![b.netflow[0].clone(); 1999], vec![v1::Bash::default(); 2])),
            "too_many_records",
            "2001",
        ),
        (
            refused(|b| b.httpflow = vec![v1::Httpflow::default()]),
            "address",
            "httpflow[0].local_v4",
        ),
        (
            refused(|b| {
                b.dnsflow = vec![v1::Dnsflow {
                    flow: Some(v1::Flow::default()),
                    ..v1::Dnsflow::default()
                }];
            }),
            "address",
            "dnsflow[0].local_v4",
        ),
        (
            refused(|b| {
                b.bash = vec![v1::Bash {
                    cmd: "x".repeat(MAX_STRING_BYTES + 1),
                    ..v1::Bash::default()
                }];
            }),
            "line",
            "bash[0].cmd is 16385 bytes",
        ),
        (
            refused(|b| {
                b.bash = vec![v1::Bash {
                    user: 9,
                    ..v1::Bash::default()
                }];
            }),
            "unknown_text",
            "bash[0].user is text 9",
        ),
        (
            refused(|b| b.strings.as_mut().unwrap().texts = vec!["x".into(); 65_537]),
            "dictionary_full",
            "more than 65536 texts",
        ),
        (
            refused(|b| b.strings.as_mut().unwrap().texts = vec!["x".repeat(MAX_STRING_BYTES); 257]),
            "dictionary_full",
            "4194304 bytes",
        ),
    ];
    for (error, reason, names) in cases {
        assert_eq!(error.reason(), reason, "{error}");
        assert!(error.to_string().contains(names), "`{error}` does not name `{names}`");
    }
}

#[test]
fn hello_round_trips_and_is_checked() {
    let hello = Hello {
        node: "n1".into(),
        boot_id: 7,
        agent_version: "0.1.0".into(),
        globals: std::sync::Arc::new(records::Globals {
            tags: vec![("host".into(), "n1".into())],
        }),
    };
    let wire = v1::Hello::from(&hello);
    assert_eq!(Hello::try_from(wire.clone()), Ok(hello));
    let check = |change: fn(&mut v1::Hello), names: &str| {
        let mut wrong = wire.clone();
        change(&mut wrong);
        let error = Hello::try_from(wrong).expect_err(names).to_string();
        assert!(error.contains(names), "`{error}` does not name `{names}`");
    };
    check(|h| h.protocol_version = 2, "protocol_version is 2");
    check(|h| h.node.clear(), "hello.node");
    check(|h| h.boot_id = 0, "hello.boot_id");
    check(|h| h.tags[0].key.clear(), "hello.tags.key");
    check(|h| h.tags = vec![v1::Tag::default(); 257], "hello.tags");
    check(|h| h.node = "x".repeat(MAX_STRING_BYTES + 1), "hello.node");
}

#[test]
fn limits_below_the_promise_are_refused() {
    let wire = v1::Limits::from(Limits::default());
    assert_eq!(Limits::try_from(wire), Ok(Limits::default()));
    let error = Limits::try_from(v1::Limits {
        max_message_bytes: 1,
        ..wire
    })
    .unwrap_err();
    assert!(error.to_string().contains("max_message_bytes"), "{error}");
    assert!(
        Limits::try_from(v1::Limits {
            max_unacked_batches: 0,
            ..wire
        })
        .is_err()
    );
}
