//! Reads of kernel memory: sockets, the current process.

use core::mem::MaybeUninit;

use aya_ebpf::helpers::{bpf_get_current_pid_tgid, generated};
use ebpf_common::net::{ABSENT, FOREIGN_PID, NetConfig, TcpCounters, Tuple};
use ebpf_programs::net::{bytes_read, bytes_written, is_loopback_of, is_v4_of};

use crate::maps::offsets;

const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;

/// Kernel memory, read member by member at offsets from BTF. An absent member, or one that cannot be read, is zero.
pub(crate) trait Memory: Copy {
    fn u8(self, offset: u32) -> u8;
    fn u16(self, offset: u32) -> u16;
    fn u32(self, offset: u32) -> u32;
    fn u64(self, offset: u32) -> u64;
    fn bytes(self, offset: u32) -> [u8; 16];
    /// What a pointer points to.
    fn follow(self, offset: u32) -> Self;
    /// Where it lies.
    fn address(self) -> u64;
}

/// Memory at any address, read by a helper: a call of some 30 ns for each member.
#[derive(Clone, Copy)]
pub(crate) struct Probed(pub(crate) u64);

/// Memory behind a pointer whose type the verifier knows: plain loads, which the kernel makes safe.
///
/// The number is that pointer and must stay one: what the verifier cannot follow it refuses.
#[derive(Clone, Copy)]
pub(crate) struct Typed(pub(crate) u64);

impl Memory for Probed {
    #[inline(always)]
    fn u8(self, offset: u32) -> u8 {
        read(self.0, offset)
    }

    #[inline(always)]
    fn u16(self, offset: u32) -> u16 {
        read(self.0, offset)
    }

    #[inline(always)]
    fn u32(self, offset: u32) -> u32 {
        read(self.0, offset)
    }

    #[inline(always)]
    fn u64(self, offset: u32) -> u64 {
        read(self.0, offset)
    }

    #[inline(always)]
    fn bytes(self, offset: u32) -> [u8; 16] {
        if offset == ABSENT {
            return [0; 16];
        }
        // As words: clearing bytes takes a call.
        let (low, high) = (self.u64(offset), self.u64(offset + 8));
        (low as u128 | (high as u128) << 64).to_le_bytes()
    }

    #[inline(always)]
    fn follow(self, offset: u32) -> Self {
        Self(self.u64(offset))
    }

    #[inline(always)]
    fn address(self) -> u64 {
        self.0
    }
}

/// A plain load of one member; volatile so that it is one load of its own width, as the verifier demands.
#[inline(always)]
fn load<T: Copy + Default>(base: Typed, offset: u32) -> T {
    if offset == ABSENT {
        return T::default();
    }
    // SAFETY: the verifier accepts the load only at a member of the pointer's type; a fault reads zero.
    unsafe { core::ptr::read_volatile((base.0 + offset as u64) as *const T) }
}

impl Memory for Typed {
    #[inline(always)]
    fn u8(self, offset: u32) -> u8 {
        load(self, offset)
    }

    #[inline(always)]
    fn u16(self, offset: u32) -> u16 {
        load(self, offset)
    }

    #[inline(always)]
    fn u32(self, offset: u32) -> u32 {
        load(self, offset)
    }

    #[inline(always)]
    fn u64(self, offset: u32) -> u64 {
        load(self, offset)
    }

    #[inline(always)]
    fn bytes(self, offset: u32) -> [u8; 16] {
        if offset == ABSENT {
            return [0; 16];
        }
        let (low, high) = (self.u64(offset), self.u64(offset + 8));
        (low as u128 | (high as u128) << 64).to_le_bytes()
    }

    #[inline(always)]
    fn follow(self, offset: u32) -> Self {
        Self(self.u64(offset))
    }

    #[inline(always)]
    fn address(self) -> u64 {
        self.0
    }
}

/// The TCP socket behind the argument of a BTF tracepoint; `None` for any other protocol.
#[inline(always)]
pub(crate) fn tcp_of(sk: u64) -> Option<Typed> {
    // SAFETY: the argument is a `struct sock *`, which is what the helper takes.
    let tcp = unsafe { generated::bpf_skc_to_tcp_sock(sk as *mut _) } as u64;
    (tcp != 0).then_some(Typed(tcp))
}

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

/// Ends of an IP socket; false for other families.
#[inline(always)]
pub(crate) fn read_tuple<M: Memory>(sk: M, tuple: &mut Tuple) -> bool {
    let off = offsets();
    if !read_addresses(sk, tuple) {
        return false;
    }
    tuple.remote_port = u16::from_be(sk.u16(off.dport));
    tuple.local_port = u16::from_be(sk.u16(off.sport));
    tuple.netns = read_netns(sk);
    true
}

