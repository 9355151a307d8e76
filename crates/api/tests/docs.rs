//! docs/OPTIONS.md is what the table says.

#![allow(clippy::unwrap_used, missing_docs)]

use std::{fs, path::Path};

#[test]
fn options_document_is_up_to_date() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/OPTIONS.md");
    let wanted = ec_api::docs::markdown();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        fs::write(&path, &wanted).unwrap();
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == wanted,
        "docs/OPTIONS.md is stale: run `UPDATE_DOCS=1 cargo test -p ec-api --test docs`"
    );
    for spec in ec_api::options() {
        assert!(found.contains(&format!("\n### `{}`\n", spec.key)), "{}", spec.key);
    }
}
