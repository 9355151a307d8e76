//! TCP connection ends: opened, accepted, sampled, closed. No hook in the send or receive path.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP},
    helpers::bpf_ktime_get_ns,
    macros::{fexit, kretprobe, raw_tracepoint},
    maps::HashMap,
    programs::{FExitContext, RawTracePointContext, RetProbeContext},
};
use ebpf_common::net::{
    Conn, EVENT_VERSION, EventHead, FlowKey, Inherited, NetConfig, SAMPLES_PER_RUN, Sample, TcpAgg, TcpCloseEvent,
    TcpCounters, TcpSpillEvent, Tuple, direction, event, sample, stat,
};
use ebpf_programs::net::{fold_ports, guess_direction, is_loopback, is_v4, state};

use crate::{
    kernel::{
        atomic_add, current_process, current_task, has_unread, is_orphan, owned_by_current, read, read_counters,
        read_tuple, sock_of_fd, voluntary_switches,
    },
    maps::{ADOPT, CONNS, EVENTS, INHERITED, LAST_ACCEPT, SAMPLES, TCP_AGG_0, TCP_AGG_1, config, count, offsets},
};

const IPPROTO_TCP: u16 = 6;
const BPF_RB_AVAIL_DATA: u64 = 0;

/// `inet_sock_set_state(const struct sock *sk, const int oldstate, const int newstate)`, 4.16 and later.
#[raw_tracepoint(tracepoint = "inet_sock_set_state")]
pub(crate) fn tcp_state(ctx: RawTracePointContext) -> i32 {
    state_changed(&ctx, true);
    0
}

/// The same hook again, after `tcp_state`. Newer kernels skip a program that is already running on the CPU, so `tcp_state`
/// misses a softirq's state change that interrupts it in a process. Every step below is idempotent: what `tcp_state` did
/// has no effect here, what it missed is done here.
#[raw_tracepoint(tracepoint = "inet_sock_set_state")]
pub(crate) fn tcp_state_nested(ctx: RawTracePointContext) -> i32 {
    state_changed(&ctx, false);
    0
}

#[inline(always)]
fn state_changed(ctx: &RawTracePointContext, first: bool) {
    let sk: u64 = ctx.arg(0);
    let old: i32 = ctx.arg(1);
    let new: i32 = ctx.arg(2);
    let (old, new) = (old as u32, new as u32);
    let Some(config) = config() else { return };
    match new {
        state::SYN_SENT => connecting(sk, config),
        state::ESTABLISHED => established(sk, old, config),
        state::FIN_WAIT1 | state::LAST_ACK => closing(sk, old, config),
        state::CLOSE => closed(sk, old, first, config),
        _ => {}
    }
}

/// `tcp_destroy_sock(struct sock *sk)`: the end of a socket that reached CLOSE in a process's hands.
#[raw_tracepoint(tracepoint = "tcp_destroy_sock")]
pub(crate) fn tcp_destroy(ctx: RawTracePointContext) -> i32 {
    destroyed(ctx.arg(0));
    0
}

/// The same hook again, for what interrupts `tcp_destroy`; see `tcp_state_nested`. The first one removed the entry.
#[raw_tracepoint(tracepoint = "tcp_destroy_sock")]
pub(crate) fn tcp_destroy_nested(ctx: RawTracePointContext) -> i32 {
    destroyed(ctx.arg(0));
    0
}

#[inline(always)]
fn destroyed(sk: u64) {
    let (Some(conn), Some(config)) = (CONNS.get_ptr_mut(sk), config()) else {
        return;
    };
    // SAFETY: a live map value; nothing else ends this entry now.
    let conn = unsafe { &mut *conn };
    if conn.closed_ns == 0 {
        // Preempted programs on this CPU kept both others from seeing it close.
        conn.at_close = read_counters(sk, Some(state::LAST_ACK), conn.direction == direction::OUTGOING);
        if conn.at_close.read | conn.at_close.written != 0 {
            conn.established_ns = 1;
        }
    }
    let counters = latest(sk, conn);
    finish(sk, conn, counters, config);
}

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
    if sk != 0 {
        accepted(sk);
    }
}

/// The same by kretprobe. A process blocked in accept holds one of few return slots, so some returns are missed.
#[kretprobe]
pub(crate) fn accept_return(ctx: RetProbeContext) -> u32 {
    accept_exited(ctx.ret());
    0
}

