//! From the kernel's entries, one per interface and direction, to records, one per flow. Pure.
//!
//! The interface that saw a flow first counts it: the same packets pass others. All that saw it are told.

use std::{
    net::IpAddr,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use ahash::RandomState;
use ebpf_common::packets::{FlowKey, FlowValue, OtherKey, OtherValue, flag};
use hashbrown::HashMap;
use records::{
    FlowLog, Str,
    flowlog::{FlowInterface, FlowL4},
};

use super::peers::Peers;
use crate::{capture::ends::ip, ebpf::sys::monotonic_ns};

const TCP: u8 = 6;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
const NONE: u32 = u32::MAX;
/// Seen in and out.
const BOTH: u8 = 3;

/// What names interfaces, and knows the addresses of this machine.
pub(super) trait Place {
    /// Name of an interface.
    fn interface(&self, netns: u32, ifindex: u32) -> Str;
    /// Whether an address is one of this machine's, in any network namespace.
    fn is_here(&self, ip: IpAddr) -> bool;
}

/// What makes entries one flow.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Group {
    src: [u8; 16],
    dst: [u8; 16],
    ports: [u16; 2],
    proto: u8,
    icmp: [u8; 2],
}

/// Namespace and number of an interface, and the direction there.
type Passed = (u32, u32, u8);

struct Entry {
    key: FlowKey,
    value: FlowValue,
    /// The next one of the same flow.
    next: u32,
}

/// Flows that wait to be handed on.
pub(super) struct Flows {
    sampling: u32,
    entries: Vec<Entry>,
    /// First entry of each flow that waits.
    heads: Vec<u32>,
    overflows: Vec<(OtherKey, OtherValue)>,
    /// Interfaces that flows passed, shared by those that passed the same.
    ways: HashMap<Vec<Passed>, Arc<[FlowInterface]>, RandomState>,
    /// Zero of the monotonic clock, nanoseconds since 1970.
    boot: i64,
}

impl Flows {
    pub(super) fn new(sampling: u32) -> Self {
        Self {
            // The format tells of none by 0.
            sampling: if sampling > 1 { sampling } else { 0 },
            entries: Vec::new(),
            heads: Vec::new(),
            overflows: Vec::new(),
            ways: HashMap::default(),
            boot: 0,
        }
    }

    /// An entry of the kernel's table.
    pub(super) fn add(&mut self, key: &FlowKey, value: &FlowValue) {
        self.entries.push(Entry {
            key: *key,
            value: *value,
            next: NONE,
        });
    }

    /// Packets at an interface whose flows found no room.
    pub(super) fn overflow(&mut self, key: &OtherKey, grown: OtherValue) {
        self.overflows.push((*key, grown));
    }

