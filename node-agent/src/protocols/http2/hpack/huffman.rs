//! The fixed Huffman code of RFC 7541, appendix B. It is canonical: the lengths say it all.

use super::HpackError;

/// Lengths of the codes of the bytes 0 to 255, and of EOS.
#[rustfmt::skip]
const LENGTHS: [u8; 257] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 28,
    6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10,
    13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6,
    15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28,
    20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24,
    22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27,
    20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23, 26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26,
    30,
];

const LONGEST: usize = 30;
const EOS: u16 = 256;
/// Codes up to this long are looked up at once: all visible characters but a few.
const QUICK: usize = 9;

/// What the lengths stand for.
struct Code {
    /// By length: the end of the codes of this length, from the left of 32 bits.
    end: [u64; LONGEST + 1],
    /// By length: the first code of it, in the same way, and its place in `symbols`.
    first: [(u32, u16); LONGEST + 1],
    /// Symbols in the order of their codes.
    symbols: [u16; 257],
    /// By the next bits: symbol and length; length 0 where more bits are needed.
    quick: [(u8, u8); 1 << QUICK],
}

static CODE: Code = code();

#[allow(
    clippy::indexing_slicing,
    reason = "runs when this is compiled: a wrong index does not compile"
)]
const fn code() -> Code {
    let mut code = Code {
        end: [0; LONGEST + 1],
        first: [(0, 0); LONGEST + 1],
        symbols: [0; 257],
        quick: [(0, 0); 1 << QUICK],
    };
    let (mut next, mut place, mut length) = (0_u64, 0_usize, 1_usize);
    while length <= LONGEST {
        let one = 1_u64 << (32 - length);
        code.first[length] = (next as u32, place as u16);
        let mut symbol = 0;
        while symbol < LENGTHS.len() {
            if LENGTHS[symbol] as usize == length {
                code.symbols[place] = symbol as u16;
                place += 1;
                if length <= QUICK {
                    let mut at = next >> (32 - QUICK);
                    while at < (next + one) >> (32 - QUICK) {
                        code.quick[at as usize] = (symbol as u8, length as u8);
                        at += 1;
                    }
                }
                next += one;
            }
            symbol += 1;
        }
        code.end[length] = next;
        length += 1;
    }
    assert!(next == 1 << 32, "the code is complete");
    code
}

/// Appends what `input` stands for to `out`.
pub(super) fn decode(input: &[u8], out: &mut Vec<u8>) -> Result<(), HpackError> {
    let mut bytes = input.iter();
    // Bits from the left that wait, and how many.
    let (mut bits, mut have) = (0_u64, 0_usize);
    loop {
        while have <= 56 {
            let Some(byte) = bytes.next() else { break };
            bits |= u64::from(*byte) << (56 - have);
            have += 8;
        }
        let (symbol, length) = next(bits)?;
        if length > have {
            // What is left is padding: the beginning of EOS, less than a byte.
            let ones = bits.leading_ones() as usize;
            return if have < 8 && ones >= have {
                Ok(())
            } else {
                Err(HpackError::Malformed)
            };
        }
        out.push(u8::try_from(symbol).map_err(|_| HpackError::Malformed)?);
        bits <<= length;
        have -= length;
    }
}

/// The symbol at the left of `bits`, and its length.
#[inline]
fn next(bits: u64) -> Result<(u16, usize), HpackError> {
    let quick = usize::try_from(bits >> (64 - QUICK))
        .ok()
        .and_then(|at| CODE.quick.get(at));
    if let Some((symbol, length @ 1..)) = quick {
        return Ok((u16::from(*symbol), usize::from(*length)));
    }
    let bits = (bits >> 32) as u32;
    for (length, (end, (first, place))) in CODE.end.iter().zip(&CODE.first).enumerate().skip(QUICK) {
        if u64::from(bits) < *end {
            let offset = (bits - first) >> (32 - length);
            let symbol = usize::try_from(offset)
                .ok()
                .and_then(|offset| CODE.symbols.get(usize::from(*place) + offset));
            return symbol.map(|symbol| (*symbol, length)).ok_or(HpackError::Malformed);
        }
    }
    Ok((EOS, LONGEST))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(input: &[u8]) -> Result<Vec<u8>, HpackError> {
        let mut out = Vec::new();
        decode(input, &mut out).map(|()| out)
    }

    /// Encodes by the table in the same module: only for inputs that the RFC has no example of.
    fn encode(input: &[u8]) -> Vec<u8> {
        let (mut out, mut bits, mut have) = (Vec::new(), 0_u64, 0);
        for byte in input {
            let length = usize::from(LENGTHS[usize::from(*byte)]);
            let place = CODE
                .symbols
                .iter()
                .position(|symbol| *symbol == u16::from(*byte))
                .unwrap();
            let (first, start) = CODE.first[length];
            let code = (first >> (32 - length)) + (place - usize::from(start)) as u32;
            bits |= u64::from(code) << (64 - have - length);
            have += length;
            while have >= 8 {
                out.push((bits >> 56) as u8);
                bits <<= 8;
                have -= 8;
            }
        }
        if have > 0 {
            out.push((bits >> 56) as u8 | (0xff >> have));
        }
        out
    }

    #[test]
    fn every_byte() {
        for byte in 0..=255_u8 {
            for input in [vec![byte], vec![byte; 7], vec![b'0', byte, b'z']] {
                assert_eq!(decoded(&encode(&input)).unwrap(), input);
            }
        }
        assert_eq!(decoded(b"").unwrap(), b"");
    }

    #[test]
    fn padding_is_the_beginning_of_eos_and_less_than_a_byte() {
        // "a" is 00011.
        assert_eq!(decoded(&[0b0001_1111]).unwrap(), b"a");
        assert!(decoded(&[0b0001_1110]).is_err());
        assert!(decoded(&[0b0001_1111, 0xff]).is_err());
        assert!(decoded(&[0xff]).is_err());
        assert!(decoded(&[0xff, 0xff, 0xff, 0xff]).is_err(), "EOS itself");
    }
}
