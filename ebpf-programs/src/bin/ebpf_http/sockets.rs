//! What each socket speaks, who uses it, and whether that is reported.

use core::mem::MaybeUninit;

use aya_ebpf::{
    EbpfContext as _,
    bindings::bpf_sock,
    helpers::{bpf_ktime_get_ns, generated},
    programs::SkBuffContext,
};
use ebpf_common::{
    http::{EVENT_VERSION, EventHead, HttpConfig, HttpSock, OpenEvent, OwnerEvent, event, flag, stat, state, way},
    net::policy,
};
use ebpf_programs::{
    http::{LOOK, classify, verdict},
    memory::cleared,
    net::{is_loopback, is_v4},
};

use crate::{
    capture::{self, hand_on},
    kernel::{Probed, Process, current_process_by_task, current_task, owned_by_current, read, read_netns},
    maps::{EVENTS, MARKED, config, count, known, offsets, remember},
    policy::bits,
    segment::{Segment, cookie, ends, is_listening},
    speaks::find_out,
};

/// User space may forget a socket that says nothing for longer.
const PAUSE_NS: u64 = 60 * 1_000_000_000;
/// Sequence numbers further apart than this are of no use.
const FAR: i32 = 1 << 30;
/// Of a connection with more segments it is worth remembering that it does not speak HTTP.
const LONG: u32 = 32;

/// A segment passed a socket.
#[inline(always)]
pub(crate) fn passed(ctx: &SkBuffContext, sk: *mut bpf_sock, segment: &mut Segment) {
    let mut sock = known(sk);
    // SAFETY: a live map value.
    if !sock.is_null() && unsafe { (*sock).state } == state::OTHER {
        return;
    }
    if sock.is_null() && (segment.len == 0 || is_listening(sk)) {
        return;
    }
    let Some(config) = config() else { return };
    segment.forget();
    let mut start = Start::NOT;
    let mut judged = false;
    if sock.is_null() {
        let Some(seen) = Start::of(sk, segment) else { return };
        start = seen;
        judged = config.marked != 0 && start.begins == NEITHER && is_marked(ctx);
        if judged && start.segments < LONG {
            return;
        }
    // SAFETY: a live map value; two CPUs write to different fields of it, or the same to one.
    } else if !goes_on(ctx, sk, unsafe { &mut *sock }, segment, config) {
        return;
    }
    segment.begins = what_begins(ctx, segment);
    segment.forget();
    if sock.is_null() {
        if config.marked != 0 && start.begins != NEITHER && !may_be_http(start.begins, segment.begins) {
            return;
        }
        sock = first_seen(ctx, sk, &start);
        if sock.is_null() {
            return;
        }
        // SAFETY: checked for null; a live map value.
        let sock = unsafe { &mut *sock };
        if judged {
            sock.state = state::OTHER;
            return;
        }
        if !is_new(sk, sock, segment) {
            return;
        }
    }
    // SAFETY: as above.
    let sock = unsafe { &mut *sock };
    let verdict = segment.begins;
    if sock.state == state::UNKNOWN && !find_out(sock, segment.way, verdict) {
        return;
    }
    let now = now();
    if !announce(ctx, sock, segment, verdict, now, config) {
        return;
    }
    segment.forget();
    capture::bytes(ctx, sock, &capture::Passing { segment, now }, verdict, config);
    if segment.fin || segment.reset {
        capture::ended(sock, segment);
    }
}

/// Something has passed before.
const NEITHER: u8 = 0;
/// The first bytes of their way.
const WAY: u8 = 1;
/// The first bytes of the connection.
const CONNECTION: u8 = 2;

/// Where a socket was when it was first seen.
#[derive(Clone, Copy)]
struct Start {
    snd_nxt: u32,
    rcv_nxt: u32,
    /// Segments with bytes, both ways.
    segments: u32,
    /// [`NEITHER`], [`WAY`] or [`CONNECTION`].
    begins: u8,
}

impl Start {
    const NOT: Self = Self {
        snd_nxt: 0,
        rcv_nxt: 0,
        segments: 0,
        begins: NEITHER,
    };

    #[inline(always)]
    fn of(sk: *mut bpf_sock, segment: &Segment) -> Option<Self> {
        // SAFETY: a full socket, as the helper demands.
        let tcp = unsafe { generated::bpf_tcp_sock(sk) };
        if tcp.is_null() {
            return None;
        }
        // SAFETY: checked for null; fields that the verifier allows.
        let (segments, rcv_nxt, snd_nxt, snd_una, received, acked) = unsafe {
            (
                (*tcp).data_segs_in.wrapping_add((*tcp).data_segs_out),
                (*tcp).rcv_nxt,
                (*tcp).snd_nxt,
                (*tcp).snd_una,
                (*tcp).bytes_received,
                (*tcp).bytes_acked,
            )
        };
        // The SYN of the connecting side counts as an acknowledged byte.
        let nothing_sent = acked <= 1 && snd_una == snd_nxt;
        let egress = segment.way == way::EGRESS;
        let next = if egress { snd_nxt } else { rcv_nxt };
        let begins = if nothing_sent && received == 0 && segment.seq == next {
            CONNECTION
        } else if (egress && nothing_sent) || (!egress && received == 0) {
            WAY
        } else {
            NEITHER
        };
        Some(Self {
            snd_nxt,
            rcv_nxt,
            segments,
            begins,
        })
    }
}

