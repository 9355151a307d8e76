//! Maps of the object. Sizes are defaults; the loader overrides that of the ring from the options.

use aya_ebpf::{
    macros::map,
    maps::{Array, HashMap, PerCpuArray, RingBuf},
};
use ebpf_common::bash::{BashConfig, stat};

/// What is to be done with a process's lines, see `ebpf_common::bash::verdict`.
#[map]
pub(crate) static PROCESSES: HashMap<u32, u32> = HashMap::with_max_entries(16_384, 0);
/// Events for user space.
#[map]
pub(crate) static EVENTS: RingBuf = RingBuf::with_byte_size(1 << 20, 0);
/// Settings.
#[map]
pub(crate) static CONFIG: Array<BashConfig> = Array::with_max_entries(1, 0);
/// Counters, see `ebpf_common::bash::stat`.
#[map]
pub(crate) static STATS: PerCpuArray<u64> = PerCpuArray::with_max_entries(stat::COUNT, 0);

/// Adds one to a per-CPU counter.
#[inline(always)]
pub(crate) fn count(index: u32) {
    if let Some(value) = STATS.get_ptr_mut(index) {
        // SAFETY: an aligned live map value. Another task may run on this CPU between load and store, so the addition is
        // atomic; `core::sync::atomic` has no read-modify-write on this target.
        unsafe { core::intrinsics::atomic_xadd::<u64, u64, { core::intrinsics::AtomicOrdering::Relaxed }>(value, 1) };
    }
}
