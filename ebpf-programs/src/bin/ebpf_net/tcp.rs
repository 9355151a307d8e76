//! TCP connection ends: opened, closed. No hook in the send or receive path.

use core::mem::MaybeUninit;

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST},
    helpers::bpf_ktime_get_ns,
    macros::btf_tracepoint,
    programs::BtfTracePointContext,
};
use ebpf_common::net::{Conn, FlowKey, Handled, NetConfig, TcpCounters, direction, policy, stat};
use ebpf_programs::{
    memory::cleared,
    net::{guess_direction, state},
};

use crate::{
    accept::{SWITCHES_OF_FORK, executed_just_now},
    kernel::{
        Memory, Process, Typed, atomic_add, current_process, current_task, has_unread, is_left_out, is_orphan,
        owned_by_current, parent_process, read_counters, read_netns, read_tuple, tcp_of, voluntary_switches,
    },
    maps::{CONNS, CONNS_WERE_FULL, HANDLED, POLICY, config, count, offsets},
    policy::{bits, is_on, tcp_skip},
    report::{end, send_close, skip_reason},
};

/// `inet_sock_set_state(const struct sock *sk, const int oldstate, const int newstate)`, 4.16 and later.
#[btf_tracepoint(function = "inet_sock_set_state")]
#[inline(always)]
pub(crate) fn tcp_state(ctx: BtfTracePointContext) -> i32 {
    state_changed(&ctx, true);
    0
}

/// The same hook again, after `tcp_state`. Newer kernels skip a program that is already running on the CPU, so `tcp_state`
/// misses a softirq's state change that interrupts it in a process. `tcp_state` leaves a mark of what it did last on the
/// CPU; and every step below is idempotent: what `tcp_state` did has no effect here, what it missed is done here.
#[btf_tracepoint(function = "inet_sock_set_state")]
#[inline(always)]
pub(crate) fn tcp_state_nested(ctx: BtfTracePointContext) -> i32 {
    state_changed(&ctx, false);
    0
}

/// The same hook once more, for kernels that preempt programs at tracepoints: two processes that are off the CPU inside
/// the others keep both from all that happens there meanwhile.
#[btf_tracepoint(function = "inet_sock_set_state")]
#[inline(always)]
pub(crate) fn tcp_state_third(ctx: BtfTracePointContext) -> i32 {
    state_changed(&ctx, false);
    0
}

#[inline(always)]
fn state_changed(ctx: &BtfTracePointContext, first: bool) {
    let new: i32 = ctx.arg(2);
    let new = new as u32;
    // The others tell nothing that the next one does not.
    if !matches!(
        new,
        state::ESTABLISHED | state::SYN_SENT | state::FIN_WAIT1 | state::CLOSE | state::LAST_ACK
    ) {
        return;
    }
    let sk: u64 = ctx.arg(0);
    let Some(handled) = HANDLED.get_ptr_mut(0) else { return };
    if !take_mark(handled, sk, new, first) {
        return;
    }
    let (Some(tcp), Some(config)) = (tcp_of(sk), config()) else {
        return;
    };
    let old: i32 = ctx.arg(1);
    let old = old as u32;
    match new {
        state::SYN_SENT => connecting(tcp, config),
        state::ESTABLISHED => established(tcp, old, config),
        state::CLOSE => closed(tcp, old, first, config),
        _ => closing(tcp, old, config),
    }
    if first {
        // SAFETY: this CPU's slot of a live map. An interrupt between the two leaves a pair that no state change has, and
        // the second program, which runs next for this socket, takes it away.
        unsafe {
            core::ptr::write_volatile(&raw mut (*handled).state, new as u64);
            core::ptr::write_volatile(&raw mut (*handled).sk, sk);
        }
    }
}

/// Takes the CPU's mark away; false if it says that the first program did this already.
#[inline(always)]
fn take_mark(handled: *mut Handled, sk: u64, new: u32, first: bool) -> bool {
    // SAFETY: this CPU's slot of a live map. Whatever runs in between leaves another socket's mark or none.
    unsafe {
        let done = !first
            && core::ptr::read_volatile(&raw const (*handled).sk) == sk
            && core::ptr::read_volatile(&raw const (*handled).state) == new as u64;
        core::ptr::write_volatile(&raw mut (*handled).sk, 0);
        !done
    }
}