/// True if the configuration leaves a socket's ends out, or they are none of IP. Nothing is copied: the stack is small.
#[inline(always)]
pub(crate) fn is_left_out<M: Memory>(sk: M, config: &NetConfig) -> bool {
    let off = offsets();
    let family = sk.u16(off.family);
    if family == AF_INET {
        let pair = sk.u64(off.addrpair).to_ne_bytes();
        return config.loopback == 0 && (pair[0] == 127 || pair[4] == 127);
    }
    if family != AF_INET6 {
        return true;
    }
    let remote = (sk.u64(off.v6_daddr), sk.u64(off.v6_daddr + 8));
    if config.loopback == 0 {
        let local = (sk.u64(off.v6_saddr), sk.u64(off.v6_saddr + 8));
        if is_loopback_of(remote.0, remote.1) || is_loopback_of(local.0, local.1) {
            return true;
        }
    }
    config.ipv6_disabled != 0 && !is_v4_of(remote.0, remote.1)
}

/// Addresses of an IP socket; false for other families.
#[inline(always)]
pub(crate) fn read_addresses<M: Memory>(sk: M, tuple: &mut Tuple) -> bool {
    let off = offsets();
    let family = sk.u16(off.family);
    if family == AF_INET {
        let pair = sk.u64(off.addrpair).to_ne_bytes();
        let ends: *mut Tuple = tuple;
        // SAFETY: members of a value that is there, aligned to four bytes like it.
        unsafe {
            put_mapped(&raw mut (*ends).remote, [pair[0], pair[1], pair[2], pair[3]]);
            put_mapped(&raw mut (*ends).local, [pair[4], pair[5], pair[6], pair[7]]);
        }
    } else if family == AF_INET6 {
        tuple.remote = sk.bytes(off.v6_daddr);
        tuple.local = sk.bytes(off.v6_saddr);
    } else {
        return false;
    }
    true
}

/// Inode number of the socket's network namespace.
#[inline(always)]
pub(crate) fn read_netns<M: Memory>(sk: M) -> u32 {
    let off = offsets();
    sk.follow(off.net).u32(off.netns_inum)
}