/// `sys_exit(struct pt_regs *regs, long ret)`: the way to see accept where kernel functions cannot be probed.
#[raw_tracepoint(tracepoint = "sys_exit")]
pub(crate) fn accept_syscall(ctx: RawTracePointContext) -> i32 {
    let ret: i64 = ctx.arg(1);
    // Most calls end here: 0 is no descriptor that a server accepts into.
    if ret <= 0 || ret > i32::MAX as i64 {
        return 0;
    }
    let regs: u64 = ctx.arg(0);
    let off = offsets();
    // The syscall number is an int on arm64 and a long on x86-64; both are little-endian.
    let nr: u32 = read(regs, off.syscall_nr);
    if nr == off.nr_accept || nr == off.nr_accept4 {
        let sk = sock_of_fd(ret as u32);
        if sk != 0 {
            accepted(sk);
        }
    }
    0
}

/// `sched_process_fork(struct task_struct *parent, struct task_struct *child)`: a process that forks right after it
/// accepted a connection made the child to serve it.
#[raw_tracepoint(tracepoint = "sched_process_fork")]
pub(crate) fn process_fork(ctx: RawTracePointContext) -> i32 {
    let (parent, child): (u64, u64) = (ctx.arg(0), ctx.arg(1));
    let off = offsets();
    let (parent_pid, child_pid): (u32, u32) = (read(parent, off.tgid), read(child, off.tgid));
    // A thread, or a process that accepted nothing since its last fork.
    if parent_pid == child_pid {
        return 0;
    }
    let Some(inherited) = LAST_ACCEPT.get_ptr(parent_pid) else {
        return 0;
    };
    // SAFETY: a live map value of integers.
    let inherited = unsafe { *inherited };
    let _ = LAST_ACCEPT.remove(parent_pid);
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
    let (pid, comm) = current_process();
    let Some(inherited) = INHERITED.get_ptr(pid) else {
        return 0;
    };
    // SAFETY: a live map value of integers.
    let inherited = unsafe { *inherited };
    let held = holds(inherited.sk);
    if let Some(conn) = CONNS.get_ptr_mut(inherited.sk) {
        // SAFETY: a live map value.
        let conn = unsafe { &mut *conn };
        if conn.id == inherited.id && conn.owner_pid == pid {
            if held {
                conn.owner_comm = comm;
            } else {
                // A helper that does not serve the connection. The name was the forker's all along.
                conn.owner_pid = conn.forker_pid;
                conn.forker_pid = 0;
            }
        }
    }
    0
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

/// A server's child has its connection among its first descriptors.
const FDS_LOOKED_AT: u32 = 64;
/// Voluntary context switches that the fork itself may cost the forker.
const SWITCHES_OF_FORK: u64 = 1;

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
    let Some(adopt) = ADOPT.get_ptr_mut(0) else { return 0 };
    // SAFETY: as in `tcp_sample`.
    let adopt = unsafe { &mut *adopt };
    adopt.found = 0;
    adopt.id = 0;
    let sk = sock_of_fd(adopt.fd);
    if sk == 0 || !read_tuple(sk, &mut adopt.tuple) {
        return 0;
    }
    let off = offsets();
    let state = read::<u8>(sk, off.state) as u32;
    let protocol: u16 = read(sk, off.protocol);
    adopt.sk = sk;
    adopt.state = state;
    adopt.protocol = protocol as u32;
    adopt.found = 1;
    let open = matches!(
        state,
        state::ESTABLISHED | state::FIN_WAIT1 | state::FIN_WAIT2 | state::CLOSE_WAIT | state::LAST_ACK | state::CLOSING
    );
    if protocol != IPPROTO_TCP || !open {
        return 0;
    }
    let Some(config) = config() else { return 0 };
    if excluded(&adopt.tuple, config) {
        return 0;
    }
    if let Some(conn) = CONNS.get_ptr_mut(sk) {
        // SAFETY: a live map value; the owner fields are written in process context of the owner only.
        let conn = unsafe { &mut *conn };
        if conn.owner_pid == 0 {
            conn.owner_pid = adopt.pid;
            conn.owner_comm = adopt.comm;
        }
        adopt.id = conn.id;
        return 0;
    }
    let counters = read_counters(sk, Some(state), false);
    let now = now();
    let conn = Conn {
        id: now,
        established_ns: now,
        base_read: counters.read,
        base_written: counters.written,
        base_retransmits: counters.retransmits,
        owner_pid: adopt.pid,
        owner_comm: adopt.comm,
        direction: direction::UNKNOWN,
        adopted: 1,
        ..EMPTY
    };
    if CONNS.insert(sk, &conn, BPF_NOEXIST as u64).is_ok() {
        adopt.id = now;
    }
    0
}

