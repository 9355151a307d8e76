//! Placeholder until the frame is there.
pub(in crate::capture) mod go;
