//! Reads the running kernel's type information (BTF) and answers "at which byte is this member?".
//!
//! Format: `Documentation/bpf/btf.rst`. Only what member look-ups need is kept: structs and unions by name, enumerators,
//! and the type table to follow. Entry: [`KernelTypes::load`], then [`KernelTypes::member`].

use std::{collections::HashMap, path::Path};

/// Why the type information could not be used.
#[derive(Debug, thiserror::Error)]
pub enum BtfError {
    /// The file could not be read.
    #[error("cannot read kernel type information {path}: {source}; the kernel needs CONFIG_DEBUG_INFO_BTF=y")]
    Read {
        /// The file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The bytes are not BTF as documented.
    #[error("kernel type information is malformed: {0}")]
    Malformed(&'static str),
}

/// Where a member lies inside its outermost struct.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Offset in bits.
    pub bit_offset: u32,
    /// Width in bits for a bit field, 0 otherwise.
    pub bit_size: u32,
    type_id: u32,
}

/// The kernel's types.
#[derive(Debug)]
pub struct KernelTypes {
    data: Vec<u8>,
    strings: (usize, usize),
    /// Offset of each type's record in `data`, by type id; id 0 is void.
    types: Vec<u32>,
    structs: HashMap<Box<str>, u32>,
}

const MAGIC: u16 = 0xeb9f;
const KIND_PTR: u32 = 2;
const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
const KIND_TYPEDEF: u32 = 8;
const KIND_VOLATILE: u32 = 9;
const KIND_CONST: u32 = 10;
const KIND_RESTRICT: u32 = 11;
const KIND_FUNC: u32 = 12;
const KIND_FUNC_PROTO: u32 = 13;
const KIND_VAR: u32 = 14;
const KIND_TYPE_TAG: u32 = 18;
const KIND_ENUM64: u32 = 19;
/// Anonymous members and typedef chains are followed no deeper than this.
const MAX_DEPTH: u32 = 16;

impl KernelTypes {
    /// Reads `/sys/kernel/btf/vmlinux`.
    ///
    /// # Errors
    /// [`BtfError`] if the file is missing or malformed.
    pub fn load() -> Result<Self, BtfError> {
        Self::load_from(Path::new("/sys/kernel/btf/vmlinux"))
    }

    /// Reads another file of the same format.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_from(path: &Path) -> Result<Self, BtfError> {
        let data = std::fs::read(path).map_err(|source| BtfError::Read {
            path: path.display().to_string(),
            source,
        })?;
        Self::parse(data)
    }

    /// Indexes raw BTF bytes.
    ///
    /// # Errors
    /// [`BtfError::Malformed`] for anything that is not little-endian BTF version 1.
    pub fn parse(data: Vec<u8>) -> Result<Self, BtfError> {
        let bad = BtfError::Malformed;
        if u16_at(&data, 0) != Some(MAGIC) || data.get(2) != Some(&1) {
            return Err(bad("no BTF header of version 1"));
        }
        let header = u32_at(&data, 4).ok_or(bad("short header"))? as usize;
        let field = |at: usize| u32_at(&data, at).map(|v| v as usize).ok_or(bad("short header"));
        let (type_off, type_len, str_off, str_len) = (field(8)?, field(12)?, field(16)?, field(20)?);
        let end = header.checked_add(type_off).and_then(|v| v.checked_add(type_len));
        let type_end = end
            .filter(|end| *end <= data.len())
            .ok_or(bad("types reach past the end"))?;
        let str_start = header.checked_add(str_off).ok_or(bad("strings reach past the end"))?;
        let str_end = str_start.checked_add(str_len).filter(|end| *end <= data.len());
        let str_end = str_end.ok_or(bad("strings reach past the end"))?;
        let mut this = Self {
            data,
            strings: (str_start, str_end),
            types: vec![0],
            structs: HashMap::new(),
        };
        let mut at = header + type_off;
        while at < type_end {
            let info = u32_at(&this.data, at + 4).ok_or(bad("short type record"))?;
            let (kind, vlen) = ((info >> 24) & 0x1f, (info & 0xffff) as usize);
            let extra = match kind {
                1 | KIND_VAR | 17 => 4,
                KIND_PTR | 7..=12 | 16 | KIND_TYPE_TAG => 0,
                KIND_ARRAY => 12,
                KIND_STRUCT | KIND_UNION | 15 | KIND_ENUM64 => 12 * vlen,
                KIND_ENUM | 13 => 8 * vlen,
                _ => return Err(bad("unknown kind of type")),
            };
            let id = u32::try_from(this.types.len()).map_err(|_| bad("too many types"))?;
            if kind == KIND_STRUCT {
                let name = this.string(u32_at(&this.data, at).unwrap_or(0));
                if !name.is_empty() {
                    let name = name.into();
                    this.structs.entry(name).or_insert(id);
                }
            }
            this.types.push(u32::try_from(at).map_err(|_| bad("too large"))?);
            at += 12 + extra;
        }
        Ok(this)
    }

