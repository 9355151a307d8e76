//! Encoders: records to bytes.
//!
//! Entry: [`PointEncoder`] holds everything that is the same for all rows of one agent (global tags, key bytes) and
//! appends one row per call; [`BodyBuilder`] cuts a run of rows into request bodies of bounded size.
//!
//! Data flow: the column table of the measurement ([`crate::Measurement::columns`]) and the checked global tags ([`check`])
//! become one plan per row shape (module `plan`); a format module walks the plan. Rows of one shape (transport, direction,
//! which ends have Kubernetes names, ...) differ only in their values, so all that is constant is encoded once.

mod body;
pub mod check;
mod json;
mod line;
mod plan;
mod protobuf;
mod row;
mod table;
pub(crate) mod text;

use std::sync::{Arc, OnceLock, PoisonError, RwLock};

pub use body::{Body, BodyBuilder, DEFAULT_BODY_LIMIT};
pub use check::{Adjustment, AdjustmentKind};
use plan::{End, Plan, Shape};
pub use row::Record;
pub use table::table_header;

use crate::{Globals, Measurement, Str, column::Role};

/// Wire form of a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// DataWay protobuf points (`PBPoints`); entries may simply follow one another.
    Protobuf,
    /// InfluxDB line protocol, one line per point.
    LineProtocol,
    /// One flat JSON object per line.
    Json,
    /// One readable row per line for terminals, under a [`table_header`] that [`BodyBuilder`] writes.
    Table,
}

/// What an encoder may add to the documented columns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Also write the undocumented keys that the existing collector writes (`client_*`, `server_*`, `netns`, ...), for
    /// dashboards that depend on them. Not used by [`Format::Table`].
    pub compat_keys: bool,
}

/// A point that no body can carry; count it as lost with reason `too_large`. The buffer is as it was before the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a {measurement} point has {bytes} bytes of {part}, the limit is {limit}; shorten the extra tags")]
pub struct PointTooLarge {
    /// Measurement of the point.
    pub measurement: &'static str,
    /// What was too large: `body` or `series key`.
    pub part: &'static str,
    /// Its size in bytes.
    pub bytes: usize,
    /// The largest size in bytes that is accepted.
    pub limit: usize,
}

/// Turns rows of one agent into bytes of one [`Format`]. Build one per set of global tags and keep it: construction
/// encodes all constant parts, `encode_into` allocates nothing beyond the growth of the caller's buffer.
#[derive(Debug)]
pub struct PointEncoder {
    format: Format,
    options: EncodeOptions,
    globals: Vec<(String, String)>,
    adjustments: Vec<Adjustment>,
    /// By measurement and shape; those of a measurement that never comes are not made room for.
    plans: [OnceLock<Plans>; Measurement::ALL.len()],
    /// Plans of rows with labels, by shape and the labels' keys.
    labelled: RwLock<Vec<Labelled>>,
}

/// Sets of labels whose plans are kept; pods of one cluster have few.
const LABELLED_MAX: usize = 64;

/// Plans of one measurement, by shape.
type Plans = Box<[OnceLock<Plan>]>;

#[derive(Debug)]
struct Labelled {
    measurement: Measurement,
    shape: Shape,
    keys: Box<[Str]>,
    plan: Arc<Plan>,
}

// === impl Format ===

impl Format {
    /// Value of the `Content-Type` header for a body of this format.
    #[must_use]
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::Protobuf => "application/protobuf; proto=com.guance.Point",
            Self::LineProtocol => "application/line-protocol",
            Self::Json => "application/x-ndjson",
            Self::Table => "text/plain; charset=utf-8",
        }
    }
}

// === impl PointEncoder ===

impl PointEncoder {
    /// Checks the global tags (see [`check`]) and prepares an encoder. What had to be changed is in
    /// [`Self::adjustments`]; log it once.
    #[must_use]
    pub fn new(format: Format, globals: &Globals, options: EncodeOptions) -> Self {
        let columns = |measurement| plan::columns(measurement, format, options);
        let reserved = |key: &str| {
            let mut all = Measurement::POINTS.into_iter().flat_map(columns);
            all.any(|column| column.name == key && !column.is_default())
                || (format == Format::Json && json::RESERVED.contains(&key))
        };
        let tags = Measurement::POINTS
            .map(|kind| columns(kind).filter(|column| column.role == Role::Tag).count())
            .into_iter()
            .fold(0, usize::max);
        let (globals, adjustments) = check::clean_globals(globals, reserved, tags);
        Self {
            format,
            options,
            globals,
            adjustments,
            plans: [const { OnceLock::new() }; Measurement::ALL.len()],
            labelled: RwLock::default(),
        }
    }

    /// The format given to [`Self::new`].
    #[must_use]
    pub const fn format(&self) -> Format {
        self.format
    }

    /// What the point checks changed in the global tags.
    #[must_use]
    pub fn adjustments(&self) -> &[Adjustment] {
        &self.adjustments
    }

    /// Appends one row to `out`.
    ///
    /// # Errors
    /// [`PointTooLarge`] when the format cannot carry the row (line protocol: series key over 65,535 bytes); `out` is
    /// unchanged then.
    #[expect(
        clippy::indexing_slicing,
        reason = "indexes of measurements and shapes are below their number"
    )]
    pub fn encode_into<R: Record>(&self, row: &R, out: &mut Vec<u8>) -> Result<(), PointTooLarge> {
        if self.format == Format::Table {
            table::encode(R::MEASUREMENT, row, out);
            return Ok(());
        }
        let shape = Shape::of(row);
        let labels = row.k8s(End::Local).map_or(&[][..], |names| &names.labels);
        let labelled;
        let plan = if labels.is_empty() {
            let new = || Plan::new(self.format, R::MEASUREMENT, shape, &self.globals, &[], self.options);
            let room = || (0..Shape::COUNT).map(|_| OnceLock::new()).collect();
            self.plans[R::MEASUREMENT.index()].get_or_init(room)[shape.index()].get_or_init(new)
        } else {
            labelled = self.labelled(R::MEASUREMENT, shape, labels);
            &labelled
        };
        match self.format {
            Format::Protobuf => protobuf::encode(plan, row, out),
            Format::LineProtocol => return line::encode(plan, row, out),
            Format::Json => json::encode(plan, row, out),
            Format::Table => {}
        }
        Ok(())
    }

    /// The plan of rows with these labels.
    fn labelled(&self, measurement: Measurement, shape: Shape, labels: &[(Str, Str)]) -> Arc<Plan> {
        let same = |it: &&Labelled| {
            it.measurement == measurement && it.shape == shape && it.keys.iter().eq(labels.iter().map(|(key, _)| key))
        };
        let known = self.labelled.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = known.iter().find(same) {
            return Arc::clone(&found.plan);
        }
        drop(known);
        let plan = Arc::new(Plan::new(
            self.format,
            measurement,
            shape,
            &self.globals,
            labels,
            self.options,
        ));
        let mut known = self.labelled.write().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= LABELLED_MAX {
            known.clear();
        }
        known.push(Labelled {
            measurement,
            shape,
            keys: labels.iter().map(|(key, _)| key.clone()).collect(),
            plan: Arc::clone(&plan),
        });
        plan
    }
}
