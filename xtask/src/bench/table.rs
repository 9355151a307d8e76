//! The table of results, as text and as docs/PERFORMANCE.md.

use std::{fmt::Write as _, fs};

/// One result.
#[derive(Clone, Debug)]
pub(super) struct Row {
    /// What was measured.
    pub(super) what: String,
    /// The result with its unit.
    pub(super) measured: String,
    /// What it should be.
    pub(super) target: String,
    /// Whether it is.
    pub(super) met: bool,
}

/// All results of a run.
#[derive(Debug, Default)]
pub(super) struct Document {
    rows: Vec<Row>,
    texts: Vec<(String, String)>,
}

impl Document {
    pub(super) fn new() -> Self {
        Self::default()
    }

    /// Adds a result, and shows it at once.
    pub(super) fn row(&mut self, row: Row) {
        eprintln!(
            "{} {}: {} (target {})",
            verdict(row.met),
            row.what,
            row.measured,
            row.target
        );
        self.rows.push(row);
    }

    /// Adds lines that are shown as they are.
    pub(super) fn text(&mut self, title: &str, text: &str) {
        self.texts.push((title.to_owned(), text.to_owned()));
    }

    pub(super) fn missed(&self) -> usize {
        self.rows.iter().filter(|row| !row.met).count()
    }

    pub(super) fn met(&self) -> usize {
        self.rows.len() - self.missed()
    }

    pub(super) fn plain(&self) -> String {
        let mut out = String::new();
        for row in &self.rows {
            let _ = writeln!(
                out,
                "{:6} {}: {} (target {})",
                verdict(row.met),
                row.what,
                row.measured,
                row.target
            );
        }
        for (title, text) in &self.texts {
            let _ = writeln!(out, "\n{title}\n{text}");
        }
        out
    }

    pub(super) fn markdown(&self, quick: bool) -> String {
        let mut out = String::from("# Performance\n\nWritten by `make bench`; not edited by hand.\n\n");
        let _ = writeln!(out, "Machine: {}. ", machine());
        let _ = writeln!(
            out,
            "Each ratio is the median over interleaved pairs of runs with and without the agent, lowest and highest \
             pair in parentheses; both ends of all traffic are on the machine. The agent reads `netflow` alone, except in \
             the HTTP rows, which compare `httpflow` on and off. By default `httpflow` and `dnsflow` are on too: what \
             they add to other traffic is in no row.{}\n",
            if quick {
                " This was a quick run: few and short pairs."
            } else {
                ""
            }
        );
        out.push_str("| what | measured | target | |\n|---|---|---|---|\n");
        for row in &self.rows {
            let _ = writeln!(
                out,
                "| {} | {} | {} | {} |",
                row.what,
                row.measured,
                row.target,
                verdict(row.met)
            );
        }
        for (title, text) in &self.texts {
            let _ = writeln!(out, "\n## {title}\n\n```text\n{text}\n```");
        }
        out
    }
}

fn verdict(met: bool) -> &'static str {
    if met { "met" } else { "MISSED" }
}

fn machine() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map_or("unknown CPU", |rest| rest.trim_start_matches([' ', '\t', ':']));
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    // The part after the version proper names a build, not a property of the kernel.
    let release = read("/proc/sys/kernel/osrelease");
    let release = release.trim().split('-').next().unwrap_or("unknown").to_owned();
    format!("{cores} cores, {model}, Linux {release}")
}

/// A number with separators, without decimals when it is large.
pub(super) fn thousands(value: f64) -> String {
    if value < 100.0 {
        return format!("{value:.2}");
    }
    let digits = format!("{value:.0}");
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_readable() {
        assert_eq!(thousands(1.5), "1.50");
        assert_eq!(thousands(999.0), "999");
        assert_eq!(thousands(1_234_567.4), "1,234,567");
    }

    #[test]
    fn a_missed_target_is_counted_and_marked() {
        let mut document = Document::new();
        for met in [true, false] {
            document.row(Row {
                what: "a".into(),
                measured: "1".into(),
                target: "2".into(),
                met,
            });
        }
        assert_eq!((document.met(), document.missed()), (1, 1));
        assert!(document.markdown(false).contains("| a | 1 | 2 | MISSED |"));
    }
}