/// `tcp_destroy_sock(struct sock *sk)`: the end of a socket that reached CLOSE in a process's hands.
#[btf_tracepoint(function = "tcp_destroy_sock")]
pub(crate) fn tcp_destroy(ctx: BtfTracePointContext) -> i32 {
    destroyed(ctx.arg(0));
    0
}

/// The same hook again, for what interrupts `tcp_destroy`; see `tcp_state_nested`. The first one removed the entry.
#[btf_tracepoint(function = "tcp_destroy_sock")]
pub(crate) fn tcp_destroy_nested(ctx: BtfTracePointContext) -> i32 {
    destroyed(ctx.arg(0));
    0
}

/// The same hook once more; see `tcp_state_third`.
#[btf_tracepoint(function = "tcp_destroy_sock")]
pub(crate) fn tcp_destroy_third(ctx: BtfTracePointContext) -> i32 {
    destroyed(ctx.arg(0));
    0
}

#[inline(always)]
fn destroyed(sk: u64) {
    let Some(conn) = CONNS.get_ptr_mut(sk) else { return };
    let (Some(tcp), Some(config)) = (tcp_of(sk), config()) else {
        return;
    };
    // SAFETY: a live map value; nothing else ends this entry now.
    let conn = unsafe { &mut *conn };
    if conn.closed_ns == 0 {
        // Preempted programs on this CPU kept both others from seeing it close.
        conn.at_close = read_counters(tcp, Some(state::LAST_ACK), conn.direction == direction::OUTGOING);
        if conn.at_close.read | conn.at_close.written != 0 {
            conn.established_ns = 1;
        }
    }
    if conn.owner_pid | conn.closer_pid == 0 {
        // Reset before anybody closed it, and this is the close.
        note_closer(tcp, conn, config);
    }
    let counters = latest(tcp, conn);
    finish(tcp, conn, counters, config);
}

#[inline(always)]
pub(crate) fn now() -> u64 {
    // SAFETY: takes no argument.
    unsafe { bpf_ktime_get_ns() }
}

/// CLOSE to SYN_SENT, in the connecting process.
#[inline(always)]
fn connecting(tcp: Typed, config: &NetConfig) {
    if is_left_out(tcp, config) {
        return;
    }
    if let Some(conn) = CONNS.get_ptr_mut(tcp.address()) {
        // SAFETY: a live map value.
        let conn = unsafe { &mut *conn };
        if conn.closed_ns != 0 {
            // Disconnected and connected again: the socket outlived its connection.
            let counters = conn.at_close;
            finish(tcp, conn, counters, config);
        } else if conn.established_ns == 0 {
            // Seen already, see `tcp_state_nested`.
            return;
        }
    }
    let owner = current_process(config);
    if !is_on(bits(owner.pid, owner.cgroup, || read_netns(tcp), config)) {
        return;
    }
    let mut conn = MaybeUninit::uninit();
    // SAFETY: integers only, without padding.
    let conn: &mut Conn = unsafe { cleared(&mut conn) };
    conn.id = now();
    conn.owner_pid = owner.pid;
    conn.owner_comm = owner.comm;
    conn.owner_cgroup = owner.cgroup;
    conn.direction = direction::OUTGOING;
    insert(tcp.address(), conn);
}

/// The handshake completed, in softirq.
#[inline(always)]
fn established(tcp: Typed, old: u32, config: &NetConfig) {
    if let Some(conn) = CONNS.get_ptr_mut(tcp.address()) {
        // SAFETY: a live map value; this state change happens once per connection.
        let conn = unsafe { &mut *conn };
        if conn.established_ns == 0 {
            conn.established_ns = now();
        }
    } else if old == state::SYN_RECV {
        // From a listener.
        opened(tcp, direction::INCOMING, config);
    } else if old == state::SYN_SENT && config.policy_entries == 0 {
        // Connecting since before the programs were attached. Where something may be switched off, it was.
        opened(tcp, direction::OUTGOING, config);
    }
}

