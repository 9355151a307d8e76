//! What the stub keeps: counters, repeated bodies, sums, and a bounded run of points.

use std::collections::{BTreeMap, HashSet, VecDeque};

use serde::Serialize;

use super::decode::{Point, Value};

/// Violations kept as text; all are counted.
const MAX_VIOLATIONS: usize = 100;
/// Body ids remembered. At 1 MiB a body this covers far more than any test sends.
const MAX_IDS: usize = 1 << 20;
/// Distinct sums kept; points beyond go into the row with empty keys, so totals stay exact.
const MAX_SUMS: usize = 1 << 18;

/// Counters of a stub.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    /// Write requests by the status that was answered; 0 for no answer.
    pub requests: BTreeMap<u16, u64>,
    /// Write requests that a fault mode took, by mode.
    pub faulted: BTreeMap<String, u64>,
    /// Points taken, without duplicates.
    pub points: u64,
    /// The same by measurement.
    pub points_by_measurement: BTreeMap<String, u64>,
    /// Bodies that had been taken before under the same `X-Pkg-Id`.
    pub duplicates: u64,
    /// Points in them.
    pub duplicate_points: u64,
    /// Requests refused because they break a rule.
    pub violations_total: u64,
    /// The first of them, as text.
    pub violations: Vec<String>,
    /// Bodies taken.
    pub bodies: u64,
    /// Bodies taken that were gzip.
    pub gzip_bodies: u64,
    /// Bytes of taken bodies after decompression.
    pub bytes_raw: u64,
    /// Bytes of taken bodies on the wire.
    pub bytes_wire: u64,
    /// The largest taken body after decompression, bytes.
    pub largest_body: u64,
}

/// Sums of the `netflow` points of one process, transport and direction.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SumRow {
    /// Tag `pid`.
    pub pid: String,
    /// Tag `process_name`.
    pub process_name: String,
    /// Tag `transport`.
    pub transport: String,
    /// Tag `direction`.
    pub direction: String,
    /// Points.
    pub points: u64,
    /// Sum of every field. For `rtt` and `rtt_var` it means little.
    pub fields: BTreeMap<String, i128>,
}

/// Kept points from a number on; see [`Store::page`].
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct Page {
    /// Number to go on with.
    pub next: u64,
    /// Points from the number asked for that are not kept any more.
    pub missed: u64,
    /// Oldest first.
    pub points: Vec<Point>,
}

/// A checked body.
#[derive(Debug)]
pub(super) struct Accepted {
    pub(super) id: String,
    pub(super) points: Vec<Point>,
    pub(super) gzip: bool,
    pub(super) raw: usize,
    pub(super) wire: usize,
}

#[derive(Debug, Default)]
pub(super) struct Store {
    keep_points: usize,
    summary: Summary,
    points: VecDeque<Point>,
    sums: BTreeMap<[String; 4], (u64, BTreeMap<String, i128>)>,
    ids: HashSet<String>,
    /// The same ids by age.
    id_order: VecDeque<String>,
}

// === impl Store ===

impl Store {
    pub(super) fn new(keep_points: usize) -> Self {
        Self {
            keep_points,
            ..Self::default()
        }
    }

    pub(super) fn answered(&mut self, status: u16) {
        *self.summary.requests.entry(status).or_default() += 1;
    }

    pub(super) fn faulted(&mut self, mode: &str) {
        *self.summary.faulted.entry(mode.to_owned()).or_default() += 1;
    }

    pub(super) fn violation(&mut self, why: String) {
        self.summary.violations_total += 1;
        if self.summary.violations.len() < MAX_VIOLATIONS {
            self.summary.violations.push(why);
        }
    }