    /// Joins what was added; gives how many flows wait now.
    pub(super) fn join(&mut self) -> u64 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now = i64::try_from(now.as_nanos()).unwrap_or(i64::MAX);
        self.boot = now.saturating_sub_unsigned(monotonic_ns());
        self.ways.clear();
        let mut last: HashMap<Group, u32, RandomState> =
            HashMap::with_capacity_and_hasher(self.entries.len(), RandomState::default());
        self.heads.clear();
        for index in 0..self.entries.len() {
            let Some(group) = self.entries.get(index).map(|entry| group(&entry.key)) else {
                break;
            };
            let number = u32::try_from(index).unwrap_or(NONE);
            match last.insert(group, number) {
                None => self.heads.push(number),
                Some(before) => {
                    if let Some(entry) = self.entries.get_mut(before as usize) {
                        entry.next = number;
                    }
                }
            }
        }
        self.len() as u64
    }

    /// Flows that wait.
    pub(super) fn len(&self) -> usize {
        self.heads.len() + self.overflows.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.heads.is_empty() && self.overflows.is_empty()
    }

    /// Drops all; gives how many.
    pub(super) fn clear(&mut self) -> u64 {
        let count = self.len() as u64;
        self.heads = Vec::new();
        self.entries = Vec::new();
        self.overflows = Vec::new();
        count
    }

    /// At most so many records; gives also how many flows are switched off.
    pub(super) fn take(&mut self, most: usize, place: &impl Place, peers: &mut Peers) -> (Vec<FlowLog>, u64) {
        let mut records = Vec::with_capacity(most.min(self.len()));
        let mut off = 0;
        for _ in 0..most {
            let Some(head) = self.heads.pop() else { break };
            let Some((mut flow, ports)) = self.record(head, place) else {
                continue;
            };
            if peers.name(&mut flow, ports, |ip| place.is_here(ip)) {
                records.push(flow);
            } else {
                off += 1;
            }
        }
        if self.heads.is_empty() {
            self.entries.clear();
            // A burst of flows is not paid for until the next one.
            self.entries.shrink_to(16_384);
            let left = most - records.len().min(most);
            for _ in 0..left {
                let Some((key, grown)) = self.overflows.pop() else {
                    break;
                };
                let mut flow = self.overflow_record(&key, grown, place);
                peers.sign(&mut flow);
                records.push(flow);
            }
        }
        (records, off)
    }

    fn ms(&self, monotonic: u64) -> i64 {
        self.boot.saturating_add_unsigned(monotonic) / 1_000_000
    }

    fn record(&mut self, head: u32, place: &impl Place) -> Option<(FlowLog, [u16; 2])> {
        let chain = Chain {
            entries: &self.entries,
            next: head,
        };
        let mut seen: Vec<&Entry> = chain.collect();
        seen.sort_by_key(|entry| entry.value.first_ns);
        let first = *seen.first()?;
        let at = |key: &FlowKey| (key.netns, key.ifindex, key.direction);
        let (mut bytes, mut packets, mut flags, mut last_ns) = (0, 0, 0u16, 0);
        let mut way: Vec<Passed> = Vec::with_capacity(seen.len());
        for entry in &seen {
            let (key, value) = (&entry.key, &entry.value);
            // In another VLAN of the interface it is counted beside.
            if at(key) == at(&first.key) {
                bytes += value.bytes;
                packets += value.packets;
            }
            for (bit, set) in (0..flag::COUNT).zip(value.flags) {
                flags |= u16::from(set) << bit;
            }
            last_ns = last_ns.max(value.last_ns);
            match way
                .iter_mut()
                .find(|(netns, ifindex, _)| (*netns, *ifindex) == (key.netns, key.ifindex))
            {
                Some((_, _, direction)) if *direction != key.direction => *direction = BOTH,
                Some(_) => {}
                None => way.push(at(key)),
            }
        }
        let (key, value) = (first.key, first.value);
        let ports = [key.src_port, key.dst_port];
        let l4 = match key.proto {
            TCP | 17 | 132 => FlowL4::Ports {
                src: key.src_port,
                dst: key.dst_port,
            },
            ICMP | ICMPV6 => FlowL4::Icmp {
                kind: key.icmp_type,
                code: key.icmp_code,
            },
            _ => FlowL4::Other,
        };
        let mut flow = FlowLog::new(ip(key.src), ip(key.dst), key.proto, l4);
        flow.start_unix_ms = self.ms(value.first_ns);
        flow.end_unix_ms = self.ms(last_ns);
        flow.etype = key.etype;
        flow.macs = Some([value.src_mac, value.dst_mac]);
        flow.dscp = Some(value.dscp);
        flow.flags = (key.proto == TCP).then_some(flags);
        (flow.bytes, flow.packets) = (bytes, packets);
        flow.sampling = self.sampling;
        flow.interfaces = self.way(way, place);
        Some((flow, ports))
    }

    /// Tells what found no room for an interface as a flow without ends.
    fn overflow_record(&mut self, key: &OtherKey, grown: OtherValue, place: &impl Place) -> FlowLog {
        let nobody = ip([0; 16]);
        let mut flow = FlowLog::new(nobody, nobody, 0, FlowL4::Other);
        flow.end_unix_ms = self.ms(monotonic_ns());
        flow.start_unix_ms = flow.end_unix_ms;
        (flow.bytes, flow.packets) = (grown.bytes, grown.packets);
        flow.sampling = self.sampling;
        flow.interfaces = self.way(vec![(key.netns, key.ifindex, key.direction)], place);
        flow
    }

    fn way(&mut self, way: Vec<Passed>, place: &impl Place) -> Arc<[FlowInterface]> {
        if let Some(known) = self.ways.get(&way) {
            return Arc::clone(known);
        }
        let named: Arc<[FlowInterface]> = way
            .iter()
            .map(|(netns, ifindex, direction)| FlowInterface {
                name: place.interface(*netns, *ifindex),
                direction: *direction,
            })
            .collect();
        self.ways.insert(way, Arc::clone(&named));
        named
    }
}

