//! What a frame is: from its bytes to a flow's key. Pure; reads nothing but what [`Frame`] gives.
//!
//! Ethernet, VLAN tags, IPv4 with options, IPv6 with extension headers, fragments; TCP, UDP, SCTP, ICMP. Entry: [`parse`].

use ebpf_common::packets::{FlowKey, flag};

use crate::net::mapped;

const ETHERNET: u32 = 14;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;
const SCTP: u8 = 132;
/// VLAN tags looked through.
const TAGS: usize = 2;
/// IPv6 extension headers looked through.
const EXTENSIONS: usize = 6;

/// Bytes of a frame.
pub trait Frame {
    /// `N` bytes from an offset on; `None` if it has not as many.
    fn load<const N: usize>(&self, at: u32) -> Option<[u8; N]>;
}

/// What is known of a frame without its bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outside {
    /// 1 if it begins with a header of Ethernet.
    pub ethernet: u32,
    /// Its type, host byte order, if it has no such header.
    pub etype: u16,
    /// Id of a VLAN tag that was taken out of it; 0 if there was none.
    pub vlan: u16,
}

/// What a frame says beside its flow's key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Destination, then source address of Ethernet.
    pub macs: [u8; 12],
    /// Flags of TCP.
    pub flags: u8,
    /// Differentiated services code point.
    pub dscp: u8,
    /// [`FRAGMENT_FIRST`], [`FRAGMENT_LATER`]; 0 if it is whole.
    pub fragment: u8,
    /// Identification of a packet in fragments.
    pub id: u32,
    /// Bytes of all headers: each part of a frame that is cut up has them.
    pub headers: u32,
}

/// The fragment that has the header of the transport.
pub const FRAGMENT_FIRST: u8 = 1;
/// One that has not.
pub const FRAGMENT_LATER: u8 = 2;

/// Reads a frame; false if it is no IP. What the key has of the interface is left alone.
#[inline(always)]
pub fn parse<F: Frame>(frame: &F, outside: Outside, key: &mut FlowKey, seen: &mut Seen) -> bool {
    let mut at = 0;
    key.etype = outside.etype;
    key.vlan = outside.vlan;
    if outside.ethernet != 0 {
        let Some(head) = frame.load::<14>(0) else { return false };
        for (to, from) in seen.macs.iter_mut().zip(head) {
            *to = from;
        }
        key.etype = u16::from_be_bytes([head[12], head[13]]);
        at = ETHERNET;
    }
    for _ in 0..TAGS {
        if key.etype != 0x8100 && key.etype != 0x88a8 {
            break;
        }
        let Some(tag) = frame.load::<4>(at) else { return false };
        if key.vlan == 0 {
            key.vlan = u16::from_be_bytes([tag[0], tag[1]]) & 0x0fff;
        }
        key.etype = u16::from_be_bytes([tag[2], tag[3]]);
        at += 4;
    }
    let at = match key.etype {
        IPV4 => ipv4(frame, at, key, seen),
        IPV6 => ipv6(frame, at, key, seen),
        _ => None,
    };
    let Some(at) = at else { return false };
    seen.headers = at;
    if seen.fragment != FRAGMENT_LATER {
        transport(frame, at, key, seen);
    }
    true
}

/// Reads a header of IPv4; gives where the next one is.
#[inline(always)]
fn ipv4<F: Frame>(frame: &F, at: u32, key: &mut FlowKey, seen: &mut Seen) -> Option<u32> {
    let head = frame.load::<20>(at)?;
    let length = (head[0] & 0x0f) as u32 * 4;
    if head[0] >> 4 != 4 || length < 20 {
        return None;
    }
    seen.dscp = head[1] >> 2;
    seen.id = u16::from_be_bytes([head[4], head[5]]) as u32;
    fragment(
        u16::from_be_bytes([head[6], head[7]]) & 0x1fff,
        head[6] & 0x20 != 0,
        seen,
    );
    key.proto = head[9];
    key.src = mapped([head[12], head[13], head[14], head[15]]);
    key.dst = mapped([head[16], head[17], head[18], head[19]]);
    Some(at + length)
}

#[inline(always)]
fn fragment(offset: u16, more: bool, seen: &mut Seen) {
    seen.fragment = if offset != 0 {
        FRAGMENT_LATER
    } else if more {
        FRAGMENT_FIRST
    } else {
        0
    };
}

/// Reads a header of IPv6 and what extends it; gives where the next one is.
#[inline(always)]
fn ipv6<F: Frame>(frame: &F, mut at: u32, key: &mut FlowKey, seen: &mut Seen) -> Option<u32> {
    let head = frame.load::<40>(at)?;
    if head[0] >> 4 != 6 {
        return None;
    }
    seen.dscp = (head[0] & 0x0f) << 2 | head[1] >> 6;
    for (to, from) in key.src.iter_mut().zip(&head[8..24]) {
        *to = *from;
    }
    for (to, from) in key.dst.iter_mut().zip(&head[24..]) {
        *to = *from;
    }
    key.proto = head[6];
    at += 40;
    for _ in 0..EXTENSIONS {
        if !is_extension(key.proto) || seen.fragment == FRAGMENT_LATER {
            break;
        }
        // One that is cut off is the last that is known.
        let Some(next) = frame.load::<8>(at) else { break };
        let units = next[1] as u32;
        let length = match key.proto {
            44 => {
                seen.id = u32::from_be_bytes([next[4], next[5], next[6], next[7]]);
                let place = u16::from_be_bytes([next[2], next[3]]);
                fragment(place >> 3, place & 1 != 0, seen);
                8
            }
            51 => (units + 2) * 4,
            _ => (units + 1) * 8,
        };
        key.proto = next[0];
        at += length;
    }
    Some(at)
}

