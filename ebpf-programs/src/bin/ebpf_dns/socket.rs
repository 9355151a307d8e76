//! The socket of a packet: its network namespace, and its ends if it is connected.

use core::mem::MaybeUninit;

use aya_ebpf::helpers::generated;
use ebpf_common::net::{ABSENT, Tuple};
use ebpf_programs::net::mapped;

use crate::maps::offsets;

const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;

/// Address of a `struct sock`, as a number.
#[derive(Clone, Copy)]
pub(crate) struct Socket(u64);

impl Socket {
    /// The socket of a packet: `skb` is the context, which at run time is the kernel's `struct sk_buff`. The context's own
    /// `sk` is a typed pointer whose use as a number the verifier forbids.
    #[inline(always)]
    pub(crate) fn of(skb: u64) -> Self {
        Self(read(skb, offsets().skb_sk))
    }

    /// Inode number of its network namespace.
    #[inline(always)]
    pub(crate) fn netns(self) -> u32 {
        let net: u64 = read(self.0, offsets().net);
        read(net, offsets().netns_inum)
    }

    /// Sets the ends to those that the socket is connected with; false if it is not.
    #[inline(always)]
    pub(crate) fn ends(self, tuple: &mut Tuple) -> bool {
        let off = offsets();
        let remote_port = u16::from_be(read(self.0, off.dport));
        if remote_port == 0 {
            return false;
        }
        let family: u16 = read(self.0, off.family);
        if family == AF_INET {
            let pair: [u8; 8] = read(self.0, off.addrpair);
            tuple.remote = mapped([pair[0], pair[1], pair[2], pair[3]]);
            tuple.local = mapped([pair[4], pair[5], pair[6], pair[7]]);
        } else if family == AF_INET6 {
            tuple.remote = read(self.0, off.v6_daddr);
            tuple.local = read(self.0, off.v6_saddr);
        } else {
            return false;
        }
        tuple.remote_port = remote_port;
        tuple.local_port = u16::from_be(read(self.0, off.sport));
        true
    }
}

/// Reads a plain value at `base + offset`; zero if the member is absent or the memory cannot be read.
#[inline(always)]
fn read<T: Copy>(base: u64, offset: u32) -> T {
    let mut value = MaybeUninit::<T>::zeroed();
    if offset != ABSENT {
        // SAFETY: the helper checks the source and writes exactly size_of::<T>() bytes; T is an integer or byte array.
        unsafe {
            generated::bpf_probe_read_kernel(
                value.as_mut_ptr().cast(),
                size_of::<T>() as u32,
                (base + offset as u64) as *const _,
            );
        }
    }
    // SAFETY: zeroed or filled; every bit pattern of T is valid.
    unsafe { value.assume_init() }
}
