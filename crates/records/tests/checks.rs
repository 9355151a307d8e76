//! Point checks on global tags, and bodies of bounded size.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, missing_docs)]

mod common;

use common::{any_row, decode_lines, decode_protobuf, expected, globals, tcp_row};
use ec_records::{
    Globals,
    encode::{AdjustmentKind, Body, BodyBuilder, EncodeOptions, Format, PointEncoder},
};
use proptest::prelude::*;

type Tags = Vec<(String, String)>;

fn tags_of(globals: &Globals) -> (Tags, Vec<(String, AdjustmentKind)>) {
    let encoder = PointEncoder::new(Format::Protobuf, globals, EncodeOptions::default());
    let mut out = Vec::new();
    encoder.encode_into(&tcp_row(), &mut out).unwrap();
    let own = expected(&tcp_row(), &[]).tags;
    let point = decode_protobuf(&out).remove(0);
    for (key, value) in &own {
        assert_eq!(&point.tags[key], value, "a global tag must not replace {key}");
    }
    let extra = point
        .tags
        .into_iter()
        .filter(|(key, _)| !own.contains_key(key))
        .collect();
    (
        extra,
        encoder
            .adjustments()
            .iter()
            .map(|a| (a.key.clone(), a.kind.clone()))
            .collect(),
    )
}

fn pair(key: &str, value: &str) -> (String, String) {
    (key.to_owned(), value.to_owned())
}

#[test]
fn clean_tags_pass_unchanged() {
    let (tags, adjusted) = tags_of(&globals(&[("host", "h"), ("wörter", "ä b")]));
    assert_eq!(tags, [pair("host", "h"), pair("wörter", "ä b")]);
    assert_eq!(adjusted, []);
}

#[test]
fn keys_and_values_are_repaired() {
    let long_key = "k".repeat(300);
    let wide = "ä".repeat(600);
    let (tags, adjusted) = tags_of(&globals(&[
        ("a.b", "1"),
        ("new\nline", "x\ny"),
        ("slash\\\\", "v\\"),
        (&long_key, "2"),
        ("wide", &wide),
        ("odd", &format!("x{wide}")),
    ]));
    let want = [
        pair("a_b", "1"),
        pair(&"k".repeat(256), "2"),
        pair("new line", "x y"),
        pair("odd", &format!("x{}", "ä".repeat(511))),
        pair("slash", "v"),
        pair("wide", &"ä".repeat(512)),
    ];
    assert_eq!(tags, want);
    assert_eq!(adjusted.len(), 8, "{adjusted:?}");
    assert!(adjusted.contains(&("a.b".to_owned(), AdjustmentKind::KeyChanged("a_b".to_owned()))));
    assert!(adjusted.contains(&("wide".to_owned(), AdjustmentKind::ValueChanged)));
}

#[test]
fn conflicting_tags_are_dropped_and_told() {
    let (tags, adjusted) = tags_of(&globals(&[
        ("host", "first"),
        ("x.y", "cut off"),
        ("x_y", "stays"),
        ("", "no key"),
        ("\\", "no key either"),
        ("pid", "77"),
        ("rtt", "88"),
        ("host", "second"),
    ]));
    // `rtt` is a field of the row: it is not written as a tag too.
    assert_eq!(tags, [pair("host", "second"), pair("x_y", "stays")]);
    let kinds: Vec<_> = adjusted.into_iter().map(|(_, kind)| kind).collect();
    assert_eq!(
        kinds,
        [
            AdjustmentKind::Duplicate,
            AdjustmentKind::Collision("x_y".to_owned()),
            AdjustmentKind::EmptyKey,
            AdjustmentKind::EmptyKey,
            AdjustmentKind::Shadowed,
            AdjustmentKind::Shadowed,
        ]
    );
}

