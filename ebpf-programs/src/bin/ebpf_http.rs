//! Kernel object of `httpflow`, the part of plugin `ebpf-net` that reads HTTP.
//!
//! ```text
//! cgroup_skb, both ways ▶ segment: TCP with bytes, of which socket, seen before? ▶ SOCKS: what does it speak?
//!     not HTTP: nothing is remembered        HTTP ▶ switched on? (POLICY) ▶ capture: heads, lengths of the rest ▶ EVENTS
//! ```
//! Each socket sees each segment here, whatever call sent or reads it.
#![cfg_attr(target_arch = "bpf", no_std)]
#![cfg_attr(target_arch = "bpf", no_main)]
#![cfg_attr(target_arch = "bpf", feature(core_intrinsics))]
#![cfg_attr(target_arch = "bpf", allow(internal_features))]

#[cfg(target_arch = "bpf")]
#[path = "ebpf_http/capture.rs"]
mod capture;
#[cfg(target_arch = "bpf")]
#[path = "ebpf_net/kernel.rs"]
#[allow(dead_code, reason = "ebpf-net uses all of it")]
mod kernel;
#[cfg(target_arch = "bpf")]
#[path = "ebpf_http/maps.rs"]
mod maps;
#[cfg(target_arch = "bpf")]
#[path = "ebpf_http/namespace.rs"]
mod namespace;
#[cfg(target_arch = "bpf")]
#[path = "ebpf_http/older.rs"]
mod older;
#[cfg(target_arch = "bpf")]
#[path = "ebpf_net/policy.rs"]
#[allow(dead_code, reason = "ebpf-net uses all of it")]
mod policy;
#[cfg(target_arch = "bpf")]
#[path = "ebpf_http/segment.rs"]
mod segment;
#[cfg(target_arch = "bpf")]
#[path = "ebpf_http/sockets.rs"]
mod sockets;
#[cfg(target_arch = "bpf")]
#[path = "ebpf_http/speaks.rs"]
mod speaks;

#[cfg(not(target_arch = "bpf"))]
fn main() {}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    // The verifier rejects any program in which this could be reached.
    loop {}
}

#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
