//! Putting tables together while compiling.

use crate::column::{Cell, Column};

/// All columns of the parts, in order; `N` is their number.
#[expect(
    clippy::indexing_slicing,
    reason = "runs while compiling, where a wrong index is an error"
)]
pub(crate) const fn concat<const N: usize>(parts: &[&[Column]]) -> [Column; N] {
    let mut out = [source("", ""); N];
    let (mut at, mut part) = (0, 0);
    while part < parts.len() {
        let mut index = 0;
        while index < parts[part].len() {
            out[at] = parts[part][index];
            at += 1;
            index += 1;
        }
        part += 1;
    }
    assert!(at == N, "N is the number of columns");
    out
}

/// The tag that names the measurement.
pub(crate) const fn source(measurement: &'static str, doc: &'static str) -> Column {
    Column::tag("source", Cell::Fixed(measurement), doc)
}