struct Chain<'a> {
    entries: &'a [Entry],
    next: u32,
}

impl<'a> Iterator for Chain<'a> {
    type Item = &'a Entry;

    fn next(&mut self) -> Option<&'a Entry> {
        let entry = self.entries.get(self.next as usize)?;
        self.next = entry.next;
        Some(entry)
    }
}

fn group(key: &FlowKey) -> Group {
    Group {
        src: key.src,
        dst: key.dst,
        ports: [key.src_port, key.dst_port],
        proto: key.proto,
        icmp: [key.icmp_type, key.icmp_code],
    }
}

#[cfg(test)]
mod tests {
    use super::super::peers::FlowLabels;
    use super::*;
    use records::flowlog::FlowDirection;

    struct Here;

    impl Place for Here {
        fn interface(&self, netns: u32, ifindex: u32) -> Str {
            format!("{netns}:{ifindex}").into()
        }

        fn is_here(&self, ip: IpAddr) -> bool {
            ip.to_string().ends_with(".1")
        }
    }

    fn key(last: u8, ifindex: u32, direction: u8) -> FlowKey {
        let mut key = FlowKey {
            proto: TCP,
            ifindex,
            direction,
            src_port: 1000,
            dst_port: 80,
            etype: 0x0800,
            ..FlowKey::default()
        };
        key.src = ebpf_programs::net::mapped([10, 0, 0, 1]);
        key.dst = ebpf_programs::net::mapped([10, 0, 0, last]);
        key
    }

    fn value(first_ns: u64, packets: u64, flags: &[usize]) -> FlowValue {
        let mut value = FlowValue {
            first_ns,
            last_ns: first_ns + 7_000_000,
            packets,
            bytes: packets * 100,
            ..FlowValue::default()
        };
        for bit in flags {
            value.flags[*bit] = 1;
        }
        value
    }

    fn take(flows: &mut Flows) -> Vec<FlowLog> {
        let mut peers = Peers::new(None, &FlowLabels::default());
        let mut records = Vec::new();
        while !flows.is_empty() {
            let (more, off) = flows.take(2, &Here, &mut peers);
            assert_eq!(off, 0);
            records.extend(more);
        }
        records.sort_by_key(|record| record.dst);
        records
    }

    #[test]
    fn the_interface_that_saw_it_first_counts() {
        let mut flows = Flows::new(1);
        let base = 5_000_000_000;
        flows.add(&key(2, 3, 1), &value(base + 20, 9, &[1]));
        flows.add(&key(2, 2, 0), &value(base + 10, 10, &[4]));
        flows.add(&key(2, 2, 1), &value(base + 30, 10, &[4]));
        flows.add(&key(3, 2, 0), &value(base, 1, &[0]));
        assert_eq!(flows.join(), 2);
        let records = take(&mut flows);
        let [joined, alone] = &records[..] else {
            panic!("{records:?}")
        };
        assert_eq!((joined.packets, joined.bytes, joined.flags), (10, 1000, Some(0x12)));
        let way: Vec<(&str, u8)> = joined
            .interfaces
            .iter()
            .map(|interface| (&*interface.name, interface.direction))
            .collect();
        assert_eq!(way, [("0:2", BOTH), ("0:3", 1)]);
        assert_eq!(joined.end_unix_ms - joined.start_unix_ms, 7);
        assert_eq!(joined.direction, Some(FlowDirection::Egress));
        assert_eq!((alone.packets, alone.interfaces.len(), alone.sampling), (1, 1, 0));
    }

    #[test]
    fn what_found_no_room_is_told_by_interface() {
        let mut flows = Flows::new(10);
        let key = OtherKey {
            ifindex: 4,
            direction: 1,
            ..OtherKey::default()
        };
        let grown = OtherValue { bytes: 300, packets: 2 };
        flows.overflow(&key, grown);
        assert_eq!(flows.join(), 1);
        let records = take(&mut flows);
        let [record] = &records[..] else { panic!("{records:?}") };
        assert_eq!((record.bytes, record.packets, record.sampling), (300, 2, 10));
        assert_eq!(
            (&*record.interfaces[0].name, record.interfaces[0].direction),
            ("0:4", 1)
        );
        assert_eq!((record.src.to_string(), record.proto), ("::".to_owned(), 0));
    }
}
