//! Netlink sockets: events and dumps of ctnetlink, and the numbers of network namespaces.
//!
//! Rights: `CAP_NET_ADMIN` for all of it, `CAP_NET_BROADCAST` to hear of other namespaces than the socket's own,
//! `CAP_SYS_ADMIN` to open a socket in another one.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use super::message::{self, Item, items};

/// `NFNLGRP_CONNTRACK_NEW`
const GROUP_NEW: libc::c_int = 1;
/// `NFNLGRP_CONNTRACK_DESTROY`
const GROUP_DESTROY: libc::c_int = 3;
/// `RTNLGRP_NSID`
const GROUP_NSID: libc::c_int = 28;
/// `NETLINK_LISTEN_ALL_NSID`, a socket option and the type of the ancillary message.
const LISTEN_ALL_NSID: libc::c_int = 8;
/// `RTM_NEWNSID`, `RTM_DELNSID`, `RTM_GETNSID`
const NEW_NSID: u16 = 88;
const DELETE_NSID: u16 = 89;
const GET_NSID: u16 = 90;
/// `NETNSA_NSID`, `NETNSA_FD`
const NETNSA_NSID: u16 = 1;
const NETNSA_FD: u16 = 3;
/// `NETNSA_NSID_NOT_ASSIGNED`
const NOT_ASSIGNED: i32 = -1;

/// Bytes of events that the kernel keeps for the reader; it takes twice as much, for its own accounting is in it. Some
/// ten thousand events.
const EVENT_BUFFER: libc::c_int = 8 << 20;
/// Bytes of one read; the kernel's dumps fill up to 32 KiB at a time.
pub(super) const READ: usize = 64 << 10;
/// How long the kernel may take for a part of an answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// Where a datagram comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum From {
    /// The socket's own namespace.
    Own,
    /// The namespace of this number.
    Nsid(i32),
}

/// What a read of events found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Read {
    /// This many bytes.
    Datagram(usize, From),
    /// Events were lost: the reader was too slow.
    Overrun,
    /// Nothing more for now.
    Nothing,
}

/// Events of connections made and ended.
#[derive(Debug)]
pub(super) struct Events(OwnedFd);

/// Changes of the numbers of namespaces.
#[derive(Debug)]
pub(super) struct NsidEvents(OwnedFd);

/// Asks for the numbers of namespaces.
#[derive(Debug)]
pub(super) struct Nsids(OwnedFd);

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn open(protocol: libc::c_int) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no pointers.
    let fd = check(unsafe { libc::socket(libc::AF_NETLINK, kind, protocol) })?;
    // SAFETY: just made, and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: all-zero is a valid value of this plain C struct.
    let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
    address.nl_family = libc::sa_family_t::try_from(libc::AF_NETLINK).unwrap_or_default();
    let length = libc::socklen_t::try_from(size_of_val(&address)).unwrap_or_default();
    // SAFETY: a valid address of that length.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) })?;
    Ok(socket)
}

fn set(socket: &OwnedFd, level: libc::c_int, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of_val(&value)).unwrap_or_default();
    // SAFETY: `value` is readable for that length.
    check(unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const value).cast(), length) }).map(drop)
}

fn join(socket: &OwnedFd, group: libc::c_int) -> io::Result<()> {
    set(socket, libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP, group)
}

