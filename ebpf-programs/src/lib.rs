//! Kernel programs' logic that needs no kernel: pure functions, tested on the host.
//!
//! The programs themselves are thin shells in `src/bin/<plugin>/`; one object per plugin. They read kernel memory at the
//! offsets the loader resolved, call the functions here, and write maps.

#![no_std]

pub mod http;
pub mod memory;
pub mod net;
pub mod packet;
pub mod ring;
#[cfg(target_arch = "bpf")]
pub mod stack;
