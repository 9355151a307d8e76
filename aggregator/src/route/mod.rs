//! Which sink gets which records, and in which form.
//!
//! Every sink gets every record that it has a form for: DataWay takes points, Kafka, Loki and Prometheus flow logs, JSON lines
//! both. Sinks that want the same form share the encoding work: a [`Plan`] has one [`Form`] per
//! distinct form and names the sinks of each.

use std::collections::BTreeMap;

use records::{
    encode::{DEFAULT_BODY_LIMIT, EncodeOptions, Format},
    flowlog::{FieldSet, FlowFormat, fields},
};

use crate::{
    config::{SinkConfig, SinkKind},
    queue::BodyForm,
};

/// All that decides the bytes of a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// Points, and flow logs where it is JSON lines.
    Points(PointForm),
    /// Flow logs alone.
    Flows(FlowForm),
}

/// All that decides the bytes of a body of points.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PointForm {
    pub(crate) format: Format,
    pub(crate) options: EncodeOptions,
    /// gzip level, 0 for none.
    pub(crate) gzip_level: u32,
    /// Largest body before compression, bytes.
    pub(crate) limit: usize,
}

/// All that decides the bytes of a body of flow logs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FlowForm {
    pub(crate) format: FlowFormat,
    /// Largest body before compression, bytes.
    pub(crate) limit: usize,
    /// `None` for Kafka.
    pub(crate) loki: Option<LokiLabels>,
}

/// Labels of Loki's streams.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LokiLabels {
    /// The same for every stream.
    pub(crate) fixed: BTreeMap<String, String>,
    /// Fields that are labels, and not in the line.
    pub(crate) fields: FieldSet,
}

/// The forms needed, each with the indexes of its sinks.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) forms: Vec<(Form, Vec<usize>)>,
}

// === impl Plan ===

impl Plan {
    pub(crate) fn new(sinks: &[SinkConfig]) -> Self {
        let mut forms: Vec<(Form, Vec<usize>)> = Vec::new();
        for (index, sink) in sinks.iter().enumerate() {
            let Some(form) = Form::of(&sink.kind) else { continue };
            match forms.iter_mut().find(|(known, _)| *known == form) {
                Some((_, sinks)) => sinks.push(index),
                None => forms.push((form, vec![index])),
            }
        }
        Self { forms }
    }
}

// === impl Form ===

impl Form {
    /// `None`: the sink takes records as they are.
    fn of(kind: &SinkKind) -> Option<Self> {
        let text = |format| {
            Self::Points(PointForm {
                format,
                options: EncodeOptions::default(),
                gzip_level: 0,
                limit: DEFAULT_BODY_LIMIT,
            })
        };
        Some(match kind {
            SinkKind::Dataway(dataway) => Self::Points(PointForm {
                format: dataway.encoding.into(),
                options: EncodeOptions {
                    compat_keys: dataway.compat_keys,
                },
                gzip_level: dataway.gzip_level,
                limit: dataway.max_body_bytes,
            }),
            SinkKind::Stdout(format) => text((*format).into()),
            SinkKind::File(file) => text(file.format.into()),
            SinkKind::Kafka(kafka) => Self::Flows(FlowForm {
                format: kafka.format,
                limit: kafka.max_body_bytes,
                loki: None,
            }),
            SinkKind::Loki(loki) => {
                let is_label = |field: &&fields::FlowField| {
                    field.is_label(loki.format) && !loki.exclude_labels.iter().any(|name| name == field.name)
                };
                let labels = fields::FIELDS.iter().filter(is_label);
                Self::Flows(FlowForm {
                    format: loki.format,
                    limit: loki.max_body_bytes,
                    loki: Some(LokiLabels {
                        fixed: loki.static_labels.clone(),
                        fields: labels.fold(FieldSet::NONE, |set, field| set.with(field.id)),
                    }),
                })
            }
            SinkKind::Prometheus(_) => return None,
        })
    }

    /// What a body of it is in the queue.
    pub(crate) const fn body_form(&self) -> BodyForm {
        match self {
            Self::Points(points) => BodyForm::Points(points.format),
            Self::Flows(FlowForm { loki: None, .. }) => BodyForm::KafkaFlows,
            Self::Flows(_) => BodyForm::LokiPush,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use crate::config::{Endpoint, TextFormat};

    #[test]
    fn sinks_of_one_form_share_it() {
        let endpoint = || Endpoint::parse("http://h?token=t").unwrap();
        let mut other = SinkConfig::dataway("c", endpoint());
        let SinkKind::Dataway(dataway) = &mut other.kind else {
            unreachable!()
        };
        dataway.gzip_level = 0;
        let sinks = [
            SinkConfig::dataway("a", endpoint()),
            SinkConfig::stdout(TextFormat::Json),
            SinkConfig::dataway("b", endpoint()),
            other,
        ];
        let groups: Vec<Vec<usize>> = Plan::new(&sinks).forms.into_iter().map(|(_, sinks)| sinks).collect();
        assert_eq!(groups, [vec![0, 2], vec![1], vec![3]]);
    }
}
