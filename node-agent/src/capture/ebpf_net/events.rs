//! Events of the ring buffer, copied out and checked.

use ebpf_common::net::{EVENT_VERSION, EventHead, TcpCloseEvent, TcpSpillEvent, UdpSpillEvent, event};

/// A ring-buffer event, copied out and checked.
pub(super) enum Event {
    Close(TcpCloseEvent),
    TcpSpill(TcpSpillEvent),
    UdpSpill(UdpSpillEvent),
    Unknown,
}

impl Event {
    pub(super) fn parse(bytes: &[u8]) -> Self {
        let Some(head) = copy::<EventHead>(bytes) else {
            return Self::Unknown;
        };
        if head.version != EVENT_VERSION {
            return Self::Unknown;
        }
        let event = match head.kind {
            event::TCP_CLOSE => copy(bytes).map(Self::Close),
            event::TCP_SPILL => copy(bytes).map(Self::TcpSpill),
            event::UDP_SPILL => copy(bytes).map(Self::UdpSpill),
            _ => None,
        };
        event.unwrap_or(Self::Unknown)
    }
}

/// The struct at the start of `bytes`, if they are enough.
fn copy<T: Plain>(bytes: &[u8]) -> Option<T> {
    let bytes = bytes.get(..size_of::<T>())?;
    // SAFETY: long enough; `Plain` types take every bit pattern; unaligned reads are allowed here.
    Some(unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast()) })
}

/// Integers and byte arrays only.
///
/// # Safety
/// Every bit pattern is a valid value.
unsafe trait Plain {}
// SAFETY: `repr(C)` structs of integers and byte arrays, see `ebpf_common`.
unsafe impl Plain for EventHead {}
// SAFETY: as above.
unsafe impl Plain for TcpCloseEvent {}
// SAFETY: as above.
unsafe impl Plain for TcpSpillEvent {}
// SAFETY: as above.
unsafe impl Plain for UdpSpillEvent {}
