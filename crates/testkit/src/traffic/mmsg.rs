//! Message vectors for `sendmmsg` and `recvmmsg`.

use std::{io, mem, os::fd::AsRawFd as _};

use socket2::{SockAddr, Socket};

use super::sys::check;

/// Largest number of messages of one [`Mmsg`] call.
pub const MMSG: usize = 32;

/// Preallocated message vectors for `sendmmsg` and `recvmmsg`: no allocation per call.
pub struct Mmsg {
    // Boxed so that the pointers between the vectors stay valid when `Self` moves.
    buffers: Box<[u8]>,
    names: Box<[libc::sockaddr_storage]>,
    parts: Box<[libc::iovec]>,
    headers: Box<[libc::mmsghdr]>,
    stride: usize,
}

impl std::fmt::Debug for Mmsg {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mmsg")
            .field("stride", &self.stride)
            .finish_non_exhaustive()
    }
}

impl Mmsg {
    /// Room for [`MMSG`] messages of at most `stride` bytes.
    #[must_use]
    pub fn new(stride: usize) -> Self {
        let mut buffers = vec![0_u8; stride * MMSG].into_boxed_slice();
        // SAFETY: all-zero is a valid value of these plain C structures.
        let (mut names, mut headers) = unsafe {
            (
                vec![mem::zeroed::<libc::sockaddr_storage>(); MMSG].into_boxed_slice(),
                (0..MMSG).map(|_| mem::zeroed::<libc::mmsghdr>()).collect::<Box<[_]>>(),
            )
        };
        let mut parts: Box<[libc::iovec]> = buffers
            .chunks_mut(stride.max(1))
            .map(|chunk| libc::iovec {
                iov_base: chunk.as_mut_ptr().cast(),
                iov_len: chunk.len(),
            })
            .collect();
        for ((header, part), name) in headers.iter_mut().zip(parts.iter_mut()).zip(names.iter_mut()) {
            header.msg_hdr.msg_iov = part;
            header.msg_hdr.msg_iovlen = 1;
            header.msg_hdr.msg_name = std::ptr::from_mut(name).cast();
        }
        Self {
            buffers,
            names,
            parts,
            headers,
            stride,
        }
    }

    /// Prepares message `index` for sending: its destination (`None` on a connected socket), length and first byte.
    pub fn set(&mut self, index: usize, to: Option<&SockAddr>, length: usize, first: u8) {
        let length = length.min(self.stride);
        if let Some(byte) = self.buffers.get_mut(index * self.stride..).and_then(<[u8]>::first_mut) {
            *byte = first;
        }
        if let Some(part) = self.parts.get_mut(index) {
            part.iov_len = length;
        }
        let (Some(header), Some(name)) = (self.headers.get_mut(index), self.names.get_mut(index)) else {
            return;
        };
        match to {
            Some(to) => {
                // SAFETY: SockAddrStorage is the C sockaddr_storage.
                *name = unsafe { *to.as_ptr().cast::<libc::sockaddr_storage>() };
                header.msg_hdr.msg_name = std::ptr::from_mut(name).cast();
                header.msg_hdr.msg_namelen = to.len();
            }
            None => {
                header.msg_hdr.msg_name = std::ptr::null_mut();
                header.msg_hdr.msg_namelen = 0;
            }
        }
    }

    /// Sends the first `count` prepared messages; returns how many went.
    ///
    /// # Errors
    /// The failing `sendmmsg`.
    pub fn send(&mut self, socket: &Socket, count: usize) -> io::Result<usize> {
        let count = u32::try_from(count.min(MMSG)).unwrap_or(0);
        // SAFETY: every header points into our own boxed storage.
        check(unsafe { libc::sendmmsg(socket.as_raw_fd(), self.headers.as_mut_ptr(), count, 0) })
            .map(|sent| usize::try_from(sent).unwrap_or(0))
    }

    /// Receives up to [`MMSG`] messages, waiting (if at all) only for the first.
    ///
    /// # Errors
    /// The failing `recvmmsg`.
    pub fn receive(&mut self, socket: &Socket) -> io::Result<usize> {
        let stride = self.stride;
        let name_length = u32::try_from(mem::size_of::<libc::sockaddr_storage>()).unwrap_or(0);
        for ((header, part), name) in self
            .headers
            .iter_mut()
            .zip(self.parts.iter_mut())
            .zip(self.names.iter_mut())
        {
            part.iov_len = stride;
            header.msg_hdr.msg_name = std::ptr::from_mut(name).cast();
            header.msg_hdr.msg_namelen = name_length;
        }
        // SAFETY: every header points into our own boxed storage.
        check(unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                self.headers.as_mut_ptr(),
                MMSG as u32,
                libc::MSG_WAITFORONE as _,
                std::ptr::null_mut(),
            )
        })
        .map(|received| usize::try_from(received).unwrap_or(0))
    }

    /// Length, first byte (0 when empty) and sender of received message `index`.
    #[must_use]
    pub fn received(&self, index: usize) -> Option<(usize, u8, SockAddr)> {
        let header = self.headers.get(index)?;
        let name = self.names.get(index)?;
        let length = header.msg_len as usize;
        let first = if length == 0 {
            0
        } else {
            *self.buffers.get(index * self.stride)?
        };
        // SAFETY: the kernel wrote a socket address of that length.
        let address = unsafe {
            let mut storage = socket2::SockAddrStorage::zeroed();
            std::ptr::from_mut(&mut storage)
                .cast::<libc::sockaddr_storage>()
                .write(*name);
            SockAddr::new(storage, header.msg_hdr.msg_namelen)
        };
        Some((length, first, address))
    }
}
