//! Thin wrappers over the system calls that `socket2` and `std` do not offer. All `unsafe` of the traffic tools is here and in `mmsg`.

use std::{
    ffi::CString,
    fs::File,
    io,
    mem::{self, MaybeUninit},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    path::Path,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    time::Duration,
};

use socket2::{SockAddr, Socket};

static STOP: AtomicBool = AtomicBool::new(false);
static TIMED_OUT: AtomicBool = AtomicBool::new(false);
static MARKS: AtomicU32 = AtomicU32::new(0);

/// True once SIGTERM, SIGINT or the time limit asked the role to finish.
#[must_use]
pub fn stopping() -> bool {
    STOP.load(Ordering::Relaxed)
}

/// True once the time limit of [`install_signals`] passed.
#[must_use]
pub fn timed_out() -> bool {
    TIMED_OUT.load(Ordering::Relaxed)
}

/// Number of SIGUSR1 received.
#[must_use]
pub fn marks() -> u32 {
    MARKS.load(Ordering::Relaxed)
}

extern "C" fn on_signal(signal: libc::c_int) {
    if signal == libc::SIGUSR1 {
        MARKS.fetch_add(1, Ordering::Relaxed);
        return;
    }
    if signal == libc::SIGALRM {
        TIMED_OUT.store(true, Ordering::Relaxed);
    }
    STOP.store(true, Ordering::Relaxed);
}

/// Installs the role's signal handlers, without SA_RESTART so that blocking calls return, and a time limit in seconds.
///
/// # Errors
/// The failing `sigaction`.
pub fn install_signals(max_seconds: u32) -> io::Result<()> {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGALRM, libc::SIGUSR1] {
        // SAFETY: a zeroed sigaction is a valid value; the handler only stores to atomics.
        let result = unsafe {
            let mut action: libc::sigaction = mem::zeroed();
            let handler: extern "C" fn(libc::c_int) = on_signal;
            action.sa_sigaction = handler as libc::sighandler_t;
            libc::sigaction(signal, &raw const action, std::ptr::null_mut())
        };
        check(result)?;
    }
    // SAFETY: plain system calls; SIGPIPE is ignored by the Rust runtime already, but not in a forked exec.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
        libc::alarm(max_seconds);
    }
    Ok(())
}

pub(super) fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Names the calling thread (the process, when it is the main thread); at most 15 bytes are kept.
///
/// # Errors
/// The failing `prctl`.
pub fn set_name(name: &str) -> io::Result<()> {
    let name = CString::new(name).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: `name` is a NUL-terminated string that outlives the call.
    check(unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) }).map(drop)
}

/// Asks the kernel to end this process with SIGKILL when its parent ends.
///
/// # Errors
/// The failing `prctl`.
pub fn die_with_parent() -> io::Result<()> {
    // SAFETY: no pointers involved.
    check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) }).map(drop)
}

/// Raises the limit of open files towards `wanted`, beyond the hard limit where the caller may; returns the new limit.
///
/// # Errors
/// The failing `setrlimit`.
pub fn raise_open_files(wanted: u64) -> io::Result<u64> {
    // SAFETY: zeroed rlimit is a valid value and the calls only touch it.
    unsafe {
        let mut limit: libc::rlimit = mem::zeroed();
        check(libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit))?;
        if limit.rlim_cur >= wanted {
            return Ok(limit.rlim_cur);
        }
        let hard = limit.rlim_max;
        limit.rlim_cur = wanted;
        limit.rlim_max = hard.max(wanted);
        if libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) == 0 {
            return Ok(wanted);
        }
        limit.rlim_cur = hard.min(wanted);
        limit.rlim_max = hard;
        check(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit))?;
        Ok(limit.rlim_cur)
    }
}

/// Result of [`fork`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fork {
    /// In the parent: pid of the child.
    Parent(libc::pid_t),
    /// In the child.
    Child,
}

