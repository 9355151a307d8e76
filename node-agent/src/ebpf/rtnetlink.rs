//! Route netlink: requests, dumps of interfaces and addresses, word of their changes. A socket is of the network namespace
//! of the thread that opens it.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
};

const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 0x001;
const NLM_F_ACK: u16 = 0x004;
const NLM_F_DUMP: u16 = 0x300;
const IFLA_IFNAME: u16 = 3;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
/// Bits of an attribute's type that are not of it.
const TYPE: u16 = 0x3fff;
const ARPHRD_ETHER: u16 = 1;
const ARPHRD_LOOPBACK: u16 = 772;
const HEADER: usize = 16;
const LISTEN_ALL_NSID: libc::c_int = 8;
/// `RTNLGRP_LINK`, `RTNLGRP_IPV4_IFADDR`, `RTNLGRP_IPV6_IFADDR`
const GROUPS: [libc::c_int; 3] = [1, 5, 9];
/// Bytes of one read; the kernel's dumps fill up to 32 KiB at a time.
const READ: usize = 64 << 10;
/// Seconds the kernel may take for a part of an answer.
const PATIENCE: libc::time_t = 2;

/// An interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its frames begin with headers of Ethernet.
    pub ethernet: bool,
}

/// A socket for requests.
#[derive(Debug)]
pub struct Route(OwnedFd);

/// Word of changes to interfaces and addresses.
#[derive(Debug)]
pub struct Changes {
    socket: OwnedFd,
    /// Also in other network namespaces.
    pub all: bool,
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn open(flags: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd = check(unsafe {
        libc::socket(
            libc::AF_NETLINK,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC | flags,
            libc::NETLINK_ROUTE,
        )
    })?;
    // SAFETY: just made, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn set<T>(socket: &OwnedFd, level: libc::c_int, option: libc::c_int, value: &T) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of::<T>()).unwrap_or_default();
    // SAFETY: `value` is readable for that length.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            std::ptr::from_ref(value).cast(),
            length,
        )
    })
    .map(drop)
}

/// One attribute, padded.
#[must_use]
pub fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn two(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn four(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// The first message: its kind, its body, and what follows it.
fn message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = four(bytes, 0)? as usize;
    let body = bytes.get(HEADER..length)?;
    let rest = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((two(bytes, 4)?, body, rest))
}

/// The value of an attribute.
fn find(mut bytes: &[u8], kind: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(two(bytes, 0)?);
        let value = bytes.get(4..length)?;
        if two(bytes, 2)? & TYPE == kind {
            return Some(value);
        }
        bytes = bytes.get(length.next_multiple_of(4)..)?;
    }
}

fn interface(body: &[u8]) -> Option<Interface> {
    let kind = two(body, 2)?;
    let name = find(body.get(16..)?, IFLA_IFNAME)?;
    let name = name.split(|byte| *byte == 0).next()?;
    Some(Interface {
        index: four(body, 4)?,
        name: String::from_utf8_lossy(name).into_owned(),
        ethernet: kind == ARPHRD_ETHER || kind == ARPHRD_LOOPBACK,
    })
}

fn address(body: &[u8]) -> Option<IpAddr> {
    let attributes = body.get(8..)?;
    // The own one, where there are two ends.
    let value = find(attributes, IFA_LOCAL).or_else(|| find(attributes, IFA_ADDRESS))?;
    match value.len() {
        4 => Some(Ipv4Addr::from(<[u8; 4]>::try_from(value).ok()?).into()),
        16 => Some(Ipv6Addr::from(<[u8; 16]>::try_from(value).ok()?).into()),
        _ => None,
    }
}

// === impl Route ===

impl Route {
    /// Opens it.
    ///
    /// # Errors
    /// What the system calls said.
    pub fn open() -> io::Result<Self> {
        let socket = open(0)?;
        let patience = libc::timeval {
            tv_sec: PATIENCE,
            tv_usec: 0,
        };
        set(&socket, libc::SOL_SOCKET, libc::SO_RCVTIMEO, &patience)?;
        Ok(Self(socket))
    }

