//! The runtime's table of functions, and where the code that it speaks of begins.
//!
//! ```text
//! header ▶ names: offset of a name ▶ function table: entry and description ▶ description: offset of its name
//! ```
//! Since Go 1.18 entries are counted from where the code begins. The table says that up to 1.25, unless the linker leaves it
//! to the loader; the runtime's description of the module, `moduledata`, always does. It is found by what points to the table,
//! and believed if it says the same of the first and the last function.

use memchr::memmem;
use object::elf::{R_AARCH64_RELATIVE, R_X86_64_RELATIVE};

use super::{
    GoError,
    image::{Image, Machine, Range, Section, half, word},
};

/// Functions that a program may have; the largest known have some 300,000.
const FUNCTIONS_MAX: u64 = 4 << 20;
/// Places that may point to the table.
const HINTS_MAX: usize = 64;
/// Bytes of a table's header.
const HEAD: u64 = 72;
/// The functions that are looked for; with what stands around each in the table of names.
const NAMES: [&[u8]; FUNCTIONS] = [
    b"\0crypto/tls.(*Conn).Write\0",
    b"\0crypto/tls.(*Conn).Read\0",
    b"\0crypto/tls.(*Conn).Close\0",
    b"\0crypto/tls.(*Conn).clientHandshake\0",
    b"\0crypto/tls.(*Conn).serverHandshake\0",
];
/// How many.
const FUNCTIONS: usize = 5;
/// Bytes of an entry of relocations.
const RELOCATION: usize = 24;

/// In `moduledata`: the table of names; the first and the last address; where the code begins.
const MODULE_NAMES: u64 = 8;
const MODULE_FIRST: u64 = 160;
const MODULE_LAST: u64 = 168;
const MODULE_TEXT: u64 = 176;

/// Code of the functions, by name.
pub(super) type Functions = [Option<Range>; FUNCTIONS];

/// The layouts that are known, by the version of Go that they came with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    /// Go 1.16 and 1.17.
    V116,
    /// Go 1.18 and 1.19; 1.20 and later changed what is not read here.
    V118,
}

/// The table, found.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table {
    layout: Layout,
    address: u64,
    /// Number of functions.
    count: u64,
    names: Range,
    functions: Range,
    /// Where the code begins, as the table has it; 0 if it does not say.
    text: u64,
}

impl Table {
    /// Looks for the table, by section, else by its first bytes.
    pub(super) fn find(image: &Image<'_>) -> Result<Self, GoError> {
        if image.machine == Machine::Other {
            return Err(GoError::Machine);
        }
        // In position-independent programs its name may have a prefix.
        let named = image
            .sections
            .iter()
            .find(|section| section.name.ends_with(b".gopclntab"));
        if let Some(section) = named {
            return Self::parse(image, section.range());
        }
        for segment in image.segments.iter().filter(|segment| !segment.executable) {
            let range = Range {
                address: segment.address,
                size: segment.size,
            };
            // The low byte of the magic number differs by version.
            let found = image.window(range)?.parts(8, |at, part| {
                memmem::find_iter(part, b"\xff\xff\xff\0\0").find_map(|found| {
                    let before = at.checked_add(found as u64)?.checked_sub(1)?;
                    let table = Range {
                        address: range.address.checked_add(before)?,
                        size: range.size.checked_sub(before)?,
                    };
                    table
                        .address
                        .is_multiple_of(8)
                        .then(|| Self::parse(image, table).ok())
                        .flatten()
                })
            })?;
            if let Some(table) = found {
                return Ok(table);
            }
        }
        Err(GoError::Table(
            "it has no section of that name, and nothing in it looks like it",
        ))
    }

    fn parse(image: &Image<'_>, range: Range) -> Result<Self, GoError> {
        let head = image.at(range.address, HEAD.min(range.size))?;
        let quantum = if image.machine.is_arm() { 4 } else { 1 };
        let layout = match head.first_chunk() {
            Some([magic, 0xff, 0xff, 0xff, 0, 0, unit, 8]) if *unit == quantum => match magic {
                0xf0 | 0xf1 => Layout::V118,
                0xfa => Layout::V116,
                0xfb => return Err(GoError::Old("a Go before 1.16".to_owned())),
                _ => return Err(GoError::Table("its layout is not known")),
            },
            _ => return Err(GoError::Table("its first bytes are not known")),
        };
        let field = |at: usize| word(&head, 8 * at).ok_or(GoError::Table("it is cut short"));
        let (text, first) = match layout {
            Layout::V116 => (0, 3),
            Layout::V118 => (field(3)?, 4),
        };
        let (count, names, after_names, functions) = (field(1)?, field(first)?, field(first + 1)?, field(first + 4)?);
        let sub = |offset: u64, end: u64| {
            let size = end.checked_sub(offset)?;
            Some(Range {
                address: range.address.checked_add(offset).filter(|_| end <= range.size)?,
                size,
            })
        };
        if !(1..=FUNCTIONS_MAX).contains(&count) {
            return Err(GoError::Table("it has too many functions"));
        }
        let apart = GoError::Table("its parts are not in it");
        let (Some(names), Some(functions)) = (sub(names, after_names), sub(functions, range.size)) else {
            return Err(apart);
        };
        Ok(Self {
            layout,
            address: range.address,
            count,
            names,
            functions,
            text,
        })
    }

