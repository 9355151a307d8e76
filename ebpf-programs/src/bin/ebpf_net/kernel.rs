//! Reads of kernel memory: sockets, the current process.

use core::mem::MaybeUninit;

use aya_ebpf::helpers::{bpf_get_current_pid_tgid, generated};
use ebpf_common::net::{ABSENT, TcpCounters, Tuple};
use ebpf_programs::net::{bytes_read, bytes_written};

use crate::maps::offsets;

const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;

/// Reads a plain value at `base + offset`; zero if the member is absent or the memory cannot be read.
#[inline(always)]
pub(crate) fn read<T: Copy>(base: u64, offset: u32) -> T {
    let mut value = MaybeUninit::<T>::zeroed();
    if offset != ABSENT {
        // SAFETY: the helper checks the source and writes exactly size_of::<T>() bytes; T is an integer or byte array.
        unsafe {
            generated::bpf_probe_read_kernel(
                value.as_mut_ptr().cast(),
                size_of::<T>() as u32,
                (base + offset as u64) as *const _,
            );
        }
    }
    // SAFETY: zeroed or filled; every bit pattern of T is valid.
    unsafe { value.assume_init() }
}

/// Adds to a map field that other CPUs add to as well. `core::sync::atomic` has no read-modify-write on this target.
///
/// # Safety
/// `field` is an aligned field of a live map value.
#[inline(always)]
pub(crate) unsafe fn atomic_add(field: *mut u64, n: u64) {
    // SAFETY: as demanded of the caller.
    unsafe { core::intrinsics::atomic_xadd::<u64, u64, { core::intrinsics::AtomicOrdering::Relaxed }>(field, n) };
}

/// Address family and ends of an IP socket; `None` for other families.
#[inline(always)]
pub(crate) fn read_tuple(sk: u64, tuple: &mut Tuple) -> bool {
    let off = offsets();
    let family: u16 = read(sk, off.family);
    if family == AF_INET {
        let pair: [u8; 8] = read(sk, off.addrpair);
        tuple.remote = mapped([pair[0], pair[1], pair[2], pair[3]]);
        tuple.local = mapped([pair[4], pair[5], pair[6], pair[7]]);
    } else if family == AF_INET6 {
        tuple.remote = read(sk, off.v6_daddr);
        tuple.local = read(sk, off.v6_saddr);
    } else {
        return false;
    }
    tuple.remote_port = u16::from_be(read(sk, off.dport));
    tuple.local_port = u16::from_be(read(sk, off.sport));
    tuple.netns = read_netns(sk);
    true
}

/// Inode number of the socket's network namespace.
#[inline(always)]
pub(crate) fn read_netns(sk: u64) -> u32 {
    let off = offsets();
    let net: u64 = read(sk, off.net);
    read(net, off.netns_inum)
}

/// The kernel's own accounting of a TCP socket.
///
/// `state` is the TCP state the counters belong to; `None` reads it, for a socket that is in use meanwhile. The order of
/// the reads makes a concurrent change show as too little, which the next reading makes good, never as too much.
#[inline(always)]
pub(crate) fn read_counters(sk: u64, state: Option<u32>, connecting_side: bool) -> TcpCounters {
    let off = offsets();
    let received: u64 = read(sk, off.bytes_received);
    let rcv_nxt: u32 = read(sk, off.rcv_nxt);
    let copied_seq: u32 = read(sk, off.copied_seq);
    let flags: u64 = read(sk, off.flags);
    let fin_received = flags & (1 << (off.sock_done_bit & 63)) != 0;
    let acked: u64 = read(sk, off.bytes_acked);
    let snd_una: u32 = read(sk, off.snd_una);
    let write_seq: u32 = read(sk, off.write_seq);
    let srtt: u32 = read(sk, off.srtt_us);
    let mdev: u32 = read(sk, off.mdev_us);
    let retransmits: u32 = read(sk, off.total_retrans);
    let state = match state {
        Some(state) => state,
        None => read::<u8>(sk, off.state) as u32,
    };
    TcpCounters {
        read: bytes_read(received, rcv_nxt, copied_seq, fin_received),
        written: bytes_written(acked, snd_una, write_seq, state, connecting_side),
        retransmits,
        rtt_us: srtt >> 3,
        rtt_var_us: mdev >> 2,
        state,
    }
}

/// True once no process holds the socket any more: what was not read by now never will be.
#[inline(always)]
pub(crate) fn is_orphan(sk: u64) -> bool {
    let off = offsets();
    let flags: u64 = read(sk, off.flags);
    off.sock_dead_bit < 64 && flags & (1 << (off.sock_dead_bit & 63)) != 0
}

/// True while received bytes (or the peer's FIN behind them) wait for the process.
#[inline(always)]
pub(crate) fn has_unread(sk: u64) -> bool {
    let off = offsets();
    let received: u32 = read(sk, off.rcv_nxt);
    let copied: u32 = read(sk, off.copied_seq);
    (received.wrapping_sub(copied) as i32) > 0
}

/// True while a task holds the socket lock: then `current` is a user of the socket, not an interrupted bystander.
#[inline(always)]
pub(crate) fn owned_by_current(sk: u64) -> bool {
    read::<u32>(sk, offsets().lock_owned) != 0
}

/// Thread group id and process name (the group leader's, not the thread's) of the current task.
#[inline(always)]
pub(crate) fn current_process() -> (u32, [u8; 16]) {
    let off = offsets();
    let pid = (bpf_get_current_pid_tgid() >> 32) as u32;
    (pid, leader_comm(off.group_leader, off.comm))
}

/// Voluntary context switches of the current task.
#[inline(always)]
pub(crate) fn voluntary_switches(task: u64) -> u64 {
    read(task, offsets().nvcsw)
}

/// Address of the current `task_struct`.
#[inline(always)]
pub(crate) fn current_task() -> u64 {
    // SAFETY: takes no argument.
    unsafe { generated::bpf_get_current_task() }
}

/// As [`current_process`], for program types without the pid helper.
#[inline(always)]
pub(crate) fn current_process_by_task() -> (u32, [u8; 16]) {
    let off = offsets();
    let task = current_task();
    (read(task, off.tgid), leader_comm(off.group_leader, off.comm))
}

#[inline(always)]
fn leader_comm(group_leader: u32, comm: u32) -> [u8; 16] {
    let task = current_task();
    let leader: u64 = read(task, group_leader);
    read(leader, comm)
}

#[inline(always)]
pub(crate) fn mapped(v4: [u8; 4]) -> [u8; 16] {
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, v4[0], v4[1], v4[2], v4[3]]
}

/// Address of the `struct sock` behind a descriptor of the current task, 0 if it is no socket.
#[inline(always)]
pub(crate) fn sock_of_fd(fd: u32) -> u64 {
    let off = offsets();
    let task = current_task();
    let files: u64 = read(task, off.files);
    let fdt: u64 = read(files, off.fdt);
    if fd >= read::<u32>(fdt, off.max_fds) {
        return 0;
    }
    let array: u64 = read(fdt, off.fd_array);
    let file: u64 = read(array + fd as u64 * 8, 0);
    let socket: u64 = read(file, off.private_data);
    // Only a socket's private data points back at its file.
    if socket == 0 || read::<u64>(socket, off.socket_file) != file {
        return 0;
    }
    read(socket, off.socket_sk)
}
