//! What a process gave to its library, or got from it: for the capture, a segment of the stream of plain text.

use aya_ebpf::helpers::generated;

/// A stretch of plain text.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Segment {
    /// `ebpf_common::http::way` it goes.
    pub(crate) way: u8,
    /// The connection is gone.
    pub(crate) reset: bool,
    /// Number of its first byte.
    pub(crate) seq: u32,
    /// Bytes in it.
    pub(crate) len: u32,
    /// Where they begin in [`Source`].
    pub(crate) at: u32,
}

/// Where its bytes are: an address of the current process; 0 if they are nowhere.
pub(crate) struct Source(pub(crate) u64);

/// Copies bytes of the process; negative if they are not there.
///
/// # Safety
/// `to` is writable for `size` bytes.
#[inline(always)]
pub(crate) unsafe fn load_bytes(from: &Source, at: u32, to: *mut u8, size: u32) -> i64 {
    // SAFETY: as demanded of the caller; the helper checks the source.
    unsafe { generated::bpf_probe_read_user(to.cast(), size, (from.0 + at as u64) as *const _) }
}
