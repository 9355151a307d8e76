//! Who owns an accepted connection: the accepting process, or the child it forks to serve it.

use core::mem::MaybeUninit;

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST},
    helpers::bpf_get_current_pid_tgid,
    macros::{fexit, kretprobe, raw_tracepoint},
    programs::{FExitContext, RawTracePointContext, RetProbeContext},
};
use ebpf_common::net::{Conn, Executed, Inherited, direction};
use ebpf_programs::{memory::cleared, net::state};

use crate::{
    kernel::{
        Memory, Probed, Process, current_process_by_task, current_task, forked_at, is_left_out, page_faults, read,
        read_netns, sock_of_fd, tcp_of, voluntary_switches,
    },
    maps::{CONNS, EXECUTED, INHERITED, LAST_ACCEPT, config, offsets},
    policy::{bits, is_on},
    report::IPPROTO_TCP,
    tcp::now,
};

/// Return of `inet_csk_accept(sk, arg)` (6.10 and later), in the accepting process. Sees io_uring too.
#[fexit(function = "inet_csk_accept")]
pub(crate) fn accept_exit_2(ctx: FExitContext) -> i32 {
    accept_exited(ctx.arg(2));
    0
}

/// Return of `inet_csk_accept(sk, flags, err, kern)` (before 6.10).
#[fexit(function = "inet_csk_accept")]
pub(crate) fn accept_exit_4(ctx: FExitContext) -> i32 {
    accept_exited(ctx.arg(4));
    0
}

/// The same hook again, for the accept of a process that preempted another one inside `accept_exit_2`.
#[fexit(function = "inet_csk_accept")]
pub(crate) fn accept_again_2(ctx: FExitContext) -> i32 {
    accept_exited(ctx.arg(2));
    0
}

/// As `accept_again_2`, before 6.10.
#[fexit(function = "inet_csk_accept")]
pub(crate) fn accept_again_4(ctx: FExitContext) -> i32 {
    accept_exited(ctx.arg(4));
    0
}

#[inline(always)]
fn accept_exited(sk: u64) {
    if sk != 0
        && let Some(tcp) = tcp_of(sk)
    {
        accepted(tcp);
    }
}

/// The same by kretprobe. A process blocked in accept holds one of few return slots, so some returns are missed.
#[kretprobe]
pub(crate) fn accept_return(ctx: RetProbeContext) -> u32 {
    let sk: u64 = ctx.ret();
    if sk != 0 {
        accepted(Probed(sk));
    }
    0
}

/// `sched_process_fork(struct task_struct *parent, struct task_struct *child)`: a process that forks right after it
/// accepted a connection made the child to serve it. Where no accept hook saw that, the newest descriptors tell.
#[raw_tracepoint(tracepoint = "sched_process_fork")]
pub(crate) fn process_fork(ctx: RawTracePointContext) -> i32 {
    let (parent, child): (u64, u64) = (ctx.arg(0), ctx.arg(1));
    let off = offsets();
    let (parent_pid, child_pid): (u32, u32) = (read(parent, off.tgid), read(child, off.tgid));
    // A new thread, or a thread that accepted nothing since its last fork. The parent is the current task.
    if parent_pid == child_pid {
        return 0;
    }
    if LAST_ACCEPT.get_ptr(current_thread()).is_none() {
        accepted_lately();
    }
    let Some(inherited) = LAST_ACCEPT.get_ptr(current_thread()) else {
        return 0;
    };
    // SAFETY: a live map value of integers.
    let inherited = unsafe { *inherited };
    let _ = LAST_ACCEPT.remove(current_thread());
    let Some(conn) = CONNS.get_ptr_mut(inherited.sk) else {
        return 0;
    };
    // SAFETY: a live map value.
    let conn = unsafe { &mut *conn };
    if conn.id == inherited.id && conn.owner_pid == parent_pid && conn.closer_pid == 0 {
        conn.forker_pid = parent_pid;
        conn.forker_nvcsw = voluntary_switches(parent);
        conn.owner_pid = child_pid;
        let _ = INHERITED.insert(child_pid, &inherited, BPF_ANY as u64);
    }
    0
}

/// `sched_process_exec(struct task_struct *p, pid_t old_pid, struct linux_binprm *bprm)`: the process has a new name, and
/// descriptors marked close-on-exec are closed.
#[raw_tracepoint(tracepoint = "sched_process_exec")]
pub(crate) fn process_exec(_ctx: RawTracePointContext) -> i32 {
    let Some(config) = config() else { return 0 };
    let process = current_process_by_task(config);
    let executed = Executed {
        at_ns: now(),
        faults: page_faults(current_task()),
    };
    let _ = EXECUTED.insert(process.pid, &executed, BPF_ANY as u64);
    let Some(inherited) = INHERITED.get_ptr(process.pid) else {
        return 0;
    };
    // SAFETY: a live map value of integers.
    let inherited = unsafe { *inherited };
    let held = holds(inherited.sk);
    if let Some(conn) = CONNS.get_ptr_mut(inherited.sk) {
        // SAFETY: a live map value.
        let conn = unsafe { &mut *conn };
        if conn.id == inherited.id && conn.owner_pid == process.pid {
            if held {
                conn.owner_comm = process.comm;
            } else {
                // A helper that does not serve the connection. The name was the forker's all along.
                conn.owner_pid = conn.forker_pid;
                conn.forker_pid = 0;
            }
        }
    }
    0
}

