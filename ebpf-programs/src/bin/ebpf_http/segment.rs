//! TCP segments at the socket: which bytes of which stream they are.

use aya_ebpf::{EbpfContext as _, bindings::bpf_sock, helpers::generated, macros::cgroup_skb, programs::SkBuffContext};
use ebpf_common::http::way;
use ebpf_programs::{
    http::verdict,
    net::{mapped, state},
};

use crate::sockets;

const ALLOW: i32 = 1;
const IPPROTO_TCP: u8 = 6;
const FIN: u8 = 0x01;
const RST: u8 = 0x04;

/// Where bytes of segments are.
pub(crate) type Source = SkBuffContext;

/// Copies bytes of the packet; negative if they are not there.
///
/// # Safety
/// `to` is writable for `size` bytes.
#[inline(always)]
pub(crate) unsafe fn load_bytes(ctx: &Source, at: u32, to: *mut u8, size: u32) -> i64 {
    // SAFETY: as demanded of the caller.
    unsafe { generated::bpf_skb_load_bytes(ctx.as_ptr().cast(), at, to.cast(), size) }
}

/// A segment with bytes in it, or with the end of its stream.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Segment {
    /// [`way`] it goes.
    pub(crate) way: u8,
    /// Its FIN flag.
    pub(crate) fin: bool,
    /// Its RST flag.
    pub(crate) reset: bool,
    /// What begins with it, once that was looked at.
    pub(crate) begins: u8,
    /// Sequence number of its first byte.
    pub(crate) seq: u32,
    /// Bytes in it.
    pub(crate) len: u32,
    /// Where they begin in the packet.
    pub(crate) at: u32,
    /// Where the TCP header begins.
    l4: u32,
    v6: bool,
}

impl Segment {
    /// Copies it onto itself by way of the kernel: for the verifier its numbers are unknown ones then, so that it need not
    /// follow each way to them.
    #[inline(always)]
    pub(crate) fn forget(&mut self) {
        let address = core::ptr::from_mut(self);
        // SAFETY: the helper reads a live value and writes as many bytes; integers and flags only.
        unsafe { generated::bpf_probe_read_kernel(address.cast(), size_of::<Self>() as u32, address.cast()) };
    }
}

/// Packets that leave sockets in the cgroup and below; mostly in the sending process's context.
#[cgroup_skb]
#[inline(always)]
pub(crate) fn http_egress(ctx: SkBuffContext) -> i32 {
    look(&ctx, way::EGRESS);
    ALLOW
}

/// Packets that came to sockets in the cgroup and below; in softirq.
#[cgroup_skb]
#[inline(always)]
pub(crate) fn http_ingress(ctx: SkBuffContext) -> i32 {
    look(&ctx, way::INGRESS);
    ALLOW
}

#[inline(always)]
fn look(ctx: &SkBuffContext, way: u8) {
    let Some(mut segment) = parse(ctx, way) else { return };
    // SAFETY: a plain context read; the union's other members are for alignment.
    let sk = unsafe { (*ctx.skb.skb).__bindgen_anon_2.sk };
    if sk.is_null() {
        return;
    }
    // SAFETY: checked for null, as the helper demands.
    let sk: *mut bpf_sock = unsafe { generated::bpf_sk_fullsock(sk) };
    if sk.is_null() {
        return;
    }
    sockets::passed(ctx, sk, &mut segment);
}

/// Finds the segment in its packet. `None` for everything but TCP with something to tell.
#[inline(always)]
fn parse(ctx: &SkBuffContext, way: u8) -> Option<Segment> {
    // SAFETY: plain context reads; the verifier turns them into packet pointers.
    let (data, end) = unsafe { ((*ctx.skb.skb).data as usize, (*ctx.skb.skb).data_end as usize) };
    if data + 40 > end {
        return None;
    }
    // SAFETY: bounds checked against data_end just above, as the verifier demands.
    let head = unsafe { *(data as *const u8) };
    let v6 = head >> 4 == 6;
    let tcp: [u8; 14];
    let l4;
    if !v6 {
        // SAFETY: within the 40 bytes checked.
        if unsafe { *((data + 9) as *const u8) } != IPPROTO_TCP {
            return None;
        }
        l4 = (head & 0x0f) as u32 * 4;
        tcp = if l4 == 20 {
            // SAFETY: within the 40 bytes checked; byte arrays have no alignment.
            unsafe { *((data + 20) as *const [u8; 14]) }
        } else {
            ctx.load(l4 as usize).ok()?
        };
    } else {
        // SAFETY: within the 40 bytes checked.
        let next = unsafe { *((data + 6) as *const u8) };
        if next == IPPROTO_TCP {
            l4 = 40;
            if data + 60 > end {
                return None;
            }
            // SAFETY: within the 60 bytes checked; byte arrays have no alignment.
            tcp = unsafe { *((data + 40) as *const [u8; 14]) };
        } else {
            l4 = behind_extensions(ctx, next)?;
            tcp = ctx.load(l4 as usize).ok()?;
        }
    }
    // SAFETY: a plain context read.
    let packet = unsafe { (*ctx.skb.skb).len };
    let at = l4 + (tcp[12] >> 4) as u32 * 4;
    let len = packet.saturating_sub(at);
    let (fin, reset) = (tcp[13] & FIN != 0, tcp[13] & RST != 0);
    if len == 0 && !fin && !reset {
        return None;
    }
    Some(Segment {
        way,
        fin,
        reset,
        begins: verdict::OTHER,
        seq: u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]),
        len,
        at,
        l4,
        v6,
    })
}

/// Offset of the TCP header behind at most three IPv6 extension headers.
#[inline(always)]
fn behind_extensions(ctx: &SkBuffContext, mut next: u8) -> Option<u32> {
    let mut at = 40u32;
    for _ in 0..3 {
        // Hop-by-hop, routing, fragment, destination options.
        if next != 0 && next != 43 && next != 44 && next != 60 {
            break;
        }
        let head: [u8; 2] = ctx.load(at as usize).ok()?;
        at += if next == 44 { 8 } else { (head[1] as u32 + 1) * 8 };
        next = head[0];
    }
    (next == IPPROTO_TCP).then_some(at)
}

/// Both ends as the packet has them: local and remote, each address and port.
#[inline(always)]
pub(crate) fn ends(ctx: &SkBuffContext, segment: &Segment) -> Option<([u8; 16], u16, [u8; 16], u16)> {
    let (source, destination): ([u8; 16], [u8; 16]) = if segment.v6 {
        (ctx.load(8).ok()?, ctx.load(24).ok()?)
    } else {
        (mapped(ctx.load(12).ok()?), mapped(ctx.load(16).ok()?))
    };
    let ports: [u8; 4] = ctx.load(segment.l4 as usize).ok()?;
    let (from, to) = (
        u16::from_be_bytes([ports[0], ports[1]]),
        u16::from_be_bytes([ports[2], ports[3]]),
    );
    Some(if segment.way == way::EGRESS {
        (source, from, destination, to)
    } else {
        (destination, to, source, from)
    })
}

/// True for a socket that has no stream of its own: what makes connections shows here before they are.
#[inline(always)]
pub(crate) fn is_listening(sk: *mut bpf_sock) -> bool {
    // SAFETY: a full socket, of which the verifier allows this field.
    unsafe { (*sk).state == state::LISTEN }
}

/// Cookie of the packet's socket.
#[inline(always)]
pub(crate) fn cookie(ctx: &SkBuffContext) -> u64 {
    // SAFETY: the context is this program type's `struct __sk_buff`.
    unsafe { generated::bpf_get_socket_cookie(ctx.as_ptr()) }
}