/// Forks. Only for single-threaded processes: the roles of the traffic tools are.
///
/// # Errors
/// The failing `fork`.
pub fn fork() -> io::Result<Fork> {
    // SAFETY: the traffic roles are single-threaded, so the child owns a consistent heap.
    match check(unsafe { libc::fork() })? {
        0 => Ok(Fork::Child),
        pid => Ok(Fork::Parent(pid)),
    }
}

/// Waits for one child. `None` when there is no child, or none has ended yet and `block` is false.
#[must_use]
pub fn wait_any(block: bool) -> Option<(libc::pid_t, i32)> {
    let mut status = 0;
    loop {
        // SAFETY: `status` outlives the call.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, if block { 0 } else { libc::WNOHANG }) };
        if pid > 0 {
            return Some((pid, status));
        }
        if pid < 0 && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted {
            continue;
        }
        return None;
    }
}

/// Sends a signal; a process that is gone is no error.
pub fn kill(pid: libc::pid_t, signal: libc::c_int) {
    // SAFETY: no pointers involved.
    unsafe { libc::kill(pid, signal) };
}

/// Ends a forked child without running the parent's exit handlers.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: no pointers involved.
    unsafe { libc::_exit(code) }
}

/// Replaces this process by `path`, whose file name becomes the process name and `argv[0]`. Returns the error of the
/// failing `execv`, and nothing on success.
pub fn exec(path: &Path, args: &[String]) -> io::Error {
    use std::os::unix::process::CommandExt;
    std::process::Command::new(path)
        .arg0(path.file_name().unwrap_or(path.as_os_str()))
        .args(args)
        .exec()
}

/// Duplicates `fd` onto number `target`, without close-on-exec.
///
/// # Errors
/// The failing call.
pub fn dup_onto(fd: BorrowedFd<'_>, target: RawFd) -> io::Result<()> {
    if fd.as_raw_fd() == target {
        // SAFETY: clears the descriptor flags of a descriptor we hold.
        return check(unsafe { libc::fcntl(target, libc::F_SETFD, 0) }).map(drop);
    }
    // SAFETY: `fd` is open; `target` is a number only the caller uses.
    check(unsafe { libc::dup2(fd.as_raw_fd(), target) }).map(drop)
}

/// Takes ownership of an inherited socket.
///
/// # Errors
/// `EBADF` when the number is not open.
pub fn inherited_socket(fd: RawFd) -> io::Result<Socket> {
    // SAFETY: F_GETFD only asks whether the number is open.
    check(unsafe { libc::fcntl(fd, libc::F_GETFD) })?;
    // SAFETY: open, and inherited for this process alone to use.
    Ok(unsafe { Socket::from_raw_fd(fd) })
}

/// Enters a network namespace with the calling thread.
///
/// # Errors
/// The failing `setns`: `EPERM` without CAP_SYS_ADMIN, `EINVAL` when `ns` is no network namespace.
pub fn enter_netns(ns: &File) -> io::Result<()> {
    // SAFETY: `ns` is an open descriptor.
    check(unsafe { libc::setns(ns.as_raw_fd(), libc::CLONE_NEWNET) }).map(drop)
}

/// Gives the calling thread a new network namespace.
///
/// # Errors
/// The failing `unshare`: `EPERM` without CAP_SYS_ADMIN.
pub fn unshare_netns() -> io::Result<()> {
    // SAFETY: no pointers involved.
    check(unsafe { libc::unshare(libc::CLONE_NEWNET) }).map(drop)
}

/// Bind-mounts `source` onto the existing file `target`.
///
/// # Errors
/// The failing `mount`.
pub fn bind_mount(source: &Path, target: &Path) -> io::Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let source = CString::new(source.as_os_str().as_bytes())?;
    let target = CString::new(target.as_os_str().as_bytes())?;
    // SAFETY: both strings outlive the call; bind mounts take no file system type and no data.
    check(unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            std::ptr::null(),
            libc::MS_BIND,
            std::ptr::null(),
        )
    })
    .map(drop)
}

/// Lazily unmounts `target`.
///
/// # Errors
/// The failing `umount2`; `EINVAL` when nothing is mounted there.
pub fn unmount(target: &Path) -> io::Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let target = CString::new(target.as_os_str().as_bytes())?;
    // SAFETY: the string outlives the call.
    check(unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) }).map(drop)
}

