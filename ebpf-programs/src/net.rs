//! Arithmetic and address rules of plugin `ebpf-net`.

use ebpf_common::net::{FlowKey, direction, folded};

/// TCP state numbers, `include/net/tcp_states.h`.
pub mod state {
    /// `TCP_ESTABLISHED`
    pub const ESTABLISHED: u32 = 1;
    /// `TCP_SYN_SENT`
    pub const SYN_SENT: u32 = 2;
    /// `TCP_SYN_RECV`
    pub const SYN_RECV: u32 = 3;
    /// `TCP_FIN_WAIT1`
    pub const FIN_WAIT1: u32 = 4;
    /// `TCP_FIN_WAIT2`
    pub const FIN_WAIT2: u32 = 5;
    /// `TCP_TIME_WAIT`
    pub const TIME_WAIT: u32 = 6;
    /// `TCP_CLOSE`
    pub const CLOSE: u32 = 7;
    /// `TCP_CLOSE_WAIT`
    pub const CLOSE_WAIT: u32 = 8;
    /// `TCP_LAST_ACK`
    pub const LAST_ACK: u32 = 9;
    /// `TCP_LISTEN`
    pub const LISTEN: u32 = 10;
    /// `TCP_CLOSING`
    pub const CLOSING: u32 = 11;
    /// `TCP_NEW_SYN_RECV`
    pub const NEW_SYN_RECV: u32 = 12;
}

/// Payload bytes the application has read.
///
/// `bytes_received` counts in-order payload plus one for the peer's FIN. What the application has not read yet is
/// `rcv_nxt - copied_seq`, which includes an unread FIN; a FIN that was read shows as a difference of 0.
#[inline(always)]
pub fn bytes_read(bytes_received: u64, rcv_nxt: u32, copied_seq: u32, fin_received: bool) -> u64 {
    let unread = rcv_nxt.wrapping_sub(copied_seq);
    // Urgent data lets copied_seq run ahead by one: then nothing is unread.
    let unread = if unread > i32::MAX as u32 { 0 } else { unread as u64 };
    let read = bytes_received.saturating_sub(unread);
    if fin_received && unread == 0 {
        read.saturating_sub(1)
    } else {
        read
    }
}

/// Payload bytes the application has written: acknowledged, plus everything behind `snd_una` in the send queue.
///
/// `bytes_acked` counts the SYN of the connecting side and every FIN; a FIN is queued from FIN_WAIT1 and LAST_ACK on and
/// is either acknowledged or part of `write_seq - snd_una`.
#[inline(always)]
pub fn bytes_written(bytes_acked: u64, snd_una: u32, write_seq: u32, state: u32, connecting_side: bool) -> u64 {
    let queued = write_seq.wrapping_sub(snd_una);
    let queued = if queued > i32::MAX as u32 { 0 } else { queued as u64 };
    let fin = matches!(
        state,
        state::FIN_WAIT1 | state::FIN_WAIT2 | state::CLOSING | state::TIME_WAIT | state::LAST_ACK
    );
    (bytes_acked + queued).saturating_sub(fin as u64 + connecting_side as u64)
}

/// An IPv4 address in v4-mapped form.
#[inline(always)]
pub fn mapped(v4: [u8; 4]) -> [u8; 16] {
    // Of words: ten zero bytes are cleared by a call.
    let words = [0, 0, u32::from_ne_bytes([0, 0, 0xff, 0xff]), u32::from_ne_bytes(v4)];
    // SAFETY: of the same size, and any bytes are bytes.
    unsafe { core::mem::transmute::<[u32; 4], [u8; 16]>(words) }
}

/// True for an IPv4 address in v4-mapped form.
#[inline(always)]
pub fn is_v4(addr: &[u8; 16]) -> bool {
    let (high, low) = halves(addr);
    is_v4_of(high, low)
}

/// The same of its two halves, each loaded as it lies in memory.
#[inline(always)]
pub fn is_v4_of(high: u64, low: u64) -> bool {
    high == 0 && (low & 0x0000_0000_ffff_ffff) == MAPPED
}

/// True for 127.0.0.0/8 (v4-mapped) and ::1.
#[inline(always)]
pub fn is_loopback(addr: &[u8; 16]) -> bool {
    let (high, low) = halves(addr);
    is_loopback_of(high, low)
}

/// The same of its two halves, each loaded as it lies in memory.
#[inline(always)]
pub fn is_loopback_of(high: u64, low: u64) -> bool {
    if high != 0 {
        return false;
    }
    (low & 0x0000_00ff_ffff_ffff) == (MAPPED | (127 << 32)) || low == 1u64.to_be()
}