fn send(socket: &OwnedFd, request: &[u8]) -> io::Result<()> {
    // SAFETY: `request` is readable for its length.
    let sent = unsafe { libc::send(socket.as_raw_fd(), request.as_ptr().cast(), request.len(), 0) };
    if sent < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Space for one ancillary message with an `int`, aligned for its header.
#[repr(C, align(8))]
struct Control([u8; 64]);

fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> io::Result<Read> {
    let mut control = Control([0; 64]);
    let mut part = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: all-zero is a valid value of this plain C struct.
    let mut head: libc::msghdr = unsafe { std::mem::zeroed() };
    head.msg_iov = &raw mut part;
    head.msg_iovlen = 1;
    head.msg_control = control.0.as_mut_ptr().cast();
    head.msg_controllen = control.0.len() as _;
    // SAFETY: the head points at a writable buffer and a writable control area of the stated lengths.
    let length = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut head, 0) };
    if length < 0 {
        let error = io::Error::last_os_error();
        return match error.raw_os_error() {
            Some(libc::ENOBUFS) => Ok(Read::Overrun),
            Some(libc::EAGAIN | libc::EINTR) => Ok(Read::Nothing),
            _ => Err(error),
        };
    }
    let mut from = From::Own;
    // SAFETY: the head is as the kernel left it; headers are walked by the macros made for it, and an `int` is read where
    // the kernel wrote one.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&raw const head);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_NETLINK && (*header).cmsg_type == LISTEN_ALL_NSID {
                from = From::Nsid(std::ptr::read_unaligned(libc::CMSG_DATA(header).cast()));
            }
            header = libc::CMSG_NXTHDR(&raw const head, header);
        }
    }
    Ok(Read::Datagram(usize::try_from(length).unwrap_or(0), from))
}

