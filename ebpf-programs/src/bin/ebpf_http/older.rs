//! Connections older than the programs. Run by user space, once for each network namespace, when the programs are attached.

use core::mem::MaybeUninit;

use ebpf_common::http::{HttpSock, state};
use ebpf_programs::{memory::cleared, net::state as tcp_state};

use crate::{
    kernel::{Memory as _, tcp_of},
    maps::{offsets, remember},
};

/// Iterator of TCP sockets: `struct bpf_iter__tcp { struct bpf_iter_meta *meta; struct sock_common *sk_common; uid_t uid; }`.
/// It marks a connection that has no mark.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/tcp")]
extern "C" fn http_older(ctx: *const [u64; 3]) -> i32 {
    // SAFETY: the context is that struct, of which the second word is the socket's pointer; null after the last one.
    let sk = unsafe { (*ctx)[1] };
    if sk == 0 {
        return 0;
    }
    // Neither request sockets nor those in TIME_WAIT.
    let Some(tcp) = tcp_of(sk) else { return 0 };
    if tcp.u8(offsets().state) as u32 == tcp_state::LISTEN {
        return 0;
    }
    let mut first = MaybeUninit::<HttpSock>::uninit();
    // SAFETY: integers only, without padding.
    let first = unsafe { cleared(&mut first) };
    first.state = state::OLDER;
    // One that has something to remember already keeps it.
    remember(tcp.address() as *mut _, first);
    0
}