    /// Adds a body unless its id was added before.
    pub(super) fn accept(&mut self, body: Accepted) {
        let Accepted {
            id,
            points,
            gzip,
            raw,
            wire,
        } = body;
        if !self.ids.insert(id.clone()) {
            self.summary.duplicates += 1;
            self.summary.duplicate_points += points.len() as u64;
            return;
        }
        self.id_order.push_back(id);
        if self.id_order.len() > MAX_IDS
            && let Some(oldest) = self.id_order.pop_front()
        {
            self.ids.remove(&oldest);
        }
        let summary = &mut self.summary;
        summary.bodies += 1;
        summary.gzip_bodies += u64::from(gzip);
        summary.bytes_raw += raw as u64;
        summary.bytes_wire += wire as u64;
        summary.largest_body = summary.largest_body.max(raw as u64);
        summary.points += points.len() as u64;
        for point in points {
            *self
                .summary
                .points_by_measurement
                .entry(point.name.clone())
                .or_default() += 1;
            self.add_sums(&point);
            if self.keep_points > 0 {
                if self.points.len() == self.keep_points {
                    self.points.pop_front();
                }
                self.points.push_back(point);
            }
        }
    }

    fn add_sums(&mut self, point: &Point) {
        if point.name != "netflow" {
            return;
        }
        let mut key = ["pid", "process_name", "transport", "direction"]
            .map(|key| point.tags.get(key).cloned().unwrap_or_default());
        if self.sums.len() >= MAX_SUMS && !self.sums.contains_key(&key) {
            key = <[String; 4]>::default();
        }
        let (points, sums) = self.sums.entry(key).or_default();
        *points += 1;
        for (field, value) in &point.fields {
            if let Value::Int(value) = value {
                *sums.entry(field.clone()).or_default() += i128::from(*value);
            }
        }
    }

    pub(super) fn summary(&self) -> Summary {
        self.summary.clone()
    }

    /// The newest `limit` kept points, oldest first.
    pub(super) fn points(&self, limit: usize) -> Vec<Point> {
        self.points
            .iter()
            .skip(self.points.len().saturating_sub(limit))
            .cloned()
            .collect()
    }

    /// At most `limit` kept points from number `from` on; the first point that ever came has number 0.
    pub(super) fn page(&self, from: u64, limit: usize) -> Page {
        let first = self.summary.points - self.points.len() as u64;
        let start = from.max(first);
        let skip = usize::try_from(start - first).unwrap_or(usize::MAX);
        let points: Vec<Point> = self.points.iter().skip(skip).take(limit).cloned().collect();
        Page {
            next: start + points.len() as u64,
            missed: start - from,
            points,
        }
    }

    pub(super) fn sums(&self) -> Vec<SumRow> {
        self.sums
            .iter()
            .map(|([pid, process_name, transport, direction], (points, fields))| SumRow {
                pid: pid.clone(),
                process_name: process_name.clone(),
                transport: transport.clone(),
                direction: direction.clone(),
                points: *points,
                fields: fields.clone(),
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(id: usize, times: std::ops::Range<i64>) -> Accepted {
        let points = times
            .map(|time| Point {
                time,
                ..Point::default()
            })
            .collect();
        Accepted {
            id: id.to_string(),
            points,
            gzip: false,
            raw: 0,
            wire: 0,
        }
    }

    #[test]
    fn pages_go_on_where_the_last_ended_and_tell_what_is_gone() {
        let mut store = Store::new(3);
        store.accept(body(1, 0..2));
        let page = store.page(0, 10);
        assert_eq!((page.next, page.missed, page.points.len()), (2, 0, 2));
        assert_eq!(
            store.page(page.next, 10),
            Page {
                next: 2,
                ..Page::default()
            }
        );
        store.accept(body(2, 2..7));
        let page = store.page(page.next, 2);
        assert_eq!((page.next, page.missed), (6, 2));
        assert_eq!(page.points.iter().map(|point| point.time).collect::<Vec<_>>(), [4, 5]);
        assert_eq!(store.page(page.next, 2).points.first().map(|point| point.time), Some(6));
    }
}
