//! Maps and read-only data of the object. Sizes of the tables are defaults; the loader overrides them from the options.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    macros::map,
    maps::{Array, HashMap, LruHashMap, PerCpuArray},
};
use ebpf_common::packets::{
    FlowKey, FlowValue, FragmentKey, FragmentValue, OtherKey, OtherValue, PacketConfig, PacketOffsets, stat,
};

/// Kernel member offsets; filled before load, constant for the verifier.
#[unsafe(no_mangle)]
static OFFSETS: PacketOffsets = PacketOffsets::UNKNOWN;

/// Flows; one of the two is written while the other is drained. Entries are made as they are needed: an idle machine has few.
#[map]
pub(crate) static FLOWS_0: HashMap<FlowKey, FlowValue> = HashMap::with_max_entries(100_000, BPF_F_NO_PREALLOC);
#[map]
pub(crate) static FLOWS_1: HashMap<FlowKey, FlowValue> = HashMap::with_max_entries(100_000, BPF_F_NO_PREALLOC);
/// What is in neither, by interface. User space makes the entries.
#[map]
pub(crate) static OTHER: HashMap<OtherKey, OtherValue> = HashMap::with_max_entries(16_384, 0);
/// Ports of packets that come in fragments.
#[map]
pub(crate) static FRAGMENTS: LruHashMap<FragmentKey, FragmentValue> = LruHashMap::with_max_entries(4096, 0);
/// Settings.
#[map]
pub(crate) static CONFIG: Array<PacketConfig> = Array::with_max_entries(1, 0);
/// Counters, see `ebpf_common::packets::stat`.
#[map]
pub(crate) static STATS: PerCpuArray<u64> = PerCpuArray::with_max_entries(stat::COUNT, 0);

/// The offsets; volatile so that the compiler does not fold the placeholder in.
#[inline(always)]
pub(crate) fn offsets() -> &'static PacketOffsets {
    // SAFETY: points at the object's read-only data; black_box only hides its initial value.
    unsafe { &*core::hint::black_box(&raw const OFFSETS) }
}

/// Adds to a number that other CPUs add to at the same time.
///
/// # Safety
/// `field` is aligned and in a live map value.
#[inline(always)]
pub(crate) unsafe fn add(field: *mut u64, n: u64) {
    // SAFETY: as above; `core::sync::atomic` has no read-modify-write on this target.
    unsafe { core::intrinsics::atomic_xadd::<u64, u64, { core::intrinsics::AtomicOrdering::Relaxed }>(field, n) };
}

/// Adds to a per-CPU counter.
#[inline(always)]
pub(crate) fn count(index: u32, n: u64) {
    if let Some(value) = STATS.get_ptr_mut(index) {
        // SAFETY: an aligned live map value. A softirq may interrupt between load and store.
        unsafe { add(value, n) };
    }
}
