//! The few rtnetlink requests that a test network needs, so that the tools work where there is no `ip` command.

use std::{
    io,
    net::{IpAddr, Ipv4Addr},
    os::fd::{AsRawFd as _, BorrowedFd},
};

use socket2::{Domain, Protocol, Socket, Type};

use super::sys;

const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_EXCL: u16 = 0x200;
const NLMSG_ERROR: u16 = 2;

const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
/// The address is usable at once, without duplicate address detection.
const IFA_F_NODAD: u8 = 2;

const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_STATIC: u8 = 4;
const RT_SCOPE_LINK: u8 = 253;
const RTN_UNICAST: u8 = 1;

const IFF_UP: u32 = 1;

/// A netlink connection to the network namespace that the calling thread was in when it opened it.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

/// One end of a veth pair.
#[derive(Clone, Copy, Debug)]
pub struct VethEnd<'a> {
    /// Interface name.
    pub name: &'a str,
    /// Namespace that the interface shall be in.
    pub netns: BorrowedFd<'a>,
}

struct Message(Vec<u8>);

impl Message {
    fn new(kind: u16, flags: u16, body: &[u8]) -> Self {
        let mut bytes = Vec::with_capacity(256);
        bytes.extend(0_u32.to_ne_bytes()); // length, set when sent
        bytes.extend(kind.to_ne_bytes());
        bytes.extend((NLM_F_REQUEST | NLM_F_ACK | flags).to_ne_bytes());
        bytes.extend([0; 8]); // sequence, set when sent; port
        bytes.extend(body);
        Self(bytes)
    }

    fn attribute(&mut self, kind: u16, value: &[u8]) {
        let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        let start = self.0.len();
        self.attribute(kind, &[]);
        fill(self);
        let length = u16::try_from(self.0.len() - start).unwrap_or(u16::MAX);
        if let Some(place) = self.0.get_mut(start..start + 2) {
            place.copy_from_slice(&length.to_ne_bytes());
        }
    }
}

fn link_header(index: u32, flags: u32, change: u32) -> Vec<u8> {
    let mut body = vec![0_u8; 4]; // family, padding, device type
    body.extend(index.to_ne_bytes());
    body.extend(flags.to_ne_bytes());
    body.extend(change.to_ne_bytes());
    body
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn family(ip: IpAddr) -> u8 {
    u8::try_from(if ip.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }).unwrap_or(0)
}

impl Netlink {
    /// Opens a connection.
    ///
    /// # Errors
    /// The failing `socket`.
    pub fn open() -> io::Result<Self> {
        let socket = Socket::new(
            Domain::from(libc::AF_NETLINK),
            Type::RAW,
            Some(Protocol::from(libc::NETLINK_ROUTE)),
        )?;
        Ok(Self { socket, sequence: 0 })
    }

    fn request(&mut self, mut message: Message) -> io::Result<()> {
        self.sequence += 1;
        let length = u32::try_from(message.0.len()).unwrap_or(u32::MAX);
        if let Some((head, _)) = message.0.split_at_mut_checked(12) {
            let (len, rest) = head.split_at_mut(4);
            len.copy_from_slice(&length.to_ne_bytes());
            rest.split_at_mut(4).1.copy_from_slice(&self.sequence.to_ne_bytes());
        }
        self.socket.send(&message.0)?;
        let mut buffer = vec![0_u8; 16 << 10];
        loop {
            let received = sys::recv(&self.socket, &mut buffer)?;
            let answer = buffer.get(..received).unwrap_or_default();
            let word = |at: usize| {
                answer
                    .get(at..at + 4)
                    .and_then(|b| b.try_into().ok())
                    .map(u32::from_ne_bytes)
            };
            let kind = answer.get(4..6).and_then(|b| b.try_into().ok()).map(u16::from_ne_bytes);
            if kind != Some(NLMSG_ERROR) || word(8) != Some(self.sequence) {
                continue;
            }
            return match word(16).map(u32::cast_signed) {
                Some(0) => Ok(()),
                Some(code) => Err(io::Error::from_raw_os_error(-code)),
                None => Err(io::ErrorKind::UnexpectedEof.into()),
            };
        }
    }

    /// Makes a veth pair whose ends are in the given namespaces.
    ///
    /// # Errors
    /// `EOPNOTSUPP` when the kernel has no veth (module not loaded), `EEXIST` when a name is taken.
    pub fn add_veth(&mut self, left: VethEnd<'_>, right: VethEnd<'_>, mtu: u32) -> io::Result<()> {
        let describe = |message: &mut Message, end: VethEnd<'_>| {
            let mut name = end.name.as_bytes().to_vec();
            name.push(0);
            message.attribute(IFLA_IFNAME, &name);
            message.attribute(IFLA_MTU, &mtu.to_ne_bytes());
            message.attribute(IFLA_NET_NS_FD, &end.netns.as_raw_fd().to_ne_bytes());
        };
        let mut message = Message::new(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &link_header(0, 0, 0));
        describe(&mut message, left);
        message.nested(IFLA_LINKINFO, |info| {
            info.attribute(IFLA_INFO_KIND, b"veth\0");
            info.nested(IFLA_INFO_DATA, |data| {
                data.nested(VETH_INFO_PEER, |peer| {
                    peer.0.extend(link_header(0, 0, 0));
                    describe(peer, right);
                });
            });
        });
        self.request(message)
    }

    /// Sets an interface up.
    ///
    /// # Errors
    /// `ENODEV` when there is none of that index.
    pub fn set_up(&mut self, index: u32) -> io::Result<()> {
        self.request(Message::new(RTM_NEWLINK, 0, &link_header(index, IFF_UP, IFF_UP)))
    }

    /// Adds an address to an interface.
    ///
    /// # Errors
    /// `EEXIST` when it is there, `EOPNOTSUPP` or `EACCES` when the kernel has no (or disabled) IPv6.
    pub fn add_address(&mut self, index: u32, ip: IpAddr, prefix: u8, broadcast: Option<Ipv4Addr>) -> io::Result<()> {
        let mut body = vec![family(ip), prefix, if ip.is_ipv6() { IFA_F_NODAD } else { 0 }, 0];
        body.extend(index.to_ne_bytes());
        let mut message = Message::new(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, &body);
        message.attribute(IFA_LOCAL, &octets(ip));
        message.attribute(IFA_ADDRESS, &octets(ip));
        if let Some(broadcast) = broadcast {
            message.attribute(IFA_BROADCAST, &broadcast.octets());
        }
        self.request(message)
    }

    /// Routes `dst/prefix` to an interface.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn add_route(&mut self, index: u32, dst: IpAddr, prefix: u8) -> io::Result<()> {
        let mut body = vec![
            family(dst),
            prefix,
            0,
            0,
            RT_TABLE_MAIN,
            RTPROT_STATIC,
            RT_SCOPE_LINK,
            RTN_UNICAST,
        ];
        body.extend(0_u32.to_ne_bytes());
        let mut message = Message::new(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &body);
        message.attribute(RTA_DST, &octets(dst));
        message.attribute(RTA_OIF, &index.to_ne_bytes());
        self.request(message)
    }
}