/// Bytes sent but not yet acknowledged by the peer.
///
/// # Errors
/// The failing `ioctl`.
pub fn unacked(socket: &Socket) -> io::Result<usize> {
    let mut pending: libc::c_int = 0;
    // SAFETY: SIOCOUTQ (= TIOCOUTQ) writes one int.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut pending) })?;
    Ok(usize::try_from(pending).unwrap_or(0))
}

/// Bytes waiting to be read.
///
/// # Errors
/// The failing `ioctl`.
pub fn unread(socket: &Socket) -> io::Result<usize> {
    let mut pending: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::FIONREAD, &raw mut pending) })?;
    Ok(usize::try_from(pending).unwrap_or(0))
}

/// Sets an integer socket option.
///
/// # Errors
/// The failing `setsockopt`.
pub fn set_int_option(socket: &Socket, level: i32, name: i32, value: i32) -> io::Result<()> {
    let length = u32::try_from(mem::size_of::<libc::c_int>()).unwrap_or(4);
    // SAFETY: points at one int of the length given.
    check(unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), length) }).map(drop)
}

/// Grows (or shrinks) the receive buffer beyond `rmem_max` where the caller may, else up to it.
///
/// # Errors
/// The failing `setsockopt`.
pub fn set_receive_buffer(socket: &Socket, bytes: i32) -> io::Result<()> {
    set_int_option(socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, bytes)
        .or_else(|_| socket.set_recv_buffer_size(usize::try_from(bytes).unwrap_or(0)))
}

/// Waits until one of `events` is ready. `Ok(0)` on timeout and when a signal came.
///
/// # Errors
/// The failing `poll`, but never `EINTR`.
pub fn poll(fd: BorrowedFd<'_>, events: i16, timeout: Duration) -> io::Result<i16> {
    let mut entry = libc::pollfd {
        fd: fd.as_raw_fd(),
        events,
        revents: 0,
    };
    let millis = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: one entry, as the count says.
    match check(unsafe { libc::poll(&raw mut entry, 1, millis) }) {
        Ok(0) => Ok(0),
        Ok(_) => Ok(entry.revents),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(0),
        Err(error) => Err(error),
    }
}

/// Receives into an initialised buffer.
///
/// # Errors
/// The failing `recv`.
pub fn recv(socket: &Socket, buffer: &mut [u8]) -> io::Result<usize> {
    socket.recv(as_uninit(buffer))
}

/// Receives one datagram and its sender.
///
/// # Errors
/// The failing `recvfrom`.
pub fn recv_from(socket: &Socket, buffer: &mut [u8]) -> io::Result<(usize, SockAddr)> {
    socket.recv_from(as_uninit(buffer))
}

fn as_uninit(buffer: &mut [u8]) -> &mut [MaybeUninit<u8>] {
    // SAFETY: same layout, and the kernel only ever writes initialised bytes into it.
    unsafe { &mut *(std::ptr::from_mut(buffer) as *mut [MaybeUninit<u8>]) }
}

