//! Calls of C libraries: OpenSSL, BoringSSL, GnuTLS. What they take is looked at when they have returned, and so is what
//! they give: before, it is not known how much is taken, and nothing is there.

use aya_ebpf::{
    EbpfContext as _,
    helpers::{bpf_get_current_pid_tgid, generated},
    macros::{uprobe, uretprobe},
    programs::{ProbeContext, RetProbeContext},
};
use ebpf_common::{
    http::way,
    tls::{Call, Calls, ConnKey, RECORD, result, stat},
};
use ebpf_programs::stack::stay_on_own;

use crate::{
    capture, emit,
    kernel::current_task,
    maps::{CALLS, CONNS, RECORDS, count},
    segment::{Source, load_bytes},
    sockets::now,
};

/// Index of the stack pointer among the registers, as words.
#[cfg(bpf_target_arch = "x86_64")]
const STACK: usize = 19;
#[cfg(bpf_target_arch = "aarch64")]
const STACK: usize = 31;
/// What a return takes from the stack.
#[cfg(bpf_target_arch = "x86_64")]
const RETURN_ADDRESS: u64 = 8;
#[cfg(bpf_target_arch = "aarch64")]
const RETURN_ADDRESS: u64 = 0;

/// `SSL_read(ssl, buf, num)`, `gnutls_record_recv(session, data, size)`
#[uprobe]
pub(crate) fn tls_read(ctx: ProbeContext) -> u32 {
    stay_on_own();
    enter(&ctx, way::INGRESS, result::NUMBER, argument(&ctx, 1), 0)
}

/// `SSL_write(ssl, buf, num)`, `gnutls_record_send(session, data, size)`
#[uprobe]
pub(crate) fn tls_write(ctx: ProbeContext) -> u32 {
    stay_on_own();
    enter(&ctx, way::EGRESS, result::NUMBER, argument(&ctx, 1), 0)
}

/// `SSL_read_ex(ssl, buf, num, *readbytes)`
#[uprobe]
pub(crate) fn tls_read_ex(ctx: ProbeContext) -> u32 {
    stay_on_own();
    enter(
        &ctx,
        way::INGRESS,
        result::POINTER,
        argument(&ctx, 1),
        argument(&ctx, 3),
    )
}

/// `SSL_write_ex(ssl, buf, num, *written)`
#[uprobe]
pub(crate) fn tls_write_ex(ctx: ProbeContext) -> u32 {
    stay_on_own();
    enter(&ctx, way::EGRESS, result::POINTER, argument(&ctx, 1), argument(&ctx, 3))
}

/// `SSL_sendfile(ssl, fd, offset, size, flags)`: the bytes are in no buffer.
#[uprobe]
pub(crate) fn tls_sendfile(ctx: ProbeContext) -> u32 {
    stay_on_own();
    enter(&ctx, way::EGRESS, result::NUMBER, 0, 0)
}

/// `SSL_do_handshake(ssl)`, which `SSL_connect` and `SSL_accept` call; `gnutls_handshake(session)`
#[uprobe]
pub(crate) fn tls_handshake(ctx: ProbeContext) -> u32 {
    stay_on_own();
    emit::begins(&key(&ctx));
    enter(&ctx, way::EGRESS, result::NOTHING, 0, 0)
}

/// `SSL_free(ssl)`, `SSL_clear(ssl)`, `gnutls_deinit(session)`
#[uprobe]
pub(crate) fn tls_free(ctx: ProbeContext) -> u32 {
    stay_on_own();
    emit::ended(&key(&ctx));
    0
}

/// `BIO_write(bio, data, len)`: what a record looks like where it leaves the library, or is kept until the process sends it.
#[uprobe]
pub(crate) fn tls_bio_write(ctx: ProbeContext) -> u32 {
    stay_on_own();
    let Some(Calls { calls: [outer, inner] }) = under_way(current_task()) else {
        return 0;
    };
    let key = if inner.stack != 0 { inner.key } else { outer.key };
    if let Some(conn) = CONNS.get_ptr(&key)
        // SAFETY: a live map value.
        && unsafe { (*conn).sk } != 0
    {
        return 0;
    }
    if (argument(&ctx, 2) as u32 as i32) < RECORD as i32 {
        return 0;
    }
    let mut record = [0u64; RECORD / 8];
    // SAFETY: the array has that size.
    if unsafe { load_bytes(&Source(argument(&ctx, 1)), 0, record.as_mut_ptr().cast(), RECORD as u32) } == 0
        && RECORDS.insert(&record, &key, 0).is_err()
    {
        count(stat::CONNECTIONS_FULL, 1);
    }
    0
}

