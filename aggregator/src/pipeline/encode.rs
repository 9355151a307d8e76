//! A group's records to bodies: encode once per form, compress on all cores.

use std::{collections::HashMap, io::Write as _, num::NonZero, sync::Arc};

use flate2::{Compression, write::GzEncoder};
use records::{
    Category, FlowLog, Globals, Measurement, RecordBatch,
    encode::{Body, BodyBuilder, Format, PointEncoder, PointTooLarge},
};

use super::{Delivery, flows};
use crate::route::{Form, Plan, PointForm};

/// Sets of tags whose encoders are kept: one per agent, and one more for each change.
const MAX_GLOBALS: usize = 4096;

/// One body ready for a queue or a text sink.
#[derive(Debug)]
pub(crate) struct Packed {
    pub(crate) category: Category,
    pub(crate) points: u32,
    pub(crate) raw_len: u32,
    pub(crate) gzip: bool,
    pub(crate) bytes: Vec<u8>,
}

/// Bodies of one form.
#[derive(Debug, Default)]
pub(crate) struct Encoded {
    pub(crate) bodies: Vec<Packed>,
    /// Records that no body can carry.
    pub(crate) too_large: u64,
}

/// Encoders by the tags of the agents heard of.
#[derive(Debug)]
pub(crate) struct Encoders {
    /// In the order of the plan's forms.
    by_form: HashMap<Arc<Globals>, Vec<Option<PointEncoder>>>,
    workers: usize,
}

// === impl Encoders ===

impl Encoders {
    pub(crate) fn new() -> Self {
        let workers = std::thread::available_parallelism().map_or(1, NonZero::get);
        Self {
            by_form: HashMap::new(),
            workers,
        }
    }

    /// Encodes the deliveries once per form of the plan, with `flows` for their flow logs, in which `received` is told, Unix
    /// seconds.
    pub(crate) fn encode(
        &mut self,
        plan: &Plan,
        deliveries: &[Delivery],
        flows: &[&FlowLog],
        received: i64,
    ) -> Vec<Encoded> {
        if self.by_form.len() >= MAX_GLOBALS {
            self.by_form.clear();
        }
        for delivery in deliveries {
            self.prepare(plan, delivery);
        }
        let mut out = Vec::with_capacity(plan.forms.len());
        for (index, (form, _)) in plan.forms.iter().enumerate() {
            let form = match form {
                Form::Points(form) => form,
                Form::Flows(form) => {
                    out.push(flows::encode(form, flows, received, self.workers));
                    continue;
                }
            };
            let mut encoded = Encoded::default();
            for categories in split(form.format) {
                let mut builder = BodyBuilder::new(form.format, form.limit);
                let mut raw: Vec<Body> = Vec::new();
                for kind in Measurement::POINTS {
                    if !categories.contains(&kind.category()) {
                        continue;
                    }
                    for delivery in deliveries {
                        let encoder = self
                            .by_form
                            .get(&delivery.globals)
                            .and_then(|encoders| encoders.get(index)?.as_ref());
                        let Some(encoder) = encoder else { continue };
                        push(kind, &delivery.batch, &mut builder, encoder, &mut raw, |error| {
                            if encoded.too_large == 0 {
                                tracing::error!(node = %delivery.id.node, %error, "A record cannot be sent and is lost");
                            }
                            encoded.too_large += 1;
                        });
                    }
                }
                raw.extend(builder.finish());
                let category = categories.first().copied().unwrap_or(Category::Network);
                encoded.bodies.extend(pack(form, category, raw, self.workers));
            }
            if form.format == Format::Json {
                flows::lines(form.limit, flows, received, &mut encoded);
            }
            out.push(encoded);
        }
        out
    }

