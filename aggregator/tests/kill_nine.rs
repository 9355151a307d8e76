//! The real process, killed with SIGKILL in the middle of traffic while DataWay fails: every record arrives exactly once.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod common;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use common::{assert_exactly, eventually, record, stub};
use proto::{
    PROTOCOL_VERSION,
    convert::{Limits, StreamEncoder},
    v1::{self, client_message, collector_client::CollectorClient, server_message},
};
use records::RecordBatch;
use testkit::dataway::Fault;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

const KILLS: usize = 5;
const BATCH: u32 = 100;
const WINDOW: usize = 8;

/// The aggregator as a child process; killed when dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn free_address() -> SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
}

fn spawn(dir: &Path, listen: SocketAddr, dataway: &str, extra: &[&str]) -> Process {
    let child = Command::new(env!("CARGO_BIN_EXE_aggregator"))
        .env_clear()
        // Not a flag: command lines are visible to everybody.
        .env("ENV_INPUT_EBPF_DATAWAY", dataway)
        .arg(format!("--listen={listen}"))
        .arg(format!("--queue-dir={}", dir.display()))
        .args(["--admin-listen=127.0.0.1:0", "--dataway-timeout=500ms", "--dataway-retry-max=200ms", "--log-level=error"])
        .args(extra)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    Process(child)
}

/// Largest resident size of a process, KiB.
fn peak_rss_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// An agent of few words: keeps every batch until it is acknowledged, sends all of them again on each new stream.
struct Agent {
    unacked: BTreeMap<u64, RecordBatch>,
    next_seq: u64,
    next_record: u32,
}

impl Agent {
    fn fill(&mut self, more: bool) {
        while more && self.unacked.len() < WINDOW {
            let netflow = (self.next_record..self.next_record + BATCH).map(record).collect();
            self.unacked.insert(
                self.next_seq,
                RecordBatch {
                    netflow,
                    ..RecordBatch::default()
                },
            );
            self.next_seq += 1;
            self.next_record += BATCH;
        }
    }

