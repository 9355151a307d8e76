//! Conversations: flows of both directions under one id, with their sums. No I/O.
//!
//! ```text
//! a group's flows ▶ [`Conversations::tell`] ▶ the records that are stored in their place, and what is due by now
//! ```
//! A group that cannot be stored comes again: [`Conversations::take_back`] makes it as if it had not come. Of several agents
//! that see a conversation, the sums are those of the first one, until it falls silent.

#[cfg(test)]
mod tests;

use std::{
    collections::{HashMap, hash_map::Entry},
    net::IpAddr,
    sync::Arc,
};

use records::{
    FlowLog, Str,
    flowlog::{FlowConversation, FlowDirection, FlowL4, FlowRecordType, FlowTotals},
};

use super::Delivery;
use crate::config::{ConversationOptions, FlowRecords};

/// How often it is looked for what is due, milliseconds.
const LOOK_MS: u64 = 1000;
/// Flags of TCP in a flow: FIN, RST, and the two with ACK.
const FIN: u16 = 0x01 | 0x200;
const RST: u16 = 0x04 | 0x400;
const SYN: u16 = 0x02;
const SYN_ACK: u16 = 0x100;

/// Both ends, the smaller first, and the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    ends: [(u128, u16); 2],
    proto: u8,
}

#[derive(Clone, Debug)]
struct Conversation {
    /// Its first flow, towards who was called if that can be told. The source is A; names and places are as it says.
    first: Arc<FlowLog>,
    /// Node whose flows are summed.
    reporter: Str,
    reported_at: u64,
    /// Milliseconds of the committer's clock.
    seen_at: u64,
    told_at: u64,
    told: bool,
    start_unix_ms: i64,
    end_unix_ms: i64,
    totals: FlowTotals,
    rtt_ns: u64,
    /// A said FIN, B did.
    finished: [bool; 2],
    reset: bool,
}

/// All conversations that are followed.
pub(crate) struct Conversations {
    options: ConversationOptions,
    known: HashMap<Key, Conversation>,
    /// Conversations as they were before the group under way.
    before: HashMap<Key, Option<Conversation>>,
    looked_at: u64,
    untracked: u64,
    untracked_before: u64,
}

// === impl Conversations ===

impl Conversations {
    pub(crate) fn new(options: ConversationOptions) -> Self {
        Self {
            options,
            known: HashMap::default(),
            before: HashMap::default(),
            looked_at: 0,
            untracked: 0,
            untracked_before: 0,
        }
    }

    /// Other options from now on.
    pub(crate) fn set(&mut self, options: ConversationOptions) {
        self.options = options;
    }

    /// Conversations that are followed.
    pub(crate) fn len(&self) -> usize {
        self.known.len()
    }

    /// Flows since the last time this was asked whose conversations found no room.
    pub(crate) fn take_untracked(&mut self) -> u64 {
        std::mem::take(&mut self.untracked)
    }

    /// Whether something may be due.
    pub(crate) fn is_due(&self, now_ms: u64) -> bool {
        now_ms >= self.looked_at + LOOK_MS && !self.known.is_empty()
    }

    /// What is stored in place of a group's flows.
    pub(crate) fn tell(&mut self, now_ms: u64, deliveries: &[Delivery]) -> Vec<FlowLog> {
        self.before.clear();
        self.untracked_before = self.untracked;
        let mut out = Vec::new();
        for delivery in deliveries {
            for flow in &delivery.batch.flowlog {
                self.take(now_ms, &delivery.id.node, flow, &mut out);
            }
        }
        if self.is_due(now_ms) {
            self.looked_at = now_ms;
            self.look(now_ms, &mut out);
        }
        out
    }

    /// The group was not stored.
    pub(crate) fn take_back(&mut self) {
        for (key, before) in self.before.drain() {
            match before {
                Some(before) => self.known.insert(key, before),
                None => self.known.remove(&key),
            };
        }
        self.untracked = self.untracked_before;
        // What was due still is.
        self.looked_at = 0;
    }

