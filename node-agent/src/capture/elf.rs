//! Functions of executables and libraries: where in the file they are, and where they return.
//!
//! Files are read in parts, not mapped: one that is cut short by its owner while it is looked at gives an error here, and
//! would end the process there. Sections that claim to be larger than any such program's are not read. Entry: [`symbols`].

use std::{
    fs::File,
    io::{Seek as _, SeekFrom},
};

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use object::{
    Endianness, FileKind, ReadCache, ReadRef,
    elf::{EM_386, EM_AARCH64, EM_X86_64, FileHeader32, FileHeader64, PT_LOAD, SHN_UNDEF, SHT_DYNSYM, SHT_SYMTAB},
    read::elf::{FileHeader, ProgramHeader as _, SectionHeader as _, Sym as _},
};

/// Bytes of a function at most.
const FUNCTION_MAX: u64 = 1 << 16;
/// Returns of it at most.
const RETURNS_MAX: usize = 32;

/// A symbol that was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Symbol {
    /// Which of the names.
    pub(super) name: usize,
    pub(super) place: Place,
}

/// Where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In another file.
    Elsewhere,
    /// In memory alone.
    Memory,
    /// In this file, here.
    Here(Code),
}

/// Code of a function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Code {
    /// File offset of its first instruction.
    pub(super) at: u64,
    /// Its ends.
    pub(super) exits: Exits,
    /// File offset of an instruction that every call runs first of all, its arguments being in place, and that the kernel
    /// need not step through; the first one if there is none.
    pub(super) early: u64,
    /// File offset of the function that does the work: it gets the same arguments. It begins with such an instruction.
    pub(super) inner: Option<u64>,
    /// File offsets of the functions that it calls directly.
    pub(super) calls: Vec<u64>,
}

/// How a function ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Exits {
    /// With these instructions and no other, by file offset.
    Returns(Vec<u64>),
    /// It goes on elsewhere, or its code cannot be followed. These are the returns that it shows, if all of it can be read.
    Elsewhere(Vec<u64>),
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
    /// Of another kind.
    #[error("it is no ELF file with sections")]
    Other,
}

/// How far a file is looked into.
#[derive(Clone, Copy, Debug)]
pub(super) struct Depth {
    /// Bytes of symbols, or of their names, that are read.
    pub(super) max: u64,
    /// Symbols that nobody else can use.
    pub(super) own: Own,
}

/// Whether symbols are looked at that nobody else can use, which files may be stripped of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Own {
    /// Never.
    Never,
    /// If there is none among the others.
    IfNone,
    /// Also for those that were not found among the others.
    Always,
}

/// Finds symbols by name, in the order of the file.
///
/// # Errors
/// If the file is damaged or no ELF file.
pub(super) fn symbols(file: &File, names: &[&str], depth: Depth) -> Result<Vec<Symbol>, ElfError> {
    let mut file = file;
    file.seek(SeekFrom::Start(0))?;
    let cache = ReadCache::new(file);
    match FileKind::parse(&cache)? {
        FileKind::Elf64 => look::<FileHeader64<Endianness>, _>(&cache, names, depth),
        FileKind::Elf32 => look::<FileHeader32<Endianness>, _>(&cache, names, depth),
        _ => Err(ElfError::Other),
    }
}

