//! The series of one metric.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use prometheus_client::{
    encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet},
    metrics::MetricType,
};
use records::{
    FlowLog,
    flowlog::{
        FlowValue,
        fields::{self, Field},
    },
};

use super::{
    Limits,
    definition::{FlowMetric, Match, MetricKind, Source, expression, label_name, source},
};

/// Between the label values of a series; in none of them, as it is in no UTF-8 text.
const BETWEEN: u8 = 0xff;
/// How often series are looked through for those to drop.
const SWEEP: Duration = Duration::from_secs(5);

/// One metric.
#[derive(Debug)]
pub(super) struct Metric {
    definition: FlowMetric,
    filters: Vec<Alternatives>,
    labels: Vec<Value>,
    flatten: Vec<Field>,
    value: Option<Field>,
    scale: f64,
    series_max: usize,
    expiry: Duration,
    state: Mutex<State>,
}

/// Filters of one field: one of them must hold.
#[derive(Debug)]
struct Alternatives {
    value: Value,
    filters: Vec<(Match, String, Option<regex::Regex>)>,
}

/// Where a value comes from.
#[derive(Debug)]
enum Value {
    Field(Field),
    Event(String),
}

#[derive(Debug, Default)]
struct State {
    series: HashMap<Box<[u8]>, Series>,
    other: Option<Series>,
    swept: Option<Instant>,
}

#[derive(Debug)]
struct Series {
    sum: f64,
    count: u64,
    /// By bucket, the last one for what is above all bounds.
    buckets: Box<[u64]>,
    seen: Instant,
}

/// Reads one flow, or one element of its lists.
#[derive(Clone, Copy)]
struct View<'a> {
    flow: &'a FlowLog,
    received: i64,
    /// The element of lists that are taken apart.
    element: Option<usize>,
}

// === impl Metric ===

impl Metric {
    /// `definition` has been checked.
    pub(super) fn new(definition: FlowMetric, limits: &Limits) -> Self {
        let value = |name: &str| match source(name)? {
            Source::Field(field) => Some(Value::Field(field.id)),
            Source::Event(key) => Some(Value::Event(key.to_owned())),
        };
        let mut filters: Vec<(String, Alternatives)> = Vec::new();
        for filter in &definition.filters {
            let regex = matches!(filter.how, Match::MatchRegex | Match::NotMatchRegex)
                .then(|| expression(&filter.value).ok())
                .flatten();
            let one = (filter.how, filter.value.clone(), regex);
            if let Some((_, known)) = filters.iter_mut().find(|(key, _)| *key == filter.key) {
                known.filters.push(one);
            } else if let Some(value) = value(&filter.key) {
                let filters_of = vec![one];
                filters.push((
                    filter.key.clone(),
                    Alternatives {
                        value,
                        filters: filters_of,
                    },
                ));
            }
        }
        Self {
            filters: filters.into_iter().map(|(_, filter)| filter).collect(),
            labels: definition.labels.iter().filter_map(|label| value(label)).collect(),
            flatten: definition
                .flatten
                .iter()
                .filter_map(|list| Some(fields::find(list)?.id))
                .collect(),
            value: fields::find(&definition.value_key).map(|field| field.id),
            scale: if definition.value_scale > 0.0 {
                definition.value_scale
            } else {
                1.0
            },
            series_max: limits.series_max,
            expiry: limits.expiry,
            state: Mutex::default(),
            definition,
        }
    }

    pub(super) const fn definition(&self) -> &FlowMetric {
        &self.definition
    }

    pub(super) fn observe(&self, flows: &[FlowLog], received: i64) {
        let now = Instant::now();
        let mut state = self.state.lock();
        self.sweep(&mut state, now);
        let mut scratch = Vec::with_capacity(256);
        for flow in flows {
            let mut view = View {
                flow,
                received,
                element: None,
            };
            if self.flatten.is_empty() {
                self.observe_one(view, &mut state, &mut scratch, now);
                continue;
            }
            // Lists of one flow go side by side: an interface with its direction.
            let elements = self.flatten.iter().map(|list| len(flow.value(*list, received)));
            for element in 0..elements.max().unwrap_or_default() {
                view.element = Some(element);
                self.observe_one(view, &mut state, &mut scratch, now);
            }
        }
    }

