//! Maps and read-only data of the object. Sizes are defaults; the loader overrides that of the ring from the options.

use aya_ebpf::{
    macros::map,
    maps::{Array, HashMap, PerCpuArray, ProgramArray, RingBuf},
};
use ebpf_common::dns::{DnsConfig, DnsOffsets, PORT_WORDS, stat};

/// Kernel member offsets; filled before load, constant for the verifier.
#[unsafe(no_mangle)]
static OFFSETS: DnsOffsets = DnsOffsets::UNKNOWN;

/// One bit per port: DNS is looked for there.
#[map]
pub(crate) static PORTS: Array<u64> = Array::with_max_entries(PORT_WORDS, 0);
/// What is switched on for whom, see `ebpf_common::net::policy`.
#[map]
pub(crate) static POLICY: HashMap<u64, u32> = HashMap::with_max_entries(16_384, 0);
/// Pieces of packets for user space.
#[map]
pub(crate) static EVENTS: RingBuf = RingBuf::with_byte_size(4 << 20, 0);
/// Settings.
#[map]
pub(crate) static CONFIG: Array<DnsConfig> = Array::with_max_entries(1, 0);
/// Counters, see `ebpf_common::dns::stat`.
#[map]
pub(crate) static STATS: PerCpuArray<u64> = PerCpuArray::with_max_entries(stat::COUNT, 0);

/// Programs of `httpflow` that see what was looked at here, if this one was handed the packet before them.
#[map]
pub(crate) static AFTER: ProgramArray = ProgramArray::with_max_entries(2, 0);

/// The offsets; volatile so that the compiler does not fold the placeholder in.
#[inline(always)]
pub(crate) fn offsets() -> &'static DnsOffsets {
    // SAFETY: points at the object's read-only data; black_box only hides its initial value.
    unsafe { &*core::hint::black_box(&raw const OFFSETS) }
}

/// Adds one to a per-CPU counter.
#[inline(always)]
pub(crate) fn count(index: u32) {
    if let Some(value) = STATS.get_ptr_mut(index) {
        // SAFETY: an aligned live map value. A softirq may interrupt between load and store, so the addition is atomic;
        // `core::sync::atomic` has no read-modify-write on this target.
        unsafe { core::intrinsics::atomic_xadd::<u64, u64, { core::intrinsics::AtomicOrdering::Relaxed }>(value, 1) };
    }
}
