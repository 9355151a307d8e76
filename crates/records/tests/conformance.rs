//! The output table against the documented lists, and the generated page against the table.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::{collections::BTreeSet, path::Path};

use ec_records::{
    column::{Output, Role, markdown},
    netflow::{COLUMNS, MEASUREMENT},
};

#[test]
fn netflow_has_exactly_the_documented_columns() {
    let documented: BTreeSet<String> = include_str!("data/netflow.txt")
        .lines()
        .filter(|line| !line.starts_with('#') && !line.is_empty())
        .map(str::to_owned)
        .collect();
    assert_eq!(documented.len(), 25 + 7);
    let mut table: BTreeSet<String> = COLUMNS
        .iter()
        .filter(|column| column.output == Output::Documented)
        .map(|column| match column.role {
            Role::Tag => format!("tag {}", column.name),
            Role::Field => format!("field {} int {}", column.name, column.unit.as_str()),
        })
        .collect();
    // A global tag of the agent, not a column of the row.
    table.insert("tag host".to_owned());
    assert_eq!(table, documented);
}

#[test]
fn column_names_are_unique_and_clean() {
    let names: BTreeSet<_> = COLUMNS.iter().map(|column| column.name).collect();
    assert_eq!(names.len(), COLUMNS.len());
    assert!(names.iter().all(|name| {
        name.bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
    }));
}

#[test]
fn the_page_of_measurements_is_current() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/MEASUREMENTS.md");
    let page = format!(
        "# Measurements\n\nGenerated from the output tables in `crates/records`; after a change run\n\
         `UPDATE_DOCS=1 cargo test -p ec-records --test conformance`.\n\n\
         Every record also carries the agent's global tags: `host` and the configured extra tags. Times are nanoseconds\n\
         since the Unix epoch.\n\n{}",
        markdown(MEASUREMENT, COLUMNS)
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
