//! Events of the ring, checked. No I/O.

use ebpf_common::{
    dns::{EVENT_VERSION, PacketHead, TCP, UDP},
    net::Tuple,
};

/// A piece of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Packet<'a> {
    /// What is told of it.
    pub(super) head: PacketHead,
    /// The captured beginning of its payload.
    pub(super) bytes: &'a [u8],
}

impl<'a> Packet<'a> {
    /// Reads an event; the layout is `ebpf_common::dns`'s. `None` for one of another build.
    pub(super) fn parse(event: &'a [u8]) -> Option<Self> {
        if u16::from_ne_bytes(at(event, 0)?) != EVENT_VERSION {
            return None;
        }
        let head = PacketHead {
            version: EVENT_VERSION,
            captured: u16::from_ne_bytes(at(event, 2)?),
            protocol: at::<1>(event, 4)?[0],
            flags: at::<1>(event, 5)?[0],
            _pad: 0,
            time_ns: u64::from_ne_bytes(at(event, 8)?),
            cgroup: u64::from_ne_bytes(at(event, 16)?),
            length: u32::from_ne_bytes(at(event, 24)?),
            seq: u32::from_ne_bytes(at(event, 28)?),
            tuple: Tuple {
                local: at(event, 32)?,
                remote: at(event, 48)?,
                local_port: u16::from_ne_bytes(at(event, 64)?),
                remote_port: u16::from_ne_bytes(at(event, 66)?),
                netns: u32::from_ne_bytes(at(event, 68)?),
            },
        };
        let whole = u32::from(head.captured) <= head.length && (head.protocol == TCP || head.protocol == UDP);
        let bytes = event
            .get(size_of::<PacketHead>()..)?
            .get(..usize::from(head.captured))?;
        whole.then_some(Self { head, bytes })
    }
}

fn at<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..)?.first_chunk().copied()
}

/// Events copied out of the ring, in its order; the room is used again.
#[derive(Debug, Default)]
pub(super) struct Batch {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Batch {
    /// Events taken at a time.
    const EVENTS: usize = 1024;
    /// Bytes of them.
    const BYTES: usize = 1 << 20;

    /// Forgets all.
    pub(super) fn clear(&mut self) {
        self.bytes.clear();
        self.ends.clear();
    }

    /// Copies an event.
    pub(super) fn push(&mut self, event: &[u8]) {
        // The room of an event is mostly empty.
        let used = Packet::parse(event).map_or(0, |packet| size_of::<PacketHead>() + packet.bytes.len());
        self.bytes.extend_from_slice(event.get(..used).unwrap_or_default());
        self.ends.push(self.bytes.len());
    }

    /// True if there is nothing.
    pub(super) fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// True if there is enough.
    pub(super) fn is_full(&self) -> bool {
        self.ends.len() >= Self::EVENTS || self.bytes.len() >= Self::BYTES
    }

    /// The packets; `None` for an event of another build.
    pub(super) fn packets(&self) -> impl Iterator<Item = Option<Packet<'_>>> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts
            .zip(&self.ends)
            .map(|(start, end)| Packet::parse(self.bytes.get(start..*end)?))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]
    use ebpf_common::dns::{SMALL, flag};

    use super::*;

    fn event(payload: &[u8], length: u32) -> Vec<u8> {
        let mut bytes = [0xee; SMALL];
        bytes[..payload.len()].copy_from_slice(payload);
        let packet = ebpf_common::dns::Packet::<SMALL> {
            head: PacketHead {
                version: EVENT_VERSION,
                captured: payload.len().try_into().unwrap(),
                protocol: UDP,
                flags: flag::EGRESS,
                time_ns: 7,
                cgroup: 8,
                length,
                seq: 9,
                tuple: Tuple {
                    local: [1; 16],
                    remote: [2; 16],
                    local_port: 3,
                    remote_port: 4,
                    netns: 5,
                },
                _pad: 0,
            },
            bytes,
        };
        // SAFETY: the layout has no padding.
        unsafe { std::slice::from_raw_parts((&raw const packet).cast::<u8>(), size_of_val(&packet)) }.to_vec()
    }

    #[test]
    fn reads_what_the_kernel_side_writes() {
        let bytes = event(b"hello", 600);
        let packet = Packet::parse(&bytes).unwrap();
        let head = packet.head;
        assert_eq!((head.time_ns, head.cgroup, head.length, head.seq), (7, 8, 600, 9));
        assert_eq!((head.tuple.local, head.tuple.remote), ([1; 16], [2; 16]));
        let tuple = head.tuple;
        assert_eq!((tuple.local_port, tuple.remote_port, tuple.netns), (3, 4, 5));
        assert_eq!(
            (head.protocol, head.flags, packet.bytes),
            (UDP, flag::EGRESS, &b"hello"[..])
        );
    }

    #[test]
    fn other_layouts_are_refused() {
        let good = event(b"hello", 5);
        for length in 0..size_of::<PacketHead>() + 5 {
            assert_eq!(Packet::parse(&good[..length]), None, "{length}");
        }
        let change = |at: usize, value: u8| {
            let mut bytes = good.clone();
            bytes[at] = value;
            bytes
        };
        // Version, protocol, more captured than there is room for, and than there is.
        for bad in [change(0, 9), change(4, 1), change(3, 1), change(2, 6)] {
            assert_eq!(Packet::parse(&bad), None);
        }
    }

    #[test]
    fn batches_keep_the_order() {
        let events: Vec<Vec<u8>> = [&b"one"[..], b"", b"three"].map(|text| event(text, 9)).into();
        let mut batch = Batch::default();
        events.iter().for_each(|event| batch.push(event));
        let texts: Vec<&[u8]> = batch.packets().map(|packet| packet.unwrap().bytes).collect();
        assert_eq!(texts, [&b"one"[..], b"", b"three"]);
        batch.clear();
        assert!(batch.is_empty());
        batch.push(&[0u8; 256]);
        assert_eq!(batch.packets().collect::<Vec<_>>(), [None]);
        (1..Batch::EVENTS).for_each(|_| batch.push(&events[0]));
        assert!(batch.is_full());
    }
}
