//! The document of all options, made from the table.

use std::fmt::Write;

use crate::{Group, Kind, OptionSpec, options};

const HEAD: &str = "\
# Options

<!-- Made from the option table in crates/api: change that, then run
     `UPDATE_DOCS=1 cargo test -p ec-api --test docs`. -->

Each option can be given in three ways, and most as a field of an `EbpfCollector` object too. Where several are used, the
first of these wins: command-line flag, environment variable, object, TOML file, default.

- **File**: the key below `[[inputs.ebpf]]`, or at the top level.
- **Environment**: an empty value means \"not set\". An unknown name that begins with `ENV_INPUT_EBPF_` is refused.
- **Flag**: a list is one flag given many times, or one value with commas. A switch without a value means true.

Durations have units (`60s`, `1m30s`). Sizes have units of any case: `K`, `KB`, `M`, `MB`, `G`, `GB`, `T`, `TB` count in
thousands, `KiB`, `MiB`, `GiB`, `TiB` in 1024s, `B` is a byte.

A value that cannot be used stops the program at start with exit code 64; every fault is named, with the option, the
value, where it came from and what is accepted. Nothing is replaced silently.

With option `collector` a program takes over what changes in the object while it runs, but for the options that say
otherwise. With an object that cannot be used the last good configuration stays, and health says what is wrong.
";

/// The whole document.
#[must_use]
pub fn markdown() -> String {
    let mut text = HEAD.to_owned();
    let mut groups: Vec<Group> = options().iter().map(|spec| spec.group).collect();
    groups.dedup();
    for group in groups {
        // Writing to a String cannot fail.
        let _ = write!(text, "\n## {}\n", group.title());
        for spec in options().iter().filter(|spec| spec.group == group) {
            let _ = section(&mut text, spec);
        }
    }
    text
}

fn section(text: &mut String, spec: &OptionSpec) -> std::fmt::Result {
    write!(text, "\n### `{}`\n\n{}\n\n", spec.key, spec.doc)?;
    let mut names: Vec<String> = spec
        .env
        .iter()
        .chain(spec.env_aliases)
        .map(|name| format!("`{name}`"))
        .collect();
    names.extend(spec.flag.map(|flag| match spec.kind {
        Kind::Switch => format!("`--{flag}[=true|false]`"),
        Kind::Value => format!("`--{flag} VALUE`"),
        Kind::List => format!("`--{flag} VALUE,...`"),
        Kind::Map => format!("`--{flag} KEY=VALUE,...`"),
    }));
    if names.is_empty() {
        writeln!(text, "- File only")?;
    } else {
        writeln!(text, "- Also: {}", names.join(", "))?;
    }
    match spec.default {
        None => writeln!(text, "- Default: not set")?,
        Some("") => writeln!(text, "- Default: empty")?,
        Some(default) => writeln!(text, "- Default: `{default}`")?,
    }
    writeln!(text, "- Accepted: {}", spec.accepts)?;
    if spec.at_start {
        writeln!(text, "- A change in the object takes effect at the next start")?;
    }
    match spec.inert {
        Some(reason) => writeln!(text, "- **No effect**: {reason}. A warning is logged when it is set."),
        None => Ok(()),
    }
}