/// Hop-by-hop, routing, fragment, authentication, destination options, mobility.
#[inline(always)]
const fn is_extension(next: u8) -> bool {
    matches!(next, 0 | 43 | 44 | 51 | 60 | 135)
}

#[inline(always)]
fn transport<F: Frame>(frame: &F, at: u32, key: &mut FlowKey, seen: &mut Seen) {
    if key.proto == TCP
        && let Some(head) = frame.load::<14>(at)
    {
        key.src_port = u16::from_be_bytes([head[0], head[1]]);
        key.dst_port = u16::from_be_bytes([head[2], head[3]]);
        seen.flags = head[13];
        seen.headers = at + (head[12] >> 4) as u32 * 4;
        return;
    }
    if key.proto == TCP || key.proto == UDP || key.proto == SCTP {
        if let Some(head) = frame.load::<4>(at) {
            key.src_port = u16::from_be_bytes([head[0], head[1]]);
            key.dst_port = u16::from_be_bytes([head[2], head[3]]);
            seen.headers = at + 8;
        }
    } else if (key.proto == ICMP || key.proto == ICMPV6)
        && let Some(head) = frame.load::<2>(at)
    {
        key.icmp_type = head[0];
        key.icmp_code = head[1];
    }
}

/// All flags of a packet of TCP: its own by bit, and what it combines, see [`flag`].
#[inline(always)]
#[must_use]
pub const fn flags(own: u8) -> u16 {
    let (fin, syn, rst, ack) = (own & 1, own >> 1 & 1, own >> 2 & 1, own >> 4 & 1);
    own as u16
        | ((syn & ack) as u16) << flag::SYN_ACK
        | ((fin & ack) as u16) << flag::FIN_ACK
        | ((rst & ack) as u16) << flag::RST_ACK
}

