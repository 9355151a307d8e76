//! An ELF file, read in parts: its segments, its sections, and bytes of it within a budget.

use std::{cell::Cell, fs::File, io, os::unix::fs::FileExt as _};

use object::{
    LittleEndian,
    elf::{
        DT_RELA, DT_RELASZ, ELFCLASS64, ELFDATA2LSB, ELFMAG, EM_AARCH64, EM_X86_64, FileHeader64, PF_W, PF_X,
        PT_DYNAMIC, PT_LOAD, PT_NOTE, ProgramHeader64, SHT_NOBITS, SectionHeader64,
    },
    pod::{from_bytes, slice_from_bytes},
};

use super::GoError;

/// Bytes that are read of one file in all. The tables of a program of 200 MB are a quarter of it.
const BUDGET: u64 = 256 << 20;
/// Bytes that are read at a time.
pub(super) const WINDOW: usize = 64 << 10;
/// Segments and sections that a program may have; Go's have some forty.
const SEGMENTS_MAX: u16 = 64;
const SECTIONS_MAX: u16 = 1024;
/// Bytes of the sections' names.
const NAMES_MAX: u64 = 64 << 10;
/// Entries of the dynamic section.
const DYNAMIC_MAX: u64 = 512;

/// What code is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Machine {
    Amd64,
    Arm64,
    Other,
}

/// A part of the file that is loaded.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    pub(super) address: u64,
    pub(super) offset: u64,
    /// Bytes in the file.
    pub(super) size: u64,
    pub(super) writable: bool,
    pub(super) executable: bool,
}

/// A section with content.
#[derive(Clone, Debug)]
pub(super) struct Section {
    pub(super) name: Vec<u8>,
    pub(super) address: u64,
    pub(super) size: u64,
}

/// Addresses from here on, so many bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) address: u64,
    pub(super) size: u64,
}

/// The file.
pub(super) struct Image<'f> {
    file: &'f File,
    left: Cell<u64>,
    pub(super) machine: Machine,
    pub(super) segments: Vec<Segment>,
    /// Empty if the file has none.
    pub(super) sections: Vec<Section>,
    /// What the linker noted.
    pub(super) notes: Vec<Range>,
    /// Relocations with addends.
    pub(super) relocations: Option<Range>,
}

impl Machine {
    pub(super) fn is_arm(self) -> bool {
        self == Self::Arm64
    }
}

impl Section {
    pub(super) fn range(&self) -> Range {
        Range {
            address: self.address,
            size: self.size,
        }
    }
}

impl<'f> Image<'f> {
    /// Reads the headers; `None` if it is no 64-bit little-endian ELF file.
    pub(super) fn open(file: &'f File) -> Result<Option<Self>, GoError> {
        let mut this = Self {
            file,
            left: Cell::new(BUDGET),
            machine: Machine::Other,
            segments: Vec::new(),
            sections: Vec::new(),
            notes: Vec::new(),
            relocations: None,
        };
        let head = this.bytes(0, size_of::<FileHeader64<LittleEndian>>() as u64)?;
        let (head, _) = from_bytes::<FileHeader64<LittleEndian>>(&head).map_err(|()| GoError::Damaged("its header"))?;
        let ident = &head.e_ident;
        if ident.magic != ELFMAG || ident.class != ELFCLASS64 || ident.data != ELFDATA2LSB {
            return Ok(None);
        }
        let endian = LittleEndian;
        this.machine = match head.e_machine.get(endian) {
            EM_X86_64 => Machine::Amd64,
            EM_AARCH64 => Machine::Arm64,
            _ => Machine::Other,
        };
        let dynamic = this.read_segments(head)?;
        // Sections are of help only: a program runs without.
        if this.read_sections(head).is_err() {
            this.sections.clear();
        }
        this.relocations = dynamic.and_then(|range| this.find_relocations(range));
        Ok(Some(this))
    }

