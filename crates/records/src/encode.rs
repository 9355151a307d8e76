//! Encoders: records to bytes.