/// True if connections of the packet's network namespace that are older than the programs have their marks.
#[inline(always)]
fn is_marked(ctx: &SkBuffContext) -> bool {
    MARKED.get_ptr(read_netns(Probed(sock_address(ctx)))).is_some()
}

/// Where sockets older than the programs are marked, all others are judged by the first bytes of the connection, or of a way
/// if those passed before the connection was one: true if they may be of HTTP. Nothing is remembered of the rest.
#[inline(always)]
fn may_be_http(begins: u8, verdict: u8) -> bool {
    match verdict {
        verdict::REQUEST | verdict::RESPONSE | verdict::PREFACE | verdict::SETTINGS => true,
        verdict::NEED_MORE => begins == CONNECTION,
        _ => false,
    }
}

/// True if a known socket's segment is to be looked at.
#[inline(always)]
fn goes_on(
    ctx: &SkBuffContext,
    sk: *mut bpf_sock,
    sock: &mut HttpSock,
    segment: &Segment,
    config: &HttpConfig,
) -> bool {
    if sock.state == state::OFF {
        if sock.generation == config.generation {
            return false;
        }
        // Switched on since, perhaps: as if older than the agent.
        sock.fresh = 0;
        sock.opened = 0;
        sock.looks = 0;
        sock.state = state::UNKNOWN;
    }
    if segment.len == 0 {
        if sock.opened != 0 {
            capture::ended(sock, segment);
        }
        return false;
    }
    if sock.state == state::OLDER {
        let Some(start) = Start::of(sk, segment) else {
            return false;
        };
        sock.cookie = cookie(ctx);
        sock.next = [start.snd_nxt, start.rcv_nxt];
        sock.state = state::UNKNOWN;
    }
    is_new(sk, sock, segment)
}

/// Notes a socket that was not seen before.
#[inline(always)]
fn first_seen(ctx: &SkBuffContext, sk: *mut bpf_sock, start: &Start) -> *mut HttpSock {
    let mut first = MaybeUninit::<HttpSock>::uninit();
    // SAFETY: integers only, without padding.
    let first = unsafe { cleared(&mut first) };
    first.cookie = cookie(ctx);
    first.next = [start.snd_nxt, start.rcv_nxt];
    first.fresh = (start.begins == CONNECTION) as u8;
    let sock = remember(sk, first);
    if sock.is_null() {
        count(stat::NO_STORAGE, 1);
    }
    sock
}

/// False for a segment of which all was seen before.
#[inline(always)]
fn is_new(sk: *mut bpf_sock, sock: &mut HttpSock, segment: &Segment) -> bool {
    let next = if segment.way == way::EGRESS {
        sock.next[0]
    } else {
        sock.next[1]
    };
    let end = segment.seq.wrapping_add(segment.len);
    let ahead = segment.seq.wrapping_sub(next) as i32;
    if ahead > FAR || ahead < -FAR {
        return false;
    }
    if end.wrapping_sub(next) as i32 > 0 {
        if segment.way == way::EGRESS {
            sock.next[0] = end;
        } else {
            sock.next[1] = end;
        }
        return true;
    }
    if segment.way == way::EGRESS {
        return false;
    }
    // Sent again, or overtaken by others on its way.
    // SAFETY: a full socket, as the helper demands.
    let tcp = unsafe { generated::bpf_tcp_sock(sk) };
    // SAFETY: checked for null; a field that the verifier allows.
    !tcp.is_null() && end.wrapping_sub(unsafe { (*tcp).rcv_nxt }) as i32 > 0
}

/// What begins with this segment.
#[inline(always)]
fn what_begins(ctx: &SkBuffContext, segment: &Segment) -> u8 {
    let len = if segment.len >= LOOK as u32 {
        LOOK as u32
    } else {
        segment.len
    };
    let mut first = MaybeUninit::<[u64; LOOK / 8]>::uninit();
    // SAFETY: the buffer has LOOK bytes; cleared, it may be read, and bytes may have any value.
    unsafe {
        let bytes: *mut [u8; LOOK] = first.as_mut_ptr().cast();
        capture::clear::<{ LOOK / 8 }>(bytes.cast());
        if capture::load::<LOOK>(ctx, segment.at, len, bytes.cast()) == 0 {
            return verdict::OTHER;
        }
        classify(&*bytes, len)
    }
}

