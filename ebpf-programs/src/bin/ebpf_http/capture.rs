//! How much of a segment is captured.
//!
//! HTTP/1: the head of each message, however many segments it takes, and of the rest its length, with a few bytes of the
//! beginning and the end of each segment, by which chunked bodies are followed. Where requests are sent ahead of answers,
//! messages may begin anywhere: everything. So with HTTP/2, whose frames may.
//!
//! What a segment is, and where its bytes are, is the object's: a packet, or what a process gave to a library.

use aya_ebpf::{bindings::BPF_RB_NO_WAKEUP, maps::ring_buf::RingBufEntry};
use ebpf_common::http::{DataHead, HttpConfig, HttpSock, PART, PARTS, TAIL, event, flag, role, stat, state, way};
use ebpf_programs::{
    http::{empty_lines, first_mark, line_feeds, verdict},
    ring::submit_flag,
};

use crate::{
    maps::{EVENTS, QUIT, config, count},
    segment::{Segment, Source, load_bytes},
    sockets::{head, now},
};

/// Bytes that are captured in search of a head's end.
pub(crate) const HEAD_MAX: u32 = 16 * 1024;
/// Bytes of a short request.
const TINY: usize = 80;
/// Bytes of a head that most events have room for.
const SMALL: usize = 240;
/// And larger ones.
const LARGE: usize = 768;
/// And a whole segment as it is on most links.
const SEGMENT: usize = 1536;
/// Bytes captured of a segment that begins nothing.
const GLIMPSE: usize = 16;
/// Bytes behind a head that are captured with it: the size of the first chunk, and the next message's first word.
const BEHIND: u32 = 24;
const BPF_RB_AVAIL_DATA: u64 = 0;
const NO_WAKEUP: u64 = BPF_RB_NO_WAKEUP as u64;

/// An event with room for `N` captured bytes.
#[repr(C)]
struct Data<const N: usize> {
    head: DataHead,
    bytes: [u8; N],
}

/// A segment at its time: the same for all of its events.
#[derive(Clone, Copy)]
pub(crate) struct Passing<'a> {
    pub(crate) segment: &'a Segment,
    pub(crate) now: u64,
}

/// Hands on what is to be known of a segment's bytes.
#[inline(always)]
pub(crate) fn bytes(ctx: &Source, sock: &mut HttpSock, passing: &Passing<'_>, verdict: u8, config: &HttpConfig) {
    let segment = passing.segment;
    // Also what is too short to tell: a server of Go may read the first byte of a request by itself.
    let begins = verdict == verdict::REQUEST || verdict == verdict::RESPONSE || verdict == verdict::NEED_MORE;
    let everything = sock.state == state::HTTP2 || sock.eager != 0;
    if (everything || !begins) && is_given_up(sock) {
        return;
    }
    if !everything {
        let egress = segment.way == way::EGRESS;
        if begins {
            set_open(sock, egress, HEAD_MAX);
        }
        let open = if egress { sock.head[0] } else { sock.head[1] };
        if open == 0 {
            return part::<GLIMPSE>(ctx, sock, passing, 0, segment.len, true);
        }
        let large = if egress { sock.large[0] } else { sock.large[1] };
        let mut found = Found::Further;
        if segment.len <= TINY as u32 {
            found = head_part::<TINY>(ctx, sock, passing, verdict);
        } else if large == 0 {
            found = head_part::<SMALL>(ctx, sock, passing, verdict);
            if let Found::Further = found {
                if egress {
                    sock.large[0] = 1;
                } else {
                    sock.large[1] = 1;
                }
            }
        }
        if let Found::Further = found {
            found = head_part::<LARGE>(ctx, sock, passing, verdict);
        }
        match found {
            Found::End => return set_open(sock, egress, 0),
            // It goes on in the next segment.
            Found::Goes => return set_open(sock, egress, open.saturating_sub(segment.len)),
            Found::Further => set_open(sock, egress, open.saturating_sub(segment.len)),
            Found::Several => sock.eager = 1,
        }
    }
    all(ctx, sock, passing, config);
}

/// The stream has ended with this segment.
#[inline(always)]
pub(crate) fn ended(sock: &HttpSock, segment: &Segment) {
    let flags = if segment.reset { flag::RESET } else { flag::FIN };
    mark(sock, segment.way, segment.seq.wrapping_add(segment.len), flags);
}

/// An event without bytes.
#[inline(always)]
pub(crate) fn mark(sock: &HttpSock, way: u8, seq: u32, flags: u8) {
    let Some(mut entry) = EVENTS.reserve::<DataHead>(0) else {
        return count(stat::RING_FULL, 1);
    };
    // SAFETY: reserved memory of that size.
    unsafe { write_head(entry.as_mut_ptr(), sock, now(), seq, way, flags, 0, 0) };
    hand_on(entry);
}