const NO_COUNTERS: TcpCounters = TcpCounters {
    read: 0,
    written: 0,
    retransmits: 0,
    rtt_us: 0,
    rtt_var_us: 0,
    state: 0,
};

const EMPTY: Conn = Conn {
    id: 0,
    established_ns: 0,
    base_read: 0,
    base_written: 0,
    base_retransmits: 0,
    slot: 0,
    closing: 0,
    samples: 0,
    closed_ns: 0,
    at_close: NO_COUNTERS,
    owner_pid: 0,
    closer_pid: 0,
    owner_comm: [0; 16],
    closer_comm: [0; 16],
    direction: 0,
    adopted: 0,
    _pad: [0; 2],
    forker_pid: 0,
    forker_nvcsw: 0,
};

#[inline(always)]
fn now() -> u64 {
    // SAFETY: takes no argument.
    unsafe { bpf_ktime_get_ns() }
}

/// True if the configuration leaves these ends out.
#[inline(always)]
fn excluded(tuple: &Tuple, config: &NetConfig) -> bool {
    (config.loopback == 0 && (is_loopback(&tuple.remote) || is_loopback(&tuple.local)))
        || (config.ipv6_disabled != 0 && !is_v4(&tuple.remote))
}

/// CLOSE to SYN_SENT, in the connecting process.
#[inline(always)]
fn connecting(sk: u64, config: &NetConfig) {
    let mut tuple = Tuple::default();
    if read::<u16>(sk, offsets().protocol) != IPPROTO_TCP || !read_tuple(sk, &mut tuple) || excluded(&tuple, config) {
        return;
    }
    if let Some(conn) = CONNS.get_ptr_mut(sk) {
        // SAFETY: a live map value.
        let conn = unsafe { &mut *conn };
        if conn.closed_ns != 0 {
            // Disconnected and connected again: the socket outlived its connection.
            let counters = conn.at_close;
            finish(sk, conn, counters, config);
        } else if conn.established_ns == 0 {
            // Seen already, see `tcp_state_nested`.
            return;
        }
    }
    let (owner_pid, owner_comm) = current_process();
    insert(
        sk,
        &Conn {
            id: now(),
            owner_pid,
            owner_comm,
            direction: direction::OUTGOING,
            ..EMPTY
        },
    );
}

/// The handshake completed, in softirq.
#[inline(always)]
fn established(sk: u64, old: u32, config: &NetConfig) {
    if let Some(conn) = CONNS.get_ptr_mut(sk) {
        // SAFETY: a live map value; this state change happens once per connection.
        let conn = unsafe { &mut *conn };
        if conn.established_ns == 0 {
            conn.established_ns = now();
        }
    } else if old == state::SYN_RECV || old == state::SYN_SENT {
        // From a listener, or connecting since before the programs were attached.
        opened(
            sk,
            if old == state::SYN_RECV {
                direction::INCOMING
            } else {
                direction::OUTGOING
            },
            config,
        );
    }
}

/// A connection that is open from now on and was not known before.
#[inline(always)]
fn opened(sk: u64, direction: u8, config: &NetConfig) {
    let mut tuple = Tuple::default();
    if read::<u16>(sk, offsets().protocol) != IPPROTO_TCP || !read_tuple(sk, &mut tuple) || excluded(&tuple, config) {
        return;
    }
    let direction = if direction == direction::UNKNOWN {
        guess_direction(tuple.local_port, tuple.remote_port)
    } else {
        direction
    };
    let now = now();
    let conn = Conn {
        id: now,
        established_ns: now,
        direction,
        ..EMPTY
    };
    if CONNS.insert(sk, &conn, BPF_NOEXIST as u64).is_ok() {
        return;
    }
    // Accepted meanwhile, or the map is full.
    match CONNS.get_ptr_mut(sk) {
        // SAFETY: a live map value.
        Some(conn) => unsafe { (*conn).established_ns = now },
        None => count(stat::TCP_CONN_MAP_FULL, 1),
    }
}

#[inline(always)]
fn insert(sk: u64, conn: &Conn) {
    if CONNS.insert(sk, conn, BPF_ANY as u64).is_err() {
        count(stat::TCP_CONN_MAP_FULL, 1);
    }
}