    /// True if a program with this table may pass arguments on the stack.
    pub(super) fn is_old(&self) -> bool {
        self.layout == Layout::V116
    }

    /// Code of the functions, in the order of their names; `None` if the program has no `Write` or no `Read`. The linker leaves
    /// out what is not called.
    pub(super) fn functions(&self, image: &Image<'_>) -> Result<Option<Functions>, GoError> {
        let Some(names) = self.name_offsets(image)? else {
            return Ok(None);
        };
        let entries = self.entries(image, names)?;
        let text = match self.layout {
            Layout::V116 => 0,
            Layout::V118 => self.code_start(image)?,
        };
        let at = |range: Range| {
            let address = text.checked_add(range.address).filter(|address| *address != 0);
            let address = address.ok_or(GoError::Table("it does not say where functions are"))?;
            Ok::<_, GoError>(Range { address, ..range })
        };
        let mut functions = [None; FUNCTIONS];
        for (function, entry) in functions.iter_mut().zip(entries) {
            *function = entry.map(at).transpose()?;
        }
        Ok(Some(functions))
    }

    fn name_offsets(&self, image: &Image<'_>) -> Result<Option<[Option<u32>; FUNCTIONS]>, GoError> {
        let mut found = [None; FUNCTIONS];
        let overlap = NAMES.iter().map(|name| name.len()).max().unwrap_or_default();
        image.window(self.names)?.parts(overlap, |at, part| {
            for (name, found) in NAMES.iter().zip(&mut found) {
                if found.is_none()
                    && let Some(within) = memmem::find(part, name)
                {
                    *found = u32::try_from(at + within as u64 + 1).ok();
                }
            }
            found.iter().all(Option::is_some).then_some(())
        })?;
        Ok(matches!(found, [Some(_), Some(_), ..]).then_some(found))
    }

    /// Bytes of an entry: a function, and where it is described.
    fn entry_size(&self) -> usize {
        match self.layout {
            Layout::V116 => 16,
            Layout::V118 => 8,
        }
    }

    /// Entry and description as the table has them.
    fn entry(&self, bytes: &[u8]) -> Option<(u64, u64)> {
        Some(match self.layout {
            Layout::V116 => (word(bytes, 0)?, word(bytes, 8)?),
            Layout::V118 => (half(bytes, 0)?.into(), half(bytes, 4)?.into()),
        })
    }

    /// Ends of the entries, as the table has them: the first function's, and what follows the last.
    fn bounds(&self, image: &Image<'_>) -> Result<(u64, u64), GoError> {
        let (size, damaged) = (self.entry_size(), GoError::Damaged("its table of functions"));
        let mut table = image.window(self.functions)?;
        let Some((first, _)) = self.entry(table.get(0, size)?) else {
            return Err(damaged);
        };
        // Only half of an entry is there.
        let last = table.get(self.count * size as u64, size / 2)?;
        let last = match self.layout {
            Layout::V116 => word(last, 0),
            Layout::V118 => half(last, 0).map(u64::from),
        };
        last.map(|last| (first, last)).ok_or(damaged)
    }

