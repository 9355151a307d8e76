//! What the machine has to do: a file of the initramfs, one `key value` pair per line.
//!
//! ```text
//! module /modules/tcp_diag.ko     in the order to load them
//! env RUST_LOG=debug
//! arg /bin/node-agent             the command, one word per line
//! arg doctor
//! ```

use std::fs;

use anyhow::{Context, Result, bail};

/// Where `cargo xtask vm` puts the file.
const PATH: &str = "/vm-init.conf";

/// The parsed file.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Config {
    /// Paths of kernel modules, dependencies first.
    pub(crate) modules: Vec<String>,
    /// The whole environment of the command.
    pub(crate) environment: Vec<(String, String)>,
    /// Program and arguments.
    pub(crate) command: Vec<String>,
}

impl Config {
    /// Reads and parses the file.
    pub(crate) fn load() -> Result<Self> {
        Self::parse(&fs::read_to_string(PATH).with_context(|| format!("reading {PATH}"))?)
    }

    fn parse(text: &str) -> Result<Self> {
        let mut config = Self::default();
        for line in text.lines() {
            match line.split_once(' ') {
                Some(("module", path)) => config.modules.push(path.to_owned()),
                Some(("arg", word)) => config.command.push(word.to_owned()),
                Some(("env", pair)) => {
                    let (name, value) = pair
                        .split_once('=')
                        .with_context(|| format!("{PATH}: no '=' in {line:?}"))?;
                    config.environment.push((name.to_owned(), value.to_owned()));
                }
                _ => bail!("{PATH}: line {line:?} is not understood"),
            }
        }
        Ok(config)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn reads_every_kind_of_line() {
        let config = Config::parse("module /modules/a.ko\nenv A=b=c d\narg /bin/x\narg two words\narg \n").unwrap();
        assert_eq!(config.modules, ["/modules/a.ko"]);
        assert_eq!(config.environment, [("A".to_owned(), "b=c d".to_owned())]);
        assert_eq!(config.command, ["/bin/x", "two words", ""]);
    }

    #[test]
    fn refuses_what_it_does_not_know() {
        assert!(Config::parse("modul x").is_err());
        assert!(Config::parse("env novalue").is_err());
    }
}
