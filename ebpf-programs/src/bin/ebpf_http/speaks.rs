//! What a connection speaks, by the bytes that pass.

use ebpf_common::http::{HttpSock, role, stat, state, way};
use ebpf_programs::http::verdict;

use crate::{capture, maps::count};

/// Segments of a connection older than the agent that may not tell what is spoken: parts of long bodies.
const LOOKS: u16 = 256;

/// Decides what the socket speaks, if this segment says; false if it is not followed, or not yet.
#[inline(always)]
pub(crate) fn find_out(sock: &mut HttpSock, way: u8, verdict: u8) -> bool {
    let sends = if way == way::EGRESS { role::CLIENT } else { role::SERVER };
    let answers = if way == way::EGRESS { role::SERVER } else { role::CLIENT };
    let fresh = sock.fresh != 0;
    let (state, role) = match verdict {
        verdict::REQUEST => (state::HTTP1, sends),
        verdict::RESPONSE => (state::HTTP1, answers),
        verdict::PREFACE => (state::HTTP2, sends),
        // A server that is faster than its client.
        verdict::SETTINGS if fresh => (state::HTTP2, answers),
        verdict::SETTINGS | verdict::FRAMES if !fresh => (state::HTTP2, role::UNKNOWN),
        // User space decides, when it has seen more. It is the client that begins.
        verdict::NEED_MORE if fresh => (state::HTTP1, sends),
        verdict::OTHER | verdict::NEED_MORE if !fresh && sock.looks < LOOKS => {
            sock.looks += 1;
            return false;
        }
        _ => {
            sock.state = state::OTHER;
            return false;
        }
    };
    count(stat::ENDS, 1);
    sock.role = role;
    sock.state = state;
    if verdict == verdict::NEED_MORE {
        sock.head = [capture::HEAD_MAX; 2];
    }
    true
}