    /// Reads segments; tells where the dynamic section is.
    fn read_segments(&mut self, head: &FileHeader64<LittleEndian>) -> Result<Option<Range>, GoError> {
        let endian = LittleEndian;
        let count = head.e_phnum.get(endian);
        if count > SEGMENTS_MAX {
            return Err(GoError::Damaged("it has too many segments"));
        }
        let size = size_of::<ProgramHeader64<LittleEndian>>() as u64;
        let table = self.bytes(head.e_phoff.get(endian), size * u64::from(count))?;
        let (headers, _) = slice_from_bytes::<ProgramHeader64<LittleEndian>>(&table, count.into())
            .map_err(|()| GoError::Damaged("its segments"))?;
        let mut dynamic = None;
        for header in headers {
            let (address, size) = (header.p_vaddr.get(endian), header.p_filesz.get(endian));
            match header.p_type.get(endian) {
                PT_LOAD => self.segments.push(Segment {
                    address,
                    offset: header.p_offset.get(endian),
                    size,
                    writable: header.p_flags.get(endian) & PF_W != 0,
                    executable: header.p_flags.get(endian) & PF_X != 0,
                }),
                PT_NOTE => self.notes.push(Range { address, size }),
                PT_DYNAMIC => dynamic = Some(Range { address, size }),
                _ => {}
            }
        }
        Ok(dynamic)
    }

    fn read_sections(&mut self, head: &FileHeader64<LittleEndian>) -> Result<(), GoError> {
        let endian = LittleEndian;
        let count = head.e_shnum.get(endian);
        if count == 0 || count > SECTIONS_MAX {
            return Ok(());
        }
        let size = size_of::<SectionHeader64<LittleEndian>>() as u64;
        let table = self.bytes(head.e_shoff.get(endian), size * u64::from(count))?;
        let damaged = GoError::Damaged("its sections");
        let Ok((headers, _)) = slice_from_bytes::<SectionHeader64<LittleEndian>>(&table, count.into()) else {
            return Err(damaged);
        };
        let Some(names) = headers.get(usize::from(head.e_shstrndx.get(endian))) else {
            return Err(damaged);
        };
        let names = self.bytes(names.sh_offset.get(endian), names.sh_size.get(endian).min(NAMES_MAX))?;
        let name_at = |at: u32| {
            let rest = usize::try_from(at).ok().and_then(|at| names.get(at..));
            let rest = rest.unwrap_or_default();
            rest.split(|byte| *byte == 0).next().unwrap_or_default().to_vec()
        };
        let with_content = headers
            .iter()
            .filter(|header| header.sh_type.get(endian) != SHT_NOBITS && header.sh_addr.get(endian) != 0);
        self.sections = with_content
            .map(|header| Section {
                name: name_at(header.sh_name.get(endian)),
                address: header.sh_addr.get(endian),
                size: header.sh_size.get(endian),
            })
            .collect();
        Ok(())
    }

    fn find_relocations(&self, dynamic: Range) -> Option<Range> {
        let table = self.at(dynamic.address, dynamic.size.min(16 * DYNAMIC_MAX)).ok()?;
        let (mut address, mut size) = (None, None);
        for entry in table.chunks_exact(16) {
            match (word(entry, 0)?, word(entry, 8)?) {
                (tag, value) if tag == DT_RELA.cast_unsigned() => address = Some(value),
                (tag, value) if tag == DT_RELASZ.cast_unsigned() => size = Some(value),
                _ => {}
            }
        }
        Some(Range {
            address: address?,
            size: size?,
        })
    }

    /// A section by its name.
    pub(super) fn section(&self, name: &[u8]) -> Option<&Section> {
        self.sections.iter().find(|section| section.name == name)
    }

    /// Where in the file an address is, and how many bytes of its segment follow.
    pub(super) fn place(&self, address: u64) -> Option<(u64, u64)> {
        self.segments.iter().find_map(|segment| {
            let within = address.checked_sub(segment.address)?;
            let rest = segment.size.checked_sub(within).filter(|rest| *rest > 0)?;
            Some((segment.offset.checked_add(within)?, rest))
        })
    }

