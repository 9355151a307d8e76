//! One group of batches into one transaction, and what follows when it is stored.

use records::FlowLog;

use super::{Committer, Outlet, Refusal, full};
use crate::{
    config::WhenFull,
    pipeline::{
        Delivery,
        dedup::Touched,
        encode::{Encoded, Packed},
    },
    queue::{BodyMeta, Changes},
    route::Form,
    sinks::text::FileSink,
};

// === impl Committer ===

impl Committer {
    /// `flows` are what is stored of flow logs.
    pub(super) fn store_group(
        &mut self,
        fresh: &[Delivery],
        flows: &[&FlowLog],
        touched: &Touched,
    ) -> Result<(), Refusal> {
        let encoded = if fresh.is_empty() && flows.is_empty() {
            Vec::new()
        } else {
            let received = i64::try_from(self.clock.unix_seconds()).unwrap_or(i64::MAX);
            self.encoders.encode(&self.plan, fresh, flows, received)
        };
        let mut puts: Vec<(usize, u32, u64, BodyMeta, &[u8])> = Vec::new();
        let mut dropped: Vec<(usize, &'static str, u64)> = Vec::new();
        let mut texts: Vec<(usize, &Encoded)> = Vec::new();
        for ((form, indexes), encoded) in self.plan.forms.iter().zip(&encoded) {
            for &index in indexes {
                let Some((sink, outlet)) = self.sinks.get(index) else {
                    continue;
                };
                dropped.push((index, "too_large", encoded.too_large));
                let Outlet::Queue(slot) = outlet else {
                    texts.push((index, encoded));
                    continue;
                };
                let mut rows: Vec<_> = (sink.backlog().next_id..)
                    .zip(&encoded.bodies)
                    .map(|(id, body)| (index, *slot, id, self.meta(form, body), body.bytes.as_slice()))
                    .collect();
                if !rows.is_empty() && sink.is_full(rows.iter().map(|(.., meta, _)| meta.cost()).sum()) {
                    if sink.when_full == WhenFull::Withhold {
                        return Err(full(sink));
                    }
                    dropped.push((
                        index,
                        "queue_full",
                        encoded.bodies.iter().map(|body| u64::from(body.points)).sum(),
                    ));
                    continue;
                }
                puts.append(&mut rows);
            }
        }
        let mut marks = Vec::new();
        for (index, encoded) in &texts {
            if let Some((sink, Outlet::File(file))) = self.sinks.get_mut(*index) {
                match write_file(file, encoded) {
                    Ok(mark) => marks.push((*index, mark)),
                    Err(error) => {
                        let why = format!("`{}` cannot be written: {error}", sink.target());
                        sink.failed("file", &why);
                        if sink.when_full == WhenFull::Withhold {
                            let sink = sink.name.clone();
                            self.take_back(&marks);
                            return Err(Refusal::Full { sink, why });
                        }
                        dropped.push((*index, "file_failed", points_of(encoded)));
                    }
                }
            }
        }
        let changes = Changes {
            put: puts
                .iter()
                .map(|(_, slot, id, meta, body)| (*slot, *id, *meta, *body))
                .collect(),
            remove: self
                .upkeep
                .removals
                .iter()
                .filter_map(|removal| Some((removal.sink.slot?, removal.id)))
                .collect(),
            seen: self
                .dedup
                .rows(touched)
                .map(|(key, seen)| (key, seen.to_bytes()))
                .collect(),
            forget: self.upkeep.forget.clone(),
        };
        let removed = match self.store.commit(&changes) {
            Ok(removed) => removed,
            Err(error) => {
                self.take_back(&marks);
                return Err(self.storage_failed(error));
            }
        };
        self.upkeep.forget.clear();
        for (removal, existed) in self.upkeep.removals.drain(..).zip(removed) {
            removal.sink.release(removal.meta.points);
            if existed {
                removal.sink.removed(&removal.meta);
            }
        }
        for (index, (sink, _)) in self.sinks.iter().enumerate() {
            let mine: Vec<(u64, BodyMeta)> = puts
                .iter()
                .filter(|(of, ..)| *of == index)
                .map(|(_, _, id, meta, _)| (*id, *meta))
                .collect();
            sink.stored(&mine);
        }
        for (index, reason, points) in dropped {
            if let Some((sink, _)) = self.sinks.get(index) {
                sink.queue.entered(points);
                sink.queue.lost(reason, points);
            }
        }
        for (index, encoded) in texts {
            let Some((sink, outlet)) = self.sinks.get(index) else {
                continue;
            };
            match outlet {
                Outlet::Queue(_) | Outlet::Metrics(_) => {}
                Outlet::File(_) if !marks.iter().any(|(marked, _)| *marked == index) => {}
                Outlet::File(_) => {
                    let points = points_of(encoded);
                    sink.deliver.entered(points);
                    sink.deliver.emitted(points);
                    sink.succeeded(points);
                }
                Outlet::Terminal(terminal) => {
                    for body in &encoded.bodies {
                        let points = u64::from(body.points);
                        sink.deliver.entered(points);
                        if !terminal.write(body.bytes.clone(), points) {
                            sink.failed("stdout", "standard output takes nothing; rows are dropped");
                            sink.deliver.lost("stdout_blocked", points);
                        }
                    }
                }
            }
        }
        let received = i64::try_from(self.clock.unix_seconds()).unwrap_or(i64::MAX);
        for (sink, outlet) in &self.sinks {
            let Outlet::Metrics(metrics) = outlet else { continue };
            let mut points = 0;
            for delivery in fresh {
                metrics.observe(&delivery.batch.flowlog, received);
                points += delivery.batch.flowlog.len() as u64;
            }
            sink.deliver.entered(points);
            sink.deliver.emitted(points);
            if points > 0 {
                sink.succeeded(points);
            }
        }
        Ok(())
    }

    pub(super) fn meta(&self, form: &Form, body: &Packed) -> BodyMeta {
        BodyMeta {
            format: form.body_form(),
            category: body.category,
            gzip: body.gzip,
            points: body.points,
            raw_len: body.raw_len,
            wire_len: u32::try_from(body.bytes.len()).unwrap_or(u32::MAX),
            created_ms: self.clock.unix_ms(),
            pkg: self.pkg_ids.next(self.clock.unix_seconds()),
        }
    }

    pub(super) fn take_back(&mut self, marks: &[(usize, u64)]) {
        for (index, mark) in marks {
            if let Some((_, Outlet::File(file))) = self.sinks.get_mut(*index) {
                file.take_back(*mark);
            }
        }
    }
}

fn points_of(encoded: &Encoded) -> u64 {
    encoded.bodies.iter().map(|body| u64::from(body.points)).sum()
}

/// Writes all bodies; returns the length before. On an error the file is as before.
fn write_file(file: &mut FileSink, encoded: &Encoded) -> std::io::Result<u64> {
    let mut text = Vec::with_capacity(encoded.bodies.iter().map(|body| body.bytes.len()).sum());
    for body in &encoded.bodies {
        text.extend_from_slice(&body.bytes);
    }
    file.write(&text)
}