/// Waits until there is something to read; false if there is nothing in time.
fn wait(socket: &OwnedFd, deadline: Instant) -> io::Result<bool> {
    let left = deadline.saturating_duration_since(Instant::now());
    let mut poll = libc::pollfd {
        fd: socket.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let timeout = i32::try_from(left.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: one valid pollfd.
    Ok(check(unsafe { libc::poll(&raw mut poll, 1, timeout) })? > 0)
}

/// A socket for dumps of the caller's own namespace.
///
/// # Errors
/// What the system calls said.
pub(super) fn here() -> io::Result<OwnedFd> {
    open(libc::NETLINK_NETFILTER)
}

/// A socket for dumps of another namespace: it is opened by a thread that enters it.
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN`; what else the system calls said.
pub(super) fn inside(namespace: &File) -> io::Result<OwnedFd> {
    let enter = || {
        // SAFETY: no pointers; only this thread changes its namespace, and it ends.
        check(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) })?;
        here()
    };
    std::thread::scope(|scope| {
        let entered = std::thread::Builder::new()
            .name("conntrack-setns".into())
            .spawn_scoped(scope, enter)?;
        entered
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
    })
}

/// Asks for all connections that are there, and hands on what comes.
///
/// # Errors
/// What the kernel answered; `TimedOut` if it did not.
pub(super) fn dump(socket: &OwnedFd, buffer: &mut [u8], mut take: impl FnMut(Item)) -> io::Result<()> {
    send(socket, &message::dump_request())?;
    loop {
        if !wait(socket, Instant::now() + PATIENCE)? {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let length = match receive(socket, buffer)? {
            Read::Datagram(length, _) => length,
            Read::Overrun => return Err(io::Error::from_raw_os_error(libc::ENOBUFS)),
            Read::Nothing => continue,
        };
        for item in items(buffer.get(..length).unwrap_or_default()) {
            match item {
                Item::Done => return Ok(()),
                Item::Answer(0) => {}
                Item::Answer(error) => return Err(io::Error::from_raw_os_error(error)),
                other => take(other),
            }
        }
    }
}

// === impl Events ===

impl Events {
    /// Subscribes in the caller's namespace; with the second value `Ok`, also in all others that have a number here.
    ///
    /// # Errors
    /// What the system calls said; `EPERM` without `CAP_NET_ADMIN`.
    pub(super) fn open() -> io::Result<(Self, io::Result<()>)> {
        let socket = here()?;
        // The second is for who has no right to the first.
        set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, EVENT_BUFFER)
            .or_else(|_| set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUF, EVENT_BUFFER))?;
        let everywhere = set(&socket, libc::SOL_NETLINK, LISTEN_ALL_NSID, 1);
        join(&socket, GROUP_NEW)?;
        join(&socket, GROUP_DESTROY)?;
        Ok((Self(socket), everywhere))
    }

    /// The next datagram.
    ///
    /// # Errors
    /// What the system call said.
    pub(super) fn read(&self, buffer: &mut [u8]) -> io::Result<Read> {
        receive(&self.0, buffer)
    }

    /// To wait for.
    pub(super) const fn fd(&self) -> &OwnedFd {
        &self.0
    }
}

// === impl NsidEvents ===

impl NsidEvents {
    /// Subscribes.
    ///
    /// # Errors
    /// What the system calls said.
    pub(super) fn open() -> io::Result<Self> {
        let socket = open(libc::NETLINK_ROUTE)?;
        join(&socket, GROUP_NSID)?;
        Ok(Self(socket))
    }

    /// Numbers that were given to a namespace (true) or taken from one (false) since the last call.
    ///
    /// # Errors
    /// `ENOBUFS` if some were lost; what else the system call said.
    pub(super) fn changes(&self, buffer: &mut [u8]) -> io::Result<Vec<(i32, bool)>> {
        let mut changes = Vec::new();
        loop {
            match receive(&self.0, buffer)? {
                Read::Nothing => return Ok(changes),
                Read::Overrun => return Err(io::Error::from_raw_os_error(libc::ENOBUFS)),
                Read::Datagram(length, _) => {
                    let bytes = buffer.get(..length).unwrap_or_default();
                    let mut take = |kind, body: &[u8]| {
                        if let Some(nsid) = nsid_of(body).filter(|_| kind == NEW_NSID || kind == DELETE_NSID) {
                            changes.push((nsid, kind == NEW_NSID));
                        }
                    };
                    message::for_each(bytes, &mut take);
                }
            }
        }
    }

    /// To wait for.
    pub(super) const fn fd(&self) -> &OwnedFd {
        &self.0
    }
}

// === impl Nsids ===

impl Nsids {
    /// For numbers in the caller's namespace.
    ///
    /// # Errors
    /// What the system calls said.
    pub(super) fn open() -> io::Result<Self> {
        open(libc::NETLINK_ROUTE).map(Self)
    }

    /// The number of a namespace; it gets one if it has none. Without a number nothing is heard of it.
    ///
    /// # Errors
    /// What the kernel answered; `EPERM` without `CAP_NET_ADMIN`.
    pub(super) fn number(&self, namespace: &File) -> io::Result<i32> {
        if let Some(nsid) = self.ask(GET_NSID, namespace, None)? {
            return Ok(nsid);
        }
        match self.ask(NEW_NSID, namespace, Some(NOT_ASSIGNED)) {
            // Somebody else was quicker.
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
            other => drop(other?),
        }
        self.ask(GET_NSID, namespace, None)?
            .ok_or_else(|| io::Error::other("the kernel gave the namespace no number"))
    }

    fn ask(&self, kind: u16, namespace: &File, wanted: Option<i32>) -> io::Result<Option<i32>> {
        let mut body = vec![0; 4];
        body.extend(message::attribute(NETNSA_FD, &namespace.as_raw_fd().to_ne_bytes()));
        if let Some(wanted) = wanted {
            body.extend(message::attribute(NETNSA_NSID, &wanted.to_ne_bytes()));
        }
        send(&self.0, &message::request(kind, wanted.is_some(), &body))?;
        let deadline = Instant::now() + PATIENCE;
        let mut buffer = [0; 4096];
        while wait(&self.0, deadline)? {
            let Read::Datagram(length, _) = receive(&self.0, &mut buffer)? else {
                continue;
            };
            let mut answer = None;
            let mut take = |kind, body: &[u8]| match kind {
                message::ERROR => answer = Some(message::status(body).map(|()| None)),
                NEW_NSID => answer = Some(Ok(nsid_of(body))),
                _ => {}
            };
            message::for_each(buffer.get(..length).unwrap_or_default(), &mut take);
            if let Some(answer) = answer {
                return answer;
            }
        }
        Err(io::ErrorKind::TimedOut.into())
    }
}

/// The number in a message about one; none if none is assigned.
fn nsid_of(body: &[u8]) -> Option<i32> {
    let mut nsid = None;
    message::attributes(body.get(4..)?, |kind, value| {
        if kind == NETNSA_NSID {
            nsid = Some(i32::from_ne_bytes(*value.first_chunk()?));
        }
        Some(())
    })?;
    nsid.filter(|nsid| *nsid >= 0)
}
