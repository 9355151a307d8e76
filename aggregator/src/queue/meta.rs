//! What is stored beside a body, and the identity that a body keeps over all its deliveries.

use std::{
    fmt,
    sync::atomic::{AtomicU32, Ordering},
};

use records::{Category, encode::Format};

const VERSION: u8 = 1;
const LEN: usize = 36;

/// What the bytes of a body are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BodyForm {
    /// Points.
    Points(Format),
    /// Flow logs with their keys, for Kafka; compressed with snappy.
    KafkaFlows,
    /// Flow logs as a push request of Loki; compressed with snappy.
    LokiPush,
}

/// Identity of one body: header `X-Pkg-Id`. Drawn when the body is stored, so a body sent twice can be recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct PkgId([u8; 12]);

/// Draws [`PkgId`]s: 4 bytes time, 5 bytes random at start, 3 bytes counter.
#[derive(Debug)]
pub(crate) struct PkgIds {
    random: [u8; 5],
    counter: AtomicU32,
}

/// What is known of a body without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BodyMeta {
    /// Form of the records.
    pub(crate) format: BodyForm,
    /// Where the points belong.
    pub(crate) category: Category,
    /// Stored (and sent) gzip-compressed.
    pub(crate) gzip: bool,
    /// Points inside.
    pub(crate) points: u32,
    /// Bytes before compression.
    pub(crate) raw_len: u32,
    /// Bytes stored and sent.
    pub(crate) wire_len: u32,
    /// When it was made, Unix milliseconds of the queue clock.
    pub(crate) created_ms: u64,
    /// Its identity.
    pub(crate) pkg: PkgId,
}

// === impl PkgIds ===

impl PkgIds {
    /// Ids of this process.
    pub(crate) fn new() -> Self {
        let seed: u64 = rand::random();
        let [a, b, c, d, e, ..] = seed.to_le_bytes();
        Self {
            random: [a, b, c, d, e],
            counter: AtomicU32::new(rand::random()),
        }
    }

    /// The next id.
    #[allow(clippy::many_single_char_names)]
    pub(crate) fn next(&self, unix_seconds: u64) -> PkgId {
        // Low 32 bits: the format has four bytes for the time.
        let [.., t0, t1, t2, t3] = unix_seconds.to_be_bytes();
        let [a, b, c, d, e] = self.random;
        let [_, n0, n1, n2] = self.counter.fetch_add(1, Ordering::Relaxed).to_be_bytes();
        PkgId([t0, t1, t2, t3, a, b, c, d, e, n0, n1, n2])
    }
}

// === impl PkgId ===

impl fmt::Display for PkgId {
    /// `dk_` and 20 characters of lower-case base32hex.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const ALPHABET: [char; 32] = [
            '0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h', 'i', 'j', 'k',
            'l', 'm', 'n', 'o', 'p', 'q', 'r', 's', 't', 'u', 'v',
        ];
        f.write_str("dk_")?;
        let (mut bits, mut held) = (0u32, 0u32);
        for byte in self.0 {
            bits = (bits << 8) | u32::from(byte);
            held += 8;
            while held >= 5 {
                held -= 5;
                let index = (bits >> held) as usize & 31;
                fmt::Write::write_char(f, ALPHABET.get(index).copied().unwrap_or('0'))?;
            }
            bits &= (1 << held) - 1;
        }
        let index = (bits << (5 - held)) as usize & 31;
        fmt::Write::write_char(f, ALPHABET.get(index).copied().unwrap_or('0'))
    }
}

// === impl BodyForm ===

impl BodyForm {
    /// Value of a `Content-Type` header.
    pub(crate) const fn content_type(self) -> &'static str {
        match self {
            Self::Points(format) => format.content_type(),
            Self::KafkaFlows => "application/x-ebpfcollector-flows",
            Self::LokiPush => "application/x-protobuf",
        }
    }
}

impl From<Format> for BodyForm {
    fn from(format: Format) -> Self {
        Self::Points(format)
    }
}

// === impl BodyMeta ===

