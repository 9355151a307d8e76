//! Connections by their plain text. Libraries of any kind come through here: [`plaintext`], [`begins`], [`ended`].

use core::mem::MaybeUninit;

use ebpf_common::{
    http::{HttpConfig, HttpSock, OpenEvent, event, flag, role, state, way},
    net::policy,
    tls::{ConnKey, TlsConn, stat},
};
use ebpf_programs::{
    http::{LOOK, classify, verdict},
    net::{is_loopback, is_v4},
};

use crate::{
    capture::{self, hand_on},
    kernel::{Probed, current_process_by_task, read_netns, read_tuple},
    maps::{CONNS, EVENTS, config, count},
    policy::bits,
    segment::{Segment, Source},
    sockets::{head, now},
    speaks::find_out,
};

/// User space may forget a connection that says nothing for longer.
const PAUSE_NS: i64 = 60 * 1_000_000_000;

/// Plain text passed: `len` bytes at `buffer` of the current process (0: they are nowhere), at `time`.
///
/// `sk` is the address of the connection's `struct sock` if the caller knows it, else 0: then it is found by the packets
/// that leave.
#[inline(always)]
pub(crate) fn plaintext(key: &ConnKey, sk: u64, way: u8, buffer: u64, len: u32, time: u64) {
    if len == 0 {
        return;
    }
    count(stat::CALLS, 1);
    let Some(config) = config() else { return };
    let Some(mut conn) = connection(key, false) else {
        return;
    };
    if sk != 0 {
        if conn.sk != sk {
            count(stat::BY_DESCRIPTOR, 1);
        }
        match is_at(conn, key, sk) {
            Some(same) => conn = same,
            None => return,
        }
    }
    if conn.sock.state == state::OTHER {
        return;
    }
    if conn.sock.generation != config.generation && !is_reported(conn, config) {
        return;
    }
    if conn.sock.state == state::OFF {
        return;
    }
    let source = Source(buffer);
    let begins = &raw mut conn.sock.begins[(way & 1) as usize];
    // SAFETY: a field of a live map value. Written and read again, it is one unknown number for the verifier.
    let verdict = unsafe {
        begins.write_volatile(what_begins(&source, len));
        begins.read_volatile()
    };
    if conn.sock.state == state::UNKNOWN {
        if !find_out(&mut conn.sock, way, verdict) {
            return;
        }
        // What is handed on begins here.
        conn.sock.next = [0; 2];
    }
    if conn.sock.opened == 0 || time.wrapping_sub(conn.sock.last_ns) as i64 > PAUSE_NS {
        open(conn, config, time);
        if conn.sock.state == state::OTHER {
            return;
        }
    }
    conn.sock.last_ns = time;
    let index = (way & 1) as usize;
    let seq = conn.sock.next[index];
    conn.sock.next[index] = seq.wrapping_add(len);
    let segment = Segment {
        way,
        reset: false,
        seq,
        len,
        at: 0,
    };
    let passing = capture::Passing {
        segment: &segment,
        now: time,
    };
    capture::bytes(&source, &mut conn.sock, &passing, verdict, config);
}

/// A handshake begins or goes on: nothing of a connection that is new here has passed before.
#[inline(always)]
pub(crate) fn begins(key: &ConnKey) {
    let _ = connection(key, true);
}

/// The library's object goes, or is used for another connection.
#[inline(always)]
pub(crate) fn ended(key: &ConnKey) {
    if let Some(conn) = CONNS.get_ptr_mut(key) {
        // SAFETY: a live map value.
        tell_end(unsafe { &(*conn).sock });
        let _ = CONNS.remove(key);
    }
}

/// A packet of the connection leaves the socket at `sk`, or a descriptor leads there. `by` is the counter of how it was
/// found.
#[inline(always)]
pub(crate) fn found(key: &ConnKey, sk: u64, fresh: bool, by: u32) {
    let Some(conn) = connection(key, fresh) else { return };
    if conn.sk == sk {
        return;
    }
    let Some(conn) = is_at(conn, key, sk) else { return };
    count(by, 1);
    let Some(config) = config() else { return };
    // What came before waits in user space for the socket.
    let speaks = conn.sock.state == state::HTTP1 || conn.sock.state == state::HTTP2;
    if speaks && conn.sock.opened == 0 {
        open(conn, config, now());
    }
}

/// What is known of a connection; made if nothing is.
#[inline(always)]
fn connection(key: &ConnKey, fresh: bool) -> Option<&'static mut TlsConn> {
    if let Some(conn) = CONNS.get_ptr_mut(key) {
        // SAFETY: a live map value; a library's object is used by one thread at a time.
        return Some(unsafe { &mut *conn });
    }
    let mut first = MaybeUninit::<TlsConn>::uninit();
    // SAFETY: integers and byte arrays only, of which zero is a valid value; all are cleared.
    let first = unsafe {
        capture::clear::<{ size_of::<TlsConn>() / 8 }>(first.as_mut_ptr().cast());
        first.assume_init_mut()
    };
    // Unique: two connections of one object are not made at the same time.
    first.sock.cookie = now() ^ (key.object >> 4) << 40;
    first.sock.fresh = fresh as u8;
    if CONNS.insert(key, &*first, 0).is_err() {
        count(stat::CONNECTIONS_FULL, 1);
        return None;
    }
    // SAFETY: as above.
    CONNS.get_ptr_mut(key).map(|conn| unsafe { &mut *conn })
}