    fn take(&mut self, now_ms: u64, node: &Str, flow: &FlowLog, out: &mut Vec<FlowLog>) {
        let all = self.options.records == FlowRecords::All;
        // What found no room in an agent's table has no ends.
        let nowhere = flow.src.is_unspecified() && flow.dst.is_unspecified();
        let key = key(flow);
        // Times are compared within one node: clocks of several differ by more than a connection may take.
        let again = self.known.get(&key).is_some_and(|known| {
            known.is_over() && known.reporter == *node && has(flow, SYN) && flow.start_unix_ms > known.end_unix_ms
        });
        if again {
            // The same ports, another connection.
            self.end(&key, out);
        }
        let full = self.known.len() >= self.options.max;
        if nowhere || full && !self.known.contains_key(&key) {
            self.untracked += u64::from(full && !nowhere);
            if all {
                out.push(flow.clone());
            }
            return;
        }
        self.remember(&key);
        let quiet = self.options.end_timeout_ms();
        let (known, new) = match self.known.entry(key) {
            Entry::Occupied(known) => (known.into_mut(), false),
            Entry::Vacant(free) => (free.insert(Conversation::new(now_ms, node, flow)), true),
        };
        known.add(now_ms, node, flow, quiet);
        if new && self.options.records != FlowRecords::EndedConversations {
            out.push(known.record(id(&key), FlowRecordType::New));
        }
        if all {
            let mut flow = flow.clone();
            flow.conversation = Some(FlowConversation {
                id: id(&key),
                kind: FlowRecordType::Flow,
                first: false,
                totals: None,
            });
            out.push(flow);
        }
    }

    fn look(&mut self, now_ms: u64, out: &mut Vec<FlowLog>) {
        let options = &self.options;
        let beats = options.records != FlowRecords::EndedConversations;
        let since = |then: u64| now_ms.saturating_sub(then);
        let (mut over, mut alive) = (Vec::new(), Vec::new());
        for (key, known) in &self.known {
            let patience = if known.is_over() {
                options.terminating_timeout_ms()
            } else {
                options.end_timeout_ms()
            };
            if since(known.seen_at) >= patience {
                over.push(*key);
            } else if beats && since(known.told_at) >= options.heartbeat_ms() {
                alive.push(*key);
            }
        }
        for key in over {
            self.end(&key, out);
        }
        for key in alive {
            self.remember(&key);
            if let Some(known) = self.known.get_mut(&key) {
                known.told_at = now_ms;
                out.push(known.record(id(&key), FlowRecordType::Heartbeat));
            }
        }
    }

    fn end(&mut self, key: &Key, out: &mut Vec<FlowLog>) {
        self.remember(key);
        if let Some(mut over) = self.known.remove(key) {
            out.push(over.record(id(key), FlowRecordType::End));
        }
    }

    fn remember(&mut self, key: &Key) {
        if let Entry::Vacant(free) = self.before.entry(*key) {
            free.insert(self.known.get(key).cloned());
        }
    }
}

// === impl Conversation ===

impl Conversation {
    fn new(now_ms: u64, node: &Str, flow: &FlowLog) -> Self {
        Self {
            first: Arc::new(if has(flow, SYN_ACK) { turned(flow) } else { flow.clone() }),
            reporter: node.clone(),
            reported_at: now_ms,
            seen_at: now_ms,
            told_at: now_ms,
            told: false,
            start_unix_ms: flow.start_unix_ms,
            end_unix_ms: flow.end_unix_ms,
            totals: FlowTotals::default(),
            rtt_ns: 0,
            finished: [false; 2],
            reset: false,
        }
    }

    /// Whether both ends have said that it is over.
    fn is_over(&self) -> bool {
        self.reset || self.finished == [true; 2]
    }