    /// Entries of the functions with these names.
    fn entries(&self, image: &Image<'_>, names: [Option<u32>; FUNCTIONS]) -> Result<Functions, GoError> {
        let (size, damaged) = (self.entry_size(), || GoError::Damaged("its table of functions"));
        let (mut table, mut descriptions) = (image.window(self.functions)?, image.window(self.functions)?);
        // In a description the name follows the function's entry.
        let name_at = size as u64 / 2;
        let mut found = [None; FUNCTIONS];
        for index in 0..self.count {
            let bytes = table.get(index * size as u64, size + size / 2)?;
            let (start, described) = self.entry(bytes).ok_or_else(damaged)?;
            let end = match self.layout {
                Layout::V116 => word(bytes, size),
                Layout::V118 => half(bytes, size).map(u64::from),
            };
            let name = descriptions.get(described.checked_add(name_at).ok_or_else(damaged)?, 4)?;
            let name = half(name, 0).ok_or_else(damaged)?;
            if let Some(found) = names
                .iter()
                .position(|wanted| *wanted == Some(name))
                .and_then(|at| found.get_mut(at))
            {
                let size = end.and_then(|end| end.checked_sub(start)).ok_or_else(damaged)?;
                *found = Some(Range { address: start, size });
            }
            if names
                .iter()
                .zip(&found)
                .all(|(wanted, found)| wanted.is_none() || found.is_some())
            {
                return Ok(found);
            }
        }
        Err(GoError::Table("it names crypto/tls, and does not say where it is"))
    }

    /// Where the code begins that entries are counted from.
    fn code_start(&self, image: &Image<'_>) -> Result<u64, GoError> {
        let bounds = self.bounds(image)?;
        let named = image.section(b".go.module").map(|section: &Section| section.address);
        if let Some(text) = named
            .map(|hint| self.by_module(image, bounds, &[hint]))
            .transpose()?
            .flatten()
        {
            return Ok(text);
        }
        let hints = self.hints(image)?;
        if let Some(text) = self.by_module(image, bounds, &hints)? {
            return Ok(text);
        }
        Some(self.text)
            .filter(|text| *text != 0)
            .ok_or(GoError::Table("where its code begins is not told"))
    }

    /// What points to the table: the first word of `moduledata` does.
    fn hints(&self, image: &Image<'_>) -> Result<Vec<u64>, GoError> {
        let mut hints = Vec::new();
        for segment in image
            .segments
            .iter()
            .filter(|segment| segment.writable && segment.size > 0)
        {
            let range = Range {
                address: segment.address,
                size: segment.size,
            };
            let wanted = self.address.to_le_bytes();
            image.window(range)?.parts(8, |at, part| {
                let found = memmem::find_iter(part, &wanted).map(|found| range.address.wrapping_add(at + found as u64));
                hints.extend(found.filter(|address| address % 8 == 0));
                (hints.len() >= HINTS_MAX).then_some(())
            })?;
        }
        relocations(image, |place, value| {
            if value == self.address && hints.len() < HINTS_MAX {
                hints.push(place);
            }
        })?;
        hints.truncate(HINTS_MAX);
        Ok(hints)
    }

    /// Asks what may be `moduledata`, at these addresses.
    fn by_module(&self, image: &Image<'_>, (first, last): (u64, u64), hints: &[u64]) -> Result<Option<u64>, GoError> {
        const FIELDS: [u64; 5] = [0, MODULE_NAMES, MODULE_FIRST, MODULE_LAST, MODULE_TEXT];
        // What is in the file, and what the loader will put there.
        let mut words: Vec<[u64; 5]> = hints
            .iter()
            .map(|hint| {
                FIELDS.map(|field| {
                    let bytes = hint.checked_add(field).and_then(|at| image.at(at, 8).ok());
                    bytes.and_then(|bytes| word(&bytes, 0)).unwrap_or(0)
                })
            })
            .collect();
        relocations(image, |place, value| {
            for (hint, words) in hints.iter().zip(&mut words) {
                let within = place.wrapping_sub(*hint);
                for (_, word) in FIELDS.iter().zip(words).filter(|(field, _)| **field == within) {
                    *word = value;
                }
            }
        })?;
        Ok(words.into_iter().find_map(|[table, names, min, max, text]| {
            let right = table == self.address
                && names == self.names.address
                && min == text.wrapping_add(first)
                && max == text.wrapping_add(last);
            right.then_some(text)
        }))
    }
}

/// Shows each word that the loader writes, with its place; addresses are those of the file.
fn relocations(image: &Image<'_>, mut each: impl FnMut(u64, u64)) -> Result<(), GoError> {
    let Some(range) = image.relocations else { return Ok(()) };
    let kind = match image.machine {
        Machine::Arm64 => R_AARCH64_RELATIVE,
        _ => R_X86_64_RELATIVE,
    };
    let mut table = image.window(range)?;
    let mut at = 0;
    while at + RELOCATION as u64 <= table.size() {
        let entry = table.get(at, RELOCATION)?;
        if let (Some(place), Some(info), Some(value)) = (word(entry, 0), word(entry, 8), word(entry, 16))
            && info & 0xffff_ffff == u64::from(kind)
        {
            each(place, value);
        }
        at += RELOCATION as u64;
    }
    Ok(())
}