/// True if user space has said that it follows the socket no longer.
#[inline(always)]
fn is_given_up(sock: &mut HttpSock) -> bool {
    if QUIT.get_ptr(sock.cookie).is_none() {
        return false;
    }
    sock.state = state::OTHER;
    let _ = QUIT.remove(sock.cookie);
    true
}

#[inline(always)]
fn set_open(sock: &mut HttpSock, egress: bool, bytes: u32) {
    if egress {
        sock.head[0] = bytes;
    } else {
        sock.head[1] = bytes;
    }
}

/// Where a head ends.
#[derive(Clone, Copy)]
enum Found {
    /// In this event.
    End,
    /// Not in this segment.
    Goes,
    /// Not within this event's room.
    Further,
    /// It does, and after it comes what may be another one.
    Several,
}

/// Captures a head, if its end is within the first `N` bytes of the segment or beyond the segment.
#[inline(always)]
fn head_part<const N: usize>(ctx: &Source, sock: &HttpSock, passing: &Passing<'_>, verdict: u8) -> Found {
    let segment = passing.segment;
    let Some(mut entry) = EVENTS.reserve::<Data<N>>(0) else {
        count(stat::RING_FULL, 1);
        return Found::Goes;
    };
    let event = entry.as_mut_ptr();
    let mut captured = 0;
    // SAFETY: reserved memory of that size.
    unsafe {
        let room = &raw mut (*event).bytes;
        // Written and read again: for the verifier these are two unknown numbers, wherever the search ended.
        let (size, place) = (&raw mut (*event).head.len, &raw mut (*event).head.captured);
        size.write_volatile(load::<N>(ctx, segment.at, segment.len, room.cast()));
        place.write_volatile(head_end::<N>(room, size.read_volatile()));
        let (taken, end) = (size.read_volatile(), place.read_volatile());
        let found = if end != 0 && end <= taken {
            let rest = segment.len - end;
            if is_request(sock, segment) && rest != 0 && !has_body(room.cast(), verdict) {
                Found::Several
            } else {
                captured = if rest > BEHIND { end + BEHIND } else { segment.len };
                if captured > taken {
                    captured = taken;
                }
                Found::End
            }
        } else if taken < segment.len {
            Found::Further
        } else {
            captured = taken;
            Found::Goes
        };
        if let Found::Several | Found::Further = found {
            entry.discard(NO_WAKEUP);
            return found;
        }
        let head = &raw mut (*event).head;
        write_head(
            head,
            sock,
            passing.now,
            segment.seq,
            segment.way,
            0,
            segment.len,
            captured,
        );
        if segment.len - captured >= TAIL as u32 {
            load_tail(ctx, segment.at + segment.len - TAIL as u32, &raw mut (*event).head);
        }
        hand_on(entry);
        found
    }
}

/// Everything, in as many events as it takes; while the reader is behind, of long segments the beginning only.
#[inline(always)]
fn all(ctx: &Source, sock: &HttpSock, passing: &Passing<'_>, config: &HttpConfig) {
    let segment = passing.segment;
    if segment.len <= SMALL as u32 {
        return part::<SMALL>(ctx, sock, passing, 0, segment.len, false);
    }
    if segment.len <= LARGE as u32 {
        return part::<LARGE>(ctx, sock, passing, 0, segment.len, false);
    }
    if segment.len <= SEGMENT as u32 {
        return part::<SEGMENT>(ctx, sock, passing, 0, segment.len, false);
    }
    let busy = config.busy_bytes as u64;
    // Frames are bodies mostly. What is sent ahead in HTTP/1 is heads: it is cut only when little room is left.
    let bound = if sock.state == state::HTTP2 {
        busy
    } else {
        busy + busy / 4
    };
    let parts = if EVENTS.query(BPF_RB_AVAIL_DATA) > bound {
        1
    } else {
        PARTS
    };
    let mut offset = 0;
    for number in 0..PARTS {
        if number >= parts || offset >= segment.len {
            break;
        }
        let left = segment.len - offset;
        let take = if left > PART as u32 { PART as u32 } else { left };
        part::<PART>(ctx, sock, passing, offset, take, false);
        offset += PART as u32;
    }
    if offset < segment.len {
        part::<GLIMPSE>(ctx, sock, passing, offset, segment.len - offset, true);
    }
}

/// An event of `len` bytes from `offset` on, of which up to `N` are captured and, with `tail`, the last ones.
#[inline(always)]
fn part<const N: usize>(ctx: &Source, sock: &HttpSock, passing: &Passing<'_>, offset: u32, len: u32, tail: bool) {
    let segment = passing.segment;
    let Some(mut entry) = EVENTS.reserve::<Data<N>>(0) else {
        return count(stat::RING_FULL, 1);
    };
    let event = entry.as_mut_ptr();
    // SAFETY: reserved memory of that size.
    unsafe {
        let taken = load::<N>(ctx, segment.at + offset, len, (&raw mut (*event).bytes).cast());
        let (head, seq) = (&raw mut (*event).head, segment.seq.wrapping_add(offset));
        write_head(head, sock, passing.now, seq, segment.way, 0, len, taken);
        if tail && len - taken >= TAIL as u32 {
            load_tail(ctx, segment.at + offset + len - TAIL as u32, &raw mut (*event).head);
        }
    }
    hand_on(entry);
}

