//! Dead letters: bodies that a sink refused for good, kept with its answer for a person to look at.
//!
//! One JSON object per line: `time` (RFC 3339), `sink`, `status`, `answer`, `points`, `pkg_id`, `category`, `content_type`,
//! `content_encoding`, `body_base64`. Files are `<dir>/<sink>-<number>.jsonl`; all of one sink stay within a bound, the
//! oldest file goes first.

use std::{
    fs, io,
    io::Write as _,
    path::{Path, PathBuf},
};

use base64::Engine as _;
use serde::Serialize;

use super::deliver::QueuedBody;
use crate::queue::BodyForm;

/// The bound is cut into this many files, so that dropping the oldest drops little.
const FILES: u64 = 8;

/// Writer of one sink's dead letters.
#[derive(Debug)]
pub(crate) struct DeadLetters {
    dir: PathBuf,
    sink: String,
    max_bytes: u64,
    current: Option<u64>,
}

#[derive(Serialize)]
struct Letter<'a> {
    time: String,
    sink: &'a str,
    status: u16,
    answer: &'a str,
    points: u32,
    pkg_id: String,
    category: &'a str,
    content_type: &'a str,
    content_encoding: &'a str,
    body_base64: String,
}

// === impl DeadLetters ===

impl DeadLetters {
    /// `max_bytes` bounds the files of this sink together.
    pub(crate) fn new(dir: PathBuf, sink: &str, max_bytes: u64) -> Self {
        Self {
            dir,
            sink: sink.to_owned(),
            max_bytes,
            current: None,
        }
    }

    /// The directory.
    pub(crate) fn path(&self) -> &Path {
        &self.dir
    }

    /// Appends one body and syncs the file. Returns how many older letters were dropped for room.
    pub(crate) fn write(&mut self, unix_ms: u64, status: u16, answer: &str, body: &QueuedBody) -> io::Result<u64> {
        let time = i64::try_from(unix_ms)
            .ok()
            .and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
        let letter = Letter {
            time: time.unwrap_or_default().to_string(),
            sink: &self.sink,
            status,
            answer,
            points: body.meta.points,
            pkg_id: body.meta.pkg.to_string(),
            category: body.meta.category.as_str(),
            content_type: body.meta.format.content_type(),
            content_encoding: match body.meta.format {
                BodyForm::KafkaFlows | BodyForm::LokiPush => "snappy",
                BodyForm::Points(_) if body.meta.gzip => "gzip",
                BodyForm::Points(_) => "identity",
            },
            body_base64: base64::engine::general_purpose::STANDARD.encode(&body.bytes),
        };
        let mut line = serde_json::to_vec(&letter)?;
        line.push(b'\n');
        fs::create_dir_all(&self.dir)?;
        let dropped = self.make_room(line.len() as u64)?;
        if line.len() as u64 > self.max_bytes {
            return Ok(dropped + 1);
        }
        let number = match self.current {
            Some(number) => number,
            None => self.files()?.last().map_or(1, |(number, _)| *number),
        };
        let full = fs::metadata(self.file(number)).map_or(0, |file| file.len()) >= self.max_bytes / FILES;
        let number = if full { number + 1 } else { number };
        self.current = Some(number);
        let mut file = fs::File::options().create(true).append(true).open(self.file(number))?;
        file.write_all(&line)?;
        file.sync_data()?;
        Ok(dropped)
    }

    fn make_room(&mut self, more: u64) -> io::Result<u64> {
        let mut dropped = 0;
        let mut files = self.files()?;
        let mut total: u64 = files.iter().map(|(_, len)| len).sum();
        while total + more > self.max_bytes && !files.is_empty() {
            let (number, len) = files.remove(0);
            let path = self.file(number);
            dropped += io::BufRead::split(io::BufReader::new(fs::File::open(&path)?), b'\n').count() as u64;
            fs::remove_file(path)?;
            total -= len;
            if self.current == Some(number) {
                self.current = Some(number + 1);
            }
        }
        Ok(dropped)
    }

    /// Number and length of this sink's files, oldest first.
    fn files(&self) -> io::Result<Vec<(u64, u64)>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let name = entry.file_name();
            let number = name
                .to_str()
                .and_then(|name| name.strip_prefix(&self.sink)?.strip_prefix('-')?.strip_suffix(".jsonl"))
                .and_then(|number| number.parse().ok());
            if let Some(number) = number {
                files.push((number, entry.metadata()?.len()));
            }
        }
        files.sort_unstable();
        Ok(files)
    }

    fn file(&self, number: u64) -> PathBuf {
        self.dir.join(format!("{}-{number:06}.jsonl", self.sink))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
mod tests {
    use records::encode::Format;

    use super::*;
    use crate::queue::{BodyMeta, PkgIds};

    fn body(bytes: &'static [u8]) -> QueuedBody {
        let pkg = PkgIds::new().next(1);
        let len = bytes.len() as u32;
        let format = Format::Protobuf.into();
        let meta = BodyMeta {
            format,
            category: records::Category::Network,
            gzip: true,
            points: 3,
            raw_len: len,
            wire_len: len,
            created_ms: 0,
            pkg,
        };
        QueuedBody {
            id: 1,
            meta,
            bytes: bytes.into(),
        }
    }

    #[test]
    fn a_letter_holds_the_answer_and_the_body() {
        let dir = tempfile::tempdir().unwrap();
        let mut letters = DeadLetters::new(dir.path().join("dead"), "main", 1 << 20);
        assert_eq!(
            letters
                .write(1_700_000_000_000, 400, "bad \"point\"", &body(b"\x01\xff"))
                .unwrap(),
            0
        );
        let text = fs::read_to_string(dir.path().join("dead/main-000001.jsonl")).unwrap();
        let letter: serde_json::Value = serde_json::from_str(text.trim()).unwrap();
        assert_eq!(letter["time"], "2023-11-14T22:13:20Z");
        assert_eq!(
            (&letter["status"], &letter["answer"]),
            (&400.into(), &"bad \"point\"".into())
        );
        assert_eq!((&letter["points"], &letter["body_base64"]), (&3.into(), &"Af8=".into()));
        assert_eq!(letter["content_encoding"], "gzip");
    }

    #[test]
    fn the_oldest_go_when_the_bound_is_reached() {
        let dir = tempfile::tempdir().unwrap();
        // A sink whose name begins like another's: its files are not touched.
        fs::write(dir.path().join("main-two-000001.jsonl"), "x\n").unwrap();
        let max = 16 * 1024;
        let mut dropped = 0;
        for n in 0..200 {
            // A new writer each time: as after a restart.
            let mut letters = DeadLetters::new(dir.path().to_owned(), "main", max);
            dropped += letters.write(n, 400, &format!("answer {n}"), &body(&[7; 100])).unwrap();
        }
        let letters = DeadLetters::new(dir.path().to_owned(), "main", max);
        let files = letters.files().unwrap();
        assert!(files.iter().map(|(_, len)| len).sum::<u64>() <= max);
        let kept: Vec<String> = files
            .iter()
            .flat_map(|(n, _)| {
                fs::read_to_string(letters.file(*n))
                    .unwrap()
                    .lines()
                    .map(str::to_owned)
                    .collect::<Vec<_>>()
            })
            .collect();
        assert_eq!(kept.len() as u64 + dropped, 200);
        assert!(kept.last().unwrap().contains("answer 199"));
        assert!(dir.path().join("main-two-000001.jsonl").exists());
    }
}