/// A connection that is open from now on and was not known before. Whose it is shows later.
#[inline(always)]
fn opened(tcp: Typed, direction: u8, config: &NetConfig) {
    if is_left_out(tcp, config) {
        return;
    }
    if config.policy_entries != 0
        && let Some(bits) = POLICY.get_ptr(policy::of_netns(read_netns(tcp)))
    {
        // SAFETY: a live map value.
        if !is_on(unsafe { *bits }) {
            return;
        }
    }
    let direction = if direction == direction::UNKNOWN {
        let off = offsets();
        guess_direction(u16::from_be(tcp.u16(off.sport)), u16::from_be(tcp.u16(off.dport)))
    } else {
        direction
    };
    let now = now();
    let mut conn = MaybeUninit::uninit();
    // SAFETY: integers only, without padding.
    let conn: &mut Conn = unsafe { cleared(&mut conn) };
    conn.id = now;
    conn.established_ns = now;
    conn.direction = direction;
    if CONNS.insert(tcp.address(), &*conn, BPF_NOEXIST as u64).is_ok() {
        return;
    }
    // Accepted meanwhile, or the map is full.
    match CONNS.get_ptr_mut(tcp.address()) {
        // SAFETY: a live map value.
        Some(conn) => unsafe { (*conn).established_ns = now },
        None => untracked(),
    }
}

#[inline(always)]
fn insert(sk: u64, conn: &Conn) {
    if CONNS.insert(sk, conn, BPF_ANY as u64).is_err() {
        untracked();
    }
}

/// There is no room for an entry; the connection is counted at its close.
#[inline(always)]
fn untracked() {
    count(stat::TCP_CONN_MAP_FULL, 1);
    if let Some(full) = CONNS_WERE_FULL.get_ptr_mut(0) {
        // SAFETY: a live map value that is only ever set to 1.
        unsafe { core::ptr::write_volatile(full, 1) };
    }
}

/// The local end starts to close (`close`, `shutdown`, exit), in the process that does it.
#[inline(always)]
fn closing(tcp: Typed, old: u32, config: &NetConfig) {
    let mut conn = CONNS.get_ptr_mut(tcp.address());
    if conn.is_none() {
        if old == state::SYN_RECV {
            // Fast open: served and closed before the handshake completed.
            opened(tcp, direction::INCOMING, config);
        } else if config.adopts != 0 && config.policy_entries == 0 {
            // What is older than the agent was adopted or had started to close before: this one's opening was missed, if
            // it was not left out.
            opened(tcp, direction::UNKNOWN, config);
        } else {
            return;
        }
        conn = CONNS.get_ptr_mut(tcp.address());
    }
    if let Some(conn) = conn {
        // SAFETY: a live map value, and the socket lock is held.
        let conn = unsafe { &mut *conn };
        if conn.closer_pid == 0 {
            note_closer(tcp, conn, config);
        }
    }
}

#[inline(always)]
fn note_closer(tcp: Typed, conn: &mut Conn, config: &NetConfig) {
    if !owned_by_current(tcp) {
        return;
    }
    let mut closer = current_process(config);
    if closer.pid == config.agent_pid && conn.owner_pid != 0 {
        return;
    }
    // The forker closes its copy last when the child was quicker. It served nothing itself if it has not waited for
    // anything since the fork.
    if conn.forker_pid == closer.pid
        && voluntary_switches(current_task()).wrapping_sub(conn.forker_nvcsw) <= SWITCHES_OF_FORK
    {
        return;
    }
    if executed_just_now(closer.pid, conn.id) {
        // A child that was forked for something else held copies of all descriptors until its execve, and of this one the
        // last. Whoever used it closed it before. The child may have been found as its only holder meanwhile.
        if conn.owner_pid != 0 && conn.owner_pid != closer.pid {
            return;
        }
        closer = parent_process(config);
    }
    conn.closer_comm = closer.comm;
    conn.closer_cgroup = closer.cgroup;
    conn.closer_pid = closer.pid;
}

