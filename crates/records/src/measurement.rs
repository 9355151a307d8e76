//! The measurements, and where each belongs.

use crate::{bash, column::Column, dnsflow, httpflow, netflow};

/// A kind of record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Measurement {
    /// Connection statistics.
    Netflow,
    /// HTTP exchanges.
    Httpflow,
    /// DNS look-ups.
    Dnsflow,
    /// Command lines.
    Bash,
    /// Flow logs in the NetObserv format. They are no points: [`crate::flowlog`] has their table.
    FlowLog,
}

/// Category of DataWay, the last segment of `/v1/write/<category>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Category {
    /// Flows.
    Network,
    /// Logs.
    Logging,
}

// === impl Measurement ===

impl Measurement {
    /// All, in the order in which batches carry them.
    pub const ALL: [Self; 5] = [Self::Netflow, Self::Httpflow, Self::Dnsflow, Self::Bash, Self::FlowLog];
    /// Those that are points of DataWay.
    pub const POINTS: [Self; 4] = [Self::Netflow, Self::Httpflow, Self::Dnsflow, Self::Bash];

    /// Name on the wire.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Netflow => "netflow",
            Self::Httpflow => "httpflow",
            Self::Dnsflow => "dnsflow",
            Self::Bash => "bash",
            Self::FlowLog => "flowlog",
        }
    }

    /// Where DataWay takes it.
    #[must_use]
    pub const fn category(self) -> Category {
        match self {
            Self::Netflow | Self::Httpflow | Self::Dnsflow | Self::FlowLog => Category::Network,
            Self::Bash => Category::Logging,
        }
    }

    /// Its output table; that of flow logs is [`crate::flowlog::fields::FIELDS`].
    #[must_use]
    pub const fn columns(self) -> &'static [Column] {
        match self {
            Self::Netflow => netflow::COLUMNS,
            Self::Httpflow => httpflow::COLUMNS,
            Self::Dnsflow => dnsflow::COLUMNS,
            Self::Bash => bash::COLUMNS,
            Self::FlowLog => &[],
        }
    }

    /// Place in [`Self::ALL`].
    pub(crate) const fn index(self) -> usize {
        self as usize
    }
}

// === impl Category ===

impl Category {
    /// All.
    pub const ALL: [Self; 2] = [Self::Network, Self::Logging];

    /// Segment of the path.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Network => "network",
            Self::Logging => "logging",
        }
    }
}
