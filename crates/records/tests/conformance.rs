//! The output table against the documented lists, and the generated page against the table.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::{collections::BTreeSet, path::Path};

use ec_records::{
    Measurement,
    column::{Output, Role, markdown},
};

fn documented(measurement: Measurement) -> (&'static str, usize, usize) {
    match measurement {
        Measurement::Netflow => (include_str!("data/netflow.txt"), 25, 7),
        Measurement::Httpflow => (include_str!("data/httpflow.txt"), 25, 9),
        Measurement::Dnsflow => (include_str!("data/dnsflow.txt"), 21, 4),
        Measurement::Bash => (include_str!("data/bash.txt"), 1, 4),
        Measurement::FlowLog => unreachable!("no points"),
    }
}

#[test]
fn measurements_have_exactly_the_documented_columns() {
    for measurement in Measurement::POINTS {
        let (text, tags, fields) = documented(measurement);
        let documented: BTreeSet<String> = text
            .lines()
            .filter(|line| !line.starts_with('#') && !line.is_empty())
            .map(str::to_owned)
            .collect();
        let role = |role: &str| documented.iter().filter(|line| line.starts_with(role)).count();
        assert_eq!((role("tag "), role("field ")), (tags, fields), "{measurement:?}");
        let mut table: BTreeSet<String> = measurement
            .columns()
            .iter()
            .filter(|column| column.output == Output::Documented)
            .map(|column| match column.role {
                Role::Tag => format!("tag {}", column.name),
                Role::Field => {
                    let text = format!("field {} {} {}", column.name, column.ty.as_str(), column.unit.as_str());
                    text.trim_end().to_owned()
                }
            })
            .collect();
        // A global tag of the agent, not a column of the row.
        table.insert("tag host".to_owned());
        assert_eq!(table, documented, "{measurement:?}");
    }
}

#[test]
fn column_names_are_unique_and_clean() {
    for measurement in Measurement::POINTS {
        let columns = measurement.columns();
        let names: BTreeSet<_> = columns.iter().map(|column| column.name).collect();
        assert_eq!(names.len(), columns.len(), "{measurement:?}");
        assert!(names.iter().all(|name| {
            name.bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
        }));
    }
}

#[test]
fn the_page_of_measurements_is_current() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/MEASUREMENTS.md");
    let measurements = Measurement::POINTS.map(|it| markdown(it.name(), it.category().as_str(), it.columns()));
    let page = format!(
        "# Measurements\n\nGenerated from the output tables in `crates/records`; after a change run\n\
         `UPDATE_DOCS=1 cargo test -p ec-records --test conformance`.\n\n\
         Every record also carries the agent's global tags: `host` and the configured extra tags. Times are nanoseconds\n\
         since the Unix epoch.\n\n{}\n{}",
        measurements.join("\n"),
        ec_records::flowlog::fields::markdown(),
    );
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&path, &page).expect("write docs/MEASUREMENTS.md");
    }
    let stored = std::fs::read_to_string(&path).expect("docs/MEASUREMENTS.md");
    assert!(
        stored == page,
        "docs/MEASUREMENTS.md is not current; run UPDATE_DOCS=1 cargo test -p ec-records --test conformance"
    );
}
