//! The options of the agent: one definition for flags, environment variables, the TOML file and the documents.
//!
//! [`options()`] is the table; each row names the three forms, default, accepted values and the field of
//! [`AgentConfig`] it sets. Data flow: sources (file, environment, flags) ▶ [`ConfigBuilder`] ▶ [`AgentConfig`] or
//! all [`ConfigErrors`] at once. Precedence: flag over environment over object over file over default.
//!
//! ```
//! let config = ec_api::ConfigBuilder::new()
//!     .toml_str("ebpf.conf", "[[inputs.ebpf]]\ninterval = '30s'")
//!     .set("interval", ec_api::Source::Flag, "10s")
//!     .build()
//!     .unwrap();
//! assert_eq!(config.interval.as_secs(), 10);
//! ```
//!
//! [`collector`] is the Kubernetes object: its fields are turned into the same options. This crate does not know clap: a
//! program makes its flags from [`options()`].

mod address;
pub mod blacklist;
mod builder;
mod check;
pub mod collector;
mod config;
pub mod docs;
mod error;
mod route;
mod secret;
mod source;
mod spec;
mod subnet;
mod table;
mod value;
mod words;

pub use address::{DatawayUrl, Endpoint, HostPort};
pub use builder::ConfigBuilder;
pub use config::{
    AgentConfig, ConversationsConfig, FlowMetricsOptions, IdentityConfig, KafkaOptions, KernelConfig, KubernetesConfig,
    LimitsConfig, LogConfig, LokiOptions, NetConfig, NetlogConfig, OutputTls, OutputsConfig, PprofConfig, QueueConfig,
    SamplingConfig, TlsConfig, TraceConfig, UplinkConfig,
};
pub use error::{ConfigError, ConfigErrors, EXIT_USAGE};
pub use route::{BadRoute, HttpRoute, RoutePart};
pub use secret::Secret;
pub use source::Source;
pub use spec::{Group, Kind, OptionSpec, Origin};
pub use subnet::SubnetLabel;
pub use table::options;
pub use value::{Bytes, Raw};
pub use words::{
    DatawayEncoding, FileFormat, FlowFormat, FlowLogTypes, KafkaCompression, KafkaSasl, L7Flow, LogFormat, Plugin,
    StdoutFormat, UnknownWord,
};