fn look<'data, Elf: FileHeader<Endian = Endianness>, R: ReadRef<'data>>(
    data: R,
    wanted: &[&str],
    depth: Depth,
) -> Result<Vec<Symbol>, ElfError> {
    let header = Elf::parse(data)?;
    let endian = header.endian()?;
    // More sections or segments than the header can count are in no such program, and could be any number.
    if header.e_shnum(endian) == 0 || header.e_phnum(endian) == u16::MAX {
        return Err(ElfError::Other);
    }
    let sections = header.sections(endian, data)?;
    let mut found: Vec<Symbol> = Vec::new();
    // What is exported first: it is small, and stays when a file is stripped.
    for kind in [SHT_DYNSYM, SHT_SYMTAB] {
        let enough = match depth.own {
            Own::Never => true,
            Own::IfNone => !found.is_empty(),
            Own::Always => found.len() == wanted.len(),
        };
        if kind == SHT_SYMTAB && enough {
            break;
        }
        // One is all there is, in files that mean well.
        if let Some(section) = sections.iter().find(|section| section.sh_type(endian) == kind) {
            let names = sections.section(section.link(endian))?;
            let size: u64 = section.sh_size(endian).into();
            if size > depth.max || names.sh_size(endian).into() > depth.max {
                continue;
            }
            let symbols: &[Elf::Sym] = section.data_as_array(endian, data)?;
            let names = names.data(endian, data)?;
            for symbol in symbols {
                let name = name_at(names, symbol.st_name(endian));
                let Some(name) = wanted.iter().position(|wanted| wanted.as_bytes() == name) else {
                    continue;
                };
                if found.iter().any(|found| found.name == name) {
                    continue;
                }
                let (address, size) = (symbol.st_value(endian).into(), symbol.st_size(endian).into());
                let place = if symbol.st_shndx(endian) == SHN_UNDEF {
                    Place::Elsewhere
                } else if let Some(at) = file_offset::<Elf, R>(header, endian, data, address)? {
                    Place::Here(code(header.e_machine(endian), data, at, size))
                } else {
                    Place::Memory
                };
                found.push(Symbol { name, place });
            }
        }
    }
    Ok(found)
}

fn name_at(names: &[u8], at: u32) -> &[u8] {
    let rest = usize::try_from(at)
        .ok()
        .and_then(|at| names.get(at..))
        .unwrap_or_default();
    let end = memchr::memchr(0, rest).unwrap_or(0);
    rest.get(..end).unwrap_or_default()
}

/// Looks at the instructions of a function.
fn code<'data, R: ReadRef<'data>>(machine: u16, data: R, at: u64, size: u64) -> Code {
    let bytes = Some(size)
        .filter(|size| (1..=FUNCTION_MAX).contains(size))
        .and_then(|size| data.read_bytes_at(at, size).ok())
        .unwrap_or_default();
    let mut found = Code {
        at,
        exits: exits(machine, bytes, at),
        early: at,
        inner: None,
        calls: Vec::new(),
    };
    if machine == EM_X86_64 {
        let decode = || Decoder::with_ip(64, bytes, at, DecoderOptions::NONE).into_iter();
        found.calls = decode()
            .filter(|instruction| instruction.mnemonic() == Mnemonic::Call && is_near(instruction))
            .map(|instruction| instruction.near_branch_target())
            .collect();
        let first = |at: u64| {
            let bytes = data.read_bytes_at(at, 16).unwrap_or_default();
            Decoder::with_ip(64, bytes, at, DecoderOptions::NONE).decode()
        };
        for instruction in decode() {
            if is_emulated(&instruction) {
                // What jumps there would be taken for another call.
                let again = decode()
                    .any(|other| is_near(&other) && (at..=instruction.ip()).contains(&other.near_branch_target()));
                if !again {
                    found.early = instruction.ip();
                }
                if instruction.mnemonic() == Mnemonic::Call {
                    found.inner = Some(instruction.near_branch_target()).filter(|inner| is_emulated(&first(*inner)));
                }
                break;
            }
            if !leaves_arguments(&instruction) {
                break;
            }
        }
    }
    found
}

/// A jump or call to a place that it names.
fn is_near(instruction: &Instruction) -> bool {
    matches!(
        instruction.op0_kind(),
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64
    )
}

/// True if the kernel does what the instruction does. Others it steps through, which costs a second trap, and an exit from a
/// virtual machine.
fn is_emulated(instruction: &Instruction) -> bool {
    match instruction.mnemonic() {
        Mnemonic::Push => instruction.op0_kind() == OpKind::Register,
        Mnemonic::Nop => instruction.len() == 1,
        _ => is_near(instruction),
    }
}

/// True for what compilers put at the begin of a function that leaves its arguments where they are.
fn leaves_arguments(instruction: &Instruction) -> bool {
    let written = match instruction.mnemonic() {
        Mnemonic::Endbr64 | Mnemonic::Test | Mnemonic::Cmp => return true,
        Mnemonic::Sub | Mnemonic::Mov | Mnemonic::Xor => instruction.op0_kind(),
        _ => return false,
    };
    match written {
        OpKind::Register => matches!(
            instruction.op0_register(),
            Register::RAX | Register::EAX | Register::RSP | Register::R10 | Register::R11
        ),
        // Its own stack.
        OpKind::Memory => instruction.memory_base() == Register::RSP,
        _ => false,
    }
}