    /// Bytes at an address.
    pub(super) fn at(&self, address: u64, size: u64) -> Result<Vec<u8>, GoError> {
        let (offset, rest) = self
            .place(address)
            .ok_or(GoError::Damaged("an address is nowhere in it"))?;
        if size > rest {
            return Err(GoError::Damaged("an address is nowhere in it"));
        }
        self.bytes(offset, size)
    }

    /// Bytes of the file, some at a time only.
    fn bytes(&self, offset: u64, size: u64) -> Result<Vec<u8>, GoError> {
        let size = usize::try_from(size).ok().filter(|size| *size <= 2 * WINDOW);
        let mut bytes = vec![0; size.ok_or(GoError::Damaged("a part of it is too large"))?];
        self.fill(offset, &mut bytes)?;
        Ok(bytes)
    }

    fn fill(&self, offset: u64, to: &mut [u8]) -> Result<(), GoError> {
        let left = self.left.get().checked_sub(to.len() as u64);
        self.left.set(left.ok_or(GoError::Damaged("its tables are too large"))?);
        self.file.read_exact_at(to, offset)?;
        Ok(())
    }

    /// A range to be read from its start on; it ends where its segment does.
    pub(super) fn window(&self, range: Range) -> Result<Window<'_, 'f>, GoError> {
        let place = self.place(range.address);
        let (offset, rest) = place.ok_or(GoError::Damaged("an address is nowhere in it"))?;
        Ok(Window {
            image: self,
            offset,
            size: range.size.min(rest),
            start: 0,
            buffer: Vec::new(),
        })
    }
}

/// Looks at a range through a buffer. Best for a way from its start to its end.
pub(super) struct Window<'i, 'f> {
    image: &'i Image<'f>,
    offset: u64,
    size: u64,
    /// Where the buffer begins in the range.
    start: u64,
    buffer: Vec<u8>,
}

impl Window<'_, '_> {
    /// Bytes of it.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Some bytes of the range, fewer than the buffer has.
    pub(super) fn get(&mut self, at: u64, size: usize) -> Result<&[u8], GoError> {
        let end = at
            .checked_add(size as u64)
            .filter(|end| *end <= self.size && size <= WINDOW);
        let end = end.ok_or(GoError::Damaged("a table ends early"))?;
        if at < self.start || end > self.start + self.buffer.len() as u64 {
            let room = usize::try_from(self.size - at).map_or(WINDOW, |rest| rest.min(WINDOW));
            self.buffer.resize(room, 0);
            self.start = at;
            let (image, offset) = (self.image, self.offset);
            let offset = offset
                .checked_add(at)
                .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
            if let Err(error) = image.fill(offset, &mut self.buffer) {
                self.buffer.clear();
                return Err(error);
            }
        }
        let from = usize::try_from(at - self.start).unwrap_or(usize::MAX);
        from.checked_add(size)
            .and_then(|to| self.buffer.get(from..to))
            .ok_or(GoError::Damaged("a table ends early"))
    }

    /// All of it, part by part, with the place of each; parts overlap by so many bytes. Ends when `each` has an answer.
    pub(super) fn parts<T>(
        &mut self,
        overlap: usize,
        mut each: impl FnMut(u64, &[u8]) -> Option<T>,
    ) -> Result<Option<T>, GoError> {
        let (mut at, step) = (0, WINDOW.saturating_sub(overlap).max(1));
        while at < self.size {
            let size = usize::try_from(self.size - at).map_or(WINDOW, |rest| rest.min(WINDOW));
            if let Some(found) = each(at, self.get(at, size)?) {
                return Ok(Some(found));
            }
            at = at.saturating_add(step as u64);
        }
        Ok(None)
    }
}

/// A word of eight bytes.
pub(super) fn word(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|word| u64::from_le_bytes(*word))
}

/// A word of four bytes.
pub(super) fn half(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|word| u32::from_le_bytes(*word))
}
