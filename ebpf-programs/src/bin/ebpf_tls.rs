//! Kernel object of `httpflow-tls`, the part of plugin `ebpf-net` that reads HTTP where TLS libraries take and give it.
//!
//! ```text
//! call of a library begins ▶ CALLS: object, buffer ─── returns ▶ plain text ▶ CONNS: what does it speak? ▶ EVENTS
//! BIO_write inside a call ▶ RECORDS: first bytes of a record ─┐
//! cgroup_skb egress: a record leaves a socket ▶ inside a call?┴ noted? ▶ CONNS: that socket is this connection's
//! sched_process_exec, sched_process_exit ▶ STARTS
//! ```
//! What is captured of plain text is decided as for `httpflow`, by the same code.
#![cfg_attr(target_arch = "bpf", no_std)]
#![cfg_attr(target_arch = "bpf", no_main)]
#![cfg_attr(target_arch = "bpf", feature(core_intrinsics))]
#![cfg_attr(target_arch = "bpf", allow(internal_features))]

#[cfg(target_arch = "bpf")]
#[path = "ebpf_tls/calls.rs"]
mod calls;
#[cfg(target_arch = "bpf")]
#[path = "ebpf_http/capture.rs"]
#[allow(dead_code, reason = "httpflow uses all of it")]
mod capture;
#[cfg(target_arch = "bpf")]
#[path = "ebpf_tls/emit.rs"]
mod emit;
#[cfg(target_arch = "bpf")]
#[path = "ebpf_tls/go.rs"]
mod go;
#[cfg(target_arch = "bpf")]
#[path = "ebpf_net/kernel.rs"]
#[allow(dead_code, reason = "ebpf-net uses all of it")]
mod kernel;
#[cfg(target_arch = "bpf")]
#[path = "ebpf_tls/maps.rs"]
mod maps;
#[cfg(target_arch = "bpf")]
#[path = "ebpf_net/policy.rs"]
#[allow(dead_code, reason = "ebpf-net uses all of it")]
mod policy;
#[cfg(target_arch = "bpf")]
#[path = "ebpf_tls/process.rs"]
mod process;
#[cfg(target_arch = "bpf")]
#[path = "ebpf_tls/segment.rs"]
mod segment;
#[cfg(target_arch = "bpf")]
#[path = "ebpf_tls/sockets.rs"]
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