/// Return of one of these functions that wait for it.
#[uretprobe]
pub(crate) fn tls_returned(ctx: RetProbeContext) -> u32 {
    stay_on_own();
    let before = stack(&ProbeContext::new(ctx.as_ptr())).wrapping_sub(RETURN_ADDRESS);
    left(before, ctx.ret())
}

#[inline(always)]
fn enter(ctx: &ProbeContext, way: u8, result: u8, buffer: u64, moved_at: u64) -> u32 {
    let call = Call {
        key: key(ctx),
        stack: stack(ctx),
        buffer,
        moved_at,
        time_ns: now(),
        way,
        result,
        _pad: [0; 6],
    };
    let task = current_task();
    if let Some(calls) = CALLS.get_ptr_mut(&task) {
        // SAFETY: a live map value, of this thread alone.
        let calls = unsafe { &mut (*calls).calls };
        // A call inside another one is further down. Anything else has ended, and nobody saw it.
        if calls[0].stack > call.stack {
            calls[1] = call;
        } else {
            calls[0] = call;
            calls[1].stack = 0;
        }
        return 0;
    }
    let mut calls = core::mem::MaybeUninit::<Calls>::uninit();
    // SAFETY: integers only, of which zero is a valid value; all are cleared.
    let calls = unsafe {
        capture::clear::<{ size_of::<Calls>() / 8 }>(calls.as_mut_ptr().cast());
        calls.assume_init_mut()
    };
    calls.calls[0] = call;
    if CALLS.insert(&task, &*calls, 0).is_err() {
        count(stat::CALLS_FULL, 1);
    }
    0
}

/// The call with this stack pointer returns `value`.
#[inline(always)]
fn left(stack: u64, value: u64) -> u32 {
    let Some(calls) = CALLS.get_ptr_mut(&current_task()) else {
        count(stat::NO_CALL, 1);
        return 0;
    };
    // SAFETY: a live map value, of this thread alone.
    let calls = unsafe { &mut (*calls).calls };
    let (inner, outer) = (calls[1], calls[0]);
    let call = if inner.stack == stack {
        calls[1].stack = 0;
        inner
    } else if outer.stack == stack {
        calls[0].stack = 0;
        calls[1].stack = 0;
        outer
    } else {
        count(stat::NO_CALL, 1);
        return 0;
    };
    // One of two functions that does its work by the other tells of both.
    let same = outer.key.object == call.key.object && outer.way == call.way && outer.result != result::NOTHING;
    if inner.stack == stack && outer.stack != 0 && same {
        return 0;
    }
    let value = value as u32 as i32;
    let len = match call.result {
        result::NUMBER if value > 0 => value as u32,
        result::POINTER if value == 1 => moved(call.moved_at),
        _ => return 0,
    };
    // A process sends what it has when the call begins, and has what it gets when that returns.
    let time = if call.way == way::EGRESS { call.time_ns } else { now() };
    emit::plaintext(&call.key, 0, call.way, call.buffer, len, time);
    0
}

/// The calls of a thread that are under way; `None` if there are none.
#[inline(always)]
pub(crate) fn under_way(task: u64) -> Option<&'static Calls> {
    // SAFETY: a live map value, of this thread alone.
    let calls = unsafe { &*CALLS.get_ptr(&task)? };
    (calls.calls[0].stack != 0).then_some(calls)
}

#[inline(always)]
fn moved(address: u64) -> u32 {
    let mut moved = 0u64;
    // SAFETY: writes eight bytes; the helper checks the source.
    unsafe { generated::bpf_probe_read_user((&raw mut moved).cast(), 8, address as *const _) };
    if moved > i32::MAX as u64 { 0 } else { moved as u32 }
}

#[inline(always)]
fn argument(ctx: &ProbeContext, number: usize) -> u64 {
    ctx.arg(number).unwrap_or(0)
}

#[inline(always)]
fn key(ctx: &ProbeContext) -> ConnKey {
    ConnKey {
        object: argument(ctx, 0),
        tgid: (bpf_get_current_pid_tgid() >> 32) as u32,
        _pad: 0,
    }
}

#[inline(always)]
fn stack(ctx: &ProbeContext) -> u64 {
    // SAFETY: the context is the registers, of which each may be read.
    unsafe { core::ptr::read_volatile((ctx.as_ptr() as *const u64).add(STACK)) }
}