    fn send(&self, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        let length = u32::try_from(HEADER + body.len()).unwrap_or(u32::MAX);
        let mut request = Vec::with_capacity(HEADER + body.len());
        request.extend(length.to_ne_bytes());
        request.extend(kind.to_ne_bytes());
        request.extend((NLM_F_REQUEST | flags).to_ne_bytes());
        request.extend([0; 8]);
        request.extend(body);
        // SAFETY: `request` is readable for its length.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), request.as_ptr().cast(), request.len(), 0) };
        if sent < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    /// A request that is answered with an error number alone.
    ///
    /// # Errors
    /// What the kernel answered.
    pub fn ask(&self, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        self.dump(kind, flags | NLM_F_ACK, body, |_, _| {})
    }

    /// A request that is answered with messages.
    ///
    /// # Errors
    /// What the kernel answered.
    pub fn dump(&self, kind: u16, flags: u16, body: &[u8], mut take: impl FnMut(u16, &[u8])) -> io::Result<()> {
        self.send(kind, flags, body)?;
        let mut buffer = vec![0; READ];
        loop {
            // SAFETY: `buffer` is writable for its length.
            let length = unsafe { libc::recv(self.0.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
            let Ok(length) = usize::try_from(length) else {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error);
            };
            let mut rest = buffer.get(..length).unwrap_or_default();
            while let Some((kind, body, next)) = message(rest) {
                rest = next;
                match kind {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => {
                        return match four(body, 0).map(u32::cast_signed) {
                            Some(0) => Ok(()),
                            Some(error) => Err(io::Error::from_raw_os_error(error.saturating_neg())),
                            None => Err(io::ErrorKind::InvalidData.into()),
                        };
                    }
                    kind => take(kind, body),
                }
            }
        }
    }

    /// All interfaces.
    ///
    /// # Errors
    /// What the kernel answered.
    pub fn interfaces(&self) -> io::Result<Vec<Interface>> {
        let mut found = Vec::new();
        self.dump(RTM_GETLINK, NLM_F_DUMP, &[0; 16], |kind, body| {
            if kind == RTM_NEWLINK {
                found.extend(interface(body));
            }
        })?;
        Ok(found)
    }

    /// All addresses.
    ///
    /// # Errors
    /// What the kernel answered.
    pub fn addresses(&self) -> io::Result<Vec<IpAddr>> {
        let mut found = Vec::new();
        self.dump(RTM_GETADDR, NLM_F_DUMP, &[0; 8], |kind, body| {
            if kind == RTM_NEWADDR {
                found.extend(address(body));
            }
        })?;
        Ok(found)
    }
}

// === impl Changes ===

impl Changes {
    /// Listens, in other network namespaces too where that is allowed.
    ///
    /// # Errors
    /// What the system calls said.
    pub fn listen() -> io::Result<Self> {
        let socket = open(libc::SOCK_NONBLOCK)?;
        let on: libc::c_int = 1;
        let all = set(&socket, libc::SOL_NETLINK, LISTEN_ALL_NSID, &on).is_ok();
        for group in GROUPS {
            set(&socket, libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP, &group)?;
        }
        Ok(Self { socket, all })
    }

    /// Its descriptor, readable when something changed.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// True if something changed since the last call, or may have.
    pub fn any(&self) -> bool {
        let mut buffer = [0u8; 8192];
        let mut any = false;
        loop {
            // SAFETY: `buffer` is writable for its length; what is longer is cut off, and not looked at anyway.
            let length = unsafe { libc::recv(self.fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
            if length < 0 {
                let error = io::Error::last_os_error();
                // Too slow: there was more than was kept.
                if error.raw_os_error() == Some(libc::ENOBUFS) {
                    any = true;
                    continue;
                }
                return any;
            }
            any = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_interfaces_and_addresses_are_told() {
        let route = Route::open().unwrap();
        let interfaces = route.interfaces().unwrap();
        let lo = interfaces.iter().find(|interface| interface.name == "lo").unwrap();
        assert!(lo.ethernet && lo.index > 0);
        let names = std::fs::read_dir("/sys/class/net").unwrap().count();
        assert!(interfaces.len() >= names.min(1));
        assert!(route.addresses().is_ok());
    }

    #[test]
    fn what_is_cut_off_is_nothing() {
        let name = attribute(IFLA_IFNAME, b"eth0\0");
        let mut body = vec![0; 16];
        body[2..4].copy_from_slice(&ARPHRD_ETHER.to_ne_bytes());
        body[4..8].copy_from_slice(&7u32.to_ne_bytes());
        body.extend(name);
        let whole = interface(&body).unwrap();
        assert_eq!((whole.index, whole.name.as_str(), whole.ethernet), (7, "eth0", true));
        for length in 0..body.len() - 3 {
            assert_eq!(interface(&body[..length]), None, "{length}");
        }
        assert_eq!(message(&[1, 0, 0, 0]), None);
        assert_eq!(find(&[0, 0, 3, 0], 3), None);
    }
}
