//! Cuts the records of a flush into pieces that each fit one message.

use std::{mem, sync::Arc};

use proto::convert::wire_bound;
use records::{AnyRecord, IntoIter, K8sEndpoint, RecordBatch, Str, flowlog::FlowPeer};

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
    rest: IntoIter,
    /// Did not fit the piece before.
    next: Option<Measured>,
    max_records: usize,
    max_wire: usize,
    /// Records left out because a text is too long for the protocol.
    unsendable: u64,
}

#[derive(Debug)]
struct Measured {
    record: AnyRecord,
    wire: usize,
}

impl Splitter {
    pub(super) fn new(batch: RecordBatch, max_records: usize, max_wire: usize) -> Self {
        Self {
            rest: batch.into_iter(),
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
        let Some(measured) = self.next else {
            return self.rest.into_batch();
        };
        let mut rest = RecordBatch::default();
        rest.push(measured.record);
        self.rest.for_each(|record| rest.push(record));
        rest
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
        let mut batch = RecordBatch::default();
        let (mut records, mut wire, mut texts_and_boxes) = (0, 0, 0);
        while let Some(measured) = self.measured() {
            let full = records == self.max_records || wire + measured.wire > self.max_wire;
            if full && records > 0 {
                self.next = Some(measured);
                break;
            }
            wire += measured.wire;
            texts_and_boxes += heap_bytes(&measured.record);
            records += 1;
            batch.push(measured.record);
        }
        if records == 0 {
            return None;
        }
        // Room was made for more.
        batch.shrink_to_fit();
        let bytes = batch.struct_bytes() + texts_and_boxes;
        Some(Piece { batch, bytes })
    }
}

/// Memory of a record outside its own struct. A shared text counts for its part.
fn heap_bytes(record: &AnyRecord) -> usize {
    let text = |text: &Str| (text.len() + 2 * size_of::<usize>()) / Str::strong_count(text).max(1);
    let k8s = |k8s: &Option<Arc<K8sEndpoint>>| {
        k8s.as_deref().map_or(0, |k8s| {
            let names = [
                &k8s.namespace,
                &k8s.pod,
                &k8s.service,
                &k8s.workload,
                &k8s.workload_type,
            ];
            size_of_val(k8s) + names.into_iter().map(text).sum::<usize>()
        })
    };
    match record {
        AnyRecord::Netflow(it) => {
            text(&it.process_name) + text(&it.dst_domain) + k8s(&it.local_k8s) + k8s(&it.remote_k8s)
        }
        AnyRecord::Httpflow(it) => {
            let own = text(&it.method) + text(&it.path) + text(&it.http_version);
            let flow = text(&it.flow.process_name) + text(&it.flow.dst_domain);
            own + flow + k8s(&it.flow.local_k8s) + k8s(&it.flow.remote_k8s)
        }
        AnyRecord::Dnsflow(it) => {
            let question = it.question.as_ref();
            let own = question.map_or(0, |question| text(&question.name) + text(&question.kind));
            let flow = text(&it.flow.process_name) + text(&it.flow.dst_domain);
            own + flow + k8s(&it.flow.local_k8s) + k8s(&it.flow.remote_k8s)
        }
        AnyRecord::Bash(it) => text(&it.user) + text(&it.cmd) + text(&it.message) + k8s(&it.k8s),
        AnyRecord::FlowLog(it) => {
            let peer = |peer: &Option<Arc<FlowPeer>>| {
                peer.as_ref().map_or(0, |peer| {
                    let names = [
                        &peer.name,
                        &peer.namespace,
                        &peer.owner_name,
                        &peer.host_name,
                        &peer.zone,
                    ];
                    let own = size_of::<FlowPeer>() + names.into_iter().map(text).sum::<usize>();
                    own / Arc::strong_count(peer).max(1)
                })
            };
            let drops = it.drops.as_ref();
            let own = drops.map_or(0, |drops| text(&drops.state) + text(&drops.cause));
            let dns = it.dns.as_ref().map_or(0, |dns| text(&dns.name));
            let interfaces = size_of_val(&*it.interfaces) / Arc::strong_count(&it.interfaces).max(1);
            let events = it.events.iter().flat_map(|event| &event.values);
            let events: usize = events.map(|(key, value)| 32 + text(key) + text(value)).sum();
            own + dns + interfaces + events + peer(&it.src_k8s) + peer(&it.dst_k8s)
        }
    }
}
