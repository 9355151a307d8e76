//! Writing values: a cursor over the output buffer and the text forms of addresses and numbers.
#![expect(
    clippy::indexing_slicing,
    reason = "every write is preceded by `room`; a missed one must not pass unseen"
)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{
    plan::{End, Read},
    row::Row,
};
use crate::{IpType, K8sEndpoint, Port, column::K8sKey};

/// Appends to a buffer that was grown in advance, so that single writes need no growth check. The bytes behind the
/// position are scratch; [`Cursor::finish`] cuts them off.
pub(crate) struct Cursor<'a> {
    pub(super) out: &'a mut Vec<u8>,
    pub(super) at: usize,
}

/// Decimal text of one byte value: up to three digits, then their number.
static OCTETS: [[u8; 4]; 256] = octets();

/// A value as text or as number.
pub(super) enum Value<'a> {
    Text(&'a str),
    Ip(IpAddr),
    Unsigned(u64),
    Signed(i64),
    Bool(bool),
}

const fn octets() -> [[u8; 4]; 256] {
    let mut table = [[0; 4]; 256];
    let mut n = 0;
    while n < 256 {
        let (h, t, o) = (
            b'0' + (n / 100) as u8,
            b'0' + (n / 10 % 10) as u8,
            b'0' + (n % 10) as u8,
        );
        table[n] = match n {
            0..=9 => [o, 0, 0, 1],
            10..=99 => [t, o, 0, 2],
            _ => [h, t, o, 3],
        };
        n += 1;
    }
    table
}

// === impl Cursor ===

impl<'a> Cursor<'a> {
    /// Starts at the end of `out` with `room` bytes to write into.
    #[inline]
    pub(crate) fn new(out: &'a mut Vec<u8>, room: usize) -> Self {
        let at = out.len();
        let mut cursor = Self { out, at };
        cursor.room(room);
        cursor
    }

    /// Makes sure that `more` bytes can be written.
    #[inline]
    pub(super) fn room(&mut self, more: usize) {
        if self.out.len() < self.at + more {
            self.out.resize(self.at + more, 0);
        }
    }

    /// Cuts off the scratch.
    #[inline]
    pub(crate) fn finish(self) {
        self.out.truncate(self.at);
    }

    #[inline]
    pub(super) fn byte(&mut self, byte: u8) {
        self.out[self.at] = byte;
        self.at += 1;
    }

    #[inline]
    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.out[self.at..self.at + bytes.len()].copy_from_slice(bytes);
        self.at += bytes.len();
    }

    /// Writes the first `len` of `N` bytes with one fixed-size copy.
    #[inline]
    pub(super) fn prefix<const N: usize>(&mut self, bytes: &[u8; N], len: usize) {
        self.out[self.at..self.at + N].copy_from_slice(bytes);
        self.at += len;
    }

    #[inline]
    pub(super) fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.byte(value as u8 | 0x80);
            value >>= 7;
        }
        self.byte(value as u8);
    }

    #[inline]
    pub(super) fn unsigned(&mut self, value: u64) {
        let mut buffer = itoa::Buffer::new();
        self.bytes(buffer.format(value).as_bytes());
    }

    #[inline]
    pub(super) fn signed(&mut self, value: i64) {
        let mut buffer = itoa::Buffer::new();
        self.bytes(buffer.format(value).as_bytes());
    }

    #[inline]
    pub(super) fn bool(&mut self, value: bool) {
        self.bytes(if value { b"true" } else { b"false" });
    }

    #[inline]
    pub(crate) fn ip(&mut self, ip: IpAddr) {
        match ip {
            IpAddr::V4(v4) => self.ipv4(v4),
            IpAddr::V6(v6) => self.ipv6(v6),
        }
    }

    #[inline]
    fn ipv4(&mut self, ip: Ipv4Addr) {
        let [a, b, c, d] = ip.octets();
        for octet in [a, b, c] {
            let text = &OCTETS[usize::from(octet)];
            self.prefix(text, usize::from(text[3]));
            self.byte(b'.');
        }
        let text = &OCTETS[usize::from(d)];
        self.prefix(text, usize::from(text[3]));
    }

    /// RFC 5952: lower case, no leading zeros, the first longest run of two or more zero groups as `::`.
    fn ipv6(&mut self, ip: Ipv6Addr) {
        if let Some(v4) = ip.to_ipv4_mapped() {
            self.bytes(b"::ffff:");
            return self.ipv4(v4);
        }
        let groups = ip.segments();
        let (mut best_at, mut best_len, mut len) = (0, 1, 0);
        for (index, group) in groups.iter().enumerate() {
            len = if *group == 0 { len + 1 } else { 0 };
            if len > best_len {
                (best_at, best_len) = (index + 1 - len, len);
            }
        }
        let gap = if best_len > 1 {
            best_at..best_at + best_len
        } else {
            8..8
        };
        let mut index = 0;
        while index < groups.len() {
            if index == gap.start {
                self.bytes(b"::");
                index = gap.end;
                continue;
            }
            if index > 0 && index != gap.end {
                self.byte(b':');
            }
            self.hex(groups[index]);
            index += 1;
        }
    }

    #[inline]
    fn hex(&mut self, group: u16) {
        let digits = (4 - group.leading_zeros() / 4).max(1);
        for digit in (0..digits).rev() {
            self.byte(b"0123456789abcdef"[usize::from(group >> (digit * 4) & 0xf)]);
        }
    }
}

