//! Header compression (HPACK, RFC 7541), read from the outside.
//!
//! A [`Decoder`] may come to a connection in the middle, or miss header blocks. Then the dynamic table is not known, but
//! what is added from then on is: references to it are resolved, references beyond it are [`Field::Unknown`]. Nothing is
//! ever resolved to what it might be.

mod huffman;
#[cfg(test)]
mod model;
mod statics;
mod table;
#[cfg(test)]
mod tests;

use self::{
    statics::{Entry, STATIC},
    table::{Found, Insert, Table},
};

/// Buffers of names and values larger than this are given back, in bytes.
const KEEP: usize = 1024;

/// Why a header block could not be read to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HpackError {
    /// It goes on in bytes that were not captured.
    Cut,
    Malformed,
}

/// One header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Field<'a> {
    Known(&'a [u8], &'a [u8]),
    /// Name, value or both were sent before and are not known.
    Unknown,
}

/// The decoder of one direction.
#[derive(Debug)]
pub(crate) struct Decoder {
    table: Table,
    /// Which names are of interest. Others are read past.
    keep: fn(&[u8]) -> bool,
}

/// Room for a name and a value; one serves all decoders of a thread.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    name: Vec<u8>,
    value: Vec<u8>,
}

impl Scratch {
    fn give_back(&mut self) {
        for buffer in [&mut self.name, &mut self.value] {
            if buffer.capacity() > KEEP {
                *buffer = Vec::new();
            }
        }
    }
}

/// What a literal's name is.
enum Name {
    /// In the scratch buffer, and of interest.
    Kept,
    Other(usize),
    Unknown,
}

impl Decoder {
    /// A decoder for a direction that was seen from its start (`complete`) or not.
    pub(crate) fn new(complete: bool, keep: fn(&[u8]) -> bool) -> Self {
        Self {
            table: Table::new(complete),
            keep,
        }
    }

    /// Header blocks were missed.
    pub(crate) fn forget(&mut self) {
        self.table.forget();
    }

    /// Reads a header block, or its captured beginning, and gives each header that is of interest or unknown. After an
    /// error the table is void.
    pub(crate) fn decode(
        &mut self,
        block: &[u8],
        scratch: &mut Scratch,
        sink: &mut dyn FnMut(Field<'_>),
    ) -> Result<(), HpackError> {
        let result = self.block(block, scratch, sink);
        if result.is_err() {
            self.table.forget();
        }
        scratch.give_back();
        result
    }

    fn block(
        &mut self,
        block: &[u8],
        scratch: &mut Scratch,
        sink: &mut dyn FnMut(Field<'_>),
    ) -> Result<(), HpackError> {
        let mut input = block;
        let mut fields = false;
        while let [first, ..] = input {
            match first {
                0x80.. => {
                    let index = integer(&mut input, 7)?;
                    self.indexed(index, scratch, sink)?;
                    fields = true;
                }
                0x40..=0x7f => {
                    self.literal(&mut input, 6, true, scratch, sink)?;
                    fields = true;
                }
                0x20..=0x3f => {
                    let max = integer(&mut input, 5)?;
                    if fields {
                        // Only allowed at the beginning.
                        return Err(HpackError::Malformed);
                    }
                    self.table.resize(max);
                }
                0x00..=0x1f => {
                    self.literal(&mut input, 4, false, scratch, sink)?;
                    fields = true;
                }
            }
        }
        Ok(())
    }

    fn indexed(&self, index: u32, scratch: &mut Scratch, sink: &mut dyn FnMut(Field<'_>)) -> Result<(), HpackError> {
        if let Some((name, value)) = fixed(index)? {
            if (self.keep)(name) {
                sink(Field::Known(name, value));
            }
            return Ok(());
        }
        let age = index - 1 - STATIC.len() as u32;
        match self.table.get(age, &mut scratch.name, &mut scratch.value) {
            Found::Stored => sink(Field::Known(&scratch.name, &scratch.value)),
            Found::Other(_) => {}
            Found::Unknown => sink(Field::Unknown),
            Found::None => return Err(HpackError::Malformed),
        }
        Ok(())
    }

    /// A literal, whose name is given by an index of `bits` bits or by itself.
    fn literal(
        &mut self,
        input: &mut &[u8],
        bits: u8,
        insert: bool,
        scratch: &mut Scratch,
        sink: &mut dyn FnMut(Field<'_>),
    ) -> Result<(), HpackError> {
        let index = integer(input, bits)?;
        let name = if index == 0 {
            string(input, &mut scratch.name)?;
            self.named(&scratch.name)
        } else if let Some((name, _)) = fixed(index)? {
            scratch.name.clear();
            scratch.name.extend_from_slice(name);
            self.named(name)
        } else {
            let age = index - 1 - STATIC.len() as u32;
            match self.table.get(age, &mut scratch.name, &mut scratch.value) {
                Found::Stored => Name::Kept,
                Found::Other(length) => Name::Other(length),
                Found::Unknown => Name::Unknown,
                Found::None => return Err(HpackError::Malformed),
            }
        };
        string(input, &mut scratch.value)?;
        let (name_bytes, value) = (scratch.name.as_slice(), scratch.value.as_slice());
        match name {
            Name::Kept => {
                sink(Field::Known(name_bytes, value));
                if insert {
                    self.table.insert(Insert::Stored(name_bytes, value));
                }
            }
            Name::Other(length) if insert => self.table.insert(Insert::Other(length, value.len())),
            Name::Unknown => {
                sink(Field::Unknown);
                if insert {
                    self.table.insert(Insert::Unknown(value.len()));
                }
            }
            Name::Other(_) => {}
        }
        Ok(())
    }

    fn named(&self, name: &[u8]) -> Name {
        if (self.keep)(name) {
            Name::Kept
        } else {
            Name::Other(name.len())
        }
    }
}

/// The entry of the static table; `None` for those beyond it.
fn fixed(index: u32) -> Result<Option<Entry>, HpackError> {
    let at = index.checked_sub(1).ok_or(HpackError::Malformed)?;
    Ok(usize::try_from(at).ok().and_then(|at| STATIC.get(at)).copied())
}

/// An integer whose first byte has `bits` bits for it.
pub(super) fn integer(input: &mut &[u8], bits: u8) -> Result<u32, HpackError> {
    let (first, rest) = input.split_first().ok_or(HpackError::Cut)?;
    *input = rest;
    let mask = (1_u32 << bits) - 1;
    let mut value = u32::from(*first) & mask;
    if value < mask {
        return Ok(value);
    }
    // More bytes than this are no number that a peer has use for.
    for shift in [0, 7, 14, 21] {
        let (byte, rest) = input.split_first().ok_or(HpackError::Cut)?;
        *input = rest;
        value += u32::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(HpackError::Malformed)
}

/// Replaces `out` by a string.
fn string(input: &mut &[u8], out: &mut Vec<u8>) -> Result<(), HpackError> {
    let huffman = input.first().ok_or(HpackError::Cut)? & 0x80 != 0;
    let length = integer(input, 7)?;
    let length = usize::try_from(length).map_err(|_| HpackError::Malformed)?;
    let (bytes, rest) = input.split_at_checked(length).ok_or(HpackError::Cut)?;
    *input = rest;
    out.clear();
    if huffman {
        return huffman::decode(bytes, out);
    }
    out.extend_from_slice(bytes);
    Ok(())
}
