//! Writes the definition of the object, made from its types, into `crds/` and into the chart.

use std::{fs, process::ExitCode};

use anyhow::{Context as _, Result, bail};
use api::collector::EbpfCollector;
use kube::CustomResourceExt as _;

use crate::project;

/// The places of the definition, from the repository's root: Helm installs what is in the chart's own folder.
const FILES: &[&str] = &[
    "crds/ebpfcollectors.yaml",
    "charts/ebpf-collector/crds/ebpfcollectors.yaml",
];
const HEAD: &str = "# Made by `cargo xtask crds` from crates/api/src/collector: change it there.\n";

/// Arguments of `cargo xtask crds`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Write nothing; fail when a file is not what would be written.
    #[arg(long)]
    check: bool,
}

/// Writes or checks the files.
pub(crate) fn main(arguments: &Args) -> Result<ExitCode> {
    let root = project::root()?;
    let wanted = yaml()?;
    for file in FILES {
        let path = root.join(file);
        if !arguments.check {
            if let Some(folder) = path.parent() {
                fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
            }
            fs::write(&path, &wanted).with_context(|| format!("writing {}", path.display()))?;
        } else if fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))? != wanted {
            bail!("{file} is stale: run `cargo xtask crds`");
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn yaml() -> Result<String> {
    let definition = serde_yaml::to_string(&EbpfCollector::crd()).context("writing the definition as YAML")?;
    let mut text = HEAD.to_owned();
    for line in definition.lines() {
        text.push_str(&quoted(line));
        text.push('\n');
    }
    Ok(text)
}

/// A line of YAML with a plain scalar in quotes that YAML 1.1, which Kubernetes reads, takes for a truth value.
fn quoted(line: &str) -> String {
    let start = line.rfind(": ").map(|at| at + 2).or_else(|| {
        line.trim_start()
            .starts_with("- ")
            .then(|| line.len() - line.trim_start().len() + 2)
    });
    let Some((head, scalar)) = start.and_then(|at| line.split_at_checked(at)) else {
        return line.to_owned();
    };
    match scalar.to_ascii_lowercase().as_str() {
        "on" | "off" | "yes" | "no" | "y" | "n" => format!("{head}'{scalar}'"),
        _ => line.to_owned(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn committed_definitions_are_fresh() {
        main(&Args { check: true }).unwrap();
    }

    #[test]
    fn old_truth_values_are_quoted() {
        assert_eq!(quoted("  default: off"), "  default: 'off'");
        assert_eq!(quoted("  - No"), "  - 'No'");
        assert_eq!(quoted("  default: offset"), "  default: offset");
        assert_eq!(quoted("  default: false"), "  default: false");
        assert_eq!(quoted("  description: 'on: off'"), "  description: 'on: off'");
    }
}
