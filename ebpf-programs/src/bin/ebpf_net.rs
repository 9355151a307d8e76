//! Kernel object of plugin `ebpf-net`.
//!
//! ```text
//! tcp:  tp_btf inet_sock_set_state ▶ CONNS (open ends) ▶ at close: TCP_AGG_{0,1} by flow, or an event if user space knows it
//!       accept hooks ▶ owner in CONNS        sample (run by user space once per interval) reads open ends
//! udp:  cgroup_skb ▶ UDP_AGG_{0,1} by socket and peer        sock_create ▶ SOCK_OWNERS
//!                   ▶ programs of dnsflow and httpflow, for packets that they want
//! ```
//! User space flips `NetConfig::active`, waits for a grace period, and drains the map that is no longer written: nothing
//! is read while it changes.
#![cfg_attr(target_arch = "bpf", no_std)]
#![cfg_attr(target_arch = "bpf", no_main)]
#![cfg_attr(target_arch = "bpf", feature(core_intrinsics))]
#![cfg_attr(target_arch = "bpf", allow(internal_features))]

#[cfg(target_arch = "bpf")]
#[path = "ebpf_net/accept.rs"]
mod accept;
#[cfg(target_arch = "bpf")]
#[path = "ebpf_net/beside.rs"]
mod beside;
#[cfg(target_arch = "bpf")]
#[path = "ebpf_net/kernel.rs"]
mod kernel;
#[cfg(target_arch = "bpf")]
#[path = "ebpf_net/maps.rs"]
mod maps;
#[cfg(target_arch = "bpf")]
#[path = "ebpf_net/policy.rs"]
mod policy;
#[cfg(target_arch = "bpf")]
#[path = "ebpf_net/report.rs"]
mod report;
#[cfg(target_arch = "bpf")]
#[path = "ebpf_net/sample.rs"]
mod sample;
#[cfg(target_arch = "bpf")]
#[path = "ebpf_net/tcp.rs"]
mod tcp;
#[cfg(target_arch = "bpf")]
#[path = "ebpf_net/udp.rs"]
mod udp;

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