/// True if the process was forked after `since` and has not run since its execve, which closes descriptors after that hook.
#[inline(always)]
pub(crate) fn executed_just_now(pid: u32, since: u64) -> bool {
    if forked_at(current_task()) <= since {
        return false;
    }
    let Some(executed) = EXECUTED.get_ptr(pid) else {
        return false;
    };
    // SAFETY: a live map value of integers.
    let executed = unsafe { *executed };
    now().wrapping_sub(executed.at_ns) < CLOSES_NS && page_faults(current_task()) == executed.faults
}

/// Thread id: a process may accept in one thread and fork in another for something else.
#[inline(always)]
fn current_thread() -> u32 {
    bpf_get_current_pid_tgid() as u32
}

/// True if one of the current process's first descriptors is this socket.
#[inline(always)]
fn holds(sk: u64) -> bool {
    for fd in 0..FDS_LOOKED_AT {
        if sock_of_fd(fd) == sk {
            return true;
        }
    }
    false
}

/// Looks for an accepted connection without an owner among the current process's newest descriptors.
#[inline(always)]
fn accepted_lately() {
    let off = offsets();
    let files: u64 = read(current_task(), off.files);
    let next: u32 = read(files, off.next_fd);
    for back in 1..=NEWEST_FDS {
        let sk = sock_of_fd(next.wrapping_sub(back));
        // SAFETY: a live map value.
        let unowned = sk != 0
            && CONNS
                .get_ptr(sk)
                .is_some_and(|conn| unsafe { (*conn).owner_pid == 0 && (*conn).direction == direction::INCOMING });
        if unowned {
            accepted(Probed(sk));
            return;
        }
    }
}

/// Descriptors that a server may open between its accept and its fork.
const NEWEST_FDS: u32 = 4;
/// A server's child has its connection among its first descriptors.
const FDS_LOOKED_AT: u32 = 64;
/// Longer than an execve closes descriptors, also on a busy machine; what is older may be of another process of that id.
const CLOSES_NS: u64 = 100_000_000;
/// Voluntary context switches that the fork itself may cost the forker.
pub(crate) const SWITCHES_OF_FORK: u64 = 1;

/// Accept returned this socket to the current process. It may do so just before the last step of the handshake, and the
/// hook may have missed that step.
#[inline(always)]
fn accepted<M: Memory>(tcp: M) {
    let Some(config) = config() else { return };
    let owner = current_process_by_task(config);
    let sk = tcp.address();
    let on = is_on(bits(owner.pid, owner.cgroup, || read_netns(tcp), config));
    let id;
    if let Some(conn) = CONNS.get_ptr_mut(sk) {
        // SAFETY: a live map value; accept happens once per connection.
        let conn = unsafe { &mut *conn };
        if conn.owner_pid == owner.pid || conn.forker_pid == owner.pid {
            // Seen already, see `accept_again_2`.
            return;
        }
        id = conn.id;
        own(conn, &owner);
        if !on {
            return;
        }
    } else {
        let state = tcp.u8(offsets().state) as u32;
        if !on || state == state::CLOSE || tcp.u16(offsets().protocol) != IPPROTO_TCP || is_left_out(tcp, config) {
            return;
        }
        id = now();
        let mut conn = MaybeUninit::uninit();
        // SAFETY: integers only, without padding.
        let conn: &mut Conn = unsafe { cleared(&mut conn) };
        conn.id = id;
        own(conn, &owner);
        conn.direction = direction::INCOMING;
        // If the handshake completes meanwhile, its entry stands and the owner is added to it.
        if CONNS.insert(sk, &*conn, BPF_NOEXIST as u64).is_err()
            && let Some(conn) = CONNS.get_ptr_mut(sk)
        {
            // SAFETY: a live map value; accept happens once per connection.
            own(unsafe { &mut *conn }, &owner);
        }
    }
    let _ = LAST_ACCEPT.insert(current_thread(), &Inherited { sk, id }, BPF_ANY as u64);
}

/// The process owns the connection; its id last, as what makes the rest valid.
#[inline(always)]
fn own(conn: &mut Conn, owner: &Process) {
    conn.owner_comm = owner.comm;
    conn.owner_cgroup = owner.cgroup;
    conn.owner_pid = owner.pid;
}
