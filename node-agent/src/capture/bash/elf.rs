//! What an executable or a library has to do with `readline`, from its symbols.
//!
//! Lines are read at the instructions with which the function returns, not by a probe of its return: that one is set as a
//! call begins, and a shell that waits for its user is inside of the call already.
//!
//! Files are read in parts, not mapped: one that is cut short by its owner while it is looked at gives an error here, and
//! would end the process there. Sections that claim to be larger than any such program's are not read. Entry: [`inspect`].

use std::{
    fs::File,
    io::{Seek as _, SeekFrom},
};

use iced_x86::{Decoder, DecoderOptions, Mnemonic};
use object::{
    Endianness, FileKind, ReadCache, ReadRef,
    elf::{EM_386, EM_AARCH64, EM_X86_64, FileHeader32, FileHeader64, PT_LOAD, SHN_UNDEF, SHT_DYNSYM, SHT_SYMTAB},
    read::elf::{FileHeader, ProgramHeader as _, SectionHeader as _, Sym as _},
};

/// The function that reads a line.
const READLINE: &[u8] = b"readline";
/// A variable that every bash has.
const BASH: &[u8] = b"interactive_shell";
/// Bytes of symbols, or of their names, that are read of a program that nothing says is a bash. Bash has a tenth of it.
const GUESS_MAX: u64 = 1 << 20;
/// The same of one that is called bash, and of libraries.
const KNOWN_MAX: u64 = 32 << 20;

/// Bytes of the function at most; it has some hundred.
const FUNCTION_MAX: u64 = 1 << 16;
/// Returns of it at most.
const RETURNS_MAX: usize = 32;

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Image {
    /// File offsets of the instructions with which the function `readline` returns, if it is in here.
    pub(super) readline: Option<Vec<u64>>,
    /// It is in a library.
    pub(super) imports: bool,
    /// The program is a bash by its symbols.
    pub(super) is_bash: bool,
}