/// Accept returned this socket to the current process. It may do so just before the last step of the handshake, and the
/// hook may have missed that step.
#[inline(always)]
fn accepted(sk: u64) {
    let (pid, comm) = current_process();
    let id;
    if let Some(conn) = CONNS.get_ptr_mut(sk) {
        // SAFETY: a live map value; accept happens once per connection.
        let conn = unsafe { &mut *conn };
        if conn.owner_pid == pid || conn.forker_pid == pid {
            // Seen already, see `accept_again_2`.
            return;
        }
        conn.owner_comm = comm;
        conn.owner_pid = pid;
        id = conn.id;
    } else {
        let mut tuple = Tuple::default();
        let Some(config) = config() else { return };
        let state = read::<u8>(sk, offsets().state) as u32;
        if state == state::CLOSE
            || read::<u16>(sk, offsets().protocol) != IPPROTO_TCP
            || !read_tuple(sk, &mut tuple)
            || excluded(&tuple, config)
        {
            return;
        }
        id = now();
        let conn = Conn {
            id,
            owner_pid: pid,
            owner_comm: comm,
            direction: direction::INCOMING,
            ..EMPTY
        };
        // If the handshake completes meanwhile, its entry stands and the owner is added to it.
        if CONNS.insert(sk, &conn, BPF_NOEXIST as u64).is_err()
            && let Some(conn) = CONNS.get_ptr_mut(sk)
        {
            // SAFETY: a live map value; accept happens once per connection.
            let conn = unsafe { &mut *conn };
            conn.owner_comm = comm;
            conn.owner_pid = pid;
        }
    }
    let _ = LAST_ACCEPT.insert(pid, &Inherited { sk, id }, BPF_ANY as u64);
}

/// The local end starts to close (`close`, `shutdown`, exit), in the process that does it.
#[inline(always)]
fn closing(sk: u64, old: u32, config: &NetConfig) {
    match CONNS.get_ptr(sk) {
        // SAFETY: a live map value.
        Some(conn) if unsafe { (*conn).closer_pid } != 0 => return,
        Some(_) => {}
        // Fast open: served and closed before the handshake completed.
        None if old == state::SYN_RECV => opened(sk, direction::INCOMING, config),
        // What is older than the agent was adopted or had started to close before: this one's opening was missed.
        None if config.adopts != 0 => opened(sk, direction::UNKNOWN, config),
        None => return,
    }
    note_closer(sk, config);
}

#[inline(always)]
fn note_closer(sk: u64, config: &NetConfig) {
    if !owned_by_current(sk) {
        return;
    }
    if let Some(conn) = CONNS.get_ptr_mut(sk) {
        // SAFETY: a live map value, and the socket lock is held.
        let conn = unsafe { &mut *conn };
        let (pid, comm) = current_process();
        // The forker closes its copy last when the child was quicker. It served nothing itself if it has not waited for
        // anything since the fork.
        let waits = voluntary_switches(current_task()).wrapping_sub(conn.forker_nvcsw);
        if (conn.forker_pid == pid && waits <= SWITCHES_OF_FORK) || (pid == config.agent_pid && conn.owner_pid != 0) {
            return;
        }
        conn.closer_comm = comm;
        conn.closer_pid = pid;
    }
}

/// The connection is over. So is the entry, unless a process may still read what is queued or has yet to accept it: then
/// `tcp_destroy` ends it.
#[inline(always)]
fn closed(sk: u64, old: u32, first: bool, config: &NetConfig) {
    if old == state::CLOSE || old == state::LISTEN || old == state::NEW_SYN_RECV {
        return;
    }
    let Some(conn) = CONNS.get_ptr_mut(sk) else {
        // Without an entry, the second program cannot tell whether the first one removed it.
        if first {
            closed_untracked(sk, old, config);
        }
        return;
    };
    // SAFETY: a live map value: only the end of this socket removes it.
    let conn = unsafe { &mut *conn };
    if conn.closed_ns != 0 {
        return;
    }
    if conn.established_ns == 0 && old != state::SYN_SENT && old != state::SYN_RECV {
        conn.established_ns = now();
    }
    let counters = read_counters(sk, Some(old), conn.direction == direction::OUTGOING);
    if is_orphan(sk) || conn.established_ns == 0 || (conn.owner_pid != 0 && !has_unread(sk)) {
        if conn.established_ns != 0 {
            note_closer(sk, config);
        }
        finish(sk, conn, counters, config);
        return;
    }
    // An abort or a close with unread data goes straight to CLOSE, in the process; a reset in softirq does not.
    note_closer(sk, config);
    conn.at_close = counters;
    conn.closed_ns = now();
}

