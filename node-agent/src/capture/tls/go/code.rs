//! Code of one function: where its body begins, behind the check of the stack's size; where it returns, and that it keeps what
//! it was passed where its caller has room for it.
//!
//! ```text
//! cmp rsp, [r14+16]      the check: the goroutine's description is in R14
//! jbe ...                not enough: the stack is moved, and the function begins anew
//! push rbp               ◀ body
//! mov rbp, rsp
//! sub rsp, 0x58          the frame: 0x60 bytes, then the return address, then the room
//! mov [rsp+0x68], rax    first word passed
//! mov [rsp+0x70], rbx    second
//! ```

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};

use super::{
    GoError,
    image::{Image, Machine, Range},
};

/// Bytes of a function; `Write` and `Read` have some two thousand.
const FUNCTION_MAX: u64 = 1 << 16;
/// Returns of it.
const RETURNS_MAX: usize = 64;
/// Instructions before the check of the stack is over.
const CHECK_MAX: usize = 12;
/// Where a goroutine's description says how far its stack may go.
const STACK_GUARD: u64 = 16;
/// Bytes of a frame.
const FRAME_MAX: u64 = 1 << 20;

const NO_CHECK: GoError = GoError::Code("a function does not begin with a check of its stack");
const NOT_KEPT: GoError = GoError::Code("a function does not keep what it was passed");
const UNKNOWN: GoError = GoError::Code("a function has instructions that are not known");

/// The first instruction behind the check, as offset in the file.
pub(super) fn body(image: &Image<'_>, function: Range) -> Result<u64, GoError> {
    let (code, offset) = bytes(image, function)?;
    match image.machine {
        Machine::Amd64 => amd64_body(Decoder::with_ip(64, &code, offset, DecoderOptions::NONE)),
        Machine::Arm64 => arm64_body(&code, offset),
        Machine::Other => Err(GoError::Machine),
    }
}

/// The instructions that return, as offsets in the file, of a function that keeps what it was passed.
pub(super) fn returns(image: &Image<'_>, function: Range) -> Result<Vec<u64>, GoError> {
    let (code, offset) = bytes(image, function)?;
    let returns = match image.machine {
        Machine::Amd64 => amd64_returns(Decoder::with_ip(64, &code, offset, DecoderOptions::NONE))?,
        Machine::Arm64 => arm64_returns(&code, offset)?,
        Machine::Other => return Err(GoError::Machine),
    };
    if returns.is_empty() || returns.len() > RETURNS_MAX {
        return Err(GoError::Code("the returns of a function cannot be made out"));
    }
    Ok(returns)
}

fn bytes(image: &Image<'_>, function: Range) -> Result<(Vec<u8>, u64), GoError> {
    if !(1..=FUNCTION_MAX).contains(&function.size) {
        return Err(GoError::Code("a function has an unlikely size"));
    }
    let executable = image.segments.iter().any(|segment| {
        let within = function.address.checked_sub(segment.address);
        segment.executable && within.is_some_and(|within| within < segment.size)
    });
    match image.place(function.address).filter(|_| executable) {
        Some((offset, _)) => Ok((image.at(function.address, function.size)?, offset)),
        None => Err(GoError::Code("a function is not in code")),
    }
}

fn amd64_body(decoder: Decoder<'_>) -> Result<u64, GoError> {
    let mut checked = false;
    for instruction in decoder.into_iter().take(CHECK_MAX) {
        checked |= instruction.mnemonic() == Mnemonic::Cmp
            && instruction.memory_base() == Register::R14
            && instruction.memory_displacement64() == STACK_GUARD;
        if checked && instruction.mnemonic() == Mnemonic::Jbe {
            return Ok(instruction.next_ip());
        }
        // Where the frame is large, another branch may come before it.
        if matches!(
            instruction.mnemonic(),
            Mnemonic::Jmp | Mnemonic::Call | Mnemonic::Ret | Mnemonic::INVALID
        ) {
            break;
        }
    }
    Err(NO_CHECK)
}

fn amd64_returns(mut decoder: Decoder<'_>) -> Result<Vec<u64>, GoError> {
    let (mut frame, mut framed, mut kept, mut returns) = (0, false, [false; 2], Vec::new());
    let mut straight = true;
    while decoder.can_decode() {
        let instruction = decoder.decode();
        if instruction.is_invalid() {
            return Err(UNKNOWN);
        }
        if !framed {
            match frame_change(&instruction) {
                Some((size, whole)) => {
                    frame += size;
                    framed = whole;
                }
                None if instruction.mnemonic() == Mnemonic::Call => return Err(NOT_KEPT),
                None => {}
            }
            continue;
        }
        straight &= !branches(&instruction);
        for (index, (kept, register)) in kept.iter_mut().zip([Register::RAX, Register::RBX]).enumerate() {
            if writes_to(&instruction, frame + 8 + 8 * index as u64) {
                // What is kept is what was passed, on each way through the function, and nothing else ever.
                if !straight || instruction.code() != Code::Mov_rm64_r64 || instruction.op1_register() != register {
                    return Err(NOT_KEPT);
                }
                *kept = true;
            }
        }
        if instruction.code() == Code::Retnq {
            returns.push(instruction.ip());
        }
    }
    if kept == [true; 2] { Ok(returns) } else { Err(NOT_KEPT) }
}