/// Notes the connection's socket. If it was another one before, so was the connection.
#[inline(always)]
fn is_at(conn: &'static mut TlsConn, key: &ConnKey, sk: u64) -> Option<&'static mut TlsConn> {
    if conn.sk == sk {
        return Some(conn);
    }
    let conn = if conn.sk == 0 {
        conn
    } else {
        ended(key);
        connection(key, true)?
    };
    if !read_tuple(Probed(sk), &mut conn.tuple) {
        return None;
    }
    conn.sk = sk;
    Some(conn)
}

/// Asks whether the process's connections are reported; what was off may be on now.
#[inline(always)]
fn is_reported(conn: &mut TlsConn, config: &HttpConfig) -> bool {
    let process = current_process_by_task(&config.net);
    let sk = conn.sk;
    let netns = || if sk == 0 { 0 } else { read_netns(Probed(sk)) };
    let bits = bits(process.pid, process.cgroup, netns, &config.net);
    let sock = &mut conn.sock;
    sock.generation = config.generation;
    if bits & policy::HTTPFLOW_TLS == 0 {
        count(
            if bits & policy::OTHER_NODE != 0 {
                ebpf_common::http::stat::SKIP_OTHER_NODE
            } else {
                ebpf_common::http::stat::SKIP_POLICY
            },
            1,
        );
        if sock.state == state::HTTP1 || sock.state == state::HTTP2 {
            capture::mark(sock, way::EGRESS, 0, flag::DROPPED);
        }
        sock.state = state::OFF;
        return false;
    }
    if sock.state == state::OFF {
        // As if older than the agent.
        sock.fresh = 0;
        sock.opened = 0;
        sock.looks = 0;
        sock.state = state::UNKNOWN;
    }
    true
}

/// Tells user space of a connection whose socket is known, and what it speaks.
#[inline(always)]
fn open(conn: &mut TlsConn, config: &HttpConfig, time: u64) {
    if conn.sk == 0 {
        return;
    }
    let sock = &mut conn.sock;
    if config.net.loopback == 0 && (is_loopback(&conn.tuple.remote) || is_loopback(&conn.tuple.local)) {
        count(ebpf_common::http::stat::SKIP_LOOPBACK, 1);
        return leave(sock);
    }
    if config.net.ipv6_disabled != 0 && !is_v4(&conn.tuple.remote) {
        count(ebpf_common::http::stat::SKIP_IPV6, 1);
        return leave(sock);
    }
    let process = current_process_by_task(&config.net);
    let Some(mut entry) = EVENTS.reserve::<OpenEvent>(0) else {
        // Tried again with the next bytes.
        return count(ebpf_common::http::stat::RING_FULL, 1);
    };
    let event = entry.as_mut_ptr();
    // SAFETY: reserved memory of exactly this type, written whole, member by member to spare the stack.
    unsafe {
        (*event).head = head(event::OPEN, sock.cookie, time);
        (*event).tuple = conn.tuple;
        (*event).next = if sock.opened == 0 { [0; 2] } else { sock.next };
        (*event).pid = process.pid;
        (*event).role = sock.role;
        (*event).fresh = sock.fresh;
        (*event)._pad = [0; 2];
        (*event).comm = process.comm;
        (*event).cgroup = process.cgroup;
    }
    hand_on(entry);
    sock.opened = 1;
    sock.last_ns = time;
}

/// Nothing of the connection is reported.
#[inline(always)]
fn leave(sock: &mut HttpSock) {
    // Some of it may wait in user space.
    capture::mark(sock, way::EGRESS, 0, flag::DROPPED);
    sock.state = state::OTHER;
}

#[inline(always)]
fn tell_end(sock: &HttpSock) {
    if sock.state == state::HTTP1 || sock.state == state::HTTP2 {
        capture::mark(sock, way::EGRESS, sock.next[0], flag::RESET);
    }
}

/// What begins with these bytes.
#[inline(always)]
fn what_begins(source: &Source, len: u32) -> u8 {
    let len = if len >= LOOK as u32 { LOOK as u32 } else { len };
    let mut first = MaybeUninit::<[u64; LOOK / 8]>::uninit();
    // SAFETY: the buffer has LOOK bytes; cleared, it may be read, and bytes may have any value.
    unsafe {
        let bytes: *mut [u8; LOOK] = first.as_mut_ptr().cast();
        capture::clear::<{ LOOK / 8 }>(bytes.cast());
        if capture::load::<LOOK>(source, 0, len, bytes.cast()) == 0 {
            if source.0 != 0 {
                count(stat::UNREADABLE, 1);
            }
            return verdict::OTHER;
        }
        classify(&*bytes, len)
    }
}

const _: () = assert!(
    role::UNKNOWN == 0 && state::UNKNOWN == 0,
    "what new connections begin with"
);
