//! Options that take one of a few words.

use std::{fmt, str::FromStr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The word is none of those accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{word}` is not one of {accepted}")]
pub struct UnknownWord {
    /// The word as given.
    pub word: String,
    /// The words accepted.
    pub accepted: String,
}

macro_rules! words {
    ($(#[$outer:meta])* $name:ident { $($(#[$inner:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$outer])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
        pub enum $name { $($(#[$inner])* #[serde(rename = $word)] $variant,)+ }

        impl $name {
            /// All of them, in the order of the documents.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The word as written in options.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl FromStr for $name {
            type Err = UnknownWord;

            fn from_str(word: &str) -> Result<Self, UnknownWord> {
                Self::ALL.iter().copied().find(|known| known.as_str() == word).ok_or_else(|| UnknownWord {
                    word: word.to_owned(),
                    accepted: [$($word),+].join(", "),
                })
            }
        }
    };
}

words! {
    /// A part of the agent that can be switched on by itself.
    Plugin {
        /// `netflow`, `httpflow`, `dnsflow`.
        EbpfNet = "ebpf-net",
        /// Commands typed into bash.
        EbpfBash = "ebpf-bash",
        /// The address behind a destination NAT, added to network records.
        EbpfConntrack = "ebpf-conntrack",
        /// Spans for tracing.
        EbpfTrace = "ebpf-trace",
        /// Network records and logs read from packets.
        BpfNetlog = "bpf-netlog",
    }
}

words! {
    /// Application protocols that `ebpf-net` may read.
    L7Flow {
        /// HTTP in the clear.
        Http = "httpflow",
        /// HTTP inside TLS.
        HttpTls = "httpflow-tls",
    }
}

words! {
    /// Shape of a log line.
    LogFormat {
        /// For people.
        Text = "text",
        /// One JSON object per line.
        Json = "json",
    }
}

words! {
    /// Body format of DataWay requests.
    DatawayEncoding {
        /// Protobuf points.
        Protobuf = "protobuf",
        /// Line protocol.
        LineProtocol = "line-protocol",
    }
}

words! {
    /// Types that the fields of flows have.
    FlowFormat {
        /// As today's consumers read them.
        Current = "current",
        /// As the documented field reference says.
        Seed = "seed",
    }
}

words! {
    /// What is told of flows.
    FlowLogTypes {
        /// Flows as they are.
        Flows = "flows",
        /// Conversations as they begin, go on and end.
        Conversations = "conversations",
        /// Conversations as they end.
        EndedConversations = "ended-conversations",
        /// Flows, and conversations as they begin, go on and end.
        All = "all",
    }
}

words! {
    /// Compression of Kafka messages.
    KafkaCompression {
        /// None.
        None = "none",
        /// gzip
        Gzip = "gzip",
        /// snappy
        Snappy = "snappy",
    }
}

words! {
    /// How user and password are sent to Kafka.
    KafkaSasl {
        /// Not at all.
        Disabled = "Disabled",
        /// As they are.
        Plain = "Plain",
        /// SCRAM-SHA-256
        ScramSha256 = "ScramSHA256",
        /// SCRAM-SHA-512
        ScramSha512 = "ScramSHA512",
    }
}

words! {
    /// Format of records written to a file.
    FileFormat {
        /// One JSON object per line.
        Json = "json",
        /// Line protocol.
        LineProtocol = "line-protocol",
        /// A table for people.
        Table = "table",
    }
}

words! {
    /// Format of records written to standard output.
    StdoutFormat {
        /// Nothing is written.
        Off = "off",
        /// One JSON object per line.
        Json = "json",
        /// Line protocol.
        LineProtocol = "line-protocol",
        /// A table for people.
        Table = "table",
    }
}
