//! Connections of Go's `crypto/tls`.
//!
//! ```text
//! (*Conn).Write, behind the check of its stack ▶ connection, data, length in registers ─┐
//! (*Conn).Read, where it returns ▶ number of bytes; connection and buffer on the stack ─┴▶ descriptor ▶ socket ▶ plain text
//! ```
//! Nothing is kept between begin and end of a call: goroutines change threads within, and a `Read` that waits since before
//! the probes were there is seen when it returns. A caller of Go leaves room on its stack for what it passes in registers;
//! where that is kept, the agent has made sure of. What is written is told before it is sent, and what is read before
//! anybody could have answered it: so requests come before their answers, whatever goroutines these are in.

use aya_ebpf::{
    EbpfContext as _,
    helpers::{bpf_get_current_pid_tgid, generated},
    macros::uprobe,
    programs::ProbeContext,
};
use ebpf_common::{
    http::way,
    tls::{ConnKey, stat},
};
use ebpf_programs::stack::stay_on_own;

use crate::{
    emit,
    kernel::{read, sock_of_fd},
    maps::{count, offsets},
    sockets::now,
};

/// Indices among the registers, as words: the first three that pass arguments, the first being that of the result; the stack
/// pointer.
#[cfg(bpf_target_arch = "x86_64")]
const ARGUMENTS: [usize; 3] = [10, 5, 11];
#[cfg(bpf_target_arch = "x86_64")]
const STACK: usize = 19;
#[cfg(bpf_target_arch = "aarch64")]
const ARGUMENTS: [usize; 3] = [0, 1, 2];
#[cfg(bpf_target_arch = "aarch64")]
const STACK: usize = 31;

/// Words of a connection's wrapping in which its `*net.TCPConn` is looked for.
const WRAPPED: u64 = 12;
const AF_INET: u64 = 2;
const AF_INET6: u64 = 10;
const SOCK_STREAM: u64 = 1;
const IPPROTO_TCP: u16 = 6;
const IPPROTO_MPTCP: u16 = 262;

/// `func (c *Conn) Write(b []byte) (int, error)`, where its body begins.
#[uprobe]
pub(crate) fn go_write(ctx: ProbeContext) -> u32 {
    stay_on_own();
    let [conn, data, len] = ARGUMENTS.map(|register| word(&ctx, register));
    passed(conn, way::EGRESS, data, len);
    0
}

/// `func (c *Conn) Read(b []byte) (int, error)`, where it returns.
#[uprobe]
pub(crate) fn go_read(ctx: ProbeContext) -> u32 {
    stay_on_own();
    let len = word(&ctx, ARGUMENTS[0]);
    // Behind the address that it returns to: the receiver, and the slice's pointer and length.
    let mut passed_on = [0u64; 2];
    if user(word(&ctx, STACK) + 8, &mut passed_on) {
        passed(passed_on[0], way::INGRESS, passed_on[1], len);
    } else {
        count(stat::UNREADABLE, 1);
    }
    0
}

/// `func (c *Conn) clientHandshake(...)`, `serverHandshake(...)`: nothing of it has passed.
#[uprobe]
pub(crate) fn go_handshake(ctx: ProbeContext) -> u32 {
    stay_on_own();
    emit::begins(&key(word(&ctx, ARGUMENTS[0])));
    0
}

/// `func (c *Conn) Close() error`: its memory may be another one's later.
#[uprobe]
pub(crate) fn go_close(ctx: ProbeContext) -> u32 {
    stay_on_own();
    emit::ended(&key(word(&ctx, ARGUMENTS[0])));
    0
}

#[inline(always)]
fn passed(conn: u64, way: u8, data: u64, len: u64) {
    // Also an error's -1.
    if len - 1 >= i32::MAX as u64 {
        return;
    }
    let sk = descriptor(conn).map_or(0, |fd| sock_of_fd(fd));
    let protocol: u16 = if sk == 0 { 0 } else { read(sk, offsets().protocol) };
    if protocol != IPPROTO_TCP && protocol != IPPROTO_MPTCP {
        return count(stat::NO_DESCRIPTOR, 1);
    }
    emit::plaintext(&key(conn), sk, way, data, len as u32, now());
}

/// Descriptor of a `tls.Conn`, whose first member is the `net.Conn` that it speaks over: an interface, of type and data.
#[inline(always)]
fn descriptor(conn: u64) -> Option<u32> {
    let mut interface = [0u64; 2];
    if !user(conn, &mut interface) {
        return None;
    }
    let inner = interface[1];
    if let Some(fd) = of_tcp_conn(inner) {
        return Some(fd);
    }
    // A type that has the connection as a member: so do those that watch, count or limit.
    for index in 0..WRAPPED {
        let mut member = [0u64; 1];
        if user(inner + 8 * index, &mut member)
            && let Some(fd) = of_tcp_conn(member[0])
        {
            return Some(fd);
        }
    }
    None
}

/// Descriptor of what may be a `*net.TCPConn`. It holds a `*netFD`; this begins with a `poll.FD`, which is recognised: an open
/// stream whose end is a read of nothing and that is no file, then family and type of its socket.
#[inline(always)]
fn of_tcp_conn(address: u64) -> Option<u32> {
    let mut fd = [0u64; 1];
    let mut members = [0u64; 7];
    if address == 0 || !user(address, &mut fd) || !user(fd[0] + 16, &mut members) {
        return None;
    }
    let [number, _, _, _, flags, family, kind] = members;
    let is_it = flags & 0xff_ffff == 0x00_0101
        && (family == AF_INET || family == AF_INET6)
        && kind == SOCK_STREAM
        && number <= i32::MAX as u64;
    is_it.then_some(number as u32)
}

/// Reads words of the process; false if they are not there.
#[inline(always)]
fn user<const WORDS: usize>(address: u64, to: &mut [u64; WORDS]) -> bool {
    // SAFETY: writes as many bytes as the array has; the helper checks the source.
    unsafe { generated::bpf_probe_read_user(to.as_mut_ptr().cast(), (8 * WORDS) as u32, address as *const _) == 0 }
}

#[inline(always)]
fn key(conn: u64) -> ConnKey {
    ConnKey {
        object: conn,
        tgid: (bpf_get_current_pid_tgid() >> 32) as u32,
        _pad: 0,
    }
}

/// A register.
#[inline(always)]
fn word(ctx: &ProbeContext, register: usize) -> u64 {
    // SAFETY: the context is the registers, of which each may be read.
    unsafe { core::ptr::read_volatile((ctx.as_ptr() as *const u64).add(register)) }
}