    fn observe_one(&self, view: View<'_>, state: &mut State, scratch: &mut Vec<u8>, now: Instant) {
        if !self.filters.iter().all(|filter| self.holds(filter, view, scratch)) {
            return;
        }
        let value = match self.value {
            None => 1.0,
            Some(field) => match view.flow.value(field, view.received).number() {
                Some(value) => value / self.scale * sampled(field, view.flow),
                None => return,
            },
        };
        scratch.clear();
        for label in &self.labels {
            self.put(label, view, scratch);
            scratch.push(BETWEEN);
        }
        let room = state.series.len() < self.series_max;
        let new = || Series::new(self.definition.buckets.len(), now);
        let series = match state.series.get_mut(scratch.as_slice()) {
            Some(known) => known,
            None if room => state.series.entry(scratch.as_slice().into()).or_insert_with(new),
            None => state.other.get_or_insert_with(new),
        };
        series.seen = now;
        match self.definition.kind {
            MetricKind::Gauge => series.sum = value,
            MetricKind::Counter => series.sum += value,
            MetricKind::Histogram => {
                series.sum += value;
                series.count += 1;
                let bucket = self.definition.buckets.partition_point(|bound| *bound < value);
                if let Some(bucket) = series.buckets.get_mut(bucket) {
                    *bucket += 1;
                }
            }
        }
    }

    fn holds(&self, alternatives: &Alternatives, view: View<'_>, scratch: &mut Vec<u8>) -> bool {
        scratch.clear();
        let present = self.put(&alternatives.value, view, scratch);
        let text = std::str::from_utf8(scratch).unwrap_or_default();
        alternatives.filters.iter().any(|(how, value, regex)| match how {
            Match::Equal => present && text == value,
            Match::NotEqual => !present || text != value,
            Match::Presence => present,
            Match::Absence => !present,
            Match::MatchRegex => present && regex.as_ref().is_some_and(|regex| regex.is_match(text)),
            Match::NotMatchRegex => !present || !regex.as_ref().is_some_and(|regex| regex.is_match(text)),
        })
    }

    /// Appends a value; false if there is none.
    fn put(&self, value: &Value, view: View<'_>, out: &mut Vec<u8>) -> bool {
        match value {
            Value::Event(key) => {
                let event = view.element.and_then(|element| view.flow.events.get(element));
                let found = event.and_then(|event| event.values.iter().find(|(known, _)| **known == **key));
                out.extend_from_slice(found.map_or("", |(_, value)| value).as_bytes());
                found.is_some()
            }
            Value::Field(field) => {
                let value = view.flow.value(*field, view.received);
                let value = match view.element {
                    Some(element) if self.flatten.contains(field) => nth(value, element),
                    _ => value,
                };
                value.plain(out);
                !matches!(value, FlowValue::Absent)
            }
        }
    }

    /// Drops series that had no flow for long.
    fn sweep(&self, state: &mut State, now: Instant) {
        if state
            .swept
            .is_some_and(|swept| now.duration_since(swept) < SWEEP.min(self.expiry))
        {
            return;
        }
        state.swept = Some(now);
        state
            .series
            .retain(|_, series| now.duration_since(series.seen) < self.expiry);
        if state
            .other
            .as_ref()
            .is_some_and(|other| now.duration_since(other.seen) >= self.expiry)
        {
            state.other = None;
        }
    }