/// The connection is over. So is the entry, unless a process may still read what is queued or has yet to accept it: then
/// `tcp_destroy` ends it.
#[inline(always)]
fn closed(tcp: Typed, old: u32, first: bool, config: &NetConfig) {
    if old == state::CLOSE || old == state::LISTEN || old == state::NEW_SYN_RECV {
        return;
    }
    let Some(conn) = CONNS.get_ptr_mut(tcp.address()) else {
        // Without an entry, the second program cannot tell whether the first one removed it.
        if first {
            closed_untracked(tcp, old, config);
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
    let counters = read_counters(tcp, Some(old), conn.direction == direction::OUTGOING);
    if is_orphan(tcp) || conn.established_ns == 0 || (conn.owner_pid != 0 && !has_unread(tcp)) {
        if conn.established_ns != 0 {
            note_closer(tcp, conn, config);
        }
        finish(tcp, conn, counters, config);
        return;
    }
    // An abort or a close with unread data goes straight to CLOSE, in the process; a reset in softirq does not.
    note_closer(tcp, conn, config);
    conn.at_close = counters;
    conn.remote_port = u16::from_be(tcp.u16(offsets().dport));
    conn.closed_ns = now();
}

/// Counters of a closed connection now: only what the process reads still grows. A disconnect resets the socket's own.
#[inline(always)]
pub(crate) fn latest<M: Memory>(tcp: M, conn: &Conn) -> TcpCounters {
    let mut counters = conn.at_close;
    let read = read_counters(tcp, Some(state::CLOSE), false).read;
    if read > counters.read {
        counters.read = read;
    }
    counters
}

/// Counts a connection in and removes its entry.
#[inline(always)]
fn finish(tcp: Typed, conn: &mut Conn, counters: TcpCounters, config: &NetConfig) {
    // Pairs with `sample_one`: whoever comes second sees the other's mark.
    // SAFETY: aligned field of a live map value.
    unsafe { atomic_add(&raw mut conn.closing, 1) };
    // SAFETY: as above; volatile so that it is read after the mark was set.
    let slot = unsafe { core::ptr::read_volatile(&raw const conn.slot) };
    count(stat::TCP_ENTERED, 1);
    if conn.established_ns == 0 {
        count(stat::TCP_SKIP_NOT_ESTABLISHED, 1);
        let _ = CONNS.remove(tcp.address());
        return;
    }
    let mut key = MaybeUninit::uninit();
    // SAFETY: integers only, without padding.
    let key: &mut FlowKey = unsafe { cleared(&mut key) };
    key.direction = conn.direction;
    let comm;
    let cgroup;
    if conn.closer_pid != 0 {
        key.pid = conn.closer_pid;
        (comm, cgroup) = (conn.closer_comm, conn.closer_cgroup);
    } else {
        key.pid = conn.owner_pid;
        (comm, cgroup) = (conn.owner_comm, conn.owner_cgroup);
    }
    let (id, adopted) = (conn.id, (conn.adopted & 1) as u32);
    let remote_port = conn.remote_port;
    let mut counters = counters;
    subtract_base(&mut counters, conn);
    let _ = CONNS.remove(tcp.address());
    read_tuple(tcp, &mut key.tuple);
    if key.tuple.remote_port == 0 {
        key.tuple.remote_port = remote_port;
    }
    if key.tuple.local_port == 0 || key.tuple.remote_port == 0 {
        // Another socket in the memory of one whose end was missed: never a connection.
        count(stat::TCP_SKIP_NOT_ESTABLISHED, 1);
        return;
    }
    let bits = bits(key.pid, cgroup, || key.tuple.netns, config);
    if !is_on(bits) {
        count(tcp_skip(bits), 1);
        return;
    }
    if slot != 0 {
        send_close(key, &counters, &comm, cgroup, (id, slot, adopted), config);
    } else {
        end(key, &counters, comm, cgroup, 1 - adopted as u64, config);
    }
}

/// A close without an entry because the connection map was full: still counted whole, from the socket itself.
#[inline(always)]
fn closed_untracked(tcp: Typed, old: u32, config: &NetConfig) {
    let mut key = MaybeUninit::uninit();
    // SAFETY: integers only, without padding.
    let key: &mut FlowKey = unsafe { cleared(&mut key) };
    if !read_tuple(tcp, &mut key.tuple) {
        return;
    }
    count(stat::TCP_ENTERED, 1);
    if let Some(reason) = skip_reason(&key.tuple, old, config) {
        count(reason, 1);
        return;
    }
    let mut owner = Process::NONE;
    if owned_by_current(tcp) {
        owner = current_process(config);
    }
    let bits = bits(owner.pid, owner.cgroup, || key.tuple.netns, config);
    if !is_on(bits) {
        count(tcp_skip(bits), 1);
        return;
    }
    key.pid = owner.pid;
    key.direction = guess_direction(key.tuple.local_port, key.tuple.remote_port);
    let counters = read_counters(tcp, Some(old), key.direction == direction::OUTGOING);
    end(key, &counters, owner.comm, owner.cgroup, 1, config);
}

#[inline(always)]
pub(crate) fn subtract_base(counters: &mut TcpCounters, conn: &Conn) {
    counters.read = counters.read.saturating_sub(conn.base_read);
    counters.written = counters.written.saturating_sub(conn.base_written);
    counters.retransmits = counters.retransmits.saturating_sub(conn.base_retransmits);
}
