//! Kernel object of `dnsflow`, a part of plugin `ebpf-net`.
//!
//! ```text
//! cgroup_skb, in and out ▶ port in PORTS? ▶ POLICY of the socket's cgroup ▶ payload ▶ EVENTS
//! ```
//! Messages are told as they pass the socket: user space pairs them. Packets of other ports leave at the second look.
#![cfg_attr(target_arch = "bpf", no_std)]
#![cfg_attr(target_arch = "bpf", no_main)]
#![cfg_attr(target_arch = "bpf", feature(core_intrinsics))]
#![cfg_attr(target_arch = "bpf", allow(internal_features))]

#[cfg(target_arch = "bpf")]
#[path = "ebpf_dns/maps.rs"]
mod maps;
#[cfg(target_arch = "bpf")]
#[path = "ebpf_dns/packet.rs"]
mod packet;
#[cfg(target_arch = "bpf")]
#[path = "ebpf_dns/socket.rs"]
mod socket;

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
