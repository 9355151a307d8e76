//! Bounds that both ends of protocol version 1 may rely on.

/// Records of one batch at most.
pub const MAX_BATCH_RECORDS: usize = 2_000;
/// Bytes of one encoded batch at most, texts included; what an agent splits to.
pub const MAX_BATCH_BYTES: usize = 1 << 20;
/// Every aggregator takes messages of at least this many bytes.
pub const MIN_MAX_MESSAGE_BYTES: usize = 2 << 20;
/// Bytes of one text at most.
pub const MAX_STRING_BYTES: usize = 16 << 10;
/// Bytes that one record may need on the wire at most, its texts included.
pub const MAX_RECORD_BYTES: usize = 256 << 10;
/// Texts that one stream may hold at once.
pub const MAX_DICTIONARY_ENTRIES: usize = 65_536;
/// Bytes of all texts that one stream may hold at once.
pub const MAX_DICTIONARY_BYTES: usize = 4 << 20;
/// Tags made of labels that one end of a record may carry.
pub const MAX_LABELS: usize = 64;
/// Tags that a Hello may carry.
pub const MAX_TAGS: usize = 256;
/// Features that one capability vector may hold.
pub const MAX_FEATURES: usize = 64;
/// Bytes of a feature's name at most.
pub const MAX_FEATURE_NAME_BYTES: usize = 64;
/// Bytes of a feature's reason at most.
pub const MAX_FEATURE_REASON_BYTES: usize = 512;
/// Nodes of one page of an overview at most.
pub const MAX_OVERVIEW_NODES: usize = 1_000;
/// Nodes of one page of an overview, when the caller does not say.
pub const DEFAULT_OVERVIEW_NODES: usize = 500;
/// Bytes of the nodes in one page of an overview: under the 4 MiB that gRPC clients take by default.
pub const MAX_OVERVIEW_BYTES: usize = 2 << 20;
