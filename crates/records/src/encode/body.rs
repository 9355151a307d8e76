//! Cuts a run of rows into request bodies of bounded size.

use super::{Format, PointEncoder, PointTooLarge, row::Record, table_header};
use crate::Measurement;

/// Largest raw (uncompressed) body that DataWay is sent by default, bytes.
pub const DEFAULT_BODY_LIMIT: usize = 1 << 20;

/// One request body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Body {
    /// Encoded points, not compressed.
    pub bytes: Vec<u8>,
    /// Number of points in `bytes`; header `X-Points`.
    pub points: u32,
    /// Header `Content-Type`.
    pub content_type: &'static str,
}

/// Collects rows until the next one would pass the limit. Rows of several agents may share a body: each `push` names
/// the encoder of its row. All encoders must have the builder's format.
#[derive(Debug)]
pub struct BodyBuilder {
    format: Format,
    limit: usize,
    buf: Vec<u8>,
    points: u32,
    /// What the last row of a table was.
    under: Option<Measurement>,
}

// === impl BodyBuilder ===

impl BodyBuilder {
    /// `limit` is the largest body in bytes before compression, e.g. [`DEFAULT_BODY_LIMIT`].
    #[must_use]
    pub const fn new(format: Format, limit: usize) -> Self {
        Self {
            format,
            limit,
            buf: Vec::new(),
            points: 0,
            under: None,
        }
    }

    /// Adds one row; in a table the head of its columns goes before the first of a kind. Returns the finished body when the row did not fit into it any more; the row is then the first of
    /// the next body.
    ///
    /// # Errors
    /// [`PointTooLarge`] when the row alone passes the limit; it is left out, the rows before it stay.
    pub fn push<R: Record>(&mut self, encoder: &PointEncoder, row: &R) -> Result<Option<Body>, PointTooLarge> {
        debug_assert_eq!(
            encoder.format(),
            self.format,
            "encoder and body builder must have one format"
        );
        let start = self.buf.len();
        if self.format == Format::Table && self.under != Some(R::MEASUREMENT) {
            self.buf.extend_from_slice(table_header(R::MEASUREMENT).as_bytes());
            self.under = Some(R::MEASUREMENT);
        }
        encoder.encode_into(row, &mut self.buf)?;
        let added = self.buf.len() - start;
        if added > self.limit {
            self.buf.truncate(start);
            return Err(PointTooLarge {
                measurement: R::MEASUREMENT.name(),
                part: "body",
                bytes: added,
                limit: self.limit,
            });
        }
        if self.buf.len() <= self.limit {
            self.points += 1;
            return Ok(None);
        }
        // The next body is likely as large as this one: same capacity, so that it does not grow step by step.
        let mut next = Vec::with_capacity(self.buf.capacity());
        next.extend(self.buf.drain(start..));
        let full = std::mem::replace(&mut self.buf, next);
        let points = std::mem::replace(&mut self.points, 1);
        Ok(Some(self.body(full, points)))
    }

    /// The rest, if any; the builder is empty afterwards and can be used again.
    #[must_use]
    pub fn finish(&mut self) -> Option<Body> {
        if self.points == 0 {
            return None;
        }
        let bytes = std::mem::take(&mut self.buf);
        let points = std::mem::take(&mut self.points);
        self.under = None;
        Some(self.body(bytes, points))
    }

    /// Bytes collected for the next body.
    #[must_use]
    pub fn len(&self) -> usize {
        self.buf.len()
    }

    /// True when no row is waiting.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.points == 0
    }

    const fn body(&self, bytes: Vec<u8>, points: u32) -> Body {
        Body {
            bytes,
            points,
            content_type: self.format.content_type(),
        }
    }
}
