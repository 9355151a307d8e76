//! The sockets that processes hold, found through `/proc/PID/fd` and borrowed with `pidfd_getfd`.
//!
//! Works across network namespaces without entering them.

use std::{
    ffi::CStr,
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use super::process::Proc;

/// A socket descriptor of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Inode number of the socket.
    pub inode: u64,
    /// Process (thread group) id.
    pub pid: u32,
    /// Descriptor number in that process.
    pub fd: u32,
}

/// A process from which descriptors can be borrowed.
#[derive(Debug)]
pub struct Lender {
    pidfd: OwnedFd,
}

/// Calls `visit` for every socket descriptor of every process. Processes that end meanwhile are passed over.
///
/// Returns how many processes could not be looked at for lack of privilege.
pub fn for_each_socket(proc: &Proc, mut visit: impl FnMut(Held)) -> u64 {
    let mut refused = 0;
    for pid in proc.pids() {
        if let Err(error) = sockets_of(proc, pid, &mut visit)
            && error.kind() == io::ErrorKind::PermissionDenied
        {
            refused += 1;
        }
    }
    refused
}

fn sockets_of(proc: &Proc, pid: u32, visit: &mut impl FnMut(Held)) -> io::Result<()> {
    let path = proc.path(pid, "fd");
    let dir = std::fs::File::open(&path)?;
    let mut name = Vec::with_capacity(16);
    for entry in std::fs::read_dir(&path)? {
        let Ok(entry) = entry else { break };
        let Some(fd) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else {
            continue;
        };
        name.clear();
        name.extend_from_slice(entry.file_name().as_encoded_bytes());
        name.push(0);
        let Ok(name) = CStr::from_bytes_with_nul(&name) else {
            continue;
        };
        let mut target = [0u8; 64];
        // SAFETY: `name` is NUL terminated and `target` has the given size.
        let len = unsafe { libc::readlinkat(dir.as_raw_fd(), name.as_ptr(), target.as_mut_ptr().cast(), target.len()) };
        let Some(target) = usize::try_from(len).ok().and_then(|len| target.get(..len)) else {
            let error = io::Error::last_os_error();
            // The names can be listed without the right to look behind any of them; then all of the process are refused.
            if error.kind() == io::ErrorKind::PermissionDenied {
                return Err(error);
            }
            continue;
        };
        if let Some(inode) = socket_inode(target) {
            visit(Held { inode, pid, fd });
        }
    }
    Ok(())
}

/// The number in `socket:[123]`.
fn socket_inode(target: &[u8]) -> Option<u64> {
    let digits = target.strip_prefix(b"socket:[")?.strip_suffix(b"]")?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}

// === impl Lender ===

impl Lender {
    /// Opens a process.
    ///
    /// # Errors
    /// `ENOSYS` before kernel 5.3, `ESRCH` if it is gone.
    pub fn open(pid: u32) -> io::Result<Self> {
        // SAFETY: plain system call without pointers.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        Ok(Self { pidfd: owned(fd)? })
    }

    /// Duplicates one of its descriptors into this process. Needs `CAP_SYS_PTRACE`.
    ///
    /// # Errors
    /// `ENOSYS` before kernel 5.6, `EPERM` without the privilege, `EBADF` if it was closed meanwhile.
    pub fn borrow(&self, fd: u32) -> io::Result<OwnedFd> {
        // SAFETY: plain system call without pointers.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, self.pidfd.as_raw_fd(), fd, 0) };
        owned(fd)
    }
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    match i32::try_from(fd) {
        // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// An integer socket option, `None` if the descriptor does not have it.
#[must_use]
pub fn int_option(fd: &OwnedFd, option: i32) -> Option<i32> {
    get_option::<i32>(fd, option)
}

/// The socket cookie (`SO_COOKIE`), the kernel's number for the socket.
#[must_use]
pub fn cookie(fd: &OwnedFd) -> Option<u64> {
    get_option::<u64>(fd, libc::SO_COOKIE)
}

fn get_option<T: Default>(fd: &OwnedFd, option: i32) -> Option<T> {
    let mut value = T::default();
    let mut len = libc::socklen_t::try_from(size_of::<T>()).ok()?;
    // SAFETY: `value` has `len` writable bytes and is an integer.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw mut value).cast(),
            &raw mut len,
        )
    };
    (result == 0).then_some(value)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn finds_and_borrows_an_own_socket() {
        use std::os::unix::fs::MetadataExt as _;
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let stat = std::fs::metadata(format!("/proc/self/fd/{}", socket.as_raw_fd())).unwrap();
        let mut found = None;
        for_each_socket(&Proc::new("/proc"), |held| {
            if held.inode == stat.ino() {
                found = Some(held);
            }
        });
        let held = found.unwrap();
        assert_eq!(held.pid, std::process::id());
        assert_eq!(held.fd, socket.as_raw_fd().cast_unsigned());
        let borrowed = Lender::open(held.pid).unwrap().borrow(held.fd).unwrap();
        assert_eq!(int_option(&borrowed, libc::SO_PROTOCOL), Some(libc::IPPROTO_UDP));
        assert_eq!(cookie(&borrowed), cookie(&OwnedFd::from(socket.try_clone().unwrap())));
    }

    #[test]
    fn parses_link_targets() {
        assert_eq!(socket_inode(b"socket:[123]"), Some(123));
        assert_eq!(socket_inode(b"pipe:[123]"), None);
        assert_eq!(socket_inode(b"socket:[]"), None);
        assert_eq!(socket_inode(b"/dev/null"), None);
    }
}
