//! Kernel object of plugin `ebpf-bash`.
//!
//! ```text
//! return of `readline` in bash and libreadline ▶ asks PROCESSES ▶ line ─┐
//! sched_process_exec, sched_process_exit ▶ a process started or ended ──┴▶ EVENTS, in the order that it happened
//! ```
#![cfg_attr(target_arch = "bpf", no_std)]
#![cfg_attr(target_arch = "bpf", no_main)]
#![cfg_attr(target_arch = "bpf", feature(core_intrinsics))]
#![cfg_attr(target_arch = "bpf", allow(internal_features))]

#[cfg(target_arch = "bpf")]
#[path = "ebpf_bash/line.rs"]
mod line;
#[cfg(target_arch = "bpf")]
#[path = "ebpf_bash/maps.rs"]
mod maps;
#[cfg(target_arch = "bpf")]
#[path = "ebpf_bash/process.rs"]
mod process;

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
