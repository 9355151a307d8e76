//! Lines of a stream that comes in pieces.

/// Bytes at the end of a cut line that are kept beside its beginning: blank and version of a request line.
pub(super) const TAIL: usize = 9;

/// A line without its end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Line<'a> {
    /// The line, or its beginning if it is longer than is kept.
    pub(super) bytes: &'a [u8],
    /// The last bytes of a line of which only the beginning is kept.
    pub(super) tail: Option<[u8; TAIL]>,
}

/// Holds the beginning of a line whose end has not come.
#[derive(Debug, Default)]
pub(super) struct Lines {
    part: Vec<u8>,
    /// The last bytes once `part` is full; ends with CR if the line so far does.
    tail: [u8; TAIL + 1],
    /// Bytes of the line that are not in `part`.
    beyond: usize,
    /// `part` was given out and is to be forgotten.
    told: bool,
}

impl Lines {
    /// Takes the next line from `bytes`, of which at most `limit` bytes are kept. `None` if its end has not come; then all
    /// of `bytes` is taken.
    #[inline]
    pub(super) fn next<'a, 'b: 'a>(&'a mut self, bytes: &mut &'b [u8], limit: usize) -> Option<Line<'a>> {
        if self.told {
            self.forget();
        }
        let Some(at) = memchr::memchr(b'\n', bytes) else {
            self.append(bytes, limit);
            *bytes = &[];
            return None;
        };
        let (line, rest) = bytes.split_at_checked(at)?;
        *bytes = rest.get(1..).unwrap_or_default();
        if self.part.is_empty() && line.len() <= limit {
            return Some(Line {
                bytes: line.strip_suffix(b"\r").unwrap_or(line),
                tail: None,
            });
        }
        self.append(line, limit);
        self.told = true;
        if self.beyond == 0 {
            let line = self.part.as_slice();
            return Some(Line {
                bytes: line.strip_suffix(b"\r").unwrap_or(line),
                tail: None,
            });
        }
        let tail = match self.tail {
            [tail @ .., b'\r'] => tail,
            [_, tail @ ..] => tail,
        };
        Some(Line {
            bytes: &self.part,
            tail: Some(tail),
        })
    }

    /// What has come of a line whose end will not.
    pub(super) fn unfinished(&self) -> &[u8] {
        if self.told { &[] } else { &self.part }
    }

    /// Forgets the line that was begun.
    pub(super) fn forget(&mut self) {
        self.told = false;
        self.beyond = 0;
        self.part.clear();
        if self.part.capacity() > 1024 {
            self.part = Vec::new();
        }
    }

    fn append(&mut self, bytes: &[u8], limit: usize) {
        let room = limit.saturating_sub(self.part.len()).min(bytes.len());
        let (kept, beyond) = bytes.split_at_checked(room).unwrap_or((bytes, &[]));
        self.part.extend_from_slice(kept);
        if self.beyond == 0 && !beyond.is_empty() {
            // The tail goes on from what is kept.
            let kept = self.part.last_chunk().copied();
            self.tail = kept.unwrap_or_default();
        }
        self.beyond = self.beyond.saturating_add(beyond.len());
        for byte in beyond
            .get(beyond.len().saturating_sub(self.tail.len())..)
            .unwrap_or_default()
        {
            self.tail.rotate_left(1);
            if let Some(last) = self.tail.last_mut() {
                *last = *byte;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All lines of `input`, given in pieces that end at `cuts`.
    fn lines(input: &[u8], cuts: &[usize], limit: usize) -> Vec<(Vec<u8>, Option<[u8; TAIL]>)> {
        let mut lines = Lines::default();
        let mut all = Vec::new();
        let mut from = 0;
        for to in cuts.iter().copied().chain([input.len()]) {
            let mut bytes = &input[from..to.max(from)];
            while let Some(line) = lines.next(&mut bytes, limit) {
                all.push((line.bytes.to_vec(), line.tail));
            }
            assert!(bytes.is_empty());
            from = to.max(from);
        }
        all
    }

    #[test]
    fn a_line_is_the_same_however_it_comes() {
        let input =
            b"GET /a-long-long-path HTTP/1.1\r\nshort\n\r\nanother-line-that-is-cut 123456789\r\n1234567890123456\r\n";
        let whole = lines(input, &[], 16);
        assert_eq!(whole.len(), 5);
        assert_eq!(whole[0], (b"GET /a-long-long".to_vec(), Some(*b" HTTP/1.1")));
        assert_eq!(whole[1], (b"short".to_vec(), None));
        assert_eq!(whole[2], (b"".to_vec(), None));
        assert_eq!(whole[3].1, Some(*b"123456789"));
        for first in 0..input.len() {
            for second in first..input.len() {
                assert_eq!(lines(input, &[first, second], 16), whole, "{first} {second}");
            }
        }
    }
}
