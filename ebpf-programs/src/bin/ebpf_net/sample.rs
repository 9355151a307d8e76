//! Programs run by user space: counters of open connections, and a look at sockets older than the agent.

use core::mem::MaybeUninit;

use aya_ebpf::{bindings::BPF_NOEXIST, macros::raw_tracepoint, programs::RawTracePointContext};
use ebpf_common::net::{Conn, SAMPLES_PER_RUN, Sample, adopt, direction, sample};
use ebpf_programs::{memory::cleared, net::state};

use crate::{
    kernel::{Probed, atomic_add, current_pidns, is_left_out, read, read_counters, read_tuple, sock_of_fd},
    maps::{ADOPT, CONNS, SAMPLES, config, offsets},
    report::IPPROTO_TCP,
    tcp::{latest, now, subtract_base},
};

/// Run by user space: reads the counters of up to [`SAMPLES_PER_RUN`] open connections.
#[raw_tracepoint(tracepoint = "inet_sock_set_state")]
pub(crate) fn tcp_sample(_ctx: RawTracePointContext) -> i32 {
    let Some(block) = SAMPLES.get_ptr_mut(0) else { return 0 };
    // SAFETY: the map value is valid for this run and only this program and its one caller touch it.
    let block = unsafe { &mut *block };
    let count = block.count as usize;
    for i in 0..SAMPLES_PER_RUN {
        if i >= count {
            break;
        }
        if let Some(one) = block.samples.get_mut(i) {
            sample_one(one);
        }
    }
    0
}

/// Run by user space: looks at the socket behind one of its own descriptors and adopts it if it is an open connection.
#[raw_tracepoint(tracepoint = "inet_sock_set_state")]
pub(crate) fn adopt_socket(_ctx: RawTracePointContext) -> i32 {
    let Some(ask) = ADOPT.get_ptr_mut(0) else { return 0 };
    // SAFETY: as in `tcp_sample`.
    let ask = unsafe { &mut *ask };
    ask.found = 0;
    ask.id = 0;
    if ask.op == adopt::PID_NAMESPACE {
        (ask.id, ask.state) = current_pidns();
        ask.found = 1;
        return 0;
    }
    let sk = sock_of_fd(ask.fd);
    if sk == 0 || !read_tuple(Probed(sk), &mut ask.tuple) {
        return 0;
    }
    let off = offsets();
    let state = read::<u8>(sk, off.state) as u32;
    let protocol: u16 = read(sk, off.protocol);
    ask.sk = sk;
    ask.state = state;
    ask.protocol = protocol as u32;
    ask.found = 1;
    let open = matches!(
        state,
        state::ESTABLISHED | state::FIN_WAIT1 | state::FIN_WAIT2 | state::CLOSE_WAIT | state::LAST_ACK | state::CLOSING
    );
    if protocol != IPPROTO_TCP || !open {
        return 0;
    }
    let Some(config) = config() else { return 0 };
    if is_left_out(Probed(sk), config) {
        return 0;
    }
    if let Some(conn) = CONNS.get_ptr_mut(sk) {
        // SAFETY: a live map value; the owner fields are written in process context of the owner only.
        let conn = unsafe { &mut *conn };
        if conn.owner_pid == 0 {
            conn.owner_pid = ask.pid;
            conn.owner_comm = ask.comm;
            conn.owner_cgroup = ask.cgroup;
        }
        ask.id = conn.id;
        return 0;
    }
    if ask.op != adopt::SOCKET {
        return 0;
    }
    let counters = read_counters(Probed(sk), Some(state), false);
    let now = now();
    let mut conn = MaybeUninit::uninit();
    // SAFETY: integers only, without padding.
    let conn: &mut Conn = unsafe { cleared(&mut conn) };
    conn.id = now;
    conn.established_ns = now;
    conn.base_read = counters.read;
    conn.base_written = counters.written;
    conn.base_retransmits = counters.retransmits;
    conn.owner_pid = ask.pid;
    conn.owner_comm = ask.comm;
    conn.owner_cgroup = ask.cgroup;
    conn.direction = direction::UNKNOWN;
    conn.adopted = 1;
    if CONNS.insert(sk, &*conn, BPF_NOEXIST as u64).is_ok() {
        ask.id = now;
        // Closed meanwhile: its close found no entry, so nothing would ever end this one.
        if read::<u8>(sk, off.state) as u32 == state::CLOSE {
            let _ = CONNS.remove(sk);
            ask.id = 0;
        }
    }
    0
}

#[inline(always)]
fn sample_one(one: &mut Sample) {
    let want_identity = one.flags & sample::WANT_IDENTITY != 0;
    one.flags = 0;
    let Some(conn) = CONNS.get_ptr_mut(one.sk) else { return };
    // SAFETY: a live map value.
    let conn = unsafe { &mut *conn };
    if conn.id != one.id {
        return;
    }
    conn.slot = one.slot;
    // The atomic addition is a full barrier between the mark and the look at the other side's mark.
    // SAFETY: aligned field of a live map value.
    unsafe { atomic_add(&raw mut conn.samples, 1) };
    // SAFETY: as above; volatile so that it is read after the mark was set.
    if unsafe { core::ptr::read_volatile(&raw const conn.closing) } != 0 {
        one.flags = sample::CLOSING;
        return;
    }
    let off = offsets();
    let mut counters = if conn.closed_ns == 0 {
        read_counters(Probed(one.sk), None, conn.direction == direction::OUTGOING)
    } else {
        latest(Probed(one.sk), conn)
    };
    subtract_base(&mut counters, conn);
    // The memory of a socket that is gone, or another one's by now: its end was missed.
    if conn.closed_ns != 0
        && (read::<u32>(one.sk, off.refcnt) == 0 || read::<u8>(one.sk, off.state) as u32 != state::CLOSE)
    {
        counters.state = state::CLOSE;
    }
    one.counters = counters;
    if want_identity {
        read_tuple(Probed(one.sk), &mut one.tuple);
        if one.tuple.remote_port == 0 {
            one.tuple.remote_port = conn.remote_port;
        }
        let socket: u64 = read(one.sk, off.socket);
        one.inode = if socket == 0 { 0 } else { read(socket, off.socket_ino) };
    }
    // Still the same open connection: the memory just read was its own.
    if let Some(conn) = CONNS.get_ptr_mut(one.sk) {
        // SAFETY: a live map value.
        if unsafe { (*conn).id } == one.id {
            one.flags = sample::VALID;
        }
    }
}
