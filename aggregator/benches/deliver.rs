//! Speed of the whole way: accept, encode, compress, queue on disk, HTTP to a loopback stub that discards.
//!
//! `cargo bench -p ec-aggregator --bench deliver [-- --seconds N --level L --dir DIR]` prints one JSON line per gzip
//! level: points per second by wall clock, CPU time per point (whole process, the stub's own work included), allocations
//! per record, bytes per point.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use aggregator::{
    Aggregator,
    config::{AggregatorConfig, Endpoint, SinkConfig, SinkKind},
    pipeline::{Accept, BatchId, Delivery},
};
use records::{Direction, Family, Globals, Netflow, Port, RecordBatch, Transport};
use telemetry::{Telemetry, alloc_count};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
};
use tokio_util::sync::CancellationToken;

#[global_allocator]
static ALLOCATOR: alloc_count::CountingAllocator = alloc_count::CountingAllocator;

/// Batches under way, as from a few agents.
const CALLERS: u64 = 4;
const BATCH: u32 = 2_000;

fn main() {
    let option = |name: &str| {
        let mut args = std::env::args().skip_while(|arg| arg != name);
        args.nth(1)
    };
    let seconds = option("--seconds").map_or(5, |text| text.parse().unwrap());
    let levels = option("--level").map_or_else(|| vec![0, 1, 2, 6], |text| vec![text.parse().unwrap()]);
    let dir = option("--dir").map_or_else(std::env::temp_dir, PathBuf::from);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    for level in levels {
        let dir = tempfile::tempdir_in(&dir).unwrap();
        runtime.block_on(run(level, Duration::from_secs(seconds), dir.path().to_owned()));
    }
}

async fn run(level: u32, length: Duration, dir: PathBuf) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/?token=tkn_bench", listener.local_addr().unwrap());
    let server = tokio::spawn(async move {
        loop {
            let (socket, _) = listener.accept().await.unwrap();
            tokio::spawn(discard(socket));
        }
    });
    let mut sink = SinkConfig::dataway("bench", Endpoint::parse(&url).unwrap());
    let SinkKind::Dataway(config) = &mut sink.kind else {
        unreachable!()
    };
    config.gzip_level = level;
    let config = AggregatorConfig::new(Some(dir), vec![sink]);
    let telemetry = Telemetry::new("bench", "0");
    let aggregator = Aggregator::start(config, &telemetry, CancellationToken::new())
        .await
        .unwrap();

    // Records are made before the clock starts: making them is the agent's work.
    let batches: Arc<Vec<RecordBatch>> = Arc::new((0..8).map(batch).collect());
    let globals = Arc::new(Globals {
        tags: vec![("host".into(), "node-1".into())],
    });
    let (cpu, allocations, start) = (cpu_seconds(), alloc_count::snapshot(), Instant::now());
    let callers: Vec<_> = (0..CALLERS)
        .map(|caller| {
            let (accept, batches, globals) = (aggregator.accept(), Arc::clone(&batches), Arc::clone(&globals));
            tokio::spawn(async move { feed(caller, &*accept, &batches, globals, start + length).await })
        })
        .collect();
    let mut points = 0;
    for caller in callers {
        points += caller.await.unwrap();
    }
    let left = aggregator.drain(Duration::from_secs(120)).await.left;
    let (wall, cpu) = (start.elapsed().as_secs_f64(), cpu_seconds() - cpu);
    let allocations = alloc_count::snapshot().since(allocations).allocations;
    server.abort();
    assert!(left.is_empty(), "{left:?}");
    let delivered = telemetry.ledger.snapshot()["sink.bench.deliver"].emitted;
    assert_eq!(delivered, points);
    let metrics = telemetry.render_metrics().unwrap();
    let counter = |name: &str| -> f64 {
        let line = metrics.lines().find(|line| line.starts_with(name)).unwrap();
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    let n = points as f64;
    println!(
        "{}",
        serde_json::json!({
            "bench": "deliver",
            "gzip_level": level,
            "points": points,
            "points_per_s": (n / wall).round(),
            "points_per_s_per_core": (n / cpu).round(),
            "cpu_us_per_point": (cpu / n * 1e8).round() / 100.0,
            "allocations_per_record": (allocations as f64 / n * 1e3).round() / 1e3,
            "raw_bytes_per_point": (counter("ebpfcollector_sink_delivered_raw_bytes_total") / n).round(),
            "wire_bytes_per_point": (counter("ebpfcollector_sink_delivered_wire_bytes_total") / n).round(),
        })
    );
}