/// Counters of a closed connection now. A disconnect resets the socket's own, so the larger ones are right.
#[inline(always)]
fn latest(sk: u64, conn: &Conn) -> TcpCounters {
    let connecting_side = conn.direction == direction::OUTGOING;
    let mut counters = read_counters(sk, Some(conn.at_close.state), connecting_side);
    if counters.read < conn.at_close.read || counters.written < conn.at_close.written {
        counters = conn.at_close;
    }
    counters
}

/// Counts a connection in and removes its entry.
#[inline(always)]
fn finish(sk: u64, conn: &mut Conn, counters: TcpCounters, config: &NetConfig) {
    // Pairs with `sample_one`: whoever comes second sees the other's mark.
    // SAFETY: aligned field of a live map value.
    unsafe { atomic_add(&raw mut conn.closing, 1) };
    // SAFETY: as above; volatile so that it is read after the mark was set.
    let slot = unsafe { core::ptr::read_volatile(&raw const conn.slot) };
    count(stat::TCP_ENTERED, 1);
    if conn.established_ns == 0 {
        count(stat::TCP_SKIP_NOT_ESTABLISHED, 1);
        let _ = CONNS.remove(sk);
        return;
    }
    let mut key = FlowKey {
        direction: conn.direction,
        ..EMPTY_KEY
    };
    let comm = if conn.closer_pid != 0 {
        key.pid = conn.closer_pid;
        conn.closer_comm
    } else {
        key.pid = conn.owner_pid;
        conn.owner_comm
    };
    let (id, adopted) = (conn.id, (conn.adopted & 1) as u32);
    let mut counters = counters;
    subtract_base(&mut counters, conn);
    let _ = CONNS.remove(sk);
    read_tuple(sk, &mut key.tuple);
    if slot != 0 {
        send_close(&key, &counters, &comm, id, slot, adopted, config);
    } else {
        end(&mut key, &counters, comm, 1 - adopted as u64, config);
    }
}

/// A close without an entry because the connection map was full: still counted whole, from the socket itself.
#[inline(always)]
fn closed_untracked(sk: u64, old: u32, config: &NetConfig) {
    let mut key = EMPTY_KEY;
    if read::<u16>(sk, offsets().protocol) != IPPROTO_TCP || !read_tuple(sk, &mut key.tuple) {
        return;
    }
    count(stat::TCP_ENTERED, 1);
    if let Some(reason) = skip_reason(&key.tuple, old, config) {
        count(reason, 1);
        return;
    }
    let mut comm = [0; 16];
    if owned_by_current(sk) {
        (key.pid, comm) = current_process();
    }
    key.direction = guess_direction(key.tuple.local_port, key.tuple.remote_port);
    let counters = read_counters(sk, Some(old), key.direction == direction::OUTGOING);
    end(&mut key, &counters, comm, 1, config);
}

const EMPTY_KEY: FlowKey = FlowKey {
    tuple: Tuple {
        local: [0; 16],
        remote: [0; 16],
        local_port: 0,
        remote_port: 0,
        netns: 0,
    },
    pid: 0,
    direction: direction::UNKNOWN,
    folded: 0,
    _pad: [0; 2],
};

#[inline(always)]
fn end(key: &mut FlowKey, counters: &TcpCounters, comm: [u8; 16], established: u64, config: &NetConfig) {
    if key.direction == direction::UNKNOWN {
        key.direction = guess_direction(key.tuple.local_port, key.tuple.remote_port);
    }
    fold_ports(key, config.ephemeral_port);
    aggregate(key, counters, comm, established, config);
}

#[inline(always)]
fn skip_reason(tuple: &Tuple, old: u32, config: &NetConfig) -> Option<u32> {
    if config.loopback == 0 && (is_loopback(&tuple.remote) || is_loopback(&tuple.local)) {
        return Some(stat::TCP_SKIP_LOOPBACK);
    }
    if config.ipv6_disabled != 0 && !is_v4(&tuple.remote) {
        return Some(stat::TCP_SKIP_IPV6);
    }
    if old == state::SYN_SENT || old == state::SYN_RECV {
        return Some(stat::TCP_SKIP_NOT_ESTABLISHED);
    }
    if now() < config.settled_ns {
        return Some(stat::TCP_SKIP_PREDATES);
    }
    None
}

