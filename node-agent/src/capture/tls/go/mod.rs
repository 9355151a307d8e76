//! What a Go program has of `crypto/tls`, and where plaintext passes in it. Pure: from a file to offsets in the file.
//!
//! ```text
//! file ▶ image: is it Go? ▶ version ▶ pclntab: names, entries ▶ moduledata: where code begins
//!                                        └▶ code: behind the stack check of Write, the returns of Read ▶ GoTls
//! ```
//! The table of functions that Go's runtime needs for itself is in every program, stripped or not, so symbols are not
//! asked. Probes are set at plain instructions only: a probe of the return changes the stack, which Go moves. And they are
//! set behind the check of the stack's size, from which a function whose stack was moved begins anew.
//!
//! Files may be hostile, or change while they are read: all that is read is bounded in sum, nothing is mapped. Entry:
//! [`inspect`].

mod buildinfo;
mod code;
mod image;
mod pclntab;
#[cfg(test)]
mod tests;

use std::{fs::File, io};

use image::{Image, Range};

/// The first version that passes arguments in registers, as the probes expect them.
const REGISTERS_SINCE: u32 = 17;
/// The same on 64-bit Arm.
const REGISTERS_SINCE_ARM: u32 = 18;

/// What a file is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Go {
    /// Not built by Go.
    No,
    /// Built by Go, without `crypto/tls`.
    WithoutTls,
    /// Built by Go, with it.
    Tls(GoTls),
}

/// Where plaintext passes, as offsets in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct GoTls {
    /// Version of Go, as the program tells it; empty if it does not.
    pub(super) version: String,
    /// In `(*Conn).Write`, behind the check of its stack: connection, data and length are in the first registers.
    pub(super) write: u64,
    /// The instructions with which `(*Conn).Read` returns: the number of bytes is in the first register, connection and
    /// buffer are behind the return address on the stack.
    pub(super) read_returns: Vec<u64>,
    /// In `(*Conn).Close`, where the connection is in the first register.
    pub(super) close: Option<u64>,
    /// The same in `(*Conn).clientHandshake` and `(*Conn).serverHandshake`.
    pub(super) handshakes: Vec<u64>,
}

/// Why a Go program cannot be read. The text is for who asks why nothing is seen of it.
#[derive(Debug, thiserror::Error)]
pub(super) enum GoError {
    /// The file ends early, or cannot be read.
    #[error("cannot read the program: {0}")]
    Read(#[from] io::Error),
    /// It is not what its headers say.
    #[error("the program is damaged: {0}")]
    Damaged(&'static str),
    /// Arguments are on the stack.
    #[error("built by {0}; Go before 1.17 (1.18 on 64-bit Arm) passes arguments in another way")]
    Old(String),
    /// For another machine.
    #[error("Go for this kind of processor is not read")]
    Machine,
    /// The runtime's table is not there, or unlike those of known versions.
    #[error("the table of functions of its Go runtime is not found: {0}")]
    Table(&'static str),
    /// Code is not made as expected.
    #[error("the code of its crypto/tls is not as expected: {0}")]
    Code(&'static str),
}

/// Looks whether a file is built by Go, and for its `crypto/tls`.
///
/// # Errors
/// If it is, and where plaintext passes cannot be told.
pub(super) fn inspect(file: &File) -> Result<Go, GoError> {
    // What is no ELF file, or a damaged one, is nothing that can run.
    let Ok(Some(image)) = Image::open(file) else {
        return Ok(Go::No);
    };
    let Some(version) = buildinfo::find(&image)? else {
        return Ok(Go::No);
    };
    let table = pclntab::Table::find(&image)?;
    let Some(functions) = table.functions(&image)? else {
        return Ok(Go::WithoutTls);
    };
    let since = if image.machine.is_arm() {
        REGISTERS_SINCE_ARM
    } else {
        REGISTERS_SINCE
    };
    if buildinfo::minor(&version).map_or_else(|| table.is_old(), |minor| minor < since) {
        return Err(GoError::Old(if version.is_empty() {
            "an old Go".to_owned()
        } else {
            version
        }));
    }
    let [Some(write), Some(read), close, client, server] = functions else {
        return Ok(Go::WithoutTls);
    };
    // A program without these is followed all the same.
    let body = |function: Option<Range>| function.and_then(|function| code::body(&image, function).ok());
    Ok(Go::Tls(GoTls {
        version,
        write: code::body(&image, write)?,
        read_returns: code::returns(&image, read)?,
        close: body(close),
        handshakes: [client, server].into_iter().filter_map(body).collect(),
    }))
}