    fn add(&mut self, now_ms: u64, node: &Str, flow: &FlowLog, quiet_ms: u64) {
        let backwards = !same_way(&self.first, flow);
        self.seen_at = now_ms;
        self.start_unix_ms = self.start_unix_ms.min(flow.start_unix_ms);
        self.end_unix_ms = self.end_unix_ms.max(flow.end_unix_ms);
        self.rtt_ns = self.rtt_ns.max(flow.rtt_ns);
        self.reset |= has(flow, RST);
        let [a, b] = &mut self.finished;
        *(if backwards { b } else { a }) |= has(flow, FIN);
        if self.reporter != *node {
            if now_ms.saturating_sub(self.reported_at) < quiet_ms {
                return;
            }
            self.reporter = node.clone();
        }
        self.reported_at = now_ms;
        let totals = &mut self.totals;
        let (bytes, packets) = if backwards {
            (&mut totals.bytes_ba, &mut totals.packets_ba)
        } else {
            (&mut totals.bytes_ab, &mut totals.packets_ab)
        };
        *bytes = bytes.saturating_add(flow.bytes);
        *packets = packets.saturating_add(flow.packets);
        totals.flows += 1;
    }

    fn record(&mut self, id: u64, kind: FlowRecordType) -> FlowLog {
        let first = !std::mem::replace(&mut self.told, true);
        let of = &self.first;
        let mut record = FlowLog::new(of.src, of.dst, of.proto, of.l4);
        record.start_unix_ms = self.start_unix_ms;
        record.end_unix_ms = self.end_unix_ms;
        record.bytes = self.totals.bytes_ab.saturating_add(self.totals.bytes_ba);
        record.packets = self.totals.packets_ab.saturating_add(self.totals.packets_ba);
        record.direction = of.direction;
        record.agent_ip = of.agent_ip;
        record.src_k8s.clone_from(&of.src_k8s);
        record.dst_k8s.clone_from(&of.dst_k8s);
        record.src_subnet_label = of.src_subnet_label.clone();
        record.dst_subnet_label = of.dst_subnet_label.clone();
        record.layer = of.layer;
        record.cluster = of.cluster.clone();
        record.rtt_ns = self.rtt_ns;
        record.conversation = Some(FlowConversation {
            id,
            kind,
            first,
            totals: Some(self.totals),
        });
        record
    }
}

/// The ends the other way round: who answers a call was called.
fn turned(flow: &FlowLog) -> FlowLog {
    let mut turned = flow.clone();
    std::mem::swap(&mut turned.src, &mut turned.dst);
    std::mem::swap(&mut turned.src_k8s, &mut turned.dst_k8s);
    std::mem::swap(&mut turned.src_subnet_label, &mut turned.dst_subnet_label);
    if let FlowL4::Ports { src, dst } = &mut turned.l4 {
        std::mem::swap(src, dst);
    }
    turned.direction = flow.direction.map(|direction| match direction {
        FlowDirection::Ingress => FlowDirection::Egress,
        FlowDirection::Egress => FlowDirection::Ingress,
        FlowDirection::Inner => FlowDirection::Inner,
    });
    turned
}

fn has(flow: &FlowLog, flags: u16) -> bool {
    flow.flags.is_some_and(|set| set & flags != 0)
}

fn ends(flow: &FlowLog) -> [(u128, u16); 2] {
    let bits = |ip: IpAddr| match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
        IpAddr::V6(v6) => v6.to_bits(),
    };
    let (src, dst) = match flow.l4 {
        FlowL4::Ports { src, dst } => (src, dst),
        _ => (0, 0),
    };
    [(bits(flow.src), src), (bits(flow.dst), dst)]
}

fn same_way(a: &FlowLog, b: &FlowLog) -> bool {
    ends(a) == ends(b)
}

fn key(flow: &FlowLog) -> Key {
    let mut ends = ends(flow);
    ends.sort_unstable();
    Key {
        ends,
        proto: flow.proto,
    }
}

/// FNV-1a of both ends: a conversation keeps its id when the aggregator is started anew.
fn id(key: &Key) -> u64 {
    let ends = key.ends.iter().flat_map(|(address, port)| {
        let address = address.to_be_bytes();
        address.into_iter().chain(port.to_be_bytes())
    });
    ends.chain([key.proto]).fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