#[inline(always)]
fn subtract_base(counters: &mut TcpCounters, conn: &Conn) {
    counters.read = counters.read.saturating_sub(conn.base_read);
    counters.written = counters.written.saturating_sub(conn.base_written);
    counters.retransmits = counters.retransmits.saturating_sub(conn.base_retransmits);
}

#[inline(always)]
fn wake_flag(config: &NetConfig) -> u64 {
    if EVENTS.query(BPF_RB_AVAIL_DATA) > config.wake_bytes {
        BPF_RB_FORCE_WAKEUP as u64
    } else {
        BPF_RB_NO_WAKEUP as u64
    }
}

#[inline(always)]
fn send_close(
    key: &FlowKey,
    counters: &TcpCounters,
    comm: &[u8; 16],
    id: u64,
    slot: u32,
    adopted: u32,
    config: &NetConfig,
) {
    let flag = wake_flag(config);
    let Some(mut entry) = EVENTS.reserve::<TcpCloseEvent>(0) else {
        count(stat::TCP_LOST_FULL, 1);
        return;
    };
    // SAFETY: reserved memory of exactly this type, written whole before it is submitted.
    unsafe {
        let event = entry.as_mut_ptr();
        (*event).head = EventHead {
            kind: event::TCP_CLOSE,
            version: EVENT_VERSION,
            len: size_of::<TcpCloseEvent>() as u32,
        };
        (*event).id = id;
        (*event).slot = slot;
        (*event).adopted = adopted;
        (*event).counters = *counters;
        (*event).key = *key;
        (*event).comm = *comm;
    }
    entry.submit(flag);
}

#[inline(always)]
fn aggregate(key: &FlowKey, counters: &TcpCounters, comm: [u8; 16], established: u64, config: &NetConfig) {
    let map: &HashMap<FlowKey, TcpAgg> = if config.active == 0 { &TCP_AGG_0 } else { &TCP_AGG_1 };
    if let Some(agg) = map.get_ptr_mut(key) {
        add(agg, counters, established);
        return;
    }
    let agg = TcpAgg {
        read: counters.read,
        written: counters.written,
        retransmits: counters.retransmits as u64,
        rtt_sum_us: counters.rtt_us as u64,
        rtt_var_sum_us: counters.rtt_var_us as u64,
        closed: 1,
        established,
        first_ns: now(),
        comm,
    };
    if map.insert(key, &agg, BPF_NOEXIST as u64).is_ok() {
        return;
    }
    // Another CPU made the entry meanwhile, or the map is full.
    if let Some(agg) = map.get_ptr_mut(key) {
        add(agg, counters, established);
        return;
    }
    let flag = wake_flag(config);
    let Some(mut entry) = EVENTS.reserve::<TcpSpillEvent>(0) else {
        count(stat::TCP_LOST_FULL, 1);
        return;
    };
    // SAFETY: reserved memory of exactly this type, written whole before it is submitted.
    unsafe {
        let event = entry.as_mut_ptr();
        (*event).head = EventHead {
            kind: event::TCP_SPILL,
            version: EVENT_VERSION,
            len: size_of::<TcpSpillEvent>() as u32,
        };
        (*event).key = *key;
        (*event).agg = agg;
    }
    entry.submit(flag);
}

#[inline(always)]
fn add(agg: *mut TcpAgg, counters: &TcpCounters, established: u64) {
    // SAFETY: aligned fields of a live map value; other CPUs add to them too.
    unsafe {
        atomic_add(&raw mut (*agg).read, counters.read);
        atomic_add(&raw mut (*agg).written, counters.written);
        atomic_add(&raw mut (*agg).retransmits, counters.retransmits as u64);
        atomic_add(&raw mut (*agg).rtt_sum_us, counters.rtt_us as u64);
        atomic_add(&raw mut (*agg).rtt_var_sum_us, counters.rtt_var_us as u64);
        atomic_add(&raw mut (*agg).closed, 1);
        atomic_add(&raw mut (*agg).established, established);
    }
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
        read_counters(one.sk, None, conn.direction == direction::OUTGOING)
    } else {
        latest(one.sk, conn)
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
        read_tuple(one.sk, &mut one.tuple);
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
