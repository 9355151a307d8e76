//! Maps and read-only data of the object. Sizes are defaults; the loader overrides them from the options.

use aya_ebpf::{
    macros::map,
    maps::{Array, HashMap, LruHashMap, PerCpuArray, ProgramArray, RingBuf},
};
use ebpf_common::dns::PORT_WORDS;
use ebpf_common::net::{
    Adopt, Conn, Executed, FlowKey, Handled, Inherited, NetConfig, NetOffsets, SampleBlock, SockOwner, TcpAgg, UdpAgg,
    UdpKey, UdpLast, beside, stat,
};

/// Kernel member offsets; filled before load, constant for the verifier.
#[unsafe(no_mangle)]
static OFFSETS: NetOffsets = NetOffsets::UNKNOWN;

/// Open TCP connection ends by `struct sock` address.
#[map]
pub(crate) static CONNS: HashMap<u64, Conn> = HashMap::with_max_entries(131_072, 0);
/// Closed connections by flow, written while `active` is 0.
#[map]
pub(crate) static TCP_AGG_0: HashMap<FlowKey, TcpAgg> = HashMap::with_max_entries(16_384, 0);
/// Closed connections by flow, written while `active` is 1.
#[map]
pub(crate) static TCP_AGG_1: HashMap<FlowKey, TcpAgg> = HashMap::with_max_entries(16_384, 0);
/// Datagrams by socket and peer, written while `active` is 0.
#[map]
pub(crate) static UDP_AGG_0: HashMap<UdpKey, UdpAgg> = HashMap::with_max_entries(16_384, 0);
/// Datagrams by socket and peer, written while `active` is 1.
#[map]
pub(crate) static UDP_AGG_1: HashMap<UdpKey, UdpAgg> = HashMap::with_max_entries(16_384, 0);
/// Creator of each UDP socket by cookie. An evicted entry costs a name, never a count.
#[map]
pub(crate) static SOCK_OWNERS: LruHashMap<u64, SockOwner> = LruHashMap::with_max_entries(16_384, 0);
/// Connection each thread accepted last, while it has not forked since.
#[map]
pub(crate) static LAST_ACCEPT: LruHashMap<u32, Inherited> = LruHashMap::with_max_entries(8_192, 0);
/// Connection each forked child was made for.
#[map]
pub(crate) static INHERITED: LruHashMap<u32, Inherited> = LruHashMap::with_max_entries(8_192, 0);
/// When each process executed a program last.
#[map]
pub(crate) static EXECUTED: LruHashMap<u32, Executed> = LruHashMap::with_max_entries(8_192, 0);
/// What `tcp_state` did last on each CPU.
#[map]
pub(crate) static HANDLED: PerCpuArray<Handled> = PerCpuArray::with_max_entries(1, 0);
/// 1 once a connection found `CONNS` full: from then on a close without an entry may be of a young connection.
#[map]
pub(crate) static CONNS_WERE_FULL: Array<u64> = Array::with_max_entries(1, 0);
/// What is switched on for whom, see `ebpf_common::net::policy`.
#[map]
pub(crate) static POLICY: HashMap<u64, u32> = HashMap::with_max_entries(16_384, 0);
/// Events for user space.
#[map]
pub(crate) static EVENTS: RingBuf = RingBuf::with_byte_size(4 << 20, 0);
/// Settings.
#[map]
pub(crate) static CONFIG: Array<NetConfig> = Array::with_max_entries(1, 0);
/// Counters, see `ebpf_common::net::stat`.
#[map]
pub(crate) static STATS: PerCpuArray<u64> = PerCpuArray::with_max_entries(stat::COUNT, 0);
/// Argument and result of `tcp_sample`.
#[map]
pub(crate) static SAMPLES: Array<SampleBlock> = Array::with_max_entries(1, 0);
/// Argument and result of `adopt_socket`.
#[map]
pub(crate) static ADOPT: Array<Adopt> = Array::with_max_entries(1, 0);
/// Last delivered datagram per CPU.
#[map]
pub(crate) static UDP_LAST: PerCpuArray<UdpLast> = PerCpuArray::with_max_entries(1, 0);

/// Programs of other captures that packets are handed on to, see `ebpf_common::net::beside`.
#[map]
pub(crate) static NEXT: ProgramArray = ProgramArray::with_max_entries(beside::SLOTS, 0);
/// Which of them there are.
#[map]
pub(crate) static BESIDE: Array<u32> = Array::with_max_entries(1, 0);
/// One bit per port: DNS is looked for there.
#[map]
pub(crate) static DNS_PORTS: Array<u64> = Array::with_max_entries(PORT_WORDS, 0);

/// The offsets; volatile so that the compiler does not fold the placeholder in.
#[inline(always)]
pub(crate) fn offsets() -> &'static NetOffsets {
    // SAFETY: points at the object's read-only data; black_box only hides its initial value.
    unsafe { &*core::hint::black_box(&raw const OFFSETS) }
}

/// The settings.
#[inline(always)]
pub(crate) fn config() -> Option<&'static NetConfig> {
    CONFIG.get(0)
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
