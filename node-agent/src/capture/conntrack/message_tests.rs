#![allow(clippy::unwrap_used, clippy::indexing_slicing)]
use super::*;

/// What kernel 6.18 sent for a TCP connection to 10.96.0.10:80 that was sent on to 10.99.0.2:8080.
const NEW: &[u8] = &[
    0xc4, 0x00, 0x00, 0x00, 0x00, 0x01, 0x00, 0x06, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x02, 0x00, 0x00,
    0x00, 0x34, 0x00, 0x01, 0x80, 0x14, 0x00, 0x01, 0x80, 0x08, 0x00, 0x01, 0x00, 0x0a, 0x63, 0x00, 0x01, 0x08, 0x00,
    0x02, 0x00, 0x0a, 0x60, 0x00, 0x0a, 0x1c, 0x00, 0x02, 0x80, 0x05, 0x00, 0x01, 0x00, 0x06, 0x00, 0x00, 0x00, 0x06,
    0x00, 0x02, 0x00, 0x94, 0x2c, 0x00, 0x00, 0x06, 0x00, 0x03, 0x00, 0x00, 0x50, 0x00, 0x00, 0x34, 0x00, 0x02, 0x80,
    0x14, 0x00, 0x01, 0x80, 0x08, 0x00, 0x01, 0x00, 0x0a, 0x63, 0x00, 0x02, 0x08, 0x00, 0x02, 0x00, 0x0a, 0x63, 0x00,
    0x01, 0x1c, 0x00, 0x02, 0x80, 0x05, 0x00, 0x01, 0x00, 0x06, 0x00, 0x00, 0x00, 0x06, 0x00, 0x02, 0x00, 0x1f, 0x90,
    0x00, 0x00, 0x06, 0x00, 0x03, 0x00, 0x94, 0x2c, 0x00, 0x00, 0x08, 0x00, 0x0c, 0x00, 0xbf, 0xd3, 0x3e, 0x5c, 0x08,
    0x00, 0x03, 0x00, 0x00, 0x00, 0x01, 0xa8, 0x08, 0x00, 0x07, 0x00, 0x00, 0x00, 0x00, 0x78, 0x30, 0x00, 0x04, 0x80,
    0x2c, 0x00, 0x01, 0x80, 0x05, 0x00, 0x01, 0x00, 0x01, 0x00, 0x00, 0x00, 0x05, 0x00, 0x02, 0x00, 0x0a, 0x00, 0x00,
    0x00, 0x05, 0x00, 0x03, 0x00, 0x00, 0x00, 0x00, 0x00, 0x06, 0x00, 0x04, 0x00, 0x03, 0x00, 0x00, 0x00, 0x06, 0x00,
    0x05, 0x00, 0x00, 0x00, 0x00, 0x00,
];

