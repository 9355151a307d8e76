//! Events of the ring, checked. No I/O.

use ebpf_common::{
    http::{DataHead, EVENT_VERSION, EventHead, OpenEvent, OwnerEvent, TAIL, event},
    net::Tuple,
};

use crate::identity::process::Comm;

/// What the kernel side told of a socket.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Event<'a> {
    /// Cookie of the socket.
    pub(super) cookie: u64,
    /// Monotonic time, nanoseconds.
    pub(super) time_ns: u64,
    pub(super) what: What<'a>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum What<'a> {
    Open(Opened),
    Owner(Owner),
    Data(Data<'a>),
}

/// A socket is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Opened {
    pub(super) tuple: Tuple,
    /// Sequence numbers of the next bytes out of it and into it.
    pub(super) next: [u32; 2],
    /// `ebpf_common::http::role` of the local end.
    pub(super) role: u8,
    /// Nothing has passed before.
    pub(super) fresh: bool,
    pub(super) owner: Owner,
}

/// The process that sends on a socket; its number is 0 if it is not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Owner {
    pub(super) pid: u32,
    pub(super) comm: Comm,
    pub(super) cgroup: u64,
}

/// Bytes that passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Data<'a> {
    /// `ebpf_common::http::way` they went.
    pub(super) way: u8,
    pub(super) flags: u8,
    /// Sequence number of the first one.
    pub(super) seq: u32,
    pub(super) len: u32,
    /// The first ones.
    pub(super) captured: &'a [u8],
    /// The last ones, where there is something between.
    pub(super) tail: &'a [u8],
}

impl<'a> Event<'a> {
    /// Reads an event; `None` if it is of another build.
    pub(super) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let head: EventHead = copy(bytes)?;
        if head.version != EVENT_VERSION {
            return None;
        }
        let what = match head.kind {
            event::OPEN => What::Open(opened(&copy(bytes)?)),
            event::OWNER => {
                let OwnerEvent { pid, comm, cgroup, .. } = copy(bytes)?;
                What::Owner(Owner { pid, comm, cgroup })
            }
            event::DATA => What::Data(data(bytes)?),
            _ => return None,
        };
        Some(Self {
            cookie: head.cookie,
            time_ns: head.time_ns,
            what,
        })
    }
}

fn opened(event: &OpenEvent) -> Opened {
    Opened {
        tuple: event.tuple,
        next: event.next,
        role: event.role,
        fresh: event.fresh != 0,
        owner: Owner {
            pid: event.pid,
            comm: event.comm,
            cgroup: event.cgroup,
        },
    }
}

fn data(bytes: &[u8]) -> Option<Data<'_>> {
    const END: usize = std::mem::offset_of!(DataHead, end);
    let head: DataHead = copy(bytes)?;
    let captured = usize::try_from(head.captured).ok()?;
    let tail = usize::from(head.tail);
    if captured + tail > usize::try_from(head.len).ok()? {
        return None;
    }
    Some(Data {
        way: head.way,
        flags: head.flags,
        seq: head.seq,
        len: head.len,
        captured: bytes.get(size_of::<DataHead>()..)?.get(..captured)?,
        tail: bytes.get(END..END + TAIL)?.get(..tail)?,
    })
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
unsafe impl Plain for OpenEvent {}
// SAFETY: as above.
unsafe impl Plain for OwnerEvent {}
// SAFETY: as above.
unsafe impl Plain for DataHead {}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn bytes_of<T: Plain>(value: &T, more: &[u8]) -> Vec<u8> {
        // SAFETY: the layouts have no padding.
        let mut bytes =
            unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast::<u8>(), size_of::<T>()) }.to_vec();
        bytes.extend_from_slice(more);
        bytes
    }

    fn head() -> DataHead {
        DataHead {
            head: EventHead {
                version: EVENT_VERSION,
                kind: event::DATA,
                cookie: 7,
                time_ns: 99,
                ..EventHead::default()
            },
            seq: 5,
            len: 1000,
            captured: 3,
            way: 1,
            tail: 2,
            end: *b"yz......",
            ..DataHead::default()
        }
    }

    #[test]
    fn reads_what_the_kernel_side_writes() {
        // Behind what was captured comes what the memory held before.
        let bytes = bytes_of(&head(), b"abc and more");
        let event = Event::parse(&bytes).unwrap();
        assert_eq!((event.cookie, event.time_ns), (7, 99));
        let expected = Data {
            way: 1,
            flags: 0,
            seq: 5,
            len: 1000,
            captured: b"abc",
            tail: b"yz",
        };
        assert_eq!(event.what, What::Data(expected));
    }

    #[test]
    fn other_layouts_are_refused() {
        let good = bytes_of(&head(), b"abc");
        for length in 0..good.len() {
            assert_eq!(Event::parse(good.get(..length).unwrap()), None, "{length}");
        }
        let change = |change: fn(&mut DataHead)| {
            let mut head = head();
            change(&mut head);
            bytes_of(&head, b"abc")
        };
        for bad in [
            change(|head| head.head.version = 9),
            change(|head| head.head.kind = 9),
            change(|head| head.captured = u32::MAX),
            change(|head| head.tail = 9),
            change(|head| head.len = 4),
        ] {
            assert_eq!(Event::parse(&bad), None);
        }
    }
}