    fn prepare(&mut self, plan: &Plan, delivery: &Delivery) {
        if self.by_form.contains_key(&delivery.globals) {
            return;
        }
        let by_form: Vec<Option<PointEncoder>> = plan
            .forms
            .iter()
            .map(|(form, _)| match form {
                Form::Points(form) => Some(PointEncoder::new(form.format, &delivery.globals, form.options)),
                Form::Flows(_) => None,
            })
            .collect();
        if let Some(encoder) = by_form
            .iter()
            .flatten()
            .next()
            .filter(|encoder| !encoder.adjustments().is_empty())
        {
            tracing::warn!(
                node = %delivery.id.node, adjustments = ?encoder.adjustments(),
                "Global tags had to be changed to fit the limits of points"
            );
        }
        self.by_form.insert(Arc::clone(&delivery.globals), by_form);
    }
}

/// The categories that go into bodies of their own: DataWay takes each at another path, a text takes all.
fn split(format: Format) -> &'static [&'static [Category]] {
    match format {
        Format::Protobuf | Format::LineProtocol => &[&[Category::Network], &[Category::Logging]],
        Format::Json | Format::Table => &[&Category::ALL],
    }
}

/// Adds the records of one kind.
fn push(
    kind: Measurement,
    batch: &RecordBatch,
    builder: &mut BodyBuilder,
    encoder: &PointEncoder,
    full: &mut Vec<Body>,
    mut too_large: impl FnMut(PointTooLarge),
) {
    let mut done = |pushed: Result<Option<Body>, PointTooLarge>| match pushed {
        Ok(body) => full.extend(body),
        Err(error) => too_large(error),
    };
    match kind {
        Measurement::Netflow => batch.netflow.iter().for_each(|row| done(builder.push(encoder, row))),
        Measurement::Httpflow => batch.httpflow.iter().for_each(|row| done(builder.push(encoder, row))),
        Measurement::Dnsflow => batch.dnsflow.iter().for_each(|row| done(builder.push(encoder, row))),
        Measurement::Bash => batch.bash.iter().for_each(|row| done(builder.push(encoder, row))),
        // No point.
        Measurement::FlowLog => {}
    }
}

/// Compresses bodies, in parallel if there are several.
fn pack(form: &PointForm, category: Category, raw: Vec<Body>, workers: usize) -> Vec<Packed> {
    let workers = workers.min(raw.len());
    if form.gzip_level == 0 || workers <= 1 {
        return raw
            .into_iter()
            .map(|body| pack_one(form.gzip_level, category, body))
            .collect();
    }
    let share = raw.len().div_ceil(workers);
    let mut shares: Vec<Vec<Body>> = Vec::with_capacity(workers);
    let mut rest = raw.into_iter();
    loop {
        let next: Vec<Body> = rest.by_ref().take(share).collect();
        if next.is_empty() {
            break;
        }
        shares.push(next);
    }
    let level = form.gzip_level;
    let work = move |share: Vec<Body>| {
        share
            .into_iter()
            .map(|body| pack_one(level, category, body))
            .collect::<Vec<Packed>>()
    };
    std::thread::scope(|scope| {
        let mine = shares.pop();
        let others: Vec<_> = shares
            .into_iter()
            .map(|share| scope.spawn(move || work(share)))
            .collect();
        let mut packed = Vec::new();
        for other in others {
            match other.join() {
                Ok(share) => packed.extend(share),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        packed.extend(mine.map(work).unwrap_or_default());
        packed
    })
}

fn pack_one(gzip_level: u32, category: Category, body: Body) -> Packed {
    let raw_len = u32::try_from(body.bytes.len()).unwrap_or(u32::MAX);
    let plain = |bytes| Packed {
        category,
        points: body.points,
        raw_len,
        gzip: false,
        bytes,
    };
    if gzip_level == 0 {
        return plain(body.bytes);
    }
    let mut gzip = GzEncoder::new(Vec::with_capacity(body.bytes.len() / 4), Compression::new(gzip_level));
    // Writing to memory does not fail; should it ever, the body goes uncompressed.
    match gzip.write_all(&body.bytes).and_then(|()| gzip.finish()) {
        Ok(bytes) => Packed {
            category,
            points: body.points,
            raw_len,
            gzip: true,
            bytes,
        },
        Err(_) => plain(body.bytes),
    }
}