/// The kernel's own accounting of a TCP socket.
///
/// `state` is the TCP state the counters belong to; `None` reads it, for a socket that is in use meanwhile. The order of
/// the reads makes a concurrent change show as too little, which the next reading makes good, never as too much.
#[inline(always)]
pub(crate) fn read_counters<M: Memory>(tcp: M, state: Option<u32>, connecting_side: bool) -> TcpCounters {
    let off = offsets();
    let received = tcp.u64(off.bytes_received);
    let rcv_nxt = tcp.u32(off.rcv_nxt);
    let copied_seq = tcp.u32(off.copied_seq);
    let flags = tcp.u64(off.flags);
    let fin_received = flags & (1 << (off.sock_done_bit & 63)) != 0;
    let acked = tcp.u64(off.bytes_acked);
    let snd_una = tcp.u32(off.snd_una);
    let write_seq = tcp.u32(off.write_seq);
    let srtt = tcp.u32(off.srtt_us);
    let mdev = tcp.u32(off.mdev_us);
    let retransmits = tcp.u32(off.total_retrans);
    let state = match state {
        Some(state) => state,
        None => tcp.u8(off.state) as u32,
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
pub(crate) fn is_orphan<M: Memory>(sk: M) -> bool {
    let off = offsets();
    off.sock_dead_bit < 64 && sk.u64(off.flags) & (1 << (off.sock_dead_bit & 63)) != 0
}

/// True while received bytes (or the peer's FIN behind them) wait for the process.
#[inline(always)]
pub(crate) fn has_unread<M: Memory>(tcp: M) -> bool {
    let off = offsets();
    (tcp.u32(off.rcv_nxt).wrapping_sub(tcp.u32(off.copied_seq)) as i32) > 0
}

/// True while a task holds the socket lock: then `current` is a user of the socket, not an interrupted bystander.
#[inline(always)]
pub(crate) fn owned_by_current<M: Memory>(sk: M) -> bool {
    sk.u32(offsets().lock_owned) != 0
}

/// A process, as records name it.
#[derive(Clone, Copy)]
pub(crate) struct Process {
    /// Thread group id in the agent's pid namespace; `FOREIGN_PID` if the process is not in it.
    pub(crate) pid: u32,
    /// The group leader's name, not the thread's.
    pub(crate) comm: [u8; 16],
    /// See `Conn::owner_cgroup`.
    pub(crate) cgroup: u64,
}

impl Process {
    /// No process known.
    pub(crate) const NONE: Self = Self {
        pid: 0,
        comm: [0; 16],
        cgroup: 0,
    };
}

/// The current process, for program types whose task pointer has a type.
#[inline(always)]
pub(crate) fn current_process(config: &NetConfig) -> Process {
    let pid = (bpf_get_current_pid_tgid() >> 32) as u32;
    if offsets().task_btf == ABSENT {
        process_of(Probed(current_task()), pid, config)
    } else {
        // SAFETY: takes no argument; there, as user space found.
        let task = unsafe { generated::bpf_get_current_task_btf() } as u64;
        process_of(Typed(task), pid, config)
    }
}

/// The current process, for any program type.
#[inline(always)]
pub(crate) fn current_process_by_task(config: &NetConfig) -> Process {
    let task = Probed(current_task());
    process_of(task, task.u32(offsets().tgid), config)
}

/// The parent of the current process.
#[inline(always)]
pub(crate) fn parent_process(config: &NetConfig) -> Process {
    let parent = Probed(current_task()).follow(offsets().real_parent);
    process_of(parent, parent.u32(offsets().tgid), config)
}

#[inline(always)]
fn process_of<M: Memory>(task: M, pid: u32, config: &NetConfig) -> Process {
    let off = offsets();
    Process {
        pid: if config.pidns == 0 {
            pid
        } else {
            pid_in_namespace(task.address(), config)
        },
        comm: task.follow(off.group_leader).bytes(off.comm),
        cgroup: cgroup_of(task),
    }
}

/// Id of a task's cgroup, in the hierarchy that the loader chose.
#[inline(always)]
fn cgroup_of<M: Memory>(task: M) -> u64 {
    let off = offsets();
    if off.cgroups == ABSENT || off.css_set_cgroup == ABSENT || off.cgroup_kn == ABSENT {
        return 0;
    }
    let mut cgroup = task.follow(off.cgroups).follow(off.css_set_cgroup);
    if off.css_cgroup != ABSENT {
        cgroup = cgroup.follow(off.css_cgroup);
    }
    cgroup.follow(off.cgroup_kn).u64(off.kn_id)
}

/// Thread group id of a task in the agent's pid namespace, `FOREIGN_PID` if it has none there.
#[inline(always)]
fn pid_in_namespace(task: u64, config: &NetConfig) -> u32 {
    let off = offsets();
    let pid = Probed(task).follow(off.signal).follow(off.tgid_pid);
    if pid.u32(off.pid_level) < config.pidns_level {
        return FOREIGN_PID;
    }
    let upid = Probed(pid.0 + off.pid_numbers as u64 + config.pidns_level as u64 * off.upid_size as u64);
    if upid.u64(off.upid_ns) == config.pidns {
        upid.u32(off.upid_nr)
    } else {
        FOREIGN_PID
    }
}

/// Address and level of the current task's pid namespace.
#[inline(always)]
pub(crate) fn current_pidns() -> (u64, u32) {
    let off = offsets();
    let pid = Probed(current_task()).follow(off.signal).follow(off.tgid_pid);
    let level = pid.u32(off.pid_level);
    let upid = Probed(pid.0 + off.pid_numbers as u64 + level as u64 * off.upid_size as u64);
    (upid.u64(off.upid_ns), level)
}

/// Voluntary context switches of a task.
#[inline(always)]
pub(crate) fn voluntary_switches(task: u64) -> u64 {
    read(task, offsets().nvcsw)
}

/// When a task was forked, monotonic nanoseconds.
#[inline(always)]
pub(crate) fn forked_at(task: u64) -> u64 {
    read(task, offsets().start_time)
}

/// Page faults of a task. After an execve, the first instruction of the new program makes one: nothing of it is mapped.
#[inline(always)]
pub(crate) fn page_faults(task: u64) -> u64 {
    let minor: u64 = read(task, offsets().min_flt);
    let major: u64 = read(task, offsets().maj_flt);
    minor.wrapping_add(major)
}

/// Address of the current `task_struct`.
#[inline(always)]
pub(crate) fn current_task() -> u64 {
    // SAFETY: takes no argument.
    unsafe { generated::bpf_get_current_task() }
}

/// Writes an IPv4 address in v4-mapped form, word by word, which takes neither a call nor room on the stack.
///
/// # Safety
/// `to` is writable and aligned to four bytes.
#[inline(always)]
unsafe fn put_mapped(to: *mut [u8; 16], v4: [u8; 4]) {
    let words = [0, 0, u32::from_ne_bytes([0, 0, 0xff, 0xff]), u32::from_ne_bytes(v4)];
    for (number, word) in words.into_iter().enumerate() {
        // SAFETY: as demanded of the caller; within the sixteen bytes.
        unsafe { to.cast::<u32>().add(number).write_volatile(word) };
    }
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
