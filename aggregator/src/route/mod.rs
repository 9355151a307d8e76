//! Which sink gets which records, and in which form.
//!
//! Every sink gets every record. Sinks that want the same form share the encoding work: a [`Plan`] has one [`Form`] per
//! distinct form and names the sinks of each.

use records::encode::{DEFAULT_BODY_LIMIT, EncodeOptions, Format};

use crate::config::{SinkConfig, SinkKind};

/// All that decides the bytes of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Form {
    pub(crate) format: Format,
    pub(crate) options: EncodeOptions,
    /// gzip level, 0 for none.
    pub(crate) gzip_level: u32,
    /// Largest body before compression, bytes.
    pub(crate) limit: usize,
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
            let form = Form::of(&sink.kind);
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
    fn of(kind: &SinkKind) -> Self {
        let text = |format| Self {
            format,
            options: EncodeOptions::default(),
            gzip_level: 0,
            limit: DEFAULT_BODY_LIMIT,
        };
        match kind {
            SinkKind::Dataway(dataway) => Self {
                format: dataway.encoding.into(),
                options: EncodeOptions {
                    compat_keys: dataway.compat_keys,
                },
                gzip_level: dataway.gzip_level,
                limit: dataway.max_body_bytes,
            },
            SinkKind::Stdout(format) => text((*format).into()),
            SinkKind::File(file) => text(file.format.into()),
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