/// By how much an instruction of a function's first ones makes its frame larger, and whether that is all of it.
fn frame_change(instruction: &Instruction) -> Option<(u64, bool)> {
    if instruction.mnemonic() == Mnemonic::Push {
        return Some((8, false));
    }
    if instruction.op0_kind() != OpKind::Register || instruction.op0_register() != Register::RSP {
        return None;
    }
    let number = || instruction.try_immediate(1).ok();
    let size = match instruction.mnemonic() {
        Mnemonic::Sub => number()?,
        // A number that is shorter to write when it is below zero.
        Mnemonic::Add => number()?.wrapping_neg(),
        _ => return None,
    };
    (size <= FRAME_MAX).then_some((size, true))
}

fn branches(instruction: &Instruction) -> bool {
    instruction.op0_kind() == OpKind::NearBranch64
        || matches!(instruction.mnemonic(), Mnemonic::Jmp | Mnemonic::Call | Mnemonic::Ret)
}

/// True for an instruction that writes to the word at this distance from the stack pointer, or may.
fn writes_to(instruction: &Instruction, at: u64) -> bool {
    let reads = matches!(instruction.mnemonic(), Mnemonic::Cmp | Mnemonic::Test | Mnemonic::Nop);
    let register = instruction.op1_register();
    let size = if (Register::XMM0..=Register::XMM31).contains(&register) {
        16
    } else if (Register::YMM0..=Register::YMM31).contains(&register) {
        32
    } else {
        8
    };
    let displacement = instruction.memory_displacement64();
    instruction.op0_kind() == OpKind::Memory
        && instruction.memory_base() == Register::RSP
        && !reads
        && displacement < at + 8
        && at < displacement.saturating_add(size)
}

/// `ldr x16, [x28, #16]`
const ARM_CHECK: u32 = 0xf940_0b90;
/// `b.ls`, whereto left out.
const ARM_LOWER: (u32, u32) = (0xff00_001f, 0x5400_0009);
const ARM_RETURN: u32 = 0xd65f_03c0;
/// Branches, calls, and a few that are none.
const ARM_BRANCH: (u32, u32) = (0x1c00_0000, 0x1400_0000);
const ARM_NOP: u32 = 0xd503_201f;
/// `str x30, [sp, #-N]!`: the frame, up to 255 bytes.
const ARM_FRAME: (u32, u32) = (0xffe0_0fff, 0xf800_0ffe);
/// `str xT, [sp, #N]`
const ARM_STORE: (u32, u32) = (0xffc0_03e0, 0xf900_03e0);
/// `stp xT, xU, [sp, #N]`
const ARM_STORE_TWO: (u32, u32) = (0xffc0_03e0, 0xa900_03e0);

fn words(code: &[u8], offset: u64) -> impl Iterator<Item = (u32, u64)> {
    let words = code.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word));
    words.zip((offset..).step_by(4))
}

fn arm64_body(code: &[u8], offset: u64) -> Result<u64, GoError> {
    let mut checked = false;
    for (word, at) in words(code, offset).take(CHECK_MAX) {
        checked |= word == ARM_CHECK;
        if checked && word & ARM_LOWER.0 == ARM_LOWER.1 {
            return Ok(at + 4);
        }
    }
    Err(NO_CHECK)
}

fn arm64_returns(code: &[u8], offset: u64) -> Result<Vec<u64>, GoError> {
    let (mut room, mut kept, mut straight, mut returns) = (None, [false; 2], true, Vec::new());
    for (word, at) in words(code, offset) {
        if room.is_none() && word & ARM_FRAME.0 == ARM_FRAME.1 {
            // Nine bits with sign; the return address is at the frame's low end.
            let below = ((word >> 12 & 0x1ff) << 23).cast_signed() >> 23;
            room = Some(u64::from(below.unsigned_abs()) + 8);
        }
        let Some(room) = room else { continue };
        straight &= word & ARM_BRANCH.0 != ARM_BRANCH.1 || word == ARM_NOP;
        let mut stored = |to: u64, register: u32| {
            for (index, kept) in kept.iter_mut().enumerate() {
                if to == room + 8 * index as u64 {
                    if !straight || register != index as u32 {
                        return Err(NOT_KEPT);
                    }
                    *kept = true;
                }
            }
            Ok(())
        };
        if word & ARM_STORE.0 == ARM_STORE.1 {
            stored(u64::from(word >> 10 & 0xfff) * 8, word & 31)?;
        } else if word & ARM_STORE_TWO.0 == ARM_STORE_TWO.1 {
            let to = u64::from(word >> 15 & 0x3f) * 8;
            stored(to, word & 31)?;
            stored(to + 8, word >> 10 & 31)?;
        }
        if word == ARM_RETURN {
            returns.push(at);
        }
    }
    if kept == [true; 2] { Ok(returns) } else { Err(NOT_KEPT) }
}