async fn feed(caller: u64, accept: &dyn Accept, batches: &[RecordBatch], globals: Arc<Globals>, until: Instant) -> u64 {
    let node: records::Str = format!("node-{caller}").into();
    let mut points = 0;
    for seq in 1.. {
        if Instant::now() >= until {
            break;
        }
        let batch = batches[seq as usize % batches.len()].clone();
        points += batch.len() as u64;
        let id = BatchId {
            node: node.clone(),
            boot_id: caller,
            seq,
        };
        accept
            .accept(Delivery {
                id,
                globals: Arc::clone(&globals),
                batch,
            })
            .await
            .unwrap();
    }
    points
}

/// Rows as from a busy node: many peers, ports and counts, few process names.
fn batch(number: u32) -> RecordBatch {
    let names: Vec<records::Str> = ["nginx", "curl", "java", "postgres", "envoy"].map(Into::into).into();
    let mut state = 0x9e37_79b9_7f4a_7c15 ^ u64::from(number);
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut row = |n: u32| {
        let bits = random();
        let [a, b, c, d, e, f, ..] = bits.to_le_bytes();
        Netflow {
            time_unix_ns: 1_700_000_000_000_000_000,
            local: records::Endpoint {
                ip: [10, 0, 0, 5].into(),
                port: Port::Number(u16::from_le_bytes([a, b])),
            },
            remote: records::Endpoint {
                ip: [10, c, d, e].into(),
                port: Port::Number(443),
            },
            transport: if f < 200 { Transport::Tcp } else { Transport::Udp },
            family: Family::V4,
            direction: if a < 128 {
                Direction::Outgoing
            } else {
                Direction::Incoming
            },
            netns: 4_026_531_840,
            pid: 1000 + u32::from(f),
            process_name: names[n as usize % names.len()].clone(),
            dst_nat: None,
            dst_domain: "".into(),
            local_k8s: None,
            remote_k8s: None,
            bytes_read: bits >> 44,
            bytes_written: (bits >> 24) & 0xf_ffff,
            retransmits: u64::from(a == 0),
            rtt_us: 100 + (bits & 0xfff),
            rtt_var_us: bits & 0xff,
            tcp_closed: u64::from(b & 1),
            tcp_established: u64::from(b & 1),
            datagrams_read: 0,
            datagrams_written: 0,
        }
    };
    RecordBatch {
        netflow: (0..BATCH).map(&mut row).collect(),
        ..RecordBatch::default()
    }
}

/// Reads requests and answers 200, looking at nothing but the length.
async fn discard(socket: TcpStream) {
    let mut socket = BufReader::with_capacity(256 << 10, socket);
    let mut line = String::new();
    let mut body = vec![0; 2 << 20];
    loop {
        let mut length = 0;
        loop {
            line.clear();
            match socket.read_line(&mut line).await {
                Ok(2) => break,
                Ok(n) if n > 2 => {}
                _ => return,
            }
            if let Some(text) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = text.trim().parse().unwrap();
            }
        }
        if socket.read_exact(&mut body[..length]).await.is_err() {
            return;
        }
        if socket
            .get_mut()
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            .await
            .is_err()
        {
            return;
        }
    }
}

fn cpu_seconds() -> f64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: `usage` has the room that the call fills.
    assert_eq!(unsafe { libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr()) }, 0);
    // SAFETY: all-zero is a valid `rusage`, and the call succeeded.
    let usage = unsafe { usage.assume_init() };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}
