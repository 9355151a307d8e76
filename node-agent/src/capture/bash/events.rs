//! Events of the ring, checked. No I/O.

use ebpf_common::bash::{EVENT_VERSION, LONG, SHORT, event};

/// What the kernel side told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// A process started another program.
    Exec(u32),
    /// A process ended.
    Exit(u32),
    /// A line was read.
    Line(Line),
    /// Of another build.
    Unknown,
}

/// A line that was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Line {
    /// Process.
    pub(super) pid: u32,
    /// Monotonic time, nanoseconds.
    pub(super) time_ns: u64,
    /// Real user id, as the machine has it.
    pub(super) uid: u32,
    /// The line; what is no UTF-8 is replaced.
    pub(super) text: String,
    /// It was longer.
    pub(super) cut: bool,
}

impl Event {
    /// Reads an event; the layout is `ebpf_common::bash`'s.
    pub(super) fn parse(bytes: &[u8]) -> Self {
        Self::read(bytes).unwrap_or(Self::Unknown)
    }

    fn read(bytes: &[u8]) -> Option<Self> {
        if u16::from_ne_bytes(at(bytes, 0)?) != EVENT_VERSION {
            return None;
        }
        let pid = u32::from_ne_bytes(at(bytes, 4)?);
        let room = match u16::from_ne_bytes(at(bytes, 2)?) {
            event::EXEC => return Some(Self::Exec(pid)),
            event::EXIT => return Some(Self::Exit(pid)),
            event::SHORT_LINE => SHORT,
            event::LONG_LINE => LONG,
            _ => return None,
        };
        let length = usize::from(u16::from_ne_bytes(at(bytes, 20)?));
        let text = bytes.get(24..24 + room)?.get(..length)?;
        let cut = u16::from_ne_bytes(at(bytes, 22)?) != 0;
        Some(Self::Line(Line {
            pid,
            time_ns: u64::from_ne_bytes(at(bytes, 8)?),
            uid: u32::from_ne_bytes(at(bytes, 16)?),
            text: text_of(text, cut),
            cut,
        }))
    }
}

/// The text; a character that was cut in two is left out.
fn text_of(bytes: &[u8], cut: bool) -> String {
    let whole = match std::str::from_utf8(bytes) {
        Err(error) if cut && error.error_len().is_none() => bytes.get(..error.valid_up_to()).unwrap_or(bytes),
        _ => bytes,
    };
    String::from_utf8_lossy(whole).into_owned()
}

fn at<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..)?.first_chunk().copied()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use ebpf_common::bash::{EventHead, LineHead, LongLine, ShortLine};

    use super::*;

    fn bytes_of<T: Copy>(value: &T) -> Vec<u8> {
        // SAFETY: the layouts have no padding.
        unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast::<u8>(), size_of::<T>()) }.to_vec()
    }

    fn head(kind: u16) -> EventHead {
        EventHead {
            version: EVENT_VERSION,
            kind,
            pid: 7,
            time_ns: 99,
        }
    }

    fn line(text: &[u8], cut: u16) -> Vec<u8> {
        let mut event = LongLine {
            line: LineHead {
                head: head(event::LONG_LINE),
                uid: 1000,
                length: text.len().try_into().unwrap(),
                cut,
            },
            text: [0xff; LONG],
        };
        event.text[..text.len()].copy_from_slice(text);
        bytes_of(&event)
    }

    #[test]
    fn reads_what_the_kernel_side_writes() {
        assert_eq!(Event::parse(&bytes_of(&head(event::EXEC))), Event::Exec(7));
        assert_eq!(Event::parse(&bytes_of(&head(event::EXIT))), Event::Exit(7));
        let mut short = ShortLine {
            line: LineHead {
                head: head(event::SHORT_LINE),
                uid: 5,
                length: 2,
                cut: 0,
            },
            text: [b'x'; SHORT],
        };
        short.text[..2].copy_from_slice(b"ls");
        let expected = Line {
            pid: 7,
            time_ns: 99,
            uid: 5,
            text: "ls".to_owned(),
            cut: false,
        };
        assert_eq!(Event::parse(&bytes_of(&short)), Event::Line(expected));
    }

    #[test]
    fn text_is_text() {
        let text = |bytes: &[u8], cut| match Event::parse(&line(bytes, cut)) {
            Event::Line(line) => (line.text, line.cut),
            other => panic!("{other:?}"),
        };
        assert_eq!(text("echo ü".as_bytes(), 0), ("echo ü".to_owned(), false));
        // Cut inside of the last character.
        assert_eq!(text(b"echo \xc3", 1), ("echo ".to_owned(), true));
        assert_eq!(text(b"echo \xff!", 0), ("echo \u{fffd}!".to_owned(), false));
    }

    #[test]
    fn other_layouts_are_refused() {
        let good = line(b"ls", 0);
        for length in 0..good.len() {
            let parsed = Event::parse(&good[..length]);
            assert_eq!(parsed, Event::Unknown, "{length}");
        }
        let (mut version, mut kind, mut long) = (good.clone(), good.clone(), good);
        version[0] = 9;
        kind[2] = 9;
        long[20..22].copy_from_slice(&u16::MAX.to_ne_bytes());
        for bad in [version, kind, long] {
            assert_eq!(Event::parse(&bad), Event::Unknown);
        }
    }
}
