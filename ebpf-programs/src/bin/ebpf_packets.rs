//! Kernel object of the packet capture, of plugin `bpf-netlog`.
//!
//! ```text
//! TCX or clsact, in and out ▶ frame ▶ flow's key ▶ FLOWS_0 or FLOWS_1, which CONFIG says
//! ```
//! Frames pass untouched, to whatever program comes next.
#![cfg_attr(target_arch = "bpf", no_std)]
#![cfg_attr(target_arch = "bpf", no_main)]
#![cfg_attr(target_arch = "bpf", feature(core_intrinsics))]
#![cfg_attr(target_arch = "bpf", allow(internal_features))]

#[cfg(target_arch = "bpf")]
#[path = "ebpf_packets/frame.rs"]
mod frame;
#[cfg(target_arch = "bpf")]
#[path = "ebpf_packets/maps.rs"]
mod maps;

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
