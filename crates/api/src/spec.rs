//! The shape of one row of the option table.

use crate::{AgentConfig, value::Raw};

/// One option: its names, default, meaning, and the field it sets.
#[derive(Debug)]
pub struct OptionSpec {
    /// Key in the TOML file, and the option's name everywhere.
    pub key: &'static str,
    /// Environment variable; `None`: file only.
    pub env: Option<&'static str>,
    /// Further variables, read when [`OptionSpec::env`] is not set.
    pub env_aliases: &'static [&'static str],
    /// Command-line flag without its dashes; `None`: file only.
    pub flag: Option<&'static str>,
    /// How many values it takes.
    pub kind: Kind,
    /// Default as it would be written; `None`: not set.
    pub default: Option<&'static str>,
    /// Section of the documents.
    pub group: Group,
    /// Who defined it.
    pub origin: Origin,
    /// Why a value given has no effect; the agent warns when it is given.
    pub inert: Option<&'static str>,
    /// Whether the value is, or may hold, a secret.
    pub secret: bool,
    /// Whether a change in the object takes effect at the next start of the program only.
    pub at_start: bool,
    /// What is accepted.
    pub accepts: &'static str,
    /// What it does.
    pub doc: &'static str,
    pub(crate) set: fn(&mut AgentConfig, &Raw) -> Result<(), String>,
    pub(crate) get: fn(&AgentConfig) -> Option<Raw>,
}

/// How many values an option takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// True or false; a flag without a value means true.
    Switch,
    /// One value.
    Value,
    /// Any number of values: a TOML array, a list with commas, a repeated flag.
    List,
    /// Key and value pairs: a TOML table, `a=1,b=2`, a repeated flag `a=1`.
    Map,
}

/// Who defined an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The eBPF collector's document.
    Documented,
    /// The launcher around the documented collector; kept so that its files still load.
    OldLauncher,
    /// This project.
    Ours,
}

/// Section of the documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    /// What is collected and how often.
    Collection,
    /// `ebpf-trace`.
    Trace,
    /// `bpf-netlog`.
    Netlog,
    /// Sampling of records.
    Sampling,
    /// Resource limits.
    Limits,
    /// Names on records.
    Identity,
    /// Kubernetes access.
    Kubernetes,
    /// Agent to aggregator.
    Uplink,
    /// Where records go.
    Outputs,
    /// Disk queue.
    Queue,
    /// Sizes of kernel maps.
    Kernel,
    /// Logs, admin server, profiling.
    Operation,
    /// Keys of the old launcher.
    Launcher,
}

// === impl Group ===

impl Group {
    /// Heading in the documents.
    #[must_use]
    pub const fn title(self) -> &'static str {
        match self {
            Self::Collection => "Collection",
            Self::Trace => "Tracing (`ebpf-trace`)",
            Self::Netlog => "Packets (`bpf-netlog`)",
            Self::Sampling => "Sampling",
            Self::Limits => "Resource limits",
            Self::Identity => "Identity",
            Self::Kubernetes => "Kubernetes",
            Self::Uplink => "Agent to aggregator",
            Self::Outputs => "Outputs",
            Self::Queue => "Disk queue",
            Self::Kernel => "Kernel maps",
            Self::Operation => "Operation",
            Self::Launcher => "Keys of the documented collector's launcher",
        }
    }
}
