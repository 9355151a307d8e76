//! Whether a program is built by Go, and by which version: the linker's note of it.

use memchr::memmem;

use super::{
    GoError,
    image::{Image, Range, WINDOW, word},
};

/// Start of the note.
const MAGIC: &[u8] = b"\xff Go buildinf:";
/// It begins at a multiple of it.
const ALIGN: u64 = 16;
/// Bytes before the strings.
const HEAD: u64 = 32;
/// The strings follow, instead of addresses of them (Go 1.18 and later).
const INLINE: u8 = 2;
/// Bytes of a version.
const VERSION_MAX: u64 = 256;
/// Bytes of the data that are searched where a program has no sections; the note is near its start.
const SEARCH_MAX: u64 = 1 << 20;
/// Kind and owner of the note of Go's linker that names the build.
const NOTE: &[u8] = b"\x04\0\0\0Go\0\0";
/// Bytes of notes that are looked at.
const NOTE_MAX: u64 = 4096;

/// The version of Go that built the program, empty if that is not told; `None` if it was not built by Go.
pub(super) fn find(image: &Image<'_>) -> Result<Option<String>, GoError> {
    let named = image.section(b".go.buildinfo");
    if let Some(section) = named {
        return Ok(Some(version(image, section.address).unwrap_or_default()));
    }
    let is_go = image
        .sections
        .iter()
        .any(|section| section.name.ends_with(b".gopclntab"))
        || image.notes.iter().any(|note| {
            let note = image.at(note.address, note.size.min(NOTE_MAX));
            note.is_ok_and(|note| memmem::find(&note, NOTE).is_some())
        });
    if !is_go && !image.sections.is_empty() {
        return Ok(None);
    }
    // All names are gone, or some.
    for segment in image
        .segments
        .iter()
        .filter(|segment| segment.size > 0 && !segment.executable)
    {
        let range = Range {
            address: segment.address,
            size: segment.size.min(SEARCH_MAX),
        };
        let overlap = MAGIC.len();
        let found = image.window(range)?.parts(overlap, |at, part| {
            let found = memmem::find_iter(part, MAGIC).map(|found| range.address.wrapping_add(at + found as u64));
            { found }.find(|address| address % ALIGN == 0)
        })?;
        if let Some(address) = found {
            return Ok(Some(version(image, address).unwrap_or_default()));
        }
    }
    Ok(is_go.then(String::new))
}

fn version(image: &Image<'_>, address: u64) -> Option<String> {
    let head = image.at(address, HEAD).ok()?;
    if !head.starts_with(MAGIC) {
        return None;
    }
    let text = if head.get(15)? & INLINE != 0 {
        let start = address.checked_add(HEAD)?;
        let lead = image.at(start, 2).ok()?;
        let (first, second) = (*lead.first()?, *lead.get(1)?);
        // A number of variable length; 255 needs two bytes.
        let (size, used) = match first {
            ..0x80 => (u64::from(first), 1),
            _ => (u64::from(first & 0x7f) | u64::from(second) << 7, 2),
        };
        image.at(start + used, size.min(VERSION_MAX)).ok()?
    } else {
        // A string of Go: address and length.
        let string = image.at(word(&head, 16)?, 16).ok()?;
        image.at(word(&string, 0)?, word(&string, 8)?.min(VERSION_MAX)).ok()?
    };
    let text = String::from_utf8(text).ok()?;
    text.chars().all(|c| c.is_ascii_graphic() || c == ' ').then_some(text)
}

/// The N of "go1.N", however it goes on; a version under development is told as "devel go1.N-...".
pub(super) fn minor(version: &str) -> Option<u32> {
    let (_, rest) = version.split_once("go1.")?;
    let digits = rest.split(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse().ok()
}

const _: () = assert!(HEAD + VERSION_MAX < WINDOW as u64);