    pub(super) fn encode(&self, prefix: &str, encoder: &mut DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let mut state = self.state.lock();
        self.sweep(&mut state, Instant::now());
        let (name, kind) = match self.definition.kind {
            // The text form adds it to each counter.
            MetricKind::Counter => (
                self.definition
                    .name
                    .strip_suffix("_total")
                    .unwrap_or(&self.definition.name),
                MetricType::Counter,
            ),
            MetricKind::Gauge => (self.definition.name.as_str(), MetricType::Gauge),
            MetricKind::Histogram => (self.definition.name.as_str(), MetricType::Histogram),
        };
        let help = match self.definition.help.as_str() {
            "" => "Made from flows",
            help => help.trim_end_matches('.'),
        };
        let name = format!("{prefix}{name}");
        let mut family = encoder.encode_descriptor(&name, help, None, kind)?;
        let keys: Vec<&str> = self
            .definition
            .labels
            .iter()
            .map(|label| label_name(&self.definition, label))
            .collect();
        for (values, series) in &state.series {
            let values = values.split(|byte| *byte == BETWEEN).map(text);
            let labels: Vec<(&str, &str)> = keys.iter().copied().zip(values).collect();
            if labels.is_empty() {
                self.put_series(series, &mut family)?;
            } else {
                self.put_series(series, &mut family.encode_family(&labels)?)?;
            }
        }
        if let Some(series) = &state.other {
            let labels: Vec<(&str, &str)> = keys.iter().map(|key| (*key, "other")).collect();
            self.put_series(series, &mut family.encode_family(&labels)?)?;
        }
        Ok(())
    }

    fn put_series(&self, series: &Series, encoder: &mut MetricEncoder<'_>) -> Result<(), std::fmt::Error> {
        match self.definition.kind {
            MetricKind::Counter => encoder.encode_counter::<NoLabelSet, f64, u64>(&series.sum, None),
            MetricKind::Gauge => encoder.encode_gauge(&series.sum),
            MetricKind::Histogram => {
                let bounds = self.definition.buckets.iter().copied().chain([f64::INFINITY]);
                let buckets: Vec<(f64, u64)> = bounds.zip(series.buckets.iter().copied()).collect();
                encoder.encode_histogram::<NoLabelSet>(series.sum, series.count, &buckets, None)
            }
        }
    }
}

// === impl Series ===

impl Series {
    fn new(buckets: usize, now: Instant) -> Self {
        Self {
            sum: 0.0,
            count: 0,
            buckets: vec![0; buckets + 1].into(),
            seen: now,
        }
    }
}

/// What a value of sampled packets stands for: with 1:N each packet seen stands for N.
fn sampled(field: Field, flow: &FlowLog) -> f64 {
    match field {
        Field::Bytes
        | Field::BytesAb
        | Field::BytesBa
        | Field::Packets
        | Field::PacketsAb
        | Field::PacketsBa
        | Field::PktDropBytes
        | Field::PktDropPackets => f64::from(flow.sampling.max(1)),
        _ => 1.0,
    }
}

fn len(value: FlowValue<'_>) -> usize {
    match value {
        FlowValue::Names(list) | FlowValue::Directions(list) => list.len(),
        FlowValue::Events(list) => list.len(),
        FlowValue::Flags(flags) => flags.count_ones() as usize,
        _ => 0,
    }
}

/// One element of a list.
fn nth(value: FlowValue<'_>, element: usize) -> FlowValue<'_> {
    match value {
        FlowValue::Names(list) => list
            .get(element)
            .map_or(FlowValue::Absent, |seen| FlowValue::Text(&seen.name)),
        FlowValue::Directions(list) => list
            .get(element)
            .map_or(FlowValue::Absent, |seen| FlowValue::Unsigned(seen.direction.into())),
        FlowValue::Events(list) => list.get(element..=element).map_or(FlowValue::Absent, FlowValue::Events),
        FlowValue::Flags(flags) => fields::FLAG_NAMES
            .iter()
            .filter(|(bit, _)| flags & bit != 0)
            .nth(element)
            .map_or(FlowValue::Absent, |(_, name)| FlowValue::Text(name)),
        other => other,
    }
}

/// A label's value; the text form escapes it.
fn text(value: &[u8]) -> &str {
    std::str::from_utf8(value).unwrap_or_default()
}