/// Why a file could not be looked into.
#[derive(Debug, thiserror::Error)]
pub(super) enum ElfError {
    /// Not an executable or library, or a damaged one.
    #[error("{0}")]
    Format(#[from] object::Error),
    /// No file to read.
    #[error(transparent)]
    Read(#[from] std::io::Error),
    /// The function is not made of what is expected.
    #[error("the returns of its readline cannot be made out")]
    Code,
    /// Of another kind.
    #[error("it is no ELF file with sections")]
    Other,
}

/// Looks for `readline`. With `known`, also where only a program that is one already is worth the time.
///
/// # Errors
/// If the file is damaged or no ELF file.
pub(super) fn inspect(file: &File, known: bool) -> Result<Image, ElfError> {
    let mut file = file;
    file.seek(SeekFrom::Start(0))?;
    let cache = ReadCache::new(file);
    match FileKind::parse(&cache)? {
        FileKind::Elf64 => look::<FileHeader64<Endianness>, _>(&cache, known),
        FileKind::Elf32 => look::<FileHeader32<Endianness>, _>(&cache, known),
        _ => Err(ElfError::Other),
    }
}

fn look<'data, Elf: FileHeader<Endian = Endianness>, R: ReadRef<'data>>(
    data: R,
    known: bool,
) -> Result<Image, ElfError> {
    let header = Elf::parse(data)?;
    let endian = header.endian()?;
    // More sections or segments than the header can count are in no such program, and could be any number.
    if header.e_shnum(endian) == 0 || header.e_phnum(endian) == u16::MAX {
        return Err(ElfError::Other);
    }
    let sections = header.sections(endian, data)?;
    let max = if known { KNOWN_MAX } else { GUESS_MAX };
    let mut image = Image::default();
    // What is exported first: it is small, and stays when a file is stripped.
    for wanted in [SHT_DYNSYM, SHT_SYMTAB] {
        if wanted == SHT_SYMTAB && (!known || image.readline.is_some() || image.imports) {
            break;
        }
        // One is all there is, in files that mean well.
        if let Some(section) = sections.iter().find(|section| section.sh_type(endian) == wanted) {
            let names = sections.section(section.link(endian))?;
            let size: u64 = section.sh_size(endian).into();
            if size > max || names.sh_size(endian).into() > max {
                continue;
            }
            let symbols: &[Elf::Sym] = section.data_as_array(endian, data)?;
            let names = names.data(endian, data)?;
            for symbol in symbols {
                let name = name_at(names, symbol.st_name(endian));
                if name == BASH {
                    image.is_bash = true;
                } else if name == READLINE {
                    if symbol.st_shndx(endian) == SHN_UNDEF {
                        image.imports = true;
                    } else {
                        let (address, size) = (symbol.st_value(endian).into(), symbol.st_size(endian).into());
                        if let Some(offset) = file_offset::<Elf, R>(header, endian, data, address)? {
                            image.readline = Some(returns(header.e_machine(endian), data, offset, size)?);
                        }
                    }
                }
            }
        }
    }
    Ok(image)
}

fn name_at(names: &[u8], at: u32) -> &[u8] {
    let rest = usize::try_from(at)
        .ok()
        .and_then(|at| names.get(at..))
        .unwrap_or_default();
    let end = memchr::memchr(0, rest).unwrap_or(0);
    rest.get(..end).unwrap_or_default()
}

/// Where in the file a function's instructions are that return.
fn returns<'data, R: ReadRef<'data>>(machine: u16, data: R, offset: u64, size: u64) -> Result<Vec<u64>, ElfError> {
    let code = Some(size)
        .filter(|size| (1..=FUNCTION_MAX).contains(size))
        .and_then(|size| data.read_bytes_at(offset, size).ok())
        .ok_or(ElfError::Code)?;
    let mut found = Vec::new();
    match machine {
        EM_X86_64 | EM_386 => {
            let bits = if machine == EM_386 { 32 } else { 64 };
            for instruction in Decoder::with_ip(bits, code, offset, DecoderOptions::NONE) {
                if instruction.is_invalid() {
                    return Err(ElfError::Code);
                }
                if instruction.mnemonic() == Mnemonic::Ret {
                    found.push(instruction.ip());
                }
            }
        }
        EM_AARCH64 => {
            let words = code.chunks_exact(4).zip((offset..).step_by(4));
            // `ret`, by way of the link register.
            found.extend(
                words
                    .filter(|(word, _)| *word == [0xc0, 0x03, 0x5f, 0xd6])
                    .map(|(_, at)| at),
            );
        }
        _ => {}
    }
    if found.is_empty() || found.len() > RETURNS_MAX {
        return Err(ElfError::Code);
    }
    Ok(found)
}

/// Where in the file the code of an address is.
fn file_offset<'data, Elf: FileHeader<Endian = Endianness>, R: ReadRef<'data>>(
    header: &Elf,
    endian: Endianness,
    data: R,
    address: u64,
) -> Result<Option<u64>, ElfError> {
    for segment in header.program_headers(endian, data)? {
        let (start, size): (u64, u64) = (segment.p_vaddr(endian).into(), segment.p_filesz(endian).into());
        if segment.p_type(endian) == PT_LOAD
            && let Some(within) = address.checked_sub(start).filter(|within| *within < size)
        {
            return Ok(within.checked_add(segment.p_offset(endian).into()));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::{io::Write as _, process::Command};

    use super::*;

    fn of(path: &str, known: bool) -> Option<Image> {
        inspect(&File::open(path).ok()?, known).ok()
    }

    /// What binutils say of the same file: the returns of its dynamic symbol, and where they are in the file.
    fn by_binutils(path: &str) -> Option<Vec<u64>> {
        let say = |program: &str, options: &[&str]| {
            let output = Command::new(program).args(options).arg(path).output().ok()?;
            Some(String::from_utf8_lossy(&output.stdout).into_owned())
        };
        let run = |option: &str| say("readelf", &["-W", option]);
        let hex = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).ok();
        let symbols = run("--dyn-syms")?;
        let line = symbols
            .lines()
            .find(|line| line.split_whitespace().nth(7).is_some_and(|name| name == "readline"))?;
        let address = hex(line.split_whitespace().nth(1)?)?;
        let size: u64 = line.split_whitespace().nth(2)?.parse().ok()?;
        let code = say(
            "objdump",
            &[
                "-d",
                &format!("--start-address={address}"),
                &format!("--stop-address={}", address + size),
            ],
        )?;
        let returns = code.lines().filter_map(|line| {
            let (at, rest) = line.trim().split_once(":\t")?;
            rest.split('\t').any(|word| word.trim() == "ret").then(|| hex(at))?
        });
        let shift = run("--segments")?.lines().find_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let [kind, offset, start, _, size, ..] = words.as_slice() else {
                return None;
            };
            let (offset, start, size) = (hex(offset)?, hex(start)?, hex(size)?);
            (*kind == "LOAD" && (start..start + size).contains(&address)).then(|| start - offset)
        })?;
        Some(returns.map(|address| address - shift).collect())
    }

    #[test]
    fn finds_readline_where_binutils_do() {
        let Some(bash) = of("/bin/bash", true) else {
            println!("SKIPPED: this machine has no bash");
            return;
        };
        assert!(bash.is_bash);
        assert_eq!(of("/bin/bash", false), Some(bash.clone()), "whatever it is called");
        if let Some(returns) = by_binutils("/bin/bash") {
            assert!(!returns.is_empty());
            assert_eq!((bash.readline, bash.imports), (Some(returns), false));
        } else {
            println!("SKIPPED: no binutils");
        }
    }

    #[test]
    fn other_programs_are_none() {
        let own = std::env::current_exe().unwrap();
        let image = of(own.to_str().unwrap(), true).unwrap();
        assert_eq!(image, Image::default());
    }

    #[test]
    fn damaged_files_are_refused() {
        let Ok(bash) = std::fs::read("/bin/bash") else { return };
        let mut file = tempfile::tempfile().unwrap();
        for length in [0, 3, 16, 63, 64, 4096, bash.len() / 2, bash.len() - 1] {
            file.set_len(0).unwrap();
            file.seek(SeekFrom::Start(0)).unwrap();
            file.write_all(&bash[..length]).unwrap();
            assert!(inspect(&file, true).is_err(), "{length}");
        }
        // Section headers that claim the moon.
        let mut bad = bash.clone();
        for at in (bash.len() - 1500..bash.len()).step_by(7) {
            bad[at] = 0xff;
        }
        file.set_len(0).unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.write_all(&bad).unwrap();
        let _ = inspect(&file, true);
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(200))]
        /// Whatever a file says of itself.
        #[test]
        fn any_header_is_taken_or_refused(at in proptest::collection::vec((0..64usize, proptest::num::u8::ANY), 1..8)) {
            let Ok(mut bytes) = std::fs::read("/proc/self/exe").map(|mut bytes| { bytes.truncate(100_000); bytes }) else {
                return Ok(());
            };
            for (at, value) in at {
                bytes[at] = value;
            }
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&bytes).unwrap();
            let _ = inspect(&file, true);
        }
    }
}