/// Sends up to `count` bytes of `file` from its current offset. 0 at the end of the file.
///
/// # Errors
/// The failing `sendfile`.
pub fn sendfile(socket: &Socket, file: &File, offset: &mut i64, count: usize) -> io::Result<usize> {
    // SAFETY: both descriptors are open and `offset` outlives the call.
    let sent = unsafe { libc::sendfile(socket.as_raw_fd(), file.as_raw_fd(), offset, count) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Passes `passed` over the Unix socket `over`.
///
/// # Errors
/// The failing `sendmsg`.
pub fn send_fd(over: &Socket, passed: BorrowedFd<'_>) -> io::Result<()> {
    let byte = [1_u8];
    let mut space = [0_u64; 4];
    let mut part = libc::iovec {
        iov_base: byte.as_ptr().cast_mut().cast(),
        iov_len: 1,
    };
    // SAFETY: the control buffer is aligned and larger than CMSG_SPACE(4); all pointers outlive the call.
    unsafe {
        let mut message: libc::msghdr = mem::zeroed();
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = space.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(4) as usize;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(4) as usize;
        libc::CMSG_DATA(header)
            .cast::<RawFd>()
            .write_unaligned(passed.as_raw_fd());
        if libc::sendmsg(over.as_raw_fd(), &raw const message, 0) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Receives a socket sent by [`send_fd`]; `None` when the other end is closed.
///
/// # Errors
/// The failing `recvmsg`, or `InvalidData` when the message held no descriptor.
pub fn receive_fd(over: &Socket) -> io::Result<Option<Socket>> {
    let mut byte = [0_u8];
    let mut space = [0_u64; 4];
    let mut part = libc::iovec {
        iov_base: byte.as_mut_ptr().cast(),
        iov_len: 1,
    };
    // SAFETY: all pointers outlive the call; the header is checked before its data is read.
    unsafe {
        let mut message: libc::msghdr = mem::zeroed();
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = space.as_mut_ptr().cast();
        message.msg_controllen = mem::size_of_val(&space);
        let received = libc::recvmsg(over.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC);
        if received < 0 {
            return Err(io::Error::last_os_error());
        }
        if received == 0 {
            return Ok(None);
        }
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        if header.is_null() || (*header).cmsg_type != libc::SCM_RIGHTS {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "message without a descriptor",
            ));
        }
        let fd = libc::CMSG_DATA(header).cast::<RawFd>().read_unaligned();
        Ok(Some(Socket::from(OwnedFd::from_raw_fd(fd))))
    }
}

/// An epoll set.
#[derive(Debug)]
pub struct Epoll {
    fd: OwnedFd,
    events: Vec<libc::epoll_event>,
}

impl Epoll {
    /// An empty set.
    ///
    /// # Errors
    /// The failing `epoll_create1`.
    pub fn new() -> io::Result<Self> {
        // SAFETY: the returned descriptor is ours.
        let fd = unsafe { OwnedFd::from_raw_fd(check(libc::epoll_create1(libc::EPOLL_CLOEXEC))?) };
        Ok(Self {
            fd,
            events: vec![libc::epoll_event { events: 0, u64: 0 }; 256],
        })
    }

    /// Watches `fd` for readability (level triggered) under `token`.
    ///
    /// # Errors
    /// The failing `epoll_ctl`.
    pub fn add(&self, fd: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        let mut event = libc::epoll_event {
            events: libc::EPOLLIN as u32,
            u64: token,
        };
        // SAFETY: `event` outlives the call.
        check(unsafe { libc::epoll_ctl(self.fd.as_raw_fd(), libc::EPOLL_CTL_ADD, fd.as_raw_fd(), &raw mut event) })
            .map(drop)
    }

    /// Tokens that are ready; none on timeout and when a signal came.
    ///
    /// # Errors
    /// The failing `epoll_wait`, but never `EINTR`.
    pub fn wait(&mut self, timeout: Duration) -> io::Result<impl Iterator<Item = u64>> {
        let millis = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
        let room = i32::try_from(self.events.len()).unwrap_or(i32::MAX);
        // SAFETY: the buffer has `room` entries.
        let ready =
            match check(unsafe { libc::epoll_wait(self.fd.as_raw_fd(), self.events.as_mut_ptr(), room, millis) }) {
                Ok(ready) => ready,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(error) => return Err(error),
            };
        Ok(self
            .events
            .iter()
            .take(usize::try_from(ready).unwrap_or(0))
            .map(|event| event.u64))
    }
}

/// Index of a network interface in the caller's namespace.
///
/// # Errors
/// `ENODEV` when there is none of that name.
pub fn interface_index(name: &str) -> io::Result<u32> {
    let name = CString::new(name).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: the string outlives the call.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => Err(io::Error::last_os_error()),
        index => Ok(index),
    }
}

/// The descriptor of a socket, for [`poll`].
#[must_use]
pub fn fd_of(socket: &Socket) -> BorrowedFd<'_> {
    socket.as_fd()
}
