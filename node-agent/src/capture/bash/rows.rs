//! Lines until they are handed on, bounded.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use records::{Bash, RecordBatch, Str};

use super::{events::Line, metrics::Ledger};
use crate::{
    capture::whose::{Policy, Whose},
    ebpf::sys::monotonic_ns,
    identity::cgroup::Uid,
};

/// Lines kept at most.
const ROWS_MAX: usize = 16_384;
/// Bytes of lines kept at most.
const BYTES_MAX: usize = 16 << 20;
/// Lines handed on in one batch.
const PER_BATCH: usize = 1024;

/// Lines that wait.
#[derive(Debug, Default)]
pub(super) struct Rows {
    rows: VecDeque<Row>,
    bytes: usize,
}

#[derive(Debug)]
struct Row {
    pid: u32,
    user: Str,
    pod: Option<Uid>,
    line: Line,
}

impl Rows {
    /// Adds a line; false if there is no room.
    pub(super) fn add(&mut self, pid: u32, user: Str, pod: Option<Uid>, line: Line) -> bool {
        if self.rows.len() >= ROWS_MAX || self.bytes + line.text.len() > BYTES_MAX {
            return false;
        }
        self.bytes += line.text.len();
        self.rows.push_back(Row { pid, user, pod, line });
        true
    }

    /// Drops all; gives how many.
    pub(super) fn clear(&mut self) -> u64 {
        let count = self.rows.len() as u64;
        (self.rows, self.bytes) = (VecDeque::new(), 0);
        count
    }

    /// Makes records and hands them on with `send`, which gives back what there is no room for; true if all are gone.
    /// A pod may have become known, and its namespace found to be off, since a line came.
    pub(super) fn flush(
        &mut self,
        policy: &Policy,
        ledger: &mut Ledger,
        mut send: impl FnMut(RecordBatch) -> Result<(), RecordBatch>,
    ) -> bool {
        while !self.rows.is_empty() {
            let count = self.rows.len().min(PER_BATCH);
            let (mut off, mut other_node, mut emitted) = (0, 0, 0);
            let mut batch = RecordBatch::default();
            for row in self.rows.iter().take(count) {
                match policy.of(row.pod) {
                    Whose::Off => off += 1,
                    Whose::OtherNode => other_node += 1,
                    Whose::On => {
                        emitted += 1;
                        batch.bash.push(record(row, policy));
                    }
                }
            }
            if emitted > 0 && send(batch).is_err() {
                return false;
            }
            ledger.skipped("off", off);
            ledger.skipped("other_node", other_node);
            ledger.emitted(emitted);
            for row in self.rows.drain(..count) {
                self.bytes -= row.line.text.len();
            }
        }
        true
    }
}

fn record(row: &Row, policy: &Policy) -> Bash {
    let time = unix_ns(row.line.time_ns);
    Bash::new(
        time,
        row.pid,
        Arc::clone(&row.user),
        row.line.text.as_str().into(),
        row.line.cut,
        policy.name(row.pod, time),
    )
}

/// Nanoseconds since 1970 of a monotonic time.
fn unix_ns(monotonic: u64) -> i64 {
    let ago = monotonic_ns().saturating_sub(monotonic);
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_nanos();
    i64::try_from(now.saturating_sub(ago.into())).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use telemetry::Telemetry;

    use super::*;

    fn line(text: &str) -> Line {
        Line {
            text: text.to_owned(),
            time_ns: monotonic_ns(),
            ..Line::default()
        }
    }

    #[test]
    fn what_finds_no_room_stays_and_is_sent_in_order() {
        let telemetry = Telemetry::new("test", "0");
        let (policy, mut ledger) = (
            Policy::new(None, |_| true),
            Ledger::new(telemetry.ledger.stage("agent.bash")),
        );
        let mut rows = Rows::default();
        for n in 0..3000 {
            assert!(rows.add(1, "ann".into(), None, line(&n.to_string())));
        }
        let mut sent = Vec::new();
        let mut room = 1;
        let done = rows.flush(&policy, &mut ledger, |batch| {
            if room == 0 {
                return Err(batch);
            }
            room -= 1;
            sent.extend(batch.bash.iter().map(|row| row.cmd.to_string()));
            Ok(())
        });
        assert!(!done && sent.len() == PER_BATCH);
        let done = rows.flush(&policy, &mut ledger, |batch| {
            sent.extend(batch.bash.iter().map(|row| row.cmd.to_string()));
            Ok(())
        });
        assert!(done && rows.bytes == 0);
        assert_eq!(sent, (0..3000).map(|n: u32| n.to_string()).collect::<Vec<_>>());
    }

    #[test]
    fn room_is_bounded_by_number_and_by_bytes() {
        let mut rows = Rows::default();
        let added = (0..ROWS_MAX + 5)
            .filter(|_| rows.add(1, "ann".into(), None, line("x")))
            .count();
        assert_eq!(added, ROWS_MAX);
        assert_eq!(rows.clear(), ROWS_MAX as u64);
        let long = "x".repeat(4095);
        let added = (0..ROWS_MAX)
            .filter(|_| rows.add(1, "ann".into(), None, line(&long)))
            .count();
        assert_eq!(added, BYTES_MAX / 4095);
    }
}
