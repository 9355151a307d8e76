//! The agent's own pid namespace, where other nodes share the kernel. Run by user space.

use aya_ebpf::{macros::raw_tracepoint, programs::RawTracePointContext};
use ebpf_common::http::OwnNamespace;

use crate::{kernel::current_pidns, maps::NAMESPACE};

/// Writes where it is.
#[raw_tracepoint]
pub(crate) fn http_namespace(_ctx: RawTracePointContext) -> i32 {
    let (address, level) = current_pidns();
    let _ = NAMESPACE.set(
        0,
        OwnNamespace {
            address,
            level: level as u64,
        },
        0,
    );
    0
}