fn padded(kind: u16, body: &[u8]) -> Vec<u8> {
    let mut bytes = frame(kind, 0, body);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn write_tuple(tuple: &Tuple, protocol: u8) -> Vec<u8> {
    const NESTED: u16 = 0x8000;
    let (from, to) = match tuple.from.ip {
        IpAddr::V4(_) => (cta::IP_V4_SRC, cta::IP_V4_DST),
        IpAddr::V6(_) => (cta::IP_V6_SRC, cta::IP_V6_DST),
    };
    let ip = [
        attribute(from, &octets(tuple.from.ip)),
        attribute(to, &octets(tuple.to.ip)),
    ]
    .concat();
    let ports = [
        attribute(cta::PROTO_NUM, &[protocol]),
        attribute(cta::PROTO_SRC_PORT, &tuple.from.port.to_be_bytes()),
        attribute(cta::PROTO_DST_PORT, &tuple.to.port.to_be_bytes()),
    ]
    .concat();
    [
        attribute(cta::TUPLE_IP | NESTED, &ip),
        attribute(cta::TUPLE_PROTO | NESTED, &ports),
    ]
    .concat()
}

fn write(kind: u16, entry: &Entry, protocol: u8) -> Vec<u8> {
    let body = [
        vec![2, 0, 0, 0],
        attribute(cta::TUPLE_ORIG | 0x8000, &write_tuple(&entry.original, protocol)),
        attribute(cta::TUPLE_REPLY | 0x8000, &write_tuple(&entry.reply, protocol)),
        attribute(cta::ID, &entry.id.to_be_bytes()),
    ]
    .concat();
    padded(kind, &body)
}

fn end(ip: &str, port: u16) -> End {
    End {
        ip: ip.parse().unwrap(),
        port,
    }
}

fn example() -> Entry {
    Entry {
        original: Tuple {
            protocol: Protocol::Udp,
            from: end("fd00::1", 4000),
            to: end("fd00::a", 53),
        },
        reply: Tuple {
            protocol: Protocol::Udp,
            from: end("fd00::b", 5353),
            to: end("fd00::1", 4000),
        },
        id: 77,
    }
}

#[test]
fn reads_an_event_of_the_kernel() {
    let read: Vec<Item> = items(NEW).collect();
    let [Item::There(entry)] = read[..] else {
        panic!("{read:?}")
    };
    assert_eq!(entry.original.protocol, Protocol::Tcp);
    assert_eq!(entry.original.from, end("10.99.0.1", 37932));
    assert_eq!(entry.original.to, end("10.96.0.10", 80));
    assert_eq!(entry.translated().from, entry.original.from);
    assert_eq!(entry.translated().to, end("10.99.0.2", 8080));
    assert_ne!(entry.id, 0);
}

#[test]
fn reads_what_a_datagram_holds() {
    let there = write(0x100, &example(), 17);
    let gone = write(0x102, &example(), 17);
    let icmp = write(0x100, &example(), 58);
    let other = padded(0x200, &[1, 2, 3]);
    let refused = padded(ERROR, &(-1i32).to_ne_bytes());
    let done = padded(DONE, &0i32.to_ne_bytes());
    let failed = padded(DONE, &(-16i32).to_ne_bytes());
    let all = [there, gone, icmp, other, refused, done, failed].concat();
    let read: Vec<Item> = items(&all).collect();
    assert_eq!(
        read,
        [
            Item::There(example()),
            Item::Gone(example()),
            Item::Other,
            Item::Other,
            Item::Answer(1),
            Item::Done,
            Item::Answer(16),
        ]
    );
}

#[test]
fn lengths_that_do_not_fit_are_refused() {
    let whole = write(0x100, &example(), 17);
    for cut in 1..whole.len() {
        assert_eq!(items(&whole[..cut]).collect::<Vec<_>>(), [Item::Malformed], "{cut}");
    }
    // A message that says it is shorter than its header would repeat for ever.
    let mut short = whole.clone();
    short[..4].copy_from_slice(&0u32.to_ne_bytes());
    assert_eq!(items(&short).collect::<Vec<_>>(), [Item::Malformed]);
    // So would an attribute.
    let mut short = whole.clone();
    short[HEADER + FAMILY_HEADER..][..2].copy_from_slice(&0u16.to_ne_bytes());
    assert_eq!(items(&short).collect::<Vec<_>>(), [Item::Malformed]);
    // Without a reply tuple.
    let lone = padded(
        0x100,
        &[
            vec![2, 0, 0, 0],
            attribute(cta::TUPLE_ORIG, &write_tuple(&example().original, 17)),
        ]
        .concat(),
    );
    assert_eq!(items(&lone).collect::<Vec<_>>(), [Item::Malformed]);
}

proptest::proptest! {
    #[test]
    fn any_bytes_are_read_to_an_end(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..400)) {
        assert!(items(&bytes).count() <= bytes.len() / HEADER + 1);
    }

    /// Bytes that are a message but for some.
    #[test]
    fn damaged_messages_are_read_to_an_end(
        damage in proptest::collection::vec((0..300usize, proptest::num::u8::ANY), 1..6),
    ) {
        let mut bytes = write(0x100, &example(), 6);
        for (at, byte) in damage {
            let at = at % bytes.len();
            bytes[at] = byte;
        }
        assert!(items(&bytes).count() <= bytes.len() / HEADER + 1);
    }

    #[test]
    fn what_is_written_is_read(
        (from, to, from_v6, to_v6) in (proptest::num::u32::ANY, proptest::num::u32::ANY, proptest::num::u128::ANY, proptest::num::u128::ANY),
        ports in proptest::array::uniform4(proptest::num::u16::ANY),
        v6 in proptest::bool::ANY,
        tcp in proptest::bool::ANY,
        id in proptest::num::u32::ANY,
    ) {
        let ip = |v4: u32, wide: u128| if v6 { IpAddr::from(Ipv6Addr::from(wide | 1 << 127)) } else { Ipv4Addr::from(v4).into() };
        let protocol = if tcp { Protocol::Tcp } else { Protocol::Udp };
        let tuple = |from, from_port, to, to_port| Tuple {
            protocol,
            from: End { ip: from, port: from_port },
            to: End { ip: to, port: to_port },
        };
        let (from, to) = (ip(from, from_v6), ip(to, to_v6));
        let entry = Entry {
            original: tuple(from, ports[0], to, ports[1]),
            reply: tuple(to, ports[2], from, ports[3]),
            id,
        };
        let bytes = write(0x102, &entry, if tcp { 6 } else { 17 });
        assert_eq!(items(&bytes).collect::<Vec<_>>(), [Item::Gone(entry)]);
    }
}