impl BodyMeta {
    /// Stored form.
    pub(crate) fn to_bytes(self) -> [u8; LEN] {
        let mut out = [0; LEN];
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            if let Some(slot) = out.get_mut(at..at + bytes.len()) {
                slot.copy_from_slice(bytes);
            }
            at += bytes.len();
        };
        let format = match self.format {
            BodyForm::Points(Format::Protobuf) => 1,
            BodyForm::Points(Format::LineProtocol) => 2,
            BodyForm::Points(Format::Json) => 3,
            BodyForm::Points(Format::Table) => 4,
            BodyForm::KafkaFlows => 5,
            BodyForm::LokiPush => 6,
        };
        let category = match self.category {
            Category::Network => 0,
            Category::Logging => 1,
        };
        put(&[VERSION, format, u8::from(self.gzip), category]);
        put(&self.points.to_le_bytes());
        put(&self.raw_len.to_le_bytes());
        put(&self.wire_len.to_le_bytes());
        put(&self.created_ms.to_le_bytes());
        put(&self.pkg.0);
        out
    }

    /// Reads the stored form; `None` if it is not one of this version.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != LEN {
            return None;
        }
        let ([VERSION, format, gzip, category], rest) = bytes.split_first_chunk()? else {
            return None;
        };
        let (points, rest) = rest.split_first_chunk()?;
        let (raw_len, rest) = rest.split_first_chunk()?;
        let (wire_len, rest) = rest.split_first_chunk()?;
        let (created_ms, rest) = rest.split_first_chunk()?;
        Some(Self {
            format: match format {
                1 => BodyForm::Points(Format::Protobuf),
                2 => BodyForm::Points(Format::LineProtocol),
                3 => BodyForm::Points(Format::Json),
                4 => BodyForm::Points(Format::Table),
                5 => BodyForm::KafkaFlows,
                6 => BodyForm::LokiPush,
                _ => return None,
            },
            category: match category {
                0 => Category::Network,
                1 => Category::Logging,
                _ => return None,
            },
            gzip: *gzip == 1,
            points: u32::from_le_bytes(*points),
            raw_len: u32::from_le_bytes(*raw_len),
            wire_len: u32::from_le_bytes(*wire_len),
            created_ms: u64::from_le_bytes(*created_ms),
            pkg: PkgId(rest.try_into().ok()?),
        })
    }

    /// Bytes that the body takes in the queue file: the storage keeps values in pages of 4 KiB times a power of two.
    pub(crate) const fn cost(&self) -> u64 {
        const ROW: u64 = 128;
        let len = self.wire_len as u64 + ROW;
        if len <= 4096 { len } else { len.next_power_of_two() }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn package_ids_are_unique_and_have_the_documented_form() {
        let ids = PkgIds::new();
        let texts: HashSet<String> = (0..10_000).map(|_| ids.next(1_700_000_000).to_string()).collect();
        assert_eq!(texts.len(), 10_000);
        for text in texts {
            let id = text.strip_prefix("dk_").unwrap();
            assert_eq!(id.len(), 20);
            assert!(id.chars().all(|c| matches!(c, '0'..='9' | 'a'..='v')), "{id}");
        }
        // Known value of the format: time 0x4d88e15b, the rest as in the bytes.
        let known = PkgId([0x4d, 0x88, 0xe1, 0x5b, 0x60, 0xf4, 0x86, 0xe4, 0x28, 0x41, 0x2d, 0xc9]);
        assert_eq!(known.to_string(), "dk_9m4e2mr0ui3e8a215n4g");
    }

    #[test]
    fn stored_form_round_trips_and_damage_is_refused() {
        let meta = BodyMeta {
            format: Format::LineProtocol.into(),
            category: Category::Logging,
            gzip: true,
            points: 3,
            raw_len: 1 << 20,
            wire_len: 99_999,
            created_ms: 1_700_000_000_123,
            pkg: PkgIds::new().next(1),
        };
        let bytes = meta.to_bytes();
        assert_eq!(BodyMeta::from_bytes(&bytes), Some(meta));
        assert_eq!(BodyMeta::from_bytes(&bytes[..LEN - 1]), None);
        for damaged in [0, 1, 3] {
            let mut bytes = bytes;
            bytes[damaged] = 77;
            assert_eq!(BodyMeta::from_bytes(&bytes), None);
        }
    }

    #[test]
    fn cost_covers_the_pages_of_the_storage() {
        let cost = |wire_len| {
            let pkg = PkgIds::new().next(1);
            BodyMeta {
                format: Format::Json.into(),
                category: Category::Network,
                gzip: false,
                points: 1,
                raw_len: 1,
                wire_len,
                created_ms: 0,
                pkg,
            }
            .cost()
        };
        assert_eq!(
            (cost(100), cost(5000), cost(100_000), cost(131_072)),
            (228, 8192, 131_072, 262_144)
        );
    }
}