/// Where in the file a function's instructions are that return.
fn exits(machine: u16, code: &[u8], offset: u64) -> Exits {
    if code.is_empty() {
        return Exits::Elsewhere(Vec::new());
    }
    let within = offset..offset + code.len() as u64;
    let (mut returns, mut all) = (Vec::new(), true);
    match machine {
        EM_X86_64 | EM_386 => {
            let bits = if machine == EM_386 { 32 } else { 64 };
            for instruction in Decoder::with_ip(bits, code, offset, DecoderOptions::NONE) {
                if instruction.is_invalid() {
                    return Exits::Elsewhere(Vec::new());
                }
                match instruction.mnemonic() {
                    Mnemonic::Ret => returns.push(instruction.ip()),
                    Mnemonic::Call => {}
                    // A jump, with a condition or without.
                    _ if is_near(&instruction) => all &= within.contains(&instruction.near_branch_target()),
                    Mnemonic::Jmp => all = false,
                    _ => {}
                }
            }
        }
        EM_AARCH64 => {
            for (word, at) in code.chunks_exact(4).zip((offset..).step_by(4)) {
                let word = word.try_into().map_or(0, u32::from_le_bytes);
                // `ret`, by way of the link register.
                if word == 0xd65f_03c0 {
                    returns.push(at);
                } else if word >> 26 == 0b00_0101 {
                    let words = i64::from((word << 6).cast_signed() >> 6);
                    all &= within.contains(&at.wrapping_add_signed(words * 4));
                } else if word & 0xffff_fc1f == 0xd61f_0000 {
                    all = false;
                }
            }
        }
        _ => {}
    }
    if returns.len() > RETURNS_MAX {
        return Exits::Elsewhere(Vec::new());
    }
    if all && !returns.is_empty() {
        Exits::Returns(returns)
    } else {
        Exits::Elsewhere(returns)
    }
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
    use super::*;

    /// Looks at a function that is all of the file, but for one behind it that begins with a push.
    fn of(function: &[u8]) -> Code {
        let mut file = function.to_vec();
        file.resize(64, 0xcc);
        file.extend([0x53, 0x5b, 0xc3]);
        file.resize(96, 0xcc);
        code(EM_X86_64, file.as_slice(), 0, function.len() as u64)
    }

    #[test]
    fn finds_where_the_kernel_need_not_step_through() {
        // sub $8,%rsp; call 64; add $8,%rsp; ret
        let hands_on = of(&[0x48, 0x83, 0xec, 8, 0xe8, 55, 0, 0, 0, 0x48, 0x83, 0xc4, 8, 0xc3]);
        assert_eq!(
            (hands_on.early, hands_on.inner, &*hands_on.calls),
            (4, Some(64), &[64][..])
        );
        assert_eq!(hands_on.exits, Exits::Returns(vec![13]));
        // The same behind mov %edx,%esi: its arguments are others.
        let changes = of(&[0x89, 0xd6, 0xe8, 57, 0, 0, 0, 0xc3]);
        assert_eq!((changes.early, changes.inner, &*changes.calls), (0, None, &[64][..]));
        // endbr64; test %rdi,%rdi; je +1; nop; ret
        let tests = of(&[0xf3, 0x0f, 0x1e, 0xfa, 0x48, 0x85, 0xff, 0x74, 1, 0x90, 0xc3]);
        assert_eq!((tests.early, tests.inner), (7, None));
        // xor %eax,%eax; jmp to what is behind it
        let goes_on = of(&[0x31, 0xc0, 0xeb, 60]);
        assert_eq!((goes_on.early, goes_on.exits), (2, Exits::Elsewhere(Vec::new())));
        // test %rdi,%rdi; je +0; jne to the je: it may run more than once.
        let again = of(&[0x48, 0x85, 0xff, 0x74, 0, 0x75, 0xfc, 0xc3]);
        assert_eq!(again.early, 0);
        assert_eq!(of(&[]).exits, Exits::Elsewhere(Vec::new()));
    }
}