    /// Finds `path` (members joined by dots; anonymous members are looked through) in struct `name`.
    #[must_use]
    pub fn member(&self, name: &str, path: &str) -> Option<Member> {
        let mut type_id = *self.structs.get(name)?;
        let mut found = Member {
            bit_offset: 0,
            bit_size: 0,
            type_id,
        };
        for part in path.split('.') {
            let next = self.member_of(type_id, part, 0)?;
            found = Member {
                bit_offset: found.bit_offset + next.bit_offset,
                bit_size: next.bit_size,
                type_id: next.type_id,
            };
            type_id = next.type_id;
        }
        Some(found)
    }

    /// Byte offset of a member that is no bit field.
    #[must_use]
    pub fn offset(&self, name: &str, path: &str) -> Option<u32> {
        let member = self.member(name, path)?;
        (member.bit_size == 0 && member.bit_offset % 8 == 0).then_some(member.bit_offset / 8)
    }

    /// True if the kernel has a variable of that name; the type information tells of per-CPU ones only.
    #[must_use]
    pub fn has_variable(&self, name: &str) -> bool {
        (1..self.types.len()).any(|id| {
            u32::try_from(id)
                .ok()
                .and_then(|id| self.record(id))
                .is_some_and(|(at, kind, _)| {
                    kind == KIND_VAR && u32_at(&self.data, at).is_some_and(|name_at| self.string(name_at) == name)
                })
        })
    }

    /// True if the kernel has a struct of that name.
    #[must_use]
    pub fn has_struct(&self, name: &str) -> bool {
        self.structs.contains_key(name)
    }

    /// Size of a struct in bytes.
    #[must_use]
    pub fn size(&self, name: &str) -> Option<u32> {
        let (at, _, _) = self.record(*self.structs.get(name)?)?;
        u32_at(&self.data, at + 8)
    }

    /// Number of parameters of a kernel function, `None` if the kernel has no such function.
    #[must_use]
    pub fn parameters(&self, function: &str) -> Option<usize> {
        (1..self.types.len()).find_map(|id| {
            let (at, kind, _) = self.record(u32::try_from(id).ok()?)?;
            if kind != KIND_FUNC || self.string(u32_at(&self.data, at)?) != function {
                return None;
            }
            let (_, kind, parameters) = self.record(u32_at(&self.data, at + 8)?)?;
            (kind == KIND_FUNC_PROTO).then_some(parameters)
        })
    }

    /// Value of an enumerator, by its name alone.
    #[must_use]
    pub fn enumerator(&self, name: &str) -> Option<u32> {
        (1..self.types.len()).find_map(|id| {
            let (at, kind, vlen) = self.record(u32::try_from(id).ok()?)?;
            let size = match kind {
                KIND_ENUM => 8,
                KIND_ENUM64 => 12,
                _ => return None,
            };
            (0..vlen).find_map(|i| {
                let entry = at + 12 + i * size;
                (self.string(u32_at(&self.data, entry)?) == name)
                    .then(|| u32_at(&self.data, entry + 4))
                    .flatten()
            })
        })
    }

