//! A full disk, on a small file system of its own: batches are refused, nothing is lost, and it recovers.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use aggregator::pipeline::{Accept, AcceptError};
use common::{assert_exactly, assert_ledger_closes, config, dataway, delivery, eventually, start, stub};
use testkit::dataway::Fault;

/// A mounted tmpfs; unmounted when dropped.
struct Disk {
    dir: tempfile::TempDir,
}

impl Disk {
    /// `None`, with the reason printed, where it cannot be mounted.
    fn mount(size: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(dir.path())
            .output();
        match mounted {
            Ok(output) if output.status.success() => Some(Self { dir }),
            Ok(output) => {
                println!(
                    "SKIPPED: mounting needs root: {}",
                    String::from_utf8_lossy(&output.stderr).trim()
                );
                None
            }
            Err(error) => {
                println!("SKIPPED: `mount` cannot be run: {error}");
                None
            }
        }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Takes all free room.
    fn fill(&self) -> PathBuf {
        let path = self.path().join("ballast");
        let mut file = fs::File::create(&path).unwrap();
        let chunk = vec![1; 64 << 10];
        while std::io::Write::write_all(&mut file, &chunk).is_ok() {}
        let last = [1; 512];
        while std::io::Write::write_all(&mut file, &last).is_ok() {}
        path
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.dir.path()).status();
    }
}

async fn until_full(accept: &dyn Accept, seq: &mut u64) -> AcceptError {
    loop {
        let first = *seq as u32 * 100;
        match accept.accept(delivery(1, *seq, first..first + 100)).await {
            Ok(_) => *seq += 1,
            Err(error) => return error,
        }
        assert!(*seq < 2000, "the disk never gets full");
    }
}

async fn until_taken(accept: &dyn Accept, seq: &mut u64) {
    let first = *seq as u32 * 100;
    for _ in 0..600 {
        if accept.accept(delivery(1, *seq, first..first + 100)).await.is_ok() {
            *seq += 1;
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("no room again within a minute");
}

/// `min_free` bytes are to stay free; 0 lets the writes themselves fail.
async fn fills_and_recovers(min_free: u64) {
    let Some(disk) = Disk::mount("8m") else { return };
    let stub = stub().await;
    stub.set_fault(Fault::Status {
        status: 503,
        retry_after: None,
    });
    let sink = dataway("main", &stub.url(), |d| d.gzip_level = 0);
    let mut config = config(disk.path(), vec![sink]);
    config.min_free_disk = min_free;
    let (aggregator, telemetry) = start(config).await;
    let accept = aggregator.accept();
    let mut seq = 1;
    until_taken(&*accept, &mut seq).await;
    let ballast = disk.fill();
    let error = until_full(&*accept, &mut seq).await;
    println!("min_free {min_free}: after {seq} batches: {error}");
    if min_free > 0 {
        assert!(matches!(error, AcceptError::Full { .. }), "{error}");
    }
    // Still refused, still alive, and what is queued can still be delivered from a full disk or once there is room.
    for _ in 0..5 {
        let first = seq as u32 * 100;
        assert!(accept.accept(delivery(1, seq, first..first + 100)).await.is_err());
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    fs::remove_file(ballast).unwrap();
    until_taken(&*accept, &mut seq).await;
    // Full a second time, by the queue itself.
    let error = until_full(&*accept, &mut seq).await;
    println!("min_free {min_free}: after {seq} batches: {error}");
    stub.set_fault(Fault::None);
    until_taken(&*accept, &mut seq).await;
    eventually("the queue drains", || aggregator.statuses()[0].backlog_points == 0).await;
    aggregator.drain(Duration::from_secs(60)).await;
    assert_exactly(&stub, 100..seq as u32 * 100);
    assert_ledger_closes(&telemetry);
}

#[tokio::test(flavor = "multi_thread")]
async fn refuses_below_the_free_bytes_to_keep() {
    fills_and_recovers(1 << 20).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn survives_writes_that_fail() {
    fills_and_recovers(0).await;
}
