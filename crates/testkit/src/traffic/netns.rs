//! The test network: two network namespaces joined by a veth pair, made without any external command.
//!
//! ```text
//!   NAME-a: va 10.77.0.1..16/16, fd77::a:1..4/64  ═══  NAME-b: vb 10.77.128.1..16/16, fd77::b:1..4/64
//! ```
//! Each namespace is kept by a bind mount at `/run/netns/NAME-a|b`, so `ip netns exec` finds it too.

use std::{
    fs::{self, File},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use anyhow::Context as _;

use super::{
    netlink::{Netlink, VethEnd},
    sys,
};

/// IPv4 multicast group of the tests.
pub const GROUP_V4: Ipv4Addr = Ipv4Addr::new(239, 77, 0, 1);
/// IPv6 multicast group of the tests, link-local scope.
pub const GROUP_V6: Ipv6Addr = Ipv6Addr::new(0xff12, 0, 0, 0, 0, 0, 0, 0x77);
/// Broadcast address of the test network.
pub const BROADCAST: Ipv4Addr = Ipv4Addr::new(10, 77, 255, 255);
/// IPv4 addresses of each side.
pub const ADDRESSES_V4: u8 = 16;
/// IPv6 addresses of each side.
pub const ADDRESSES_V6: u16 = 4;

/// One side of the test network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The clients' side.
    A,
    /// The servers' side.
    B,
}

/// A test network that exists until [`TestNet::down`], or until it is dropped.
#[derive(Debug)]
pub struct TestNet {
    name: String,
}

impl Side {
    const BOTH: [Self; 2] = [Self::A, Self::B];

    /// Name of the side's interface.
    #[must_use]
    pub fn interface(self) -> &'static str {
        match self {
            Self::A => "va",
            Self::B => "vb",
        }
    }

    /// IPv4 addresses.
    #[must_use]
    pub fn v4(self) -> Vec<Ipv4Addr> {
        let third = if self == Self::A { 0 } else { 128 };
        (1..=ADDRESSES_V4)
            .map(|last| Ipv4Addr::new(10, 77, third, last))
            .collect()
    }

    /// IPv6 addresses.
    #[must_use]
    pub fn v6(self) -> Vec<Ipv6Addr> {
        let part = if self == Self::A { 0xa } else { 0xb };
        (1..=ADDRESSES_V6)
            .map(|last| Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, part, last))
            .collect()
    }
}

/// True for every address that only the tests use on the veth pair.
#[must_use]
pub fn is_test_address(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(v4) => v4 == GROUP_V4 || v4.octets().starts_with(&[10, 77]),
        IpAddr::V6(v6) => v6 == GROUP_V6 || v6.segments().starts_with(&[0xfd77]),
    }
}

/// Runs `work` in a network namespace, on a thread of its own: the caller's namespace stays what it is.
///
/// # Errors
/// The namespace cannot be entered, or `work` failed.
pub fn inside<T: Send>(netns: &File, work: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                sys::enter_netns(netns).context("entering a network namespace")?;
                work()
            })
            .join()
            .unwrap_or_else(|_| Err(anyhow::anyhow!("the thread in the network namespace panicked")))
    })
}

impl TestNet {
    /// Makes the network. A leftover of the same name is removed first.
    ///
    /// # Errors
    /// Not root, no veth in this kernel, or `/run` (and `/proc`) missing.
    pub fn up(name: &str, mtu: u32) -> anyhow::Result<Self> {
        remove(name);
        let net = Self { name: name.to_owned() };
        fs::create_dir_all("/run/netns").context("making /run/netns")?;
        for side in Side::BOTH {
            let path = net.path(side);
            File::create(&path).with_context(|| format!("making {}", path.display()))?;
            new_netns(&path)?;
        }
        let (a, b) = (File::open(net.path(Side::A))?, File::open(net.path(Side::B))?);
        // Made from inside a, so that no half-made interface ever shows in the machine's own namespace.
        inside(&a, || {
            Netlink::open()?
                .add_veth(
                    VethEnd {
                        name: Side::A.interface(),
                        netns: a.as_fd(),
                    },
                    VethEnd {
                        name: Side::B.interface(),
                        netns: b.as_fd(),
                    },
                    mtu,
                )
                .context("making a veth pair (is the kernel module veth loaded?)")
        })?;
        for (side, netns) in [(Side::A, &a), (Side::B, &b)] {
            inside(netns, || configure(side)).with_context(|| format!("configuring interface {}", side.interface()))?;
        }
        Ok(net)
    }

    /// File of one side's namespace, as for `--netns`.
    #[must_use]
    pub fn path(&self, side: Side) -> PathBuf {
        path(&self.name, side)
    }

    /// Keeps the network when `self` is dropped; [`TestNet::down`] removes it.
    pub fn keep(self) {
        std::mem::forget(self);
    }

    /// Removes the network of that name; nothing happens when there is none.
    pub fn down(name: &str) {
        remove(name);
    }
}

impl Drop for TestNet {
    fn drop(&mut self) {
        remove(&self.name);
    }
}

fn path(name: &str, side: Side) -> PathBuf {
    let letter = if side == Side::A { 'a' } else { 'b' };
    Path::new("/run/netns").join(format!("{name}-{letter}"))
}

fn remove(name: &str) {
    for side in Side::BOTH {
        let path = path(name, side);
        while sys::unmount(&path).is_ok() {}
        // Absent is what is wanted; anything else shows when the name is used again.
        let _ = fs::remove_file(&path);
    }
}

fn new_netns(path: &Path) -> anyhow::Result<()> {
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                sys::unshare_netns().context("making a network namespace (needs root)")?;
                sys::bind_mount(Path::new("/proc/thread-self/ns/net"), path)
                    .with_context(|| format!("keeping a network namespace at {}", path.display()))
            })
            .join()
            .unwrap_or_else(|_| Err(anyhow::anyhow!("the thread of the new network namespace panicked")))
    })
}

fn configure(side: Side) -> anyhow::Result<()> {
    let mut netlink = Netlink::open()?;
    netlink.set_up(sys::interface_index("lo")?).context("setting lo up")?;
    let index = sys::interface_index(side.interface())?;
    for ip in side.v4() {
        netlink
            .add_address(index, ip.into(), 16, Some(BROADCAST))
            .with_context(|| format!("adding {ip}"))?;
    }
    for ip in side.v6() {
        netlink
            .add_address(index, ip.into(), 64, None)
            .with_context(|| format!("adding {ip}"))?;
    }
    netlink.set_up(index).context("setting it up")?;
    netlink
        .add_route(index, Ipv4Addr::new(224, 0, 0, 0).into(), 4)
        .context("adding the multicast route")?;
    // More client ports, and no wait for their reuse; these are settings of the namespace alone.
    for (file, value) in [
        ("/proc/sys/net/ipv4/ip_local_port_range", "12000 64999"),
        ("/proc/sys/net/core/somaxconn", "8192"),
    ] {
        fs::write(file, value).with_context(|| format!("writing `{value}` to {file}"))?;
    }
    Ok(())
}
