//! Cuts the records of a flush into pieces that each fit one message.

use std::mem;

use proto::convert::wire_bound;
use records::{Netflow, RecordBatch, Str};

/// One message's worth of records.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) batch: RecordBatch,
    /// Memory it holds, bytes.
    pub(super) bytes: usize,
}

/// Gives the pieces of one batch, in order.
#[derive(Debug)]
pub(super) struct Splitter {
    rest: std::vec::IntoIter<Netflow>,
    /// Did not fit the piece before.
    next: Option<Measured>,
    max_records: usize,
    max_wire: usize,
    /// Records left out because a text is too long for the protocol.
    unsendable: u64,
}

#[derive(Debug)]
struct Measured {
    record: Netflow,
    wire: usize,
}

impl Splitter {
    pub(super) fn new(batch: RecordBatch, max_records: usize, max_wire: usize) -> Self {
        let RecordBatch { netflow } = batch;
        Self {
            rest: netflow.into_iter(),
            next: None,
            max_records,
            max_wire,
            unsendable: 0,
        }
    }

    /// Takes the count of records left out so far.
    pub(super) fn take_unsendable(&mut self) -> u64 {
        mem::take(&mut self.unsendable)
    }

    /// What was not taken yet, as one batch.
    pub(super) fn into_rest(self) -> RecordBatch {
        RecordBatch {
            netflow: self
                .next
                .into_iter()
                .map(|measured| measured.record)
                .chain(self.rest)
                .collect(),
        }
    }

    /// Records not taken yet.
    pub(super) fn remaining(&self) -> usize {
        self.rest.len() + usize::from(self.next.is_some())
    }

    fn measured(&mut self) -> Option<Measured> {
        if let Some(next) = self.next.take() {
            return Some(next);
        }
        loop {
            let record = self.rest.next()?;
            match wire_bound(&record) {
                Some(wire) => return Some(Measured { record, wire }),
                None => self.unsendable += 1,
            }
        }
    }
}

impl Iterator for Splitter {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        let mut netflow = Vec::with_capacity(self.remaining().min(self.max_records));
        let (mut wire, mut texts_and_boxes) = (0, 0);
        while let Some(measured) = self.measured() {
            let full = netflow.len() == self.max_records || wire + measured.wire > self.max_wire;
            if full && !netflow.is_empty() {
                self.next = Some(measured);
                break;
            }
            wire += measured.wire;
            texts_and_boxes += heap_bytes(&measured.record);
            netflow.push(measured.record);
        }
        if netflow.is_empty() {
            return None;
        }
        // A piece cut by size holds fewer records than were made room for.
        netflow.shrink_to_fit();
        let bytes = netflow.len() * size_of::<Netflow>() + texts_and_boxes;
        Some(Piece {
            batch: RecordBatch { netflow },
            bytes,
        })
    }
}

/// Memory of a record outside its own struct. A shared text counts for its part.
fn heap_bytes(record: &Netflow) -> usize {
    let text = |text: &Str| (text.len() + 2 * size_of::<usize>()) / Str::strong_count(text).max(1);
    let k8s = [&record.local_k8s, &record.remote_k8s]
        .into_iter()
        .flatten()
        .map(|k8s| {
            let names = [
                &k8s.namespace,
                &k8s.pod,
                &k8s.service,
                &k8s.workload,
                &k8s.workload_type,
            ];
            size_of_val(k8s.as_ref()) + names.into_iter().map(text).sum::<usize>()
        });
    text(&record.process_name) + text(&record.dst_domain) + k8s.sum::<usize>()
}