    fn record(&self, id: u32) -> Option<(usize, u32, usize)> {
        if id == 0 {
            return None;
        }
        let at = *self.types.get(id as usize)? as usize;
        let info = u32_at(&self.data, at + 4)?;
        Some((at, (info >> 24) & 0x1f, (info & 0xffff) as usize))
    }

    fn member_of(&self, type_id: u32, name: &str, depth: u32) -> Option<Member> {
        if depth > MAX_DEPTH {
            return None;
        }
        let (at, kind, vlen) = self.record(type_id)?;
        match kind {
            KIND_TYPEDEF | KIND_VOLATILE | KIND_CONST | KIND_RESTRICT | KIND_TYPE_TAG => {
                self.member_of(u32_at(&self.data, at + 8)?, name, depth + 1)
            }
            KIND_STRUCT | KIND_UNION => {
                let bit_fields = u32_at(&self.data, at + 4)? >> 31 == 1;
                (0..vlen).find_map(|i| {
                    let entry = at + 12 + i * 12;
                    let member_name = self.string(u32_at(&self.data, entry)?);
                    let type_id = u32_at(&self.data, entry + 4)?;
                    let raw = u32_at(&self.data, entry + 8)?;
                    let (bit_offset, bit_size) = if bit_fields {
                        (raw & 0xff_ffff, raw >> 24)
                    } else {
                        (raw, 0)
                    };
                    if member_name == name {
                        return Some(Member {
                            bit_offset,
                            bit_size,
                            type_id,
                        });
                    }
                    if member_name.is_empty() {
                        let inner = self.member_of(type_id, name, depth + 1)?;
                        return Some(Member {
                            bit_offset: bit_offset + inner.bit_offset,
                            ..inner
                        });
                    }
                    None
                })
            }
            _ => None,
        }
    }

    fn string(&self, offset: u32) -> &str {
        let start = self.strings.0 + offset as usize;
        let bytes = self.data.get(start..self.strings.1).unwrap_or_default();
        let len = bytes.iter().position(|b| *b == 0).unwrap_or(0);
        bytes
            .get(..len)
            .and_then(|b| std::str::from_utf8(b).ok())
            .unwrap_or_default()
    }
}

fn u16_at(data: &[u8], at: usize) -> Option<u16> {
    data.get(at..at + 2)?.try_into().ok().map(u16::from_le_bytes)
}

fn u32_at(data: &[u8], at: usize) -> Option<u32> {
    data.get(at..at.checked_add(4)?)?
        .try_into()
        .ok()
        .map(u32::from_le_bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn refuses_garbage() {
        assert!(KernelTypes::parse(vec![]).is_err());
        assert!(KernelTypes::parse(vec![0x9f, 0xeb, 1, 0, 24, 0, 0, 0]).is_err());
        let mut header = vec![0x9f, 0xeb, 1, 0, 24, 0, 0, 0];
        for word in [0u32, 0xffff_ffff, 0, 1] {
            header.extend(word.to_le_bytes());
        }
        assert!(KernelTypes::parse(header).is_err());
    }

    #[test]
    fn knows_the_running_kernel() {
        let Ok(types) = KernelTypes::load() else {
            println!("SKIPPED: this kernel has no BTF");
            return;
        };
        // Laid down by the kernel's own static assertions and the network header's layout.
        assert_eq!(types.offset("sock_common", "skc_daddr"), Some(0));
        assert_eq!(types.offset("sock_common", "skc_rcv_saddr"), Some(4));
        assert_eq!(types.offset("sock", "__sk_common.skc_daddr"), Some(0));
        let cloned = types.member("sk_buff", "cloned").unwrap();
        assert_eq!(cloned.bit_size, 1);
        assert_eq!(types.offset("sk_buff", "cloned"), None);
        assert_eq!(types.offset("sock", "no_such_member"), None);
        assert_eq!(types.size("upid"), Some(16));
        assert_eq!(types.enumerator("SOCK_DONE"), Some(1));
        assert!(matches!(types.parameters("inet_csk_accept"), Some(2 | 4)));
        assert_eq!(types.parameters("no_such_function"), None);
    }
}
