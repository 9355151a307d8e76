//! Packets that programs of other captures want to see: handed on from the hook of UDP, so that a packet that none of them
//! wants costs one program instead of three.

use aya_ebpf::programs::SkBuffContext;
use ebpf_common::net::beside;

use crate::maps::{BESIDE, DNS_PORTS, NEXT};

const TCP: u8 = 6;
const UDP: u8 = 17;
const FIN_OR_RST: u8 = 0x05;

/// Goes on in the program that wants the packet; comes back if none does. `WAY` is [`beside::EGRESS`] or
/// [`beside::INGRESS`].
#[inline(always)]
pub(crate) fn hand_on<const WAY: u32>(ctx: &SkBuffContext) {
    let wanted = BESIDE.get(0).map_or(0, |wanted| *wanted);
    if wanted == 0 {
        return;
    }
    let Some(packet) = look(ctx) else { return };
    if wanted & beside::DNS != 0 && (is_of_dns(packet.source) || is_of_dns(packet.destination)) {
        // SAFETY: nothing is to be dropped here. An empty slot comes back.
        unsafe { NEXT.tail_call(ctx, beside::DNS_SLOT + WAY) };
    }
    if wanted & beside::HTTP != 0 && packet.tells {
        // SAFETY: as above.
        unsafe { NEXT.tail_call(ctx, beside::HTTP_SLOT + WAY) };
    }
}

struct Packet {
    source: u16,
    destination: u16,
    /// A segment of TCP with bytes, or with the end of its stream.
    tells: bool,
}

#[inline(always)]
fn is_of_dns(port: u16) -> bool {
    DNS_PORTS
        .get((port >> 6) as u32)
        .is_some_and(|word| word >> (port & 63) & 1 != 0)
}

/// Ports, and whether there is something to tell. `None` for everything but TCP and UDP, and for less than an empty segment or
/// the header of a message of DNS.
#[inline(always)]
fn look(ctx: &SkBuffContext) -> Option<Packet> {
    // SAFETY: plain context reads; the verifier turns them into packet pointers.
    let (data, end, len) = unsafe {
        (
            (*ctx.skb.skb).data as usize,
            (*ctx.skb.skb).data_end as usize,
            (*ctx.skb.skb).len,
        )
    };
    if data + 40 > end {
        return None;
    }
    // SAFETY: bounds checked against data_end just above, as the verifier demands.
    let head = unsafe { *(data as *const u8) };
    let (protocol, at, header): (u8, u32, [u8; 14]);
    if head == 0x45 {
        at = 20;
        // SAFETY: within the 40 bytes checked; byte arrays have no alignment.
        (protocol, header) = unsafe { (*((data + 9) as *const u8), *((data + 20) as *const [u8; 14])) };
    } else if head >> 4 == 4 {
        at = (head & 0x0f) as u32 * 4;
        // SAFETY: within the 40 bytes checked.
        protocol = unsafe { *((data + 9) as *const u8) };
        header = ctx.load(at as usize).ok()?;
    } else {
        // SAFETY: within the 40 bytes checked.
        let next = unsafe { *((data + 6) as *const u8) };
        (protocol, at) = behind_extensions(ctx, next)?;
        header = ctx.load(at as usize).ok()?;
    }
    if protocol != TCP && protocol != UDP {
        return None;
    }
    Some(Packet {
        source: u16::from_be_bytes([header[0], header[1]]),
        destination: u16::from_be_bytes([header[2], header[3]]),
        tells: protocol == TCP && (len > at + (header[12] >> 4) as u32 * 4 || header[13] & FIN_OR_RST != 0),
    })
}

/// Protocol and offset of the header behind at most three IPv6 extension headers.
#[inline(always)]
fn behind_extensions(ctx: &SkBuffContext, mut next: u8) -> Option<(u8, u32)> {
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
    Some((next, at))
}