/// `00 00 ff ff` as the low half of a native-endian load of the second eight bytes (little-endian machines).
const MAPPED: u64 = u64::from_ne_bytes([0, 0, 0xff, 0xff, 0, 0, 0, 0]);

#[inline(always)]
fn halves(addr: &[u8; 16]) -> (u64, u64) {
    let high = u64::from_ne_bytes([addr[0], addr[1], addr[2], addr[3], addr[4], addr[5], addr[6], addr[7]]);
    let low = u64::from_ne_bytes([
        addr[8], addr[9], addr[10], addr[11], addr[12], addr[13], addr[14], addr[15],
    ]);
    (high, low)
}

/// Leaves the client-side port out of the key when it is ephemeral, so that one client's connections share a row.
#[inline(always)]
pub fn fold_ports(key: &mut FlowKey, ephemeral_port: u32) {
    if key.direction == direction::OUTGOING && key.tuple.local_port as u32 >= ephemeral_port {
        key.tuple.local_port = 0;
        key.folded |= folded::LOCAL;
    }
    if key.direction == direction::INCOMING && key.tuple.remote_port as u32 >= ephemeral_port {
        key.tuple.remote_port = 0;
        key.folded |= folded::REMOTE;
    }
}

/// Direction of a connection nobody saw being opened: the end with the lower port is taken for the server.
#[inline(always)]
pub fn guess_direction(local_port: u16, remote_port: u16) -> u8 {
    if local_port < remote_port {
        direction::INCOMING
    } else {
        direction::OUTGOING
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn read_excludes_fin_and_unread() {
        // 10 bytes received and read, no FIN.
        assert_eq!(bytes_read(10, 1010, 1010, false), 10);
        // FIN received and read by the application.
        assert_eq!(bytes_read(11, 1011, 1011, true), 10);
        // FIN received; payload read, FIN not yet.
        assert_eq!(bytes_read(11, 1011, 1010, true), 10);
        // Four bytes and the FIN unread.
        assert_eq!(bytes_read(11, 1011, 1006, true), 6);
        // Sequence wrap.
        assert_eq!(bytes_read(5_000_000_010, 5, u32::MAX - 4, false), 5_000_000_000);
    }

    #[test]
    fn written_counts_neither_syn_nor_fin() {
        // Accepting side: 100 acknowledged, 20 queued.
        assert_eq!(bytes_written(100, 50, 70, state::ESTABLISHED, false), 120);
        // Connecting side: the SYN was acknowledged too.
        assert_eq!(bytes_written(101, 50, 50, state::ESTABLISHED, true), 100);
        // FIN queued behind 20 bytes; FIN acknowledged.
        assert_eq!(bytes_written(100, 50, 71, state::FIN_WAIT1, false), 120);
        assert_eq!(bytes_written(121, 71, 71, state::FIN_WAIT2, false), 120);
        // Sequence wrap, and more than 4 GiB.
        assert_eq!(
            bytes_written(5_000_000_000, u32::MAX - 9, 10, state::ESTABLISHED, false),
            5_000_000_020
        );
        // Nothing written.
        assert_eq!(bytes_written(1, 50, 51, state::FIN_WAIT1, true), 0);
    }

    #[test]
    fn addresses() {
        let v4 = |a, b, c, d| mapped([a, b, c, d]);
        assert_eq!(v4(10, 0, 0, 1), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 1]);
        assert!(is_v4(&v4(10, 0, 0, 1)));
        assert!(is_loopback(&v4(127, 0, 0, 1)));
        assert!(is_loopback(&v4(127, 255, 0, 1)));
        assert!(!is_loopback(&v4(128, 0, 0, 1)));
        let mut one = [0u8; 16];
        one[15] = 1;
        assert!(is_loopback(&one));
        assert!(!is_v4(&one));
        one[0] = 0xfd;
        assert!(!is_loopback(&one));
        // ::7f00:1 is v4-compatible, not mapped.
        assert!(!is_loopback(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 127, 0, 0, 1]));
    }

    #[test]
    fn folds_only_the_client_side() {
        let mut key = FlowKey {
            direction: direction::OUTGOING,
            ..Default::default()
        };
        key.tuple.local_port = 40_000;
        key.tuple.remote_port = 50_000;
        fold_ports(&mut key, 10_001);
        assert_eq!(
            (key.tuple.local_port, key.tuple.remote_port, key.folded),
            (0, 50_000, folded::LOCAL)
        );
        let mut key = FlowKey {
            direction: direction::INCOMING,
            ..Default::default()
        };
        key.tuple.local_port = 40_000;
        key.tuple.remote_port = 9_000;
        fold_ports(&mut key, 10_001);
        assert_eq!(
            (key.tuple.local_port, key.tuple.remote_port, key.folded),
            (40_000, 9_000, 0)
        );
    }
}
