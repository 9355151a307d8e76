//! Attaches programs to interfaces: by TCX, else as a filter of clsact. Neither takes the place of anything that is there.
//!
//! A TCX link ends with its descriptor, or with the interface. A filter stays until it is deleted; the qdisc that it needs
//! is made where there is none, and left there if others have put filters into it.
//! All of it is about interfaces of the network namespace that the calling thread is in.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
};

use super::rtnetlink::{Route, attribute};

const BPF_LINK_CREATE: i64 = 28;
const BPF_TCX_INGRESS: u32 = 46;
const BPF_TCX_EGRESS: u32 = 47;

const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_NEWTFILTER: u16 = 44;
const RTM_DELTFILTER: u16 = 45;
const RTM_GETTFILTER: u16 = 46;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_DUMP: u16 = 0x300;

/// `TC_H_CLSACT`
const CLSACT: u32 = 0xffff_fff1;
const CLSACT_HANDLE: u32 = 0xffff_0000;
/// `TC_H_MIN_INGRESS`, `TC_H_MIN_EGRESS`
const PARENTS: [u32; 2] = [0xffff_fff2, 0xffff_fff3];
/// Preferences tried, so that a filter of another program is not in the way: late ones, as packets are only counted.
const PREFERENCES: std::ops::Range<u16> = 49_100..49_116;
const HANDLE: u32 = 1;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const DIRECT_ACTION: u32 = 1;
const ETH_P_ALL: u16 = 0x0003;

/// What was attached to an interface for one direction.
#[derive(Debug)]
pub enum Attached {
    /// Ends with its descriptor.
    Link(#[allow(dead_code, reason = "held for its drop")] OwnedFd),
    /// To be deleted with [`detach`].
    Filter {
        /// Its place among the filters.
        preference: u16,
        /// The qdisc was made for it.
        qdisc_made: bool,
    },
}

#[repr(C)]
#[derive(Default)]
struct LinkAttr {
    prog_fd: u32,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
    more: [u64; 6],
}

/// Attaches a program to received (0) or sent (1) packets of an interface.
///
/// # Errors
/// What TCX said, and what clsact did.
pub fn attach(
    program: BorrowedFd<'_>,
    ifindex: u32,
    way: u8,
    tcx: bool,
) -> Result<Attached, (Option<io::Error>, io::Error)> {
    let refused = if tcx {
        match link(program, ifindex, way) {
            Ok(link) => return Ok(Attached::Link(link)),
            // The interface is gone: so it would be for the other way.
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Err((None, error)),
            Err(error) => Some(error),
        }
    } else {
        None
    };
    filter(program, ifindex, way).map_err(|error| (refused, error))
}

fn link(program: BorrowedFd<'_>, ifindex: u32, way: u8) -> io::Result<OwnedFd> {
    let attr = LinkAttr {
        prog_fd: program.as_raw_fd().cast_unsigned(),
        target_ifindex: ifindex,
        attach_type: if way == 0 { BPF_TCX_INGRESS } else { BPF_TCX_EGRESS },
        ..LinkAttr::default()
    };
    // SAFETY: the attribute is the kernel's layout, zero where nothing is said.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_LINK_CREATE, &raw const attr, size_of::<LinkAttr>()) };
    match i32::try_from(fd) {
        // SAFETY: just made, and nobody else's.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// `struct tcmsg`
fn tcmsg(ifindex: u32, handle: u32, parent: u32, info: u32) -> Vec<u8> {
    let mut body = vec![0; 4];
    for number in [ifindex, handle, parent, info] {
        body.extend(number.to_ne_bytes());
    }
    body
}

fn filter(program: BorrowedFd<'_>, ifindex: u32, way: u8) -> io::Result<Attached> {
    let route = Route::open()?;
    let qdisc = [
        tcmsg(ifindex, CLSACT_HANDLE, CLSACT, 0),
        attribute(TCA_KIND, b"clsact\0"),
    ]
    .concat();
    let qdisc_made = match route.ask(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, &qdisc) {
        Ok(()) => true,
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => false,
        Err(error) => return Err(error),
    };
    let parent = parent(way);
    let options = [
        attribute(TCA_BPF_FD, &program.as_raw_fd().to_ne_bytes()),
        attribute(TCA_BPF_NAME, b"bpf-netlog\0"),
        attribute(TCA_BPF_FLAGS, &DIRECT_ACTION.to_ne_bytes()),
    ]
    .concat();
    let mut last = io::Error::from_raw_os_error(libc::EEXIST);
    for preference in PREFERENCES {
        let body = [
            tcmsg(ifindex, HANDLE, parent, info(preference)),
            attribute(TCA_KIND, b"bpf\0"),
            attribute(TCA_OPTIONS, &options),
        ]
        .concat();
        match route.ask(RTM_NEWTFILTER, NLM_F_CREATE | NLM_F_EXCL, &body) {
            Ok(()) => return Ok(Attached::Filter { preference, qdisc_made }),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => last = error,
            Err(error) => {
                last = error;
                break;
            }
        }
    }
    if qdisc_made {
        remove_qdisc(&route, ifindex);
    }
    Err(last)
}

fn parent(way: u8) -> u32 {
    let [ingress, egress] = PARENTS;
    if way == 0 { ingress } else { egress }
}

/// Preference and protocol of a filter.
fn info(preference: u16) -> u32 {
    u32::from(preference) << 16 | u32::from(ETH_P_ALL.to_be())
}

/// Takes off an interface of the caller's network namespace what needs that; what is gone already is no error.
pub fn detach(attached: Attached, ifindex: u32, way: u8) {
    let Attached::Filter { preference, qdisc_made } = attached else {
        return;
    };
    let Ok(route) = Route::open() else { return };
    let body = [
        tcmsg(ifindex, HANDLE, parent(way), info(preference)),
        attribute(TCA_KIND, b"bpf\0"),
    ]
    .concat();
    if let Err(error) = route.ask(RTM_DELTFILTER, 0, &body) {
        tracing::debug!(%error, ifindex, "A filter could not be deleted");
    }
    if qdisc_made {
        remove_qdisc(&route, ifindex);
    }
}

/// Deletes the qdisc that was made here, unless somebody has put a filter into it.
fn remove_qdisc(route: &Route, ifindex: u32) {
    for parent in PARENTS {
        let mut filters = 0;
        let request = tcmsg(ifindex, 0, parent, 0);
        let asked = route.dump(RTM_GETTFILTER, NLM_F_DUMP, &request, |kind, _| {
            filters += u32::from(kind == RTM_NEWTFILTER);
        });
        if asked.is_err() || filters > 0 {
            return;
        }
    }
    let body = [
        tcmsg(ifindex, CLSACT_HANDLE, CLSACT, 0),
        attribute(TCA_KIND, b"clsact\0"),
    ]
    .concat();
    if let Err(error) = route.ask(RTM_DELQDISC, 0, &body) {
        tracing::debug!(%error, ifindex, "A qdisc could not be deleted");
    }
}
