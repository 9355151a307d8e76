//! Which socket a connection is: the one that its records leave by.

use aya_ebpf::{
    EbpfContext as _,
    bindings::bpf_sock,
    helpers::{bpf_ktime_get_ns, generated},
    macros::cgroup_skb,
    programs::SkBuffContext,
};
use ebpf_common::{
    http::{EVENT_VERSION, EventHead},
    tls::{Calls, RECORD, TlsSock, stat},
};

use crate::{
    calls::under_way,
    emit,
    kernel::{Probed, current_task, owned_by_current, read},
    maps::{RECORDS, config, known, offsets},
};

const ALLOW: i32 = 1;
const IPPROTO_TCP: u32 = 6;
/// Segments that may tell nothing before a socket is left alone.
const LOOKS: u16 = 256;
/// `TlsSock::state`
const FOUND: u8 = 1;
const GIVEN_UP: u8 = 2;
/// Content types of TLS: from change_cipher_spec to application_data.
const TYPES: core::ops::RangeInclusive<u8> = 20..=23;
const HANDSHAKE: u8 = 22;

/// Packets that leave sockets in the cgroup and below; mostly in the sending process's context.
#[cgroup_skb]
#[inline(always)]
pub(crate) fn tls_egress(ctx: SkBuffContext) -> i32 {
    look(&ctx);
    ALLOW
}

#[inline(always)]
fn look(ctx: &SkBuffContext) {
    // SAFETY: a plain context read; the union's other members are for alignment.
    let sk = unsafe { (*ctx.skb.skb).__bindgen_anon_2.sk };
    if sk.is_null() {
        return;
    }
    // SAFETY: checked for null, as the helper demands.
    let sk: *mut bpf_sock = unsafe { generated::bpf_sk_fullsock(sk) };
    // SAFETY: checked for null; a field that the verifier allows.
    if sk.is_null() || unsafe { (*sk).protocol } != IPPROTO_TCP {
        return;
    }
    let Some((at, len)) = payload(ctx) else { return };
    let (Some(config), sock) = (config(), known(sk)) else {
        return;
    };
    if sock.is_null() {
        return;
    }
    // SAFETY: a live map value; what another CPU writes to it at a time does no harm.
    let sock = unsafe { &mut *sock };
    if sock.state == GIVEN_UP {
        if sock.generation == config.generation {
            return;
        }
        sock.state = 0;
        sock.looks = 0;
    }
    sock.generation = config.generation;
    let mut record = [0u64; RECORD / 8];
    let whole = len >= RECORD as u32;
    let wanted = if whole { RECORD } else { 8 };
    // A record of five bytes and less than three others is none of interest.
    if len < 8
        // SAFETY: the array has room for either.
        || unsafe { generated::bpf_skb_load_bytes(ctx.as_ptr().cast(), at, record.as_mut_ptr().cast(), wanted as u32) }
            != 0
    {
        return told_nothing(sock);
    }
    let first = record[0].to_le_bytes();
    if !TYPES.contains(&first[0]) || first[1] != 3 || first[2] > 4 {
        return told_nothing(sock);
    }
    let address = sock_address(ctx);
    let fresh = first[0] == HANDSHAKE;
    if owned_by_current(Probed(address))
        && let Some(Calls { calls: [outer, inner] }) = under_way(current_task())
    {
        sock.state = FOUND;
        // Of TLS within TLS both leave by this socket.
        if inner.stack != 0 {
            emit::found(&inner.key, address, fresh, stat::BY_NESTING);
        }
        return emit::found(&outer.key, address, fresh, stat::BY_NESTING);
    }
    if whole && let Some(key) = RECORDS.get_ptr(&record) {
        sock.state = FOUND;
        // SAFETY: a live map value.
        return emit::found(unsafe { &*key }, address, fresh, stat::BY_RECORD);
    }
    if sock.state != FOUND {
        told_nothing(sock);
    }
}

#[inline(always)]
fn told_nothing(sock: &mut TlsSock) {
    if sock.looks < LOOKS {
        sock.looks += 1;
    } else if sock.state != FOUND {
        sock.state = GIVEN_UP;
    }
}

/// Where a TCP segment's bytes begin in its packet, and how many there are; `None` if there are none.
#[inline(always)]
fn payload(ctx: &SkBuffContext) -> Option<(u32, u32)> {
    let head: u8 = ctx.load(0).ok()?;
    let l4 = if head >> 4 == 6 {
        let next: u8 = ctx.load(6).ok()?;
        // Options of IPv6 are not on packets that sockets send by themselves.
        if next as u32 != IPPROTO_TCP {
            return None;
        }
        40
    } else {
        (head & 0x0f) as u32 * 4
    };
    let offset: u8 = ctx.load(l4 as usize + 12).ok()?;
    let at = l4 + (offset >> 4) as u32 * 4;
    // SAFETY: a plain context read.
    let len = unsafe { (*ctx.skb.skb).len }.saturating_sub(at);
    (len != 0).then_some((at, len))
}

/// Start of an event.
#[inline(always)]
pub(crate) fn head(kind: u16, cookie: u64, time_ns: u64) -> EventHead {
    EventHead {
        version: EVENT_VERSION,
        kind,
        _pad: 0,
        cookie,
        time_ns,
    }
}

#[inline(always)]
pub(crate) fn now() -> u64 {
    // SAFETY: takes no argument.
    unsafe { bpf_ktime_get_ns() }
}

/// Address of the packet's `struct sock`, as a number: at run time the context is the kernel's `struct sk_buff`.
#[inline(always)]
fn sock_address(ctx: &SkBuffContext) -> u64 {
    read(ctx.as_ptr() as u64, offsets().skb_sk)
}
