//! Where a value comes from.

use std::fmt;

/// A source of values; a greater one wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    /// The table's default.
    Default,
    /// The TOML file.
    File,
    /// The `EbpfCollector` object.
    Object,
    /// An environment variable.
    Env,
    /// A command-line flag.
    Flag,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Default => "default",
            Self::File => "file",
            Self::Object => "object",
            Self::Env => "environment",
            Self::Flag => "flag",
        })
    }
}
