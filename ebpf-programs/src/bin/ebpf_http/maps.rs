//! Maps and read-only data of the object. Sizes are defaults; the loader overrides that of the ring from the options.

use aya_ebpf::{
    bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sock},
    btf_maps::SkStorage,
    helpers::generated::bpf_sk_storage_get,
    macros::{btf_map, map},
    maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf},
};
use ebpf_common::{
    http::{HttpConfig, HttpSock, OwnNamespace, stat},
    net::NetOffsets,
};

/// Kernel member offsets; filled before load, constant for the verifier.
#[unsafe(no_mangle)]
static OFFSETS: NetOffsets = NetOffsets::UNKNOWN;

/// What is known of each TCP socket; it goes with the socket.
#[btf_map]
static SOCKS: SkStorage<HttpSock> = SkStorage::new();
/// What is switched on for whom, see `ebpf_common::net::policy`.
#[map]
pub(crate) static POLICY: HashMap<u64, u32> = HashMap::with_max_entries(16_384, 0);
/// Sockets, by cookie, that user space found not to speak HTTP, or no longer. One that is forgotten costs events.
#[map]
pub(crate) static QUIT: LruHashMap<u64, u32> = LruHashMap::with_max_entries(4_096, 0);
/// Network namespaces, by inode number, whose connections were marked once: one that has no mark is younger.
#[map]
pub(crate) static MARKED: LruHashMap<u32, u8> = LruHashMap::with_max_entries(8_192, 0);
/// Events for user space.
#[map]
pub(crate) static EVENTS: RingBuf = RingBuf::with_byte_size(4 << 20, 0);
/// Settings.
#[map]
static CONFIG: Array<HttpConfig> = Array::with_max_entries(1, 0);
/// Result of `http_namespace`.
#[map]
pub(crate) static NAMESPACE: Array<OwnNamespace> = Array::with_max_entries(1, 0);
/// Counters, see `ebpf_common::http::stat`.
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

/// What is known of a socket; null if nothing.
#[inline(always)]
pub(crate) fn known(sk: *mut bpf_sock) -> *mut HttpSock {
    // SAFETY: `sk` is a full socket, as the helper demands.
    unsafe {
        bpf_sk_storage_get(
            (&raw const SOCKS).cast_mut().cast(),
            sk.cast(),
            core::ptr::null_mut(),
            0,
        )
    }
    .cast()
}

/// Room for what is to be known of a socket, which has `first` in it if it is new; null if there is none.
#[inline(always)]
pub(crate) fn remember(sk: *mut bpf_sock, first: &mut HttpSock) -> *mut HttpSock {
    // SAFETY: as above; `first` is of the map's value type.
    unsafe {
        bpf_sk_storage_get(
            (&raw const SOCKS).cast_mut().cast(),
            sk.cast(),
            (&raw mut *first).cast(),
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
