//! Maps and read-only data of the object. Sizes are defaults; the loader overrides that of the ring from the options.

use aya_ebpf::{
    bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sock},
    btf_maps::SkStorage,
    helpers::generated::bpf_sk_storage_get,
    macros::{btf_map, map},
    maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf},
};
use ebpf_common::{
    http::{HttpConfig, OwnNamespace},
    net::NetOffsets,
    tls::{Calls, ConnKey, RECORD, TlsConn, TlsSock, stat},
};

/// Kernel member offsets; filled before load, constant for the verifier.
#[unsafe(no_mangle)]
static OFFSETS: NetOffsets = NetOffsets::UNKNOWN;

/// Calls under way, by address of the thread. One that is forgotten tells nothing when it returns.
#[map]
pub(crate) static CALLS: LruHashMap<u64, Calls> = LruHashMap::with_max_entries(16_384, 0);
/// Connections. One that is forgotten begins anew.
#[map]
pub(crate) static CONNS: LruHashMap<ConnKey, TlsConn> = LruHashMap::with_max_entries(65_536, 0);
/// First bytes of records that were made inside of calls, while the connection's socket is not known.
#[map]
pub(crate) static RECORDS: LruHashMap<[u64; RECORD / 8], ConnKey> = LruHashMap::with_max_entries(16_384, 0);
/// What is known of each TCP socket; it goes with the socket.
#[btf_map]
static SOCKS: SkStorage<TlsSock> = SkStorage::new();
/// What is switched on for whom, see `ebpf_common::net::policy`.
#[map]
pub(crate) static POLICY: HashMap<u64, u32> = HashMap::with_max_entries(16_384, 0);
/// Connections, by number, that user space found not to speak HTTP, or no longer. One that is forgotten costs events.
#[map]
pub(crate) static QUIT: LruHashMap<u64, u32> = LruHashMap::with_max_entries(4_096, 0);
/// Events for user space.
#[map]
pub(crate) static EVENTS: RingBuf = RingBuf::with_byte_size(4 << 20, 0);
/// Starts and ends of processes.
#[map]
pub(crate) static STARTS: RingBuf = RingBuf::with_byte_size(256 << 10, 0);
/// Processes whose end is told.
#[map]
pub(crate) static TRACKED: HashMap<u32, u32> = HashMap::with_max_entries(65_536, 1);
/// Settings.
#[map]
static CONFIG: Array<HttpConfig> = Array::with_max_entries(1, 0);
/// Result of `tls_namespace`.
#[map]
pub(crate) static NAMESPACE: Array<OwnNamespace> = Array::with_max_entries(1, 0);
/// Counters, see `ebpf_common::tls::stat`.
#[map]
static STATS: PerCpuArray<u64> = PerCpuArray::with_max_entries(stat::COUNT, 0);

/// The offsets; volatile so that the compiler does not fold the placeholder in.
#[inline(always)]
pub(crate) fn offsets() -> &'static NetOffsets {
    // SAFETY: points at the object's read-only data; black_box only hides its initial value.
    unsafe { &*core::hint::black_box(&raw const OFFSETS) }
}

/// The settings.
#[inline(always)]
pub(crate) fn config() -> Option<&'static HttpConfig> {
    CONFIG.get(0)
}

/// What is known of a socket; null if there is no room for that.
#[inline(always)]
pub(crate) fn known(sk: *mut bpf_sock) -> *mut TlsSock {
    // SAFETY: `sk` is a full socket, as the helper demands; a new value is all zero.
    unsafe {
        bpf_sk_storage_get(
            (&raw const SOCKS).cast_mut().cast(),
            sk.cast(),
            core::ptr::null_mut(),
            BPF_SK_STORAGE_GET_F_CREATE as u64,
        )
    }
    .cast()
}

/// Adds to a per-CPU counter.
#[inline(always)]
pub(crate) fn count(index: u32, n: u64) {
    if let Some(value) = STATS.get_ptr_mut(index) {
        // SAFETY: the pointer is valid for this run; the slot belongs to this CPU. A softirq may interrupt between load
        // and store, so the addition is atomic.
        unsafe { crate::kernel::atomic_add(value, n) };
    }
}