    /// One stream until it breaks or `until` holds.
    async fn stream(&mut self, address: SocketAddr, more: bool, until: &mut dyn FnMut(&Self) -> bool) -> Option<()> {
        let connect = CollectorClient::connect(format!("http://{address}"));
        let mut client = tokio::time::timeout(Duration::from_secs(5), connect).await.ok()?.ok()?;
        let (sender, outgoing) = mpsc::channel(2 * WINDOW);
        let message = |kind| v1::ClientMessage { kind: Some(kind) };
        let hello = v1::Hello {
            protocol_version: PROTOCOL_VERSION,
            node: "node-1".to_owned(),
            boot_id: 77,
            agent_version: "test".to_owned(),
            tags: vec![v1::Tag {
                key: "host".to_owned(),
                value: "node-1".to_owned(),
            }],
        };
        sender.send(message(client_message::Kind::Hello(hello))).await.ok()?;
        let mut incoming = client.stream(ReceiverStream::new(outgoing)).await.ok()?.into_inner();
        let mut encoder = StreamEncoder::new(Limits::default());
        let mut sent = 0;
        loop {
            self.fill(more);
            let new: Vec<u64> = self.unacked.range(sent + 1..).map(|(seq, _)| *seq).collect();
            for seq in new {
                let batch = encoder.encode(seq, &self.unacked[&seq]).unwrap();
                sender.send(message(client_message::Kind::Batch(batch))).await.ok()?;
                sent = seq;
            }
            if until(self) {
                return Some(());
            }
            let answer = tokio::time::timeout(Duration::from_secs(20), incoming.message())
                .await
                .ok()?
                .ok()??;
            match answer.kind? {
                server_message::Kind::Ack(ack) => self.unacked = self.unacked.split_off(&(ack.seq + 1)),
                server_message::Kind::HelloAck(_) => {}
                server_message::Kind::Busy(_) => return None,
                server_message::Kind::Nack(nack) => panic!("refused: {nack:?}"),
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_five_times_while_dataway_fails() {
    let dir = tempfile::tempdir().unwrap();
    let stub = stub().await;
    let listen = free_address();
    let url = stub.url();
    let mut agent = Agent {
        unacked: BTreeMap::new(),
        next_seq: 1,
        next_record: 1,
    };
    let faults = [
        Fault::None,
        Fault::Status {
            status: 503,
            retry_after: None,
        },
        Fault::DropAnswer,
        Fault::Hang { seconds: 30.0 },
        Fault::Close,
        Fault::Status {
            status: 429,
            retry_after: Some(1),
        },
    ];
    let mut peak = 0;
    let deadline = Instant::now() + Duration::from_secs(240);
    for (kill, fault) in faults.iter().take(KILLS).enumerate() {
        let mut process = spawn(dir.path(), listen, &url, &[]);
        stub.set_fault(fault.clone());
        // Enough acknowledged that every part is at work, then killed without warning with a full window under way.
        let goal = agent.next_seq + 40 + 13 * kill as u64;
        while agent.next_seq < goal {
            assert!(Instant::now() < deadline, "no progress in run {kill}");
            if agent
                .stream(listen, true, &mut |agent| agent.next_seq >= goal)
                .await
                .is_none()
            {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        peak = peak.max(peak_rss_kib(process.0.id()));
        process.0.kill().unwrap();
        process.0.wait().unwrap();
    }
    let process = spawn(dir.path(), listen, &url, &[]);
    stub.set_fault(faults[5].clone());
    while !agent.unacked.is_empty() {
        assert!(Instant::now() < deadline, "unacknowledged batches stay");
        if agent
            .stream(listen, false, &mut |agent| agent.unacked.is_empty())
            .await
            .is_none()
        {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    stub.set_fault(Fault::None);
    let wanted = agent.next_record - 1;
    eventually("all arrive", || stub.summary().points >= u64::from(wanted)).await;
    peak = peak.max(peak_rss_kib(process.0.id()));
    drop(process);
    assert_exactly(&stub, 1..agent.next_record);
    let summary = stub.summary();
    println!(
        "{wanted} records, {KILLS} kills, {} bodies, {} repeated and recognised, peak memory {peak} KiB",
        summary.bodies, summary.duplicates
    );
    assert!(peak < 128 * 1024, "peak memory {peak} KiB");
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_ends_in_time_and_what_is_left_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let stub = stub().await;
    stub.set_fault(Fault::Close);
    let listen = free_address();
    let mut process = spawn(dir.path(), listen, &stub.url(), &["--drain-timeout=300ms"]);
    let mut agent = Agent {
        unacked: BTreeMap::new(),
        next_seq: 1,
        next_record: 1,
    };
    let goal = 11;
    let deadline = Instant::now() + Duration::from_secs(60);
    while agent.next_seq < goal || !agent.unacked.is_empty() {
        assert!(Instant::now() < deadline, "no progress");
        let more = agent.next_seq < goal;
        let mut until = |agent: &Agent| {
            if more {
                agent.next_seq >= goal
            } else {
                agent.unacked.is_empty()
            }
        };
        if agent.stream(listen, more, &mut until).await.is_none() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    let pid = i32::try_from(process.0.id()).unwrap();
    // SAFETY: a signal to a child that this test started and has not waited for.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGTERM) }, 0);
    let mut status = None;
    eventually("the process ends", || {
        status = process.0.try_wait().unwrap();
        status.is_some()
    })
    .await;
    assert!(status.unwrap().success(), "{status:?}");
    assert_eq!(stub.summary().points, 0);
    stub.set_fault(Fault::None);
    let _process = spawn(dir.path(), listen, &stub.url(), &[]);
    eventually("the next start delivers", || {
        stub.summary().points == u64::from(agent.next_record - 1)
    })
    .await;
    assert_exactly(&stub, 1..agent.next_record);
}

#[test]
fn bad_options_name_option_and_value_and_end_with_the_usage_status() {
    let dir = tempfile::tempdir().unwrap();
    let run_at = |listen: &str, args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_aggregator"))
            .env_clear()
            .args([listen, "--admin-listen=127.0.0.1:0"])
            .arg(format!("--queue-dir={}", dir.path().display()))
            .args(args)
            .output()
            .unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let run = |args: &[&str]| run_at("--listen=127.0.0.1:0", args);
    let dataway = "--dataway=http://127.0.0.1:9?token=tkn_secret";
    for (args, wanted) in [
        (&[][..], "there is no output"),
        (&[dataway, "--queue-max-size=1"][..], "queue_max_size"),
        (&[dataway, "--dataway-in-flight=0"][..], "sinks.dataway.in_flight: `0`"),
        (&[dataway, "--dataway-gzip-level=12"][..], "gzip_level: `12`"),
        (&["--dataway=ftp://x?token=tkn_secret"][..], "dataway"),
    ] {
        let (code, text) = run(args);
        assert_eq!(code, i32::from(api::EXIT_USAGE), "{args:?}: {text}");
        assert!(
            text.contains(wanted) && !text.contains("tkn_secret"),
            "{args:?}: {text}"
        );
    }
    let (code, text) = run_at("--listen=192.0.2.1:1", &[dataway]);
    assert!(code != 0 && text.contains("192.0.2.1:1"), "{text}");
    let file = dir.path().join("queue.redb");
    std::fs::create_dir(&file).unwrap();
    let (code, text) = run(&[dataway]);
    assert!(code == 1 && text.contains("can write"), "{text}");
}
