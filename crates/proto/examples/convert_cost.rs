//! What the link costs per record: `cargo run --release -p ec-proto --example convert_cost`.
//!
//! Records as an agent in a cluster sends them: 2,000 per batch, both ends named, names repeating. Best of several runs.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::{
    hint::black_box,
    net::Ipv4Addr,
    sync::Arc,
    time::{Duration, Instant},
};

use ec_proto::{
    convert::{Limits, StreamDecoder, StreamEncoder},
    v1::Batch,
};
use prost::Message as _;
use records::{Direction, Endpoint, Family, K8sEndpoint, Netflow, Port, RecordBatch, Str, Transport};

const RECORDS: u32 = 2_000;
const RUNS: u64 = 200;

fn main() {
    let batch = batch();
    let mut encoder = StreamEncoder::new(Limits::default());
    let mut decoder = StreamDecoder::new(Limits::default());
    // The first batch of a stream carries the texts; the others do not.
    let first = encoder.encode(1, &batch).unwrap();
    let first_bytes = first.encoded_len();
    decoder.decode(first).unwrap();
    let (mut encode, mut decode, mut bytes) = (Duration::MAX, Duration::MAX, Vec::new());
    for seq in 2..RUNS {
        let start = Instant::now();
        bytes = encoder.encode(seq, &batch).unwrap().encode_to_vec();
        encode = encode.min(start.elapsed());
        let start = Instant::now();
        let decoded = decoder
            .decode(Batch::decode(black_box(bytes.as_slice())).unwrap())
            .unwrap();
        decode = decode.min(start.elapsed());
        assert_eq!(decoded.1.len(), batch.len());
    }
    let per_record = |total: Duration| total.as_nanos() / u128::from(RECORDS);
    println!("encode            {:>6} ns per record", per_record(encode));
    println!("decode            {:>6} ns per record", per_record(decode));
    println!("on the wire       {:>6} bytes per record", bytes.len() / batch.len());
    println!("with all texts    {:>6} bytes per record", first_bytes / batch.len());
}

fn batch() -> RecordBatch {
    let pods: Vec<Str> = (0..200).map(|n| format!("checkout-7d9c5b6f4-x{n:04}").into()).collect();
    let pick = |names: &[Str], n: u32| names[usize::try_from(n).unwrap() % names.len()].clone();
    let k8s = |n| {
        Some(Arc::new(K8sEndpoint {
            namespace: "payments".into(),
            pod: pick(&pods, n),
            service: "checkout".into(),
            workload: "checkout".into(),
            workload_type: "deployment".into(),
            labels: Arc::default(),
        }))
    };
    let end = |n, port| Endpoint {
        ip: Ipv4Addr::from_bits(0x0a00_0000 | n).into(),
        port: Port::Number(port),
    };
    let netflow = (0..RECORDS).map(|n| Netflow {
        time_unix_ns: 1_760_000_000_000_000_000,
        local: end(n % 50, 8080),
        remote: end(n, 40_000),
        transport: Transport::Tcp,
        family: Family::V4,
        direction: Direction::Incoming,
        netns: 4_026_532_000,
        pid: 12_345,
        process_name: "checkout".into(),
        dst_nat: None,
        dst_domain: "".into(),
        local_k8s: k8s(n),
        remote_k8s: k8s(n + 7),
        bytes_read: 1_000 + u64::from(n),
        bytes_written: 100_000 + u64::from(n),
        retransmits: 0,
        rtt_us: 350,
        rtt_var_us: 40,
        tcp_closed: 1,
        tcp_established: 1,
        datagrams_read: 0,
        datagrams_written: 0,
    });
    RecordBatch {
        netflow: netflow.collect(),
        ..RecordBatch::default()
    }
}
