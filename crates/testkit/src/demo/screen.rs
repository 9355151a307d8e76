//! The terminal: a block of lines redrawn in place, or, when standard output is no terminal, printed one after the other.

use std::{
    io::{self, IsTerminal as _, Write as _},
    mem,
};

/// Size assumed where nobody tells: what a log shows well.
const PLAIN_SIZE: Size = Size { columns: 160, rows: 24 };

/// Where the live table goes.
#[derive(Debug)]
pub struct Screen {
    terminal: bool,
    /// Lines of the block that stands there now.
    drawn: usize,
}

/// Size in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Per line.
    pub columns: usize,
    /// Lines.
    pub rows: usize,
}

impl Screen {
    /// Standard output.
    #[must_use]
    pub fn new() -> Self {
        Self {
            terminal: io::stdout().is_terminal(),
            drawn: 0,
        }
    }

    /// Its size now.
    #[must_use]
    pub fn size(&self) -> Size {
        if !self.terminal {
            return PLAIN_SIZE;
        }
        // SAFETY: a zeroed winsize is a valid value, and the kernel writes no more than one.
        let size = unsafe {
            let mut size: libc::winsize = mem::zeroed();
            if libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &raw mut size) != 0 {
                return PLAIN_SIZE;
            }
            size
        };
        if size.ws_col == 0 || size.ws_row == 0 {
            return PLAIN_SIZE;
        }
        Size {
            columns: usize::from(size.ws_col),
            rows: usize::from(size.ws_row),
        }
    }

    /// Shows `lines` in place of those of the last call, cut to the width of a terminal.
    ///
    /// # Errors
    /// Standard output is closed.
    pub fn draw(&mut self, lines: &[String]) -> io::Result<()> {
        let mut out = io::stdout().lock();
        if self.terminal {
            let Size { columns, rows } = self.size();
            if self.drawn > 0 {
                // Up to the first line of the block, and clear from there.
                write!(out, "\x1b[{}A\x1b[J", self.drawn)?;
            }
            // A line that wraps, or a block higher than the screen, could not be drawn over.
            let shown = lines.iter().take(rows.saturating_sub(1));
            self.drawn = shown.len();
            for line in shown {
                writeln!(out, "{}", cut(line, columns))?;
            }
        } else {
            for line in lines {
                writeln!(out, "{line}")?;
            }
            writeln!(out)?;
        }
        out.flush()
    }
}

impl Default for Screen {
    fn default() -> Self {
        Self::new()
    }
}

fn cut(line: &str, columns: usize) -> &str {
    line.char_indices()
        .nth(columns)
        .map_or(line, |(end, _)| line.get(..end).unwrap_or(line))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_cut_by_characters() {
        assert_eq!(cut("a→b→c", 3), "a→b");
        assert_eq!(cut("abc", 3), "abc");
        assert_eq!(cut("", 3), "");
    }
}
