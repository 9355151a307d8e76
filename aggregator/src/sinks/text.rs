//! The text sinks: terminal and file.
//!
//! A file is written and synced before the batch is acknowledged; a write whose batch could then not be stored is taken
//! back. The terminal gets records after that, through a bounded queue and a thread of its own, so that a stopped
//! terminal holds up the pipeline only for a while.

use std::{
    fs::File,
    io::{self, Write as _},
    path::PathBuf,
    sync::{Arc, mpsc},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use super::Sink;
use crate::config::FileConfig;

/// Chunks that wait for the terminal.
const TERMINAL_QUEUE: usize = 16;
/// How long a full terminal queue holds up the pipeline before records are dropped.
const TERMINAL_PATIENCE: Duration = Duration::from_secs(10);

/// A file that rows are appended to.
#[derive(Debug)]
pub(crate) struct FileSink {
    config: FileConfig,
    file: File,
    len: u64,
}

/// The way to standard output.
#[derive(Debug)]
pub(crate) struct Terminal {
    queue: Option<mpsc::SyncSender<(Vec<u8>, u64)>>,
    writer: Option<JoinHandle<()>>,
}

// === impl FileSink ===

impl FileSink {
    /// Opens or creates the file; its directory is created too.
    pub(crate) fn open(config: FileConfig) -> io::Result<Self> {
        if let Some(dir) = config.path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        let file = File::options().create(true).append(true).open(&config.path)?;
        let len = file.metadata()?.len();
        Ok(Self { config, file, len })
    }

    /// Appends and syncs. On an error the file is as before.
    pub(crate) fn write(&mut self, text: &[u8]) -> io::Result<u64> {
        let full = |limit: u64| self.len > 0 && self.len.saturating_add(text.len() as u64) > limit;
        if self.config.rotate_bytes.is_some_and(full) {
            self.rotate()?;
        }
        let before = self.len;
        match self.file.write_all(text).and_then(|()| self.file.sync_data()) {
            Ok(()) => {
                self.len += text.len() as u64;
                Ok(before)
            }
            Err(error) => {
                self.take_back(before);
                Err(error)
            }
        }
    }

    /// Takes over what another sink has written to the same file since this one was opened.
    pub(crate) fn settle(&mut self) {
        match self.file.metadata() {
            Ok(file) => self.len = file.len(),
            Err(error) => tracing::error!(
                path = %self.config.path.display(), %error,
                "The length of the file is not known; rows that cannot be acknowledged may take others with them"
            ),
        }
    }

    /// Cuts the file back to a length that [`Self::write`] returned.
    pub(crate) fn take_back(&mut self, len: u64) {
        match self.file.set_len(len) {
            Ok(()) => self.len = len,
            Err(error) => tracing::error!(
                path = %self.config.path.display(), %error,
                "Rows that were not acknowledged cannot be taken back; they will appear twice"
            ),
        }
    }

    fn rotate(&mut self) -> io::Result<()> {
        let numbered = |n: u32| {
            let mut name = self.config.path.clone().into_os_string();
            name.push(format!(".{n}"));
            PathBuf::from(name)
        };
        for n in (1..self.config.rotate_keep).rev() {
            match std::fs::rename(numbered(n), numbered(n + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        if self.config.rotate_keep == 0 {
            self.file.set_len(0)?;
        } else {
            std::fs::rename(&self.config.path, numbered(1))?;
            self.file = File::options().create(true).append(true).open(&self.config.path)?;
        }
        self.len = 0;
        Ok(())
    }
}

// === impl Terminal ===

impl Terminal {
    /// Starts the writing thread.
    pub(crate) fn start(sink: Arc<Sink>) -> io::Result<Self> {
        let (queue, chunks) = mpsc::sync_channel::<(Vec<u8>, u64)>(TERMINAL_QUEUE);
        let write = move || {
            let mut out = io::stdout().lock();
            for (text, points) in chunks {
                match out.write_all(&text).and_then(|()| out.flush()) {
                    Ok(()) => {
                        sink.succeeded(points);
                        sink.deliver.emitted(points);
                    }
                    Err(error) => {
                        sink.failed("stdout", &error.to_string());
                        sink.deliver.lost("stdout_failed", points);
                    }
                }
            }
        };
        let writer = std::thread::Builder::new().name("stdout".to_owned()).spawn(write)?;
        Ok(Self {
            queue: Some(queue),
            writer: Some(writer),
        })
    }

    /// Hands rows over; false if the terminal does not take any for too long.
    pub(crate) fn write(&self, text: Vec<u8>, points: u64) -> bool {
        let Some(queue) = &self.queue else { return false };
        let deadline = Instant::now() + TERMINAL_PATIENCE;
        let mut chunk = (text, points);
        loop {
            match queue.try_send(chunk) {
                Ok(()) => return true,
                Err(mpsc::TrySendError::Full(back)) if Instant::now() < deadline => {
                    chunk = back;
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(_) => return false,
            }
        }
    }
}

impl Drop for Terminal {
    /// Writes out what waits, unless the terminal takes nothing.
    fn drop(&mut self) {
        self.queue = None;
        let deadline = Instant::now() + TERMINAL_PATIENCE;
        if let Some(writer) = self.writer.take() {
            while !writer.is_finished() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(2));
            }
            if writer.is_finished() {
                let _ = writer.join();
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use crate::config::TextFormat;

    fn config(path: PathBuf, rotate_bytes: Option<u64>) -> FileConfig {
        FileConfig {
            path,
            format: TextFormat::Json,
            rotate_bytes,
            rotate_keep: 2,
        }
    }

    #[test]
    fn rows_are_appended_across_starts_and_can_be_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/rows.jsonl");
        let mut sink = FileSink::open(config(path.clone(), None)).unwrap();
        assert_eq!(sink.write(b"one\n").unwrap(), 0);
        let mut sink = FileSink::open(config(path.clone(), None)).unwrap();
        let mark = sink.write(b"two\n").unwrap();
        sink.take_back(mark);
        sink.write(b"three\n").unwrap();
        assert_eq!(std::fs::read_to_string(path).unwrap(), "one\nthree\n");
    }

    #[test]
    fn files_are_rotated_and_the_oldest_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows");
        let mut sink = FileSink::open(config(path.clone(), Some(4096))).unwrap();
        for n in 0..8 {
            sink.write(format!("{n:02047}\n").as_bytes()).unwrap();
        }
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        let rows = |text: String| text.lines().map(|row| row.parse::<u32>().unwrap()).collect::<Vec<_>>();
        assert_eq!(
            (rows(read("rows")), rows(read("rows.1")), rows(read("rows.2"))),
            (vec![6, 7], vec![4, 5], vec![2, 3])
        );
        assert!(!dir.path().join("rows.3").exists());
    }
}
