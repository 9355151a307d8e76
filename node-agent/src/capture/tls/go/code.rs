//! Code of one function: where its body begins, behind the check of the stack's size, and where it returns.

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic, Register};

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

/// Places in the file.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Places {
    /// The first instruction behind the check.
    pub(super) body: u64,
    /// Instructions that return.
    pub(super) returns: Vec<u64>,
}

/// Reads the code of one function.
pub(super) fn read(image: &Image<'_>, function: Range) -> Result<Places, GoError> {
    if !(1..=FUNCTION_MAX).contains(&function.size) {
        return Err(GoError::Code("a function has an unlikely size"));
    }
    let (offset, _) = image
        .place(function.address)
        .ok_or(GoError::Code("a function is nowhere in the file"))?;
    let executable = image.segments.iter().any(|segment| {
        let within = function.address.checked_sub(segment.address);
        segment.executable && within.is_some_and(|within| within < segment.size)
    });
    if !executable {
        return Err(GoError::Code("a function is not in code"));
    }
    let code = image.at(function.address, function.size)?;
    let places = match image.machine {
        Machine::Amd64 => amd64(&code, offset)?,
        Machine::Arm64 => arm64(&code, offset)?,
        Machine::Other => return Err(GoError::Machine),
    };
    if places.returns.is_empty() || places.returns.len() > RETURNS_MAX {
        return Err(GoError::Code("the returns of a function cannot be made out"));
    }
    Ok(places)
}

const NO_CHECK: GoError = GoError::Code("a function does not begin with a check of its stack");

fn amd64(code: &[u8], offset: u64) -> Result<Places, GoError> {
    let (mut checked, mut body, mut returns) = (false, None, Vec::new());
    for (index, instruction) in Decoder::with_ip(64, code, offset, DecoderOptions::NONE).iter().enumerate() {
        if instruction.is_invalid() {
            return Err(GoError::Code("a function has instructions that are not known"));
        }
        if body.is_none() {
            checked |= is_check(&instruction);
            let leaves = matches!(instruction.mnemonic(), Mnemonic::Jmp | Mnemonic::Call | Mnemonic::Ret);
            if checked && instruction.mnemonic() == Mnemonic::Jbe {
                body = Some(instruction.next_ip());
            } else if index >= CHECK_MAX || leaves {
                return Err(NO_CHECK);
            }
        }
        if instruction.code() == Code::Retnq {
            returns.push(instruction.ip());
        }
    }
    Ok(Places {
        body: body.ok_or(NO_CHECK)?,
        returns,
    })
}

/// The stack's end is compared with what the goroutine's description, in R14, says.
fn is_check(instruction: &Instruction) -> bool {
    instruction.mnemonic() == Mnemonic::Cmp
        && instruction.memory_base() == Register::R14
        && instruction.memory_displacement64() == STACK_GUARD
}

fn arm64(code: &[u8], offset: u64) -> Result<Places, GoError> {
    /// `ldr x16, [x28, #16]`
    const CHECK: u32 = 0xf940_0b90;
    /// `b.ls`, whereto left out.
    const LOWER: (u32, u32) = (0xff00_001f, 0x5400_0009);
    const RETURN: u32 = 0xd65f_03c0;
    let (mut checked, mut body, mut returns) = (false, None, Vec::new());
    let words = code.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word));
    for (index, (word, at)) in words.zip((offset..).step_by(4)).enumerate() {
        checked |= word == CHECK;
        if body.is_none() && checked && word & LOWER.0 == LOWER.1 {
            body = Some(at + 4);
        }
        if body.is_none() && index >= CHECK_MAX {
            return Err(NO_CHECK);
        }
        if word == RETURN {
            returns.push(at);
        }
    }
    Ok(Places {
        body: body.ok_or(NO_CHECK)?,
        returns,
    })
}