/// Writes the head of an event, member by member to spare the stack.
///
/// # Safety
/// `event` is writable.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the members of what it writes")]
unsafe fn write_head(
    event: *mut DataHead,
    sock: &HttpSock,
    now: u64,
    seq: u32,
    way: u8,
    flags: u8,
    len: u32,
    captured: u32,
) {
    // SAFETY: as demanded of the caller.
    unsafe {
        (*event).head = head(event::DATA, sock.cookie, now);
        (*event).seq = seq;
        // One by one: two that are zero would be cleared by a call.
        (&raw mut (*event).len).write_volatile(len);
        (&raw mut (*event).captured).write_volatile(captured);
        (*event).way = way;
        (*event).flags = flags;
        (*event).tail = 0;
        (*event)._pad = 0;
        clear::<{ TAIL / 8 }>((&raw mut (*event).end).cast());
    }
}

/// Clears `N` words. Plain code for that becomes a call, which takes a part of the stack.
///
/// # Safety
/// `words` is writable for as many.
#[inline(always)]
pub(crate) unsafe fn clear<const N: usize>(words: *mut u64) {
    for number in 0..N {
        // SAFETY: as demanded of the caller.
        unsafe { words.add(number).write_volatile(0) };
    }
}

/// Copies up to `N` of `len` bytes of the packet; gives how many.
///
/// # Safety
/// `to` is writable for `N` bytes.
#[inline(always)]
pub(crate) unsafe fn load<const N: usize>(ctx: &Source, at: u32, len: u32, to: *mut u8) -> u32 {
    // In a form that the verifiers of all kernels can follow.
    let but_one = core::hint::black_box(if len > N as u32 { N as u32 } else { len }.wrapping_sub(1));
    if but_one >= N as u32 {
        return 0;
    }
    let size = but_one + 1;
    // SAFETY: as demanded of the caller; size is no more than N.
    let failed = unsafe { load_bytes(ctx, at, to, size) };
    if failed < 0 { 0 } else { size }
}

/// Copies the last bytes.
///
/// # Safety
/// `event` is writable.
#[inline(always)]
unsafe fn load_tail(ctx: &Source, at: u32, event: *mut DataHead) {
    // SAFETY: as demanded of the caller; the member has that size.
    unsafe {
        let to = &raw mut (*event).end;
        if load_bytes(ctx, at, to.cast(), TAIL as u32) == 0 {
            (*event).tail = TAIL as u8;
        }
    }
}

/// Offset behind the empty line that ends a head; 0 if there is none in the first `taken` bytes. What the event's memory
/// held before may look like one beyond them.
///
/// # Safety
/// `bytes` is readable.
#[inline(always)]
unsafe fn head_end<const N: usize>(bytes: *const [u8; N], taken: u32) -> u32 {
    let mut before = 0;
    for number in 0..(N as u32 / 8) {
        let at = number * 8;
        if at >= taken {
            break;
        }
        // SAFETY: as demanded of the caller; within N bytes, which are aligned like the event.
        let eight = unsafe { bytes.cast::<u64>().add(number as usize).read() };
        let now = line_feeds(u64::from_le(eight));
        let ends = empty_lines(now, before);
        if ends != 0 {
            return at + first_mark(ends) + 1;
        }
        before = now;
    }
    0
}

/// True if the bytes go from the client to the server.
#[inline(always)]
fn is_request(sock: &HttpSock, segment: &Segment) -> bool {
    (segment.way == way::EGRESS) == (sock.role == role::CLIENT)
}

/// True if a request's method is one with a body: POST, PUT, PATCH and the like.
///
/// # Safety
/// `bytes` is readable for one byte.
#[inline(always)]
unsafe fn has_body(bytes: *const u8, verdict: u8) -> bool {
    // SAFETY: as demanded of the caller.
    verdict != verdict::REQUEST || unsafe { *bytes } == b'P'
}

/// Submits an event; the reader is woken when it gets behind.
#[inline(always)]
pub(crate) fn hand_on<T>(entry: RingBufEntry<T>) {
    count(stat::EVENTS, 1);
    count(stat::BYTES, size_of::<T>() as u64);
    let wake = match config() {
        Some(config) => config.net.wake_bytes,
        None => 0,
    };
    entry.submit(submit_flag(EVENTS.query(BPF_RB_AVAIL_DATA), wake));
}