// === impl Read ===

impl Read {
    /// The value in `row`. Texts of a record are not checked yet.
    #[inline]
    pub(super) fn of(self, row: &impl Row) -> Value<'_> {
        match self {
            Self::Time => Value::Signed(row.time()),
            Self::Ip(end) => Value::Ip(row.endpoint(end).ip),
            Self::IpType(end) => Value::Text(match IpType::of(row.endpoint(end).ip) {
                IpType::Private => "private",
                IpType::Loopback => "loopback",
                IpType::Multicast => "multicast",
                IpType::Other => "other",
            }),
            Self::Port(end) => match row.endpoint(end).port {
                Port::Number(port) => Value::Unsigned(u64::from(port)),
                Port::Any => Value::Text("*"),
            },
            Self::NatIp => row
                .nat()
                .map_or(Value::Text(super::plan::NOT_AVAILABLE), |(ip, _)| Value::Ip(ip)),
            Self::NatPort => row.nat().map_or(Value::Text(super::plan::NOT_AVAILABLE), |(_, port)| {
                Value::Unsigned(u64::from(port))
            }),
            Self::Domain => Value::Text(row.domain()),
            Self::Pid => Value::Unsigned(u64::from(row.pid())),
            Self::ProcessName => Value::Text(row.process_name()),
            Self::Netns => Value::Unsigned(u64::from(row.netns())),
            Self::K8s(end, key) => {
                let names = row.k8s(end);
                Value::Text(names.map_or(super::plan::NOT_AVAILABLE, |names| k8s(names, key)))
            }
            Self::Label(index) => {
                let label = row.k8s(End::Local).and_then(|names| names.labels.get(index));
                Value::Text(label.map_or("", |(_, value)| value))
            }
            Self::Counter(counter) => Value::Signed(row.counter(counter)),
            Self::Text(text) => Value::Text(row.text(text)),
            Self::Truncated => Value::Bool(row.truncated()),
        }
    }
}

#[inline]
fn k8s(names: &K8sEndpoint, key: K8sKey) -> &str {
    let K8sEndpoint {
        namespace,
        pod,
        service,
        workload,
        workload_type,
        labels: _,
    } = names;
    let text: &str = match key {
        K8sKey::Namespace => namespace,
        K8sKey::Pod => pod,
        K8sKey::Service => service,
        K8sKey::Workload => workload,
        K8sKey::WorkloadType => workload_type,
    };
    if text.is_empty() {
        super::plan::NOT_AVAILABLE
    } else {
        text
    }
}
