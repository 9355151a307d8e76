//! Which way frames go, for a connection whose beginning nobody saw. Only header blocks say it: the names of requests and those
//! of responses have fixed numbers in the static table of HPACK.

use super::{
    frame::{Frame, HEADER, Kind, PADDED, PRIORITY},
    hpack,
};
use crate::protocols::Way;

/// `:authority` to `:scheme`, and `:status`, in the static table.
const OF_REQUESTS: std::ops::RangeInclusive<u32> = 1..=7;
const OF_RESPONSES: std::ops::RangeInclusive<u32> = 8..=14;

/// Which way bytes go that begin with a frame, if a header block among them says.
#[must_use]
pub fn way_of_frames(mut bytes: &[u8]) -> Option<Way> {
    while let Some((header, rest)) = bytes.split_first_chunk::<HEADER>() {
        let frame = Frame::parse(header);
        if !frame.plausible() {
            return None;
        }
        let len = usize::try_from(frame.len).ok()?;
        let (payload, next) = rest.split_at_checked(len).unwrap_or((rest, &[]));
        if frame.kind == Kind::Headers
            && let Some(way) = way_of_block(block(&frame, payload))
        {
            return Some(way);
        }
        bytes = next;
    }
    None
}

/// The header block of HEADERS; padding behind it does no harm.
fn block<'a>(frame: &Frame, payload: &'a [u8]) -> &'a [u8] {
    let before = usize::from(frame.flags & PADDED != 0) + if frame.flags & PRIORITY != 0 { 5 } else { 0 };
    payload.get(before..).unwrap_or_default()
}

/// Pseudo-headers come first, so a few fields say it or nothing does.
fn way_of_block(mut block: &[u8]) -> Option<Way> {
    for _ in 0..8 {
        let first = *block.first()?;
        let (bits, indexed) = match first {
            0x80.. => (7, true),
            0x40..0x80 => (6, false),
            // The table's size.
            0x20..0x40 => {
                hpack::integer(&mut block, 5).ok()?;
                continue;
            }
            _ => (4, false),
        };
        let name = hpack::integer(&mut block, bits).ok()?;
        if OF_REQUESTS.contains(&name) {
            return Some(Way::ToServer);
        }
        if OF_RESPONSES.contains(&name) {
            return Some(Way::ToClient);
        }
        if !indexed {
            if name == 0 {
                skip_string(&mut block)?;
            }
            skip_string(&mut block)?;
        }
    }
    None
}

fn skip_string(block: &mut &[u8]) -> Option<()> {
    let len = usize::try_from(hpack::integer(block, 7).ok()?).ok()?;
    *block = block.get(len..)?;
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(flags: u8, payload: &[u8]) -> Vec<u8> {
        let len = u8::try_from(payload.len()).unwrap_or(u8::MAX);
        [&[0, 0, len, 1, flags, 0, 0, 0, 3][..], payload].concat()
    }

    #[test]
    fn header_blocks_say_which_way_they_go() {
        let window = [0, 0, 4, 8, 0, 0, 0, 0, 0, 0, 0, 1, 0];
        for (block, way) in [
            (&[0x83, 0x86][..], Some(Way::ToServer)),
            // An authority in the table, of a number that only the ends know, before the method.
            (&[0xbf, 0x82], Some(Way::ToServer)),
            // A path that is spelled out, after a field with an unknown name that is.
            (
                &[0x00, 0x01, b'a', 0x01, b'b', 0x04, 0x02, b'/', b'x'],
                Some(Way::ToServer),
            ),
            (&[0x3f, 0x01, 0x88], Some(Way::ToClient)),
            (&[0x48, 0x03, b'4', b'1', b'8'], Some(Way::ToClient)),
            // Trailers, and what is cut short.
            (&[0xbf, 0xbe], None),
            (&[0x40, 0x05, b'a'], None),
            (&[], None),
        ] {
            for (flags, before) in [(4, &[][..]), (5, &[]), (0x2c, &[0, 0, 0, 0, 0, 9])] {
                let frame = headers(flags, &[before, block].concat());
                assert_eq!(way_of_frames(&frame), way, "{block:x?}");
                assert_eq!(way_of_frames(&[&window[..], &frame].concat()), way, "{block:x?}");
            }
        }
        assert_eq!(way_of_frames(b"GET / HTTP/1.1\r\n\r\n"), None);
        assert_eq!(way_of_frames(&window), None);
    }
}