/// Packets and bytes of a frame of `length` bytes that becomes `segments` packets, each with these headers; 0 and 1 are one
/// that is not cut up. So much an interface counts that sends it, or that put it together.
#[inline(always)]
#[must_use]
pub const fn on_the_wire(length: u32, segments: u32, headers: u32) -> (u64, u64) {
    let packets = if segments == 0 { 1 } else { segments as u64 };
    (packets, length as u64 + (packets - 1) * headers as u64)
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::vec::Vec;

    use super::*;

    impl Frame for [u8] {
        fn load<const N: usize>(&self, at: u32) -> Option<[u8; N]> {
            self.get(at as usize..)?.get(..N)?.try_into().ok()
        }
    }

    struct Bytes<'a>(&'a [u8]);

    impl Frame for Bytes<'_> {
        fn load<const N: usize>(&self, at: u32) -> Option<[u8; N]> {
            self.0.load(at)
        }
    }

    fn read(bytes: &[u8]) -> Option<(FlowKey, Seen)> {
        let (mut key, mut seen) = (FlowKey::default(), Seen::default());
        let outside = Outside {
            ethernet: 1,
            ..Outside::default()
        };
        parse(&Bytes(bytes), outside, &mut key, &mut seen).then_some((key, seen))
    }

    fn ethernet(etype: u16, rest: &[u8]) -> Vec<u8> {
        let macs = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        [&macs[..], &etype.to_be_bytes(), rest].concat()
    }

    fn v4(options: usize, place: u16, proto: u8, rest: &[u8]) -> Vec<u8> {
        let mut head = [0; 20];
        head[0] = 0x45 + u8::try_from(options).unwrap();
        head[1] = 46 << 2 | 1;
        head[4..6].copy_from_slice(&77u16.to_be_bytes());
        head[6..8].copy_from_slice(&place.to_be_bytes());
        head[9] = proto;
        head[12..].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
        [&head[..], &std::vec![1; options * 4], rest].concat()
    }

    fn v6(proto: u8, rest: &[u8]) -> Vec<u8> {
        let mut head = [0; 40];
        head[0] = 0x6b;
        head[1] = 0x80;
        head[6] = proto;
        head[8] = 0xfd;
        head[23] = 1;
        head[24] = 0xfd;
        head[39] = 2;
        [&head[..], rest].concat()
    }

    const TCP_HEAD: [u8; 20] = [0x1f, 0x90, 0, 80, 0, 0, 0, 1, 0, 0, 0, 2, 0x80, 0x12, 0, 0, 0, 0, 0, 0];

    #[test]
    fn options_and_tags_are_looked_through() {
        for (frame, headers, vlan) in [
            (ethernet(IPV4, &v4(0, 0x4000, TCP, &TCP_HEAD)), 14 + 20 + 32, 0),
            (ethernet(IPV4, &v4(3, 0x4000, TCP, &TCP_HEAD)), 14 + 32 + 32, 0),
            (
                ethernet(0x8100, &[&[0x20, 5, 8, 0], &v4(0, 0, TCP, &TCP_HEAD)[..]].concat()),
                14 + 4 + 20 + 32,
                5,
            ),
            (
                ethernet(
                    0x88a8,
                    &[&[0, 9, 0x81, 0, 0, 5, 8, 0], &v4(0, 0, TCP, &TCP_HEAD)[..]].concat(),
                ),
                14 + 8 + 20 + 32,
                9,
            ),
        ] {
            let (key, seen) = read(&frame).unwrap();
            assert_eq!((key.src, key.dst), (mapped([10, 0, 0, 1]), mapped([10, 0, 0, 2])));
            assert_eq!((key.src_port, key.dst_port, key.proto), (8080, 80, TCP));
            assert_eq!((key.etype, key.vlan, seen.headers), (IPV4, vlan, headers));
            assert_eq!((seen.dscp, seen.flags, seen.fragment), (46, 0x12, 0));
            assert_eq!(seen.macs, [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2]);
        }
    }

    #[test]
    fn extension_headers_are_looked_through() {
        let udp = [0, 53, 0x30, 0x39, 0, 8, 0, 0];
        let hop = [60, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let options = [51, 0, 0, 0, 0, 0, 0, 0];
        let authentication = [44, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let whole = |place: u16| {
            let fragment = [&[UDP, 0][..], &place.to_be_bytes(), &[0, 0, 1, 2]].concat();
            ethernet(
                IPV6,
                &v6(
                    0,
                    &[&hop[..], &options[..], &authentication[..], &fragment[..], &udp[..]].concat(),
                ),
            )
        };
        let (key, seen) = read(&whole(1)).unwrap();
        assert_eq!((key.proto, key.src_port, key.dst_port), (UDP, 53, 12_345));
        assert_eq!((seen.fragment, seen.id, seen.dscp), (FRAGMENT_FIRST, 258, 46));
        let (key, seen) = read(&whole(8)).unwrap();
        assert_eq!((key.proto, key.src_port, seen.fragment), (UDP, 0, FRAGMENT_LATER));
        // An atomic fragment is whole.
        assert_eq!(read(&whole(0)).unwrap().1.fragment, 0);
    }

    #[test]
    fn icmp_has_type_and_code() {
        let (key, _) = read(&ethernet(IPV4, &v4(0, 0, ICMP, &[3, 1, 0, 0]))).unwrap();
        assert_eq!((key.icmp_type, key.icmp_code, key.src_port), (3, 1, 0));
        let (key, _) = read(&ethernet(IPV6, &v6(ICMPV6, &[128, 0]))).unwrap();
        assert_eq!((key.icmp_type, key.icmp_code), (128, 0));
    }

    #[test]
    fn what_is_cut_off_is_not_made_up() {
        assert_eq!(read(&ethernet(0x0806, &[0; 28])), None);
        assert_eq!(read(&[0; 13]), None);
        let whole = ethernet(IPV4, &v4(0, 0, TCP, &TCP_HEAD));
        assert_eq!(read(&whole[..33]), None);
        let (key, seen) = read(&whole[..38]).unwrap();
        assert_eq!((key.src_port, key.dst_port, seen.flags), (8080, 80, 0));
        assert_eq!(read(&whole[..37]).unwrap().0.src_port, 0);
        // A header of four words; version 5.
        for first in [0x44, 0x55] {
            let mut wrong = whole.clone();
            wrong[14] = first;
            assert_eq!(read(&wrong), None);
        }
    }

    #[test]
    fn later_fragments_have_no_ports() {
        let (key, seen) = read(&ethernet(IPV4, &v4(0, 0x2000, UDP, &[0, 1, 0, 2, 0, 9, 0, 0]))).unwrap();
        assert_eq!((key.src_port, seen.fragment, seen.id), (1, FRAGMENT_FIRST, 77));
        let (key, seen) = read(&ethernet(IPV4, &v4(0, 0x00b9, UDP, &[0, 1, 0, 2, 0, 9, 0, 0]))).unwrap();
        assert_eq!((key.src_port, seen.fragment, seen.id), (0, FRAGMENT_LATER, 77));
    }

    #[test]
    fn combinations_are_of_one_packet() {
        assert_eq!(flags(0x02), 0x02);
        assert_eq!(flags(0x12), 0x112);
        assert_eq!(flags(0x11), 0x211);
        assert_eq!(flags(0x14), 0x414);
        assert_eq!(flags(0xff), 0x7ff);
    }

    #[test]
    fn a_frame_that_is_cut_up_is_its_parts() {
        assert_eq!(on_the_wire(1514, 0, 66), (1, 1514));
        assert_eq!(on_the_wire(1514, 1, 66), (1, 1514));
        // 66 bytes of headers and 3 times 1448 bytes.
        assert_eq!(on_the_wire(66 + 4344, 3, 66), (3, 3 * 1514));
    }
}