#[test]
fn a_point_has_at_most_256_tags() {
    let many: Vec<_> = (0..300).map(|n| (format!("t{n:03}"), "v".to_owned())).collect();
    let many: Vec<_> = many.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    let globals = globals(&many);
    let mut row = common::udp_row();
    row.remote_k8s.clone_from(&row.local_k8s);
    for options in [
        EncodeOptions { compat_keys: false },
        EncodeOptions { compat_keys: true },
    ] {
        let encoder = PointEncoder::new(Format::Protobuf, &globals, options);
        let mut out = Vec::new();
        encoder.encode_into(&row, &mut out).unwrap();
        let point = decode_protobuf(&out).remove(0);
        assert_eq!(point.tags.len(), 256);
        assert!(
            point.tags.contains_key("t000") && !point.tags.contains_key("t299"),
            "the last ones go"
        );
        let surplus = encoder
            .adjustments()
            .iter()
            .filter(|a| a.kind == AdjustmentKind::Surplus)
            .count();
        assert_eq!(
            surplus,
            point
                .tags
                .keys()
                .filter(|key| !key.starts_with('t') || *key == "transport")
                .count()
                + 44
        );
    }
}

#[test]
fn a_series_key_too_long_for_line_protocol_is_reported() {
    let long = "x".repeat(1024);
    let many: Vec<_> = (0..64).map(|n| format!("t{n}")).collect();
    let many: Vec<_> = many.iter().map(|k| (k.as_str(), long.as_str())).collect();
    let encoder = PointEncoder::new(Format::LineProtocol, &globals(&many), EncodeOptions::default());
    let mut out = b"before".to_vec();
    let error = encoder.encode_into(&tcp_row(), &mut out).unwrap_err();
    assert_eq!(out, b"before");
    assert_eq!((error.part, error.limit), ("series key", 65_535));
    // Protobuf has no such limit.
    let encoder = PointEncoder::new(Format::Protobuf, &globals(&many), EncodeOptions::default());
    encoder.encode_into(&tcp_row(), &mut Vec::new()).unwrap();
}

#[test]
fn a_point_too_large_for_a_body_is_left_out() {
    let encoder = PointEncoder::new(Format::Protobuf, &globals(&[("host", "h")]), EncodeOptions::default());
    let mut small = tcp_row();
    small.process_name = "".into();
    let mut one = Vec::new();
    encoder.encode_into(&small, &mut one).unwrap();
    let mut builder = BodyBuilder::new(Format::Protobuf, one.len());
    assert_eq!(builder.push(&encoder, &small), Ok(None));
    let error = builder.push(&encoder, &tcp_row()).unwrap_err();
    assert_eq!((error.part, error.limit), ("body", one.len()));
    assert!(error.bytes > one.len());
    let body = builder.finish().unwrap();
    assert_eq!((body.points, body.bytes), (1, one));
    assert_eq!(builder.finish(), None);
}

#[test]
fn content_types() {
    let of = |format: Format| format.content_type();
    assert_eq!(of(Format::Protobuf), "application/protobuf; proto=com.guance.Point");
    assert_eq!(of(Format::LineProtocol), "application/line-protocol");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn bodies_keep_every_row_in_order(
        rows in prop::collection::vec(any_row(), 0..40),
        limit in 20_000_usize..60_000,
        line in any::<bool>(),
    ) {
        let format = if line { Format::LineProtocol } else { Format::Protobuf };
        // Rows of two agents share bodies.
        let encoders = ["a", "b"].map(|h| PointEncoder::new(format, &globals(&[("host", h)]), EncodeOptions::default()));
        let mut builder = BodyBuilder::new(format, limit);
        let mut bodies: Vec<Body> = Vec::new();
        for (index, row) in rows.iter().enumerate() {
            bodies.extend(builder.push(&encoders[index % 2], row).expect("every row is below 20,000 bytes"));
        }
        bodies.extend(builder.finish());
        prop_assert!(bodies.windows(2).all(|pair| pair[0].bytes.len() > limit / 2), "bodies are filled");
        let mut got = Vec::new();
        for body in &bodies {
            prop_assert!(body.bytes.len() <= limit);
            prop_assert_eq!(body.content_type, format.content_type());
            let points = if line {
                decode_lines(std::str::from_utf8(&body.bytes).unwrap())
            } else {
                decode_protobuf(&body.bytes)
            };
            prop_assert_eq!(points.len(), body.points as usize);
            got.extend(points);
        }
        let want: Vec<_> = rows.iter().enumerate().map(|(index, row)| {
            let point = expected(row, &[("host", ["a", "b"][index % 2])]);
            if line { common::without_empty(point) } else { point }
        }).collect();
        prop_assert_eq!(got, want);
    }
}