/// Tells user space of the socket and of who sends on it; false if it is not reported.
#[inline(always)]
fn announce(
    ctx: &SkBuffContext,
    sock: &mut HttpSock,
    segment: &Segment,
    verdict: u8,
    now: u64,
    config: &HttpConfig,
) -> bool {
    let pause = now.wrapping_sub(sock.last_ns) > PAUSE_NS;
    sock.last_ns = now;
    let asks = sock.generation != config.generation;
    if sock.opened != 0 && !pause && !asks {
        // Who sends is looked at where something begins.
        if segment.way == way::EGRESS && (sock.pid == 0 || verdict != verdict::OTHER) {
            return same_owner(ctx, sock, config);
        }
        return true;
    }
    let sk = sock_address(ctx);
    let netns = read_netns(Probed(sk));
    let sends = segment.way == way::EGRESS && owned_by_current(Probed(sk));
    let process = if sends {
        current_process_by_task(&config.net)
    } else {
        Process::NONE
    };
    let bits = bits(process.pid, process.cgroup, || netns, &config.net);
    sock.generation = config.generation;
    if bits & policy::HTTPFLOW == 0 {
        leave(sock, segment.way, bits);
        return false;
    }
    let Some((local, local_port, remote, remote_port)) = ends(ctx, segment) else {
        return false;
    };
    if config.net.loopback == 0 && (is_loopback(&remote) || is_loopback(&local)) {
        count(stat::SKIP_LOOPBACK, 1);
        sock.state = state::OTHER;
        return false;
    }
    if config.net.ipv6_disabled != 0 && !is_v4(&remote) {
        count(stat::SKIP_IPV6, 1);
        sock.state = state::OTHER;
        return false;
    }
    let Some(mut entry) = EVENTS.reserve::<OpenEvent>(0) else {
        count(stat::RING_FULL, 1);
        // Tried again with the next segment, and then this one has passed.
        sock.fresh = 0;
        return false;
    };
    let mut next = sock.next;
    if segment.way == way::EGRESS {
        next[0] = segment.seq;
    } else if sock.opened == 0 && segment.seq.wrapping_sub(next[1]) as i32 <= 0 {
        next[1] = segment.seq;
    }
    let open = entry.as_mut_ptr();
    // SAFETY: reserved memory of exactly this type, written whole, member by member to spare the stack.
    unsafe {
        (*open).head = head(event::OPEN, sock.cookie, now);
        (*open).tuple.local = local;
        (*open).tuple.remote = remote;
        (*open).tuple.local_port = local_port;
        (*open).tuple.remote_port = remote_port;
        (*open).tuple.netns = netns;
        (*open).next = next;
        (*open).pid = process.pid;
        (*open).role = sock.role;
        (*open).fresh = sock.fresh;
        (*open)._pad = [0; 2];
        (*open).comm = process.comm;
        (*open).cgroup = process.cgroup;
    }
    hand_on(entry);
    sock.opened = 1;
    sock.fresh = 0;
    if sends {
        sock.task = current_task();
        sock.pid = process.pid;
    }
    true
}

/// Tells if another process sends now; false if that one's is not reported.
#[inline(always)]
fn same_owner(ctx: &SkBuffContext, sock: &mut HttpSock, config: &HttpConfig) -> bool {
    let sk = sock_address(ctx);
    if !owned_by_current(Probed(sk)) {
        return true;
    }
    let task = current_task();
    if task == sock.task {
        return true;
    }
    let process = current_process_by_task(&config.net);
    sock.task = task;
    if process.pid == sock.pid {
        return true;
    }
    sock.pid = process.pid;
    let netns = read_netns(Probed(sk));
    let bits = bits(process.pid, process.cgroup, || netns, &config.net);
    if bits & policy::HTTPFLOW == 0 {
        leave(sock, way::EGRESS, bits);
        return false;
    }
    let Some(mut entry) = EVENTS.reserve::<OwnerEvent>(0) else {
        count(stat::RING_FULL, 1);
        // To be told with the next one.
        sock.task = 0;
        sock.pid = 0;
        return true;
    };
    let owner = entry.as_mut_ptr();
    // SAFETY: reserved memory of exactly this type, written whole.
    unsafe {
        (*owner).head = head(event::OWNER, sock.cookie, now());
        (*owner).pid = process.pid;
        (*owner)._pad = 0;
        (*owner).comm = process.comm;
        (*owner).cgroup = process.cgroup;
    }
    hand_on(entry);
    true
}

/// The socket is switched off.
#[inline(always)]
fn leave(sock: &mut HttpSock, way: u8, bits: u32) {
    count(
        if bits & policy::OTHER_NODE != 0 {
            stat::SKIP_OTHER_NODE
        } else {
            stat::SKIP_POLICY
        },
        1,
    );
    if sock.opened != 0 {
        capture::mark(sock, way, 0, flag::DROPPED);
    }
    sock.state = state::OFF;
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

/// Address of the packet's `struct sock`, as a number.
///
/// At run time the context is the kernel's `struct sk_buff`, so its `sk` member is read at the offset that BTF gives. The
/// ingress hook sets it for as long as programs run.
#[inline(always)]
fn sock_address(ctx: &SkBuffContext) -> u64 {
    read(ctx.as_ptr() as u64, offsets().skb_sk)
}
